"""Scores of answers: what each rule counts as right, and that no text breaks it."""

import json

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from qlora_helpers import Config, UserError
from qlora_helpers.evaluation import answers, run_code, scores

TEXTS = st.text(max_size=30) | st.sampled_from(
    ["A", "(B)", "B) x", "```", "```json\n{}\n```", "[[", "1e999", "</think>"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def score(kind, *pairs, **more):
    """Score and outcome of each answer beside its reference."""
    rows = scores.add([{"answer": a, "reference": r, **more} for a, r in pairs], kind)
    return [(row["score"], row["outcome"]) for row in rows]


def values(kind, *pairs):
    return [value for value, _ in score(kind, *pairs)]


def test_exact_ignores_case_and_blanks_around():
    assert values("exact", (" Paris\n", "paris"), ("STRASSE", "Straße"), ("Paris.", "Paris")) == [1, 1, 0]


LETTERS = ["A", "(b)", "C) Paris", "D.", "B: no"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B) because A is wrong", "B"),
        ("B) Rome", "B"),
        ("The answer is B, since A is too small.", "B"),
        ("Answer: **B**", "B"),
        ("A good guess is (B).", "B"),
        ("Option B fits.", "B"),
        ("I think B", "B"),
        ("None of them", None),
        ("Because", None),
        ("E", None),
        ("", None),
    ],
)
def test_the_letter_of_an_option_is_found(answer, letter):
    wanted = [(answer, reference) for reference in ("A", "B", "C", "D")]
    assert values("choice", *wanted) == [float(letter == reference) for reference in "ABCD"]


def test_references_with_text_after_the_letter_are_options_too():
    assert values("choice", *[(letter, letter) for letter in LETTERS]) == [1] * 5
    assert values("choice", ("C", "C) Paris"), ("Paris", "B) Rome")) == [1, 0]


def test_the_first_label_counts_and_the_longest_of_several():
    pairs = [
        ("Positive.", "positive"),
        ("I would call it very positive", "very positive"),
        ("very positive", "positive"),
        ("neutral, not positive", "neutral"),
        ("non-neutral", "neutral"),
        ("positively", "positive"),
    ]
    assert values("choice", *pairs) == [1, 1, 0, 1, 0, 0]


def test_an_article_is_no_option_where_the_references_are_words():
    assert values("choice", ("A cat", "a cat"), ("A dog", "a cat")) == [1, 0]


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ('{"b": [1, 2.0], "a": {"c": true}}', "equal"),
        ('```json\n{"a": {"c": true}, "b": [1.0, 2]}\n```', "equal"),
        ('{"a": {"c": false}, "b": [3, 4]}', "same keys"),
        ('{"a": {"c": 1}, "b": [1, 2]}', "same keys"),  # true is not 1
        ('{"a": {"c": true}, "b": [1]}', "valid"),
        ('{"a": {}, "b": [1, 2]}', "valid"),
        ("[]", "valid"),
        ('{"a": {"c": true}, "b": [1, 2]} and more', "invalid"),
        ('{"a": NaN}', "invalid"),
        ("", "invalid"),
        ("[" * 100_000, "invalid"),
        ("9" * 5000, "invalid"),
        ('"\\ud800"', "valid"),
    ],
)
def test_json_is_parsed_and_compared(answer, outcome):
    reference = '{"a": {"c": true}, "b": [1, 2]}'
    assert score("json", (answer, reference)) == [(float(outcome == "equal"), outcome)]


def test_an_answer_cannot_be_compared_with_a_reference_that_is_not_json():
    assert score("json", ("{}", "see below")) == [(None, scores.UNUSABLE)]


def test_a_pattern_matches_or_its_group_equals_that_of_the_reference():
    assert values("regex:^yes", ("yes, it is", "?"), ("it is, yes", "?")) == [1, 0]
    number = r"regex:####\s*(-?\d+)"
    assert values(number, ("so #### 42", "x #### 42"), ("#### 41", "#### 42"), ("42", "#### 42")) == [1, 0, 0]
    assert score(number, ("#### 42", "42")) == [(None, scores.UNUSABLE)]


def test_a_pattern_that_takes_for_ever_is_stopped(monkeypatch):
    monkeypatch.setattr(scores, "REGEX_SECONDS", 0.1)
    slow = r"regex:^(?:(?:a|aa|a{3})*)*[^a]$"
    assert score(slow, ("a" * 40, "?")) == [(0.0, run_code.TIMED_OUT)]


@pytest.mark.parametrize("pattern", ["(", "[", "*", "(?P<a>x)(?P=b)", "\\"])
def test_a_pattern_that_does_not_compile_is_refused_with_the_settings(pattern):
    with pytest.raises(UserError, match=r"score: .*Fix:"):
        Config.from_params(profile="cpu", score=f"regex:{pattern}")


@given(st.text(max_size=20))
@example("(?i)(?V1)[a--b]")
@example("a{99999999999}")
@example("(" * 20)
def test_any_pattern_is_either_refused_or_used(pattern):
    try:
        config = Config.from_params(profile="cpu", score=f"regex:{pattern}")
    except UserError:
        return
    score(config.score, ("some answer", "a reference"))


