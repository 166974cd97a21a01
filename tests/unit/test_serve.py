"""Serving an exported model: it answers programs of this machine that ask for this model, and OpenAI's own client."""

import json
import shutil
import socket
import sys
from http.client import HTTPConnection

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_helpers import UserError
from qlora_helpers.__main__ import main
from qlora_helpers.data import chat_template
from qlora_helpers.export import guarded_server, serve

QUESTION = [{"role": "user", "content": "How do computers store data?"}]


@pytest.fixture(scope="module")
def exported(config, tokenizer, model_folder, tmp_path_factory):
    """A merged folder of a tiny Llama in which each token has a likely successor, and an empty GGUF file."""
    out = tmp_path_factory.mktemp("shipped")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    torch.manual_seed(2)
    embeddings = model.model.embed_tokens.weight.data.normal_(std=3)
    model.lm_head.weight.data = 0.1 * embeddings.roll(1, dims=0)
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
    """The folder's greedy answer in plain transformers: the text of 24 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(exported / "merged")
    model = AutoModelForCausalLM.from_pretrained(exported / "merged", dtype=torch.bfloat16)
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def status(port, path, body=None, **headers):
    """Status of the answer to a request as a browser or a program sends it."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    text = None if body is None else json.dumps(body)
    kind = {"Content-Type": "application/json"}
    connection.request("GET" if body is None else "POST", path, text, kind | headers)
    return connection.getresponse().status


def test_openai_client_gets_the_same_answer_as_transformers(serving, greedy, port, exported, model_folder, monkeypatch):
    monkeypatch.setenv("HOST", "0.0.0.0")
    with serving(exported, "/health") as (name, ask):
        body = {"model": name, "messages": QUESTION, "max_tokens": 2}
        assert status(port, "/v1/chat/completions", body) == 200
        assert status(port, "/v1/chat/completions", body, Host=f"evil.example:{port}") == 400
        assert status(port, "/v1/chat/completions", body, Origin="https://evil.example") == 403
        assert status(port, "/load_model", {"model": str(model_folder)}) == 404
        assert status(port, "/v1/chat/completions", body | {"model": str(model_folder)}) == 400
        assert name == str(exported / "merged")
        assert ask(QUESTION, max_tokens=24) == [greedy]
        pieces = ask(QUESTION, max_tokens=24, stream=True)
        assert "".join(pieces) == greedy
        assert len(pieces) > 3
        outside = socket.gethostbyname(socket.gethostname())
        if outside != "127.0.0.1":
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection((outside, port), timeout=5)


@pytest.mark.parametrize(
    ("headers", "path", "answer"),
    [
        ({"host": "127.0.0.1:8000"}, "/v1/models", 200),
        ({"host": "LOCALHOST"}, "/health", 200),
        ({"host": "[::1]:8000"}, "/v1/completions", 200),
        ({"host": "evil.example:8000"}, "/v1/models", 400),
        ({"host": "127.0.0.1.evil.example"}, "/v1/models", 400),
        ({"host": "evil.example", "origin": "http://evil.example"}, "/v1/models", 400),
        ({}, "/v1/models", 400),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}, "/v1/models", 200),
        ({"host": "127.0.0.1:8000", "origin": "https://evil.example"}, "/v1/models", 403),
        ({"host": "127.0.0.1:8000", "origin": "null"}, "/v1/models", 403),
        ({"host": "127.0.0.1:8000"}, "/load_model", 404),
        ({"host": "127.0.0.1:8000"}, "/reset", 404),
        ({"host": "127.0.0.1:8000"}, "/v1/audio/transcriptions", 404),
        ({"host": "127.0.0.1:8000"}, "/docs", 404),
    ],
)
def test_the_server_answers_only_its_own_programs(headers, path, answer):
    scope = {"type": "http", "path": path, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}
    assert guarded_server.Guard(None, guarded_server.LOOPBACK).status(scope) == answer


