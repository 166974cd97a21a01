"""Repeat four claims of a published report, about fine-tuning at all, model size, biases and rank.

usage: python benchmarks/claims.py DATASET --out DIR [--model FOLDER] [--rows 100] [--seeds 2] [--profile gpu]

The report used BLOOM-560M and BLOOM-7B1 with alpha 20 for 3 epochs. This benchmark uses one small Llama-like model and
derives two others from it:

- *with biases*: zero biases are added to its linear layers. It answers exactly like the original, which has no biases.
- *smaller*: the three blocks that matter least on training rows are removed. This raises the loss; training recovers
  some of it.

Finished runs are reused, so the benchmark can be stopped and restarted. All arms get a first seed before a second one.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qlora_helpers import files, runs
from qlora_helpers.config import BUNDLED_MODEL, PROFILES, Config
from qlora_helpers.data import cleaning
from qlora_helpers.device import detect
from qlora_helpers.evaluation import differences, losses
from qlora_helpers.evaluation.differences import UNSURE, Arm, Difference
from qlora_helpers.evaluation.row_losses import BASE, mean_loss, read_losses
from qlora_helpers.experiments import matrix
from qlora_helpers.models import hub

LEFT_OUT = 3  # blocks removed from the smaller model
LOOKED_AT = 8  # training rows on which blocks are removed in turn
RANK_14, RANK_20, LORA_ONLY, ALL = "rank 14", "rank 20", "bias lora_only", "bias all"
BAD, SMALL = "50 times the learning rate", "smaller, all layers trained"
# claim, the two arms to compare, and the verdict on the second arm if the claim holds
CLAIMS = (
    ("a fine-tune is worse than its base model", BASE, RANK_14, "worse"),
    ("a badly configured fine-tune is worse than its base model", BASE, BAD, "worse"),
    ("a smaller model beats a larger one", RANK_14, SMALL, "better"),
    ("a smaller model beats a badly configured larger one", BAD, SMALL, "better"),
    ("training the adapted layers' biases helps", RANK_14, LORA_ONLY, "better"),
    ("training all biases helps", RANK_14, ALL, "better"),
    ("rank 20 is better than rank 14", RANK_14, RANK_20, "better"),
)


def with_biases(original: Any, tokenizer: Any, folder: Path) -> Path:
    """Save the model with zero biases in every linear layer to `folder`."""
    shape = original.config.__class__(**original.config.to_dict() | {"attention_bias": True, "mlp_bias": True})
    return _save(shape, original.state_dict(), tokenizer, folder)


def smaller(original: Any, examples: list[Any], tokenizer: Any, folder: Path) -> Path:
    """Save the model to `folder` without the blocks whose removal, one at a time, raises the loss least."""
    blocks, device, costs = original.model.layers, detect("bfloat16"), []
    for left_out in range(len(blocks)):
        original.model.layers = torch.nn.ModuleList([b for n, b in enumerate(blocks) if n != left_out])
        costs.append(mean_loss(losses.heldout_losses(original, examples, device)))
    original.model.layers = blocks
    kept = sorted(sorted(range(len(blocks)), key=costs.__getitem__)[LEFT_OUT:])
    print(f"smaller: {len(kept)} of {len(blocks)} blocks; removed: {sorted({*range(len(blocks))} - {*kept})}")
    weights = {}
    for name, weight in original.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            if int(parts[2]) not in kept:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        weights[".".join(parts)] = weight
    shape = original.config.__class__(**original.config.to_dict() | {"num_hidden_layers": len(kept)})
    return _save(shape, weights, tokenizer, folder)


def _save(shape: Any, weights: dict[str, Any], tokenizer: Any, folder: Path) -> Path:
    made = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    missing, unknown = made.load_state_dict(weights, strict=False)
    assert not unknown, unknown
    assert all(name.endswith(".bias") for name in missing), missing
    for name in missing:
        made.get_parameter(name).data.zero_()
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def models(config: Config, folder: Path) -> tuple[Path, Path]:
    """Return the folders of the two derived models. They are created if they do not exist."""
    full, small = folder / "models" / "with-biases", folder / "models" / "smaller"
    if not (small / "tokenizer_config.json").exists():  # written last
        tokenizer = hub.load_tokenizer(config)
        original = hub.from_pretrained(AutoModelForCausalLM, config, dtype=torch.bfloat16).eval()
        biases = sum(p.numel() for name, p in original.named_parameters() if name.endswith("bias"))
        same = "other" if biases else "the same"
        print(f"{config.model} has {biases} biases: unmodified, bias=none, lora_only and all train {same} weights.")
        with_biases(original, tokenizer, full)
        examples = cleaning.prepare(config.replace(n_samples=LOOKED_AT), tokenizer).train
        smaller(original.to(detect().kind), examples, tokenizer, small)
    return full, small


def arms(config: Config, full: Path, small: Path) -> dict[str, Config]:
    """Return the config of each arm: the report's recipe and one change."""
    recipe = config.replace(model=str(full), revision="main", rank=14)
    return {
        RANK_14: recipe,
        RANK_20: recipe.replace(rank=20),
        LORA_ONLY: recipe.replace(bias="lora_only"),
        ALL: recipe.replace(bias="all"),
        BAD: recipe.replace(learning_rate=50 * recipe.learning_rate),
        SMALL: recipe.replace(model=str(small), target_modules=["all-linear"], learning_rate=1e-3),
    }


