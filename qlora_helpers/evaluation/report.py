"""The report of a comparison in Markdown: its tables, and its verdicts in words."""

import math
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qlora_helpers import files, plots
from qlora_helpers.evaluation import differences
from qlora_helpers.evaluation.answer_report import answer_differences, text_table_markdown, thinking, too_few
from qlora_helpers.evaluation.comparison import Comparison, Summary
from qlora_helpers.evaluation.differences import SAME, UNSURE, Difference
from qlora_helpers.evaluation.intervals import RESAMPLES
from qlora_helpers.evaluation.markup import bullets, html, markdown_table
from qlora_helpers.evaluation.row_losses import BASE, IN_16_BITS
from qlora_helpers.evaluation.text_metrics import mostly_unspaced
from qlora_helpers.evaluation.verdict_table import verdict_table
from qlora_helpers.quoting import markdown as inert
from qlora_helpers.quoting import markdown_code as quote
from qlora_helpers.runs import RunFolder
from qlora_helpers.wording import counted

SHOWN = 4  # prompts whose answers are quoted
WORDS = 500  # characters of an answer; `comparison.json` has it whole
DRAWN = 20  # differences in a figure
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


def table_markdown(result: Comparison, speed: bool = True) -> str:
    """Losses, speed and, of a GPU, memory of each model. `speed=False` is for runs that shared a device."""
    seeds = any(len(model.seeds) > 1 for model in result.table)
    unknown = () if speed else _SPEED
    if result.device.get("kind") == "cpu":  # the peak of a process, which may have trained other runs before
        unknown = (*unknown, "peak_memory_gib")
    columns = {key: how for key, how in _COLUMNS.items() if key not in unknown}
    heads = ["model", *(["seeds"] if seeds else []), *(head for head, _ in columns.values())]
    lines = []
    for model in result.table:
        count = [str(len(model.seeds) or "–")] if seeds else []
        values = {key: getattr(model, key) for key in columns}
        cells = ("–" if values[key] is None else format(values[key], form) for key, (_, form) in columns.items())
        lines.append([inert(model.name), *count, *cells])
    return markdown_table(heads, lines)


def headlines(result: Comparison) -> list[str]:
    """A sentence for each experiment: is it better than the best form of its base model, and by how much?"""
    number = sum(not model.seeds for model in result.table)
    losses = {model.name: model.heldout_loss for model in result.table}
    incomplete = bool(result.absent) or IN_16_BITS not in losses
    rivals = (f"the best of {number} rivals" if number > 1 else "the only rival") + " measured" * incomplete
    lines = []
    for d in result.headlines:
        size, rows, tokens = f"{math.expm1(d.value):+.1%}", f"{d.rows} of {_heldout(result)}", d.tokens
        if d.rows == result.heldout_rows:
            after = losses[d.b]
            size = f"{math.exp(after):.2f} instead of {math.exp(after - d.value):.2f} ({size})"
            rows, tokens = _heldout(result), result.heldout_tokens
        sizes = [d.bounds, f"perplexity {size}", f"{rows} with {counted(tokens, 'token')}", d.limit]
        lines.append(f"{d.claim}, {rivals} ({'; '.join(filter(None, sizes))})")
    return lines


def quantizing(result: Comparison) -> list[str]:
    """What quantizing the base model cost, and what training each experiment won back; empty if it was not measured."""
    if result.quantizing is None:
        return []
    won = [f"What training won back: {_sentence(result, d)}" for d in result.differences if d.a == BASE]
    return [f"What quantizing cost: {_sentence(result, result.quantizing)}", *won]


def verdicts(result: Comparison) -> list[str]:
    """A sentence for every difference: those to the best rivals, what quantizing cost, then the others."""
    told = [d for d in result.differences if d.a == BASE] if result.quantizing else []
    before = {(d.a, d.b) for d in (*told, *result.headlines)}
    others = [d for d in result.differences if (d.a, d.b) not in before]
    return [*headlines(result), *quantizing(result), *(_sentence(result, d) for d in others)]


def verdicts_markdown(result: Comparison) -> str:
    """The sentences about the best rivals, a table of all differences, and what they rest on."""
    parts = [bullets(headlines(result)), verdict_table(result), f"{basis(result)} {scope(result)}"]
    return "\n\n".join(filter(None, parts))


