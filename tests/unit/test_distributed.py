"""A run trained by several processes: the same steps as by one, one writer, and an end when a process is lost.

Processes that need no launcher come from a fork server that has imported everything, and talk over gloo.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from qlora_helpers import UserError, distributed
from qlora_helpers.__main__ import main
from qlora_helpers.data.prompts import IGNORE
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import batches, libraries, oom

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["qlora_helpers.training.trainer"])
NEAR = 1e-5  # nats; sums in another order
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(distributed.CONFIGS / "ddp.yaml"))


FSDP = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}  # fmt: skip


AS_GRAPHS = {"AS_GRAPHS": "1"}


def work(env, folder, params, output):
    """Train as one of several processes, with all output in a file."""
    gc.freeze()  # see conftest.py
    os.environ.update(env)
    if "FSDP_VERSION" in env:
        shard_on_a_cpu()
    if AS_GRAPHS.keys() <= env.keys():
        compute_as_graphs_do()
    with open(output, "w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        from qlora_helpers.training import launched

        try:
            launched.train(folder, params)
        except UserError as error:
            print(error)
            os._exit(2)


def shard_on_a_cpu():
    """Let accelerate use FSDP, which it does on GPUs only; torch does it anywhere."""
    from accelerate import DistributedType, PartialState

    real = PartialState.__init__

    def as_if_on_gpus(self, *args, **kwargs):
        real(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_if_on_gpus


def compute_as_graphs_do():
    """Take the passes that graphs record, which run anywhere, without recording them."""
    from qlora_helpers.training import cuda_graphs, paths

    def choose(model, device, backward, wanted, rows, lengths, passes):
        step = cuda_graphs.GraphStep(cuda_graphs.Passes(model, device, backward), rows)
        step.full = True
        for parameter in step.trained:  # as if the processes had begun with other random numbers
            parameter.data += distributed.rank()
        return step, paths.Choice("graphs", "in a test")

    paths.choose = choose


@pytest.fixture(scope="module")
def params(config):
    """17 rows in passes of 2 and steps of 6, so that the last step has 5 rows and its last pass 1."""
    own = config.params | {"n_samples": 17, "batch_size": 2, "gradient_accumulation": 3, "epochs": 2, "dropout": 0.0}
    return own | {"n_answers": 2}


@pytest.fixture
def train(params, tmp_path):
    """Function that trains into a folder of `tmp_path`, and returns the run and the output of each process."""

    def run_it(name, processes, code=0, more=(), **changes):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        started = []
        for rank in range(processes):
            env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            env |= {
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "OMP_NUM_THREADS": "1",
                **dict(more),
            }
            output = tmp_path / f"{name}-{rank}.txt"
            process = SERVER.Process(
                target=work, args=(env if processes > 1 else dict(more), str(tmp_path / name), params | changes, output)
            )
            process.start()
            started.append((process, output))
        for process, _ in started:
            process.join(120)
        words = [output.read_text() for _, output in started]
        assert [process.exitcode for process, _ in started] == [code] * processes, words
        return RunFolder(tmp_path / name), words

    return run_it


def options(params):
    for name, value in params.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            yield flag if value else f"--no-{flag[2:]}"
        else:
            yield from (flag, str(value))


def values(run, key):
    return [line[key] for line in run.log() if key in line]


def test_two_processes_train_as_the_command_does_alone_and_the_first_writes(train, params, tmp_path, capsys):
    one = RunFolder(tmp_path / "one")
    assert main(["train", "--out", str(one.path), *options(params)]) == 0
    assert "What training won back: one is" in capsys.readouterr().out
    two, words = train("two", 2)
    assert len(values(one, "loss")) == 6
    for key in ("loss", "eval_loss", "grad_norm"):
        assert values(two, key) == pytest.approx(values(one, key), abs=NEAR)
    tokens = [values(run, "num_input_tokens_seen")[-1] for run in (one, two)]
    assert 0 <= tokens[1] - tokens[0] <= 4  # a process without a row has two tokens in each epoch
    assert [run.read("manifest.json")["processes"] for run in (one, two)] == [1, 2]
    assert one.identity() == two.identity()
    names = [{path.name for path in run.path.rglob("*") if "rng_state" not in path.name} for run in (one, two)]
    assert names[0] == names[1]
    assert "step 6 of 6" in words[0]
    assert words[1] == ""


def test_gradients_of_graphs_are_exchanged_after_the_backward_pass(train):
    """The same steps as by one process on the library's path, from weights that are equal in both processes."""
    one, _ = train("one", 1)
    two, _ = train("two", 2, more=AS_GRAPHS)
    for key in ("loss", "eval_loss"):
        assert values(two, key) == pytest.approx(values(one, key), abs=NEAR)
    assert values(two, "num_input_tokens_seen")[-1] == values(one, "num_input_tokens_seen")[-1]
    assert two.read("manifest.json")["training_path"]["path"] == "graphs"
    first, second = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, two))
    assert max((first[name] - second[name]).abs().max() for name in first) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_with_the_same_or_another_number_of_processes(train, first, then):
    whole, _ = train("whole", 1)
    half, _ = train("half", first)
    for name in ("metrics.json", "checkpoints/checkpoint-6/complete.json", "checkpoints/checkpoint-4/complete.json"):
        (half / name).unlink()
    half, words = train("half", then)
    assert "Resuming from checkpoint-2." in words[0]
    assert values(half, "loss") == pytest.approx(values(whole, "loss"), abs=NEAR)
    assert half.read("manifest.json")["processes"] == then


