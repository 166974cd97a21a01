"""Config: names, types, ranges, and the order of its layers."""

import dataclasses
import re
import subprocess
import sys

import pytest
import yaml
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qlora_helpers import Config, UserError
from qlora_helpers.config import OTHER_TOOLS, preset_names
from qlora_helpers.files import ROOT

GUANACO = {
    "model": "TinyLlama/TinyLlama-1.1B-Chat-v1.0",
    "revision": "fe8a4ea1ffedaf415f4da2f062534de366a451e6",
    "dataset": "timdettmers/openassistant-guanaco",
    "dataset_revision": "831dabac2283d99420cda0b673d7a2a43849f17a",
    "template": "guanaco",
    "train_on": "assistant",
    "rank": 16,
    "alpha": 32,
    "dropout": 0.05,
    "target_modules": ("q_proj", "v_proj"),
    "bias": "none",
    "quantization": "nf4",
    "double_quant": True,
    "max_length": 256,
    "over_length": "truncate",
    "effective_batch": 4,
    "learning_rate": 2e-4,
    "epochs": 5,
    "save_steps": 50,
    "n_heldout": 100,
}
PUBLISHED = {
    "tinyllama-guanaco-100": GUANACO | {"n_samples": 100},
    "tinyllama-guanaco-200": GUANACO | {"n_samples": 200},
    "tinyllama-coding": {
        "model": GUANACO["model"],
        "revision": GUANACO["revision"],
        "dataset": "python-stdlib",
        "template": "instruction",
        "n_samples": 1080,
        "n_heldout": 120,
        "max_length": 512,
        "over_length": "drop",
        "rank": 16,
        "alpha": 32,
        "target_modules": ("all-linear",),
        "epochs": 3,
        "effective_batch": 4,
        "learning_rate": 2e-4,
    },
    "llama31-8b": {
        "model": "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "template": "auto",
        "max_length": 2048,
        "target_modules": ("all-linear",),
        "rank": 16,
        "alpha": 32,
        "epochs": 3,
        "effective_batch": 16,
        "learning_rate": 2e-4,
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.03,
        "eval_steps": 50,
        "save_steps": 100,
        "keep_best": True,
    },
}
TODAYS = ("qwen3-4b", "llama32-3b", "gemma3-1b", "smollm3-3b")  # recipes of the project's own


@pytest.mark.parametrize("name", TODAYS)
def test_presets_for_todays_models_use_the_models_own_template_and_plan_offline(name):
    from qlora_helpers.planning import architectures, plan

    config = Config.preset(name)
    assert (config.template, config.rank, config.target_modules) == ("auto", 16, ("all-linear",))
    assert architectures.known(config.model)
    assert plan.plan_memory(config, "t4").fits


def refusal(**params):
    """Return the message of the error that these parameters raise."""
    with pytest.raises(UserError) as caught:
        Config.from_params(**{"profile": "cpu", **params})
    return str(caught.value)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name):
    config = Config.preset(name)
    assert config.preset_name == name
    assert config.profile == "gpu"


@pytest.mark.parametrize("name", preset_names())
def test_presets_pin_what_comes_from_the_hub(name):
    config = Config.preset(name)
    pinned = [config.revision] + ([config.dataset_revision] if "/" in config.dataset else [])
    assert all(re.fullmatch("[0-9a-f]{40}", revision) for revision in pinned)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_hold_the_published_values(name):
    config = Config.preset(name)
    assert {key: getattr(config, key) for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize(("rows", "steps"), [(100, 125), (200, 250), (101, 130)])
def test_steps_as_published(rows, steps):
    assert Config.preset("tinyllama-guanaco-100").steps(rows) == steps


def test_coding_takes_810_steps():
    assert Config.preset("tinyllama-coding").steps(1080) == 810


def test_the_two_experiments_differ_in_rows_only():
    one = dataclasses.asdict(Config.preset("tinyllama-guanaco-100"))
    two = dataclasses.asdict(Config.preset("tinyllama-guanaco-200"))
    assert {key for key in one if one[key] != two[key]} == {"n_samples", "preset_name"}


@pytest.mark.parametrize(
    ("preset", "rows"), [("tinyllama-guanaco-100", 20), ("tinyllama-guanaco-200", 40), ("llama31-8b", 40)]
)
def test_cpu_profile_shrinks_the_experiment(preset, rows):
    config = Config.from_params(preset=preset, profile="cpu")
    assert (config.n_samples, config.n_heldout) == (rows, 20)
    assert config.dataset == "sample"


def test_parameters_win_over_profile_and_preset():
    config = Config.from_params(profile="cpu", n_samples=7, n_heldout=5, rank=2)
    assert (config.n_samples, config.n_heldout, config.rank) == (7, 5, 2)


def test_none_leaves_the_layer_below():
    bare = Config.from_params(profile="cpu")
    assert Config.from_params(profile="cpu", preset=None, n_samples=None, learning_rate=None) == bare


def test_t4_computes_in_float16():
    config = Config.from_params(profile="t4")
    assert config.compute_dtype == "float16"
    assert config.memory_limit_gib < 15


def test_an_unknown_name_suggests_the_nearest():
    assert "'learning_rate'" in refusal(learning_rte=1e-3)
    assert "'tinyllama-guanaco-100'" in refusal(preset="tinylama-guanaco-100")
    assert "'cpu'" in refusal(profile="cpus")


def test_names_of_other_libraries_get_ours():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert OTHER_TOOLS not in preset_names()
    file = ROOT / "qlora_helpers" / "presets" / f"{OTHER_TOOLS}.yaml"
    for ours, theirs in yaml.safe_load(file.read_text("utf-8")).items():
        assert re.match(r"\w+", ours)[0] in fields
        for name in theirs:
            assert name not in fields
            assert refusal(**{name: 1}) == f"unknown parameter '{name}'. Fix: use {ours}."


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("r", "rank"),
        ("lora_alpha", "alpha"),
        ("num_train_epochs", "epochs"),
        ("micro_batch_size", "batch_size"),
        ("cutoff_len", "max_length"),
        ("warmup_steps", "warmup_ratio, a fraction of the steps"),
    ],
)
def test_a_usual_name_is_translated(name, ours):
    assert refusal(**{name: 8}) == f"unknown parameter '{name}'. Fix: use {ours}."


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("learning_rate", "2e-4", "2.0e-4"),
        ("epochs", True, "whole number"),
        ("epochs", 3.5, "whole number"),
        ("epochs", "3", "whole number"),
        ("learning_rate", True, "a number"),
        ("double_quant", 1, "true or false"),
        ("model", 7, "text"),
        ("target_modules", [], "names"),
        ("target_modules", [1], "names"),
        ("quantization", "int8", "nf4"),
        ("n_samples", 0, "1 or more"),
        ("n_samples", -1, "1 or more"),
        ("rank", 0, "1 or more"),
        ("dropout", 0.95, "0.9 or less"),
        ("learning_rate", float("nan"), "learning_rate"),
        ("weight_decay", float("nan"), "weight_decay"),
        ("learning_rate", float("inf"), "1 or less"),
        ("seed", -1, "0 or more"),
    ],
)
def test_wrong_types_and_ranges(name, value, says):
    message = refusal(**{name: value})
    assert message.startswith(f"{name}: ")
    assert says in message


