"""An exported model is served on this machine alone, by a server that exists, and answers OpenAI's own client."""

import shutil
import socket
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_helpers import UserError
from qlora_helpers.__main__ import main
from qlora_helpers.data import chat_template
from qlora_helpers.export import serve

QUESTION = [{"role": "user", "content": "How do computers store data?"}]


@pytest.fixture(scope="module")
def exported(config, tokenizer, model_folder, tmp_path_factory):
    """A merged folder on the tiny Llama, each word of which has a likely next one, and the file of a GGUF."""
    out = tmp_path_factory.mktemp("shipped")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    torch.manual_seed(2)
    words = model.model.embed_tokens.weight.data.normal_(std=3)
    model.lm_head.weight.data = 0.1 * words.roll(1, dims=0)
    model.generation_config.do_sample = False
    model.save_pretrained(out / "merged")
    shutil.copytree(
        model_folder, out / "merged", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*model*", "*conf*")
    )
    own = AutoTokenizer.from_pretrained(model_folder)
    own.chat_template = chat_template.chat_template(config, tokenizer)
    own.save_pretrained(out / "merged")
    (out / "gguf").mkdir()
    (out / "gguf" / "model-q8_0.gguf").touch()
    return out


@pytest.fixture(scope="module")
def greedy(exported):
    """What the folder itself says: the text of 24 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(exported / "merged")
    model = AutoModelForCausalLM.from_pretrained(exported / "merged", dtype=torch.bfloat16)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(said[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_openais_client_gets_the_folders_own_answer(serving, greedy, port, exported):
    with serving(exported, "/health") as (name, ask):
        assert name == str(exported / "merged")
        assert ask(QUESTION, max_tokens=24) == [greedy]
        pieces = ask(QUESTION, max_tokens=24, stream=True)
        assert "".join(pieces) == greedy
        assert len(pieces) > 3
        outside = socket.gethostbyname(socket.gethostname())
        if outside != "127.0.0.1":
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((outside, port), timeout=5)


def test_a_port_in_use(exported, capsys, monkeypatch):
    monkeypatch.setattr(serve, "start", lambda server: None)  # it would take this process's place
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        assert main(["serve", str(exported), "--port", str(number)]) == 2
    said = capsys.readouterr()
    assert f"port: {number} on 127.0.0.1 cannot be had (Address already in use). Fix" in said.err
    assert said.out == ""
    assert main(["serve", str(exported), "--port", "70000"]) == 2
    assert "port: there is no 70000" in capsys.readouterr().err


def test_no_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serve, "start", lambda server: None)
    assert main(["serve", str(tmp_path / "no")]) == 2
    assert "holds no model. Fix" in capsys.readouterr().err
    (tmp_path / "config.json").touch()  # a run folder: an adapter is no model
    with pytest.raises(UserError, match="holds no model"):
        serve.find(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"2 GGUF files. Fix: name one, such as .*a.gguf"):
        serve.find(tmp_path)


def test_what_is_meant(exported):
    merged, file = exported / "merged", exported / "gguf" / "model-q8_0.gguf"
    assert [serve.find(path) for path in (exported, merged, exported / "gguf", file)] == [merged, merged, file, file]


def test_a_package_that_is_missing(exported, port, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(UserError, match=r"uvicorn is not installed. Fix: pip install 'transformers\[serving\]'"):
        serve.plan(exported, port=port)


def test_the_servers_for_a_gguf(exported, port, monkeypatch):
    """llama-cpp-python's in this Python, else llama.cpp's own on PATH, else a line that names both."""
    file, where = exported / "gguf" / "model-q8_0.gguf", ["--host", "127.0.0.1", "--port", str(port)]
    installed, programs = set(serve.LLAMA_CPP), {"llama-server": "/bin/llama-server"}
    monkeypatch.setattr(serve, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(serve.shutil, "which", programs.get)
    model = ["--model", str(file)]
    python = [sys.executable, "-m", "llama_cpp.server", *model, "--model_alias", "model-q8_0", "--n_ctx", "0", *where]
    assert serve.plan(file, port=port) == serve.Server(python, f"http://127.0.0.1:{port}/v1", "model-q8_0", False)
    assert 'messages=question, extra_body={"repeat_penalty": 1.0})' in serve.plan(file, port=port).help()
    installed.remove("sse_starlette")
    own = ["/bin/llama-server", *model, "--alias", "model-q8_0", "--jinja", *where]
    assert serve.plan(exported / "gguf", port=port).command == own
    assert "penalty" not in serve.plan(exported / "gguf", port=port).help()
    programs.clear()
    with pytest.raises(UserError, match=r"no server for GGUF files is installed. Fix"):
        serve.plan(file, port=port)


def test_who_opens_it_is_told(exported, port):
    assert "Whoever reaches this machine" in serve.plan(exported, host="0.0.0.0", port=port).help()
    assert "Whoever" not in serve.plan(exported, port=port).help()