@pytest.mark.slow
def test_sharded_weights_train_as_whole_ones_and_go_on(train):
    """FSDP shards the packed 4-bit weights, too."""
    whole, _ = train("whole", 1)
    sharded, _ = train("sharded", 2, more=FSDP)
    first, second = (load_file(run.adapter / "adapter_model.safetensors") for run in (whole, sharded))
    assert values(sharded, "loss") == pytest.approx(values(whole, "loss"), abs=NEAR)
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max() for name in first) < 1e-4
    for name in ("metrics.json", "checkpoints/checkpoint-6/complete.json"):
        (sharded / name).unlink()
    _, words = train("sharded", 2, more=FSDP)
    assert "Resuming from checkpoint-4." in words[0]
    assert values(sharded, "loss") == pytest.approx(values(whole, "loss"), abs=NEAR)
    (sharded / "metrics.json").unlink()
    _, words = train("sharded", 1, code=2)
    assert "was saved with FSDP. Fix: continue with it" in words[0]


@pytest.mark.slow
def test_both_processes_stop_early_at_the_same_step_and_keep_the_best(train):
    early = {"epochs": 8, "learning_rate": 0.3, "eval_steps": 1, "early_stopping_patience": 2, "keep_best": True}
    early |= {"n_selection": 4}
    one, _ = train("one", 1, **early)
    two, _ = train("two", 2, **early)
    assert one.read("metrics.json")["steps"] == two.read("metrics.json")["steps"] < 24
    assert two.read("metrics.json")["eval_loss"] == pytest.approx(one.read("metrics.json")["eval_loss"], abs=1e-3)


@pytest.mark.slow
def test_runs_of_one_and_of_two_processes_are_compared(train, tmp_path, capsys):
    runs = [train(name, number, seed=number)[0] for name, number in (("one", 1), ("two", 2))]
    assert main(["compare", *(str(run.path) for run in runs), "--out", str(tmp_path / "compared")]) == 0
    assert "Report:" in capsys.readouterr().out


