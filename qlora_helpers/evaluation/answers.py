"""Greedy answers of a model to held-out questions."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from transformers import GenerationConfig

from qlora_helpers.config import Config
from qlora_helpers.data import rendering
from qlora_helpers.data.prompts import Example, tokenize
from qlora_helpers.data.schema import TURN_MARKER, Message
from qlora_helpers.data.turns import split_thought
from qlora_helpers.device import Device, autocast
from qlora_helpers.errors import cause
from qlora_helpers.evaluation import scores
from qlora_helpers.models import forward
from qlora_helpers.planning import memory

PUBLISHED_PROMPTS = ("Explain what is a variable in programming.", "How do computers store data?")

Shots = tuple[Message, ...]


def heldout_prompts(heldout: list[Example], number: int) -> list[dict[str, Any]]:
    """Prompts to answer: two published questions, then the last question of each of `number` held-out rows; none for 0.

    A held-out row is asked as it is trained: `turns` are its system prompt, input and earlier rounds. `group` names
    what the row belongs to, and `tests` is code that its answer has to pass, if the row has them.
    """
    if not number:
        return []
    asked: list[dict[str, Any]] = [{"prompt": prompt, "reference": None} for prompt in PUBLISHED_PROMPTS]
    for example in heldout[:number]:
        *turns, answer = example.row.messages
        question = next(turn for turn in reversed(turns) if turn["role"] == "user")
        given = f"\n\n{question['input']}" if question.get("input") else ""
        entry = {"prompt": question["content"] + given, "reference": answer["content"], "turns": turns}
        further = {"group": example.row.group, "tests": example.row.tests}
        asked.append(entry | {name: text for name, text in further.items() if text})
    return asked


def generate(
    model: Any,
    tokenizer: Any,
    config: Config,
    device: Device,
    asked: list[dict[str, Any]],
    shots: Shots = (),
    batch_size: int = memory.MOST_ANSWERS,
) -> list[dict[str, Any]]:
    """Greedy answers to each prompt, or to the conversation in `turns`; `shots` are example turns that precede it.

    Adds to each entry: `answer`; `thought`, what the model wrote as a thought before it; `stopped`, whether the model
    ended it within the limit of tokens; `invented`, whether the model continued with a turn of someone else; `tokens`,
    the number of tokens it wrote; and with `config.score`, what `scores.add` does.
    """
    if not asked:
        return []
    turns = [entry.get("turns") or [{"role": "user", "content": entry["prompt"]}] for entry in asked]
    prompts = tokenize([rendering.render_prompt(with_shots(one, shots), config, tokenizer) for one in turns], tokenizer)
    reader = AnswerReader(config, tokenizer)
    most_tokens = batch_size * memory.question_tokens(config)
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"  # padding between prompt and answer would be read as text
    answered: dict[int, dict[str, Any]] = {}
    try:
        for part in forward.batches_by_length([len(ids) for ids in prompts], batch_size, most_tokens):
            outputs = _continue(model, tokenizer, config, device, [prompts[i] for i in part], reader.ends)
            for i, ids in zip(part, outputs, strict=True):
                answered[i] = {key: asked[i][key] for key in asked[i] if key != "turns"} | reader.read(ids)
    finally:  # the tokenizer is shared by all runs of a notebook
        tokenizer.padding_side = side
        model.train(was_training)
    rows = [answered[i] for i in range(len(asked))]
    return scores.add(rows, config.score) if config.score else rows


def with_shots(turns: Sequence[Message], shots: Shots) -> Shots:
    """Return a conversation that begins with examples, after its system prompt."""
    head = tuple(takewhile(lambda turn: turn["role"] == "system", turns))
    return (*head, *shots, *turns[len(head) :])


def cache_argument(model: Any) -> str:
    """Name of the cache argument in this version of transformers: newer versions warn about the old name."""
    return "cache" if forward.accepts(model, "cache") else "past_key_values"


@contextmanager
def neutral_generation(model: Any) -> Iterator[None]:
    """Generate without the model's `generation_config`: its repetition penalty would change greedy answers too."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT reads the inner model's
    own = getattr(inner, "generation_config", None)
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def _continue(
    model: Any, tokenizer: Any, config: Config, device: Device, prompts: list[list[int]], ends: list[int]
) -> list[list[int]]:
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    batch = batch.to(model.get_input_embeddings().weight.device)
    options = {
        "max_new_tokens": config.max_new_tokens + (config.max_thinking_tokens if config.thinking else 0),
        "do_sample": False,
        "eos_token_id": ends,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.inference_mode(), autocast(device), neutral_generation(model):
        output = _from_graph(model, batch, options) if device.kind == "cuda" else None
        if output is None:
            output = model.generate(**batch, **options)
    return output[:, batch["input_ids"].shape[1] :].tolist()


def _from_graph(model: Any, batch: Any, options: dict[str, Any]) -> Any:
    """Generate with each token as a replay of a CUDA graph; None if the model cannot, with a line if it should."""
    cache = forward.static_cache(model, batch["input_ids"].shape[1] + options["max_new_tokens"])
    if cache is None:
        return None
    try:
        with forward.single_tokens_replayed(model):
            return model.generate(**batch, **options, **{cache_argument(model): cache}, disable_compile=True)
    except Exception as error:
        print(f"Answers take longer: no CUDA graph of this model ({cause(error)}).", flush=True)
        return None


class AnswerReader:
    """Reads generated tokens: where the answer ends, what of it is thought, and what are its words."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ends = rendering.end_tokens(config, tokenizer)
        self.preamble = rendering.template_of(config, tokenizer).preamble.strip()
        self.marks = rendering.control_marks(config, tokenizer)

    def read(self, ids: list[int]) -> dict[str, Any]:
        """Return the answer without its thought and without what the template writes before it.

        `thought` is the text inside the marks of a thought. A thought that was not closed leaves an empty answer.
        """
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        kept = ids[:end]
        text = self.tokenizer.decode(kept)
        thought, words = split_thought(text.strip().removeprefix(self.preamble))
        plain = self.tokenizer.decode(
            self.tokenizer(words, add_special_tokens=False)["input_ids"], skip_special_tokens=True
        )
        return {
            "answer": plain.strip(),
            "thought": thought,
            "stopped": end is not None,
            "invented": bool(TURN_MARKER.search(words) or self.marks.search(words)),
            "tokens": len(kept),
        }
