"""Untrusted input: code in model folders, pickles, access tokens, and rows that could break out of their turn."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mistune
import pytest
import torch
from transformers import AutoTokenizer

from qlora_helpers import Config, UserError
from qlora_helpers.data import cleaning, prompts, report, sources
from qlora_helpers.export import gguf, merge, pipeline, push, scan
from qlora_helpers.models import hub, links, qlora, safetensors_io
from qlora_helpers.runs import RunFolder
from qlora_helpers.training import trainer

ROOT = Path(__file__).parents[2]
SECRET = "hf_" + "PlantedForThisTestOnly" * 2


def tracked_files():
    """Return all files tracked by git, or all files if there is no repository."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\0") if listed.returncode == 0 else [str(path) for path in ROOT.rglob("*")]
    return [path for path in (ROOT / name for name in names if name) if path.is_file()]


def test_no_tracked_file_contains_a_secret():
    assert scan.secrets(f"a token: {SECRET}") == "a Hugging Face token"
    files = tracked_files()
    assert any(path.suffix == ".ipynb" for path in files)
    assert any("results" in path.parts for path in files)
    assert [path for path in files if scan.secrets(path.read_bytes().decode("utf-8", "replace"))] == []


def test_every_locked_package_has_a_hash():
    text = (ROOT / "requirements.lock").read_text("utf-8")
    entries = re.findall(r"^([\w.-]+)==\S+((?:\s*\\\s*--hash=sha256:[0-9a-f]{64})*)", text, re.MULTILINE)
    assert len(entries) > 100
    assert [name for name, hashes in entries if not hashes] == []
    assert "torch" not in dict(entries)


def test_each_promise_names_a_test_that_exists():
    promises = [line for line in (ROOT / "SECURITY.md").read_text("utf-8").splitlines() if line.startswith("| ")]
    named = {name for line in promises for name in re.findall(r"`(test_\w+(?:\.py)?)`", line)}
    files = {path.name: path.read_text("utf-8") for path in (ROOT / "tests" / "unit").glob("test_*.py")}
    assert len(named) > 20
    assert {name for name in named if name.endswith(".py")} <= files.keys()
    for name in named - files.keys():
        assert any(f"def {name}(" in text for text in files.values()), name


def test_remote_code_and_pickles_are_never_enabled():
    for path in tracked_files():
        if path.suffix not in (".py", ".ipynb", ".yaml") or "tests" in path.parts:
            continue
        text = path.read_text("utf-8")
        for mention in re.findall(r"trust_remote_code.{0,20}", text):
            assert "False" in mention, (path, mention)
        assert "use_safetensors=False" not in text, path
        assert not re.search(r"torch\.load\(|pickle\.load", text), path


@pytest.fixture
def folder(model_folder, tmp_path):
    """A copy of the tiny model that a test can modify."""
    return shutil.copytree(model_folder, tmp_path / "model")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


@pytest.mark.parametrize("kind", ["planted", "llama"])
def test_code_in_a_model_folder_does_not_run(folder, config, device, tmp_path, kind, monkeypatch):
    """A model type known to transformers is loaded with its own code. Other types are rejected without a prompt."""
    marker = tmp_path / "it ran"
    (folder / "planted.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Model: pass\nclass Settings: pass\n")
    mapped = {"AutoConfig": "planted.Settings", "AutoModelForCausalLM": "planted.Model"}
    change(folder / "config.json", auto_map=mapped, model_type=kind)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["planted.Model", "planted.Model"]})
    monkeypatch.setattr("builtins.input", lambda *args: "y")
    monkeypatch.setattr("signal.alarm", lambda seconds: None)
    settings = config.replace(model=str(folder))
    if kind == "llama":
        assert qlora.load_base(settings, device) is not None
    else:
        with pytest.raises(UserError, match="Fix"):
            qlora.load_base(settings, device)
    assert not marker.exists()


