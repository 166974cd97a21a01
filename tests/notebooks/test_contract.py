"""What every notebook must be: short cells, one tagged parameters cell, the same bootstrap, outputs in order."""

import ast
import base64
import importlib.util
import re
from pathlib import Path

import nbformat
import papermill
import pytest

FOLDER = Path(__file__).parents[2] / "notebooks"
spec = importlib.util.spec_from_file_location("attach", FOLDER.parent / "tooling" / "attach_pictures.py")
attach_pictures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(attach_pictures)
PATHS = sorted(FOLDER.glob("*.ipynb"))
NOTEBOOKS = [pytest.param(nbformat.read(path, as_version=4), id=path.stem) for path in PATHS]
STORY_LINES = 15
ALONE, ALONE_LINES = "13_libraries_alone", 80  # the notebook without this package
# A field of a Colab form and what it is for. Colab documents the options; papermill takes the rest of the line as help.
FORM = re.compile(r'# @param (?:(?P<options>\[.+?\])(?: \{[^}]+\})?|\{type:"(?P<type>\w+)"[^}]*\})  # (?P<help>.+)')
TYPED = {"int": {"integer", "slider"}, "float": {"number", "slider"}, "bool": {"boolean"}, "str": {"string"}}


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters(notebook):
    tagged = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    return tagged[0].source


def test_the_series_is_there():
    numbers = [path.stem[:2] for path in PATHS]
    assert numbers[:12] == [f"{number:02}" for number in range(12)]
    assert len(set(numbers)) == len(numbers)
    assert PATHS[-1].stem == ALONE


