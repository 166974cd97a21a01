"""A merged model's card quotes the loss of that model, not the one of the adapter on the 4-bit base model."""

import json
import re
import shutil

import pytest

from qlora_helpers import files
from qlora_helpers.data import cleaning
from qlora_helpers.evaluation import losses
from qlora_helpers.evaluation.row_losses import mean_loss
from qlora_helpers.experiments import matrix
from qlora_helpers.export import pipeline
from qlora_helpers.models import qlora
from qlora_helpers.runs import RunFolder


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """A run in 4 bits on the tiny model."""
    small = config.replace(n_samples=4, n_answers=2, max_new_tokens=2)
    ((made,),) = matrix.train_missing(matrix.plan_runs({"exp1": small}, tmp_path_factory.mktemp("runs"))).values()
    return made


def quoted(card):
    """The losses in the card, by what they were measured on."""
    return {name: float(loss) for name, loss in re.findall(r"^\| (.+?) \| (\d\.\d{4}) ", card, re.MULTILINE)}


def test_the_card_of_a_merged_model_has_its_own_loss(run, config, tokenizer, device, tmp_path):
    pipeline.ship(run, tmp_path / "out")
    merged = tmp_path / "out" / "merged"
    model = qlora.load_base(config.replace(model=str(merged), quantization="none"), device)
    own = mean_loss(losses.heldout_losses(model, cleaning.prepare(run.config(), tokenizer).heldout, device))
    table = quoted((merged / "README.md").read_text("utf-8"))
    merged_row = "this model, merged in 16 bits, against the base model in 16 bits"
    assert table[merged_row] == pytest.approx(own, abs=1e-4)
    gap = own - table["base, 16 bits"]
    (change,) = re.findall(rf"{merged_row} \| \S+ \(([+-]\d\.\d{{4}})", (merged / "README.md").read_text("utf-8"))
    assert float(change) == pytest.approx(gap, abs=2e-4)
    adapted = run.read("metrics.json")["eval_loss"]
    assert table["with this adapter, on the base model in nf4"] == pytest.approx(adapted, abs=1e-4)
    assert abs(own - adapted) > 2e-5  # the two are told apart
    stored = json.loads((tmp_path / "out" / "parity.json").read_text("utf-8"))["heldout"]
    assert stored["loss"] == pytest.approx(own, abs=5e-6)
    assert stored["rows"] == 6
    assert "was not measured" not in (merged / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda manifest: manifest["device"].update(kind="cuda"), "trained on another kind of machine"),
        (lambda manifest: manifest["data"].update(heldout_fingerprint="other"), "its held-out rows have changed"),
    ],
)
def test_a_loss_that_was_not_measured_is_not_quoted(run, tmp_path, capsys, change, reason):
    moved = RunFolder(shutil.copytree(run.path, tmp_path / "exp1"))
    manifest = moved.read("manifest.json")
    change(manifest)
    files.write_json(moved / "manifest.json", manifest)
    pipeline.ship(moved, tmp_path / "out")
    assert reason in capsys.readouterr().out
    card = (tmp_path / "out" / "merged" / "README.md").read_text("utf-8")
    assert "this model, merged in 16 bits" not in card
    assert "the adapter on the base model in nf4" in card
    assert "its own loss was not measured" in card
    assert "heldout" not in json.loads((tmp_path / "out" / "parity.json").read_text("utf-8"))