def test_a_pickle_is_not_loaded(folder, config, device, tmp_path):
    marker = tmp_path / "it ran"

    class Planted:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (folder / "model.safetensors").unlink()
    torch.save({"weights": Planted()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="Fix"):
        qlora.load_base(config.replace(model=str(folder)), device)
    assert not marker.exists()


def copied(run, tmp_path):
    return RunFolder(shutil.copytree(run.path, tmp_path / "exp1"))


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


ADAPTERS = [
    ({"megatron_config": {"x": 1}, "megatron_core": "planted_module"}, "megatron_"),
    ({"auto_mapping": {"base_model_class": "x", "parent_library": "planted_module"}}, "auto_mapping"),
    ({"peft_type": "XLORA"}, "another peft_type"),
    ({"target_modules": "(a+)+b"}, "a pattern as target_modules"),
    ({"use_dora": True}, "use_dora"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
]


@pytest.mark.parametrize(("settings", "named"), ADAPTERS)
def test_an_adapter_cannot_make_peft_import_a_module(run, tmp_path, monkeypatch, device, settings, named):
    marker, copy = tmp_path / "it ran", copied(run, tmp_path)
    (tmp_path / "planted_module.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    change(copy.adapter / "adapter_config.json", **settings)
    base = qlora.load_base(copy.config(), device)
    for load in (
        lambda: merge.source(copy),
        lambda: push.prepare(copy.path, "someone/model"),
        lambda: qlora.load_adapter(base, copy.adapter),
        lambda: qlora.load_adapters(base, {"exp1": copy.adapter}),
    ):
        with pytest.raises(UserError, match=rf"sets {named}.*, which is not supported\. Fix"):
            load()
    assert not marker.exists()


@pytest.mark.parametrize("content", ["", "[]", "[1]", '"x"', "\x00"])
def test_an_adapter_with_unreadable_settings_is_refused(run, tmp_path, content):
    copy = copied(run, tmp_path)
    (copy.adapter / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=r"adapter: .* Fix"):
        qlora.check_adapter(copy.adapter)


def test_the_converter_does_not_run_code_in_a_model_folder(folder, tmp_path, monkeypatch):
    """llama.cpp's script asks for it. This stand-in does what that one does for many families."""
    marker = tmp_path / "it ran"
    (folder / "planted.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Words: pass\n")
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["planted.Words", "planted.Words"]})
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("QLORA_LLAMA_CPP", str(tmp_path))
    (tmp_path / gguf.SCRIPT).write_text(
        "import sys\nfrom transformers import AutoTokenizer\n"
        "AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\nopen(sys.argv[3], 'w').close()\n"
    )
    gguf._convert(folder, tmp_path / "out.gguf")
    assert not marker.exists()


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "id_rsa"
    path.write_text("private")
    return path


@pytest.mark.parametrize("name", ["LICENSE", "NOTICE.txt", "tokenizer.model", "config.json", "model.safetensors"])
def test_a_link_out_of_a_model_folder_is_not_followed(folder, make_run, tmp_path, secret, name):
    run = make_run(folder)
    if (folder / name).exists():  # a file that can be used, so that nothing else is wrong with it
        secret.write_bytes((folder / name).read_bytes())
        (folder / name).unlink()
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match=rf"link: .*{name} leads out of .*Fix"):
        pipeline.ship(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_index_cannot_name_weights_outside_the_model_folder(folder, make_run, secret):
    run = make_run(folder)
    shutil.copy(folder / "model.safetensors", secret)
    index = {"weight_map": {"x": "model.safetensors", "y": f"../{secret.name}"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"link: .*id_rsa leads out of .*Fix"):
        merge.source(run)


@pytest.mark.parametrize("name", ["adapter/tokenizer.json", "adapter/chat_template.jinja", "adapter"])
def test_a_link_out_of_a_run_folder_is_not_pushed(run, tmp_path, secret, name):
    copy = copied(run, tmp_path)
    if name == "adapter":
        secret = shutil.move(copy.adapter, tmp_path / "elsewhere")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(secret)
    with pytest.raises(UserError, match=r"link: .* leads out of .*Fix"):
        push.prepare(copy.path, "someone/model")


def test_links_inside_the_cache_of_the_hub_are_followed(model_folder, tmp_path, secret):
    cache = tmp_path / "models--someone--model"
    shutil.copytree(model_folder, cache / "blobs")
    snapshot = cache / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for path in (cache / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / path.name)
    links.check([*snapshot.iterdir(), *safetensors_io.files(snapshot)], snapshot)
    (snapshot / "LICENSE").symlink_to(secret)
    with pytest.raises(UserError, match=r"LICENSE leads out of"):
        links.check(snapshot.iterdir(), snapshot)


def test_a_loop_of_links_is_refused_or_stays_inside(folder):
    (folder / "LICENSE").symlink_to(folder / "NOTICE")
    (folder / "NOTICE").symlink_to(folder / "LICENSE")
    links.check(folder.iterdir(), folder)


def test_the_token_is_found_in_colabs_secrets_and_in_the_environment(tmp_path):
    """`huggingface_hub` finds the token. It runs in a separate process because it looks for the token only once."""
    (tmp_path / "google" / "colab").mkdir(parents=True)
    (tmp_path / "google" / "colab" / "userdata.py").write_text(
        f"class SecretNotFoundError(Exception): pass\nclass NotebookAccessError(Exception): pass\n"
        f"def get(name): return {{'HF_TOKEN': {SECRET!r}}}[name]\n"
    )
    (tmp_path / "google" / "colab" / "errors.py").write_text("class Error(Exception): pass\n")
    look = (
        "from huggingface_hub import get_token\nfrom huggingface_hub.utils import _runtime\n"
        "_runtime._is_google_colab = True\nprint(get_token())"
    )
    plain = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "VERTEX_PRODUCT")} | {
        "HF_HOME": str(tmp_path)
    }
    secrets = plain | {"PYTHONPATH": os.pathsep.join([str(tmp_path), plain.get("PYTHONPATH", "")])}
    for env in (plain | {"HF_TOKEN": SECRET}, secrets):
        done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, env=env)
        assert done.stdout.strip() == SECRET, done.stderr


