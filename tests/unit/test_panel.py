"""The chat panel: growing answers of all models from one base model in memory, and its buttons in a real kernel."""

import json
from threading import Thread

import pytest
import torch

from qlora_helpers import UserError, files
from qlora_helpers.chat import panel, side_by_side
from qlora_helpers.chat.side_by_side import Table
from qlora_helpers.data import prompts, rendering, sources
from qlora_helpers.device import detect
from qlora_helpers.evaluation.row_losses import BASE
from qlora_helpers.models import qlora
from qlora_helpers.runs import RunFolder

NEW = 10  # not a multiple of a step
QUESTIONS = ["What is <b>rain</b>?", "And snow?"]


@pytest.fixture(scope="module")
def make_runs(config, tmp_path_factory):
    """Two runs on one base model with adapters that change answers; the second uses the model's own chat template."""

    def make(quantization):
        small = config.replace(quantization=quantization)
        device, experiments = detect(small.compute_dtype), {}
        for name, own in {"exp1": small, "exp2, auto": small.replace(rank=8, template="auto")}.items():
            run = RunFolder(tmp_path_factory.mktemp("runs") / "run")
            built = qlora.attach_lora(qlora.load_base(own, device), own)
            for key, p in built.named_parameters():
                if "lora_B" in key:
                    p.data.normal_(std=0.3)
            built.save_pretrained(run.adapter)
            files.write_json(run / "config.json", {"identity": {}, "config": own.to_dict()})
            experiments[name] = [run]
        return experiments

    return make


@pytest.fixture(scope="module")
def experiments(make_runs):
    return make_runs("nf4")


@pytest.fixture(scope="module")
def loaded(experiments):
    return side_by_side.load(experiments)


@pytest.fixture
def talk(loaded):
    return panel.Conversation(loaded, NEW)


def finish(steps):
    return sum(1 for _ in steps)


def alone(experiments, name, ids):
    """Tokens from a single call of `generate`, with the base model and at most one adapter in memory."""
    run = experiments["exp1" if name == BASE else name][0]
    config = run.config()
    built = qlora.load_base(config, detect(config.compute_dtype))
    built = built if name == BASE else qlora.load_adapter(built, run.adapter)
    with torch.inference_mode():
        output = built.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=1
        )
    return output[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_answers_in_steps_equal_those_of_a_single_call(make_runs, quantization, tokenizer):
    """Token by token, in two rounds, with the other models answering in between."""
    experiments = make_runs(quantization)
    loaded = side_by_side.load(experiments)
    talk, expected = panel.Conversation(loaded, NEW), {}
    for number, question in enumerate(QUESTIONS):
        ids = {}
        for name, config in loaded.configs.items():
            turns = (*talk.turns[name], {"role": "user", "content": question})
            text = rendering.render_prompt(turns, config, tokenizer)
            ids[name] = torch.tensor(prompts.tokenize([text], tokenizer))
        assert finish(talk.ask(f"  {question}\n")) >= 3
        for name, prompt in ids.items():
            expected[name] = alone(experiments, name, prompt)
            (*_, tokens) = talk._tokens(name, prompt, 0.0)
            assert tokens == expected[name], name
            assert (
                talk.turns[name][-1]["content"]
                == tokenizer.decode(tokens, skip_special_tokens=True).rstrip(panel.CUT).strip()
            )
            assert [turn["role"] for turn in talk.turns[name]] == ["user", "assistant"] * (number + 1)
        assert len({str(tokens) for tokens in expected.values()}) == 3


def test_only_one_base_model_is_in_memory(experiments, monkeypatch):
    loads = []
    monkeypatch.setattr(qlora, "load_base", lambda *a, load=qlora.load_base: loads.append(load(*a)) or loads[-1])
    talk = panel.Conversation(side_by_side.load(experiments), NEW)
    finish(talk.ask("Why?"))
    (base,) = loads
    every = dict(talk.loaded.adapters.model.named_parameters())
    own = [p for name, p in every.items() if ".lora_" not in name]
    assert {p.data_ptr() for p in own} == {p.data_ptr() for n, p in base.named_parameters() if ".lora_" not in n}


def test_answer_stops_at_the_end_token(loaded, talk, monkeypatch):
    ids = talk._prompt("exp1", ({"role": "user", "content": "Why?"},))
    (*_, full) = talk._tokens("exp1", ids, 0.0)
    end = next(n for n, token in enumerate(full) if n and token not in full[:n])
    monkeypatch.setattr(rendering, "end_tokens", lambda config, tokenizer: [full[end]])
    (*_, short) = talk._tokens("exp1", ids, 0.0)
    assert short == full[: end + 1]


def test_sampling_follows_temperature_and_seed(talk):
    ids = talk._prompt("exp1", ({"role": "user", "content": "Why?"},))

    def say(seed):
        torch.manual_seed(seed)
        (*_, tokens) = talk._tokens("exp1", ids, 2.0)
        return tokens

    assert say(0) == say(0) != say(1)


def test_closing_the_iterator_stops_the_answers(talk):
    growing = talk.ask("Why?")
    next(growing)
    first = json.dumps(talk.turns)
    assert len(talk.loaded.tokenizer(talk.turns[BASE][-1]["content"])["input_ids"]) < NEW
    growing.close()
    assert json.dumps(talk.turns) == first
    talk.clear()
    assert talk.entries() == []


def test_conversation_longer_than_the_context_is_refused(talk):
    with pytest.raises(UserError, match=r"context of 512 has to hold 10 of the answer too. Fix: clear"):
        finish(talk.ask("why? " * 500))
    assert talk.entries() == []


def test_exported_row_is_read_back(talk, config, tmp_path):
    answer = 'Say "no".\n\n  x = 1 < 2 & é\u2028😀'
    talk.turns["exp1"] = [
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "So."},
    ]
    shown = panel.Panel(talk)
    shown.which.value = "exp1"
    shown.take.click()
    assert shown.row.value.count("\n") == 0
    (tmp_path / "rows.jsonl").write_text(shown.row.value, "utf-8")
    read = sources.load(config.replace(dataset=str(tmp_path / "rows.jsonl")))
    assert [list(row.messages) for row in read.rows] == [talk.turns["exp1"]]
    assert read.rejected == []


