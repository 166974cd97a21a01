"""Compute dtype: measured on a CPU, the same for all runs on a machine, and kept by a run that is resumed."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qlora_helpers import cpu_speed, device, runs
from qlora_helpers.cpu_speed import CpuSpeed
from qlora_helpers.data.cleaning import prepare
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import comparison
from qlora_helpers.evaluation.context import RunContext
from qlora_helpers.experiments import matrix
from qlora_helpers.models import hub, qlora
from qlora_helpers.planning import architectures, compute_dtype
from qlora_helpers.training import trainer

FAST, SLOW = CpuSpeed(float32=100, bfloat16=300), CpuSpeed(float32=100, bfloat16=3)


@pytest.fixture(scope="session")
def config(config):
    """Config of the tiny model, with the dtype chosen for the machine."""
    return config.replace(compute_dtype="auto")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Path of an empty store of measured speeds."""
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path))
    cpu_speed.lookup.cache_clear()
    yield tmp_path / "qlora_helpers" / cpu_speed.STORE
    cpu_speed.lookup.cache_clear()


@pytest.fixture
def measured(cache, monkeypatch):
    """Return a function that sets the measured speed."""

    def choose(speed):
        cpu_speed.lookup.cache_clear()
        cache.unlink(missing_ok=True)
        monkeypatch.setattr(cpu_speed, "measure", lambda *size: speed)

    return choose


@pytest.mark.parametrize(
    ("float32", "bfloat16", "dtype"),
    [(100, 3, "float32"), (100, 119, "float32"), (100, 120, "bfloat16"), (100, 400, "bfloat16")],
)
def test_bfloat16_must_be_a_fifth_faster(float32, bfloat16, dtype):
    speed = CpuSpeed(float32=float32, bfloat16=bfloat16)
    assert speed.dtype == dtype
    assert f"{bfloat16} GFLOP/s in bfloat16, {float32} in float32" in speed.reason


def test_both_dtypes_are_timed_forward_and_backward(monkeypatch):
    grad, linear, seen = torch.autograd.grad, torch.nn.functional.linear, []
    monkeypatch.setattr(torch.autograd, "grad", lambda *a: seen.append(("backward", a[0].dtype)) or grad(*a))
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: seen.append(("forward", a[0].dtype)) or linear(*a))
    speed = cpu_speed.measure(32, 48)
    assert {*seen} == {(way, dtype) for way in ("forward", "backward") for dtype in (torch.float32, torch.bfloat16)}
    assert speed.float32 > 0
    assert speed.bfloat16 > 0


def test_a_hopelessly_slow_dtype_is_timed_once(monkeypatch):
    """Without bfloat16 instructions, a product of the full size would take seconds."""
    asked = []

    def seconds(dtype, tokens, *size):
        asked.append((dtype, tokens))
        return tokens * (1.0 if dtype == "bfloat16" else 0.1)

    monkeypatch.setattr(cpu_speed, "_seconds", seconds)
    speed = cpu_speed.measure(10, 10)
    assert [tokens for dtype, tokens in asked if dtype == "bfloat16"] == [cpu_speed.FEW_TOKENS]
    assert speed.float32 == pytest.approx(10 * speed.bfloat16, rel=0.5)


def test_the_choice_is_stored_for_this_machine(cache, monkeypatch):
    monkeypatch.setattr(cpu_speed, "measure", lambda *size: FAST)
    assert device.detect().dtype == "bfloat16"
    cpu_speed.lookup.cache_clear()  # another process
    monkeypatch.setattr(cpu_speed, "measure", lambda *size: SLOW)
    assert device.detect().dtype == "bfloat16"
    cpu_speed.lookup.cache_clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)  # another machine
    assert device.detect().dtype == "float32"
    assert len(json.loads(cache.read_text("utf-8"))) == 2


def test_several_processes_choose_as_one_does(cache, monkeypatch):
    """One of them measures, with the threads of all, and finds what one process has stored."""
    own, used = torch.get_num_threads(), []
    monkeypatch.setattr(cpu_speed, "_seconds", lambda *given: used.append(torch.get_num_threads()) or 1.0)
    try:
        torch.set_num_threads(2)
        alone = cpu_speed.lookup.__wrapped__(576, 1536)
        assert set(used) == {2}
        torch.set_num_threads(1)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        used.clear()
        assert cpu_speed.lookup.__wrapped__(576, 1536) == alone
        assert not used
        cpu_speed.measure(576, 1536)
        assert set(used) == {2}
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(own)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', "null"])
def test_a_damaged_store_is_measured_again(cache, measured, content):
    measured(SLOW)
    cache.parent.mkdir(parents=True)
    cache.write_text(content, "utf-8")
    assert device.detect().dtype == "float32"
    stored = [entry for entry in json.loads(cache.read_text("utf-8")).values() if isinstance(entry, dict)]
    assert [CpuSpeed(**entry) for entry in stored] == [SLOW]


