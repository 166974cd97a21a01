"""Describe a data set after cleaning: as HTML in a notebook, and as Markdown and JSON on disk."""

import html
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from qlora_helpers import files, parse, quoting, runs
from qlora_helpers.config import Config
from qlora_helpers.data import rendering, schema
from qlora_helpers.data.cleaned import Cleaned, TokenizedRow, fingerprint
from qlora_helpers.errors import UserError
from qlora_helpers.wording import counted

FILES = ("dropped.jsonl", "train.jsonl", "heldout.jsonl", "report.md", "report.json")  # the first one always
BINS = 8  # bins of the length histogram up to the token limit; one more counts longer rows
SHOWN = 10  # rows in the sample table, and pairs in the table of duplicates
WIDTH = 160  # characters shown of a text


@dataclass(frozen=True)
class Table:
    """A table with a heading and a sentence of explanation. `bar` is the index of a column also drawn as bars."""

    title: str
    text: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    bar: int | None = None


@dataclass(frozen=True, repr=False)
class DataReport:
    """The report of a data set: `facts` for programs, `tables` for readers, and `advice` about the template, if any."""

    facts: dict[str, Any]
    tables: list[Table]
    advice: str | None

    def markdown(self) -> str:
        """Return the report as Markdown."""
        parts = ["# Data report", quoting.markdown(_summary(self.facts))]
        parts += [f"> {quoting.markdown(line)}" for line in (self.advice or "").splitlines()]
        return "\n\n".join([*parts, *map(_to_markdown, self.tables)]) + "\n"

    def __repr__(self) -> str:
        steps = self.tables[0].rows
        return "\n".join([_summary(self.facts), *(f"{count:>10,}  {name}" for name, count in steps)])

    def _repr_html_(self) -> str:
        advice = f"<p><i>{html.escape(self.advice)}</i></p>" if self.advice else ""
        return f"<p>{html.escape(_summary(self.facts))}</p>{advice}" + "".join(map(_to_html, self.tables))


def build(cleaned: Cleaned, config: Config, tokenizer: Any) -> DataReport:
    """Build the data report: rows at each step, lengths in tokens, quality checks, duplicates and ten sample rows."""
    used = [*cleaned.train, *cleaned.heldout, *cleaned.selection]
    tokens = sorted(cleaned.lengths)
    kept = sum(min(item.tokens, config.max_length) for item in used)
    facts = {
        "source": cleaned.loaded.name,
        "layout": cleaned.loaded.layout,
        "columns": list(cleaned.loaded.columns),
        "model": config.model,
        "template": config.template,
        "max_tokens": config.max_length,
        "over_length": config.over_length,
        "near_duplicates": config.near_duplicates,
        "data_seed": config.data_seed,
        "rows_read": cleaned.rows_read,
        "train": len(cleaned.train),
        "heldout": len(cleaned.heldout),
        "heldout_from_test_split": sum(item.row.split == schema.TEST for item in cleaned.heldout),
        "selection": len(cleaned.selection),
        "groups": len({item.row.group for item in used} - {""}),
        "heldout_groups": len({item.row.group for item in cleaned.heldout} - {""}),
        "dropped": len(cleaned.dropped),
        "dropped_by_reason": dict(sorted(Counter(d["reason"] for d in cleaned.dropped).items())),
        "tokens_mean": round(statistics.fmean(tokens), 1) if tokens else 0,
        "tokens_median": statistics.median(tokens) if tokens else 0,
        "tokens_longest": tokens[-1] if tokens else 0,
        "over_limit": sum(n > config.max_length for n in tokens),
        "trained_share": round(sum(item.trained for item in used) / max(kept, 1), 4),
        "quality": _quality(cleaned, used, config),
        "source_fingerprint": cleaned.source_fingerprint,
        "train_fingerprint": fingerprint(item.row.id for item in cleaned.train),
        "heldout_fingerprint": fingerprint(item.row.id for item in cleaned.heldout),
    }
    tables = [_steps(facts), _lengths(tokens, config), _checks(facts), *_duplicates(cleaned), _samples(used, config)]
    return DataReport(facts, tables, "\n".join(rendering.template_warnings(config, tokenizer)) or None)


