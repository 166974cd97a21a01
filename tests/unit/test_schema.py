"""Records in the layouts in use: what each column is taken for, which turns are kept, and what is learned."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qlora_helpers import Config, UserError
from qlora_helpers.data import cleaning, prompts, schema

ASKED = {"role": "user", "content": "Where do herons nest?"}
TOLD = {"role": "assistant", "content": "In tall trees."}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"bird": "heron"}}}


def read(record, columns=None):
    """Read one record as a file with only this record. Returns the row and the counted changes."""
    given, changes = schema.parse_columns(columns), Counter()
    return schema.to_row(record, schema.recognize([record], "rows.jsonl", given), "line 1", changes, given), changes


def reason(record):
    """Return why a record is dropped."""
    with pytest.raises(ValueError, match=r".") as caught:
        read(record)
    return str(caught.value)


def plain(row):
    """Return role and content of each turn; a question's input is in parentheses."""
    return [(m["role"], f"{m['content']} ({m['input']})" if "input" in m else m["content"]) for m in row.messages]


ONE_ROUND = [("user", "q"), ("assistant", "a")]
LAYOUTS = {
    "Alpaca with its rendered text": {"instruction": "q", "input": "", "output": "a", "text": "### Instruction: q"},
    "prompt and completion": {"prompt": "q", "completion": "a"},
    "lists of turns": {
        "prompt": [{"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}],
    },
    "input and output": {"input": "q", "output": "a"},
    "query and answer": {"query": "q", "answer": "a"},
    "question and response": {"question": "q", "response": "a"},
    "problem and solution": {"problem": "q", "solution": "a"},
    "capitals": {"Instruction": "q", "INPUT": "", "Output ": "a"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "r"},
    "preference, whole conversations": {
        "prompt": "q",
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}],
    },
    "preference without a prompt": {
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "rejected": [],
    },
    "ShareGPT": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "ShareGPT under messages": {"messages": [{"from": "Human", "value": "q"}, {"from": "bot", "value": "a"}]},
    "content in parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a", "image_url": None}]},
        ]
    },
    "turns as JSON in a cell": {
        "messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'
    },
    "desirable": {"prompt": "q", "completion": "a", "label": True},
    "self-instruct": {"instruction": "q", "instances": [{"input": "<noinput>", "output": "a"}, {"output": "b"}]},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_in_use_give_the_same_conversation(name):
    row, changes = read(LAYOUTS[name])
    assert plain(row) == ONE_ROUND
    assert not changes


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "q", "context": "c", "response": "a"},
        {"question": "q", "context": "c", "answer": "a"},
        {"instruction": "q", "input": "c", "output": "a"},
        {"input": "q", "context": "c", "output": "a"},
    ],
)
def test_a_context_is_an_input(record):
    assert plain(read(record)[0]) == [("user", "q (c)"), ("assistant", "a")]


@pytest.mark.parametrize("empty", [None, float("nan"), "", " ", "nan", "NaN", "None", "null"])
def test_what_tables_write_for_an_empty_cell_is_no_input(empty):
    assert plain(read({"instruction": "q", "input": empty, "output": "a"})[0]) == ONE_ROUND


def test_the_word_none_is_an_answer():
    assert plain(read({"question": "q", "answer": "None"})[0])[-1] == ("assistant", "None")


@pytest.mark.parametrize(("value", "text"), [(8, "8"), (2.5, "2.5"), (True, "true"), (0, "0"), (False, "false")])
def test_numbers_and_booleans_as_answers_become_text(value, text):
    assert plain(read({"question": "q", "answer": value})[0])[-1] == ("assistant", text)


def test_a_row_keeps_its_own_system_turn():
    system = {"role": "system", "content": "Be brief."}
    assert plain(read({"messages": [system, ASKED, TOLD]})[0])[0] == ("system", "Be brief.")
    assert plain(read({"system_prompt": "Be brief.", "question": "q", "response": "a"})[0])[0] == (
        "system",
        "Be brief.",
    )
    assert plain(read({"messages": [system, ASKED, TOLD], "system": "Be long."})[0])[0] == ("system", "Be brief.")
    assert len(read({"system_prompt": "", "question": "q", "response": "a"})[0].messages) == 2


