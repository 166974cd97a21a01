"""Pushing to a model hub: only selected files, no secrets, nothing about a machine, and nothing unless requested.

The hub is a small local server; the client is the real one.
"""

import base64
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_helpers import UserError, files
from qlora_helpers.__main__ import main
from qlora_helpers.evaluation import model_card
from qlora_helpers.export import pipeline, push, scan
from qlora_helpers.models import hub
from qlora_helpers.runs import RunFolder

SECRET = "hf_" + "PlantedForThisTestOnly" * 2
NAME = "someone/a-model"


class Hub(ThreadingHTTPServer):
    """The part of the hub's API that a commit of small files needs. It records every request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.requests, self.files, self.private, self.refuse = [], {}, None, None

    def answer(self, path, body, token):
        self.requests.append((path, body, token))
        if self.refuse and path.startswith(self.refuse):
            return 403, {"error": "You don't have the rights to create a model under this namespace"}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            private = wanted.get("private") is True or wanted.get("visibility") == "private"
            self.private = private if self.private is None else self.private
            return 200, {"url": f"http://127.0.0.1/{NAME}", "name": NAME, "id": "1"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == f"/api/models/{NAME}" and self.private is not None:
            return 200, {"_id": "1", "id": NAME, "private": self.private, "sha": "0" * 40, "siblings": [], "tags": []}
        if path == f"/api/models/{NAME}/preupload/main":
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return 200, {"files": files}
        if path == f"/api/models/{NAME}/commit/main":
            values = [json.loads(line) for line in body.splitlines()]
            self.files = {
                v["value"]["path"]: base64.b64decode(v["value"]["content"]) for v in values if v["key"] == "file"
            }
            return 200, {"commitUrl": f"http://127.0.0.1/{NAME}/commit/1", "commitOid": "1", "success": True}
        return 404, {"error": f"no such page: {path}"}


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        code, content = self.server.answer(self.path.split("?")[0], body, self.headers.get("Authorization"))
        raw = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    do_POST = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A local hub that the client uses instead of the real one, and a token with write access."""
    made = Hub()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{made.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def run(make_run):
    """A run with everything that a run folder can hold, including rows and checkpoints."""
    made = make_run()
    for name in ("answers.jsonl", ".lock", "log.jsonl", "checkpoints/checkpoint-4/optimizer.pt", "notebook.ipynb",
                 "figures/loss.png", "adapter/.cache/x", "adapter/training_args.bin", "adapter/rows.json"):  # fmt: skip
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text("")
    return made


@pytest.fixture(scope="module")
def shipped(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "shipped"
    pipeline.ship(run, out)
    files.write_text(out / "gguf" / "Modelfile", "as written by an export with a GGUF file")
    write_gguf(out / "gguf" / "model-f16.gguf")
    (out / "rows.jsonl").write_text("")
    (out / "merged" / "pytorch_model.bin").write_text("")
    return out


def write_gguf(path, name="tiny"):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_tensor("x.weight", torch.zeros(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def losses(folder, each):
    files.write_jsonl(
        folder / "heldout_losses.jsonl",
        [{"id": name, "loss_sum": each * 10, "tokens": 10, "bytes": 9} for name in ("a", "b", "c")],
    )


ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json",
           "tokenizer_config.json"]  # fmt: skip
MERGED = ["README.md", "chat_template.jinja", "config.json", "generation_config.json", "gguf/Modelfile",
          "gguf/model-f16.gguf", "model.safetensors", "parity.json", "tokenizer.json",
          "tokenizer_config.json"]  # fmt: skip


def test_dry_run_lists_all_files_and_sends_nothing(run, shipped, server, capsys):
    for source, names in ((run.path, ADAPTER), (shipped, MERGED)):
        assert main(["push", str(source), "--to", NAME]) == 0
        output = capsys.readouterr().out
        lines = output.split("\n\n")[0].splitlines()
        assert sorted(line.split()[1] for line in lines[:-1]) == names
        assert sum(int(line.split()[0].replace(",", "")) for line in lines[:-1]) == int(
            lines[-1].split()[0].replace(",", "")
        )
        assert f"to {NAME} (private)" in lines[-1]
        assert "library_name: " in output
        assert "Nothing was sent" in output
    assert server.requests == []


@pytest.mark.parametrize("kind", ["run", "export"])
def test_listed_files_arrive_and_none_contains_the_token(run, shipped, server, capfd, kind):
    source, names = (run.path, ADAPTER) if kind == "run" else (shipped, MERGED)
    assert main(["push", str(source), "--to", NAME, "--really"]) == 0
    captured = capfd.readouterr()
    assert sorted(server.files) == names
    assert server.private is True
    assert {token for path, _, token in server.requests if NAME in path} == {f"Bearer {SECRET}"}
    printed = [captured.out.encode(), captured.err.encode()]
    for content in [*printed, *(body for _, body, _ in server.requests), *server.files.values()]:
        assert SECRET.encode() not in content
    for name, content in server.files.items():
        if name.endswith((".md", "config.json", "parity.json", "Modelfile")):
            for place in (Path.home(), source, run.config().model, source.parent):
                assert str(place).encode() not in content, (name, place)
    if kind == "run":
        assert json.loads(server.files["adapter_config.json"])["base_model_name_or_path"].startswith("tiny-llama")
        assert b"### Human: " in server.files["chat_template.jinja"]  # the format of training, not the base model's
    assert not [path for path in source.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_existing_public_repository_is_not_written_without_public(run, server, capfd):
    server.private = False
    assert main(["push", str(run.path), "--to", NAME, "--really"]) == 2
    assert "already exists and is public. Fix" in capfd.readouterr().err
    assert server.files == {}
    assert main(["push", str(run.path), "--to", NAME, "--really", "--public"]) == 0
    assert sorted(server.files) == ADAPTER


def test_refusal_of_the_hub_is_a_one_line_error_without_the_token(run, server, monkeypatch, capfd):
    server.refuse = "/api/repos/create"
    assert main(["push", str(run.path), "--to", NAME, "--really"]) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"error: push: {NAME} could not be written (")
    assert error.count("\n") == 1
    assert SECRET not in error
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert main(["push", str(run.path), "--to", NAME, "--really"]) == 2
    assert "Fix: check the name, the connection" in capfd.readouterr().err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(run.path / "none"))
    assert main(["push", str(run.path), "--to", NAME, "--really"]) == 2
    assert "no token found. Fix: store a token with write access in HF_TOKEN" in capfd.readouterr().err


def test_bad_input_is_a_one_line_error(run, shipped, tmp_path, server, capfd):
    bare = RunFolder(shutil.copytree(run.path, tmp_path / "bare"))
    (bare.adapter / "adapter_model.safetensors").unlink()
    failed = shutil.copytree(shipped, tmp_path / "failed")
    compared = json.loads((failed / "parity.json").read_text())
    compared["exports"][0]["problems"] = ["KL divergence"]
    (failed / "parity.json").write_text(json.dumps(compared))
    cut = RunFolder(shutil.copytree(run.path, tmp_path / "cut"))
    (cut / "metrics.json").unlink()
    with_path = shutil.copytree(shipped, tmp_path / "with-path")
    with (with_path / "merged" / "README.md").open("a") as card:
        card.write(f"See {Path.home()}/notes.")
    with_token = shutil.copytree(shipped, tmp_path / "with-token")
    (with_token / "merged" / "config.json").write_text(f'{{"token": "{SECRET}"}}')
    for source, to, message in (
        (tmp_path, NAME, "is neither a run folder nor an exported folder. Fix"),
        (run.path, "model", "'model' is not a repository name. Fix: pass NAME/MODEL"),
        (run.path, "a/b/c", "'a/b/c' is not a repository name. Fix: pass NAME/MODEL"),
        (run.path, "me/-x-", "'me/-x-' is not a repository name. Fix: pass NAME/MODEL"),
        (bare.path, NAME, "holds none. Fix"),
        (cut.path, NAME, "has no metrics.json. Fix"),
        (failed, NAME, "does not answer like its adapter. Fix"),
        (with_path, NAME, f"README.md names {Path.home()}, a folder of a machine. Fix"),
        (with_token, NAME, "config.json contains the token. Fix"),
    ):
        assert main(["push", str(source), "--to", to, "--really"]) == 2
        error = capfd.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert SECRET not in error
    assert server.requests == []


# Put together here, so that this file itself holds none.
SECRETS = {
    "a Hugging Face token": SECRET,
    "a GitHub token": "ghp_" + "a1" * 18,
    "a GitLab token": "glpat-" + "a1" * 10,
    "an AWS access key": "AKIA" + "A1" * 8,
    "a Google API key": "AIza" + "a" * 35,
    "an OpenAI or Anthropic key": "sk-" + "ant-" + "a1" * 20,
    "a Slack token": "xoxb-" + "1" * 24,
    "a Weights & Biases key": "wandb_" + "v1_" + "a1" * 20,
    "a PyPI token": "pypi-" + "a1" * 30,
    "an npm token": "npm_" + "a1" * 18,
    "a JSON web token": "eyJ" + "a" * 20 + ".eyJ" + "b" * 20 + ".c",
    "a private key": "-----BEGIN OPENSSH" + " PRIVATE KEY-----",
    "a password in an address": "https://me:" + "secret@example.org/x",
}


def plant(folder, name, text):
    """Write `text` into a file of an exported folder, in a way that its format allows."""
    path = folder / name
    if path.suffix == ".safetensors":
        save_file(load_file(path), path, {"note": text})
    elif path.suffix == ".gguf":
        write_gguf(path, text)
    else:
        path.write_text(f'{{"note": "{text}"}}')


@pytest.mark.parametrize("kind", scan.SECRETS)
def test_each_kind_of_secret_is_found_in_text(kind):
    assert scan.secrets(f"note: {SECRETS[kind]} and more") == kind


@pytest.mark.parametrize(
    "text",
    ["a risk-" + "free" * 10, "task-" + "a1" * 20, "https://example.org/a:b/c@d", "hf_hub_download", "AKIA",
     "npm_config", "-----BEGIN PUBLIC KEY-----", "sk-learn", "eyJ.eyJ.", "see ghp_ and gho_"],
)  # fmt: skip
def test_ordinary_text_is_no_secret(text):
    assert scan.secrets(text) is None


TEXTS = ["merged/README.md", "merged/config.json", "merged/chat_template.jinja", "gguf/Modelfile"]
OTHERS = ["merged/tokenizer.json", "merged/tokenizer_config.json", "merged/model.safetensors", "gguf/model-f16.gguf"]


@pytest.mark.parametrize("name", [*TEXTS, *OTHERS])
def test_a_secret_in_any_file_stops_a_push_and_is_not_repeated(shipped, tmp_path, name):
    copy = shutil.copytree(shipped, tmp_path / "copy")
    plant(copy, name, SECRETS["a GitHub token"])
    with pytest.raises(
        UserError, match=rf"{Path(name).name} contains a GitHub token\. Fix: remove it, and revoke"
    ) as raised:
        push.prepare(copy, NAME)
    assert SECRETS["a GitHub token"] not in str(raised.value)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("path", ["/home/alice/models", "/Users/alice/models", r"C:\\Users\\alice\\m", "/root/m"])
def test_a_home_folder_of_any_machine_stops_a_push(shipped, tmp_path, name, path):
    copy = shutil.copytree(shipped, tmp_path / "copy")
    plant(copy, name, path)
    with pytest.raises(UserError, match=rf"{Path(name).name} names .*, a folder of a machine\. Fix"):
        push.prepare(copy, NAME)


@pytest.mark.parametrize("text", ["https://example.org/home/alice", "/home", "a/home/b", "/Users/"])
def test_a_web_address_is_no_home_folder(text):
    scan.check("README.md", text.encode(), None, [])


def test_a_damaged_gguf_file_is_not_pushed(shipped, tmp_path):
    copy = shutil.copytree(shipped, tmp_path / "copy")
    (copy / "gguf" / "model-f16.gguf").write_text("no GGUF file")
    with pytest.raises(UserError, match=r"model-f16.gguf is not a GGUF file .*Fix"):
        push.prepare(copy, NAME)


def test_a_dry_run_does_not_steer_the_terminal(shipped, tmp_path):
    copy = shutil.copytree(shipped, tmp_path / "copy")
    (copy / "merged" / "README.md").write_text("a\x1b[2Jb")
    assert "a\N{REPLACEMENT CHARACTER}[2Jb" in str(push.prepare(copy, NAME))


def test_card_has_intervals_if_the_base_losses_are_saved(make_run):
    made = make_run()
    plain = model_card.render(made, made.config(), made.read("metrics.json"))
    assert "| 1.0000 (-1.0000) |" in plain
    losses(made, 2.5)
    losses(made.path.parent / "base-0", 3.0)
    files.write_jsonl(
        made / "answers.jsonl",
        [{"prompt": "p", "reference": "a b", "answer": "a b", "stopped": True, "invented": False}] * 5,
    )
    card = model_card.render(made, made.config(), made.read("metrics.json"))
    assert "| 1.0000 (-0.5000, 95% interval -0.5000 to -0.5000) |" in card
    assert "| ROUGE-L | 1.00, 95% interval 1.00 to 1.00 |" in card
    assert "greedy answers to 5 held-out questions" in card
    assert "the other half chose" not in card
    files.write_jsonl(made / "evaluations.jsonl", [])
    assert "checkpoint that the other half chose" in model_card.render(made, made.config(), made.read("metrics.json"))
    losses(made.path.parent / "base-0", 3.0)
    other = made.path.parent / "base-0" / "heldout_losses.jsonl"
    other.write_text(other.read_text().replace('"a"', '"z"'))
    with pytest.raises(UserError, match=r"on different held-out rows\. Fix"):
        model_card.card(made, made.config(), made.read("metrics.json"))


@pytest.mark.parametrize(
    ("header", "want"),
    [
        (None, {}),
        ("---\ntags: [x]\n---\n", {}),
        ("---\nlicense: mit\n---\n# x", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n",
         {"license": "other", "license_name": "own", "license_link": "LICENSE"}),
    ],
)  # fmt: skip
def test_license_is_that_of_the_base_model(config, tmp_path, header, want):
    if header is not None:
        (tmp_path / "README.md").write_text(header)
    assert hub.license(config.replace(model=str(tmp_path))) == want


def test_card_names_base_data_and_license_but_no_local_path(make_run, model_folder, tmp_path):
    base = shutil.copytree(model_folder, tmp_path / "my-base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    made = make_run(base)
    metrics = made.read("metrics.json")
    config = made.config().replace(dataset=str(tmp_path / "my-rows.jsonl"))
    card = model_card.render(made, config, metrics)
    assert "license: mit\n" in card
    assert "License: that of the base model, mit." in card
    assert "Data: my-rows.jsonl (" in card
    assert "Base model: my-base.\n" in card
    assert "base_model:" not in card  # the hub takes ids only
    assert str(tmp_path) not in card
    of_bundled_model = model_card.render(made, config.replace(model="smollm2-135m-instruct", dataset="a/b"), metrics)
    for line in ("base_model: HuggingFaceTB/SmolLM2-135M-Instruct\n", "license: apache-2.0\n", "datasets: a/b\n"):
        assert line in of_bundled_model
    assert "weights differ slightly from the original" in of_bundled_model
    assert "could not be read" in model_card.render(made, config.replace(model=str(model_folder)), metrics)
