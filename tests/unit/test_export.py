"""What is shipped: GGUF files that transformers loads back, and the gate that no broken export passes."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import gguf
import jinja2
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_helpers import UserError, files
from qlora_helpers.__main__ import main
from qlora_helpers.data import chat_template, prompts
from qlora_helpers.export import gguf as export_gguf
from qlora_helpers.export import merge, parity, pipeline
from qlora_helpers.models import bundled, hub, qlora, safetensors_io


@pytest.fixture(scope="module")
def run(make_run, tokenizer, model_folder, tmp_path_factory):
    """A run on the tiny Llama in bf16, with weights so large that 4 bits show."""
    folder = tmp_path_factory.mktemp("ship")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    torch.manual_seed(2)
    for name, p in base.named_parameters():
        if p.dim() == 2 and "proj" in name:
            p.data.normal_(std=0.2)
    words = base.model.embed_tokens.weight.data.normal_(std=3)
    base.lm_head.weight.data = 0.1 * words.roll(1, dims=0)  # each word has a likely next one, as in a real model
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return make_run(folder)


@pytest.fixture(scope="module")
def what(run):
    return merge.source(run)


@pytest.fixture(scope="module")
def shipped(run, tmp_path_factory):
    """A sound export of each kind, and what the gate said of it."""
    folder = tmp_path_factory.mktemp("out")
    return {kind: (folder / kind, pipeline.ship(run, folder / kind, kind)) for kind in export_gguf.OWN}


def logits(loaded, ids):
    with torch.no_grad():
        return torch.log_softmax(loaded.eval()(input_ids=torch.tensor([ids])).logits.float(), -1)


@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-3), ("q8_0", 0.5)])
def test_transformers_loads_the_gguf_back(shipped, kind, most):
    out, _ = shipped[kind]
    source = {"pretrained_model_name_or_path": out / "gguf", "gguf_file": f"model-{kind}.gguf"}
    back = AutoModelForCausalLM.from_pretrained(**source, **bundled.unpacked(), dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    want = AutoTokenizer.from_pretrained(out / "merged")
    got = parity.gguf_tokenizer(out / "gguf" / f"model-{kind}.gguf")
    text = "### Human: Explain 'x' 2024?\n\n  Ünï 😀### Assistant: x = 1</s>"
    ids = want(text)["input_ids"]
    assert got(text)["input_ids"] == ids
    assert got.chat_template == want.chat_template
    assert back.config.eos_token_id == want.eos_token_id
    assert (logits(back, ids) - logits(merged, ids)).abs().max() < most
    sizes = {t.tensor_type.name for t in gguf.GGUFReader(out / "gguf" / f"model-{kind}.gguf").tensors}
    assert sizes == {"F32", kind.upper()}


def sentencepiece_like():
    """A tokenizer of Llama 2's kind: words with a mark before them, and bytes for what no word covers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaTokenizer

    lines = (files.ROOT / "data" / "general.jsonl").read_text("utf-8").splitlines()
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    content = json.loads(learned.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *content["vocab"]]
    merges = [tuple(merge) for merge in content["merges"]]
    return LlamaTokenizer(vocab={name: place for place, name in enumerate(names)}, merges=merges)


def test_a_tokenizer_of_llama_2s_kind_comes_back(tmp_path, shipped, config):
    merged = tmp_path / "merged"
    shutil.copytree(shipped["f16"][0] / "merged", merged)
    want = sentencepiece_like()
    want.chat_template = chat_template.chat_template(config, want)
    want.save_pretrained(merged)
    change(merged / "config.json", vocab_size=1000)
    export_gguf.write(merged, tmp_path / "model.gguf", "f16")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    got = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("Which planet takes the longest?", "### Human: 17 x 6?\n\n  é😀### Assistant: ab</s>"):
        assert got(text)["input_ids"] == hub.saved_tokenizer(merged)(text)["input_ids"]
    names, merges, scores, kinds = (
        fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges", "scores", "token_type")
    )
    score = dict(zip(names, scores, strict=True))
    ranks = [score[token] for token in dict.fromkeys(merge.replace(" ", "") for merge in merges)]
    assert ranks == sorted(
        set(ranks), reverse=True
    )  # llama.cpp merges by score alone: an earlier merge has a better one
    assert kinds.count(gguf.TokenType.BYTE) == 256


