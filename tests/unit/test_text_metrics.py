"""Text metrics: what the libraries count in English, right in every script, and never outside their ranges."""

import csv
import json
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qlora_helpers import UserError
from qlora_helpers.evaluation import text_metrics as metrics
from qlora_helpers.evaluation.intervals import share
from qlora_helpers.evaluation.text_metrics import text_metrics

SAID = [
    "The cat sat on the mat.",
    "one two three four one two three four one two three four",
    "No idea",
    "Yes it is so.",
]
WANTED = ["A cat sat on the mat.", "Count to four.", "Nobody has any idea of that.", "Yes it is so."]
MOST = {"ROUGE-L": 1, "BLEU": 100, "chrF": 100, "ends by itself": 1, "invents a turn": 1, "repeats itself": 1}


def row(answer, reference, **more):
    return {"prompt": "?", "answer": answer, "reference": reference, "stopped": True, "invented": False, **more}


def rows():
    said = zip(SAID, WANTED, (True, False, False, True), (False, True, False, False), strict=True)
    return [row(*texts, stopped=stopped, invented=invented) for *texts, stopped, invented in said]


def score(answer, reference):
    """The values of two equal rows: with one row, intervals have no end."""
    return {name: interval.value for name, interval in text_metrics([row(answer, reference)] * 2).items()}


def test_rates_and_lengths():
    result = text_metrics([*rows(), rows()[0] | {"reference": None}])
    assert result["ends by itself"].value == 0.5
    assert result["invents a turn"].value == 0.25
    assert result["repeats itself"].value == pytest.approx((1 - 4 / 9) / 4)
    assert result["length"].value == (6 + 12 + 2 + 4) / (6 + 3 + 6 + 4)
    assert all(interval.low <= interval.value <= interval.high for interval in result.values())
    one = text_metrics(rows()[:1])
    assert (one["BLEU"].low, one["BLEU"].high) == (0, 100)
    assert (one["ROUGE-L"].low, one["ROUGE-L"].high) == (0, 1)


@pytest.mark.parametrize("reference", [None, "", " \n", "<think>A thought without an answer.</think>"])
def test_answers_without_words_to_compare_with_are_left_out(reference):
    assert text_metrics([row("Yes.", reference)]) == {}
    assert text_metrics([*rows(), row("Yes.", reference)]) == text_metrics(rows())


def test_no_interval_leaves_what_can_be():
    short, long = ({"answer": " ".join("word" for _ in range(n))} for n in (1, 60))
    result = text_metrics([rows()[0] | said for said in (short, short, long)])
    for name in ("ROUGE-L", "repeats itself", "length"):
        assert result[name].low >= 0, name
    assert result["ROUGE-L"].high <= 1
    assert result["repeats itself"].high <= 1
    assert result["length"].low == 0 < result["length"].value < result["length"].high


def test_the_interval_of_few_short_answers_ends_at_100():
    result = text_metrics([row("positive", "positive"), row("negative", "negative"), row("neutral", "positive")])
    assert result["chrF"].value < result["chrF"].high == 100
    assert result["BLEU"].value < result["BLEU"].high == 100


ENGLISH = [
    ("It's a well-known fact: water boils at 100 °C (212 °F).", "Water boils at 100 °C, which is 212 °F."),
    ("Use `my_list.append(x)` to add x; don't use +=.", "You can call my_list.append(x), or my_list += [x]."),
    ("1. Open the file.\n2. Read it.\n3. Close it.\n", "Open the file, read it, and close it – in that order."),
    ("I am sorry, I am sorry, I am sorry, I am sorry.", "“Sorry” isn’t enough: apologize & explain why, e.g. by mail."),
    ("A variable holds a value.", "A variable is a name for a value that can change 👍."),
    ("", "Nothing was answered here."),
]
STORED = {
    "ROUGE-L": (0.390755, 0.000000, 0.907384),
    "BLEU": (17.467176, 3.272657, 29.235042),
    "chrF": (30.085549, 16.092498, 43.993331),
    "ends by itself": (1.000000, 0.609666, 1.000000),
    "invents a turn": (0.000000, 0.000000, 0.390334),
    "repeats itself": (0.092593, 0.000000, 1.000000),
    "length": (0.836364, 0.339115, 1.333612),
}


def test_the_numbers_of_english_texts_stay_as_they_were():
    """Computed before other scripts were supported, with the libraries' own tokenizers."""
    result = text_metrics([row(*texts) for texts in ENGLISH])
    for name, stored in STORED.items():
        assert (result[name].value, result[name].low, result[name].high) == pytest.approx(stored, abs=1e-6), name
    assert list(result) == ["ROUGE-L", "BLEU", "chrF", "ends by itself", "invents a turn", "repeats itself", "length"]


