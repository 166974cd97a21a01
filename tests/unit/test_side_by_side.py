"""Adapters switched on one base model answer as each does alone. People get a picker, stored notebooks a table."""

import re
from html.parser import HTMLParser
from types import SimpleNamespace

import nbformat
import papermill
import pytest
import torch

from qlora_helpers import UserError
from qlora_helpers.chat import side_by_side
from qlora_helpers.device import detect
from qlora_helpers.evaluation import answers
from qlora_helpers.experiments import matrix
from qlora_helpers.models import qlora

NASTY = "<script>alert('x')</script>\n<b>bold</b> & $x$"
ENTRIES = [{"prompt": f"Question {n}?", "base": f"plain {n}", "exp1": NASTY} for n in range(10)]


@pytest.fixture(scope="module")
def experiments(config, tmp_path_factory):
    """Two experiments on one base with different ranks and layers; the second uses the model's own chat template."""
    small = config.replace(n_samples=8, n_heldout=4, n_answers=1)
    wide = small.replace(rank=8, alpha=64, target_modules=["all-linear"], template="auto")
    folder = tmp_path_factory.mktemp("runs")
    return matrix.train_missing(matrix.plan_runs({"exp1": small, "exp2, wide": wide}, folder))


@pytest.fixture(scope="module", params=["nf4", "none"])
def parts(request, config, experiments, tokenizer):
    """The base model, the same base with every adapter loaded, and a function that computes logits."""
    own, device = config.replace(quantization=request.param), detect(config.compute_dtype)
    paths = {name: group[0].adapter for name, group in experiments.items()}
    ids = tokenizer(["How do computers store data?"], return_tensors="pt")["input_ids"]
    return SimpleNamespace(
        load=lambda: qlora.load_base(own, device),
        adapters=qlora.load_adapters(qlora.load_base(own, device), paths),
        paths=paths,
        logits=lambda built: torch.inference_mode()(lambda: built(input_ids=ids).logits)(),
    )


def test_switched_adapter_equals_that_adapter_alone(parts):
    """Bit by bit, in any order; without an adapter, the base model is restored."""
    alone = {name: parts.logits(qlora.load_adapter(parts.load(), path)) for name, path in parts.paths.items()}
    alone[None] = parts.logits(parts.load())
    assert len({tensor.sum().item() for tensor in alone.values()}) == 3
    for name in ("exp1", None, "exp2, wide", "exp1", None, None, "exp2, wide"):
        with parts.adapters.use(name) as switched:
            assert torch.equal(parts.logits(switched), alone[name]), name


def test_only_one_base_model_is_in_memory(parts):
    def weights(built):
        every = {p.data_ptr(): p.nbytes for name, p in built.named_parameters() if ".lora_" not in name}
        return sum(every.values())

    assert weights(parts.adapters.model) == weights(parts.load())
    assert len({name.split(".")[-2] for name, _ in parts.adapters.model.named_parameters() if ".lora_A." in name}) == 2


def test_adapter_with_trained_biases_is_refused(config, device, tmp_path):
    built = qlora.attach_lora(qlora.load_base(config, device), config.replace(bias="lora_only"))
    built.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bias=lora_only"):
        qlora.load_adapters(None, {"exp1": tmp_path})
    with pytest.raises(UserError, match="holds none"):
        qlora.load_adapters(None, {"exp1": tmp_path / "no"})


def test_all_models_answer_a_question(experiments, tokenizer, monkeypatch):
    """Each answers as it does alone, in the prompt format of its training; the base model is loaded once."""
    loads = []
    monkeypatch.setattr(qlora, "load_base", lambda *a, load=qlora.load_base: loads.append(1) or load(*a))
    prompts = ["What is rain?", "Why?"]
    entries = side_by_side.ask(prompts, experiments)
    assert len(loads) == 1
    assert [list(entry) for entry in entries] == [["prompt", "base", "exp1", "exp2, wide"]] * 2
    for name, group in experiments.items():
        config = group[0].config()
        device = detect(config.compute_dtype)
        alone = qlora.load_adapter(qlora.load_base(config, device), group[0].adapter)
        questions = [{"prompt": prompt, "reference": None} for prompt in prompts]
        want = [a["answer"] for a in answers.generate(alone, tokenizer, config, device, questions)]
        assert [entry[name] for entry in entries] == want
    assert len({entries[0][name] for name in ("base", "exp1", "exp2, wide")}) == 3


