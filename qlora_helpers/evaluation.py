"""Held-out loss per row, and sample answers: did it learn, and did it learn to stop?"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from qlora_helpers import runs
from qlora_helpers.config import Config
from qlora_helpers.device import Device
from qlora_helpers.errors import UserError
from qlora_helpers.runs import RunFolder
from qlora_helpers.templates import IGNORE, Example, render_prompt, tokenize

PUBLISHED_PROMPTS = ("Explain what is a variable in programming.", "How do computers store data?")
LOGIT_ROWS = 512  # tokens whose logits are held at once: 512 x 49,152 words x 4 bytes is 96 MiB


@dataclass(frozen=True)
class RowLoss:
    """Loss of one held-out row: summed over its trained tokens, in float32 (nats)."""

    id: str
    loss_sum: float
    tokens: int


def mean_loss(losses: list[RowLoss]) -> float:
    """Mean per trained token: long rows weigh more, as they do in training."""
    return sum(row.loss_sum for row in losses) / sum(row.tokens for row in losses)


def heldout_losses(model: Any, examples: list[Example], device: Device, batch_size: int = 8) -> list[RowLoss]:
    """Loss of every row, in the order given. Leaves the model in the mode it was in, and draws no random numbers."""
    was_training = model.training
    model.eval()
    # Rows of like length together: less padding. Padding does not change a row's loss.
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].input_ids))
    losses: dict[int, RowLoss] = {}
    with torch.inference_mode(), autocast(device):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for index, loss in zip(batch, _batch_losses(model, [examples[i] for i in batch]), strict=True):
                losses[index] = loss
    model.train(was_training)
    return [losses[index] for index in range(len(examples))]


def autocast(device: Device) -> Any:
    """The arithmetic the trainer uses on this device, so that losses in and after training agree."""
    mixed = device.kind == "cuda" and device.dtype != "float32"
    return torch.autocast(device.kind, getattr(torch, device.dtype), enabled=mixed)


def _batch_losses(model: Any, batch: list[Example]) -> list[RowLoss]:
    """Only trained positions go through the output head: it costs more than any other layer."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    where = inner.get_input_embeddings().weight.device
    ids = _pad([example.input_ids for example in batch], 0).to(where)
    labels = _pad([example.labels for example in batch], IGNORE).to(where)[:, 1:]
    mask = _pad([[1] * len(example.input_ids) for example in batch], 0).to(where)
    hidden = inner.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels != IGNORE
    states, targets = hidden[wanted], labels[wanted]
    token_losses = torch.cat(
        [
            torch.nn.functional.cross_entropy(inner.get_output_embeddings()(chunk).float(), target, reduction="none")
            for chunk, target in zip(states.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
        ]
    ).cpu()
    counts = wanted.sum(dim=1).tolist()
    sums = [part.double().sum().item() for part in token_losses.split(counts)]
    return [RowLoss(e.row.id, s, n) for e, s, n in zip(batch, sums, counts, strict=True)]


def _pad(rows: list[list[int]], filler: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def answer_prompts(heldout: list[Example]) -> list[str]:
    """What the models are asked to answer: the report's two questions and the first two held-out ones."""
    first = [example.row.messages[0] for example in heldout[:2]]
    return [*PUBLISHED_PROMPTS, *(f"{m['content']}\n\n{m['input']}" if m.get("input") else m["content"] for m in first)]


def answer(model: Any, tokenizer: Any, config: Config, device: Device, prompts: list[str]) -> list[dict[str, Any]]:
    """Greedy answers, one batch. `stopped` says whether the model ended by itself within `max_new_tokens`."""
    texts = [render_prompt(({"role": "user", "content": p},), config, tokenizer) for p in prompts]
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"  # a gap between prompt and answer would be read as text
    batch = tokenize(texts, tokenizer, return_tensors="pt", padding=True)
    batch = batch.to(model.get_input_embeddings().weight.device)
    with torch.inference_mode(), autocast(device):
        output = model.generate(
            **batch,
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    tokenizer.padding_side = side
    model.train(was_training)
    new = output[:, batch["input_ids"].shape[1] :].tolist()
    return [_describe(prompt, ids, tokenizer) for prompt, ids in zip(prompts, new, strict=True)]


def _describe(prompt: str, ids: list[int], tokenizer: Any) -> dict[str, Any]:
    stopped = tokenizer.eos_token_id in ids
    kept = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
    text = tokenizer.decode(kept, skip_special_tokens=True).strip()
    return {"prompt": prompt, "answer": text, "stopped": stopped, "tokens": len(kept)}


def to_rows(losses: list[RowLoss]) -> list[dict[str, Any]]:
    """Plain values, as written to `heldout_losses.jsonl`."""
    return [asdict(loss) for loss in losses]


def read_losses(run: RunFolder) -> list[RowLoss]:
    """Per-row held-out losses of a run or of the base, as `to_rows` wrote them."""
    path = run / "heldout_losses.jsonl"
    if not path.exists():
        raise UserError(f"run folder: {run.path} is not complete. Mend: run its notebook to the end.")
    return [RowLoss(**row) for row in runs.read_jsonl(path)]
