"""A notebook's parameters are found, checked and split by experiment; its settings are shown; files come and go."""

import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qlora_helpers import device, files, notebook
from qlora_helpers.config import Config
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation import comparison

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
    page = notebook.texts([{"prompt": "<b>x</b>\ny", "answer": None}], ["prompt", "answer"]).data
    assert "&lt;b&gt;x&lt;/b&gt;<br>y</td>" in page
    assert ">–</td>" in page
    assert "<style" not in page  # JupyterLab ignores it in a notebook that others have executed
    assert page.count("text-align: left") == 4
    assert "<wbr>" not in page
    assert f"{'f' * 9}<wbr>{'f' * 9}<wbr>ff" in notebook.texts([{"commit": "f" * 20}]).data
    assert ">max_<wbr>new_<wbr>tokens</td>" in notebook.texts([{"setting": "max_new_tokens"}]).data
    assert "&lt;package.<wbr>" in notebook.texts([{"name": "<package.a_module_with_a_long_name"}]).data


def test_a_deleted_line_puts_its_value_back_to_the_default(tmp_path):
    """The names of deleted lines stay in the kernel, with their values and annotations."""
    where = f"workdir: str = {str(tmp_path)!r}  # folder\n"
    first, second = (f'# Parameters\nprofile: str = "cpu"\n{line}{where}' for line in ("n_samples: int = 7\n", ""))
    assert notebook.resolve(namespace(tmp_path, first)).config.n_samples == 7
    default = Config.from_params(profile="cpu").n_samples
    assert notebook.resolve(namespace(tmp_path, first, second)).config.n_samples == default != 7


def test_only_what_was_injected_after_the_newest_cell_counts(tmp_path):
    own = f'# Parameters\nprofile: str = "cpu"\nworkdir: str = {str(tmp_path)!r}\n'
    old, new = "# Parameters\nrank = 3\nalpha = 5\n", "# Parameters\nrank = 9\n"
    after = notebook.resolve(namespace(tmp_path, own, old, new)).config
    assert (after.rank, after.alpha) == (9, Config().alpha)
    assert notebook.resolve(namespace(tmp_path, own, old, own)).config.rank == Config().rank


@given(st.text())
@example("def (")
@example("x: int = 1\n\0")
def test_a_cell_that_could_not_run_changes_nothing(text):
    cells = ['# Parameters\nprofile: str = "cpu"\nrank: int = 3', f"# Parameters\n({text}"]
    assert notebook._parameters({"In": cells, "profile": "cpu", "rank": 3}).keys() >= {"profile", "rank"}


def test_an_empty_field_of_a_form_leaves_the_setting_to_the_preset(tmp_path):
    own = f'# Parameters\nprofile: str = "cpu"\nmodel: str = ""\nworkdir: str = {str(tmp_path)!r}\n'
    assert notebook.resolve(namespace(tmp_path, own)).config == Config.from_params(profile="cpu")


def test_a_setup_shows_what_differs_from_the_preset_and_folds_the_rest(tmp_path):
    config = Config.from_params(profile="cpu", rank=3, model="<b>mine</b>")
    shown = notebook.Setup(config, tmp_path, None)
    text, page = repr(shown), shown._repr_html_()
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["rank"].endswith("3 instead of 16 (cell)")
    assert lines["n_heldout"].endswith("16 instead of 100 (profile)")
    assert "alpha" not in lines
    assert "&lt;b&gt;mine&lt;/b&gt;" in page
    assert "<b>mine" not in page
    shown_first, folded = page.split("<details>")
    assert "alpha" not in shown_first
    assert "alpha" in folded


