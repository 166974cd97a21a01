"""The memory plan for several GPUs: against shards that torch makes, a published run, and counts made by hand."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_helpers.__main__ import main
from qlora_helpers.config import Config
from qlora_helpers.errors import UserError
from qlora_helpers.files import ROOT
from qlora_helpers.planning import memory, plan, sharding
from qlora_helpers.planning.workload import ALONE, Parallel

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import scale

LLAMA_70B = ["plan", "--model", "llama2-70b", "--targets", "all", "--checkpointing", "--optimizer", "adamw_8bit"]
LLAMA_70B += ["--batch", "1", "--accumulation", "2", "--max-length", "512", "--heldout-max-length", "512"]


def _sizes(parameters):
    """Bytes of 4-bit weights, adapters and everything else."""
    sizes = {"packed": 0, "adapter": 0, "rest": 0}
    for name, parameter in parameters:
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        kind = "adapter" if "lora_" in name else "packed" if "proj" in name else "rest"
        sizes[kind] += own.numel() * own.element_size()
    return sizes


@pytest.fixture
def two_gpus():
    """A mesh of two processes of which this is the first. The backend is torch's own fake, which sends nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield dist.init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_shards_are_those_that_torch_makes(model_folder, two_gpus):
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    storage = torch.bfloat16  # FSDP shards floats only
    quantized = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_quant_storage=storage
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, quantization_config=quantized, dtype=storage, device_map={"": "cpu"}
    )
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    base = model.get_base_model()
    layer = base.model.layers[0]
    constants = [m.quant_state for m in layer.modules() if hasattr(m, "quant_state")]
    for unit in (*base.model.layers, base.model.embed_tokens):
        fully_shard(unit, mesh=two_gpus)
    fully_shard([base.model.norm, base.lm_head], mesh=two_gpus, reshard_after_forward=False)
    fully_shard(model, mesh=two_gpus)

    config = Config.from_params(profile="cpu", model=str(model_folder), rank=4, target_modules="all-linear")
    load = memory.workload_of(config, "qlora", Parallel(2, "fsdp"))
    parts = memory.static_parts(load)
    sizes = _sizes(model.named_parameters())
    assert sizes == {
        "packed": parts["frozen weights"],
        "adapter": parts["adapters"],
        "rest": parts["embeddings, head, norms"],
    }
    # The constants are no parameters and stay as they were, on every GPU.
    assert constants == [m.quant_state for m in layer.modules() if hasattr(m, "quant_state")]
    assert parts[sharding.REPLICATED] == memory.static_parts(memory.workload_of(config))[sharding.REPLICATED]
    layer.unshard()
    one, two = (sharding.gathered(load, layers=layers, head=False)["gathered weights"] for layers in (1, 2))
    assert sum(_sizes(layer.named_parameters()).values()) == two - one


def test_llama_2_70b_by_hand():
    """80 layers of width 8,192: queries and output, keys and values of 8 heads of 128, and three layers of the MLP."""
    attention, mlp = 2 * 8192 * 8192 + 2 * 8192 * 1024, 3 * 8192 * 28672
    config = scale.of_answer_ai("llama2-70b", 2).replace(rank=16, target_modules="q_proj")
    load = memory.workload_of(config, None, Parallel(2, "fsdp"))
    parts = memory.training_parts(load)
    adapter = 16 * (8192 + 8192)
    assert parts["frozen weights"] == 80 * (attention + mlp) / 2 / 2
    assert parts["quantization constants"] == 80 * (attention + mlp) / 64 * (1 + 4 / 256)
    assert parts["embeddings, head, norms"] == 2 * (2 * 32000 * 8192 + 161 * 8192) / 2
    assert parts["adapters"] == 4 * 80 * adapter / 2
    assert parts["optimizer states"] == 8 * 80 * adapter / 2
    assert parts["gradients"] == 4 * 80 * adapter / 2 + 2 * 4 * adapter
    layer, head = (attention + mlp) / 2 + 2 * 2 * 8192 + 4 * adapter, 2 * 32000 * 8192
    assert parts["gathered weights"] == 2 * layer + head  # the head is freed, but not the buffer that gathered it
    assert sharding.gathered(load, 1, head=True)["gathered weights"] == layer + 2 * head