def check_output(out: Path, source: str) -> Path:
    """Return the output folder as an absolute path, without links.

    Raises `UserError` if it holds anything that `write` did not write there, which would be lost, or if the source is
    inside it, or it inside the source: an output must not be read as an input the next time.
    """
    try:
        out = parse.path(out, "output folder", is_input=False).resolve()
        held = sorted(path.name for path in out.iterdir()) if out.exists() else []
    except OSError as error:
        raise UserError(f"output folder: {out} cannot be written ({error}). Fix: choose another folder.") from None
    given = parse.path(source, "dataset", is_input=False)  # it is read later
    if given.exists():  # else it is on the hub
        read = given.resolve()
        if read.is_relative_to(out) or out.is_relative_to(read):
            raise UserError(f"output folder: {out} and the source {read} overlap. Fix: choose a folder apart from it.")
    if foreign := [name for name in held if name not in FILES or FILES[0] not in held]:
        raise UserError(
            f"output folder: {out} holds {foreign[0]}, which this command did not write. Fix: choose a new folder."
        )
    return out


def write(report: DataReport | None, cleaned: Cleaned, out: Path) -> None:
    """Replace the folder `out` by one with `dropped.jsonl` and, if there is a report, the other `FILES`.

    Raises `UserError` if that fails; `out` is then as it was.
    """
    runs.workdir(str(out.parent))
    try:
        with files.building(out) as folder:
            files.write_jsonl(folder / "dropped.jsonl", cleaned.dropped)
            for name, items in (("train", cleaned.train), ("heldout", cleaned.heldout)) if report else ():
                files.write_jsonl(folder / f"{name}.jsonl", (item.row.to_record() for item in items))
            if report:
                files.write_text(folder / "report.md", report.markdown())
                files.write_json(folder / "report.json", report.facts | {"advice": report.advice})
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"output folder: {out} cannot be written ({reason}). Fix: choose another folder.") from None


def _summary(facts: dict[str, Any]) -> str:
    chosen = f" + {facts['selection']:,} selection" if facts["selection"] else ""
    groups = counted(facts["groups"], "group")
    grouped = f" They are in {groups}, and no group is on both sides." if facts["groups"] else ""
    return (
        f"{Path(facts['source']).name} (layout {facts['layout']}): {counted(facts['rows_read'], 'row')} read = "
        f"{facts['train']:,} train + {facts['heldout']:,} held-out{chosen} + {facts['dropped']:,} dropped.{grouped} "
        f"{facts['trained_share']:.0%} of the tokens within the limit are trained. "
        f"Columns: {'; '.join(facts['columns'])}. "
        f"Tokens are counted with the tokenizer of {facts['model']} and the {facts['template']} template."
    )


def _steps(facts: dict[str, Any]) -> Table:
    dropped = [[f"dropped: {reason}", n] for reason, n in facts["dropped_by_reason"].items()]
    tests = facts["heldout_from_test_split"]
    held = f"held-out, {tests:,} from the test split" if tests else "held-out"
    chosen = [["selection", facts["selection"]]] if facts["selection"] else []
    rows = [["read", facts["rows_read"]], *dropped, [held, facts["heldout"]], *chosen, ["train", facts["train"]]]
    return Table("Rows", "Each dropped row is recorded with its reason.", ("step", "rows"), rows)


def _lengths(tokens: list[int], config: Config) -> Table:
    limit = config.max_length
    edges = [round(limit * i / BINS) for i in range(BINS + 1)]
    counts = [sum(low < n <= high for n in tokens) for low, high in pairwise(edges)]
    rows = [[f"{low + 1}–{high}", n] for (low, high), n in zip(pairwise(edges), counts, strict=True)]
    over = sum(n > limit for n in tokens)
    treatment = "dropped" if config.over_length == "drop" else "truncated"
    text = f"Tokenized rows by length. Rows over the limit of {limit} tokens are {treatment}."
    return Table("Lengths", text, ("tokens", "rows"), [*rows, [f"over {limit}", over]], bar=1)