def test_sound_exports_pass_and_are_written_whole(shipped, run):
    for kind, (out, compared) in shipped.items():
        assert [found.name for found in compared] == ["merged", kind]
        assert all(found.problems() == [] and found.prompts == 20 for found in compared)
        assert sorted(path.name for path in out.iterdir()) == ["gguf", "merged", "parity.json"]
        assert not [path for path in out.parent.iterdir() if path.name.startswith(".")]
        assert json.loads((out / "parity.json").read_text())["exports"][0]["problems"] == []


def planted(what, tmp_path, fault):
    """A merged folder with one fault."""
    out = tmp_path / "merged"
    merge.merge(dataclasses.replace(what, scale=2 * what.scale) if fault == "alpha" else what, out)
    if fault == "four bits":
        base = {tensor.name: tensor.read().float() for tensor in safetensors_io.tensors(what.base)}
        for tensor in safetensors_io.tensors(out):
            if "_proj" in tensor.name:
                update = tensor.read().float() - base[tensor.name]
                tensor.overwrite(qlora.round_trip(base[tensor.name], "nf4", True) + update, tensor.file)
    if fault == "template":
        (out / "chat_template.jinja").unlink()
    if fault == "stop":
        for name in ("config.json", "generation_config.json"):
            content = json.loads((out / name).read_text()) | {"eos_token_id": None}
            (out / name).write_text(json.dumps(content))
    return out


