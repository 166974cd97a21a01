"""Several processes that train one run, as `accelerate launch` or `notebook_launcher` starts them.

accelerate moves the tensors; this module says which process writes, and gives all of them the same values. Every
process has its own GPU, or a share of the CPU. With one process, each function does nothing.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from qlora_helpers.errors import UserError

T = TypeVar("T")
CONFIGS = Path(__file__).parent / "accelerate"  # config files for `accelerate launch`
WAIT = timedelta(hours=24)  # process 0 may measure a large base model while the others wait
SECONDS = 5.0  # that the others leave process 0 to report an error that all of them have
_reporting = threading.Event()  # set in process 0 once it reports an error


class ProcessLost(UserError):
    """The error of a run of which another process has ended."""

    def __init__(self) -> None:
        super().__init__(
            f"training: another of the {count()} processes has ended, so this one ends too; if none printed an error, "
            "it was killed. Fix: run the same command again, with any number of processes: it goes on from the last "
            "checkpoint."
        )


def count() -> int:
    """Return the number of processes that train this run."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def is_main() -> bool:
    """Return whether this is process 0, the only one that writes files and prints."""
    return rank() == 0


def is_sharded() -> bool:
    """Return whether accelerate shards the model over the processes (FSDP), so that all must take part to use it."""
    return count() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def machine() -> tuple[str, int]:
    """Return the profile of this machine and its number of GPUs.

    Another process finds them: a notebook that has used CUDA itself can no longer start processes that use it.
    """
    code = "import torch; from qlora_helpers import device; print(device.profile(), torch.cuda.device_count())"
    printed = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    profile, gpus = printed.split()
    return profile, int(gpus)


def begin() -> None:
    """Give this process the one GPU that is its own, connect it to the others, and silence all but process 0.

    Call it before anything uses CUDA. It changes the environment, so that GPU 0 of this process is its own one. Raises
    `UserError` if there are GPUs, but too few.
    """
    if count() == 1:
        return
    if rank() < 2:  # if one of them is lost, the other one says so
        _report_sigterm()
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    import torch
    from accelerate import PartialState

    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", count())), torch.cuda.device_count()  # starts no CUDA
    if 0 < gpus < here:
        raise UserError(f"processes: {here} were started, and {gpus} GPUs are visible. Fix: --num_processes {gpus}.")
    _hide_other_gpus()
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "").lower() != "true"
    if not on_gpu:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count())))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    PartialState(cpu=not on_gpu, timeout=WAIT)


def _hide_other_gpus() -> None:
    """Leave one GPU visible. Code that uses the first GPU, like ours and that of many libraries, then uses this one."""
    local = int(os.environ["LOCAL_RANK"])
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    os.environ["CUDA_VISIBLE_DEVICES"] = names[local] if local < len(names) else "" if names else str(local)
    os.environ["LOCAL_RANK"] = "0"


def is_lost(error: BaseException) -> bool:
    """Whether an error says that the connection to another process broke."""
    import torch.distributed as dist

    return count() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def _report_sigterm() -> None:
    """Print one line and end when the launcher ends this process because another one has ended.

    A thread waits for the signal, because a handler would not run while the main thread waits for the other processes.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        signal.sigwait({signal.SIGTERM})
        if not _reporting.is_set():
            print(f"error: {ProcessLost()}", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def begin_report(error: BaseException) -> None:
    """Call it before this process reports an error. If process 0 has the same one, the launcher ends this one first."""
    _reporting.set()
    if not is_main() and not isinstance(error, ProcessLost):
        time.sleep(SECONDS)


def wait() -> None:
    """Wait until all processes are here."""
    if count() > 1:
        import torch.distributed as dist

        dist.barrier()


def from_main(make: Callable[[], T]) -> T:
    """Return what `make` returns in process 0, which alone calls it, or raise its `UserError` in all processes."""
    if count() == 1:
        return make()
    import torch.distributed as dist

    value: list[Any] = [None, None]
    if is_main():
        try:
            value[0] = make()
        except UserError as error:
            value[1] = error
    dist.broadcast_object_list(value, src=0)
    if value[1]:
        raise value[1]
    return value[0]


def of_all(value: T) -> list[T]:
    """Return the value of each process, in all of them."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the body of a `with` statement in process 0, then in all others, which find what it wrote.

    A `UserError` in process 0 is raised in all.
    """
    if not is_main():
        from_main(lambda: None)
        yield
        return
    try:
        yield
    except UserError as error:
        failed = error
        from_main(lambda: _raise(failed))
    else:
        from_main(lambda: None)


def _raise(error: UserError) -> None:
    raise error


def end() -> None:
    """Disconnect this process from the others, which have nothing more to do."""
    if count() > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


@contextlib.contextmanager
def gathered(model: Any) -> Iterator[None]:
    """In the body of a `with` statement, each process holds all weights, so that one of them can use the model alone.

    Without FSDP it always does.
    """
    if not is_sharded():
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    generate = model.generate
    model.generate = partial(generate, synced_gpus=False)  # else it waits for the other processes at every token
    yield
    model.generate = generate
    for module in sharded:
        module.reshard()
        module.set_reshard_after_forward(True, recurse=False)


def trained_weights(model: Any) -> dict[str, Any] | None:
    """Return the trained weights of a sharded model by name, whole, or None if the model is not sharded."""
    if not is_sharded():
        return None
    trained = ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)
    return {name: p.full_tensor().cpu() for name, p in trained}
