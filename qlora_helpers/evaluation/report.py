"""The comparison on paper: Markdown, and one HTML file with its figures inside."""

import base64
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_helpers import files, plots
from qlora_helpers.evaluation.intervals import RESAMPLES
from qlora_helpers.runs import RunFolder

if TYPE_CHECKING:
    from qlora_helpers.evaluation.comparison import Difference  # its module imports torch

SHOWN = 4  # prompts whose answers are quoted
_COLUMNS = {
    "train_rows": ("rows", ",.0f"),
    "steps": ("steps", ",.0f"),
    "heldout_loss": ("held-out loss", ".4f"),
    "train_loss": ("training loss", ".4f"),
    "seconds": ("seconds", ",.0f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "peak_memory_gib": ("peak GiB", ".2f"),
}
_SPEED = ("seconds", "tokens_per_second")
_STYLE = """body{max-width:60em;margin:2em auto;padding:0 1em;font:16px/1.5 sans-serif}
table{border-collapse:collapse;display:block;overflow-x:auto}td,th{padding:.3em .7em;border-bottom:1px solid #8886}
td+td{min-width:4em}
img{max-width:100%;background:#fff}code{overflow-wrap:anywhere}
@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}a{color:#8bf}}"""


def table_markdown(result: dict[str, Any], speed: bool = True) -> str:
    """Losses, speed and memory, a line a model; without `speed` where the runs shared a device."""
    seeds = any(len(line["seeds"]) > 1 for line in result["table"])
    columns = {key: how for key, how in _COLUMNS.items() if speed or key not in _SPEED}
    heads = ["", *(["seeds"] if seeds else []), *(head for head, _ in columns.values())]
    lines = []
    for line in result["table"]:
        count = [str(len(line["seeds"]) or "–")] if seeds else []
        lines.append([line["name"], *count, *(_cell(line[key], form) for key, (_, form) in columns.items())])
    return _table(heads, lines)


def text_table_markdown(result: dict[str, Any]) -> str:
    """Text metrics with their intervals, a line a model."""
    names = list(result["table"][0]["text"])
    lines = [[line["name"], *(_interval(line["text"].get(name)) for name in names)] for line in result["table"]]
    return _table(["", *names], lines) if names else "No held-out question was answered."


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def _interval(found: dict[str, float | None] | None) -> str:
    if found is None:
        return "–"
    numbers = [found["value"], found["low"], found["high"]]
    value, low, high = ("–" if n is None else f"{n:.1f}" if abs(n) >= 10 else f"{n:.2f}" for n in numbers)
    return f"{value} (no interval)" if found["low"] is found["high"] is None else f"{value} ({low} to {high})"


def verdicts(result: dict[str, Any]) -> list[str]:
    """A sentence for every difference."""
    return [found["text"] for found in result["differences"]]


def scope(result: dict[str, Any]) -> str:
    """How far the verdicts reach: with one seed, not beyond these adapters."""
    fewest = min((found["seeds"] for found in result["differences"]), default=1)
    if fewest < 2:
        return "With one training seed, these verdicts speak of these adapters only, not of their recipes."
    return f"The intervals hold the spread of {fewest} training seeds: these verdicts speak of the recipes."


def forgetting(result: dict[str, Any]) -> list[str]:
    """A sentence for every experiment: did the loss on general questions rise?"""
    words = {
        "better": "fell: nothing was forgotten",
        "worse": "rose: something was forgotten",
        "not distinguishable": "did not change distinguishably: no forgetting shows",
    }
    return [
        f"{found['b']}: the loss on {found['rows']} general questions {words[found['verdict']]} "
        f"({found['value']:+.4f}, 95% interval {_signed(found['low'])} to {_signed(found['high'])})"
        for found in result["forgetting"]
    ]


def rehearsal(found: "Difference") -> str:
    """A sentence: did rehearsal rows keep something of what would be forgotten without them?"""
    words = {
        "better": "is lower with rehearsal than without: it kept something",
        "worse": "is higher with rehearsal than without: it did not help here",
        "not distinguishable": "is not distinguishable with rehearsal and without: no effect of it shows",
    }
    plain = found.to_dict()
    return (
        f"the loss on {found.rows} general questions {words[found.verdict]} "
        f"({found.value:+.4f}, 95% interval {_signed(plain['low'])} to {_signed(plain['high'])})"
    )


def _signed(value: float | None) -> str:
    return "no end" if value is None else f"{value:+.4f}"


def markdown(result: dict[str, Any], figures: list[str]) -> str:
    """`report.md`: the question, the set-up, the tables, the verdicts, the figures, the answers, the limits."""
    several = any(len(line["seeds"]) > 1 for line in result["table"])
    parts = {
        "# Did fine-tuning help, and how sure are we?": f"{_setup(result)}\n\n{table_markdown(result)}",
        "## Verdicts": f"{bullets(verdicts(result))}\n\n{scope(result)} {_METHOD}",
        "## What the answers are like": f"Greedy answers to held-out questions, with 95% intervals"
        f"{' (of the first seed)' if several else ''}.\n\n{text_table_markdown(result)}",
        "## What was forgotten": bullets(forgetting(result)) or _NO_BASE,
        "## Figures": "\n".join(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures),
        "## Answers": _answers(result["answers"][:SHOWN]),
        "## Limits": _LIMITS,
        "## Made with": _made_with(result),
    }
    return "\n\n".join(f"{head}\n\n{body}" for head, body in parts.items()) + "\n"


_METHOD = (
    f"Intervals: studentised bootstrap over held-out rows, {RESAMPLES:,} resamples, each row with both its losses.\n"
    "The training losses come from different numbers of steps: they are no evidence."
)
_NO_BASE = "Not measured: the runs are of different models, or their base model's folder is not beside them."
_LIMITS = (
    "A lower held-out loss means that the wording fits these rows better, not that answers are true.\n"
    "The held-out rows are of the same source as the training rows."
)


def _setup(result: dict[str, Any]) -> str:
    unit = "nats per trained token" if result["unit"] == "token" else "bits per byte of the answers"
    return (
        f"Model {_quote(_name(result['model']['name']))}{_revision(result['model'])}, rows of "
        f"{_quote(Path(result['data']).name)}:\n{result['heldout_rows']} held-out rows with "
        f"{result['heldout_tokens']:,} trained tokens (fingerprint `{result['heldout_fingerprint']}`), none of them\n"
        f"trained on. Differences in {unit}; lower is better."
    )


def _answers(entries: list[dict[str, str]]) -> str:
    return "\n\n".join(
        f"**Asked:** {_quote(entry['prompt'])}\n\n"
        + "\n".join(f"- *{name}*: {_quote(text)}" for name, text in entry.items() if name != "prompt")
        for entry in entries
    )


def _made_with(result: dict[str, Any]) -> str:
    device = result["device"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{device['name']}, {device['dtype']} ({device['reason']}). {versions}."


def _name(model: str) -> str:
    """A hub id as it is, a folder by its last part: a report is passed on."""
    return Path(model).name if Path(model).is_absolute() else model


def _revision(model: dict[str, Any]) -> str:
    return f" at revision {_quote(model['revision'])}" if model["revision"] else " (no revision: local files)"


def bullets(lines: list[str]) -> str:
    """Sentences as a Markdown list."""
    return "\n".join(f"- {line}." for line in lines)


def _quote(text: str) -> str:
    """A text on one line, as data: no Markdown or HTML of its own takes effect."""
    flat = " ".join(text.split()).replace("`", "'")
    return f"`{flat}`" if flat else "(empty)"


def html(text: str, folder: Path) -> str:
    """The Markdown report as one page; figures of `folder` go into it. HTML in the text is shown, not rendered."""
    import mistune

    body = str(mistune.create_markdown(escape=True, plugins=["table"])(text))

    def inline(match: re.Match[str]) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="(figures/[\w.-]+\.png)"', inline, body)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Comparison</title>'
    return f"<!doctype html>{head}<style>{_STYLE}</style>{body}\n"


def write(result: dict[str, Any], experiments: dict[str, list[RunFolder]], folder: Path) -> Path:
    """`comparison.json`, figures, `report.md` and `report.html` in `folder`; returns the path of `report.md`."""
    names = ["figures/differences.png", "figures/loss_curves.png"]
    plots.save(plots.differences(result), folder / names[0])
    plots.save(plots.loss_curves(logs_of(experiments)), folder / names[1])
    text = markdown(result, names)
    files.write_json(folder / "comparison.json", result)
    files.write_text(folder / "report.html", html(text, folder))
    files.write_text(folder / "report.md", text)
    return folder / "report.md"


def logs_of(experiments: dict[str, list[RunFolder]]) -> dict[str, list[dict[str, Any]]]:
    """Training logs of each experiment's first seed, for the loss curves."""
    return {name: group[0].log() for name, group in experiments.items()}
