"""Train the same config with one process and with two, kill one of two, and go on from the last checkpoint.

usage: python benchmarks/resume.py TOKENIZER_FOLDER ROWS.jsonl --out FILE [--seeds 4]

Four layers of TinyLlama's shape with random weights, 40 steps of 16 rows. Held-out losses of one process with several
seeds, of two processes with the first two seeds, and of a run whose second process is killed after the checkpoint of
step 20: continued with two processes and with one. Needs two GPUs.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import scale

from qlora_helpers import files
from qlora_helpers.planning import architectures
from qlora_helpers.planning.workload import ALONE, Parallel

LAYERS, TWO = 4, Parallel(2)
KILL_AFTER = "checkpoint-20"
SECONDS = 120.0
SETTINGS: dict[str, Any] = scale.SETTINGS | {
    "batch_size": 16, "n_samples": 160, "epochs": 4, "save_steps": 10, "max_length": 256, "n_heldout": 64,
    "gradient_checkpointing": False, "learning_rate": 1e-3,
}  # fmt: skip


def begin(folder: Path, parallel: Parallel, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start a run, with what it prints in a file beside its folder."""
    with Path(f"{folder}.log").open("ab") as log:
        return subprocess.Popen(scale.command(settings, parallel, folder), stdout=log, stderr=log)


def finished(run: subprocess.Popen[bytes], folder: Path) -> dict[str, Any]:
    """Wait for a run; returns its held-out loss, path and the hash of its adapter, or the end of what it printed."""
    if run.wait(SECONDS):
        return {"run": folder.name, "failed": Path(f"{folder}.log").read_text("utf-8")[-500:]}
    metrics, manifest = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("metrics", "manifest"))
    (adapter,) = folder.glob("adapter/adapter_model.safetensors")
    return {
        "run": folder.name,
        "steps": metrics["steps"],
        "path": manifest["training_path"]["path"],
        "eval_loss": metrics["eval_loss"],
        "adapter": files.sha256(adapter)[:12],
        "device": manifest["device"]["name"],
    }


def kill_second(run: subprocess.Popen[bytes], folder: Path) -> float:
    """Kill process 1 of a run after its checkpoint; returns the seconds until the launcher has ended."""
    limit = time.monotonic() + SECONDS
    while not (folder / "checkpoints" / KILL_AFTER / "complete.json").exists():
        if run.poll() is not None or time.monotonic() > limit:
            raise SystemExit(f"{folder.name}: no {KILL_AFTER} to kill it after; see {folder}.log")
        time.sleep(0.05)
    (second,) = (p for p in psutil.Process(run.pid).children(recursive=True) if p.environ().get("RANK") == "1")
    second.send_signal(signal.SIGKILL)
    began = time.monotonic()
    run.wait(SECONDS)
    return time.monotonic() - began


def measure(model: Path, rows: Path, folder: Path, seeds: int) -> list[dict[str, Any]]:
    """Return what each run gave."""
    settings = SETTINGS | {"model": str(model), "dataset": str(rows.resolve())}
    results = []
    for parallel, numbers in ((ALONE, range(seeds)), (TWO, range(2))):
        for seed in numbers:
            out = folder / f"{parallel.gpus}-seed-{seed}"
            results.append(finished(begin(out, parallel, settings | {"seed": seed}), out))
            print(json.dumps(results[-1]), flush=True)
    killed, copied = folder / "killed-then-2", folder / "killed-then-1"
    results.append({"run": "killed", "seconds": kill_second(begin(killed, TWO, settings), killed)})
    shutil.copytree(killed, copied)
    for out, parallel in ((killed, TWO), (copied, ALONE)):
        results.append(finished(begin(out, parallel, settings), out))
        print(json.dumps(results[-1]), flush=True)
    return results


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as folder:
        model, known = Path(folder) / "model", architectures.known("tinyllama-1.1b") or {}
        scale.write_model(known | {"num_hidden_layers": LAYERS}, model, args.tokenizer)
        files.write_json(args.out, {"runs": measure(model, args.rows, Path(folder), args.seeds)})


if __name__ == "__main__":
    sys.exit(main())