@pytest.mark.parametrize(("answer", "reason"), [(None, "no answer"), ("", "an empty turn"), ("a\ufffdb", "broken")])
def test_row_that_loading_would_drop_is_refused(talk, answer, reason):
    if answer is not None:
        talk.turns["exp1"] = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}]
    with pytest.raises(UserError, match=f"exp1 is not a valid row .{reason}.*Fix"):
        talk.row("exp1")


def test_click_in_another_thread_waits_for_the_step(talk, monkeypatch):
    shown, clicks = panel.Panel(talk, "Why?"), []
    tokens = talk._tokens

    def clicked_in_the_middle(*args):
        for answer in tokens(*args):
            if not clicks:
                clicks.append(Thread(target=shown.clear.click))
                clicks[0].start()
                clicks[0].join(0.5)
            yield answer

    monkeypatch.setattr(talk, "_tokens", clicked_in_the_middle)
    shown.send.click()
    shown.clock.value = 1
    clicks[0].join(10)
    assert talk.entries() == []
    assert shown.growing is None
    assert "error" not in shown.status.value


def test_with_ipywidgets_7_the_play_widget_itself_sends_and_stops(talk, monkeypatch):
    """There, a kernel cannot start it: its view begins to tick only when someone presses ▶."""
    import ipywidgets

    has_trait = ipywidgets.Play.has_trait
    monkeypatch.setattr(ipywidgets.Play, "has_trait", lambda self, name: name != "playing" and has_trait(self, name))
    shown = panel.Panel(talk, "Why?")
    assert shown.clock.layout.display is None
    assert shown.send not in shown.box.children[2].children
    shown.clock.value = 1
    assert shown.growing is not None
    shown.clock.value = 0
    assert shown.growing is None
    assert "Why?" in str(talk.entries())
    shown.clock.value = 2  # once more, before it learns of the stop
    assert shown.growing is None


CODE = """
from pathlib import Path
from qlora_helpers.chat import panel, side_by_side
from qlora_helpers.runs import RunFolder

loaded = side_by_side.load({"exp1": [RunFolder(Path(%r))]})
shown = panel.show(loaded, ["What is <b>rain</b>?", "And snow?"], 24)
shown
"""


class Browser:
    """A front end: finds widgets by type or label, sends user actions, and stores the state that it receives."""

    def __init__(self, kernel, messages):
        self.kernel, self.states, self.ids = kernel, {}, {}
        self.receive(messages)

    def receive(self, messages):
        for message in messages:
            content = message["content"]
            if message["msg_type"] == "comm_open":
                state = self.states[content["comm_id"]] = content["data"]["state"]
                for key in ("description", "placeholder", "_model_name"):
                    self.ids.setdefault(state.get(key), content["comm_id"])
            elif message["msg_type"] == "comm_msg" and content["data"]["method"] == "update":
                self.states[content["comm_id"]].update(content["data"]["state"])
            assert message["msg_type"] != "error", content

    def __call__(self, *actions):
        """Send several actions, (widget, message), without waiting for the kernel in between."""
        for name, data in actions:
            self.state(name).update(data.get("state", {}))
        sent = [self.kernel.send(self.ids[name], data) for name, data in actions]
        self.receive(self.kernel.until_idle(sent[-1]))

    def state(self, name):
        return self.states[self.ids[name]]

    def pages(self):
        return [s["value"] for s in self.states.values() if s["_model_name"] == "HTMLModel"]