def test_numbers_and_names_arrive_in_their_fields_type():
    config = Config.from_params(profile="cpu", learning_rate=1, target_modules="q_proj, k_proj v_proj")
    assert isinstance(config.learning_rate, float)
    assert config.target_modules == ("q_proj", "k_proj", "v_proj")
    assert config.replace(target_modules=["o_proj"]).target_modules == ("o_proj",)


def test_replace_checks_too():
    with pytest.raises(UserError, match="rank"):
        Config().replace(rank=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 2, "gradient_accumulation": 2},
        {"save_steps": 7},
        {"gradient_checkpointing": True},
        {"max_new_tokens": 9},
        {"memory_limit_gib": 8.0},
    ],
)
def test_identity_ignores_where_and_how_fast(changes):
    assert Config().replace(**changes).identity == Config().identity


@pytest.mark.parametrize(
    "changes",
    [{"learning_rate": 1e-4}, {"seed": 1}, {"rank": 8}, {"n_samples": 5}, {"batch_size": 2}, {"train_on": "all"}],
)
def test_identity_changes_with_the_result(changes):
    assert Config().replace(**changes).identity != Config().identity


def test_shown_resolved():
    assert "learning_rate" in str(Config())
    assert "q_proj, v_proj" in str(Config())
    assert max(len(line) for line in str(Config()).splitlines()) <= 102  # a browser breaks longer lines
    for field in dataclasses.fields(Config):
        assert field.metadata["help"] in str(Config())


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    | st.sampled_from(["nf4", "auto", "q_proj", "a\nb", "2e-4", 10**400])
)  # fmt: skip
junk = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=4)
names = st.sampled_from([f.name for f in dataclasses.fields(Config) if f.name != "profile"]) | st.just("preset")


@given(st.dictionaries(names | st.text(), junk, max_size=3).filter(lambda d: not {"profile", "cls"} & set(d)))
@example({"learning_rate": 10**400})
@example({"quantization": "a\nb"})
@example({"preset": "a\nb"})
@example({"a\nb": 1})
@example({"preset": []})
@hypothesis_settings(max_examples=300)
def test_any_parameters_give_a_config_or_one_line(params):
    message = "fine"
    try:
        Config.from_params(profile="cpu", **params)
    except UserError as error:
        message = str(error)
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("value", ["no\nsuch", "no such"])
def test_an_unknown_profile_is_one_line(value):
    assert len(refusal(profile=value).splitlines()) == 1


def test_importing_the_package_does_not_import_torch():
    code = "import sys, qlora_helpers; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_pinned_revision_belongs_to_its_own_model_and_data():
    """Another model has no such commit, so a manifest that names it would be wrong."""
    pinned = Config.preset("tinyllama-guanaco-100")
    other = Config.preset("tinyllama-guanaco-100", model="other/model", dataset="other/rows")
    same = Config.preset("tinyllama-guanaco-100", model=pinned.model)
    assert (other.revision, other.dataset_revision) == ("main", "main")
    assert (same.revision, same.dataset_revision) == (pinned.revision, pinned.dataset_revision)
    assert Config.preset("tinyllama-guanaco-100", model="other/model", revision="abc").revision == "abc"
