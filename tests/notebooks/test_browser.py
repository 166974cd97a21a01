"""Notebooks in JupyterLab in a real Chromium, with live widgets. Needs requirements-full.txt."""

import importlib.util
import os
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

MISSING = [name for name in ("jupyterlab", "playwright") if importlib.util.find_spec(name) is None]
ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("walk", ROOT / "tooling" / "walk.py")
walk = importlib.util.module_from_spec(spec)
spec.loader.exec_module(walk)
PICTURES = os.environ.get("QLORA_PICTURES")  # a folder for the pictures of docs/, and finished runs: `make pictures`
RUNS = os.environ.get("QLORA_PICTURED_RUNS", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} missing: pip install -r requirements-full.txt"),
    pytest.mark.skipif(walk.BROWSER is None, reason=f"no browser on PATH: none of {', '.join(walk.BROWSERS)}"),
]

PICKER = """
from qlora_helpers.chat import side_by_side
nasty = "<script>document.title = 'broken out'</script><b class='nasty'>bold</b> & $x$"
entries = [{"prompt": f"Question {n}?", "base": f"plain {n}", "exp1": nasty} for n in range(10)]
side_by_side.show(entries)
"""
TRAINING = """
from pathlib import Path
from qlora_helpers import Config, runs
from qlora_helpers.data import cleaning
from qlora_helpers.models import hub
from qlora_helpers.training import callbacks, trainer
config = Config.from_params(
    profile="cpu", model=MODEL, n_samples=16, n_heldout=6, max_length=64, learning_rate=0.01, max_new_tokens=8
)
tokenizer = hub.load_tokenizer(config)
data = cleaning.prepare(config, tokenizer)
run = runs.RunFolder(Path("run").absolute())
run = trainer.train(config, data, tokenizer, run, callbacks=[callbacks.LiveLoss(run)])
"""
CHAT = """
from pathlib import Path
from qlora_helpers.chat import panel, side_by_side
from qlora_helpers.runs import RunFolder
loaded = side_by_side.load({"exp1": [RunFolder(Path(RUN))]})
panel.show(loaded, ["What is <b class='nasty'>rain</b>?"], new_tokens=400)
"""
RECORDED = """
from qlora_helpers import notebook
from qlora_helpers.chat import side_by_side
side_by_side.show([{"prompt": prompt, **answers} for prompt, answers in notebook.recorded_answers().items()])
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A separate JupyterLab on a free port. Yields its folder, and a URL template with the token."""
    with walk.serve(tmp_path_factory.mktemp("lab")) as served:
        yield served


@pytest.fixture(scope="module")
def browser():
    with walk.browse() as opened:
        yield opened


@contextmanager
def running(lab, browser, name, code, width=1000):
    """Open a notebook with one cell, run it as a person would, and yield the page."""
    folder, address = lab
    kernel = {"name": "python3", "display_name": "Python 3"}  # without it, JupyterLab asks for a kernel
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(code.strip())], metadata={"kernelspec": kernel}
    )
    nbformat.write(notebook, folder / f"{name}.ipynb")
    page = browser.new_page(viewport={"width": width, "height": 1400})
    page.set_default_timeout(walk.SECONDS * 1000)
    try:
        page.goto(address.format(f"{name}.ipynb"))
        walk.run_all(page)
        yield page
    finally:
        page.close()


def test_selecting_a_question_shows_its_answers(lab, browser):
    with running(lab, browser, "picker", PICKER) as page:
        choice, answers = page.locator(".jp-OutputArea select"), page.locator(".jp-OutputArea table")
        choice.wait_for()
        assert choice.locator("option").count() == 10
        assert "plain 0" in answers.inner_text()
        choice.select_option(index=7)
        page.get_by_text("plain 7").wait_for()
        assert answers.count() == 1  # the picker, without the table of stored notebooks
        assert "plain 0" not in answers.inner_text()
        assert "<b class='nasty'>bold</b> & $x$" in answers.inner_text()
        assert page.locator(".nasty").count() == 0
        assert page.title() != "broken out"