def test_runs_of_different_base_models_are_refused(experiments, config, tmp_path):
    other = matrix.train_missing(
        matrix.plan_runs({"plain": config.replace(quantization="none", n_samples=4, n_heldout=4)}, tmp_path)
    )
    with pytest.raises(UserError, match="plain and exp1 have different base models"):
        side_by_side.ask(["Why?"], {"exp1": experiments["exp1"], **other})


class Seen(HTMLParser):
    """The tags and the text of an HTML page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_table_escapes_texts():
    table = side_by_side.show(ENTRIES)
    seen = Seen(table._repr_html_())
    assert set(seen.tags) == {"table", "tr", "th", "td", "i", "br", "p"}
    assert "<script>alert('x')</script>" in seen.text
    assert seen.text.count("plain") == seen.text.count("Question") == side_by_side.SHOWN
    assert "and 2 more" in seen.text
    assert "and 2 more" in repr(table)
    assert " more:" not in repr(side_by_side.show(ENTRIES[:8]))
    assert "(empty)" in side_by_side.show([{"prompt": "?", "base": ""}])._repr_html_()


CODE = """
from qlora_helpers.chat import side_by_side
shown = side_by_side.show([{"prompt": "One <i>?", "base": "<b>a"}, {"prompt": "Two?", "base": "b"}])
shown
"""


def results(messages):
    return [m["content"]["data"] for m in messages if m["msg_type"] == "execute_result"]


def test_person_gets_a_picker(kernel):
    """A real kernel with the installed version of ipywidgets sends the answers to the selected question."""
    messages = kernel(CODE, person=True)
    (data,) = results(messages)
    opened = {m["content"]["comm_id"]: m["content"]["data"] for m in messages if m["msg_type"] == "comm_open"}
    assert data[side_by_side.WIDGET]["model_id"] in opened
    assert "<table" in data["text/html"]  # for readers of the stored notebook
    models = [state["state"] for state in opened.values()]
    (choice,) = (state for state in models if state["_model_name"] == "DropdownModel")
    assert choice["_options_labels"] == ["1. One <i>?", "2. Two?"]
    moved = kernel("shown.choice.value = 1", person=True)
    pages = [m["content"]["data"]["state"].get("value", "") for m in moved if m["msg_type"] == "comm_msg"]
    assert [Seen(page).text for page in pages if page] == ["Two?baseb"]
    first = kernel("shown.choice.value = 0; print(shown.shown.value)", person=True)
    (page,) = (m["content"]["text"] for m in first if m["msg_type"] == "stream")
    assert "&lt;b&gt;a" in page
    assert "b" not in Seen(page).tags


def test_notebook_without_a_person_gets_a_table_without_widgets(kernel):
    messages = kernel(CODE, person=False)
    (data,) = results(messages)
    assert set(data) == {"text/html", "text/plain"}
    assert not [m for m in messages if m["msg_type"].startswith("comm")]


def test_papermill_stores_a_table_without_widget_state(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    nbformat.write(notebook, tmp_path / "in.ipynb")
    papermill.execute_notebook(tmp_path / "in.ipynb", tmp_path / "out.ipynb", kernel_name="python3", progress_bar=False)
    stored = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    (output,) = stored.cells[0].outputs
    assert set(output.data) == {"text/html", "text/plain"}
    assert "widgets" not in stored.metadata
    assert not re.search("widget-view", (tmp_path / "out.ipynb").read_text())


def test_colab_gets_no_html_beside_the_widget(monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    assert set(side_by_side.Picker(ENTRIES)._repr_mimebundle_()) == {side_by_side.WIDGET, "text/plain"}