@pytest.mark.parametrize(
    ("gpus", "gib", "strategy", "rows"),
    [
        (2, 24, "fsdp-offload", 2),
        (4, 24, "fsdp", 1),
        (8, 24, "fsdp", 1),
        (2, 48, "fsdp", 2),
        (4, 48, "fsdp", 3),
        (2, 40, "fsdp", 1),
        (4, 40, "fsdp", 4),
        (8, 40, "fsdp", 4),
        (4, 80, "fsdp", 8),
    ],
)
def test_what_others_trained_fits(gpus, gib, strategy, rows):
    """The table of hardware for Llama 2 70B in Answer.AI's benchmarks."""
    result = plan.plan_memory(scale.of_answer_ai("llama2-70b", rows * gpus), gib, parallel=Parallel(gpus, strategy))
    assert sum(result.training.values()) + result.context <= gib


@pytest.mark.parametrize(("model", "strategy", "rows", "tokens", "gib"), scale.PUBLISHED)
def test_published_peaks_are_near_the_plan(model, strategy, rows, tokens, gib):
    """Theirs are higher by up to 2 GiB: their FSDP gathers the embeddings too, and loading left gaps."""
    planned = plan.plan_memory(scale.of_answer_ai(model, 2 * rows, tokens), parallel=Parallel(2, strategy))
    assert gib - 2 < sum(planned.training.values()) < 1.02 * gib


def test_measured_peaks_are_near_the_plan():
    runs = json.loads((ROOT / "results" / "two-gpus" / "scale.json").read_text("utf-8"))["runs"]
    assert {run["strategy"] for run in runs if run["gpus"] == 2} == {"ddp", "fsdp", "fsdp-offload"}
    for run in runs:
        parallel = ALONE if run["gpus"] == 1 else Parallel(run["gpus"], run["strategy"])
        settings = scale.settings_of(run["model"], Path(run["model"]), Path("rows.jsonl"), parallel, run["fast"])
        config = Config.from_params(**settings).replace(model=run["model"])
        load = replace(memory.workload_of(config, None, parallel), path=run["path"])
        planned = sum(memory.training_parts(load).values()) / memory.GIB
        assert planned == pytest.approx(run["planned_gib"])
        assert planned == pytest.approx(run["peak_gib"], rel=0.1)


SETTINGS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["tinyllama-1.1b", "llama31-8b", "bloom-560m"]),
        "quantization": st.sampled_from(["nf4", "none"]),
        "max_length": st.integers(8, 1024),
        "batch_size": st.integers(1, 8),
        "gradient_accumulation": st.integers(1, 8),
        "gradient_checkpointing": st.booleans(),
        "optimizer": st.sampled_from(["adamw_torch", "adamw_8bit", "paged_adamw_8bit"]),
    }
)


