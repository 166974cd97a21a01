"""Parameters of a notebook are found, checked and split by experiment, with and without IPython's history."""

import pytest

from qlora_helpers import notebook
from qlora_helpers.errors import UserError

OURS = """# Parameters
profile: str = "cpu"  # size of machine
n_samples: int | None = None  # rows
n_samples_1: int | None = 4  # rows of experiment 1
n_samples_2: int | None = 8  # rows of experiment 2
workdir: str | None = None  # folder
"""


def namespace(tmp_path, *cells, history=True):
    """Return what `globals()` is in a kernel after these cells."""
    names = {"workdir_of_the_test": tmp_path}
    for cell in cells:
        exec(cell, names)
    return names | ({"In": ["", *cells]} if history else {"In": [""]})


@pytest.mark.parametrize("history", [True, False])
def test_our_cell_is_found(tmp_path, history):
    ours = OURS.split("n_samples_1")[0].replace("= None", "= 7") + "workdir: str | None = None  # folder\n"
    cells = [ours, f"workdir = {str(tmp_path)!r}"]
    setup = notebook.resolve(namespace(tmp_path, *cells, history=history))
    assert (setup.config.n_samples, setup.folder) == (7, tmp_path)


@pytest.mark.parametrize(("experiment", "rows"), [(1, 4), (2, 8)])
def test_experiments_have_their_own(tmp_path, experiment, rows):
    injected = f"# Parameters\nworkdir = {str(tmp_path)!r}\nlearning_rate = 0.001"
    setup = notebook.resolve(namespace(tmp_path, OURS, injected), experiment)
    assert (setup.config.n_samples, setup.config.learning_rate) == (rows, 0.001)


def test_an_injected_name_that_does_not_exist_names_the_nearest(tmp_path):
    injected = f"# Parameters\nworkdir = {str(tmp_path)!r}\nn_sampels = 3"
    with pytest.raises(UserError, match="Did you mean 'n_samples'"):
        notebook.resolve(namespace(tmp_path, OURS, injected), 1)


def test_other_variables_are_not_parameters(tmp_path):
    own = notebook.resolve(namespace(tmp_path, OURS, f"workdir = {str(tmp_path)!r}", "threshold = 3"), 1)
    assert own.config.n_samples == 4


def test_missing_parameters_are_an_error(tmp_path):
    with pytest.raises(UserError, match="none found"):
        notebook.resolve(namespace(tmp_path, "x = 1"))


def test_a_notebook_may_have_lists_that_are_not_settings(tmp_path):
    cells = [OURS, f"# Parameters\nworkdir = {str(tmp_path)!r}\nranks = [4, 8]"]
    assert notebook.resolve(namespace(tmp_path, *cells), 1, apart=["ranks"]).config.n_samples == 4
    with pytest.raises(UserError, match="unknown parameter 'ranks'"):
        notebook.resolve(namespace(tmp_path, *cells), 1)


@pytest.mark.parametrize(
    ("kind", "value", "right"),
    [
        ("bool", "'no'", False),
        ("bool", "False", True),
        ('"Optional[str]"', "5", False),
        ('"Optional[str]"', "None", True),
    ],
)
def test_a_parameter_that_is_not_a_setting_is_checked_for_its_type(tmp_path, kind, value, right):
    ours = f"{OURS}mine: {kind} = None  # of the notebook\n"
    cells = namespace(tmp_path, ours, f"# Parameters\nworkdir = {str(tmp_path)!r}\nmine = {value}")
    with pytest.raises(UserError, match="unknown parameter 'mine'"):
        notebook.resolve(cells | {"mine": "x"}, 1)
    if right:
        assert notebook.resolve(cells, 1, apart=["mine"]).config.n_samples == 4
    else:
        with pytest.raises(UserError, match="mine: expected"):
            notebook.resolve(cells, 1, apart=["mine"])


def test_a_text_is_shown_as_it_stands():
    page = notebook.texts([{"prompt": "<b>x</b>\ny", "answer": None}], ["prompt", "answer"]).to_html()
    assert "&lt;b&gt;x&lt;/b&gt;\ny" in page
    assert "–" in page
    assert "pre-wrap" in page
