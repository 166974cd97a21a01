"""Merging an adapter into its 16-bit base gives the same weights as PEFT, in a folder that does not need PEFT."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from qlora_helpers import UserError, files
from qlora_helpers.data import chat_template, prompts, rendering
from qlora_helpers.export import merge
from qlora_helpers.models import qlora
from qlora_helpers.runs import RunFolder


@pytest.fixture(scope="session")
def bases(model_folder, tmp_path_factory):
    """The tiny Llama in 32 and 16 bits, in shards, and with a tied head; and a BLOOM, which has biases."""
    folders = {}
    for name, dtype, tied, shard in (
        ("f32", torch.float32, False, "1GB"),
        ("bf16", torch.bfloat16, False, "1GB"),
        ("fp16 in shards", torch.float16, False, "100KB"),
        ("tied", torch.bfloat16, True, "1GB"),
    ):
        folder = folders[name] = tmp_path_factory.mktemp("base")
        llama = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype, tie_word_embeddings=tied)
        llama.save_pretrained(folder, max_shard_size=shard)
    folder = folders["bloom"] = tmp_path_factory.mktemp("bloom")
    torch.manual_seed(0)
    BloomForCausalLM(BloomConfig(vocab_size=1000, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(folder)
    return folders


CASES = [
    ("f32", {}),
    ("bf16", {"target_modules": ("all-linear",)}),
    ("fp16 in shards", {"target_modules": ("q_proj", "down_proj")}),
    ("tied", {"target_modules": ("all-linear",)}),
    ("bloom", {"target_modules": ("query_key_value",), "bias": "all"}),
    ("bloom", {"target_modules": ("query_key_value",), "bias": "lora_only"}),
]


@pytest.mark.parametrize(("base", "changes"), CASES)
def test_merge_equals_pefts(make_run, bases, tmp_path, base, changes):
    run = make_run(bases[base], **changes)
    merge.merge(merge.source(run), tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(bases[base], dtype="auto")
    untouched = {name: p.detach().clone() for name, p in plain.named_parameters()}
    want = dict(qlora.load_adapter(plain, run.adapter).merge_and_unload().named_parameters())
    got = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").named_parameters())
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name].to(got[name].dtype)) for name in want)
    assert any(not torch.equal(got[name], untouched[name]) for name in want)
    if base == "fp16 in shards":
        assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1


LAYOUTS = ["guanaco", "instruction", "auto"]
TURNS = [('What\'s "x"?\n{{ x }}', "A {% name %}."), ("Ünd 😀 12?", "Yes.", "Why?", "So.")]


@pytest.mark.parametrize("template", LAYOUTS)
@pytest.mark.parametrize("turns", TURNS)
def test_chat_template_writes_the_format_of_training(config, tokenizer, make_row, template, turns):
    own = config.replace(template=template, system="Be 'brief'.\n😀" if template == "auto" else None, max_length=500)
    row = make_row(*turns, given="" if template == "auto" else "of y")
    (example,) = prompts.encode([row], own, tokenizer)
    text = chat_template.chat_template(own, tokenizer)
    got = tokenizer.apply_chat_template(list(row.messages), chat_template=text)["input_ids"]
    assert got == example.input_ids
    prompt = tokenizer.apply_chat_template(list(row.messages[:1]), chat_template=text, add_generation_prompt=True)
    want = rendering.render_prompt(row.messages[:1], own, tokenizer)
    assert prompt["input_ids"] == prompts.tokenize([want], tokenizer)[0]


@pytest.mark.parametrize("template", ["guanaco", "instruction"])
def test_exported_template_writes_system_prompts_as_in_training(config, tokenizer, template):
    """The configured one, or that of the conversation; it has no place for tools."""
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    for system, head in ((None, []), ("Be kind.", []), ("Be kind.", [{"role": "system", "content": "Be brief."}])):
        own = config.replace(template=template, system=system)
        want, _ = rendering.render((*head, *turns), own, tokenizer)
        text = chat_template.chat_template(own, tokenizer)
        assert tokenizer.apply_chat_template([*head, *turns], tokenize=False, chat_template=text).endswith(want)
    with pytest.raises(Exception, match="turns of system, user and assistant only"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], chat_template=text)


def test_merged_folder_loads_in_plain_transformers(make_run, bases, tmp_path):
    (bases["bf16"] / "LICENSE").write_text("free")
    out = tmp_path / "merged"
    merge.merge(merge.source(make_run(bases["bf16"])), out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = [{"role": "user", "content": "Why?"}]
    assert tokenizer.apply_chat_template(prompt, tokenize=False) == "<s>### Human: Why?### Assistant:"
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    assert loaded.dtype == torch.bfloat16
    assert "merged into the 16-bit base" in (out / "README.md").read_text("utf-8")
    assert (out / "LICENSE").read_text() == "free"


def test_merged_folder_decodes_greedily_whatever_the_base_samples_with(make_run, bases, tmp_path):
    base = shutil.copytree(bases["bf16"], tmp_path / "base")
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.3}
    files.write_json(base / "generation_config.json", {"eos_token_id": [1, 5], **sampling})
    merge.merge(merge.source(make_run(base)), tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    assert written.keys() == {"do_sample", "eos_token_id", "bos_token_id", "pad_token_id"}
    assert (written["do_sample"], written["eos_token_id"]) == (False, [1, 5])


def test_sentencepiece_model_comes_with_the_added_tokens(make_run, bases, tokenizer, tmp_path):
    base = shutil.copytree(bases["bf16"], tmp_path / "base")
    (base / "tokenizer.model").write_bytes(b"pieces")
    merge.merge(merge.source(make_run(base)), tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.model").read_bytes() == b"pieces"
    added = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {number: token["content"] for number, token in added.items()} == {"0": "<s>", "1": "</s>"}
    loaded = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert loaded("a</s> b")["input_ids"] == tokenizer("a</s> b")["input_ids"]


def broken(run, tmp_path, name, **changes):
    """Copy the run and change one of its files."""
    copy = RunFolder(tmp_path / "broken")
    shutil.copytree(run.path, copy.path)
    content = json.loads((copy / name).read_text("utf-8"))
    for key, value in changes.items():
        (content["config"] if name == "config.json" else content)[key] = value
    (copy / name).write_text(json.dumps(content))
    return copy


def test_run_without_adapter_is_refused(make_run, tmp_path):
    copy = broken(make_run(), tmp_path, "config.json")
    (copy.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds none. Fix"):
        merge.source(copy)


def test_adapter_of_another_base_is_refused(make_run, bases, tmp_path):
    copy = broken(make_run(), tmp_path, "config.json", model=str(bases["bloom"]))
    with pytest.raises(UserError, match=r"not those that .* was trained on. Fix"):
        merge.source(copy)
    (copy / "manifest.json").write_text('{"model": {}}')  # a run without a recorded fingerprint
    with pytest.raises(UserError, match=r"adapts .*, which is not in .*\. Fix"):
        merge.merge(merge.source(copy), tmp_path / "merged")


def test_adapter_of_a_base_with_another_width_is_refused(make_run, tmp_path, model_folder):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig.from_pretrained(model_folder)
    shape.hidden_size = 128
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "wide")
    copy = broken(make_run(), tmp_path, "config.json", model=str(tmp_path / "wide"))
    (copy / "manifest.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match=r"64 x 64 in the adapter. Fix"):
        merge.merge(merge.source(copy), tmp_path / "merged")


def test_base_with_changed_weights_is_refused(make_run, bases, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(bases["bf16"], base)
    run = make_run(base)
    changed = AutoModelForCausalLM.from_pretrained(base)
    changed.model.layers[1].mlp.up_proj.weight.data += 0.01
    changed.save_pretrained(base)
    with pytest.raises(UserError, match=r"not those that .* was trained on. Fix"):
        merge.source(run)


def test_adapter_with_another_scale_is_refused(make_run, tmp_path):
    copy = broken(make_run(), tmp_path, "adapter/adapter_config.json", lora_alpha=64)
    with pytest.raises(UserError, match=r"alpha = 64, but its run has alpha = 8. Fix"):
        merge.source(copy)


def test_base_in_4_bits_is_refused(make_run, config, tmp_path, device):
    packed = qlora.load_base(config, device)
    packed.save_pretrained(tmp_path / "packed")
    copy = broken(make_run(), tmp_path, "config.json", model=str(tmp_path / "packed"))
    (copy / "manifest.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match=r"not as plain 16-bit numbers. Fix"):
        merge.merge(merge.source(copy), tmp_path / "merged")


def test_hub_model_is_fetched_at_the_commit_of_training(make_run, monkeypatch, tmp_path, bases):
    """The branch may have moved since then, so the commit in the manifest is fetched."""
    run = make_run()
    own = {"config": run.config().to_dict() | {"model": "someone/model", "revision": "main"}, "identity": {}}
    files.write_json(run / "config.json", own)
    files.write_json(run / "manifest.json", {"model": {"revision": "c0ffee", "fingerprint": None}})
    requested = []

    def download(*args, revision, **options):
        requested.append((args, revision))
        return bases["bf16"]

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match=r"belongs to .*, not to someone/model"):
        merge.source(run)
    content = json.loads((run.adapter / "adapter_config.json").read_text("utf-8"))
    files.write_json(run.adapter / "adapter_config.json", content | {"base_model_name_or_path": "someone/model"})
    merge.source(run)
    assert requested == [(("someone/model",), "c0ffee")]