def _quality(cleaned: Cleaned, used: list[TokenizedRow], config: Config) -> dict[str, int]:
    """Count properties that are worth knowing but are not a reason to drop a row."""
    answers = Counter(item.row.answer for item in used)
    rows = cleaned.loaded.rows
    given = sum("input" in item.row.question for item in used)
    return {
        "answers under 4 tokens": sum(item.trained < 4 for item in used),
        "same answer as another row": sum(n - 1 for n in answers.values()),
        "turn markers inside a turn": sum(bool(schema.TURN_MARKER.search(item.row.text)) for item in used),
        "odd number of code fences": sum(item.row.answer.count("```") % 2 for item in used),
        "with an input where most have none": given if 2 * given < len(used) else 0,
        "without an input where most have one": len(used) - given if 2 * given >= len(used) > given else 0,
        "several rounds": sum(len(row.rounds) > 1 for row in rows),
        "same prompt as another row": len(rows) - len({(r.question["content"], r.question.get("input")) for r in rows}),
        "own system prompt": sum(row.messages[0]["role"] == "system" for row in rows),
        **dict(sorted(cleaned.loaded.altered.items())),
    }


def _checks(facts: dict[str, Any]) -> Table:
    text = "The first checks count usable rows; those from 'several rounds' on count all rows that were read."
    return Table("Quality", text, ("check", "rows"), list(facts["quality"].items()))


def _duplicates(cleaned: Cleaned) -> list[Table]:
    rows = [
        [f"{t.similarity:.2f}", t.dropped.question["content"], t.kept.question["content"], t.reason]
        for t in cleaned.near_duplicates[:SHOWN]
    ]
    text = f"The first {len(rows)} of {counted(len(cleaned.near_duplicates), 'row')} dropped as near duplicates."
    return [Table("Near duplicates", text, ("similarity", "dropped", "kept", "reason"), rows)] if rows else []


def _samples(used: list[TokenizedRow], config: Config) -> Table:
    """Sample rows by a hash of their ids, so that the same data always shows the same rows."""
    drawn = sorted(used, key=lambda item: files.short_hash([config.data_seed, "report", item.row.id]))[:SHOWN]
    rows = [[*item.row.opening, item.tokens] for item in drawn]
    text = "The first question and its answer, in rows drawn at random. Read them."
    return Table("Sample rows", text, ("question", "answer", "tokens of the row"), rows)


def _quote(value: Any) -> str:
    """Format a value for a table cell: one line of at most `WIDTH` characters."""
    text = quoting.one_line(str(value))
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def _longest_bar(table: Table) -> int:
    """Return the largest value of the column drawn as bars, or 0 if there is no such column or it is empty."""
    return max((row[table.bar] for row in table.rows), default=0) if table.bar is not None else 0


def _to_markdown(table: Table) -> str:
    longest = _longest_bar(table)
    columns = [*table.columns, ""] if longest else table.columns
    lines = [f"## {table.title}", "", table.text, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in table.rows:
        cells = [f"{v:,}" if isinstance(v, int) else quoting.markdown(_quote(v)) for v in row]
        if longest and table.bar is not None:
            cells.append("█" * round(20 * row[table.bar] / longest))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _to_html(table: Table) -> str:
    longest = _longest_bar(table)
    head = "".join(f"<th style='text-align:left'>{html.escape(column)}</th>" for column in table.columns)
    body = ""
    for row in table.rows:
        cells = [f"{v:,}" if isinstance(v, int) else html.escape(_quote(v)) for v in row]
        if longest and table.bar is not None:
            width = round(12 * row[table.bar] / longest, 2)
            cells.append(f"<div style='background:rgba(40,120,200,.6);height:.8em;width:{width}em'></div>")
        body += "<tr>" + "".join(f"<td style='text-align:left'>{cell}</td>" for cell in cells) + "</tr>"
    return f"<h4>{table.title}</h4><p>{html.escape(table.text)}</p><table><tr>{head}</tr>{body}</table>"