def _sentence(result: Comparison, difference: Difference) -> str:
    """A difference in words, with its rows if they are not all."""
    rows, every = difference.rows, result.heldout_rows
    if rows == every:
        return str(difference)
    return f"{difference} on {rows} of {counted(every, 'row')}, {counted(difference.tokens, 'token')}"


def _heldout(result: Comparison) -> str:
    return counted(result.heldout_rows, "held-out row")


def scope(result: Comparison) -> str:
    """What the verdicts are about: these adapters or, with several runs of each recipe, other draws and seeds too."""
    if min((difference.seeds for difference in result.differences), default=1) < 2:
        return (
            "With one training run of a recipe, these verdicts are about these adapters only: another draw of training "
            "rows, or another seed, may lead to others."
        )
    trained = [model for model in result.table if model.seeds]
    covered = f"The intervals cover other held-out rows and other training runs ({'; '.join(map(_runs, trained))})."
    fixed = any(model.draws == 1 and not model.all_rows for model in trained)
    return f"{covered} Where there is one draw, they do not cover others." if fixed else covered


def _runs(model: Summary) -> str:
    seeds, rows, name = len(model.seeds), counted(round(model.train_rows or 0), "training row"), inert(model.name)
    if model.all_rows:
        return f"{name}: {seeds} seeds on all {rows}, so that draws cannot vary"
    if model.draws == seeds:
        return f"{name}: {seeds} draws of {rows}, one seed each"
    return f"{name}: {seeds} seeds on {counted(model.draws, 'draw')} of {rows}"


def forgetting(result: Comparison) -> list[str]:
    """A sentence for every experiment: how the loss on general questions changed, and on how many it rose."""
    words = {"better": "fell", "worse": "rose", UNSURE: "did not change distinguishably"}
    lines = []
    for d in result.forgetting:
        how = words.get(d.verdict, f"stayed within ±{d.margin}")
        rows = counted(d.rows, "general question") + (f" ({counted(d.tokens, 'token')})" if d.tokens else "")
        rose = [f"it rose on {result.rose[d.b]} of them"] if d.b in result.rose else []
        sizes = "; ".join([f"{d.bounds}; {math.expm1(d.value):+.1%} perplexity", *rose, *filter(None, [d.limit])])
        lines.append(f"{inert(d.b)}: the mean loss on {rows} {how} ({sizes})")
    return lines


def rehearsal(difference: Difference) -> str:
    """A sentence: did rehearsal rows reduce what is forgotten without them?"""
    words = {
        "better": "is lower with rehearsal than without",
        "worse": "is higher with rehearsal than without",
        UNSURE: "is not distinguishable with rehearsal and without: no effect of it shows",
        SAME: f"is the same with rehearsal and without, within ±{difference.margin}",
    }
    sizes = "; ".join(filter(None, [difference.bounds, difference.limit]))
    return f"the loss on {counted(difference.rows, 'general question')} {words[difference.verdict]} ({sizes})"


def markdown(result: Comparison, figures: list[str], speed: bool = True) -> str:
    """The text of `report.md`: setup, tables, verdicts, figures, answers and limits. `speed` as in `table_markdown`."""
    setup = [bullets(headlines(result)), _setup(result), table_markdown(result, speed)]
    shown = [f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures]
    parts = {
        "# Did fine-tuning help, and how sure are we?": "\n\n".join(filter(None, setup)),
        "## Verdicts": f"{verdict_table(result)}\n\n{basis(result)} {scope(result)}\n{_METHOD}",
        "## What the answers are like": _text(result),
        "## What was forgotten": bullets(forgetting(result)) or _NO_BASE,
        "## Figures": _drawn(result)[1] + "\n".join(shown),
        "## Answers": _answers(result.answers[:SHOWN]),
        "## Limits": _LIMITS,
        "## Made with": _made_with(result),
    }
    return "\n\n".join(f"{head}\n\n{body}" for head, body in parts.items()) + "\n"


def _text(result: Comparison) -> str:
    several = any(len(model.seeds) > 1 for model in result.table)
    number = f"{result.answered} " * (result.answered > 0)
    parts = [
        f"Greedy answers to {number}held-out questions{' (of the first seed)' if several else ''}, "
        f"{'too few for intervals' if too_few(result) else 'with 95% intervals'}.",
        text_table_markdown(result),
        _AT_LIMIT if result.at_limit else "",
        answer_differences(result),
        bullets(thinking(result)),
        _CHARACTERS if mostly_unspaced([text for entry in result.answers for text in entry.values()]) else "",
    ]
    return "\n\n".join(filter(None, parts))


