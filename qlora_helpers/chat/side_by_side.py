"""Answer the same questions with several models, and show the answers in a picker or, without widgets, a table."""

import html
from contextlib import AbstractContextManager
from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from qlora_helpers.config import Config
from qlora_helpers.device import Device, limit_memory, on_colab
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import answers
from qlora_helpers.evaluation.row_losses import BASE
from qlora_helpers.models import hub
from qlora_helpers.notebook import CELL, is_interactive
from qlora_helpers.planning import compute_dtype
from qlora_helpers.runs import RunFolder

if TYPE_CHECKING:
    from qlora_helpers.models.qlora import Adapters

SHOWN = 8  # questions in the table: your own, the two published ones and a few held-out ones
SAME_BASE = ("model", "revision", "quantization", "double_quant", "compute_dtype")
WIDGET = "application/vnd.jupyter.widget-view+json"

Entry = dict[str, str]  # the question under "prompt", and each answer under the name of its model


@dataclass(frozen=True)
class Loaded:
    """One base model in memory with the adapters of several runs, and the config that each is prompted with."""

    adapters: "Adapters"
    configs: dict[str, Config]  # for the base model, then for each experiment
    tokenizer: Any
    device: Device

    def use(self, name: str) -> AbstractContextManager[Any]:
        """Return a context manager that yields the model called `name`: the base model or an experiment."""
        return self.adapters.use(None if name == BASE else name)


def load(experiments: dict[str, list[RunFolder]]) -> Loaded:
    """Load the base model and the adapter of the first run of each experiment.

    The base model is prompted in the format of the first experiment. Raises `UserError` if the runs have different base
    models, or if a run trained biases.
    """
    first = {name: group[0] for name, group in experiments.items()}
    configs = {name: run.config() for name, run in first.items()}
    shared = next(iter(configs.values()))
    for name, config in configs.items():
        differ = [key for key in SAME_BASE if getattr(config, key) != getattr(shared, key)]
        if differ:
            raise UserError(
                f"question: {name} and {next(iter(configs))} have different base models ({differ[0]} differs). Fix: "
                "ask runs of the same base model."
            )
    from qlora_helpers.models import qlora  # slow to import, and not needed to show saved answers

    device = compute_dtype.as_begun(compute_dtype.device_for(shared), next(iter(first.values())).compute_dtype())
    limit_memory(device, shared.memory_limit_gib)
    tokenizer = hub.load_tokenizer(shared)
    adapters = qlora.load_adapters(qlora.load_base(shared, device), {name: run.adapter for name, run in first.items()})
    return Loaded(adapters, {BASE: shared, **configs}, tokenizer, device)


def ask(prompts: list[str], experiments: dict[str, list[RunFolder]]) -> list[Entry]:
    """Return greedy answers of the base model and of the first run of each experiment, with one base model in memory.

    Raises `UserError` in the same cases as `load`.
    """
    loaded = load(experiments)
    entries: list[Entry] = [{"prompt": prompt} for prompt in prompts]
    questions = [{"prompt": prompt, "reference": None} for prompt in prompts]
    for name, config in loaded.configs.items():
        with loaded.use(name) as switched:
            generated = answers.generate(switched, loaded.tokenizer, config, loaded.device, questions)
        for entry, answer in zip(entries, generated, strict=True):
            entry[name] = answer["answer"]
    return entries


@dataclass(frozen=True)
class Table:
    """The first few questions with every answer, as HTML or plain text. Texts are escaped."""

    entries: list[Entry]

    def __repr__(self) -> str:
        parts = []
        for entry in self.entries[:SHOWN]:
            lines = [f"  [{name}] {' '.join(text.split())}" for name, text in entry.items() if name != "prompt"]
            parts.append("\n".join([" ".join(entry["prompt"].split()), *lines]))
        return "\n\n".join([*parts, *([self._rest] if self._rest else [])])

    def _repr_html_(self) -> str:
        rest = f"<p>{self._rest}</p>" if self._rest else ""
        return _html(self.entries[:SHOWN]) + rest

    @property
    def _rest(self) -> str:
        more = len(self.entries) - SHOWN
        return f"… and {more} more: in the picker of a running notebook, and in comparison.json." if more > 0 else ""


class Picker:
    """A list of questions, and the answers to the selected one. Where widgets do not work, it shows the table."""

    def __init__(self, entries: list[Entry]) -> None:
        import ipywidgets as widgets

        self.table = Table(entries)
        labels = [f"{n}. {shorten(entry['prompt'], 90, placeholder=' …')}" for n, entry in enumerate(entries, 1)]
        options = list(zip(labels, range(len(entries)), strict=True))
        self.choice = widgets.Dropdown(options=options, description="question:", layout=widgets.Layout(width="100%"))
        self.shown = widgets.HTML()
        self.box = widgets.VBox([self.choice, self.shown])
        self.choice.observe(self._show, names="value")
        self._show()

    def _show(self, change: Any = None) -> None:
        self.shown.value = _html([self.table.entries[self.choice.value]])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        return bundle(self.box, repr(self.table), self.table._repr_html_())


def bundle(box: Any, text: str, page: str) -> dict[str, Any]:
    """Return the MIME bundle of a cell: the widget in a running notebook, text or HTML in a stored one."""
    view = {"version_major": 2, "version_minor": 0, "model_id": box.model_id}
    mimebundle: dict[str, Any] = {WIDGET: view, "text/plain": text}
    if not on_colab():  # other front ends show the first type they support; Colab does not document its choice
        mimebundle["text/html"] = page
    return mimebundle


def show(entries: list[Entry]) -> Table | Picker:
    """Return a picker if a person runs the notebook, else a table, because a stored notebook would keep a widget."""
    return Picker(entries) if is_interactive() else Table(entries)


def _html(entries: list[Entry]) -> str:
    """One row per question and per answer. `tex2jax_ignore` keeps dollar signs from becoming math."""
    lines = []
    for entry in entries:
        lines.append(f'<tr><th colspan="2" style="{CELL}">{_text(entry["prompt"])}</th></tr>')
        for name, text in entry.items():
            if name != "prompt":
                lines.append(
                    f'<tr><td style="{CELL}"><i>{_text(name)}</i></td><td style="{CELL}">{_text(text)}</td></tr>'
                )
    return f'<table class="tex2jax_ignore">{"".join(lines)}</table>'


def _text(text: str) -> str:
    return html.escape(text).replace("\n", "<br>") or "(empty)"
