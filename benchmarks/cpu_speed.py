"""Training speed on a CPU: this package and TRL's SFTTrainer on the same 4-bit base model and the same rows.

usage: python benchmarks/cpu_speed.py [--out FILE] [--rounds 3]

Each contender trains on 24 of the project's own rows, 4 at a time, truncated to 256 tokens, in a separate process; the
contenders take turns. Tokens per second count real tokens, not padding, and exclude the first step. TRL runs with
`use_cpu=True, bf16=False` and its defaults, which include gradient checkpointing; a second line turns that off. A dtype
whose matrix products are far too slow on this CPU is listed but not run.

Without dropout, the losses of this package's batches and of TRL's batches are compared step by step, both in this
package's trainer. Two controls show how much of the difference is rounding: TRL's batches with eager attention instead
of SDPA, and in float32.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from qlora_helpers import cpu_speed, device, files
from qlora_helpers.config import Config
from qlora_helpers.data import cleaning
from qlora_helpers.evaluation.context import RunContext
from qlora_helpers.models import hub, qlora
from qlora_helpers.planning import compute_dtype
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import batches

OURS, PADDED, TRL, TRL_UNCHECKPOINTED = "this package", "padded", "TRL", "TRL, no checkpointing"
EAGER, EXACT = "padded, eager attention", "padded, float32"
ROWS = 24


def setting(dtype: str, dropout: float) -> Config:
    """Config of the benchmark: SmolLM2-135M in NF4, LoRA r=16 on queries and values, 24 sample rows, 4 at a time."""
    return Config.from_params(
        profile="cpu", compute_dtype=dtype, dropout=dropout, n_samples=ROWS, eval_steps=10**6, save_steps=10**6
    )


def trainer_of(contender: str, config: Config, folder: Path) -> Any:
    """Build the trainer of one contender."""
    here, tokenizer = compute_dtype.device_for(config), hub.load_tokenizer(config)
    data = cleaning.prepare(config, tokenizer)
    if contender in (OURS, PADDED, EAGER):
        from qlora_helpers.training import trainer

        if contender != OURS:
            batches.collator = lambda *args: None  # type: ignore[assignment]
        built = qlora.attach_lora(qlora.load_base(config, here), config)
        ready = trainer.build_trainer(built, RunContext(config, data, tokenizer, here, RunFolder(folder)))
        if contender == EAGER:
            built.set_attn_implementation("eager")
        ready.evaluate = lambda *args, **kwargs: {"eval_loss": 0.0}  # type: ignore[method-assign]
        return ready
    return _trl(config, data, tokenizer, contender == TRL, folder)


def _trl(config: Config, data: Any, tokenizer: Any, checkpointing: bool, folder: Path) -> Any:
    """Build an SFTTrainer as in its documentation, on rows that are already tokenized."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    dtype = getattr(torch, config.compute_dtype)
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    base = AutoModelForCausalLM.from_pretrained(hub.model_folder(config), dtype=dtype, quantization_config=packed)
    rows = [{"input_ids": e.input_ids, "completion_mask": [int(label >= 0) for label in e.labels]} for e in data.train]
    options = {} if checkpointing else {"gradient_checkpointing": False}
    return SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(folder),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=config.batch_size,
            num_train_epochs=1,
            learning_rate=config.learning_rate,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=config.seed,
            **options,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.target_modules),
            task_type="CAUSAL_LM",
        ),
    )