FAULTS = {
    "four bits": "KL divergence",
    "alpha": "KL divergence",
    "template": "prompts become other tokens",
    "stop": "end an answer differ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught_and_named(what, tmp_path, fault):
    (found,) = pipeline.verify(what, {"merged": planted(what, tmp_path, fault)})
    with pytest.raises(UserError, match=FAULTS[fault]):
        parity.check(found)
    other = [problem for name, problem in FAULTS.items() if FAULTS[name] != FAULTS[fault]]
    if fault in ("template", "stop"):  # the weights are sound, and the gate says so
        assert not [p for p in found.problems() if any(o in p for o in other)]


def test_sixteen_bit_arithmetic_has_room_for_its_rounding(shipped):
    sound = shipped["f16"][1][0]
    noisy = dataclasses.replace(sound, kl=2e-3, top1=0.96, same_texts=12, same_stops=12)
    assert len(noisy.problems()) == 3
    assert dataclasses.replace(noisy, dtype="bfloat16").problems() == []


def test_one_close_call_at_an_end_is_no_lost_end_where_weights_are_rounded(shipped):
    merged, packed = shipped["q8_0"][1]
    assert len(dataclasses.replace(merged, same_texts=20, same_stops=19).problems()) == 1
    assert dataclasses.replace(packed, same_texts=20, same_stops=19).problems() == []
    assert len(dataclasses.replace(packed, same_texts=20, same_stops=18).problems()) == 1


@pytest.mark.parametrize("fault", ["template", "stop"])
def test_a_gguf_without_template_or_stop_is_caught(what, tmp_path, monkeypatch, fault):
    name = {"template": "add_chat_template", "stop": "add_eos_token_id"}[fault]
    monkeypatch.setattr(gguf.GGUFWriter, name, lambda *_: None)
    merge.merge(what, tmp_path / "merged")
    export_gguf.write(tmp_path / "merged", tmp_path / "model.gguf", "f16")
    (found,) = pipeline.verify(what, {"f16": tmp_path / "model.gguf"})
    with pytest.raises(UserError, match=FAULTS[fault]):
        parity.check(found)


def test_a_broken_export_leaves_nothing_behind(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export_gguf, "_permuted", lambda name, weight, config: weight)
    with pytest.raises(UserError, match="the f16 model does not answer as its adapter does"):
        pipeline.ship(run, tmp_path / "out", "f16")
    assert list(tmp_path.iterdir()) == []


def test_an_answer_that_ends_ends_in_every_export(what, tmp_path, shipped):
    """With an end token that is likely, so that some answers do end; and the fault is then seen in the answers too."""
    out, _ = shipped["f16"]
    device, questions = parity.choose_device(what.base), parity.questions()
    likely = parity.of_adapter(what, device, questions)
    common = max({t for asked in likely for t in asked.answer}, key=lambda t: sum(t in a.answer for a in likely))
    reference = []
    for asked in likely:  # as if that token were the end
        place = asked.answer.index(common) if common in asked.answer else None
        kept = asked.answer[:place]
        reference.append(
            dataclasses.replace(asked, answer=kept, stopped=place is not None, logprobs=asked.logprobs[: len(kept) + 1])
        )
    content = json.loads((out / "merged" / "generation_config.json").read_text()) | {"eos_token_id": common}
    shutil.copytree(out / "merged", tmp_path / "merged")
    (tmp_path / "merged" / "generation_config.json").write_text(json.dumps(content))
    found = parity.compare("merged", tmp_path / "merged", reference, questions, device, [common])
    assert any(asked.stopped for asked in reference)
    assert found.problems() == []
    lost = parity.compare("merged", out / "merged", reference, questions, device, [common])
    assert "stop at another place" in " ".join(lost.problems())


@pytest.mark.parametrize("template", ["guanaco", "instruction", "auto"])
def test_the_modelfile_asks_in_the_layout_of_training(config, tokenizer, make_row, template):
    """Go's template language is read as Jinja's, of which the Modelfile uses the common part."""
    own = config.replace(template=template)
    text = chat_template.modelfile(own, tokenizer, "model-f16.gguf")
    go = re.search(r'TEMPLATE """(.*?)"""', text, re.DOTALL)[1]
    for old, new in (
        ("{{ $later := false }}", "{% set ns = namespace(later=false) %}"),
        ("{{ range .Messages }}", "{% for m in messages %}"),
        ('{{ if eq .Role "user" }}', '{% if m.role == "user" %}'),
        ("{{ if $later }}", "{% if ns.later %}"),
        ("{{ $later = true }}", "{% set ns.later = true %}"),
        ('{{ else if eq .Role "assistant" }}', '{% elif m.role == "assistant" %}'),
        ("{{ else }}", "{% else %}"),
        ("{{ .Content }}", "{{ m.content }}"),
    ):
        go = go.replace(old, new)
    go = go.removesuffix("{{ end }}{{ end }}") + "{% endif %}{% endfor %}"
    go = go.replace("{{ end }}", "{% endif %}")
    row = make_row("What?", "It.", "Why?")
    got = jinja2.Environment(keep_trailing_newline=True).from_string(go).render(messages=row.messages)
    assert got == prompts.render_prompt(row.messages, own, tokenizer)
    assert 'PARAMETER stop "</s>"' in text
    assert "PARAMETER repeat_penalty 1.0" in text  # else the answers are not those that were compared
    assert "FROM ./model-f16.gguf" in text


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bloom"}, "family 'bloom' cannot be written"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "scaled as 'llama3'"),
        ({"attention_bias": True}, "linear layers with biases"),
    ],
)
def test_a_model_that_no_gguf_is_written_of(what, tmp_path, changes, message):
    merge.merge(what, tmp_path / "merged")
    change(tmp_path / "merged" / "config.json", **changes)
    with pytest.raises(UserError, match=message + r".*Fix"):
        export_gguf.write(tmp_path / "merged", tmp_path / "model.gguf", "f16")
    assert not (tmp_path / "model.gguf").exists()


def test_too_little_disk_is_said_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"needs 0.\d GB, and 0.0 GB are free. Fix"):
        pipeline.ship(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_longer_than_the_context(what, device):
    with pytest.raises(UserError, match=r"context of 512 has to hold 32 of the answer too. Fix"):
        parity.of_adapter(what, device, ["why? " * 500])


def test_the_command(run, shipped, capsys):
    out = shipped["q8_0"][0]
    assert main(["export", str(run.path), "--out", str(out), "--gguf", "q8_0"]) == 0
    said = capsys.readouterr().out
    assert "nothing to export" in said
    assert "| q8_0 |" in said
    assert main(["export", str(run.path), "--out", str(out), "--gguf", "f16"]) == 2
    assert "holds something else. Fix" in capsys.readouterr().err
    assert main(["export", str(run.path), "--out", "x", "--gguf", "q8"]) == 2
    assert "Did you mean 'q8_0'?" in capsys.readouterr().err
    assert main(["export", str(Path("no") / "run"), "--out", "x"]) == 2
    assert "has no config.json. Fix" in capsys.readouterr().err