def test_bleu_and_chrf_are_the_command_lines(tmp_path):
    (tmp_path / "said").write_text("\n".join(SAID) + "\n", "utf-8")
    (tmp_path / "wanted").write_text("\n".join(WANTED) + "\n", "utf-8")
    words = [sys.executable, "-m", "sacrebleu", "wanted", "-i", "said", "-m", "bleu", "chrf", "-w", "6"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    result = text_metrics(rows())
    for name, line in zip(("BLEU", "chrF"), json.loads(done.stdout), strict=True):
        assert result[name].value == pytest.approx(line["score"], abs=1e-5)


def test_chinese_bleu_is_the_command_lines(tmp_path):
    said, wanted = ["我今天去北京。", "他不喜欢喝茶，只喝咖啡。"], ["我明天去北京。", "他不喝茶，只喝咖啡。"]
    (tmp_path / "said").write_text("\n".join(said) + "\n", "utf-8")
    (tmp_path / "wanted").write_text("\n".join(wanted) + "\n", "utf-8")
    words = [sys.executable, "-m", "sacrebleu", "wanted", "-i", "said", "-tok", "zh", "-w", "6"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    result = text_metrics([row(*texts) for texts in zip(said, wanted, strict=True)])
    assert result["BLEU"].value == pytest.approx(json.loads(done.stdout)["score"], abs=1e-5)


def test_rouge_is_the_command_lines(tmp_path):
    (tmp_path / "said").write_text("\n".join(SAID) + "\n", "utf-8")
    (tmp_path / "wanted").write_text("\n".join(WANTED) + "\n", "utf-8")
    words = [sys.executable, "-m", "rouge_score.rouge", "--target_filepattern=wanted", "--prediction_filepattern=said"]
    words += ["--output_filename=out.csv", "--use_stemmer=false", "--rouge_types=rougeL", "--aggregate=false"]
    subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    lines = list(csv.DictReader((tmp_path / "out.csv").open()))
    mean = sum(float(line["rougeL-F"]) for line in lines) / len(lines)
    assert text_metrics(rows())["ROUGE-L"].value == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("empty", ["", "```", "9"])
def test_answers_without_any_overlap_have_intervals_too(empty):
    """Some resamples then score nothing at all."""
    result = text_metrics([rows()[0], *(rows()[0] | {"answer": empty} for _ in range(3))])
    for name in ("BLEU", "chrF"):
        assert 0 <= result[name].low <= result[name].value <= result[name].high


WORLD = {
    "Chinese": "水在一百度时沸腾，请小心。",
    "Japanese": "お湯は100度で沸きます。コーヒーをどうぞ。",
    "Korean": "물은 섭씨 100도에서 끓습니다.",
    "Russian": "Вода кипит при ста градусах.",
    "Arabic": "يغلي الماء عند مئة درجة مئوية.",
    "Persian": "آب در صد درجه می‌جوشد.",
    "Hebrew": "המים רותחים במאה מעלות.",
    "Hindi": "पानी सौ डिग्री पर उबलता है।",
    "Thai": "น้ำเดือดที่หนึ่งร้อยองศา",
    "Lao": "ນ້ຳຟົດຢູ່ທີ່ໜຶ່ງຮ້ອຍອົງສາ",
    "Khmer": "ទឹកពុះនៅមួយរយអង្សា",
    "Burmese": "ရေသည် တစ်ရာဒီဂရီတွင် ဆူသည်",
    "one word": "positive",
    "two letters": "ok",
    "one character": "好",
    "emoji": "👍",
    "punctuation": "...",
}


@pytest.mark.parametrize("text", WORLD.values(), ids=WORLD.keys())
def test_an_answer_that_equals_its_reference_has_full_marks(text):
    values = score(text, text)
    assert values["ROUGE-L"] == 1
    assert values["BLEU"] == pytest.approx(100)
    assert values["chrF"] == 100
    assert values["length"] == 1


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("我今天去", "我明天来", 2 / 4),  # two of four characters
        ("водой", "вода кипит", 0),  # another word, though it shares letters
        ("вода горит", "Вода кипит", 2 * 1 / 4),
        ("पानी गरम", "पानी ठंडा", 2 * 1 / 4),  # vowel signs do not cut a word into several
        ("می‌جوشد", "می‌سوزد", 0),  # a joiner does not cut a word in two
        ("ดี มาก", "ดีมาก", 1),  # blanks between Thai phrases mean nothing
        ("Fine ❤️", "Great ❤️", 0),  # the mark in an emoji is no word
        ("用print函数", "用PRINT语句", 2 * 2 / 7 * 7 / 8),
    ],
)
def test_rouge_counts_words_in_any_script(answer, reference, f1):
    assert score(answer, reference)["ROUGE-L"] == pytest.approx(f1)