def measure(contender: str, dtype: str, dropout: float) -> dict[str, Any]:
    """Train one contender and return its losses, and its tokens per second over all steps but the first."""
    from transformers import TrainerCallback

    seconds: list[float] = []

    class Timer(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_of(contender, setting(dtype, dropout), Path(scratch))
        trainer.add_callback(Timer())
        trainer.args.include_num_input_tokens_seen = "non_padding"
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    seen = [line["num_input_tokens_seen"] for line in lines]
    rate = (seen[-1] - seen[0]) / sum(seconds[1:])
    return {"tokens_per_second": rate, "losses": [line["loss"] for line in lines], "seconds": seconds}


def measure_in_subprocess(contender: str, dtype: str, dropout: float) -> dict[str, Any]:
    """Run `measure` in a fresh process, so that no contender inherits another's memory."""
    command = [sys.executable, __file__, "--contender", contender, "--dtype", dtype, "--dropout", str(dropout)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{contender}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(rounds: int) -> dict[str, Any]:
    """Measure all contenders in turn, `rounds` times."""
    here = compute_dtype.device_for(Config.from_params(profile="cpu"))
    speed = cpu_speed.lookup(*cpu_speed.USUAL_SIZE)
    best = max(speed.float32, speed.bfloat16)
    dtypes = [name for name in cpu_speed.CANDIDATES if getattr(speed, name) > best / cpu_speed.HOPELESS]
    contenders = [(OURS, here.dtype), (PADDED, here.dtype)]
    contenders += [(name, dtype) for name in (TRL, TRL_UNCHECKPOINTED) for dtype in dtypes]
    rates: dict[str, list[float]] = {f"{name}, {dtype}": [] for name, dtype in contenders}
    for number in range(rounds):
        for name, dtype in contenders:
            rate = measure_in_subprocess(name, dtype, 0.05)["tokens_per_second"]
            rates[f"{name}, {dtype}"].append(rate)
            print(f"round {number + 1} of {rounds}: {name}, {dtype}: {rate:.0f} tokens/s", flush=True)
    losses = {name: measure_in_subprocess(name, here.dtype, 0.0)["losses"] for name in (OURS, PADDED, EAGER)}
    losses[EXACT] = measure_in_subprocess(PADDED, "float32", 0.0)["losses"]
    ours = rates[f"{OURS}, {here.dtype}"]
    fastest = {name: max((rates[f"{name}, {dtype}"] for dtype in dtypes), key=statistics.median)
               for name in (TRL, TRL_UNCHECKPOINTED)}  # fmt: skip
    return {
        "device": here.to_dict(),
        "versions": device.versions(),
        "gflops": {name: getattr(speed, name) for name in cpu_speed.CANDIDATES},
        "not_run": [name for name in cpu_speed.CANDIDATES if name not in dtypes],
        "tokens_per_second": {name: statistics.median(values) for name, values in rates.items()},
        "rounds": rates,
        "times_trl": statistics.median(a / b for a, b in zip(ours, fastest[TRL], strict=True)),
        "times_trl_without_checkpointing": statistics.median(
            a / b for a, b in zip(ours, fastest[TRL_UNCHECKPOINTED], strict=True)
        ),
        "losses": losses,
        "largest_relative_difference_of_losses": _largest_difference(losses[OURS], losses[PADDED]),
        "rounding": {
            EAGER: _largest_difference(losses[EAGER], losses[PADDED]),
            **{f"{name}, from float32": _largest_difference(losses[name], losses[EXACT]) for name in (OURS, PADDED)},
        },
    }


def _largest_difference(losses: list[float], plain: list[float]) -> float:
    """Largest relative difference between the losses of a step."""
    return max(abs(a / b - 1) for a, b in zip(losses, plain, strict=True))


def main() -> None:
    """Compare all contenders; with `--contender`, measure one of them for the comparing process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contender")
    parser.add_argument("--dtype")
    parser.add_argument("--dropout", type=float)
    args = parser.parse_args()
    if args.contender:
        with contextlib.redirect_stdout(sys.stderr):
            measured = measure(args.contender, args.dtype, args.dropout)
        print(json.dumps(measured))
        return
    result = compare(args.rounds)
    for name, rate in result["tokens_per_second"].items():
        print(f"{rate:8.0f} tokens/s  {name}")
    print(f"{result['times_trl']:.2f} x TRL, {result['times_trl_without_checkpointing']:.2f} x without checkpointing;",
          f"losses within {result['largest_relative_difference_of_losses']:.1e};",
          ", ".join(f"{name} {value:.1e}" for name, value in result["rounding"].items()))  # fmt: skip
    if args.out:
        files.write_json(args.out, result)


if __name__ == "__main__":
    main()