def test_a_commit_is_shown_by_its_first_digits_and_whole_among_all_settings(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    shown = notebook.Setup(Config.from_params(profile="cpu", revision=commit), tmp_path, None)
    assert ("revision", "0123456789ab…") in {(name, value) for name, value, *_ in shown.changes}
    assert commit in shown._repr_html_().split("<details>")[1]


def test_the_published_preset_on_a_gpu_differs_in_what_the_profile_sets(tmp_path):
    shown = notebook.Setup(Config.preset("tinyllama-guanaco-100"), tmp_path, None)
    assert {by for *_, by in shown.changes} == {"profile"}
    assert "n_samples" not in {name for name, *_ in shown.changes}


@pytest.mark.parametrize(
    ("gpu", "profile", "stops"), [("cpu", "auto", True), ("t4", "auto", False), ("cpu", "cpu", False)]
)
def test_colab_without_a_gpu_says_how_to_get_one(tmp_path, monkeypatch, gpu, profile, stops):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    monkeypatch.setattr(device, "profile", lambda: gpu)
    own = f"# Parameters\nprofile: str = {profile!r}\nworkdir: str = {str(tmp_path)!r}\n"
    if stops:
        with pytest.raises(UserError, match=r"Runtime > Change runtime type > T4 GPU"):
            notebook.resolve(namespace(tmp_path, own))
    else:
        assert notebook.resolve(namespace(tmp_path, own)).config.profile == gpu


def test_an_upload_needs_a_person(tmp_path):
    with pytest.raises(UserError, match="dataset=FILE"):
        notebook.upload(str(tmp_path))


def item(version, name, content):
    """What `FileUpload.value` holds for a file, in ipywidgets 7 and 8."""
    return (
        {name: {"metadata": {"name": name}, "content": content}}
        if version == 7
        else ({"name": name, "content": content},)
    )


@pytest.mark.parametrize("version", [7, 8])
def test_an_uploaded_file_is_found_and_stays_in_its_folder(tmp_path, monkeypatch, version):
    monkeypatch.setattr(notebook, "is_interactive", lambda: True)
    buttons = []
    monkeypatch.setattr("IPython.display.display", buttons.append)
    with pytest.raises(UserError, match="no file yet"):
        notebook.upload(str(tmp_path))
    for handler in buttons[0]._trait_notifiers["value"]["change"]:
        if handler.__name__ == "store":
            handler({"new": item(version, "../../rows.jsonl", memoryview(b"{}"))})
    assert notebook.upload(str(tmp_path)) == str(tmp_path / "uploads" / "rows.jsonl")
    assert (tmp_path / "uploads" / "rows.jsonl").read_bytes() == b"{}"


def test_colab_stores_an_uploaded_file_and_offers_a_folder_as_a_zip(tmp_path, monkeypatch):
    offered = []
    browser = SimpleNamespace(upload=lambda: {"rows.csv": b"q,a\n"}, download=offered.append)
    colab = ModuleType("google.colab")
    colab.files = browser
    monkeypatch.setitem(sys.modules, "google", ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setattr(device, "on_colab", lambda: True)
    monkeypatch.setattr(notebook, "is_interactive", lambda: True)
    rows = notebook.upload(str(tmp_path))
    assert Path(rows).read_bytes() == b"q,a\n"
    adapter = tmp_path / "quickstart" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    notebook.download(adapter)
    assert offered == [str(tmp_path / "quickstart" / "quickstart-adapter.zip")]
    assert zipfile.ZipFile(offered[0]).namelist() == ["adapter_config.json"]


def test_the_recorded_study_is_there_and_its_absence_is_an_error(tmp_path, monkeypatch):
    read = comparison.read(notebook.recorded())
    assert all((notebook.recorded() / model.run / "log.jsonl").exists() for model in read.table if model.seeds)
    monkeypatch.setattr(files, "ROOT", tmp_path)
    with pytest.raises(UserError, match="not installed"):
        notebook.recorded()


def test_the_recorded_answers_are_the_beginnings_of_those_of_the_study():
    study = {entry["prompt"]: entry for entry in comparison.read(notebook.recorded()).answers}
    shown = notebook.recorded_answers()
    assert list(shown["How do computers store data?"]) == [
        "recorded: base",
        "recorded: 100 rows",
        "recorded: 1600 rows",
    ]
    for prompt, answers in shown.items():
        for name, text in answers.items():
            whole = " ".join(study[prompt][name.removeprefix("recorded: ")].split())
            assert whole.startswith(text.removesuffix(" …"))
            assert 200 < len(text) <= 300