def test_repetition_and_length_are_by_characters_where_words_have_no_blanks():
    values = score("好的" * 16, "好的，我来帮你。")
    assert values["repeats itself"] == pytest.approx(1 - 2 / 29)  # of 29 phrases of four characters, 2 are different
    assert values["length"] == 32 / 8
    assert score("ดี" * 8, "ดีมาก")["length"] == 8 / 4  # a vowel sign belongs to its consonant


@pytest.mark.parametrize(
    ("reference", "tokenizer"),
    [
        ("The answer is 42.", "13a"),
        ("Вода кипит.", "13a"),
        ("...", "13a"),
        ("In Chinese, tea is 茶.", "13a"),
        ("茶在英语里是 tea。", "zh"),
        ("用 `print('Hello, world')` 函数来输出", "zh"),
        ("東京都の人口は約千四百万人です", "ja-mecab"),
        ("コーヒー", "ja-mecab"),
        ("물은 100도에서 끓습니다.", "ko-mecab"),
        ("น้ำเดือดที่หนึ่งร้อยองศา", "char"),
    ],
)
def test_bleu_takes_the_tokenizer_of_the_references_script(reference, tokenizer):
    assert metrics._script(reference) == tokenizer


def test_without_mecab_bleu_counts_characters(monkeypatch):
    from sacrebleu.metrics import bleu

    def missing(name):
        if name.endswith("mecab"):
            raise RuntimeError("needs MeCab")
        return real(name)

    real = bleu._get_tokenizer
    monkeypatch.setattr(bleu, "_get_tokenizer", missing)
    metrics._bleu_tokenizer.cache_clear()
    try:
        assert metrics._bleu_tokenizer("ja-mecab")("お湯").split() == ["お", "湯"]
        assert metrics._bleu_tokenizer("zh")("热水 tea.").split() == ["热", "水", "tea", "."]
    finally:
        metrics._bleu_tokenizer.cache_clear()


def test_each_answer_is_scored_in_the_script_of_its_own_reference():
    """In a set of several languages, too: a long unknown word instead of eight characters scores lower."""
    english, chinese = row("It is so.", "It is not so."), row("我今天去北京看他。", "我明天去北京看他。")
    alone = text_metrics([chinese] * 2)["BLEU"].value
    assert alone > 50
    assert text_metrics([english] * 2 + [chinese])["BLEU"].value > 40


def test_a_thought_in_a_reference_is_not_part_of_its_words():
    thought = "<think>\n\n</think>\n\nIt is blue."
    assert score("It is blue.", thought)["ROUGE-L"] == 1
    assert score("It is blue.", thought)["BLEU"] == pytest.approx(100)
    assert "thinks" not in score("It is blue.", thought)  # nothing is in it


def test_the_share_of_answers_after_a_thought_is_counted_if_there_are_thoughts():
    assert "thinks" not in text_metrics(rows())
    told = [line | {"thought": ""} for line in rows()]
    assert text_metrics(told) == text_metrics(rows())
    told[0]["thought"] = "Cats sit."
    result = text_metrics(told)
    assert result.pop("thinks") == share(1, 4) == metrics.thinks(told)
    assert result == text_metrics(rows())
    wanted = text_metrics([*rows(), row("Yes.", "<think>Is it?</think>Yes.")])
    assert wanted["thinks"] == share(0, 5)


CHARACTERS = (
    st.characters(exclude_categories=["Cs"])
    | st.sampled_from("好的水はカ안กำلाя👍‍️\u200e\u202e<>&-.\n ")
    | st.characters(min_codepoint=0x0600, max_codepoint=0x11FF, exclude_categories=["Cs"])
)
TEXTS = st.text(CHARACTERS, max_size=20)


@settings(max_examples=60)
@given(TEXTS.filter(str.strip))
@example("\u0e31")  # marks and a joiner without anything before them
@example("\u0301")
@example("\u200d")
def test_any_text_has_full_marks_against_itself(text):
    values = score(text, text)
    assert [values[name] for name in ("ROUGE-L", "BLEU", "chrF", "length")] == pytest.approx([1, 100, 100, 1])


@settings(max_examples=60)
@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=4))
@example([("", ""), ("", "a")])
@example([("positive", "positive"), ("negative", "negative"), ("neutral", "positive")])
def test_metrics_of_any_texts_stay_within_their_ranges(pairs):
    for name, interval in text_metrics([row(*pair) for pair in pairs]).items():
        assert 0 <= interval.value <= MOST.get(name, float("inf")), name
        assert 0 <= interval.low <= interval.high <= MOST.get(name, float("inf")), name


