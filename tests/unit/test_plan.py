"""The memory plan against measurements on a GPU and against parameter counts of real models; tables and advice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_helpers.__main__ import main
from qlora_helpers.config import Config
from qlora_helpers.device import Device
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import comparison, losses
from qlora_helpers.evaluation.differences import Difference
from qlora_helpers.files import ROOT
from qlora_helpers.planning import graphs, measurements, memory, plan, step_time, tables
from qlora_helpers.planning.gpus import GPUS
from qlora_helpers.planning.workload import Parallel
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import oom

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_speed

T4 = Device("cuda", "T4", (7, 5), 14.74, 14.5, "float16", "")


@pytest.mark.parametrize("scored_only", [False, True])
@pytest.mark.parametrize("moments", [("train",), measurements.MOMENTS])
def test_the_plan_agrees_with_measurements(scored_only, moments):
    lines = [line for line in measurements.read("settings") if line["scored_only"] == scored_only]
    result = measurements.score(lines, moments)
    assert result["settings"] >= 12
    assert result["median"] < 0.05
    assert result["worst"] < 0.10


# Peaks on an H100 in GiB when a pass of rows three quarters as long was needed beside the pool: fast, rows, layers.
BESIDE = [
    *(("graphs", rows, "qv", gib) for rows, gib in ((4, 4.48), (16, 12.55))),
    *(("compiled", rows, "qv", gib) for rows, gib in ((4, 3.72), (16, 9.85), (22, 12.75), (25, 14.24))),
    ("compiled", 16, "all", 16.28),
]


def planned_gib(line, path):
    """Return GiB that are planned for a line of the benchmark, and what a pass takes of them."""
    config = gpu_speed.config_of(line, Path(line["shape"])).replace(fast=path)
    parts = plan.plan_memory(config).training
    return sum(parts.values()), sum(parts[name] for name in ("activations", "logits and loss", "fragmentation"))


@pytest.mark.parametrize(("fast", "rows", "linear", "gib"), BESIDE)
def test_the_plan_agrees_with_what_a_pass_took_on_each_path(fast, rows, linear, gib):
    planned, of_pass = planned_gib(gpu_speed.contender("", rows, linear=linear), fast)
    assert planned + 0.75 * of_pass == pytest.approx(gib, rel=0.06)


def test_the_speed_benchmark_reserved_what_was_planned_and_at_most_another_pass():
    speed = json.loads((ROOT / "results" / "h100-speed" / "speed.json").read_text("utf-8"))
    lines = [line for group in speed["groups"].values() for line in group]
    lines = [line for line in lines if line["name"] == gpu_speed.OURS and "peak_gib" in line]
    assert {line["path"]["path"] for line in lines} == {"off", "graphs", "compiled"}
    for line in lines:
        path, measured = line["path"]["path"], line["peak_gib"]
        (planned, _), (_, of_pass) = planned_gib(line, path), planned_gib(line, "graphs")
        most = planned if path == "off" else min(speed["limit_gib"], planned + of_pass)
        assert planned / 1.1 < measured < 1.1 * most, line


def test_auto_fits_with_the_librarys_steps_and_says_whether_graphs_fit_too():
    config = Config.preset("tinyllama-guanaco-100", batch_size=1)
    planned = plan.plan_memory(config)  # few logits, and no mask: graphs need more
    assert planned.with_graphs > planned.total
    between = (planned.total + planned.with_graphs) / 2
    ends = {30.0: ": fits", between: ": does not fit, so fast=auto takes the library's steps"}
    for gib, end in ends.items():
        found = plan.plan_memory(config, gib)
        assert found.fits
        assert "graphs" not in found.training
        assert found.words.endswith(f"; with CUDA graphs {planned.with_graphs:.2f}{end}")
    assert plan.plan_memory(config, 1.0).words == f"does not fit: {planned.total:.2f} GiB of 1.00"
    large = config.replace(batch_size=16, max_length=256)  # many logits: graphs need less
    planned = plan.plan_memory(large)
    found = plan.plan_memory(large, 1.02 * planned.with_graphs)
    assert not found.fits
    assert found.words.endswith(f"; with CUDA graphs {planned.with_graphs:.2f}: tight")


def test_graphs_that_are_asked_for_decide_whether_the_run_fits():
    config = Config.preset("tinyllama-guanaco-100", batch_size=1)
    planned = plan.plan_memory(config)
    between = (planned.total + planned.with_graphs) / 2
    off, auto, chosen = (plan.plan_memory(config.replace(fast=fast), between) for fast in ("off", "auto", "graphs"))
    assert (off.fits, auto.fits, chosen.fits) == (True, True, False)
    assert chosen.total == auto.with_graphs
    assert chosen.words.endswith(f"; with the library's steps (fast=off) {off.total:.2f}: tight")
    assert off.words == f"tight: {off.total:.2f} GiB of {between:.2f}"
    lines = {line["GiB"]: line["a"] for line in tables.parts({"a": chosen})}
    assert lines["graphs"] == chosen.training["graphs"] > 0.1
    names = ["total with CUDA graphs" in {line["GiB"] for line in tables.parts({"a": one})} for one in (off, auto)]
    assert names == [False, True]


@pytest.mark.parametrize(
    ("vocabulary", "short", "tokens"),
    [(32_000, False, 1024), (32_000, True, 512), (128_256, False, 256), (128_256, True, 128), (10**6, False, 128)],
)
def test_logits_of_some_tokens_exist_at_a_time(vocabulary, short, tokens):
    assert graphs.chunk(vocabulary, short) == tokens


def test_only_what_can_be_captured_is_planned_with_graphs():
    config = Config.preset("tinyllama-guanaco-100", fast="graphs")
    assert list(plan.plan_memory(config).peaks) == ["graphs", "off"]
    assert list(plan.plan_memory(config, parallel=Parallel(2)).peaks) == ["graphs", "off"]
    bloom = plan.preset_on("tinyllama-guanaco-100", "bloom-560m", fast="graphs")
    for planned in (
        plan.plan_memory(config, method="full"),
        plan.plan_memory(config, parallel=Parallel(2, "fsdp")),
        plan.plan_memory(bloom),
    ):
        assert list(planned.peaks) == ["off"]
        assert "graphs" not in planned.training


def test_trained_parameters_are_the_models_own(model_folder, device, tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    from qlora_helpers.models.qlora import attach_lora, load_base

    bloom = tmp_path / "bloom"
    BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(bloom)
    for folder, targets, bias in (
        (model_folder, "q_proj v_proj", "none"),
        (model_folder, "all-linear", "all"),
        (bloom, "query_key_value", "lora_only"),
        (bloom, "query_key_value", "all"),
        (bloom, "all-linear", "all"),
    ):
        config = Config.from_params(
            profile="cpu", model=str(folder), target_modules=targets, bias=bias, rank=4, quantization="none"
        )
        model = attach_lora(load_base(config, device), config)
        real = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert plan.plan_memory(config).trained == real, (targets, bias)


def test_tinyllama_trains_what_the_report_should_have_said():
    assert plan.plan_memory(Config.preset("tinyllama-guanaco-100")).trained == 2_252_800


def test_four_bit_weights_take_the_memory_that_torch_counted():
    for line in measurements.read("settings"):
        load = memory.workload_of(measurements.config_of(line))
        assert sum(memory.static_parts(load).values()) / memory.GIB == pytest.approx(line["start"], rel=0.01)


SETTINGS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["tinyllama-1.1b", "smollm2-135m", "bloom-560m"]),
        "quantization": st.sampled_from(["nf4", "none"]),
        "batch_size": st.integers(1, 64),
        "max_length": st.integers(8, 1024),
        "rank": st.integers(1, 64),
        "dropout": st.sampled_from([0.0, 0.1]),
        "gradient_checkpointing": st.booleans(),
        "bias": st.sampled_from(["none", "all"]),
        "fast": st.sampled_from(["off", "graphs", "compiled"]),
    }
)


@given(SETTINGS)
def test_more_of_anything_never_takes_less(settings):
    config = Config.from_params(profile="gpu", target_modules="all-linear", **settings)
    total = plan.plan_memory(config).total
    for name in ("batch_size", "max_length", "rank"):
        assert plan.plan_memory(config.replace(**{name: 2 * getattr(config, name)})).total >= total
    packed, plain = (sum(memory.static_parts(memory.workload_of(config, m)).values()) for m in ("qlora", "lora"))
    assert packed < plain


@settings(max_examples=40)  # each searches through all splits
@given(st.integers(1, 24), st.floats(1, 90), st.booleans())
def test_a_split_keeps_the_effective_batch_and_fits_if_any_does(effective, gib, checkpointing):
    config = Config.preset("llama31-8b", batch_size=effective, gradient_accumulation=1, max_length=512)
    config = config.replace(gradient_checkpointing=checkpointing)
    result = plan.fastest_split(config, gib)
    assert result.effective_batch == effective
    assert result.identity == config.identity
    smallest = config.replace(batch_size=1, gradient_accumulation=effective, gradient_checkpointing=True)
    assert plan.plan_memory(result, gib).fits or not plan.plan_memory(smallest, gib).fits


def test_longer_heldout_rows_are_evaluated_fewer_at_once_and_never_more_than_the_positions():
    config = Config.preset("tinyllama-guanaco-100", max_length=256)
    loads = [memory.workload_of(config.replace(heldout_max_length=n)) for n in (8, 2048, 100_000)]
    assert [load.heldout_length for load in loads] == [256, 2048, 2048]
    short, long, _ = (memory.heldout_parts(load, 8, load.heldout_length)["logits and loss"] for load in loads)
    assert long > 4 * short
    single = Config.preset("llama2-7b-qlora", max_length=256, batch_size=1, gradient_accumulation=16)
    rows = [memory.rows_at_once(memory.workload_of(single.replace(heldout_max_length=n))) for n in (256, 2048)]
    assert rows == [8, 1]


def test_shorter_heldout_rows_are_advised_where_they_decide():
    config = Config.preset("gemma3-1b", max_length=256, batch_size=1, gradient_accumulation=16)
    whole, cut = (plan.plan_memory(config.replace(heldout_max_length=n), 3.0) for n in (2048, 256))
    assert not whole.fits
    assert any("heldout_max_length=256, longer held-out rows are truncated" in str(one) for one in whole.advice)
    assert cut.fits
    assert plan.nearest_fit(config, 3.0).heldout_max_length == 256


def test_a_large_gpu_gets_the_whole_batch_and_a_small_one_checkpointing():
    config = Config.preset("llama31-8b", max_length=256)
    whole, split = plan.fastest_split(config, 80.0), plan.fastest_split(config, "t4")
    assert (whole.batch_size, whole.gradient_checkpointing) == (16, False)
    assert split.gradient_checkpointing
    single = config.replace(batch_size=1, gradient_accumulation=16, gradient_checkpointing=False)
    assert plan.plan_memory(single, "t4").fits
    times = [step_time.seconds(one, GPUS["t4"]) for one in (whole, split, single)]
    assert times == sorted(times)


def test_estimated_step_times_are_near_measured_ones():
    lines = tables.timings(measurements.read("speed"))
    assert len(lines) == 8
    assert max(abs(line["estimated s"] / line["measured s"] - 1) for line in lines) < 0.12


def test_hours_grow_with_the_rows_and_with_the_model_and_need_a_gpu():
    llama = Config.preset("llama2-7b-qlora")
    table = tables.hours({name: llama.replace(model=name) for name in ("llama2-7b", "llama2-70b")}, (1000, 2000))
    cells = {(line["model"], line["method"]): line for line in table}
    small, large = cells["llama2-7b", "qlora"], cells["llama2-70b", "qlora"]
    assert small["GPU"] == "t4"
    seconds = llama.epochs * 1000 / llama.effective_batch * step_time.seconds(llama, GPUS["t4"])
    assert small["1,000 rows"] == f"{seconds / 3600:.1f} h"
    assert float(small["2,000 rows"][:-2]) == pytest.approx(2 * float(small["1,000 rows"][:-2]), abs=0.15)
    assert large["GPU"] == "a100-80"
    assert cells["llama2-70b", "lora"]["1,000 rows"] == "–"


def test_advice_says_what_it_saves_and_following_it_saves_that():
    config = Config.preset("llama31-8b")
    before = plan.plan_memory(config, "t4")
    assert before.verdict == "does not fit"
    assert before.advice
    for item in before.advice:
        after = plan.plan_memory(config.replace(**item.settings), "t4")
        assert before.total - after.total == pytest.approx(item.saves_gib)


def test_the_nearest_fit_fits():
    config = Config.preset("llama31-8b")
    result = plan.nearest_fit(config, "t4")
    assert plan.plan_memory(result, "t4").fits
    assert plan.nearest_fit(config, 3.0) is None


@pytest.mark.parametrize(("preset", "most"), [("tinyllama-guanaco-100", (8, 64)), ("llama31-8b", (16, 32))])
def test_evaluation_batches_need_no_more_memory_than_training(preset, most):
    config = Config.preset(preset)
    load = memory.workload_of(config)
    training = sum(memory.training_parts(load).values())
    rows, questions = losses.eval_batch_sizes(config, T4)
    assert (rows, questions) == most
    assert sum(memory.heldout_parts(load, rows).values()) <= training
    assert sum(memory.answer_parts(load, questions).values()) <= training
    assert questions == memory.MOST_ANSWERS or sum(memory.answer_parts(load, 2 * questions).values()) > training


def test_an_unsupported_model_is_evaluated_in_small_batches(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert losses.eval_batch_sizes(Config.preset("llama31-8b", model=str(tmp_path)), T4) == (1, 8)


def test_a_recipe_on_another_model_gets_that_models_layers_and_no_pinned_revision():
    config = plan.preset_on("tinyllama-guanaco-100", "bloom-560m")
    assert config.target_modules == ("query_key_value",)
    assert config.revision == "main"
    assert plan.preset_on("tinyllama-guanaco-100", "bloom-560m", target_modules="all-linear").target_modules == (
        "all-linear",
    )


def test_a_t4_is_the_same_by_name_by_size_and_as_a_device():
    config = Config.preset("bloom-7b1-r20-all")
    assert plan.plan_memory(config, "t4").total == plan.plan_memory(config, 14.74).total
    assert plan.plan_memory(config, "t4").total == plan.plan_memory(config, T4).total


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--device", "t4"], 0, "fits: 3.18 GiB of 14.74; with CUDA graphs 3.13: fits"),
        (["--device", "t4", "--fast", "graphs", "--batch", "64", "--accumulation", "1"], 3, "does not fit: "),
        (["--preset", "llama31-8b", "--memory", "16"], 3, "does not fit: 2"),
        (["--model", "bloom-7b1", "--bias", "all", "--rank", "20", "--memory", "80"], 0, "7,069,016,064 parameters"),
        (["--model", "bigscience/bloom-560m"], 0, "Fits on: t4"),
        (["--memory", "0"], 2, "0 GiB is not positive"),
        (["--memory", "nan"], 2, "nan GiB is not positive"),
        (["--rank", "257"], 2, "rank: 257 exceeds the width of an adapted layer. Fix: use 256 or less."),
        (["--max-length", "4096"], 2, "4096 exceeds the 2048 positions"),
        (["--model", "gpt2/none"], 2, "cannot load the config of 'gpt2/none'"),
        (["--device", "a100"], 2, "unknown device 'a100'. Did you mean"),
        (["--method", "qlor"], 2, "Did you mean 'qlora'?"),
        (["--targets", "q_prj"], 2, "no linear layer 'q_prj'. Fix: choose from down_proj, gate_proj, k_proj, o_proj,"),
        (["--targets", "q_prj"], 2, "or all-linear; usual: q_proj, v_proj."),
        (["--model", "qwen3-4b", "--device", "t4"], 0, "4,022,468,096 parameters"),
        (["--batch", "0"], 2, "batch_size: 0 is too small"),
        (["--bias", "some"], 2, "bias: 'some' is not one of"),
    ],
)
def test_the_command(capsys, monkeypatch, words, code, message):
    from qlora_helpers.models import hub

    monkeypatch.setattr(hub, "reachable", lambda: False)
    assert main(["plan", *words]) == code
    seen = capsys.readouterr()
    assert message in (seen.err if code == 2 else seen.out)
    assert code != 2 or seen.err.count("\n") == 1


def test_json_has_the_parts_the_total_and_the_advice(capsys):
    assert main(["plan", "--preset", "llama31-8b", "--memory", "16", "--json"]) == 3
    result = json.loads(capsys.readouterr().out)
    assert result["fits"] is False
    assert result["advice"]
    peak = max(sum(result["training"].values()), sum(result["evaluation"].values()))
    assert result["total"] == pytest.approx(peak + result["context"], abs=0.01)
    assert set(result["methods"]) == {"qlora", "lora", "full"}
    assert result["paths"]["off"] == result["total"]
    assert set(result["paths"]) == {"off"}  # it recomputes activations, with dropout
    main(["plan", "--preset", "llama31-8b", "--dropout", "0", "--json"])
    assert set(json.loads(capsys.readouterr().out)["paths"]) == {"off", "graphs"}


def test_the_command_needs_no_torch():
    code = (
        "import sys; from qlora_helpers.__main__ import main; main(['plan', '--preset', 'llama31-8b']); "
        "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_hours_grow_with_rows_and_epochs(capsys):
    """There are rows x epochs / effective batch steps, on the given GPU, else on the smallest that fits."""
    words = ["plan", "--model", "llama2-7b", "--batch", "4", "--accumulation", "1", "--max-length", "512", "--json"]
    result = {}
    for epochs in (1, 3):
        assert main([*words, "--rows", "50000", "500000", "--epochs", str(epochs)]) == 0
        result[epochs] = json.loads(capsys.readouterr().out)["time"]
    assert [line["steps"] for line in result[1]] == [12_500, 125_000]
    assert {line["on"] for line in result[1]} == {"l4"}
    first = result[1][0]["hours"]
    hours = [line["hours"] for lines in result.values() for line in lines]
    assert hours == pytest.approx([first, 10 * first, 3 * first, 30 * first], rel=1e-6)
    config = Config.preset("tinyllama-guanaco-100", model="llama2-7b", batch_size=4, max_length=512)
    config = config.replace(gradient_accumulation=1)
    assert first == pytest.approx(12_500 * step_time.seconds(config, GPUS["l4"]) / 3600)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "tinyllama-guanaco-100", "--device", "t4"], "100       5       125"),
        (["--preset", "tinyllama-guanaco-100", "--device", "t4"], "measured on an H100"),
        (["--model", "llama2-70b", "--method", "lora"], "fits no known GPU"),
        (["--method", "full", "--device", "h100"], "no estimate for this method"),
    ],
)
def test_the_time_and_where_it_comes_from(capsys, words, message):
    main(["plan", *words])
    assert message in capsys.readouterr().out


def test_zero_rows_are_refused(capsys):
    assert main(["plan", "--rows", "0"]) == 2
    assert capsys.readouterr().err == "error: rows: 0 is too small. Fix: use 1 or more.\n"


def test_auto_batch_is_chosen_printed_and_leaves_the_run_the_same(capsys):
    config = Config.preset("llama31-8b", max_length=1024, auto_batch=True)
    result = oom.choose_split(config, T4)
    assert result.identity == config.identity
    assert result.batch_size < config.batch_size
    assert "As published: batch 4 x 4, checkpointing (auto_batch=false)." in capsys.readouterr().out
    assert oom.choose_split(config.replace(auto_batch=False), T4).batch_size == 4


def test_out_of_memory_names_planned_and_reserved_memory_and_a_fit(tmp_path):
    config = Config.preset("llama31-8b")
    with pytest.raises(UserError) as caught:
        oom.shrink(config, T4, RunFolder(tmp_path), 14.2)
    message = str(caught.value)
    for words in ("23.6 of 14.7", "GiB were planned", "14.2 GiB were reserved", "batch_size=1", "on_oom=shrink"):
        assert words in message


def test_shrinking_halves_to_the_end_and_then_stops(tmp_path):
    config = Config.preset("tinyllama-guanaco-100", batch_size=6, on_oom="shrink")
    for split in ((3, 2, False), (1, 6, False), (1, 6, True)):
        config = oom.shrink(config, T4, RunFolder(tmp_path), 14.2)
        assert (config.batch_size, config.gradient_accumulation, config.gradient_checkpointing) == split
    with pytest.raises(UserError, match=r"Fix: a smaller model, or a GPU with more memory\. What"):
        oom.shrink(config, T4, RunFolder(tmp_path), 14.2)


def test_gpus_are_those_with_enough_memory():
    result = plan.plan_memory(Config.preset("llama31-8b"))
    for card, known in GPUS.items():
        assert (card in tables.other_gpus(result)) == (result.peak + known.context <= known.memory)
        assert plan.plan_memory(Config.preset("llama31-8b"), card).fits == (card in tables.other_gpus(result))


def test_the_grid_has_one_row_per_setting_and_one_verdict_per_device():
    presets = {"small": Config.preset("bloom-560m-r20-all"), "large": Config.preset("bloom-7b1-r20-all")}
    small, large = tables.grid(presets, [(8, 256)], {"T4": "t4", "16 GiB": 16.0})
    assert (small["T4"], large["T4"], large["16 GiB"]) == ("fits", "does not fit", "does not fit")
    assert large["GiB"] > small["GiB"] > 1


def test_what_ran_out_of_memory_when_it_was_tried_did_not_fit_the_plan():
    for line in measurements.read("reproduction"):
        assert (measurements.predicted(line)["train"] <= line["limit_gib"]) == line["fits"]


@pytest.mark.parametrize(
    ("gap", "memory_", "seconds", "message"),
    [
        ((-0.2, -0.1), (2, 2), (1, 1), "Take B: its held-out loss is lower."),
        ((0.1, 0.2), (2, 1), (1, 1), "Take A: its held-out loss is lower."),
        ((-0.1, 0.1), (2, 1), (1, 3), "Take B: no difference shows in the loss, and it needs less memory."),
        ((-0.1, 0.1), (2, 2), (1, 3), "Take A: no difference shows in the loss, and it is faster."),
        ((-0.1, 0.1), (2, 2), (1, 1), "Take either"),
    ],
)
def test_which_to_take_follows_from_the_interval_then_memory_then_time(gap, memory_, seconds, message):
    result = Difference("A", "B", sum(gap) / 2, *gap, rows=9, seeds=1)
    rows = [
        {"run": name, "peak GiB": size, "seconds a step": time}
        for name, size, time in zip("AB", memory_, seconds, strict=True)
    ]
    assert comparison.recommend(result, rows).startswith(message)


def test_the_plan_is_printed_before_the_weights_are_loaded(capsys, tmp_path):
    oom.announce(Config.preset("llama31-8b"), T4)
    message = capsys.readouterr().out
    assert message.startswith("Memory: does not fit: 23.")
    assert "- max_length=1024" in message
    unknown = tmp_path / "config.json"
    unknown.write_text("{}")
    oom.announce(Config.preset("llama31-8b", model=str(tmp_path)), T4)
    assert "has model_type = None" in capsys.readouterr().out
