"""Which tokens are trained, checked against handwritten strings rather than against the code that sets the labels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_helpers import Config, UserError
from qlora_helpers.data import labeling, prompts, rendering, schema

TWO_ROUNDS = (("Hi there", "Hello!", "And now?", "Bye."), "")
WITH_INPUT = (("Add these", "5"), "2, 3")
HEADING = (("How?", "### Steps\n\n1. Go\n### Human matters\nEnd"), "")
UNICODE = (("Où ça ?", "Là-bas 🎉🇫🇷 — naïve"), "")
CODE = (("Code?", "def f(x):\n    if x:\n        return  1\n\n\n    y = 2"), "")
CASES = {
    "two rounds": (TWO_ROUNDS, "guanaco", " Hello!</s> Bye.</s>"),
    "input": (WITH_INPUT, "guanaco", " 5</s>"),
    "heading in the reply": (HEADING, "guanaco", " ### Steps\n\n1. Go\n### Human matters\nEnd</s>"),
    "unicode": (UNICODE, "guanaco", " Là-bas 🎉🇫🇷 — naïve</s>"),
    "code": (CODE, "guanaco", " def f(x):\n    if x:\n        return  1\n\n\n    y = 2</s>"),
    "instruction": (WITH_INPUT, "instruction", "5</s>"),
    "instruction, two rounds": (TWO_ROUNDS, "instruction", "Hello!</s>Bye.</s>"),
    "chat": (TWO_ROUNDS, "auto", "Hello!</s>Bye.</s>"),
    "chat, input": (WITH_INPUT, "auto", "5</s>"),
    "chat, code": (CODE, "auto", "def f(x):\n    if x:\n        return  1\n\n\n    y = 2</s>"),
}


@pytest.fixture(scope="module", params=["plain", "llama3"])
def words(request, make_tokenizer):
    """Both kinds of tokenizer that the presets use."""
    return make_tokenizer(request.param)


def encode(row, tokenizer, **settings):
    return next(prompts.encode([row], Config(**settings), tokenizer))


def trained_text(example, tokenizer):
    """Decode the trained tokens."""
    return tokenizer.decode([i for i, label in zip(example.input_ids, example.labels, strict=True) if label != -100])


@pytest.mark.parametrize("case", CASES)
def test_only_answers_and_their_end_tokens_are_trained(words, make_row, case):
    (turns, given), template, want = CASES[case]
    example = encode(make_row(*turns, given=given), words, template=template)
    assert trained_text(example, words) == want
    assert all(label in (-100, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    assert example.trained == sum(label != -100 for label in example.labels)
    assert example.cut == 0


@pytest.mark.parametrize("template", ["guanaco", "instruction", "auto"])
def test_train_on_all_trains_every_token(words, make_row, template):
    example = encode(make_row("Hi", "Hello"), words, template=template, train_on="all")
    assert example.labels == example.input_ids
    assert example.trained == len(example.input_ids) - 1  # the first token is never predicted


def test_a_truncated_row_trains_the_rest_and_no_end_token(words, make_row):
    row = make_row("Hi", "^~^~^~^~^~")  # no merges: one token per character
    whole = encode(row, words)
    prompt = sum(label == -100 for label in whole.labels)
    cut = encode(row, words, max_length=prompt + 5)
    assert trained_text(whole, words) == " ^~^~^~^~^~</s>"
    assert trained_text(cut, words) == " ^~^~"
    assert words.eos_token_id not in cut.input_ids
    assert cut.cut == len(whole.input_ids) - prompt - 5
    assert len(cut.input_ids) == len(cut.labels) == len(cut.offsets) == prompt + 5


def test_a_row_truncated_before_its_answer_trains_nothing(words, make_row):
    assert (
        encode(make_row("a question that is certainly longer than eight tokens", "b"), words, max_length=8).trained == 0
    )


@pytest.mark.parametrize("case", CASES)
def test_the_answer_starts_where_the_generation_prompt_ends(words, make_row, case):
    """Otherwise, prompts would differ from those in training."""
    (turns, given), template, _ = CASES[case]
    row = make_row(*turns, given=given)
    config = Config(template=template)
    example = encode(row, words, template=template)
    for asked in range(1, len(turns), 2):
        prompt = rendering.render_prompt(row.messages[:asked], config, words)
        (prompt_ids,) = prompts.tokenize([prompt], words)
        assert example.input_ids[: len(prompt_ids)] == prompt_ids
        assert example.labels[len(prompt_ids) - 1] == -100
        assert example.labels[len(prompt_ids)] != -100


def test_the_templates_are_rendered_as_published(tokenizer, make_row):
    row = make_row("Q", "A", given="I")
    assert rendering.render(row.messages, Config(), tokenizer)[0] == "### Human: Q\n\nI### Assistant: A</s>"
    text = rendering.render(row.messages, Config(template="instruction"), tokenizer)[0]
    assert text == "### Instruction:\nQ\n\n### Input:\nI\n\n### Response:\nA</s>"
    system = Config(template="auto", system="Be kind.")
    assert rendering.render(row.messages, system, tokenizer)[0].startswith("<|im_start|>system\nBe kind.</s>\n")


def test_spaces_are_trained_even_if_the_offsets_exclude_them(make_row, make_tokenizer):
    """If offsets exclude spaces, a token that consists of spaces has an empty span."""
    (turns, _), template, want = CASES["chat, code"]
    trimming = make_tokenizer("trimmed")
    example = encode(make_row(*turns), trimming, template=template)
    assert trained_text(example, trimming) == want
    assert "".join(text for _, text in prompts.show_labels(example, trimming).pieces) == example.text


def test_without_rows_there_are_no_examples(tokenizer):
    assert list(prompts.encode([], Config(), tokenizer)) == []


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these turns"),
        ("{% for m in messages %}{{ loop.index }}{% endfor %}", "does not show an answer"),
    ],
)
def test_an_unusable_chat_template_is_an_error(make_row, make_tokenizer, template, says):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"{says}.*Fix: "):
        encode(make_row("a", "b", "c", "d"), tokenizer, template="auto")


@pytest.mark.parametrize("case", ["two rounds", "unicode", "code", "chat"])
def test_the_label_viewer_shows_the_whole_text(words, make_row, case):
    (turns, given), template, want = CASES[case]
    example = encode(make_row(*turns, given=given), words, template=template)
    pieces = prompts.show_labels(example, words).pieces
    assert "".join(text for _, text in pieces) == example.text
    assert "".join(text for kind, text in pieces if kind != "masked") == want
    assert [text for kind, text in pieces if kind == "end"] == ["</s>"] * (len(turns) // 2)


def test_the_label_viewer_as_text_and_as_html(tokenizer, make_row):
    view = prompts.show_labels(encode(make_row("Hi", "<script>alert(1)</script>\n& so on"), tokenizer), tokenizer)
    kinds = [line.split()[0] for line in repr(view).splitlines()]
    assert kinds == ["kind", "masked", "trained", "end"]
    assert repr(view).splitlines()[-1].endswith("'</s>'")
    html = view._repr_html_()
    assert "<script" not in html
    assert "&amp;" in html
    assert all(f'title="{kind}"' in html for kind in ("masked", "trained", "end"))


# The turns of each model family in the presets, as their published chat templates render them.
FAMILIES = {
    "zephyr": (
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "Hello!</s>Bye.</s>",
    ),
    "llama 3": (
        "<s>{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}",
        "Hello!</s>Bye.</s>",
    ),
    "mistral": (
        "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}",
        " Hello!</s> Bye.</s>",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["plain", "llama3", "trimmed"])
def test_every_family_trains_answers_with_end_tokens_and_has_one_start_token(make_tokenizer, make_row, family, kind):
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template, want = FAMILIES[family]
    example = encode(make_row(*TWO_ROUNDS[0]), tokenizer, template="auto")
    assert trained_text(example, tokenizer) == want
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.problem is None


def test_a_model_without_a_chat_template_can_use_the_built_in_templates(make_tokenizer, make_row):
    """Such as BLOOM: `auto` raises an error, and the published templates work."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    assert rendering.template_warnings(Config(), tokenizer) == []
    for template in ("guanaco", "instruction"):
        assert encode(make_row("Hi", "Hello"), tokenizer, template=template).trained
    with pytest.raises(UserError, match="no chat template"):
        encode(make_row("Hi", "Hello"), tokenizer, template="auto")