def test_tool_calls_and_results_are_kept_for_the_template():
    called = {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": "c1"}]}
    result = {"role": "tool", "content": "Tall trees", "tool_call_id": "c1"}
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    (first, call, answered, last) = read({"messages": [ASKED, called, result, TOLD], "tools": tools})[0].messages
    assert first["tools"] == '[{"type": "function", "function": {"name": "look_up"}}]'
    assert call == {"role": "assistant", "content": "", "tool_calls": [{**CALL, "id": "c1"}]}
    assert answered == result
    assert last == TOLD


@pytest.mark.parametrize(
    "turn",
    [
        {
            "role": "assistant",
            "tool_calls": [{"type": "function", "function": {**CALL["function"], "arguments": "{}"}}],
        },
        {"role": "assistant", "function_call": {"name": "look_up", "arguments": "{}"}},
        {"from": "function_call", "value": '{"name": "look_up", "arguments": {}}'},
    ],
)
def test_older_forms_of_a_call_become_the_current_one(turn):
    (_, call) = read({"messages": [ASKED, turn]})[0].messages
    assert call["tool_calls"] == [{"type": "function", "function": {"name": "look_up", "arguments": {}}}]


@pytest.mark.parametrize("tools", ["[]", [], None, float("nan"), ""])
def test_an_empty_list_of_tools_is_none(tools):
    assert "tools" not in read({"messages": [ASKED, TOLD], "tools": tools})[0].messages[0]


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"learn": False},
        {"training": "false"},
        {"loss_mask": 0},
        {"loss": False},
        {"masked": True},
    ],
)
def test_an_answer_marked_by_any_service_is_not_learned(mark):
    row, changes = read({"messages": [ASKED, TOLD | mark, ASKED, TOLD]})
    assert [m.get("learn", True) for m in row.messages if m["role"] == "assistant"] == [False, True]
    assert row.answers == (TOLD,)
    assert changes == {"an answer marked as not to be learned": 1}
    assert reason({"messages": [ASKED, TOLD | mark]}) == "every answer is marked as not to be learned"


@pytest.mark.parametrize(
    "mark", [{"weight": 1}, {"train": True}, {"loss_mask": 1}, {"masked": False}, {"weight": None}]
)
def test_an_answer_marked_as_learned_is_an_ordinary_one(mark):
    assert read({"messages": [ASKED, TOLD | mark]})[0].messages == (ASKED, TOLD)


def test_undesirable_answers_are_dropped_with_that_reason():
    for record in ({"prompt": "q", "completion": "a"}, {"messages": [ASKED, TOLD]}):
        assert reason(record | {"label": False}) == "label is false: the answer is not to be learned"
    assert read({"question": "q", "answer": "a", "label": 0})  # a class, which says nothing about the answer


def test_the_first_line_of_an_answer_keeps_its_indentation():
    prompt, body = 'def twice(x):\n    """Double it."""\n', "    y = 2 * x\n    return y\n"
    for completion in (body, "\n" + body, "\n\n\t\n" + body):
        question, answer = read({"prompt": prompt, "completion": completion})[0].messages
        assert question["content"] + answer["content"] + "\n" == prompt + completion
        assert answer["content"].startswith("    y")
        compile(question["content"] + answer["content"], "joined", "exec")
    assert read({"question": "q", "answer": "\n  a \n"})[0].answer == "  a"


def test_questions_in_a_row_are_joined_and_counted():
    more = {"role": "user", "content": "Be brief."}
    row, changes = read({"messages": [ASKED | {"input": "Europe"}, more, TOLD]})
    assert plain(row)[0] == ("user", "Where do herons nest?\n\nEurope\n\nBe brief.")
    assert changes == {"turns of one role joined": 1}


def test_a_conversation_starts_at_its_first_question():
    system = {"role": "system", "content": "s"}
    row, changes = read({"messages": [system, TOLD, ASKED, TOLD]})
    assert row.messages == (system, ASKED, TOLD)
    assert changes == {"first turns without a question left out": 1}


