"""Runs that cannot be exported raise a one-line error with a fix, and nothing is written."""

import json
import re
import shutil

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.models import hub
from qlora_helpers.runs import RunFolder

TRAINED_ON, CACHED = "b" * 40, "a" * 40


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


@pytest.fixture
def copy(run, tmp_path):
    """A copy of the run, to be broken."""
    return RunFolder(shutil.copytree(run.path, tmp_path / "exp1"))


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def change_config(run, **values):
    config = json.loads((run / "config.json").read_text("utf-8"))
    change(run / "config.json", config=config["config"] | values)


def without_adapter(run, tmp_path, monkeypatch):
    (run.adapter / "adapter_model.safetensors").unlink()


def other_base(run, tmp_path, monkeypatch):
    """Another base model of the same shape: merging into it would work, but give nonsense."""
    base = shutil.copytree(run.config().model, tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\xbf")
    change_config(run, model=str(base))


def other_name(run, tmp_path, monkeypatch):
    change_config(run, model="someone/else")


def other_revision(run, tmp_path, monkeypatch):
    """The hub's cache holds another commit than the one in training, and the hub is unreachable."""
    cache = tmp_path / "cache" / "models--someone--model"
    shutil.copytree(run.config().model, cache / "snapshots" / CACHED)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(CACHED)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "reachable", lambda: False)
    change_config(run, model="someone/model", revision="main")
    change(run.adapter / "adapter_config.json", base_model_name_or_path="someone/model")
    change(run / "manifest.json", model={"name": "someone/model", "revision": TRAINED_ON, "fingerprint": None})


def full_disk(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))


def no_llama_cpp(run, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_helpers.export.gguf.find_spec", lambda name: object())
    monkeypatch.setattr("qlora_helpers.export.gguf_reader.llama_cpp_installed", lambda: False)


def no_sentencepiece(run, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_helpers.export.gguf.find_spec", lambda name: None)


def refused_by_the_converter(run, tmp_path, monkeypatch):
    """A converter that knows no architecture: it fails as llama.cpp's does."""
    (tmp_path / "llama.cpp").mkdir()
    script = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    script.write_text("raise SystemExit('ERROR:hf-to-gguf:Model UnheardOfForCausalLM is not supported')")
    monkeypatch.setenv("QLORA_LLAMA_CPP", str(script.parent))
    monkeypatch.setattr("qlora_helpers.export.gguf.find_spec", lambda name: object())


def no_converter(run, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_LLAMA_CPP", str(tmp_path))
    monkeypatch.setattr("qlora_helpers.export.gguf.find_spec", lambda name: object())


def no_package_index(run, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setattr("qlora_helpers.export.gguf.find_spec", lambda name: object())


def nothing(run, tmp_path, monkeypatch):
    pass


CASES = [
    (without_adapter, "q8_0", "adapter: .* holds none"),
    (other_base, "q8_0", "model: the weights in .* are not those that .* was trained on"),
    (other_name, "q8_0", "adapter: .* belongs to .*, not to someone/else"),
    (other_revision, "q8_0", f"model: 'someone/model' at revision {TRAINED_ON} is neither"),
    (full_disk, "q8_0", "disk: .* needs 0.3 GB, but only 0.0 GB are free"),
    (no_llama_cpp, "q4_k_m", "gguf: q4_k_m needs llama.cpp, which is not installed"),
    (no_sentencepiece, "f16", "gguf: .* needs sentencepiece, which is not installed"),
    (nothing, "q4_0", "gguf: unknown kind 'q4_0'. Did you mean 'q[48]_"),
    (
        refused_by_the_converter,
        "f16",
        r"gguf: llama.cpp cannot convert .* \(Model UnheardOfForCausalLM is not supported\)",
    ),
    (no_converter, "f16", "gguf: QLORA_LLAMA_CPP=.* has no convert_hf_to_gguf.py"),
    (no_package_index, "f16", "gguf: pip could not download llama-cpp-python=="),
]


@pytest.mark.parametrize(("plant", "kind", "message"), CASES)
def test_one_line_error_and_nothing_written(copy, tmp_path, monkeypatch, capfd, plant, kind, message):
    plant(copy, tmp_path, monkeypatch)
    out = tmp_path / "new" / "shipped"
    capfd.readouterr()
    assert main(["export", str(copy.path), "--out", str(out), "--gguf", kind]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert "Fix: " in error or "Did you mean" in error
    assert not out.parent.exists()