def test_two_models_are_compared_on_the_same_answers():
    better = [line | {"answer": wanted, "stopped": True} for line, wanted in zip(rows(), WANTED, strict=True)] * 10
    result = {one.metric: one for one in metrics.differences(rows() * 10, better)}
    one, other = text_metrics(rows() * 10), text_metrics(better)
    for name in ("ROUGE-L", "ends by itself", "invents a turn", "repeats itself", "length"):
        assert result[name].a == pytest.approx(one[name].value), name
        assert result[name].b == pytest.approx(other[name].value), name
        assert result[name].low <= result[name].value <= result[name].high, name
    assert result["sentence BLEU"].b == pytest.approx(100)
    assert result["sentence chrF"].b == pytest.approx(100)
    assert {one.family for one in result.values()} == {7}
    assert result["ROUGE-L"].remains
    assert not result["invents a turn"].remains
    assert not any(one.remains or one.value for one in metrics.differences(better, better))


def test_scores_of_each_answer_are_the_librarys():
    from sacrebleu import sentence_bleu, sentence_chrf

    means = metrics._counted(tuple(SAID), tuple(WANTED)).means
    pairs = list(zip(SAID, WANTED, strict=True))
    assert means["sentence BLEU"] == pytest.approx(
        [sentence_bleu(a, [b], use_effective_order=True).score for a, b in pairs]
    )
    assert means["sentence chrF"] == pytest.approx([sentence_chrf(a, [b]).score for a, b in pairs])


@given(st.lists(st.sampled_from("abcd"), max_size=30), st.lists(st.sampled_from("abcd"), max_size=30))
def test_rouge_is_the_librarys(words, wanted):
    from rouge_score.rouge_scorer import _score_lcs

    assert metrics._rouge(words, wanted) == _score_lcs(wanted, words).fmeasure


def test_many_answers_need_little_memory():
    """The resamples of 1,500 answers alone are 108 MB in sacrebleu's own bootstrap."""
    answers = [row(f"It is {i}.", f"It was {i}.") for i in range(1500)]
    tracemalloc.start()
    try:
        text_metrics(answers)
        assert tracemalloc.get_traced_memory()[1] < 60e6
    finally:
        tracemalloc.stop()


def test_differences_leave_out_what_text_metrics_leaves_out():
    assert metrics.differences([row("a", None)], [row("b", None)]) == []
    told = [line | {"thought": "Cats sit."} for line in rows()]
    names = [one.metric for one in metrics.differences(rows(), told)]
    assert names[-1] == "thinks"
    assert names[:-1] == [one.metric for one in metrics.differences(rows(), rows())]


def test_answers_to_other_questions_are_refused():
    with pytest.raises(UserError, match=r"answers: .* Fix:"):
        metrics.differences(rows(), rows()[::-1])


def test_a_reference_at_the_limit_of_tokens_is_the_best_that_a_model_can_do(tokenizer):
    long = " ".join(str(number) for number in range(200))
    asked = [row("Yes.", long), row("Yes.", "Yes it is."), row("Yes.", None)]
    whole = metrics.at_limit(asked, tokenizer, 10_000)
    assert {name: round(one.value, 6) for name, one in whole.items()} == {
        "ROUGE-L": 1, "BLEU": 100, "chrF": 100, "ends by itself": 1, "length": 1,
    }  # fmt: skip
    cut = metrics.at_limit(asked, tokenizer, 20)
    assert cut["ends by itself"].value == 0.5
    assert cut["length"].value < 0.3
    assert all(cut[name].value < whole[name].value for name in whole)
    assert metrics.at_limit(asked[2:], tokenizer, 20) == {}
    tokens = len(tokenizer("Yes it is.", add_special_tokens=False)["input_ids"])
    ends = [metrics.at_limit(asked[1:2], tokenizer, tokens + more)["ends by itself"].value for more in (0, 1)]
    assert ends == [0, 1]  # the end of an answer takes a token


@settings(max_examples=40)
@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=4))
def test_differences_of_any_texts_stay_within_their_ranges(triples):
    a, b = [row(one, wanted) for one, _, wanted in triples], [row(two, wanted) for _, two, wanted in triples]
    for one in metrics.differences(a, b):
        most = metrics.MOST.get(one.metric, float("inf"))
        assert -most - 1e-9 <= one.low <= one.value + 1e-9 <= one.high + 2e-9, one
        assert one.high <= most + 1e-9, one
        assert 0 <= one.p <= 1 + 1e-12
