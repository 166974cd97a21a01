"""Loss of each held-out row, and the measurements of a base model that its runs share."""

import math
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from qlora_helpers import files
from qlora_helpers.config import Config
from qlora_helpers.data import prompts, rendering, sources
from qlora_helpers.data.cleaning import Data
from qlora_helpers.data.prompts import IGNORE, Example
from qlora_helpers.device import Device, autocast
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import answers
from qlora_helpers.evaluation.answers import Shots
from qlora_helpers.evaluation.context import RunContext
from qlora_helpers.evaluation.row_losses import RowLoss, read_losses, to_rows
from qlora_helpers.models import base as base_model
from qlora_helpers.models import forward
from qlora_helpers.planning import memory
from qlora_helpers.runs import RunFolder

SHOTS = 3  # examples in the prompt of the base model
SHOTS_FROM = 0.25  # share of the training rows that they are drawn from: those of ordinary length
GENERAL_LENGTH = 512


def heldout_losses(
    model: Any, examples: list[Example], device: Device, batch_size: int = memory.MOST_ROWS
) -> list[RowLoss]:
    """Loss of every row, in the given order, from the logits of the model's own forward pass; on a CPU in float32.

    On a GPU, rows that are shorter than the longest are evaluated more at once than `batch_size`, in no more memory.
    Keeps the model's mode and draws no random numbers.
    """
    was_training = model.training
    model.eval()
    losses: dict[int, RowLoss] = {}
    lengths = [len(example.input_ids) for example in examples]
    # A pass on a GPU takes about as long for few tokens as for many, on a CPU as long as its tokens.
    limits = (len(lengths), batch_size * max(lengths, default=0)) if device.kind == "cuda" else (batch_size, math.inf)
    with base_model.evaluating_in_float32(model, device), torch.inference_mode(), autocast(device):
        for batch in forward.batches_by_length(lengths, *limits):
            losses |= dict(zip(batch, _batch_losses(model, [examples[i] for i in batch]), strict=True))
    model.train(was_training)
    return [losses[index] for index in range(len(examples))]


def eval_batch_sizes(config: Config, device: Device) -> tuple[int, int]:
    """Batch sizes for rows and for questions: on a GPU as large as fits in the memory that training needs."""
    if device.kind != "cuda":
        return memory.MOST_ROWS, memory.MOST_ANSWERS
    try:
        load = memory.workload_of(config)
    except UserError:  # an architecture that the memory plan does not know
        return 1, 8
    return memory.rows_at_once(load), memory.answers_at_once(load)


def _batch_losses(model: Any, batch: list[Example]) -> list[RowLoss]:
    """Losses of a batch. Padding is on the right, so no token of a row sees it."""
    where = model.get_input_embeddings().weight.device
    ids = pad_sequence([torch.tensor(example.input_ids) for example in batch], batch_first=True).to(where)
    wanted = [torch.tensor([*example.labels[1:], IGNORE]) for example in batch]
    labels = pad_sequence(wanted, batch_first=True, padding_value=IGNORE).to(where)
    columns = (labels != IGNORE).any(dim=0).nonzero().flatten()
    logits = forward.logits_at(model, ids, columns)
    rows = []
    for example, row_logits, row_labels in zip(batch, logits, labels[:, columns], strict=True):
        trained = row_labels != IGNORE
        parts = zip(
            row_logits[trained].split(memory.EVALUATION_LOGITS),
            row_labels[trained].split(memory.EVALUATION_LOGITS),
            strict=True,
        )
        sums = [torch.nn.functional.cross_entropy(part.float(), label, reduction="none") for part, label in parts]
        total = torch.cat(sums).double().sum().item() if sums else 0.0
        rows.append(RowLoss(example.row.id, total, int(trained.sum()), answer_bytes(example), example.row.group))
    return rows


def answer_bytes(example: Example) -> int:
    """UTF-8 bytes of the answers; 0 for a truncated row."""
    if example.cut:
        return 0
    return sum(len(turn["content"].encode()) for turn in example.row.answers)


def general_examples(config: Config, tokenizer: Any) -> list[Example]:
    """The project's general questions, in the model's own chat template if it has one."""
    template = "auto" if getattr(tokenizer, "chat_template", None) else config.template
    general = config.replace(
        dataset=str(sources.general_data()), template=template, max_length=GENERAL_LENGTH, train_on="assistant",
        subset=None, split=None, columns=None,
    )  # fmt: skip
    return list(prompts.encode(sources.load(general).rows, general, tokenizer))


def choose_shots(data: Data, data_seed: int) -> Shots:
    """Question and answer of three ordinary training rows, the same for any number and any draw of training rows.

    They are drawn with `data_seed` from the quarter of the rows whose answers are closest to the median length.
    """
    lengths = {item.row.id: len(item.row.rounds[0][1]["content"]) for item in data.cleaned.train}
    middle = median(lengths.values())
    closest = sorted(data.cleaned.train, key=lambda item: (abs(lengths[item.row.id] - middle), item.row.id))
    ordinary = closest[: max(SHOTS, round(SHOTS_FROM * len(closest)))]
    drawn = sorted(ordinary, key=lambda item: files.short_hash([data_seed, item.row.id]))
    return tuple(turn for item in drawn[:SHOTS] for turn in item.row.rounds[0])


