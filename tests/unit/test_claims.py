"""The two derived models of the claims benchmark, and its verdicts, which follow from the intervals."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_helpers import files
from qlora_helpers.data import cleaning
from qlora_helpers.device import detect
from qlora_helpers.evaluation import losses
from qlora_helpers.evaluation.row_losses import BASE, mean_loss
from qlora_helpers.files import ROOT
from qlora_helpers.models import qlora
from qlora_helpers.runs import RunFolder

spec = importlib.util.spec_from_file_location("claims", ROOT / "benchmarks" / "claims.py")
claims = importlib.util.module_from_spec(spec)
spec.loader.exec_module(claims)


@pytest.fixture
def original(model_folder):
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).eval()


def logits(built):
    with torch.inference_mode():
        return built(input_ids=torch.arange(40)[None]).logits


def test_zero_biases_keep_the_logits_and_can_be_trained(original, tokenizer, config, device, tmp_path):
    folder = claims.with_biases(original, tokenizer, tmp_path / "made")
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert torch.equal(logits(made), logits(original))
    own = config.replace(model=str(folder))
    # Biases per block: q 64, k 32, v 32, o 64, gate 128, up 128, down 64. There are two blocks; q and v are adapted.
    for bias, count in (("none", 0), ("lora_only", 2 * (64 + 32)), ("all", 2 * 512)):
        built = qlora.attach_lora(qlora.load_base(own, device), own.replace(bias=bias))
        trained = {n: p for n, p in built.named_parameters() if p.requires_grad and n.endswith("bias")}
        assert sum(p.numel() for p in trained.values()) == count
        ids = torch.arange(40)[None]
        logits(built.eval())  # an evaluation before the step
        built.train()(input_ids=ids, labels=ids).loss.backward()
        # A bias of k has no gradient: it shifts all attention scores alike, and softmax ignores that.
        assert all(p.grad.abs().sum() > 0 for n, p in trained.items() if "k_proj" not in n)


@pytest.mark.parametrize("turned", [False, True])
def test_smaller_model_lacks_the_block_that_matters_least(original, tokenizer, config, tmp_path, monkeypatch, turned):
    """It equals a model cut by hand, whichever of the two blocks is removed; the original is not changed."""
    monkeypatch.setattr(claims, "LEFT_OUT", 1)
    examples = cleaning.prepare(config.replace(n_samples=4), tokenizer).train
    blocks = torch.nn.ModuleList(list(original.model.layers)[:: -1 if turned else 1])
    for number, block in enumerate(blocks):
        block.self_attn.layer_idx = number
    original.model.layers = blocks
    unchanged, by_hand = logits(original), {}
    for block in blocks:
        original.model.layers = torch.nn.ModuleList([block])
        rows = losses.heldout_losses(original, examples, detect("bfloat16"))
        by_hand[mean_loss(rows)] = logits(original)
    original.model.layers = blocks
    folder = claims.smaller(original, examples, tokenizer, tmp_path)
    made = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert torch.equal(logits(made), by_hand[min(by_hand)])
    assert not torch.equal(logits(made), by_hand[max(by_hand)])
    assert torch.equal(logits(original), unchanged)


def test_claims_are_judged_by_their_intervals(tmp_path):
    """The losses of every arm are those of the base model plus a constant shift and noise."""
    shifts = {
        claims.RANK_14: -0.3, claims.RANK_20: -0.3, claims.LORA_ONLY: -0.2, claims.ALL: -0.4, claims.BAD: 0.5,
        claims.SMALL: 0.1, BASE: 0.0,
    }  # fmt: skip
    trained = {}
    for number, (name, shift) in enumerate(shifts.items()):
        run = RunFolder(tmp_path / ("base" if name == BASE else str(number)))
        noise = [0.02 * (-1) ** (row // (number % 3 + 1)) for row in range(12)]
        rows = [
            {"id": str(i), "loss_sum": 10 * (2 + shift + n), "tokens": 10, "bytes": 40} for i, n in enumerate(noise)
        ]
        files.write_jsonl(run / "heldout_losses.jsonl", rows)
        files.write_json(run / "manifest.json", {"baseline": "base"})
        if name != BASE:
            trained[name] = [run]
    judged = claims.judge(trained, tmp_path)
    assert [claim for claim, _, _ in judged] == [claim for claim, *_ in claims.CLAIMS]
    assert [word for _, _, word in judged] == [
        "contradicted here", "confirmed here", "contradicted here", "confirmed here", "contradicted here",
        "confirmed here", "not distinguishable",
    ]  # fmt: skip


def test_recorded_verdicts_follow_from_the_recorded_losses():
    folder = ROOT / "results" / "h100-claims"
    arms = (claims.RANK_14, claims.RANK_20, claims.LORA_ONLY, claims.ALL, claims.BAD, claims.SMALL)
    slugs = {name: name.replace(",", "").replace(" ", "-") for name in arms}
    trained = {name: [RunFolder(folder / f"{slug}{seed}") for seed in ("", "-seed1")] for name, slug in slugs.items()}
    judged = [{"claim": c, **gap.to_dict(), "claim_is": word} for c, gap, word in claims.judge(trained, folder)]
    recorded = json.loads((folder / "claims.json").read_text("utf-8"))
    assert [line["text"] for line in judged] == [line["text"] for line in recorded]
    assert [line["claim_is"] for line in judged] == [line["claim_is"] for line in recorded]