def change(**state):
    return {"method": "update", "state": state, "buffer_paths": []}


CLICK = {"method": "custom", "content": {"event": "click"}}


@pytest.fixture(scope="module")
def browser(kernel, experiments):
    messages = kernel(CODE % str(experiments["exp1"][0].path))
    (data,) = [m["content"]["data"] for m in messages if m["msg_type"] == "execute_result"]
    assert data[side_by_side.WIDGET]["model_id"] in [m["content"].get("comm_id") for m in messages]
    assert "running notebook" in data["text/html"]
    return Browser(kernel, messages)


def test_panel_in_a_kernel(browser):
    """Ask, watch, stop midway, continue, export a row and clear, with the installed version of ipywidgets."""
    playing = "playing" if "playing" in browser.state("PlayModel") else "_playing"
    clock, question, row = "PlayModel", "your question", "one line for a .jsonl file: select and copy"
    assert browser.state(question)["value"] == "What is <b>rain</b>?"
    browser((clock, change(value=1)))  # a tick of before, while a question is being written
    assert browser.state(question)["value"] == "What is <b>rain</b>?"
    browser(("Send", CLICK), ("Send", CLICK))
    assert browser.state(clock)[playing]
    assert [browser.state(name)["disabled"] for name in ("Send", "Stop")] == [True, False]
    browser((clock, change(value=1)))
    first = browser.pages()
    assert sum("What is &lt;b&gt;rain&lt;/b&gt;?" in page for page in first) == 2
    assert not any("<b>" in page for page in first)
    assert browser.state(question)["value"] == ""
    browser((clock, change(value=2)))
    second = browser.pages()
    assert second != first
    # The clock may advance once more before it learns of the stop. That must not start anything.
    browser(("Stop", CLICK), (clock, change(value=3)), (clock, change(value=4)))
    assert [browser.state(name)["disabled"] for name in ("Send", "Stop")] == [False, True]
    stopped = browser.pages()
    assert stopped[:2] == second[:2]
    assert (browser.state(clock)[playing], browser.state(clock)["value"]) == (False, 0)
    browser((question, change(value="And snow?")))
    browser(("Send", CLICK))
    for step in range(1, 9):  # 24 tokens in steps of 4, and one step that detects the end
        browser((clock, change(value=step)))
        if not browser.state(clock)[playing]:
            break
    assert step == 7
    assert all("And snow?" in page for page in browser.pages()[:2])
    assert browser.state(clock)["value"] == 0
    code = "for n, turn in enumerate(shown.conversation.turns['exp1']): turn['content'] = f'<i>{n}'"
    browser.kernel(code)  # a random model writes broken characters, which are not valid in a row
    browser(("As a row", CLICK))
    messages = json.loads(browser.state(row)["value"])["messages"]
    assert messages == [{"role": ("user", "assistant")[n % 2], "content": f"<i>{n}"} for n in range(4)]
    browser(("Clear", CLICK))
    assert "rain" not in "".join(browser.pages())
    assert browser.state(row)["value"] == ""


def test_panel_shows_errors(browser):
    playing = "playing" if "playing" in browser.state("PlayModel") else "_playing"
    browser(("As a row", CLICK))
    assert "exp1 is not a valid row (no answer). Fix" in browser.pages()[-1]
    browser(("your question", change(value="why? " * 500)), ("Send", CLICK), ("PlayModel", change(value=1)))
    assert "has to hold 24 of the answer too. Fix: clear the conversation" in browser.pages()[-1]
    assert browser.state("PlayModel")[playing] is False
    assert browser.state("your question")["value"] == "why? " * 500
    browser(("your question", change(value="")), ("PlayModel", change(value=2)))
    assert "Fix: clear the conversation" in browser.pages()[-1]  # a late step does not clear the message


def test_notebook_without_a_person_shows_an_example_conversation(kernel, experiments, loaded):
    messages = kernel(CODE % str(experiments["exp1"][0].path), person=False)
    (data,) = [m["content"]["data"] for m in messages if m["msg_type"] == "execute_result"]
    assert set(data) == {"text/html", "text/plain"}
    assert not [m for m in messages if m["msg_type"].startswith("comm")]
    talk = panel.Conversation(loaded, 24)
    for question in QUESTIONS:
        finish(talk.ask(question))
    entries = [{name: text for name, text in entry.items() if name != "exp2, auto"} for entry in talk.entries()]
    assert data["text/html"] == Table(entries)._repr_html_()
