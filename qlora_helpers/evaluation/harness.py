"""Base model and adapter on tasks of lm-evaluation-harness, compared on the same samples."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from qlora_helpers import files, parse
from qlora_helpers.config import Config
from qlora_helpers.device import Device, limit_memory
from qlora_helpers.errors import UserError, nearest
from qlora_helpers.evaluation import losses, paired
from qlora_helpers.evaluation.paired import MetricDifference
from qlora_helpers.models import hub, qlora
from qlora_helpers.planning import compute_dtype
from qlora_helpers.runs import RunFolder
from qlora_helpers.wording import counted


@dataclass(frozen=True)
class Result:
    """A metric of a task: lm-eval's own numbers for both models.

    `difference` is paired over the samples. It is None for a metric that is not the mean of one number per sample.
    """

    task: str
    metric: str
    base: float
    adapter: float
    difference: MetricDifference | None

    def __str__(self) -> str:
        if self.difference is None:
            values = f"{self.base:.4g} and {self.adapter:.4g}"
            return f"{self.task} {self.metric}: {values} (no value per sample, no interval)"
        return f"{self.difference} on {counted(self.difference.answers, 'sample')}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to `harness.json`."""
        return vars(self) | {"difference": self.difference and self.difference.to_dict()}


def evaluate(run: RunFolder, tasks: Sequence[str], limit: int | None = None, chat: bool = False) -> list[Result]:
    """Evaluate the base model of a run, then its adapter, on `tasks`: names that lm-eval knows, or YAML files.

    `limit` is the number of samples per task. With `chat`, prompts are written in the model's own chat template. The
    results are written to `harness.json` in the run folder. Raises `UserError` if lm-eval is not installed, or if a
    task is unknown or its data cannot be loaded.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} is too small. Fix: use 1 or more.")
    if find_spec("lm_eval") is None:
        raise UserError("harness: lm-eval is not installed. Fix: pip install 'qlora-helpers[harness]'.")
    import lm_eval
    from lm_eval.tasks import TaskManager

    qlora.check_adapter(run.adapter)
    config, tokenizer = run.config(), hub.saved_tokenizer(run.adapter)
    if chat and not tokenizer.chat_template:
        raise UserError(f"chat template: {config.model} has none. Fix: leave out --chat-template.")
    manager = TaskManager()
    names = _names(manager, tasks)
    device = compute_dtype.as_begun(compute_dtype.device_for(config), run.compute_dtype())
    limit_memory(device, config.memory_limit_gib)
    options = {
        "tasks": names,
        "task_manager": manager,
        "limit": limit,
        "apply_chat_template": chat,
        "bootstrap_iters": 0,
    }
    model = qlora.load_base(config, device)
    base = lm_eval.simple_evaluate(_wrapped(model, tokenizer, config, device), **options)
    model = qlora.load_adapter(model, run.adapter)
    adapter = lm_eval.simple_evaluate(_wrapped(model, tokenizer, config, device), **options)
    results = compare(base, adapter)
    settings = {"lm_eval": lm_eval.__version__, "limit": limit, "chat_template": chat}
    files.write_json(run / "harness.json", settings | {"results": [result.to_dict() for result in results]})
    return results


def compare(base: Mapping[str, Any], adapter: Mapping[str, Any]) -> list[Result]:
    """Every metric of two results of lm-eval, Holm-corrected together. Raises `UserError` if their samples differ."""
    made = [
        _result(task, key, base, adapter)
        for task, metrics in base["results"].items()
        for key, value in metrics.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    ]
    corrected = iter(paired.holm([result.difference for result in made if result.difference]))
    return [replace(result, difference=next(corrected)) if result.difference else result for result in made]


def _result(task: str, key: str, base: Mapping[str, Any], adapter: Mapping[str, Any]) -> Result:
    metric, _, kind = key.partition(",")
    before, after = (float(side["results"][task][key]) for side in (base, adapter))
    name = metric if kind == "none" else f"{metric} ({kind})"
    x, y = (_values(side, task, metric, kind) for side in (base, adapter))
    if x.keys() != y.keys():
        raise UserError(f"harness: {task} was evaluated on different samples. Fix: evaluate both models again.")
    sides = [list(x.values()), [y[key] for key in x]]
    for values, reported in zip(sides, (before, after), strict=True):
        numbers = bool(values) and all(isinstance(value, int | float) for value in values)
        if not numbers or not math.isclose(sum(values) / len(values), reported, rel_tol=1e-6, abs_tol=1e-9):
            return Result(task, name, before, after, None)
    yes_or_no = all(value in (0, 1) for values in sides for value in values)
    compared = paired.share if yes_or_no else paired.ratio
    return Result(task, name, before, after, compared(f"{task} {name}", sides[0], sides[1], [""] * len(x)))


def _values(results: Mapping[str, Any], task: str, metric: str, kind: str) -> dict[tuple[Any, ...], Any]:
    """What lm-eval logged for each sample of a task, by its number and the fingerprint of its text."""
    samples = results.get("samples", {}).get(task, [])
    return {
        (sample["doc_id"], sample["doc_hash"]): sample[metric]
        for sample in samples
        if sample["filter"] == kind and metric in sample
    }


def _names(manager: Any, tasks: Sequence[str]) -> list[str]:
    """Tasks as lm-eval takes them: names, and paths of files without `~`. Raises `UserError` for others."""
    names = [task if task in manager.all_tasks else _task_file(manager, task) for task in tasks]
    try:
        manager.load(names)
    except Exception as error:  # many kinds: no network, no such file, a damaged YAML file
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"harness: the data of {', '.join(tasks)} cannot be loaded ({why}). Fix: check the connection, or the "
            "files that the task names; paths in it are relative to the current folder."
        ) from None
    return names


def _task_file(manager: Any, task: str) -> str:
    file = parse.path(task, "harness")
    if not file.is_file():
        known = nearest(task, manager.all_tasks) if len(task) > 2 else ""
        known = known if known.startswith(" Did") else ""
        raise UserError(f"harness: no task '{task}'.{known} Fix: name a task of lm-eval or a YAML file.")
    return str(file)


def _wrapped(model: Any, tokenizer: Any, config: Config, device: Device) -> Any:
    """The loaded model as lm-eval's own class for models of transformers, computing as in training."""
    from lm_eval.models.huggingface import HFLM

    rows, _ = losses.eval_batch_sizes(config, device)
    mixed = device.dtype if device.kind == "cuda" and device.dtype != "float32" else None
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=rows, mixed_precision_dtype=mixed)