def test_replacing_the_models_own_template_gives_a_warning(tokenizer):
    assert (
        "must be prompted in that format" in rendering.template_warnings(Config(template="instruction"), tokenizer)[0]
    )
    assert rendering.template_warnings(Config(template="auto"), tokenizer) == []


def test_a_token_that_is_partly_question_and_partly_answer_is_detected(make_row):
    """If an answer starts in the middle of a token, no label is right for that token."""
    text = "questionanswer"
    labels, straddling = labeling.answer_labels([1, 2, 3], [(0, 4), (4, 9), (9, 12)], [(5, 12)], text)
    assert labels == [-100, -100, 3]
    assert straddling
    assert labeling.answer_labels([1, 2, 3], [(0, 4), (4, 9), (9, 12)], [(4, 12)], text) == ([-100, 2, 3], False)


@pytest.mark.parametrize(("span", "want"), [((300, 301), [-100, 2, 3, -100]), ((301, 302), [-100, -100, -100, 4])])
def test_all_tokens_of_one_character_get_its_label(span, want):
    text = "a" * 300 + "🎉b"
    offsets = [(0, 300), *((place, place + 1) for place in (300, 300, 301))]
    assert labeling.answer_labels([1, 2, 3, 4], offsets, [span], text) == (want, False)


def test_questions_and_answers_tokenized_separately_cover_the_same_text(words):
    """The start token, which covers no character, stays in front."""
    text, spans = "Say yes now.", [(4, 7)]
    ids, offsets = labeling.tokenize_apart(text, spans, words(text)["input_ids"], words)
    assert ids[0] == words.bos_token_id
    assert offsets[0] == (0, 0)
    assert words.decode(ids[1:]) == "".join(text[first:last] for first, last in offsets) == text
    assert {4, 7} <= {first for first, _ in offsets}  # no token straddles an edge