@pytest.mark.parametrize("entry", [{"float32": "x", "bfloat16": 1}, {"float32": 1}, 5, None, [], "x"])
def test_a_damaged_entry_is_replaced(cache, measured, entry):
    measured(FAST)
    device.detect()
    (key,) = json.loads(cache.read_text("utf-8"))
    cache.write_text(json.dumps({key: entry}), "utf-8")
    cpu_speed.lookup.cache_clear()
    assert device.detect().dtype == "bfloat16"
    assert json.loads(cache.read_text("utf-8")) == {key: dataclasses.asdict(FAST)}


def test_the_profile_is_known_without_a_measurement(monkeypatch):
    monkeypatch.setattr(cpu_speed, "lookup", lambda *size: pytest.fail("measured"))
    assert device.profile() == "cpu"
    assert device.detect("float32").dtype == "float32"


def test_trained_biases_need_float32_on_a_cpu(config, measured):
    measured(FAST)
    assert compute_dtype.device_for(config).dtype == "bfloat16"
    assert compute_dtype.device_for(config.replace(bias="all")).dtype == "float32"


def test_the_models_own_size_is_measured(config, cache, monkeypatch):
    asked = []
    monkeypatch.setattr(cpu_speed, "measure", lambda *size: asked.append(size) or FAST)
    compute_dtype.device_for(config)
    assert asked == [(64, 128)]


# The stored weights are the same in bfloat16 and float32; only the products differ.
@pytest.mark.parametrize("speed", [FAST, SLOW])
def test_the_same_base_in_either_dtype(config, measured, speed):
    measured(speed)
    here = compute_dtype.device_for(config)
    base = qlora.load_base(config, here)
    weights = {name: p for name, p in base.named_parameters() if p.dtype == torch.uint8}
    assert {m.weight.quant_state.dtype for m in base.modules() if hasattr(m, "compute_dtype")} == {
        getattr(torch, here.dtype)
    }
    other = qlora.load_base(config, here.computing_in("float32" if here.dtype == "bfloat16" else "bfloat16"))
    assert all(torch.equal(weights[name], p) for name, p in other.named_parameters() if name in weights)
    assert qlora.weight_table(base) == qlora.weight_table(other)
    proofs = [device.prove_four_bit(here.computing_in(dtype)) for dtype in cpu_speed.CANDIDATES]
    assert {p["16-bit"]["KiB of weights"] for p in proofs} == {512}


@pytest.mark.parametrize("speed", [FAST, SLOW])
def test_three_steps_in_either_dtype(config, tokenizer, measured, tmp_path, speed):
    """The run trains, and its manifest contains the compute dtype and the reason for it."""
    measured(speed)
    own = config.replace(n_samples=12, n_answers=1)
    run = trainer.train(own, prepare(own, tokenizer), tokenizer, runs.RunFolder(tmp_path / "run"))
    noted = run.read("manifest.json")["device"]
    assert noted["dtype"] == speed.dtype == run.read("metrics.json")["compute_dtype"]
    assert noted["reason"] == speed.reason
    steps = [line for line in run.log() if "loss" in line]
    assert len(steps) == 3
    assert all(line["grad_norm"] > 0 for line in steps)