def test_keys_of_turns_that_are_not_used_are_counted():
    _, changes = read({"messages": [ASKED | {"mood": "curious"}, TOLD | {"mood": "calm"}]})
    assert changes == {"key 'mood' of a turn not used": 1}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": [{"role": "narrator", "content": "x"}, TOLD]}, "role 'narrator' is not known; rename it to user"),
        ({"messages": [{"speaker": "user", "content": "x"}, TOLD]}, "without 'role' or 'from' (has: speaker, content)"),
        ({"messages": [ASKED, TOLD, TOLD]}, "alternate"),
        ({"messages": [TOLD]}, "no question before an answer"),
        ({"messages": [ASKED]}, "no answer"),
        ({"messages": []}, "no answer"),
        ({"messages": [ASKED, {"role": "assistant", "content": None}]}, "null where text should be"),
        ({"messages": [ASKED, {"role": "assistant", "content": [{"type": "image_url"}]}]}, "'image_url'"),
        ({"messages": [ASKED, TOLD | {"weight": 0.5}]}, "weight is '0.5', neither true nor false"),
        ({"messages": [ASKED, TOLD | {"tool_calls": [{"name": "f"}]}]}, "without the name of a function"),
        ({"messages": [ASKED, TOLD | {"tool_calls": 5}]}, "without the name of a function"),
        ({"messages": [ASKED, TOLD], "tools": "look_up"}, "tools is no list"),
        ({"prompt": " \n", "completion": "a"}, "an empty turn"),
    ],
)
def test_a_record_that_is_no_conversation_is_dropped_with_its_reason(record, says):
    assert says in reason(record)


def test_what_each_column_is_taken_for_is_described():
    records = [
        {"": 0, "instruction": "q", "response": "a", "category": "x", "label": 3},
        {"instruction": "q", "context": "c", "response": "a"},
    ]
    assert schema.describe_columns(records, "instruction-response") == (
        "instruction = question, response = answer, context = input; not used: category, label"
    )


@pytest.mark.parametrize("record", [{"question": "q", "answer": "a"}, {"messages": [ASKED, TOLD]}])
@pytest.mark.parametrize("column", ["tests", "test", "Test"])
def test_tests_come_from_a_column_of_their_own(record, column):
    row, _ = read(record | {column: "assert f(2) == 4"})
    assert row.tests == "assert f(2) == 4"
    assert row.id == read(record)[0].id
    assert read(row.to_record())[0].tests == row.tests
    assert "tests" not in read(record)[0].to_record()


@pytest.mark.parametrize(
    ("cell", "tests"),
    [
        (["assert f(2) == 4", "assert f(0) == 0"], "assert f(2) == 4\nassert f(0) == 0"),
        ("\n\ndef check(f):\n    assert f(2) == 4\n", "def check(f):\n    assert f(2) == 4"),
        *((cell, "") for cell in (None, 3, True, float("nan"), "nan", " ", [], [1], {"a": "b"}, "\ud800")),
    ],
)
def test_a_cell_that_is_no_code_is_no_test_and_keeps_the_row(cell, tests):
    assert read({"question": "q", "answer": "a", "test": cell})[0].tests == tests
    told = schema.describe_columns([{"question": "q", "answer": "a", "test": cell}], "question-answer")
    assert ("test = tests" in told) is bool(tests)
    assert ("not used: test" in told) is not bool(tests)


def test_a_column_of_tests_can_be_named():
    record = {"question": "q", "answer": "a", "test_list": ["assert f(2) == 4"], "test": "x"}
    assert read(record, "tests=test_list")[0].tests == "assert f(2) == 4"


def test_columns_with_other_names_can_be_named():
    record = {"Frage": "q", "Antwort": "a", "answer": "x", "Rolle": "s", "Text": "c"}
    row, _ = read(record, "question=Frage, answer=antwort,system=Rolle,input=Text")
    assert plain(row) == [("system", "s"), ("user", "q (c)"), ("assistant", "a")]
    assert plain(read(record, "question=Frage")[0]) == [("user", "q"), ("assistant", "x")]
    assert read({"chat": [ASKED, TOLD], "prompt": "x", "completion": "y"}, "messages=chat")[0].messages == (ASKED, TOLD)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("questions=Frage", "Did you mean 'question'"),
        ("question", "no column is named for question"),
        ("question=Frage,answer=Reply", "rows.jsonl has no column 'Reply' (has: Antwort, Frage)"),
    ],
)
def test_a_mistake_in_the_setting_of_columns_is_named(columns, says):
    with pytest.raises(UserError) as caught:
        read({"Frage": "q", "Antwort": "a"}, columns)
    assert says in str(caught.value)