def test_an_error_of_a_cell_is_found(lab, browser):
    """What decides the exit code of `tooling/walk.py --run`."""
    with running(lab, browser, "error", "1 / 0") as page:
        page.get_by_text("[1]:", exact=True).first.wait_for()
        assert walk.errors(page) == ["ZeroDivisionError: division by zero"]


def test_training_shows_one_progress_bar_and_one_figure(lab, browser, model_folder):
    """Both are updated in place, and nothing else is printed: no warnings, no line per step."""
    code = TRAINING.replace("MODEL", repr(str(model_folder)))
    with running(lab, browser, "training", code) as page:
        page.get_by_text("step 4 of 4").wait_for()
        page.get_by_text("[1]:", exact=True).first.wait_for()  # the cell has finished
        assert page.locator(".jp-OutputArea progress").count() == 1
        assert page.locator(".jp-OutputArea progress").evaluate("bar => bar.value / bar.max") == 1
        assert page.locator(".jp-OutputArea img").count() == 1
        assert page.locator(".jp-OutputArea [data-mime-type*=stderr]").all_inner_texts() == []


def test_chat_is_stopped_and_cleared_midway(lab, browser, make_run):
    with running(lab, browser, "chat", CHAT.replace("RUN", repr(str(make_run().path)))) as page:
        answers = page.locator(".jp-OutputArea .tex2jax_ignore")
        send, stop = (page.get_by_role("button", name=name) for name in ("Send", "Stop"))
        idle, growing = page.get_by_text("Write a question and send it."), page.get_by_text("The answers grow …")
        send.click()
        growing.wait_for()
        stop.click()
        idle.wait_for()
        texts = answers.all_inner_texts()
        assert len(texts) == 2
        assert all("What is <b class='nasty'>rain</b>?" in text for text in texts)
        page.wait_for_timeout(1000)
        assert answers.all_inner_texts() == texts
        page.get_by_placeholder("your question").fill("And snow?")
        send.click()
        growing.wait_for()
        assert all("And snow?" in text for text in answers.all_inner_texts())
        page.get_by_role("button", name="Clear").click()
        idle.wait_for()
        page.wait_for_timeout(1000)
        assert [text.strip() for text in answers.all_inner_texts()] == ["base", "exp1"]
        assert page.get_by_text("error:").count() == 0
        assert page.locator(".nasty").count() == 0
        assert page.locator(".jp-OutputArea [data-mime-type*=stderr]").all_inner_texts() == []


@pytest.mark.skipif(not PICTURES, reason="make pictures")
def test_pictures_of_widgets_for_the_docs(lab, browser):
    """What the widgets look like, with the bundled model and the runs of `make run`."""

    def picture(page, name):
        assert walk.errors(page) == []
        page.locator(".jp-Cell-outputArea").last.screenshot(path=Path(PICTURES) / f"{name}.png")

    question = "What is the capital of France?"
    code = CHAT.replace("RUN", repr(RUNS)).replace("What is <b class='nasty'>rain</b>?", question).replace("400", "40")
    with running(lab, browser, "docs-chat", code, 800) as page:
        page.get_by_role("button", name="Send").click()
        page.get_by_text("The answers grow …").wait_for()
        page.get_by_text("Write a question and send it.").wait_for()
        picture(page, "chat")
    with running(lab, browser, "docs-picker", RECORDED, 800) as page:
        page.locator(".jp-OutputArea select").wait_for()
        picture(page, "picker")
    code = TRAINING.replace("MODEL", repr("smollm2-135m-instruct")).replace("learning_rate=0.01", "epochs=3")
    code = code.replace('"run"', '"exp1"')  # another folder than that of the test above
    with running(lab, browser, "docs-training", code, 800) as page:
        page.set_default_timeout(600_000)
        page.get_by_text("[1]:", exact=True).first.wait_for()
        picture(page, "live_plot")
