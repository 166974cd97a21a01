"""Try every family and every kind of chat template with tiny random models, and write docs/families.md.

usage: python tooling/families.py

The models and templates are those of `tests/unit/test_families.py` and `tests/unit/test_rendering.py`.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from qlora_helpers import files, runs
from qlora_helpers.config import Config
from qlora_helpers.data import cleaning, prompts, rendering
from qlora_helpers.data.schema import Row
from qlora_helpers.device import detect
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import losses
from qlora_helpers.evaluation.report import markdown_table
from qlora_helpers.export import gguf, merge
from qlora_helpers.models import qlora
from qlora_helpers.planning import architectures
from qlora_helpers.training import trainer

sys.path.insert(0, str(files.ROOT / "tests" / "unit"))
import test_families as families
import test_rendering as templates

TARGET = files.ROOT / "docs" / "families.md"
HEAD = """# Model families and chat templates

Tried with tiny random models, by `python tooling/families.py`. The same models and templates are in the test suite.

"""
CALL = {"type": "function", "id": "call00000", "function": {"name": "clock", "arguments": {"zone": "CET"}}}
TOOLS = json.dumps([{"type": "function", "function": {"name": "clock", "parameters": {}}}])
SYSTEM = {"role": "system", "content": "Be kind."}


def conversations() -> dict[str, Row]:
    """Return one conversation of each kind."""
    three = templates.conversation("Well?", "Good.", "And?", "Fine.", "So?", "Done.").messages
    asked = {"role": "user", "content": "Time?", "tools": TOOLS}
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result, answer = {"role": "tool", "content": "Noon"}, {"role": "assistant", "content": "It is noon."}
    return {
        "one round": Row(three[:2], "1"),
        "three rounds": Row(three, "1"),
        "system prompt": Row((SYSTEM, *three[:2]), "1"),
        "input": Row((three[0] | {"input": "2, 3"}, three[1]), "1"),
        "thought": Row((three[0], {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nGood."}), "1"),
        "tool call": Row((asked, called, result, answer), "1"),
    }


def judge(row: Row, tokenizer: Any) -> str:
    """Return `ok` if each answer and its end are trained and nothing else, or the reason why the row is refused."""
    config = Config(template="auto")
    example = next(prompts.encode([row], config, tokenizer))
    if example.problem:
        return f"refused: {example.problem}"
    parts = templates.trained_parts(example, tokenizer)
    ends = rendering.template_of(config, tokenizer).ends
    others = [turn["content"] for turn in row.messages if turn["role"] != "assistant"]
    words = [a["content"].split("</think>")[-1].strip() or "clock" for a in row.answers]
    right = len(parts) == len(words) and all(
        word in part and part.endswith(ends) and not any(other in part for other in others)
        for word, part in zip(words, parts, strict=True)
    )
    return "ok" if right else f"wrong: {parts}"


def template_rows() -> Iterator[list[str]]:
    """Yield a row of the table for every kind of chat template."""
    further = {"tool calls": (templates.TOOLS, "<stop>"), "no end of an answer": (templates.ENDLESS, "<eos>")}
    for name, (template, eos, *_) in (templates.QUIRKS | further).items():
        tokenizer = templates.make_tokenizer(template, eos)
        yield [name, *(judge(row, tokenizer) for row in conversations().values())]


def tried(step: Callable[[], Any]) -> str:
    """Return `ok`, or the reason why a step was refused."""
    try:
        step()
    except (UserError, AssertionError) as error:
        return f"refused: {error}".replace("|", "\\|")
    return "ok"


def family_row(family: str, folder: Path) -> list[str]:
    """Return a row of the table for a family: train, loss, answers, end, merge, GGUF, plan."""
    tokenizer = templates.make_tokenizer(templates.PLAIN)
    words = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 512}
    built = families.build(family, **families.FAMILIES[family] | words)
    built.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    rows = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}, or {chr(97 + n)}."} for n in range(16)]
    files.write_jsonl(folder / "rows.jsonl", rows)
    config = Config.from_params(
        profile="cpu", model=str(folder / "base"), dataset=str(folder / "rows.jsonl"), template="auto", n_samples=8,
        n_heldout=4, max_length=64, rank=4, target_modules="all-linear", compute_dtype="float32", save_steps=50,
        near_duplicates=1.0, max_new_tokens=8,
    )  # fmt: skip
    data = cleaning.prepare(config, tokenizer)
    run = runs.choose(folder / "runs", "exp1", cleaning.identity(config, data))
    trains = tried(lambda: trainer.train(config, data, tokenizer, run))
    done = trains == "ok"
    steps: dict[str, Callable[[], Any]] = {
        "loss": lambda: check_loss(config),
        "answers": lambda: files.read_jsonl(run / "answers.jsonl"),
        "end": lambda: check_ends(config, tokenizer),
        "merge": lambda: merge.merge(merge.source(run), folder / "merged"),
        "gguf": lambda: check_converter(built),
        "plan": lambda: check_count(config, built),
    }
    return [family, trains, *(tried(step) if done else "–" for step in steps.values())]


def check_loss(config: Config) -> None:
    """Raise `AssertionError` unless held-out losses in 4 bits are the model's own within 1e-4."""
    base = qlora.load_base(config, detect("float32"))
    rows = families.examples(9, 31, 4, untrained=2)
    for row, loss in zip(rows, losses.heldout_losses(base, rows, detect("float32")), strict=True):
        with torch.no_grad():
            own = base(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item()
        assert abs(loss.loss_sum / loss.tokens - own) < 1e-4, f"{loss.loss_sum / loss.tokens} instead of {own}"


def check_ends(config: Config, tokenizer: Any) -> None:
    """Raise `AssertionError` unless answers end at the template's end token."""
    assert tokenizer.convert_tokens_to_ids("<stop>") in rendering.end_tokens(config, tokenizer), "end token"


def check_converter(built: Any) -> None:
    """Raise `AssertionError` unless llama.cpp's converter knows the architecture."""
    name = type(built).__name__
    command = [sys.executable, str(gguf.converter() / gguf.SCRIPT), "--print-supported-models"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert name in (listed.stdout + listed.stderr).split(), f"llama.cpp's converter does not know {name}"


def check_count(config: Config, built: Any) -> None:
    """Raise `AssertionError` unless the plan counts the model's parameters."""
    counted = architectures.load(config.model).parameters
    assert counted == built.num_parameters(), f"{counted} parameters instead of {built.num_parameters()}"


def main() -> None:
    """Write the page."""
    kinds = markdown_table(["chat template with …", *conversations()], list(template_rows()))
    lines = []
    for family in families.FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(family_row(family, Path(folder)))
            print(*lines[-1], sep=" | ", flush=True)
    names = ["family", "train", "loss equals the model's", "answers", "ends", "merge", "GGUF", "plan"]
    files.write_text(TARGET, f"{HEAD}{kinds}\n\n{markdown_table(names, lines)}\n")


if __name__ == "__main__":
    main()