def test_plain_text_is_refused_with_what_to_do():
    with pytest.raises(UserError, match=r"no question and answer are marked.*Fix"):
        read({"text": "Herons nest in tall trees."})


words = st.text("ab ?\n", min_size=1, max_size=5)
roles = st.sampled_from(["user", "human", "assistant", "gpt", "system", "tool", "narrator"])
marks = st.sampled_from([{}, {}, {"weight": 0}, {"train": False}, {"weight": 1}, {"tool_calls": [CALL]}])
lists_of_turns = st.lists(
    st.builds(lambda role, content, mark: {"role": role, "content": content, **mark}, roles, words, marks), max_size=6
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
names = st.sampled_from(
    [
        "messages",
        "conversations",
        "text",
        "prompt",
        "completion",
        "instruction",
        "input",
        "output",
        "question",
        "answer",
        "chosen",
        "context",
        "system",
        "tools",
        "tests",
        "label",
        "instances",
    ]
)
anything = values | st.dictionaries(names, values | lists_of_turns | words)


@given(anything, st.sampled_from(sorted(schema.SCHEMAS)))
@hypothesis_settings(max_examples=500)
def test_any_json_value_becomes_a_row_or_is_dropped_with_a_reason(record, layout):
    try:
        row = schema.to_row(record, layout, "line 1", Counter())
    except ValueError as error:
        why = str(error)
    else:
        assert all(m["content"].strip() or m["role"] == "tool" or "tool_calls" in m for m in row.messages)
        why = row.answers
    assert why


@given(st.fixed_dictionaries({"messages": lists_of_turns}) | st.dictionaries(names, words))
@hypothesis_settings(max_examples=500)
def test_a_written_row_is_read_back_as_the_same_row(record):
    try:
        row, _ = read(record)
    except (ValueError, UserError):
        return
    again, _ = read(row.to_record())
    assert (again.id, again.tests) == (row.id, row.tests)


@given(
    learned=st.lists(st.booleans(), min_size=1, max_size=4),
    template=st.sampled_from(["guanaco", "instruction", "auto"]),
)
@hypothesis_settings(max_examples=60)
def test_no_text_of_an_answer_that_is_not_learned_is_trained(learned, template, tokenizer):
    turns = []
    for number, is_learned in enumerate(learned):
        turns.append({"role": "user", "content": f"Question {number}?"})
        answer = "Yes indeed." if is_learned else "NEVER EVER."
        turns.append({"role": "assistant", "content": answer, "weight": int(is_learned)})
    try:
        row, _ = read({"messages": turns})
    except ValueError:
        assert not any(learned)
        return
    (example,) = prompts.encode([row], Config(template=template, max_length=512), tokenizer)
    trained = tokenizer.decode([token for token in example.labels if token != prompts.IGNORE])
    assert trained.count("Yes indeed.") == sum(learned)
    assert "NEVER" not in trained
    assert "EVER" not in trained


def test_undesirable_rows_reach_neither_training_nor_the_heldout_rows(tokenizer, write_rows):
    rows = [{"prompt": f"Say {n * 7919}.", "completion": f"It is {n * 104729}.", "label": n % 3 > 0} for n in range(30)]
    data = cleaning.prepare(Config(dataset=write_rows(rows), n_samples=None, n_heldout=4, max_length=64), tokenizer)
    assert Counter(drop["reason"] for drop in data.dropped) == {"label is false: the answer is not to be learned": 10}
    assert len(data.train + data.heldout) == 20


def test_the_opening_is_the_first_question_with_its_answer_and_the_calls_in_it():
    """An answer that only calls a tool has no text."""
    turns = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rain in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather"}}]},
        {"role": "tool", "content": "wet"},
        {"role": "assistant", "content": "Yes."},
    )
    question, answer = schema.Row(turns, "line 1").opening
    assert question == "Rain in Oslo?"
    assert "weather" in answer
    assert "Yes." not in answer
