"""Answers of several models to the same questions: a picker where a person can use one, a table everywhere else."""

import html
from contextlib import AbstractContextManager
from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from qlora_helpers import notebook
from qlora_helpers.config import Config
from qlora_helpers.device import Device, limit_memory, on_colab
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import answers
from qlora_helpers.evaluation.comparison import BASE
from qlora_helpers.models import hub
from qlora_helpers.planning import compute_dtype
from qlora_helpers.runs import RunFolder

if TYPE_CHECKING:
    from qlora_helpers.models.qlora import Adapters

SHOWN = 8  # questions of the table: your own, the published two and a few held-out ones
SAME_BASE = ("model", "revision", "quantization", "double_quant", "compute_dtype")
WIDGET = "application/vnd.jupyter.widget-view+json"
_CELL = "text-align:left;vertical-align:top"

Entry = dict[str, str]  # "prompt", and an answer under the name of each model


@dataclass(frozen=True)
class Loaded:
    """One base in memory with the adapters of several runs on it, and the config that each model is asked with."""

    adapters: "Adapters"
    configs: dict[str, Config]  # the base's, then each experiment's
    tokenizer: Any
    device: Device

    def use(self, name: str) -> AbstractContextManager[Any]:
        """The model called `name`, the base or an experiment, for the length of a `with`."""
        return self.adapters.use(None if name == BASE else name)


def load(experiments: dict[str, list[RunFolder]]) -> Loaded:
    """The base model and the adapter of the first run of each experiment. The base is asked in the first one's layout.

    Raises `UserError` if the runs are not of one base model, or trained its biases.
    """
    first = {name: group[0] for name, group in experiments.items()}
    configs = {name: run.config() for name, run in first.items()}
    shared = next(iter(configs.values()))
    for name, config in configs.items():
        differ = [key for key in SAME_BASE if getattr(config, key) != getattr(shared, key)]
        if differ:
            raise UserError(
                f"question: {name} has another base than {next(iter(configs))} ({differ[0]} differs). Fix: ask runs "
                "of one base model."
            )
    from qlora_helpers.models import qlora  # heavy, and not needed to look at answers that are there

    device = compute_dtype.as_begun(compute_dtype.device_for(shared), next(iter(first.values())).compute_dtype())
    limit_memory(device, shared.memory_limit_gib)
    tokenizer = hub.load_tokenizer(shared)
    adapters = qlora.load_adapters(qlora.load_base(shared, device), {name: run.adapter for name, run in first.items()})
    return Loaded(adapters, {BASE: shared, **configs}, tokenizer, device)


def ask(prompts: list[str], experiments: dict[str, list[RunFolder]]) -> list[Entry]:
    """Greedy answers of the base model and of the first run of each experiment, all on one base in memory.

    Raises `UserError` for what `load` refuses.
    """
    loaded = load(experiments)
    found: list[Entry] = [{"prompt": prompt} for prompt in prompts]
    asked = [{"prompt": prompt, "reference": None} for prompt in prompts]
    for name, config in loaded.configs.items():
        with loaded.use(name) as switched:
            said = answers.generate(switched, loaded.tokenizer, config, loaded.device, asked)
        for entry, answer in zip(found, said, strict=True):
            entry[name] = answer["answer"]
    return found


@dataclass(frozen=True)
class Table:
    """The first few questions and every answer, as HTML or as text. Nothing in a text takes effect as HTML."""

    entries: list[Entry]

    def __repr__(self) -> str:
        parts = []
        for entry in self.entries[:SHOWN]:
            said = [f"  [{name}] {' '.join(text.split())}" for name, text in entry.items() if name != "prompt"]
            parts.append("\n".join([" ".join(entry["prompt"].split()), *said]))
        return "\n\n".join([*parts, *([self._rest] if self._rest else [])])

    def _repr_html_(self) -> str:
        rest = f"<p>{self._rest}</p>" if self._rest else ""
        return _html(self.entries[:SHOWN]) + rest

    @property
    def _rest(self) -> str:
        more = len(self.entries) - SHOWN
        return f"… and {more} more: in the picker of a running notebook, and in comparison.json." if more > 0 else ""


class Picker:
    """A list of questions to pick from, and the answers to the one that is picked. Without widgets it is the table."""

    def __init__(self, entries: list[Entry]) -> None:
        import ipywidgets as widgets

        self.table = Table(entries)
        labels = [f"{n}. {shorten(entry['prompt'], 90, placeholder=' …')}" for n, entry in enumerate(entries, 1)]
        options = list(zip(labels, range(len(entries)), strict=True))
        self.choice = widgets.Dropdown(options=options, description="asked:", layout=widgets.Layout(width="100%"))
        self.shown = widgets.HTML()
        self.box = widgets.VBox([self.choice, self.shown])
        self.choice.observe(self._show, names="value")
        self._show()

    def _show(self, change: Any = None) -> None:
        self.shown.value = _html([self.table.entries[self.choice.value]])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return bundle(self.box, repr(self.table), self.table._repr_html_())


def bundle(box: Any, text: str, page: str) -> dict[str, Any]:
    """What a cell shows: a widget where it lives, the text or the HTML page where a stored notebook is read."""
    view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    found: dict[str, Any] = {WIDGET: view, "text/plain": text}
    if not on_colab():  # others show the first kind they know; which of the two Colab would take is not documented
        found["text/html"] = page
    return found


def show(entries: list[Entry]) -> Table | Picker:
    """A picker, if someone is there to pick; else the table, and no widget that a stored notebook would keep."""
    return Picker(entries) if notebook.is_interactive() else Table(entries)


def _html(entries: list[Entry]) -> str:
    """A line a question and a line an answer. `tex2jax_ignore`: dollar signs are no formulas either."""
    lines = []
    for entry in entries:
        lines.append(f'<tr><th colspan="2" style="{_CELL}">{_text(entry["prompt"])}</th></tr>')
        for name, text in entry.items():
            if name != "prompt":
                lines.append(
                    f'<tr><td style="{_CELL}"><i>{_text(name)}</i></td><td style="{_CELL}">{_text(text)}</td></tr>'
                )
    return f'<table class="tex2jax_ignore">{"".join(lines)}</table>'


def _text(text: str) -> str:
    return html.escape(text).replace("\n", "<br>") or "(empty)"