def judge(trained: dict[str, list[runs.RunFolder]], folder: Path) -> list[tuple[str, Difference, str]]:
    """Return each claim with its difference in loss and the verdict of the interval.

    The models share a tokenizer, so losses per token are comparable, and truncated rows count too.
    """
    base = runs.RunFolder(folder / trained[RANK_14][0].read("manifest.json")["baseline"])
    sides = {name: Arm(name, [read_losses(run) for run in group]) for name, group in trained.items()}
    sides[BASE] = Arm(BASE, [read_losses(base)], trained=False)
    words = {"better": "confirmed here", "worse": "contradicted here", UNSURE: UNSURE}
    judged = []
    for claim, a, b, expected in CLAIMS:
        gap = differences.difference(sides[a], sides[b])
        turned = {"better": "worse", "worse": "better"} if expected == "worse" else {}
        judged.append((claim, gap, words[turned.get(gap.verdict, gap.verdict)]))
    return judged


def main() -> None:
    """Train missing runs, then print and save the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=BUNDLED_MODEL)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--profile", default="gpu", choices=PROFILES)
    args = parser.parse_args()
    folder = runs.workdir(str(args.out))
    config = Config.from_params(
        preset="tinyllama-guanaco-100", profile=args.profile, model=args.model, dataset=args.dataset
    )
    config = config.replace(n_samples=args.rows, alpha=20, epochs=3, n_seeds=args.seeds, equal_steps=False)
    config = config.replace(n_answers=2, max_new_tokens=16)  # only losses are compared
    needed = matrix.plan_runs(arms(config, *models(config, folder)), folder)
    trained = matrix.train_missing(sorted(needed, key=lambda item: item.config.seed))
    lines = ["| arm | trained weights | held-out loss, by seed |", "|---|---|---|"]
    for name, group in trained.items():
        metrics = [run.read("metrics.json") for run in group]
        losses = ", ".join(f"{m['eval_loss']:.4f}" for m in metrics)
        lines.append(f"| {name} | {metrics[0]['trainable_parameters']:,} | {losses} |")
    lines += ["", "| claim | measured | verdict |", "|---|---|---|"]
    judged = judge(trained, folder)
    lines += [f"| {claim} | {gap} | {word} |" for claim, gap, word in judged]
    files.write_text(folder / "claims.md", "\n".join(lines) + "\n")
    files.write_json(
        folder / "claims.json", [{"claim": c, **gap.to_dict(), "claim_is": word} for c, gap, word in judged]
    )
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
