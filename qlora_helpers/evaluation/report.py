"""The report of a comparison: Markdown, and one HTML file that contains its figures."""

import base64
import math
import re
from pathlib import Path
from typing import Any

from qlora_helpers import files, plots
from qlora_helpers.evaluation import differences
from qlora_helpers.evaluation.comparison import Comparison
from qlora_helpers.evaluation.differences import Difference
from qlora_helpers.evaluation.intervals import RESAMPLES, Interval
from qlora_helpers.evaluation.text_metrics import mostly_unspaced, share_difference
from qlora_helpers.runs import RunFolder

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


def table_markdown(result: Comparison, speed: bool = True) -> str:
    """Losses, speed and memory of each model. `speed=False` is for runs that shared a device."""
    seeds = any(len(model.seeds) > 1 for model in result.table)
    columns = {key: how for key, how in _COLUMNS.items() if speed or key not in _SPEED}
    heads = ["", *(["seeds"] if seeds else []), *(head for head, _ in columns.values())]
    lines = []
    for model in result.table:
        count = [str(len(model.seeds) or "–")] if seeds else []
        lines.append([model.name, *count, *(_cell(getattr(model, key), form) for key, (_, form) in columns.items())])
    return markdown_table(heads, lines)


def text_table_markdown(result: Comparison) -> str:
    """Text metrics of each model, with their intervals."""
    names = list(dict.fromkeys(name for model in result.table for name in model.text))
    lines = [[model.name, *(_interval(model.text.get(name)) for name in names)] for model in result.table]
    return markdown_table(["", *names], lines) if names else "No held-out question was answered."


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of texts."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def _cell(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return "–"
    numbers = interval.to_dict()
    value, low, high = ("–" if n is None else f"{n:.1f}" if abs(n) >= 10 else f"{n:.2f}" for n in numbers.values())
    return f"{value} (no interval)" if numbers["low"] is numbers["high"] is None else f"{value} ({low} to {high})"


def verdicts(result: Comparison) -> list[str]:
    """A sentence for every difference."""
    return [str(difference) for difference in result.differences]


def scope(result: Comparison) -> str:
    """What the verdicts are about: these adapters or, with several seeds, their recipes."""
    fewest = min((difference.seeds for difference in result.differences), default=1)
    if fewest < 2:
        return "With one training seed, these verdicts speak of these adapters only, not of their recipes."
    return f"The intervals include the spread of {fewest} training seeds: these verdicts speak of the recipes."


def forgetting(result: Comparison) -> list[str]:
    """A sentence for every experiment: did the loss on general questions rise?"""
    words = {
        "better": "fell: nothing was forgotten",
        "worse": "rose: something was forgotten",
        "not distinguishable": "did not change distinguishably: no forgetting shows",
    }
    return [
        f"{d.b}: the loss on {d.rows} general questions {words[d.verdict]} ({_bounds(d)})" for d in result.forgetting
    ]


def thinking(result: Comparison) -> list[str]:
    """A sentence for every difference between models of which one thinks distinguishably more often."""
    shares = {model.name: model.text["thinks"] for model in result.table if "thinks" in model.text}
    lines = []
    for d in result.differences:
        if not {d.a, d.b} <= shares.keys():
            continue
        a, b = shares[d.a], shares[d.b]
        gap = share_difference(a, b)
        if gap.low <= 0 <= gap.high:
            continue
        less = "thinks less often than" if b.value else "stopped thinking, unlike"
        how = less if gap.value < 0 else "thinks more often than"
        lines.append(
            f"{d.b} {how} {d.a}: a thought precedes {b.value:.0%} of its answers instead of {a.value:.0%} "
            f"({gap.value:+.2f}, 95% interval {gap.low:+.2f} to {gap.high:+.2f}). "
            "This does not say whose answers are better: the other metrics leave thoughts out"
        )
    return lines


def rehearsal(difference: Difference) -> str:
    """A sentence: did rehearsal rows reduce what is forgotten without them?"""
    words = {
        "better": "is lower with rehearsal than without: it kept something",
        "worse": "is higher with rehearsal than without: it did not help here",
        "not distinguishable": "is not distinguishable with rehearsal and without: no effect of it shows",
    }
    return f"the loss on {difference.rows} general questions {words[difference.verdict]} ({_bounds(difference)})"


def _bounds(difference: Difference) -> str:
    low, high = ("no end" if math.isinf(end) else f"{end:+.4f}" for end in (difference.low, difference.high))
    return f"{difference.value:+.4f}, 95% interval {low} to {high}"