def basis(result: Comparison) -> str:
    """What the verdicts rest on: rows and tokens, joint intervals, who chose checkpoints, which rivals are missing."""
    groups = {d.clusters for d in result.differences if 0 < d.clusters < d.rows == result.heldout_rows}
    dependent = f" in {counted(max(groups), 'group')}" if groups else ""
    parts = [
        f"These verdicts rest on {_heldout(result)}{dependent} with {counted(result.heldout_tokens, 'scored token')}."
    ]
    if result.family > 1:
        included = ", forgetting included," if result.forgetting else ""
        parts.append(f"The intervals of all {result.family} verdicts{included} hold at once.")
    if crossed := [model.name for model in result.table if model.cross_fitted]:
        parts.append(
            f"Each half of the held-out rows judges the checkpoint of {' and '.join(crossed)} that the other half "
            "chose (cross-fitting). The adapter that is kept is the choice of all of them; its own loss is not given."
        )
    if result.absent:
        absent = "; ".join(f"{name} ({reason})" for name, reason in _texts(result.absent))
        parts.append(f"Rivals that were not measured: {absent}.")
    return " ".join(parts)


_AT_LIMIT = (
    "*Reference at the limit*: what the references themselves would get if they ended there. An answer that is\n"
    "written like them cannot do better."
)
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
    unit = "nats per scored token" if result.unit == "token" else "bits per byte of the answers"
    name, revision = result.model["name"], result.model["revision"]
    name = Path(name).name if Path(name).is_absolute() else name  # of a folder: reports are passed on
    at = f"at revision {quote(revision)}" if revision else "(no revision: local files)"
    return (
        f"Model {quote(name)} {at}, rows of "
        f"{quote(Path(result.data).name)}:\n{_heldout(result)} with "
        f"{counted(result.heldout_tokens, 'scored token')} (fingerprint {quote(result.heldout_fingerprint)}), "
        f"never used for\ntraining. Differences in {unit}; lower is better."
    )


def _answers(entries: list[dict[str, str]]) -> str:
    return "\n\n".join(
        f"**Question:** {quote(entry['prompt'])}\n\n"
        + "\n".join(
            f"- *{inert(name)}*: {quote(textwrap.shorten(text, WORDS, placeholder=' …'))}"
            for name, text in entry.items()
            if name != "prompt"
        )
        for entry in entries
    )


def _made_with(result: Comparison) -> str:
    device = dict(_texts(result.device))
    versions = ", ".join(f"{name} {version}" for name, version in _texts(result.versions))
    return f"{device['name']}, {device['dtype']} ({device['reason']}). {versions}."


def _texts(plain: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values that come from files, as texts without effect in Markdown."""
    return ((inert(name), inert(str(value))) for name, value in plain.items())


def write(result: Comparison, experiments: dict[str, list[RunFolder]], folder: Path) -> Path:
    """Write `comparison.json`, figures, `report.md` and `report.html` to `folder`; returns the path of `report.md`."""
    names = ["figures/differences.png", "figures/loss_curves.png"]
    plots.save(differences.figure(_drawn(result)[0]), folder / names[0])
    plots.save(plots.loss_curves(logs_of(experiments)), folder / names[1])
    text = markdown(result, names)
    files.write_json(folder / "comparison.json", result.to_dict())
    files.write_text(folder / "report.html", html(text, folder))
    files.write_text(folder / "report.md", text)
    return folder / "report.md"


def _drawn(result: Comparison) -> tuple[list[Difference], str]:
    """The differences in the figure, and a paragraph if they are not all: then those to the best rivals."""
    every = result.all_differences
    if len(every) <= DRAWN:
        return every, ""
    drawn = (result.headlines or every)[:DRAWN]
    return drawn, f"The figure of differences shows {len(drawn)} of {len(every):,}. `comparison.json` has all.\n\n"


def logs_of(experiments: dict[str, list[RunFolder]]) -> dict[str, list[dict[str, Any]]]:
    """Training logs of each experiment's first seed, for the loss curves."""
    return {name: group[0].log() for name, group in experiments.items()}
