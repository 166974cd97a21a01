"""What surrounds a run: the hub's address, access to gated models, what is downloaded, and which commit is noted."""

import socket
import subprocess
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import filter_repo_objects
from test_quoting import HOSTILE, render
from test_time_limit import ENDLESS
from transformers import AutoTokenizer

from qlora_helpers import UserError, files, runs
from qlora_helpers.data import rendering, time_limit
from qlora_helpers.evaluation import model_card
from qlora_helpers.models import hub


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_the_hubs_own_port_is_tried(monkeypatch, scheme):
    monkeypatch.setattr(hub, "getproxies", dict)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"{scheme}://127.0.0.1:{server.getsockname()[1]}")
        assert hub.reachable.__wrapped__()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_gated_model_names_the_token(config, monkeypatch, wrapped):
    def load(*args, **options):
        refused = GatedRepoError(
            "401 Client Error", response=SimpleNamespace(headers={}, request=None, status_code=401)
        )
        if not wrapped:
            raise refused
        raise OSError("You are trying to access a gated repo.") from refused

    monkeypatch.setattr(hub, "reachable", lambda: True)
    with pytest.raises(UserError, match=r"is gated or private.*Fix: .* set HF_TOKEN"):
        hub.from_pretrained(SimpleNamespace(from_pretrained=load), config.replace(model="someone/gated"))


def test_only_needed_files_are_downloaded():
    needed = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "LICENSE",
    ]
    others = ["consolidated.safetensors", "original/params.json", "onnx/model.safetensors", "pytorch_model.bin", "x.py",
              "adapter_config.json", "training_args.bin", "runs/events.json"]  # fmt: skip
    assert list(filter_repo_objects([*needed, *others], allow_patterns=hub.DOWNLOADED)) == needed


def test_an_installed_copy_does_not_note_the_commit_of_the_repository_around_it(tmp_path, monkeypatch):
    for command in (["init", "--quiet"], ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "--quiet",
                                          "--allow-empty", "-m", "x"]):  # fmt: skip
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    site = tmp_path / ".venv" / "site-packages"
    site.mkdir(parents=True)
    monkeypatch.setattr(files, "ROOT", site)
    noted = '{"vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}'
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: SimpleNamespace(read_text=lambda file: noted))
    assert runs.git_commit() == "c0ffee"
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: SimpleNamespace(read_text=lambda file: None))
    assert runs.git_commit() is None
    monkeypatch.setattr(files, "ROOT", tmp_path)
    assert len(runs.git_commit().removesuffix("-dirty")) == 40


@pytest.mark.parametrize("template", [ENDLESS, "{{ 9 ** 9 }}", "{{ messages[0].content }}" + ENDLESS])
def test_an_endless_template_stops_loading_the_rows(config, monkeypatch, template):
    monkeypatch.setattr(time_limit, "SECONDS", 0.3)
    monkeypatch.setattr(time_limit, "POLL", 0.05)
    monkeypatch.setattr(time_limit, "_watcher", None)
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"template: the model's chat template .*Fix"):
        rendering.template_of(config.replace(template="auto"), tokenizer)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_run_folder_puts_no_links_into_a_model_card(make_run, name):
    run = make_run()
    manifest = run.read("manifest.json") | {"versions": {name: name}, "rivals": {name: "base-0"}}
    manifest["data"] |= {"source_fingerprint": name}
    files.write_json(run / "manifest.json", manifest)
    config = run.config().replace(dataset=f"/data/{name.replace('/', '')}", model=f"/models/{name.replace('/', '')}")
    card = model_card.render(run, config, run.read("metrics.json") | {"device": name, "seed": name})
    page = str(render(card.split("---\n", 2)[2]))
    assert "<a " not in page
    assert "<img" not in page
