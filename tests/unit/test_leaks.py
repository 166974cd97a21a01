"""Leaks: a training row must share no question, answer or round with a held-out row."""

import pytest

from qlora_helpers.data.leaks import NEAR_ANSWER, NEAR_PROMPT, NEAR_ROUND, HeldOut, parts
from qlora_helpers.data.schema import Row


def chat(*turns, **last):
    """A conversation of alternating questions and answers."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    messages[-1] |= last
    return Row(tuple(messages), "line 1")


STRANGERS = [
    chat(f"Where does the {noun} come from?", f"The {noun} comes from {place}, far away.")
    for noun, place in zip(
        ["violin", "lantern", "kettle", "ladder"], ["Cremona", "Xian", "Delft", "Jericho"], strict=True
    )
]
SPIDER = chat("How many legs does a spider have?", "A spider has eight legs, two more than an insect.")


def leak(heldout, row, others=()):
    """Return the reason for which `row` leaks a held-out row, or None."""
    held = HeldOut([heldout, row, *STRANGERS, *others], 0.7)
    held.add(heldout)
    found = held.leak(row)
    assert found is None or found.heldout is heldout
    return found and found.reason


def test_the_same_question_is_a_leak_whatever_its_answer():
    assert leak(SPIDER, chat("how many legs does a spider have", "Eight, in four pairs.")) == NEAR_PROMPT
    assert leak(SPIDER, chat("How many legs does a beetle have?", "Six, in three pairs.")) is None


def test_a_leak_names_its_row_also_after_two_held_out_rows_that_agree():
    again = chat("How many legs does a spider have?", "Eight of them, in four pairs.")
    other = chat("Which river runs through the city of Vienna?", "The Danube, which Strauss called blue.")
    held = HeldOut([SPIDER, again, other, *STRANGERS], 0.7)
    for row in (SPIDER, again, other):
        held.add(row)
    found = held.leak(chat(other.messages[0]["content"], "It is the Danube."))
    assert (found.heldout, found.reason) == (other, NEAR_PROMPT)


def test_the_same_answer_to_another_question_is_a_leak():
    row = chat("Tell me about the limbs of arachnids.", SPIDER.answer.upper())
    assert leak(SPIDER, row) == NEAR_ANSWER


def test_an_answer_that_is_not_learned_is_no_leak():
    row = chat("Tell me about the limbs of arachnids.", SPIDER.answer, learn=False)
    assert leak(SPIDER, row) is None


@pytest.mark.parametrize("turned", [False, True])
def test_a_later_round_is_a_leak(turned):
    long = chat("What is an arachnid?", "An animal such as a tick or a mite.", *(m["content"] for m in SPIDER.messages))
    assert leak(*((long, SPIDER) if turned else (SPIDER, long))) == NEAR_ANSWER


def test_a_later_round_with_a_short_answer_is_a_leak():
    short = chat("How many legs does a spider have?", "Eight.")
    long = chat("What are arachnids, roughly?", "Ticks.", "How many legs does a spider have?", "Eight.")
    assert leak(short, long) == NEAR_ROUND
    other = chat("What are arachnids, roughly?", "Ticks.", "How many legs does a lobster have?", "Ten.")
    assert leak(short, other) is None


def test_the_branches_of_one_conversation_are_leaks():
    start = ("Explain how a loom works, please.", "A loom holds the warp tight while the weft passes through it.")
    a = chat(*start, "And by hand?", "One lifts the threads with a heddle.")
    b = chat(*start, "Who built the first?", "Nobody knows who built the first one.")
    assert leak(a, b) == NEAR_PROMPT


@pytest.mark.parametrize("hello", ["Hi", "Hello there, I need your help with something."])
def test_a_greeting_before_different_questions_is_no_leak(hello):
    rows = [
        chat(hello, "Hello, how can I help you today?", f"My {noun} arrived torn. What now?", f"Send the {noun} back.")
        for noun in ["carpet", "kite", "tent", "sail", "flag", "quilt"]
    ]
    assert leak(rows[0], rows[1], rows[2:]) is None
    assert leak(rows[0], chat(*(m["content"] for m in rows[0].messages[:3]), "No idea."), rows[1:]) == NEAR_PROMPT


@pytest.mark.parametrize("label", ["positive", "The mood of this text is a positive one."])
def test_equal_labels_are_no_leak(label):
    texts = ["I loved it.", "What a day!", "Never again.", "It was fun.", "So kind of you.", "The best tea."]
    rows = [chat(f"Which mood has this text: {text}", label) for text in texts]
    assert leak(rows[0], rows[1], rows[2:]) is None


def test_a_constant_instruction_with_another_input_is_no_leak():
    rows = [
        Row(({"role": "user", "content": "Sort the letter into one of the rooms of the museum: " + "a, b, c, " * 20,
              "input": f"My {noun} broke."}, {"role": "assistant", "content": "workshop"}), "line 1")
        for noun in ["harp", "loom"]
    ]  # fmt: skip
    assert leak(*rows) is None
    assert leak(rows[0], rows[0]) == NEAR_PROMPT


def test_words_of_many_questions_may_be_replaced():
    others = [chat(f"How {verb} I sew a {noun}{i}?", f"Sew it {i} times.") for i in range(30)
              for verb in ("do", "can") for noun in ("sock", "boat")]  # fmt: skip
    rows = [chat(f"How {verb} I bake a good loaf in my oven at home?", f"One {verb}.") for verb in ("do", "can")]
    assert leak(*rows) is None  # too few rows to tell which words are common
    assert leak(*rows, others) == NEAR_PROMPT


def test_what_is_found_does_not_depend_on_the_order_of_the_rows():
    rows = [chat(f"What is {i} of {i}, exactly?", f"The answer to it is {i % 9}, as always.") for i in range(60)]
    phrases = [HeldOut(order, 0.7)._phrases for order in (rows, rows[::-1])]
    assert phrases[0] == phrases[1] != set()


def test_the_parts_of_a_row_are_all_that_it_teaches():
    call = [{"type": "function", "function": {"name": "weather", "arguments": "{}"}}]
    row = chat("Weather?", "", tool_calls=call)
    assert parts(row) != parts(chat("Weather?", ""))
    assert parts(chat("a", "b")) != parts(chat("a", "b", learn=False))
    assert parts(chat("a", "b")) != parts(chat("a b", ""))