def test_a_server_for_other_machines_takes_any_name_but_no_other_sites_pages():
    guard = guarded_server.Guard(None, None)
    headers = [(b"host", b"gpu-box.example:8000")]
    assert guard.status({"type": "http", "path": "/v1/models", "headers": headers}) == 200
    headers.append((b"origin", b"https://evil.example"))
    assert guard.status({"type": "http", "path": "/v1/models", "headers": headers}) == 403


def test_port_in_use_or_out_of_range(exported, capsys, monkeypatch):
    monkeypatch.setattr(serve, "start", lambda server: None)  # it would replace this process
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        assert main(["serve", str(exported), "--port", str(number)]) == 2
    captured = capsys.readouterr()
    assert f"port: {number} on 127.0.0.1 is not available (Address already in use). Fix" in captured.err
    assert captured.out == ""
    assert main(["serve", str(exported), "--port", "70000"]) == 2
    assert "port: 70000 is out of range. Fix" in capsys.readouterr().err


def test_folder_without_a_single_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(serve, "start", lambda server: None)
    assert main(["serve", str(tmp_path / "no")]) == 2
    assert "contains no model. Fix" in capsys.readouterr().err
    (tmp_path / "config.json").touch()  # a run folder: an adapter alone is not a model
    with pytest.raises(UserError, match="contains no model"):
        serve.find(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"2 GGUF files. Fix: pass one of them, such as .*a.gguf"):
        serve.find(tmp_path)


def test_find_prefers_the_merged_folder(exported):
    merged, file = exported / "merged", exported / "gguf" / "model-q8_0.gguf"
    assert [serve.find(path) for path in (exported, merged, exported / "gguf", file)] == [merged, merged, file, file]


def test_missing_package_is_named(exported, port, monkeypatch):
    monkeypatch.setattr(serve, "find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(UserError, match=r"uvicorn is not installed. Fix: pip install 'transformers\[serving\]'"):
        serve.plan(exported, port=port)


def test_server_for_a_gguf_file(exported, port, monkeypatch, tmp_path):
    """llama-cpp-python's in this Python, else llama.cpp's own on PATH, else an error that names both."""
    file, listen = exported / "gguf" / "model-q8_0.gguf", ["--host", "127.0.0.1", "--port", str(port)]
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho --host --cors-origins\n")
    program.chmod(0o755)
    installed, programs = set(serve.LLAMA_CPP), {"llama-server": str(program)}
    monkeypatch.setattr(serve, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(serve.shutil, "which", programs.get)
    model = ["--model", str(file)]
    guarded = [sys.executable, "-P", guarded_server.__file__, "127.0.0.1", "llama_cpp.server"]
    python = [*guarded, *model, "--model_alias", "model-q8_0", "--n_ctx", "0", *listen]
    assert serve.plan(file, port=port) == serve.Server(python, f"http://127.0.0.1:{port}/v1", "model-q8_0", False)
    assert 'messages=question, extra_body={"repeat_penalty": 1.0})' in serve.plan(file, port=port).help()
    installed.remove("sse_starlette")
    own = [str(program), *model, "--alias", "model-q8_0", "--jinja"]
    closed = ["--cors-origins", "localhost"]  # pages of other sites get no answer
    assert serve.plan(exported / "gguf", port=port).command == [*own, *closed, *listen]
    program.write_text("#!/bin/sh\necho --host\n")  # before July 2026
    assert serve.plan(exported / "gguf", port=port).command == [*own, *listen]
    assert "penalty" not in serve.plan(exported / "gguf", port=port).help()
    programs.clear()
    with pytest.raises(UserError, match=r"no server for GGUF files is installed. Fix"):
        serve.plan(file, port=port)


def test_serving_to_other_machines_prints_a_warning(exported, port):
    assert "Anyone who can reach this machine" in serve.plan(exported, host="0.0.0.0", port=port).help()
    assert "Anyone" not in serve.plan(exported, port=port).help()