@pytest.mark.slow
def test_a_batch_that_the_processes_cannot_share_is_refused_in_one_line(train):
    _, words = train("run", 2, code=2, gradient_accumulation=1, batch_size=3)
    assert words[0].startswith("batch_size: 3 rows per step cannot be divided between 2 processes")
    assert [text.count("\n") for text in words] == [1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_goes_on(params, tmp_path, killed):
    """As with `accelerate launch`, whose torchrun ends the other processes."""
    import psutil

    run = RunFolder(tmp_path / "run")
    words = ["-m", "qlora_helpers", "train", "--out", str(run.path), *options(params | {"epochs": 40})]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    with open(tmp_path / "output", "w") as file:
        launcher = subprocess.Popen([*LAUNCH, "--main_process_port", port, *words], stdout=file, stderr=file, env=env)
    while not list(run.path.glob("checkpoints/*/complete.json")):
        assert launcher.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.1)
    process = next(p for p in psutil.Process(launcher.pid).children() if p.environ().get("RANK") == str(killed))
    process.send_signal(signal.SIGKILL)
    began = time.monotonic()
    assert launcher.wait(60) != 0
    assert time.monotonic() - began < 60
    text = (tmp_path / "output").read_text()
    assert text.count("error: training: another of the 2 processes has ended") == 1, text
    run_again = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=300)
    assert run_again.returncode == 0, run_again.stderr
    assert "Resuming from checkpoint-" in run_again.stdout


@given(st.integers(1, 32), st.integers(1, 16), st.integers(1, 8))
def test_processes_share_every_step_equally_or_refuse(config, batch, passes, processes):
    own = config.replace(batch_size=batch, gradient_accumulation=passes)
    with environment(0, processes):
        if own.effective_batch % processes:
            with pytest.raises(UserError, match=f"between {processes} processes. Fix: "):
                libraries.for_all_processes(own)
            return
        spread = libraries.for_all_processes(own)
        assert spread.identity == own.identity
        assert spread.batch_size % processes == 0
        assert libraries.of_one_process(spread).batch_size <= own.batch_size


@contextlib.contextmanager
def environment(rank, processes):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", processes)):
            patch.setenv(name, str(value))
        yield patch


@given(st.integers(1, 9), st.integers(2, 4))
def test_every_row_of_a_batch_is_in_one_process(rows, processes):
    features = [{"input_ids": [row, row, row], "labels": [row, row, row]} for row in range(rows)]
    seen, trained = [], 0
    for rank in range(processes):
        with environment(rank, processes):
            batch = batches.Share(lambda own: own)(features)
        assert batch  # every process takes part
        seen += [row["input_ids"][0] for row in batch if row["labels"][1] != IGNORE]
        trained += sum(label != IGNORE for row in batch for label in row["labels"])
    assert sorted(seen) == list(range(rows))
    assert trained == 3 * rows


@pytest.mark.parametrize(("visible", "own"), [(None, "1"), ("2,5", "5"), ("GPU-a,GPU-b", "GPU-b"), ("3", "")])
def test_a_process_sees_its_own_gpu_only(visible, own):
    with environment(1, 2) as patch:
        patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            patch.setenv("CUDA_VISIBLE_DEVICES", visible)
        distributed._hide_other_gpus()
        assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["LOCAL_RANK"]) == (own, "0")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # restored by the context


def test_out_of_memory_in_one_process_is_one_line_and_no_second_try(config, device, tmp_path):
    with environment(0, 2), pytest.raises(UserError, match="the GPU ran out"):
        oom.shrink(config.replace(on_oom="shrink"), device, RunFolder(tmp_path), 1.0)


def test_the_config_files_are_accelerates_and_the_help_says_where_they_are(capsys):
    files = sorted(distributed.CONFIGS.glob("*.yaml"))
    assert len(files) == 3
    assert all(load_config_from_file(str(file)).num_processes == 2 for file in files)
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert all(file.name in shown for file in files)
    assert "".join(str(distributed.CONFIGS).split()) in shown


def test_one_process_with_several_gpus_names_the_command_that_uses_all(device, config, tmp_path, capsys):
    arguments = libraries.learning_arguments(config, 16, device)
    arguments._n_gpu = 2
    assert libraries._on_one_gpu(arguments).n_gpu == 1
    assert "accelerate launch --config_file" in capsys.readouterr().out