def test_every_word_that_is_linked_is_in_the_glossary():
    words = set(re.findall(r"^#+ (.+)$", (FOLDER.parent / "docs" / "glossary.md").read_text("utf-8"), re.MULTILINE))
    anchors = {re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") for word in words}
    linked = {link for path in PATHS for link in re.findall(r"glossary\.md#([\w-]+)", path.read_text("utf-8"))}
    assert len(linked) > 10
    assert linked <= anchors


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_order_of_cells(notebook, request):
    kinds = [cell.cell_type for cell in notebook.cells[:5]]
    assert kinds == ["markdown", "markdown", "code", "markdown", "code"]
    assert notebook.cells[0].source.startswith(f"# {request.node.callspec.id[:2]} · ")
    assert "colab-badge" in notebook.cells[0].source
    for phrase in ("**You will see**", "**You need**", "**It writes**", " min"):
        assert phrase in notebook.cells[1].source
    assert "parameters" in notebook.cells[4].metadata.tags
    early = notebook.cells[5].source + notebook.cells[6].source
    assert ("notebook.resolve(globals()" in early) == (request.node.callspec.id != ALONE)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_colab_is_asked_for_a_t4(notebook):
    assert (notebook.metadata["accelerator"], notebook.metadata["colab"]["gpuType"]) == ("GPU", "T4")


def test_bootstrap_is_the_same_bytes_everywhere():
    assert len({parameter.values[0].cells[2].source for parameter in NOTEBOOKS}) == 1


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_badge_points_to_this_notebook_in_the_bootstraps_repository(notebook, request):
    repository = notebook.cells[2].source.split('REPOSITORY = "https://github.com/')[1].split('"')[0]
    name = request.node.callspec.id
    assert f"/github/{repository}/blob/main/notebooks/{name}.ipynb" in notebook.cells[0].source


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_parameters_are_literals_with_type_and_comment(notebook):
    source = parameters(notebook)
    assert source.startswith("# Parameters\n")
    for node in ast.parse(source).body:
        assert isinstance(node, ast.AnnAssign), ast.unparse(node)
        ast.literal_eval(node.value)
        assert "  # " in source.splitlines()[node.lineno - 1], ast.unparse(node)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_parameter_is_a_field_of_a_form_that_holds_its_value(notebook):
    source = parameters(notebook)
    for node in ast.parse(source).body:
        line = source.splitlines()[node.lineno - 1]
        field = FORM.fullmatch(line[line.index("# @param") :])
        assert field, line
        value, kind = ast.literal_eval(node.value), ast.unparse(node.annotation)
        if field["options"]:
            assert value in ast.literal_eval(field["options"]), line
        else:
            assert field["type"] in TYPED.get(kind, {"raw"}), line
        assert line.count("=") == 1, f"papermill passes over this line: {line}"


def test_the_notebook_of_the_libraries_uses_nothing_else():
    notebook = nbformat.read(FOLDER / f"{ALONE}.ipynb", as_version=4)
    story = "\n".join(cell.source for cell in code_cells(notebook)[2:])
    assert sum(bool(line.strip()) for line in story.splitlines()) <= ALONE_LINES
    assert {"bitsandbytes", "peft", "transformers", "trl"} <= set(re.findall(r"^from (\w+)", story, re.MULTILINE))
    assert not re.search(r"^\s*(from|import) qlora_helpers", story, re.MULTILINE)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_what_leaves_runs_behind_can_keep_them_on_drive(notebook):
    assert ("workdir: " in parameters(notebook)) == ("use_drive: bool = False" in parameters(notebook))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_papermill_explains_every_parameter(path):
    """Its parser reads fewer annotations than Python: `int | None` is passed over, and then warned about."""
    seen = papermill.inspect_notebook(str(path))
    names = [node.target.id for node in ast.parse(parameters(nbformat.read(path, as_version=4))).body]
    assert list(seen) == names
    assert all("  # " in found["help"] for found in seen.values())  # more than the options of the form
    assert not {found["inferred_type_name"] for found in seen.values()} & {"None", "NoneType"}


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_story_cells_are_short_and_define_nothing(notebook):
    for cell in code_cells(notebook)[2:]:
        assert len(cell.source.splitlines()) <= STORY_LINES, cell.source
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        assert not any(isinstance(node, kinds) for node in ast.walk(ast.parse(cell.source))), cell.source


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_styled_table_shows_html_as_text(notebook):
    """pandas escapes in plain tables, and in styled ones only when it is told to."""
    for cell in code_cells(notebook):
        assert cell.source.count(".style.") == cell.source.count('.style.format(escape="html")')


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_outputs_are_stored_in_order_and_without_errors(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert "widgets" not in notebook.metadata
    assert not any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_stored_notebooks_are_small_and_name_no_folder_of_the_machine(path):
    text = path.read_text("utf-8")
    assert len(text) < 1_000_000
    text = re.sub(r'"image/png": "[^"]*"', "", text)  # base64 can spell the name of a short folder
    assert str(Path.home()) not in text
    assert str(FOLDER.parent) not in text


def test_05_and_06_differ_in_their_parameters_only():
    first, second = (
        nbformat.read(FOLDER / name, as_version=4) for name in ("05_train_exp1.ipynb", "06_train_exp2.ipynb")
    )
    assert parameters(first) != parameters(second)
    same = [
        [cell.source for cell in code_cells(notebook) if cell.source != parameters(notebook)]
        for notebook in (first, second)
    ]
    assert same[0] == same[1]
    changed = [
        (a, b) for a, b in zip(parameters(first).splitlines(), parameters(second).splitlines(), strict=True) if a != b
    ]
    assert [a.split(":")[0] for a, _ in changed] == ["preset", "run_name"]


@pytest.mark.parametrize(("name", "picture"), attach_pictures.SHOWN.items())
def test_notebooks_show_the_pictures_of_their_widgets(name, picture):
    """Those of docs/, which a browser test makes: `make pictures`."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (attached,) = (cell.attachments for cell in notebook.cells if "attachments" in cell)
    content = base64.b64decode(attached[picture]["image/png"])
    assert content == (FOLDER.parent / "docs" / picture).read_bytes()
