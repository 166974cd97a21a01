"""Training in the dtypes of a T4, simulated on a CPU.

torch reports compute capability 7.5, the model computes in fp16, and the tests check the dtype of every tensor that an
operator sees. The library's training loop needs a GPU for its autocast, so only its settings are checked.
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
from qlora_helpers.evaluation.context import RunContext
from qlora_helpers.models import qlora
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import libraries, trainer

ALLOWED = {torch.float16, torch.float32, torch.uint8, torch.int64, torch.int32, torch.bool}
ALLOWED |= {torch.float64}  # scalars only: the inverse of the loss scale, and sums of the evaluation


class Seen(TorchDispatchMode):
    """Records the dtypes of all inputs and outputs of operators."""

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
    """Make torch report a T4, including its claim to support bf16, which it only emulates."""
    with pytest.MonkeyPatch.context() as claim:
        claim.setattr(torch.cuda, "is_available", lambda: True)
        claim.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
        claim.setattr(torch.cuda, "get_device_capability", lambda *args: (7, 5))
        claim.setattr(torch.cuda, "get_device_name", lambda *args: "Tesla T4")
        claim.setattr(torch.cuda, "mem_get_info", lambda *args: (15 * 2**30, 15 * 2**30))
        yield


@pytest.fixture
def t4():
    """The device that `detect` returns while torch reports a T4."""
    with claimed():
        yield device.detect()


@pytest.fixture
def ready(config, tokenizer, tmp_path):
    """A trainer for a T4, on the CPU. TRL has already processed the 4-bit model's adapter."""
    with claimed():
        here = dataclasses.replace(device.detect(), kind="cpu")
    settings = config.replace(compute_dtype="float16", target_modules="all-linear")
    built = qlora.attach_lora(qlora.load_base(settings, here), settings)
    data = cleaning.prepare(settings, tokenizer)
    return trainer.build_trainer(built, RunContext(settings, data, tokenizer, here, RunFolder(tmp_path / "run")))


def test_device_and_profile(t4):
    assert (t4.dtype, device.profile()) == ("float16", "t4")
    assert "no bf16 in hardware" in t4.reason


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_can_be_requested(t4, dtype):
    assert device.detect(dtype).dtype == dtype


def test_emulated_bf16_is_refused(t4):
    with pytest.raises(UserError, match=r"only emulates bfloat16.*Fix"):
        device.detect("bfloat16")


def test_trainer_settings(t4, config, tmp_path, monkeypatch):
    monkeypatch.setattr(libraries.SFTConfig, "device", property(lambda self: torch.device("cpu")))
    monkeypatch.setattr(libraries.SFTConfig, "n_gpu", 1)
    rows = SimpleNamespace(trained_on=range(16))
    args = libraries.run_arguments(RunContext(config, rows, None, t4, RunFolder(tmp_path / "run")))
    assert (args.fp16, args.bf16, args.bf16_full_eval, args.tf32) == (True, False, False, None)
    assert device.autocast(t4).fast_dtype == torch.float16


def test_stored_tensors_are_not_bf16(ready):
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


def test_step_uses_no_bf16_and_changes_the_adapter(ready):
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
    assert scaler.get_scale() == trainer.FP16_SCALE  # a scale that is too high is halved and the step skipped
    assert all(not torch.equal(before[name], p) for name, p in built.named_parameters() if name in before)


def test_evaluation_and_answers_use_no_bf16(ready):
    with Seen() as seen:
        ready.evaluate()
    assert set(seen.dtypes) <= ALLOWED, seen.dtypes
    assert torch.float16 in seen.dtypes


def test_loss_scale_of_a_gpu_run_starts_low(t4, monkeypatch, config, tokenizer, tmp_path):
    """Only the scaler is checked: the rest of the library's trainer needs a GPU."""
    built = []
    monkeypatch.setattr(torch.amp, "GradScaler", lambda kind, init_scale: built.append((kind, init_scale)))
    monkeypatch.setattr(trainer, "run_arguments", lambda *args: None)
    monkeypatch.setattr(trainer, "train_in_float32", lambda model: None)

    class Shell:
        """Accepts the arguments of the trainer."""

        def __init__(self, **kwargs):
            self.accelerator = type("Accelerator", (), {})()

        def remove_callback(self, kind):
            """Do nothing."""

    monkeypatch.setattr(trainer, "QloraTrainer", Shell)
    data = cleaning.prepare(config, tokenizer)
    empty = SimpleNamespace(config=SimpleNamespace(), generation_config=SimpleNamespace())
    trainer.build_trainer(empty, RunContext(config, data, tokenizer, t4, RunFolder(tmp_path / "run")))
    assert built == [("cuda", 1024.0)]