def after_shots(example: Example, shots: Shots, config: Config, tokenizer: Any) -> Example:
    """The row at the end of a conversation that begins with the shots. The same tokens count as without them."""
    whole = replace(example.row, messages=answers.with_shots(example.row.messages, shots))
    (longer,) = prompts.encode([whole], config.replace(max_length=10**6), tokenizer)
    ids = longer.input_ids[: len(longer.input_ids) - example.cut]
    first = next(i for i, label in enumerate(example.labels) if label != IGNORE)
    own = len(example.labels) - first
    if ids[-own:] != example.input_ids[-own:]:
        raise UserError("template: the model's chat template writes the last turn differently after earlier turns.")
    return replace(example, input_ids=ids, labels=[IGNORE] * (len(ids) - own) + example.labels[-own:])


def baseline_folder(config: Config, data: Data, device: Device, folder: Path) -> RunFolder:
    """Folder of the base model's losses, named after everything that they depend on, including the dtype."""
    keys = ("model", "revision", "quantization", *rendering.SETTINGS, "train_on")
    depends = [getattr(config, key) for key in (*keys, "max_new_tokens", "max_thinking_tokens")]
    tests = [example.row.tests for example in data.heldout if example.row.tests]
    depends += [config.score, *tests] if config.score else []  # kept with the answers
    depends += [config.double_quant and config.quantization != "none"]
    read = [(len(example.input_ids), example.cut) for example in data.heldout]  # a limit that cuts no row changes none
    depends += [device.dtype, data.heldout_fingerprint, read]
    depends += ["losses in float32"] if device.kind == "cpu" and device.dtype != "float32" else []
    return RunFolder(folder / f"base-{files.short_hash(depends)}")


def base_losses(
    base: Any, config: Config, data: Data, device: Device, folder: Path, batch_size: int | None = None
) -> list[RowLoss]:
    """Held-out losses of the base model, measured once for all notebooks and runs that share model and rows."""
    where = baseline_folder(config, data, device, folder)
    if not (where / "heldout_losses.jsonl").exists():
        losses = heldout_losses(base, data.heldout, device, batch_size or eval_batch_sizes(config, device)[0])
        files.write_jsonl(where / "heldout_losses.jsonl", to_rows(losses))
    return read_losses(where)


def baseline(base: Any, context: RunContext) -> list[RowLoss]:
    """Measure the base model once for all runs that share it and the held-out rows; returns its held-out losses.

    Answers, losses on general questions and held-out losses are measured and, with `few_shot`, held-out losses with
    three examples in the prompt. What was measured before is read.
    """
    config, data, device, folder = context.config, context.data, context.device, context.run.path.parent
    where = baseline_folder(config, data, device, folder)
    few_shot = RunFolder(where / "few_shot")
    asked = answers.heldout_prompts(data.heldout, config.n_answers)
    answered = files.read_jsonl(where / "answers.jsonl") if (where / "answers.jsonl").exists() else []
    if len(answered) < len(asked) or not (where / "general_losses.jsonl").exists():
        print("Measuring the base model, once for all runs with these held-out rows …", flush=True)
        measure_answers(base, context, where)
    # With train_on=all the question counts too, and its tokens differ after an earlier turn.
    if config.few_shot and config.train_on == "assistant" and not (few_shot / "heldout_losses.jsonl").exists():
        _measure_few_shot(base, context, few_shot)
    return base_losses(base, config, data, device, folder)


def _measure_few_shot(base: Any, context: RunContext, where: RunFolder) -> None:
    config, data, tokenizer, device = context.config, context.data, context.tokenizer, context.device
    shots = choose_shots(data, config.data_seed)
    try:
        examples = [after_shots(example, shots, config, tokenizer) for example in data.heldout]
    except UserError as error:
        print(f"{error} Skipping the base model with examples in its prompt.")
        return
    rows, questions = eval_batch_sizes(config, device)
    if device.kind == "cuda":  # on a CPU these answers take too long for what they show
        asked = answers.heldout_prompts(data.heldout, config.n_answers)
        answered = answers.generate(base, tokenizer, config, device, asked, shots, questions)
        files.write_jsonl(where / "answers.jsonl", answered)
    files.write_jsonl(where / "heldout_losses.jsonl", to_rows(heldout_losses(base, examples, device, rows)))


def measure_answers(model: Any, context: RunContext, where: RunFolder) -> None:
    """Answer the published and the held-out questions, and measure the losses on general questions."""
    config, tokenizer, device = context.config, context.tokenizer, context.device
    asked = answers.heldout_prompts(context.data.heldout, config.n_answers)
    _, questions = eval_batch_sizes(config, device)
    answered = answers.generate(model, tokenizer, config, device, asked, batch_size=questions)
    files.write_jsonl(where / "answers.jsonl", answered)
    rows, _ = eval_batch_sizes(config.replace(heldout_max_length=GENERAL_LENGTH), device)
    general = heldout_losses(model, general_examples(config, tokenizer), device, rows)
    files.write_jsonl(where / "general_losses.jsonl", to_rows(general))
