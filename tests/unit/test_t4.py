"""A T4's arithmetic, simulated: capability 7.5 is claimed, the model computes in fp16 on the CPU, and every tensor that
an operator sees is looked at. The library's loop needs a GPU for its own autocast: its settings are checked.
"""

import contextlib
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlora_helpers import UserError, device
from qlora_helpers.data import cleaning
from qlora_helpers.models import qlora
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import trainer

ALLOWED = {torch.float16, torch.float32, torch.uint8, torch.int64, torch.int32, torch.bool}
ALLOWED |= {torch.float64}  # the scaler inverts its scale in it, and the evaluation adds up in it: single numbers


class Seen(TorchDispatchMode):
    """Notes the dtype of every tensor that goes into an operator or comes out of one."""

    def __init__(self):
        super().__init__()
        self.dtypes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor):
                self.dtypes.setdefault(value.dtype, str(func))
        return out


@contextlib.contextmanager
def claimed():
    """Torch claims a T4, and that it supports bf16: it emulates it."""
    with pytest.MonkeyPatch.context() as claim:
        claim.setattr(torch.cuda, "is_available", lambda: True)
        claim.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
        claim.setattr(torch.cuda, "get_device_capability", lambda *args: (7, 5))
        claim.setattr(torch.cuda, "get_device_name", lambda *args: "Tesla T4")
        claim.setattr(torch.cuda, "mem_get_info", lambda *args: (15 * 2**30, 15 * 2**30))
        yield


@pytest.fixture
def t4():
    """What `detect` says of a T4, while it is claimed."""
    with claimed():
        yield device.detect()


@pytest.fixture
def ready(config, tokenizer, tmp_path):
    """The trainer as for a T4, on the CPU. TRL has done what it does to a 4-bit model's adapter."""
    with claimed():
        here = dataclasses.replace(device.detect(), kind="cpu")
    settings = config.replace(compute_dtype="float16", target_modules="all-linear")
    built = qlora.attach_lora(qlora.load_base(settings, here), settings)
    data = cleaning.prepare(settings, tokenizer)
    return trainer.build_trainer(built, settings, data, tokenizer, here, RunFolder(tmp_path / "run"))


def test_the_device(t4):
    assert (t4.dtype, device.profile()) == ("float16", "t4")
    assert "no bf16 in hardware" in t4.reason


@pytest.mark.parametrize("asked", ["float16", "float32"])
def test_other_arithmetic_may_be_asked_for(t4, asked):
    assert device.detect(asked).dtype == asked


def test_bf16_is_refused_where_it_is_emulated(t4):
    with pytest.raises(UserError, match=r"only emulates bfloat16.*Fix"):
        device.detect("bfloat16")


def test_the_trainers_settings(t4, config, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.SFTConfig, "device", property(lambda self: torch.device("cpu")))
    args = trainer._arguments(config, 16, t4, RunFolder(tmp_path / "run"))
    assert (args.fp16, args.bf16, args.bf16_full_eval, args.tf32) == (True, False, False, None)
    assert device.autocast(t4).fast_dtype == torch.float16


def test_what_is_stored(ready):
    built = ready.model
    assert built.config._attn_implementation in ("sdpa", "eager")
    assert built.get_base_model().dtype == torch.float16
    tensors = [*built.named_parameters(), *built.named_buffers()]
    for name, tensor in tensors:
        state = getattr(tensor, "quant_state", None)
        inner = [state.absmax, state.code] if state else []
        inner += [state.state2.absmax, state.state2.code, state.offset] if state and state.nested else []
        dtypes = {tensor.dtype, *(part.dtype for part in inner)} | ({state.dtype} if state else set())
        assert torch.bfloat16 not in dtypes, name
    assert {p.dtype for p in built.parameters() if p.requires_grad} == {torch.float32}
    layers = [module for module in built.modules() if hasattr(module, "compute_dtype")]
    assert layers
    assert {layer.compute_dtype for layer in layers} == {torch.float16}


def test_no_operator_of_a_step_sees_bf16_and_the_first_step_moves(ready):
    built = ready.model
    batch = next(iter(ready.get_train_dataloader()))
    optimizer = ready.create_optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=trainer.FP16_SCALE)
    before = {name: p.detach().clone() for name, p in built.named_parameters() if "lora_B" in name}
    built.train()
    with Seen() as seen:
        with torch.autocast("cpu", torch.float16):
            loss = ready.compute_loss(built, batch)
        scaler.scale(loss).backward()
        gradients = {p.grad.dtype for p in built.parameters() if p.requires_grad}
        scaler.step(optimizer)
        scaler.update()
    assert set(seen.dtypes) <= ALLOWED, seen.dtypes
    assert torch.float16 in seen.dtypes
    assert gradients == {torch.float32}
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    assert scaler.get_scale() == trainer.FP16_SCALE  # a scale that is too high is halved, and the step skipped
    assert all(not torch.equal(before[name], p) for name, p in built.named_parameters() if name in before)


def test_evaluation_and_answers_see_no_bf16(ready):
    with Seen() as seen:
        ready.evaluate()
    assert set(seen.dtypes) <= ALLOWED, seen.dtypes
    assert torch.float16 in seen.dtypes


def test_the_scaler_of_a_gpu_run_starts_low(t4, monkeypatch, config, tokenizer, tmp_path):
    """Of the library's own construction only the scaler is looked at: the rest needs the GPU."""
    built = []
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind, init_scale: built.append((kind, init_scale)))
    monkeypatch.setattr(trainer, "_arguments", lambda config, rows, there, run: None)
    monkeypatch.setattr(trainer, "train_in_float32", lambda model: None)

    class Shell:
        """Takes what the trainer takes."""

        def __init__(self, **kwargs):
            self.accelerator = type("Accelerator", (), {})()

        def remove_callback(self, kind):
            """Has none."""

    monkeypatch.setattr(trainer, "QloraTrainer", Shell)
    data = cleaning.prepare(config, tokenizer)
    empty = SimpleNamespace(config=SimpleNamespace(), generation_config=SimpleNamespace())
    trainer.build_trainer(empty, config, data, tokenizer, t4, RunFolder(tmp_path / "run"))
    assert built == [("cuda", 1024.0)]