@pytest.mark.parametrize("kind", ["rouge", "exakt", "regex", "regex:", "python:3", "exact "])
def test_unknown_scores_are_refused(kind):
    with pytest.raises(UserError, match=r"score: unknown kind"):
        Config.from_params(profile="cpu", score=kind)


def test_code_runs_only_where_the_settings_allow_it():
    with pytest.raises(UserError, match=r"score: python runs .* Fix: run_code=True"):
        Config.from_params(profile="cpu", score="python")
    with pytest.raises(UserError, match="Fix: run_code=True"):
        Config.from_params(profile="cpu").replace(score="python")
    allowed = Config.from_params(profile="cpu", score="python", run_code=True)
    with pytest.raises(UserError, match="Fix: run_code=True"):
        allowed.replace(run_code=False)
    assert allowed.identity == Config.from_params(profile="cpu").identity  # it does not change what is trained


def test_code_is_run_with_the_tests_of_its_row():
    good, bad = "```python\ndef f(x):\n    return 2 * x\n```", "def f(x):\n    return x"
    tests = "assert f(2) == 4"
    assert score("python", (good, "any"), (bad, "any"), tests=tests) == [(1, "passed"), (0, "failed")]
    assert score("python", (good, tests)) == [(1, "passed")]
    assert score("exact", ("any", "any"), tests=tests) == [(1, "right")]  # other scores compare with the reference


def test_a_solution_in_the_place_of_tests_proves_nothing():
    assert score("python", ("", "def f(x):\n    return 2 * x")) == [(None, scores.UNUSABLE)]
    assert score("python", ("x = 1", "# no test")) == [(None, scores.UNUSABLE)]


def test_a_thought_in_a_reference_does_not_count():
    assert values("exact", ("Paris", "<think>France.</think>Paris")) == [1]


def test_answers_without_a_reference_have_no_score():
    plain = {"answer": "x", "reference": None}
    assert scores.add([plain, {"answer": "x", "reference": "<think>x</think>"}], "exact")[0] == plain
    assert scores.metrics([plain]) == {} == scores.metrics([])
    assert scores.differences([plain | {"prompt": "?"}], [plain | {"prompt": "?"}]) == []


def test_shares_of_scores_and_their_differences():
    asked = [{"prompt": str(i), "reference": '{"a": 1}', "answer": text} for i, text in enumerate(["{}", "x"] * 20)]
    better = [row | {"answer": '{"a": 1}' if i % 4 else '{"a": 2}'} for i, row in enumerate(asked)]
    one, other = scores.add(asked, "json"), scores.add(better, "json")
    shares = {name: interval.value for name, interval in scores.metrics(other).items()}
    assert shares == {"score": 0.75, "same keys": 1, "valid JSON": 1}
    found = {d.metric: (d.a, d.b, d.remains, d.family) for d in scores.differences(one, other)}
    assert found == {"score": (0, 0.75, True, 3), "same keys": (0, 1, True, 3), "valid JSON": (0.5, 1, True, 3)}
    left_out = [*other[:39], other[39] | {"score": None, "outcome": scores.UNUSABLE}]
    assert {d.answers for d in scores.differences(one, left_out)} == {39}


@settings(max_examples=150)
@given(st.sampled_from(["exact", "choice", "json", "regex:(.)$"]), st.lists(st.tuples(TEXTS, TEXTS), max_size=4))
@example("choice", [("", "."), ("A", "!")])
@example("choice", [("ß", "SS"), ("x", "(ı)")])
def test_any_texts_get_a_score_or_none_and_a_reference_is_right(kind, pairs):
    for row in scores.add([{"answer": a, "reference": r} for a, r in pairs], kind):
        assert row.get("score") in (None, 0, 1)
    for row in scores.add([{"answer": scores._words(r), "reference": r} for _, r in pairs], kind):
        assert row.get("score") in (None, 1), row


@given(JSON, JSON)
@example(True, 1)
@example([1], [True])
@example(0.0, -0.0)
def test_json_values_are_equal_as_python_compares_them_apart_from_booleans(a, b):
    def marked(value):
        if isinstance(value, dict):
            return {key: marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, list) else (isinstance(value, bool), value)

    assume(not any(isinstance(x, float) and abs(x) < 1e-300 and x for x in (a, b)))
    ((value, _),) = score("json", (json.dumps(a), json.dumps(b)))
    assert value == (marked(a) == marked(b))
    assert score("json", (json.dumps(a, indent=2), json.dumps(a))) == [(1, "equal")]


def test_scores_are_written_with_the_answers(config, device, tokenizer, setup):
    built, examples = setup
    own = config.replace(score="exact")
    asked = answers.heldout_prompts(examples, 2)
    rows = answers.generate(built, tokenizer, own, device, asked)
    assert [row.get("score", "none") for row in rows] == ["none", "none", 0, 0]
    assert {row["outcome"] for row in rows[2:]} == {"wrong"}
    assert "score" not in answers.generate(built, tokenizer, config, device, asked)[2]
