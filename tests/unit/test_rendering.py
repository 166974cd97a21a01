"""Answers are located in whatever a chat template writes around them, and end where the template ends them.

Each template below has one quirk of a published one.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from qlora_helpers import Config, UserError
from qlora_helpers.data import prompts, rendering
from qlora_helpers.data.schema import Row

HEAD = "{% for m in messages %}<turn>{{ m['role'] }}\n"
ASK = "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
PLAIN = HEAD + "{{ m['content'] }}<stop>\n{% endfor %}" + ASK
# name: template, the tokenizer's end token, trained text of two rounds, tokens that end an answer
QUIRKS = {
    "as usual": (PLAIN, "<stop>", ["Good.", "Fine."], ["<stop>"]),
    "another end token than the tokenizer's": (PLAIN, "<eos>", ["Good.", "Fine."], ["<eos>", "<stop>"]),
    "the end token of the text after the last turn": (
        HEAD + "{{ m['content'] }}<stop>\n{% endfor %}{% if add_generation_prompt %}<turn>assistant\n"
        "{% else %}{{ eos_token }}{% endif %}",
        "<eos>", ["Good.", "Fine."], ["<eos>", "<stop>"],
    ),
    "an empty thought in the last answer": (
        HEAD + "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<stop>\n"
        "{% endfor %}" + ASK,
        "<stop>", ["Good.", "<think>\n\n</think>\n\nFine."], ["<stop>"],
    ),
    "a prompt that opens a thought": (
        HEAD + "{{ m['content'].split('</think>')[-1] }}<stop>\n{% endfor %}"
        "{% if add_generation_prompt %}<turn>assistant\n<think>\n{% endif %}",
        "<stop>", ["Good.", "Fine."], ["<stop>"],
    ),
    "a prompt that ends within a token": (
        HEAD + "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'] }}<stop>\n"
        "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n<think>\n{% endif %}",
        "<stop>", ["Good.", "\n</think>\n\nFine."], ["<stop>"],
    ),
    "the date of today": (
        "<turn>system\nIt is {{ strftime_now('%d %b %Y') }}.<stop>\n" + PLAIN, "<stop>", ["Good.", "Fine."], ["<stop>"]
    ),
    "words before the answer": (
        "{% for m in messages %}<turn>{{ m['role'] }}{{ '<to>all\n' if m['role'] == 'assistant' else '\n' }}"
        "{{ m['content'] }}<stop>{% endfor %}{% if add_generation_prompt %}<turn>assistant{% endif %}",
        "<stop>", ["<to>all\nGood.", "<to>all\nFine."], ["<stop>"],
    ),
    "the system prompt in the last question": (
        "{% set last = (messages | selectattr('role', 'equalto', 'user') | list)[-1] %}"
        "{% for m in messages if m['role'] != 'system' %}<turn>{{ m['role'] }}\n"
        "{% if m == last %}"
        "{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join }}\n{% endif %}"
        "{{ m['content'] }}<stop>{% endfor %}" + ASK,
        "<stop>", ["Good.", "Fine."], ["<stop>"],
    ),
    "a prompt without its line break": (
        "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<stop>{% endfor %}<turn>assistant\n",
        "<stop>", ["Good.", "Fine."], ["<stop>"],
    ),
}  # fmt: skip


ENDLESS = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
TOOLS = (
    HEAD + "{% if m.tool_calls %}<to>{{ m.tool_calls[0].function.name }}{% else %}{{ m['content'] }}{% endif %}<stop>\n"
    "{% endfor %}" + ASK
)


CALL = {"type": "function", "function": {"name": "clock", "arguments": {}}}
WITH_TOOL = (
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "Noon"},
    {"role": "assistant", "content": "It is noon."},
)


def make_tokenizer(template, eos="<stop>", absorbing=()):
    """Byte-level tokenizer in which two line breaks are one token; the tokens in `absorbing` absorb the next space."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(["Good. Fine.\n\n\n\n" * 9], trainer)
    special = ("<stop>", "<eos>", "<turn>", "<user>", "<assistant>", "<to>")
    words.add_special_tokens([AddedToken(token, special=True, rstrip=token in absorbing) for token in special])
    words.add_tokens([AddedToken(token, special=False) for token in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=eos, pad_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


def conversation(*texts, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    head = [{"role": "system", "content": system}] if system else []
    return Row((*head, *turns), "line 1")


ROW = conversation("Well?", "Good.", "And?", "Fine.", system="Be kind.")


def trained_parts(example, tokenizer):
    """Decode each run of trained tokens."""
    parts, before = [], False
    for token, label in zip(example.input_ids, example.labels, strict=True):
        if label != -100:
            parts = [*parts[:-1], [*parts[-1], token]] if before else [*parts, [token]]
        before = label != -100
    return [tokenizer.decode(part) for part in parts]


def encode(row, tokenizer, **settings):
    return next(prompts.encode([row], Config(template="auto", **settings), tokenizer))


@pytest.mark.parametrize("quirk", QUIRKS)
def test_answers_and_their_end_are_trained(quirk, tmp_path):
    template, eos, answers, ends = QUIRKS[quirk]
    tokenizer = make_tokenizer(template, eos)
    example = encode(ROW, tokenizer)
    assert example.problem is None
    assert trained_parts(example, tokenizer) == [f"{answer}<stop>" for answer in answers]
    config = Config(template="auto", model=str(tmp_path))
    assert tokenizer.convert_ids_to_tokens(rendering.end_tokens(config, tokenizer)) == ends


@pytest.mark.parametrize("quirk", QUIRKS)
def test_the_prompt_of_each_answer_is_what_precedes_it_in_training(quirk):
    """Except where the prompt itself opens or closes a thought that earlier answers do not show."""
    template, eos, *_ = QUIRKS[quirk]
    tokenizer = make_tokenizer(template, eos)
    config = Config(template="auto")
    text, spans = rendering.render(ROW.messages, config, tokenizer)
    prompt = rendering.render_prompt(ROW.messages[:-1], config, tokenizer)
    before = text[: spans[-1][0]]
    assert before == prompt or (before == prompt.removesuffix("<think>\n") and "thought" in quirk)


def test_end_tokens_that_absorb_the_line_break_are_trained():
    tokenizer = make_tokenizer(PLAIN, absorbing=("<stop>", "<turn>"))
    assert trained_parts(encode(ROW, tokenizer), tokenizer) == ["Good.<stop>", "Fine.<stop>"]


def test_a_template_without_an_end_is_taught_one(tmp_path):
    """The mark of the next turn ends earlier answers; the end token is added to the last one, and a warning says so."""
    tokenizer = make_tokenizer(ENDLESS, "<eos>")
    row = conversation("Well?", "Good.", "And?", "Fine.")
    assert trained_parts(encode(row, tokenizer), tokenizer) == ["Good.<user>", "Fine.<eos>"]
    assert trained_parts(encode(row, tokenizer, end_token="<stop>"), tokenizer)[-1] == "Fine.<stop>"
    config = Config(template="auto", model=str(tmp_path))
    assert set(tokenizer.convert_ids_to_tokens(rendering.end_tokens(config, tokenizer))) == {"<user>", "<eos>"}
    assert "does not end an answer" in rendering.template_warnings(config, tokenizer)[0]
    assert rendering.template_warnings(config, make_tokenizer(PLAIN)) == []
    with pytest.raises(UserError, match="end_token: '<over>' is not a token of "):
        encode(row, tokenizer, end_token="<over>")


def test_without_any_end_token_the_message_asks_for_one():
    tokenizer = make_tokenizer(PLAIN)
    tokenizer.eos_token = None
    assert trained_parts(encode(ROW, tokenizer), tokenizer) == ["Good.<stop>", "Fine.<stop>"]  # the template has one
    with pytest.raises(UserError, match="has no end token"):
        next(prompts.encode([ROW], Config(), tokenizer))


THINKING = (  # drops thoughts before the last question, and shows the last one in its own way
    "{% for m in messages %}<turn>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% set parts = m['content'].split('</think>') %}"
    "{% if loop.last %}<think>\n{{ parts[0].replace('<think>', '').strip() if parts | length > 1 }}\n"
    "</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize(
    ("thinking", "last", "want"),
    [
        (None, "<think>\nHm.\n</think>\n\nFine.", "<think>\nHm.\n</think>\n\nFine.<stop>"),
        (None, "Fine.", "<think>\n\n</think>\n\nFine.<stop>"),
        (False, "Fine.", "Fine.<stop>"),
        (True, "Fine.", "<think>\n\n</think>\n\nFine.<stop>"),
    ],
)
def test_thoughts_are_content_and_earlier_ones_may_be_dropped(thinking, last, want):
    tokenizer = make_tokenizer(THINKING)
    row = conversation("Well?", "<think>\nOh.\n</think>\n\nGood.", "And?", last)
    assert trained_parts(encode(row, tokenizer, thinking=thinking), tokenizer) == ["Good.<stop>", want]
    assert not rendering.control_marks(Config(template="auto"), tokenizer).search(row.text)


def test_a_template_that_hides_an_answer_drops_only_that_row():
    """And the reason names the cause."""
    hiding = PLAIN.replace("in messages", "in messages if m['content'] != 'Hide.'")
    tokenizer = make_tokenizer(hiding)
    rows = [conversation("Well?", "Hide."), conversation("Well?", "Good.")]
    first, second = prompts.encode(rows, Config(template="auto"), tokenizer)
    assert (first.problem, first.trained) == ("the chat template does not show an answer", 0)
    assert trained_parts(second, tokenizer) == ["Good.<stop>"]
    strict = "{% if messages | length > 2 %}{{ raise_exception('two turns only') }}{% endif %}" + PLAIN
    first, second = prompts.encode([rows[1], ROW], Config(template="auto"), make_tokenizer(strict))
    assert first.trained
    assert second.problem == "the chat template refuses these turns (two turns only)"


def test_the_date_in_a_template_is_that_of_the_config():
    tokenizer = make_tokenizer(QUIRKS["the date of today"][0])
    text = encode(ROW, tokenizer, template_date="2024-07-26").text
    assert text.startswith("<turn>system\nIt is 26 Jul 2024.")
    assert encode(ROW, tokenizer).text == encode(ROW, tokenizer).text.replace("26 Jul 2024", "01 Jan 2026")
    assert Config(template_date="2024-07-26").identity != Config().identity


def test_a_rows_own_system_prompt_wins():
    tokenizer = make_tokenizer(PLAIN)
    row = conversation("Well?", "Good.")
    assert "Be brief." in encode(row, tokenizer, system="Be brief.").text
    own = encode(ROW, tokenizer, system="Be brief.").text
    assert "Be kind." in own
    assert "Be brief." not in own
    for template, want in (("guanaco", "### Human: Be kind.\n\nWell?###"), ("instruction", "\nBe kind.\n\nWell?\n")):
        assert want in next(prompts.encode([ROW], Config(template=template), tokenizer)).text


def test_tool_calls_are_trained_and_results_are_not():
    turns = (WITH_TOOL[0] | {"tools": '[{"type": "function"}]'}, *WITH_TOOL[1:])
    tokenizer = make_tokenizer("{{ (tools or []) | length }}" + TOOLS)
    example = encode(Row(turns, "line 1"), tokenizer)
    assert trained_parts(example, tokenizer) == ["<to>clock<stop>", "It is noon.<stop>"]
    assert example.text.startswith("1<turn>user")
    (refused,) = prompts.encode([Row(turns, "line 1")], Config(), tokenizer)
    assert refused.problem == "the guanaco template has no place for tool calls"


def test_the_result_of_a_call_is_never_trained():
    """Not if its turn looks different without the call, and not if the template writes it inside the answer."""
    asked, calls, *rest = WITH_TOOL
    as_text = CALL | {"function": {"name": "clock", "arguments": "{}"}}
    row = Row((asked, calls | {"tool_calls": [as_text]}, *rest), "line 1")
    called = "{% set calls = messages | selectattr('tool_calls', 'defined') | list | length %}"
    result = "{% if m['role'] == 'tool' %}{{ '<to>result of a call: ' if calls else '<to>text: ' }}{% endif %}"
    tokenizer = make_tokenizer(called + TOOLS.replace("\n{% if", "\n" + result + "{% if", 1))
    assert trained_parts(encode(row, tokenizer), tokenizer) == ["<to>clock<stop>", "It is noon.<stop>"]
    inside = TOOLS.replace("<stop>\n", "{% if m.tool_calls %}{{ messages[2].content }}{% endif %}<stop>\n", 1)
    hiding = inside.replace("in messages", "in messages if m['role'] != 'tool' or not messages[1].tool_calls")
    tokenizer = make_tokenizer(hiding)
    example = encode(row, tokenizer)
    assert "clockNoon<stop>" in example.text
    assert "Noon" not in "".join(trained_parts(example, tokenizer))


BLANKS = {
    "a blank in the generation prompt that no turn has": (
        TOOLS.replace("<stop>\n", "<stop>").replace("prompt %}", "prompt %}{{ '\\n' }}"), "<to>clock<stop>"
    ),
    "a blank before the turn of a call": (
        TOOLS.replace("<stop>\n", "<stop>").replace("<turn>", "{{ '\\n' if m.tool_calls }}<turn>", 1), "<to>clock<stop>"
    ),
    "a blank after the last result of a call": (
        TOOLS.replace("<stop>\n", "{{ '\\n' if m['role'] == 'tool' and not loop.last }}<stop>\n"), "<to>clock<stop>"
    ),
    "a call in a turn of its own": (
        HEAD + "{{ m['content'] }}<stop>\n{% if m.tool_calls %}<turn>call\n{{ m.tool_calls[0].function.name }}<stop>\n"
        "{% endif %}{% endfor %}" + ASK,
        "<stop>\n<turn>call\nclock<stop>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("quirk", BLANKS)
def test_the_header_of_an_answer_is_never_trained(quirk):
    template, called = BLANKS[quirk]
    tokenizer = make_tokenizer(template)
    example = encode(Row(WITH_TOOL, "line 1"), tokenizer)
    assert trained_parts(example, tokenizer) == [called, "It is noon.<stop>"]


def test_a_row_whose_last_thought_the_template_leaves_out_is_refused():
    tokenizer = make_tokenizer(HEAD + "{{ m['content'].split('</think>')[-1] }}<stop>\n{% endfor %}" + ASK)
    thought = conversation("Well?", "<think>Hm.</think>Good.", "And?", "Fine.")
    assert trained_parts(encode(thought, tokenizer), tokenizer) == ["Good.<stop>", "Fine.<stop>"]
    last = conversation("Well?", "Good.", "And?", "<think>Hm.</think>Fine.")
    assert encode(last, tokenizer).problem == "the chat template leaves out the thought of an answer"
    empty = conversation("Well?", "<think>\n\n</think>\n\nGood.")
    assert encode(empty, tokenizer).problem is None


@pytest.mark.parametrize("template", ["guanaco", "auto"])
def test_an_answer_marked_as_not_to_be_learned_is_never_trained(template):
    tokenizer = make_tokenizer(PLAIN)
    messages = tuple(turn | ({"learn": False} if turn["content"] == "Good." else {}) for turn in ROW.messages)
    example = next(prompts.encode([Row(messages, "line 1")], Config(template=template), tokenizer))
    assert [part.strip() for part in trained_parts(example, tokenizer)] == ["Fine.<stop>"]


@pytest.mark.parametrize("adds", [("<stop>", None), (None, "<eos>"), ("<stop>", "<eos>")])
def test_start_tokens_come_once_and_end_tokens_are_never_added(adds):
    """Whatever the tokenizer adds to a text by itself."""
    from tokenizers.processors import TemplateProcessing

    start, end = adds
    tokenizer = make_tokenizer(PLAIN)
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in adds if token]
    pattern = " ".join(token for token in (start, "$A", end) if token)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=pattern, special_tokens=ids)
    head = [tokenizer.convert_tokens_to_ids(start)] if start else []
    assert prompts.start_tokens(tokenizer) == head
    plain, written = prompts.tokenize(["Good.", f"{start or ''}Good."], tokenizer)
    assert plain == written == [*head, *tokenizer("Good.", add_special_tokens=False)["input_ids"]]


@given(
    st.lists(st.text(min_size=1, max_size=20).filter(str.strip), min_size=2, max_size=6).filter(
        lambda t: len(t) % 2 == 0
    )
)
def test_whatever_the_texts_each_answer_is_trained_whole(texts):
    """For every quirk: the trained characters are the answers, as the template writes them."""
    row = conversation(*texts)
    for template, eos, *_ in QUIRKS.values():
        if "selectattr" in template:  # needs a system prompt
            continue
        tokenizer = make_tokenizer_once(template, eos)
        text, spans = rendering.render(row.messages, Config(template="auto"), tokenizer)
        if "</think>" in "".join(texts):
            continue
        assert [text[a:b].endswith(f"{answer}<stop>") for (a, b), answer in zip(spans, texts[1::2], strict=True)]


def make_tokenizer_once(template, eos, _known={}):  # noqa: B006  # trained once per template
    if (template, eos) not in _known:
        _known[template, eos] = make_tokenizer(template, eos)
    return _known[template, eos]