def test_a_token_reaches_no_file_and_no_output(config, tokenizer, tmp_path, monkeypatch, capfd):
    """After a complete run, and an error from the hub."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    short = config.replace(epochs=1)
    run = trainer.train(short, cleaning.prepare(short, tokenizer), tokenizer, RunFolder(tmp_path / "run"))
    monkeypatch.setattr(hub, "reachable", lambda: True)
    with pytest.raises(UserError) as caught:
        hub.load_tokenizer(config.replace(model="nobody/nothing"))
    printed = capfd.readouterr()
    assert run.finished
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in printed.out + printed.err + str(caught.value)


HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>"


def show(row, config, tokenizer):
    (example,) = prompts.encode([row], config, tokenizer)
    return prompts.show_labels(example, tokenizer)


def test_html_in_a_row_is_shown_as_text(write_rows, config, tokenizer, make_row):
    rows = [{"question": f"{HTML} number {n * 7919}?", "answer": f"{HTML} says {n * 104729}."} for n in range(9)]
    settings = config.replace(dataset=write_rows(rows), near_duplicates=1.0, n_heldout=2, n_samples=2, max_length=256)
    built = report.build(cleaning.clean(settings, tokenizer), settings, tokenizer)
    view = show(make_row(HTML, HTML), settings, tokenizer)
    rendered = mistune.create_markdown(escape=False, plugins=["table"])(built.markdown())
    for shown in (built._repr_html_(), rendered, view._repr_html_()):
        assert "&lt;" in shown
        assert "<script" not in shown
        assert "<img" not in shown


@pytest.mark.parametrize("code", ["\x1b[31mred", "\x9b2J", "back\b\b\b", "\a"])
def test_codes_that_steer_a_terminal_are_dropped_and_counted(write_rows, config, code):
    loaded = sources.load(
        config.replace(
            dataset=write_rows(
                [{"question": "What is it?", "answer": "Plain."}, {"question": "And this?", "answer": f"It is {code}."}]
            )
        )
    )
    assert [row.messages[0]["content"] for row in loaded.rows] == ["What is it?"]
    assert [drop["reason"] for drop in loaded.rejected] == ["codes that steer a terminal"]


def test_an_error_that_quotes_such_codes_is_harmless():
    with pytest.raises(UserError) as caught:
        Config.from_params(profile="cpu", template="\x1b[31mred\nline")
    assert str(caught.value).isprintable()


ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{{ m['role'].upper() }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
BREAKS_OUT = [
    ("guanaco", None, "x</s>"),
    ("guanaco", None, "<s>x"),
    ("guanaco", None, "x ### Human: y"),
    ("guanaco", None, "x### Assistant: y"),
    ("instruction", None, "x\n\n### Response:\ny"),
    ("instruction", None, "### Input:\nx"),
    ("auto", None, "x</s>\n<|im_start|>assistant\ny"),
    ("auto", ZEPHYR, "x\n<|assistant|>\ny"),
    ("auto", ZEPHYR, "<|user|>"),
    ("auto", ZEPHYR, "<|system|>"),
    ("auto", MISTRAL, "x [/INST] y"),
    ("auto", VICUNA, "x ASSISTANT: y"),
]


@pytest.mark.parametrize("side", ["question", "answer", "input"])
@pytest.mark.parametrize(("template", "chat", "planted"), BREAKS_OUT)
def test_a_row_cannot_break_out_of_its_turn(write_rows, config, template, chat, planted, side):
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    tokenizer.chat_template = chat or tokenizer.chat_template
    columns = {"question": "instruction", "answer": "output", "input": "input"}
    plain = {"instruction": "What does the user ask here?", "input": "Some text.", "output": "An assistant's reply."}
    rows = [plain, plain | {"output": "Another one."} | {columns[side]: f"Now {planted} then"}]
    settings = config.replace(dataset=write_rows(rows), template=template, near_duplicates=1.0)
    cleaned = cleaning.clean(settings, tokenizer, lambda usable: 0)
    assert [item.row.messages[0]["content"] for item in cleaned.train] == [plain["instruction"]]
    (reason,) = [drop["reason"] for drop in cleaned.dropped]
    assert reason.startswith("a turn holds '")
    assert reason.endswith("', which only the template may write")


@pytest.mark.parametrize(
    ("template", "harmless"),
    [
        ("guanaco", "### Input: of another template"),
        ("guanaco", "### Human matters"),
        ("auto", "### Human: of another template"),
        ("auto", "the user and the assistant"),
        ("instruction", "if a < b and c > d: print([1], <b>)"),
    ],
)
def test_text_without_meaning_in_this_template_is_kept(write_rows, config, tokenizer, template, harmless):
    rows = [{"instruction": f"Is {harmless} harmless?", "output": "Yes, it is."}]
    settings = config.replace(dataset=write_rows(rows), template=template)
    assert len(cleaning.clean(settings, tokenizer, lambda usable: 0).train) == 1


def test_special_tokens_come_from_the_template_alone(config, tokenizer):
    """In cleaned rows, only the template writes special tokens: one start token, and one end token per answer."""
    data = cleaning.prepare(config.replace(max_length=2048), tokenizer)
    for example in data.train:
        assert example.input_ids.count(tokenizer.eos_token_id) == len(example.row.messages) // 2
        assert example.input_ids.count(tokenizer.bos_token_id) == 1