@given(SETTINGS, st.integers(2, 64))
def test_ddp_adds_the_buckets_and_fsdp_divides(settings, gpus):
    config = Config.from_params(profile="gpu", target_modules="all-linear", **settings)
    wider = config.replace(gradient_accumulation=config.gradient_accumulation * gpus)
    alone = memory.workload_of(config)
    ddp, fsdp, offload = (
        memory.workload_of(wider, None, Parallel(gpus, name)) for name in ("ddp", "fsdp", "fsdp-offload")
    )
    assert ddp.config == config
    bucketed = sum(memory.training_parts(ddp).values()) - sum(memory.training_parts(alone).values())
    assert bucketed == pytest.approx(4 * memory.trained_parameters(alone))
    whole, shard = memory.static_parts(alone), memory.static_parts(fsdp)
    constants = shard.pop(sharding.REPLICATED)
    assert constants == whole.pop(sharding.REPLICATED)
    assert gpus * sum(shard.values()) == pytest.approx(sum(whole.values()))
    for load in (fsdp, offload):  # one process evaluates alone, with the whole model
        assert memory.evaluation_parts(load)["gathered weights"] == pytest.approx(sum(whole.values()))
    in_ram = memory.offloaded(offload)
    assert in_ram > sum(whole.values())
    assert sum(memory.static_parts(offload).values()) == constants
    assert sum(memory.training_parts(offload).values()) <= sum(memory.training_parts(fsdp).values())
    more = memory.workload_of(
        wider.replace(gradient_accumulation=2 * wider.gradient_accumulation), None, Parallel(2 * gpus, "fsdp")
    )
    assert sum(memory.training_parts(more).values()) < sum(memory.training_parts(fsdp).values())


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64))
def test_the_shares_make_up_the_batch(batch, accumulation, gpus):
    config = Config.from_params(profile="gpu", batch_size=batch, gradient_accumulation=accumulation)
    if batch * accumulation % gpus:
        with pytest.raises(UserError, match="cannot share"):
            Parallel(gpus).share(config)
        return
    share = Parallel(gpus).share(config)
    assert gpus * share.effective_batch == config.effective_batch
    assert share.batch_size == batch or share.gradient_accumulation == accumulation // _common(accumulation, gpus)


def _common(first, second):
    return max(n for n in range(1, 65) if first % n == second % n == 0)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--gpus", "2", "--strategy", "fsdp"], 3, "GiB of 48.00 on each of 2 GPUs, fsdp"),
        (["--gpus", "2", "--strategy", "fsdp-offload"], 0, "of the computer's memory"),
        (["--gpus", "2"], 0, "fits: 39.07 GiB of 48.00 on each of 2 GPUs, ddp\n"),
        (["--gpus", "2"], 0, "on 2 GPUs, each a GPU of 48 GiB, without communication"),
        (["--dropout", "0"], 0, "GiB of 48.00; with CUDA graphs "),
        (["--gpus", "3"], 2, "gpus: 3 GPUs cannot share an effective batch of 2 rows equally. Fix: "),
        (["--gpus", "0"], 2, "gpus: 0 is too small. Fix: use 1 or more."),
        (["--gpus", "2", "--strategy", "fdsp"], 2, "unknown strategy 'fdsp'. Did you mean 'fsdp'?"),
    ],
)
def test_the_command_with_several_gpus(capsys, words, code, message):
    assert main([*LLAMA_70B, "--memory", "48", *words]) == code
    seen = capsys.readouterr()
    assert message in (seen.err if code == 2 else seen.out)


def test_without_a_device_the_command_names_gpus_of_which_several_are_enough(capsys):
    assert main([*LLAMA_70B, "--gpus", "2", "--strategy", "fsdp"]) == 0
    assert "\nFits on, 2 of them: a100-80, h100." in capsys.readouterr().out


def test_json_names_the_gpus_the_strategy_and_the_computers_memory(capsys):
    assert main([*LLAMA_70B, "--gpus", "2", "--strategy", "fsdp-offload", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["gpus"], result["strategy"]) == (2, "fsdp-offload")
    assert 32 < result["ram"] < 40
    assert result["training"]["gathered weights"] > 0.7


def test_advice_for_several_gpus_saves_what_it_says():
    config = Config.preset("llama31-8b", batch_size=12, gradient_accumulation=1)
    before = plan.plan_memory(config, "t4", parallel=Parallel(2, "fsdp"))
    assert not before.fits
    assert before.advice
    for item in before.advice:
        after = plan.plan_memory(config.replace(**item.settings), "t4", parallel=Parallel(2, "fsdp"))
        assert before.total - after.total == pytest.approx(item.saves_gib)