def markdown(result: Comparison, figures: list[str]) -> str:
    """The text of `report.md`: setup, tables, verdicts, figures, answers and limits."""
    parts = {
        "# Did fine-tuning help, and how sure are we?": f"{_setup(result)}\n\n{table_markdown(result)}",
        "## Verdicts": f"{bullets(verdicts(result))}\n\n{scope(result)} {_METHOD}",
        "## What the answers are like": _text(result),
        "## What was forgotten": bullets(forgetting(result)) or _NO_BASE,
        "## Figures": "\n".join(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures),
        "## Answers": _answers(result.answers[:SHOWN]),
        "## Limits": _LIMITS,
        "## Made with": _made_with(result),
    }
    return "\n\n".join(f"{head}\n\n{body}" for head, body in parts.items()) + "\n"


def _text(result: Comparison) -> str:
    """The text metrics with what is needed to read them."""
    several = any(len(model.seeds) > 1 for model in result.table)
    parts = [
        f"Greedy answers to held-out questions, with 95% intervals{' (of the first seed)' if several else ''}.",
        text_table_markdown(result),
        bullets(thinking(result)),
        _CHARACTERS if mostly_unspaced([text for entry in result.answers for text in entry.values()]) else "",
    ]
    return "\n\n".join(part for part in parts if part)


_CHARACTERS = (
    "Most of this text is in scripts without blanks between words. There, *length* is measured in characters, and\n"
    "*repeats itself* in phrases of four characters."
)
_METHOD = (
    f"Intervals: studentized bootstrap over held-out rows, {RESAMPLES:,} resamples, each row with the losses of both "
    "models.\nThe training losses come from different numbers of steps, so they do not count as evidence."
)
_NO_BASE = "Not measured: the runs are of different models, or their base model's folder is missing."
_LIMITS = (
    "A lower held-out loss means that the wording fits these rows better, not that answers are true.\n"
    "The held-out rows come from the same source as the training rows."
)


def _setup(result: Comparison) -> str:
    unit = "nats per trained token" if result.unit == "token" else "bits per byte of the answers"
    return (
        f"Model {_quote(_name(result.model['name']))}{_revision(result.model)}, rows of "
        f"{_quote(Path(result.data).name)}:\n{result.heldout_rows} held-out rows with "
        f"{result.heldout_tokens:,} trained tokens (fingerprint `{result.heldout_fingerprint}`), never used for\n"
        f"training. Differences in {unit}; lower is better."
    )


def _answers(entries: list[dict[str, str]]) -> str:
    return "\n\n".join(
        f"**Question:** {_quote(entry['prompt'])}\n\n"
        + "\n".join(f"- *{name}*: {_quote(text)}" for name, text in entry.items() if name != "prompt")
        for entry in entries
    )


def _made_with(result: Comparison) -> str:
    device = result.device
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    return f"{device['name']}, {device['dtype']} ({device['reason']}). {versions}."


def _name(model: str) -> str:
    """A hub id as it is; of a folder its last part only, since reports are passed on."""
    return Path(model).name if Path(model).is_absolute() else model


def _revision(model: dict[str, Any]) -> str:
    return f" at revision {_quote(model['revision'])}" if model["revision"] else " (no revision: local files)"


def bullets(lines: list[str]) -> str:
    """Sentences as a Markdown list."""
    return "\n".join(f"- {line}." for line in lines)


def _quote(text: str) -> str:
    """A text on one line, quoted: its Markdown and HTML have no effect."""
    flat = " ".join(text.split()).replace("`", "'")
    return f"`{flat}`" if flat else "(empty)"


def html(text: str, folder: Path) -> str:
    """The Markdown report as one page with the figures of `folder`. HTML in the text is shown, not rendered."""
    import mistune

    body = str(mistune.create_markdown(escape=True, plugins=["table"])(text))

    def inline(match: re.Match[str]) -> str:
        data = base64.b64encode((folder / match[1]).read_bytes()).decode()
        return f'src="data:image/png;base64,{data}"'

    body = re.sub(r'src="(figures/[\w.-]+\.png)"', inline, body)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Comparison</title>'
    return f"<!doctype html>{head}<style>{_STYLE}</style>{body}\n"


def write(result: Comparison, experiments: dict[str, list[RunFolder]], folder: Path) -> Path:
    """Write `comparison.json`, figures, `report.md` and `report.html` to `folder`; returns the path of `report.md`."""
    names = ["figures/differences.png", "figures/loss_curves.png"]
    plots.save(differences.figure(result.differences), folder / names[0])
    plots.save(plots.loss_curves(logs_of(experiments)), folder / names[1])
    text = markdown(result, names)
    files.write_json(folder / "comparison.json", result.to_dict())
    files.write_text(folder / "report.html", html(text, folder))
    files.write_text(folder / "report.md", text)
    return folder / "report.md"


def logs_of(experiments: dict[str, list[RunFolder]]) -> dict[str, list[dict[str, Any]]]:
    """Training logs of each experiment's first seed, for the loss curves."""
    return {name: group[0].log() for name, group in experiments.items()}
