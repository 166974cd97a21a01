"""Merged folders answer like their adapter, and broken ones are detected and not written."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jinja2
import pytest
import torch
from transformers import AutoModelForCausalLM

from qlora_helpers import UserError, files
from qlora_helpers.__main__ import main
from qlora_helpers.data import chat_template, rendering
from qlora_helpers.export import merge, parity, pipeline
from qlora_helpers.models import qlora, safetensors_io


@pytest.fixture(scope="module")
def run(make_run, tokenizer, model_folder, tmp_path_factory):
    """A run on the tiny Llama in bf16, with weights large enough that 4-bit rounding shows."""
    folder = tmp_path_factory.mktemp("ship")
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    torch.manual_seed(2)
    for name, p in base.named_parameters():
        if p.dim() == 2 and "proj" in name:
            p.data.normal_(std=0.2)
    embeddings = base.model.embed_tokens.weight.data.normal_(std=3)
    base.lm_head.weight.data = 0.1 * embeddings.roll(1, dims=0)  # each token has a likely successor, as in a real model
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return make_run(folder)


@pytest.fixture(scope="module")
def source(run):
    return merge.source(run)


@pytest.fixture(scope="module")
def shipped(run, tmp_path_factory):
    """A correct merged export, and its comparison with the adapter."""
    out = tmp_path_factory.mktemp("out") / "merged-only"
    (compared,) = pipeline.ship(run, out)
    return out, compared


def test_correct_export_passes_and_is_complete(shipped):
    out, compared = shipped
    assert (compared.name, compared.problems(), compared.prompts) == ("merged", [], 20)
    assert sorted(path.name for path in out.iterdir()) == ["merged", "parity.json"]
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert json.loads((out / "parity.json").read_text())["exports"][0]["problems"] == []


def planted(source, tmp_path, fault):
    """Write a merged folder with one fault."""
    out = tmp_path / "merged"
    merge.merge(dataclasses.replace(source, scale=2 * source.scale) if fault == "alpha" else source, out)
    if fault == "four bits":
        base = {tensor.name: tensor.read().float() for tensor in safetensors_io.tensors(source.base)}
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
    "template": "prompts are tokenized differently",
    "stop": "the end tokens differ",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_detected_and_named(source, tmp_path, fault):
    (result,) = pipeline.verify(source, {"merged": planted(source, tmp_path, fault)})
    with pytest.raises(UserError, match=FAULTS[fault]):
        parity.check(result)
    other = [problem for name, problem in FAULTS.items() if FAULTS[name] != FAULTS[fault]]
    if fault in ("template", "stop"):  # the weights are correct, so no other problem is reported
        assert not [p for p in result.problems() if any(o in p for o in other)]


def test_limits_in_16_bits_allow_for_rounding(shipped):
    noisy = dataclasses.replace(shipped[1], kl=2e-3, top1=0.96, same_texts=12, same_stops=12)
    assert len(noisy.problems()) == 3
    assert dataclasses.replace(noisy, dtype="bfloat16").problems() == []


def test_one_different_end_is_allowed_where_weights_are_rounded(shipped):
    merged, packed = shipped[1], dataclasses.replace(shipped[1], name="q8_0")
    assert len(dataclasses.replace(merged, same_texts=20, same_stops=19).problems()) == 1
    assert dataclasses.replace(packed, same_texts=20, same_stops=19).problems() == []
    assert len(dataclasses.replace(packed, same_texts=20, same_stops=18).problems()) == 1


def test_broken_export_writes_nothing(run, tmp_path, monkeypatch):
    """The merge doubles one weight matrix after the adapter is added."""
    merge_weights = merge._merge_weights

    def broken(source, out):
        merge_weights(source, out)
        tensor = next(t for t in safetensors_io.tensors(out) if t.name.endswith("0.self_attn.q_proj.weight"))
        tensor.overwrite(2 * tensor.read().float(), tensor.file)

    monkeypatch.setattr(merge, "_merge_weights", broken)
    with pytest.raises(UserError, match="the merged model does not answer like its adapter"):
        pipeline.ship(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_answers_end_at_the_same_token_in_every_export(source, tmp_path, shipped):
    """A frequent token becomes the end token, so that some answers end. Without it, the answers differ."""
    out, _ = shipped
    device, questions = parity.choose_device(source.base), parity.questions()
    responses = parity.adapter_responses(source, device, questions)
    tokens = {token for response in responses for token in response.answer}
    common = max(tokens, key=lambda token: sum(token in response.answer for response in responses))
    reference = []
    for r in responses:
        place = r.answer.index(common) if common in r.answer else None
        kept = r.answer[:place]
        cut = {"answer": kept, "stopped": place is not None, "logprobs": r.logprobs[: len(kept) + 1]}
        reference.append(dataclasses.replace(r, **cut))
    content = json.loads((out / "merged" / "generation_config.json").read_text()) | {"eos_token_id": common}
    shutil.copytree(out / "merged", tmp_path / "merged")
    (tmp_path / "merged" / "generation_config.json").write_text(json.dumps(content))
    result = parity.compare("merged", tmp_path / "merged", reference, questions, device, [common])
    assert any(response.stopped for response in reference)
    assert result.problems() == []
    without_end = parity.compare("merged", out / "merged", reference, questions, device, [common])
    assert "the end token differs in" in " ".join(without_end.problems())


@pytest.mark.parametrize("template", ["guanaco", "instruction", "auto"])
def test_modelfile_writes_the_format_of_training(config, tokenizer, make_row, template):
    """The Modelfile's Go template is translated to Jinja; it uses only what both languages share."""
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
    assert got == rendering.render_prompt(row.messages, own, tokenizer)
    assert 'PARAMETER stop "</s>"' in text
    assert "PARAMETER repeat_penalty 1.0" in text  # otherwise Ollama would give other answers than those compared
    assert "FROM ./model-f16.gguf" in text


def test_full_disk_is_reported_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"needs 0.\d GB, but only 0.0 GB are free. Fix"):
        pipeline.ship(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_deleted_before_the_disk_is_measured(run, tmp_path, monkeypatch):
    files.write_bytes(tmp_path / ".out-abc.part" / "built" / "model.safetensors", b"half a model")
    files.write_text(tmp_path / ".out-abc.part" / files.LOCK, "")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match="disk: "):
        pipeline.ship(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_prompt_longer_than_the_context_is_refused(source, device):
    with pytest.raises(UserError, match=r"context of 512 has to hold 32 of the answer too. Fix"):
        parity.adapter_responses(source, device, ["why? " * 500])


def test_export_command(run, shipped, capsys):
    out = shipped[0]
    assert main(["export", str(run.path), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert "nothing to export" in output
    assert "| merged |" in output
    assert main(["export", str(run.path), "--out", str(out.parent)]) == 2
    assert "contains something else. Fix" in capsys.readouterr().err
    assert main(["export", str(run.path), "--out", "x", "--gguf", "q8"]) == 2
    assert "Did you mean 'q8_0'?" in capsys.readouterr().err
    assert main(["export", str(Path("no") / "run"), "--out", "x"]) == 2
    assert "has no config.json. Fix" in capsys.readouterr().err
