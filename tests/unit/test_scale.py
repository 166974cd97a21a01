"""The parts of benchmarks/scale.py that need no GPU: command lines, results, and the estimates in docs/scale.md."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora_helpers import files, options
from qlora_helpers.__main__ import main
from qlora_helpers.config import Config
from qlora_helpers.planning import memory, plan
from qlora_helpers.planning.workload import ALONE, STRATEGIES, Parallel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import scale  # noqa: E402

PAGE = (ROOT / "docs" / "scale.md").read_text("utf-8")


def test_a_command_line_gives_the_settings_back(tmp_path):
    settings = scale.settings_of("llama31-8b", tmp_path, tmp_path / "rows.jsonl", Parallel(2, "fsdp"), "off")
    assert (settings["batch_size"], settings["n_samples"]) == (8, 160)
    alone = scale.command(settings, ALONE, tmp_path / "run")
    launched = scale.command(settings, Parallel(2, "fsdp"), tmp_path / "run")
    assert alone[:4] == [sys.executable, "-m", "qlora_helpers", "train"]
    assert launched[-len(alone) + 2 :] == alone[2:]
    assert launched[2] == "accelerate.commands.launch"
    assert launched[launched.index("--num_processes") + 1] == "2"
    assert launched[launched.index("--config_file") + 1].endswith("qlora_helpers/accelerate/fsdp.yaml")
    parser = options.Parser()
    for name in ("out", "preset", "profile"):
        parser.option(f"--{name}")
    parser.settings("profile")
    parsed = vars(parser.parse_args(alone[4:]))
    assert parsed.pop("out") == str(tmp_path / "run")
    assert Config.from_params(**parsed) == Config.from_params(**settings)


def test_speed_is_that_of_the_steps_after_the_warmup_and_the_plan_that_of_the_path(tmp_path, model_folder):
    """8 steps of 100 tokens, 5 of them of 2 s and 3 of 1 s."""
    lines = [{"loss": 1.0, "seconds": seconds} for seconds in [2.0] * 5 + [1.0] * 3]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"eval_loss": 1.0}]))
    files.write_json(
        tmp_path / "metrics.json", {"tokens_per_second": 800 / 13, "peak_memory_gib": 3.5, "eval_loss": 2.0}
    )
    files.write_json(
        tmp_path / "manifest.json",
        {"device": {"name": "H100"}, "versions": {"torch": "2"}, "training_path": {"path": "graphs"}},
    )
    settings = scale.settings_of("tinyllama-1.1b", model_folder, tmp_path / "rows.jsonl", Parallel(2), "auto")
    result = scale.result_of(tmp_path, settings, Parallel(2), 5)
    assert result["tokens_per_second"] == pytest.approx(100)
    assert (result["path"], result["peak_gib"]) == ("graphs", 3.5)
    peaks = plan.plan_memory(Config.from_params(**settings), parallel=Parallel(2)).peaks
    assert peaks["off"] < result["planned_gib"] <= peaks["graphs"]
    assert (result["device"], result["versions"]) == ({"name": "H100"}, {"torch": "2"})


def test_a_failed_run_is_noted_and_the_others_follow(monkeypatch, tmp_path):
    commands = []

    def fail(command, **options):
        commands.append(command)
        return SimpleNamespace(returncode=1, stderr="one\nerror: out of memory\n")

    monkeypatch.setattr(subprocess, "run", fail)
    runs = scale.runs_of(2, list(scale.WARMUP), STRATEGIES)
    lines = list(scale.measure("tinyllama-1.1b", tmp_path, tmp_path / "rows.jsonl", runs))
    assert [(line["gpus"], line["strategy"]) for line in lines] == [
        (1, "ddp"), (2, "ddp"), (1, "ddp"), (2, "ddp"), (2, "fsdp"), (2, "fsdp-offload"),
    ]  # fmt: skip
    assert all(line["error"][-1] == "error: out of memory" for line in lines)
    assert len(commands) == 6


def test_parts_of_the_runs_are_measured_alone():
    assert list(scale.runs_of(2, ["off"], ["fsdp"])) == [(Parallel(2, "fsdp"), "off")]
    assert list(scale.runs_of(4, ["auto"], ["ddp", "fsdp"])) == [(ALONE, "auto"), (Parallel(4), "auto")]
    assert list(scale.runs_of(2, ["auto"], ["fsdp-offload"])) == []


def test_what_is_sent_by_hand():
    """TinyLlama with rank 16 on queries and values: 2,252,800 gradients in float32, in one bucket."""
    workload = memory.workload_of(Config.preset("tinyllama-guanaco-100", rank=16))
    gradients, links = 4 * 2_252_800, scale.Links("", inside=10, between=1)
    seconds = scale.communication(workload, Parallel(2, "ddp"), links)
    assert seconds == pytest.approx(2 * gradients / 2 / 10e9 + 2 * scale.HOP)
    seconds = scale.communication(workload, Parallel(64, "ddp"), links)
    assert seconds == pytest.approx(2 * gradients * 63 / 64 / 1e9 + 2 * 63 * scale.HOP)
    linear, others = 22 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632), 2 * 32000 * 2048 + 45 * 2048
    weights = linear / 2 + 2 * others + gradients
    seconds = scale.communication(workload, Parallel(2, "fsdp"), links)
    assert seconds == pytest.approx((2 * weights + gradients) / 2 / 10e9 + 3 * 22 * scale.HOP)
    assert scale.communication(workload, ALONE, links) == 0


@pytest.mark.parametrize("table", [scale.seventy_billion, scale.published, scale.efficiency])
def test_the_page_has_the_tables_that_the_script_prints(table):
    assert table() in PAGE


def test_the_page_has_the_plan_that_its_command_prints(capsys):
    command = next(line for line in PAGE.splitlines() if line.startswith("python -m qlora_helpers plan"))
    assert main(command.split()[3:]) == 3
    assert capsys.readouterr().out in PAGE