@pytest.mark.parametrize("mark", [" ", "~"])  # before and after all letters
def test_questions_and_answers_are_not_tokenized_separately_if_that_adds_characters(mark):
    class Marking:
        """A tokenizer that puts a mark before every text. Its tokens are characters."""

        def __call__(self, text, **options):
            places = [(0, 0), *((n, n + 1) for n in range(len(text)))]
            return {"input_ids": [ord(letter) for letter in mark + text], "offset_mapping": places}

        def decode(self, ids):
            return "".join(map(chr, ids))

    text = "Say yes now."
    whole = Marking()(text)["input_ids"]
    assert labeling.tokenize_apart(text, [(4, 7)], whole, Marking()) is None
    assert labeling.tokenize_apart(text, [], whole, Marking()) is not None  # undivided


PIECES = ["a", " b", "  ", "\n", "word", " words", "é", "🎉", "🇫🇷", "12", "</s>", "ß", " ", "।"]


@pytest.mark.parametrize("kind", ["plain", "llama3", "trimmed"])
def test_whole_tokens_get_the_labels_that_a_look_at_all_tokens_finds(make_tokenizer, kind):
    tokenizer = make_tokenizer(kind)

    @given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join), st.data())
    def same_labels(text, draw):
        edges = sorted(draw.draw(st.sets(st.integers(1, len(text)), max_size=4)))
        spans = list(zip(edges[::2], edges[1::2], strict=False))
        (tokens,) = prompts._tokens([text], tokenizer)
        ranges = labeling.token_ranges(tokens, spans)
        if ranges is not None:
            found = labeling.in_ranges(tokens.ids, ranges), False
            assert found == labeling.answer_labels(tokens.ids, tokens.offsets, spans, text)

    same_labels()


@pytest.mark.parametrize(
    ("offsets", "edges"),
    [
        ([(0, 2), (2, 4), (4, 6)], {0: 0, 1: None, 2: 1, 4: 2, 6: 3}),
        ([(0, 2), (1, 4), (4, 6)], {2: None, 4: 2}),  # overlapping: both are parts of one character
        ([(0, 2), (3, 4), (4, 6)], {2: None, 3: None, 4: 2}),  # a gap: a space was trimmed
        ([(1, 2), (2, 4), (4, 6)], {0: None, 2: 1}),
        ([(0, 2), (2, 2), (2, 4)], {2: None, 4: 3}),  # a token without characters
        ([(0, 2), (2, 4)], {6: None}),  # the end is not in a token
    ],
)
def test_an_edge_is_where_one_token_ends_and_the_next_begins(offsets, edges):
    class Encoding:
        """Of tokens with these offsets, as the library finds a token and its characters."""

        def __len__(self):
            return len(offsets)

        def char_to_token(self, place):
            return next((n for n, (start, end) in enumerate(offsets) if start <= place < end), None)

        def token_to_chars(self, number):
            return offsets[number]

    for start in ([], [7]):
        tokens = labeling.Tokens(start, Encoding())
        assert {place: tokens.edge(place) for place in edges} == {
            place: None if number is None else number + len(start) for place, number in edges.items()
        }


@pytest.mark.parametrize("kind", ["plain", "llama3", "trimmed"])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
@pytest.mark.parametrize("template", ["guanaco", "auto"])
def test_rows_are_measured_as_they_are_encoded(make_tokenizer, make_row, kind, template, train_on):
    """Also where answers share a token with their question, are cut, or are not to be learned."""
    tokenizer = make_tokenizer(kind)
    rows = [make_row(*turns, given=given) for turns, given in (TWO_ROUNDS, WITH_INPUT, HEADING, UNICODE, CODE)]
    unlearned = [dict(turn) for turn in rows[0].messages]
    unlearned[1]["learn"] = False
    rows.append(schema.Row(tuple(unlearned), "line 9"))
    for limit in (8, 16, 512):
        config = Config(template=template, train_on=train_on, max_length=limit)
        whole = prompts.encode(rows, config.replace(max_length=512), tokenizer)
        assert list(prompts.measure(rows, config, tokenizer)) == [prompts.lengths(one, config) for one in whole]


def test_rows_that_are_measured_are_not_converted(tokenizer, make_row, monkeypatch):
    """This is what makes it faster: most rows have answers of whole tokens."""
    rows = [make_row(*turns, given=given) for turns, given in (TWO_ROUNDS, WITH_INPUT, HEADING)]
    want = [prompts.lengths(one, Config()) for one in prompts.encode(rows, Config(), tokenizer)]
    monkeypatch.setattr(labeling.Tokens, "offsets", property(lambda tokens: pytest.fail("offsets were converted")))
    assert list(prompts.measure(rows, Config(), tokenizer)) == want


@pytest.mark.parametrize("model", ["a/model", "zzz/model"])
def test_the_positions_of_a_model_that_is_not_at_hand_are_unknown(model):
    assert prompts.positions(Config()) == prompts.BUNDLED_POSITIONS
    assert prompts.positions(Config(model=model)) is None