@pytest.fixture(scope="module")
def wide_model(tokenizer, tmp_path_factory):
    """One random block with the widths of the bundled model."""
    torch.manual_seed(0)
    shape = architectures.known("smollm2-135m") | {"num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    folder = tmp_path_factory.mktemp("wide")
    AutoModelForCausalLM.from_config(LlamaConfig(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_three_steps_at_the_bundled_models_widths(config, tokenizer, wide_model, tmp_path, monkeypatch):
    """Training in float32 and in bfloat16 gives the same losses up to rounding."""
    monkeypatch.setattr(trainer.QloraTrainer, "evaluate", lambda self, *args, **kwargs: {"eval_loss": 0.0})
    small = config.replace(model=str(wide_model), n_samples=3, batch_size=1, dropout=0.0)
    losses = []
    for dtype in cpu_speed.CANDIDATES:
        own = small.replace(compute_dtype=dtype)
        here, data = compute_dtype.device_for(own), prepare(own, tokenizer)
        built = qlora.attach_lora(qlora.load_base(own, here), own)
        ready = trainer.build_trainer(built, RunContext(own, data, tokenizer, here, runs.RunFolder(tmp_path / dtype)))
        ready.train()
        lines = [line for line in ready.state.log_history if "loss" in line]
        assert all(line["grad_norm"] > 0 for line in lines)
        losses.append([line["loss"] for line in lines])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_a_run_keeps_the_dtype_it_began_in(config, tokenizer, measured, tmp_path, monkeypatch, capsys):
    """A run that begins on a machine with fast bfloat16 and moves to one without."""
    own = config.replace(n_samples=12, n_answers=1, save_steps=1)
    data, run = prepare(own, tokenizer), runs.RunFolder(tmp_path / "run")
    save = trainer.QloraTrainer._save_checkpoint

    def once(self, *args):
        save(self, *args)
        raise KeyboardInterrupt

    measured(FAST)
    monkeypatch.setattr(trainer.QloraTrainer, "_save_checkpoint", once)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(own, data, tokenizer, run)
    monkeypatch.setattr(trainer.QloraTrainer, "_save_checkpoint", save)
    measured(SLOW)
    trainer.train(own, data, tokenizer, run)
    assert run.read("metrics.json")["compute_dtype"] == "bfloat16"
    assert "began in bfloat16 and keeps it, although it is slow here" in capsys.readouterr().out


def test_runs_in_two_dtypes_are_not_compared(config, tokenizer, measured, tmp_path):
    folders = {}
    for name, speed in (("exp1", FAST), ("exp2", SLOW)):
        measured(speed)
        own = config.replace(n_samples=8, n_answers=1, seed=len(folders))
        folders[name] = [trainer.train(own, prepare(own, tokenizer), tokenizer, runs.RunFolder(tmp_path / name))]
    with pytest.raises(UserError, match=r"different dtypes \(exp1: bfloat16, exp2: float32\).*Fix: .*compute_dtype"):
        comparison.compare(folders)
    baselines = {run.read("manifest.json")["baseline"] for (run,) in folders.values()}
    assert len(baselines) == 2  # the base model was measured in both


def test_missing_runs_say_how_long_they_take_here(config, measured, tmp_path):
    """The time follows from the measured speed: a slower machine needs longer."""
    words = []
    for speed in (FAST, CpuSpeed(float32=0.01, bfloat16=0.01)):
        measured(speed)
        (needed,) = matrix.plan_runs({"exp1": config}, tmp_path)
        words.append(needed.minutes)
    assert "300 GFLOP/s in bfloat16" in words[0]
    assert "0 GFLOP/s in float32" in words[1]
    assert words[0] != words[1]


@pytest.fixture
def amd(monkeypatch):
    """A machine on which torch.cuda is an AMD GPU."""

    def claim(architecture):
        facts = SimpleNamespace(gcnArchName=f"{architecture}:sramecc+:xnack-")
        monkeypatch.setattr(torch.version, "hip", "6.4", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 4))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *a: facts)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "AMD GPU")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *a: (8 * 2**30, 16 * 2**30))

    return claim


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("gfx942", "bfloat16"),
        ("gfx90a", "bfloat16"),
        ("gfx1100", "bfloat16"),
        ("gfx1030", "float16"),
        ("gfx906", "float16"),
    ],
)
def test_an_amd_gpus_capability_is_not_nvidias(amd, architecture, dtype):
    amd(architecture)
    result = device.detect()
    assert (result.dtype, result.capability) == (dtype, None)
    assert architecture in result.reason


def test_apple_silicon_uses_its_cpu(config, measured, monkeypatch):
    """Metal is available, CUDA and /proc are not, and nothing fails."""
    measured(SLOW)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(cpu_speed.Path, "exists", lambda self: False)
    result = device.detect()
    assert (result.kind, result.dtype) == ("cpu", "float32")
    assert dataclasses.asdict(result)["name"]


def test_an_unknown_model_is_measured_at_the_usual_size(config):
    shape = architectures.load_or_bundled(config.replace(model="no/such-model"))
    assert (shape.hidden, shape.intermediate) == cpu_speed.USUAL_SIZE
    assert hub.is_local(config)
