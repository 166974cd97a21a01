"""A chat template that does not come to an end is stopped, in whichever thread it is rendered."""

import contextlib
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_helpers import UserError
from qlora_helpers.data import time_limit

# Ends after some seconds, so that a missing limit fails the test instead of hanging it.
ENDLESS = "{% set r = range(99999) %}{% for a in range(2000) %}{% for b in r %}{% endfor %}{% endfor %}"
TURNS = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(time_limit, "SECONDS", 0.3)
    monkeypatch.setattr(time_limit, "POLL", 0.05)
    monkeypatch.setattr(time_limit, "_watcher", None)


def render(tokenizer, template):
    with time_limit.limited():
        return tokenizer.apply_chat_template(TURNS, chat_template=template, tokenize=False)


@pytest.mark.parametrize("where", ["the main thread", "another thread"])
def test_an_endless_template_is_stopped(short, tokenizer, where):
    raised = []

    def attempt():
        try:
            render(tokenizer, ENDLESS)
        except UserError as error:
            raised.append(str(error))

    if where == "the main thread":
        attempt()
    else:
        thread = threading.Thread(target=attempt)
        thread.start()
        thread.join(30)
    assert raised == [time_limit.ENDLESS.format("does not come to an end within 0.3 s")]
    assert render(tokenizer, "{{ messages[0].content }}") == "Hi"


def test_what_ends_in_time_is_not_stopped_afterwards(short):
    with time_limit.limited():
        pass
    threading.Event().wait(0.6)
    assert time_limit._ends == {}


@pytest.mark.parametrize("template", ["{{ 9 ** 9 ** 9 }}", "{% set x = 10**10**10 %}", "{% if 2 **9 %}{% endif %}"])
def test_a_template_that_computes_powers_is_refused(template):
    with pytest.raises(UserError, match=r"computes powers \(\*\*\)\. Fix"):
        time_limit.check_operators(template)


@pytest.mark.parametrize(
    "template", ["**Tools**: {{ '**bold**' * 2 }}", "{% generation %}{{ 1 * 2 }}{% endgeneration %}"]
)
def test_bold_text_is_no_power(template):
    time_limit.check_operators(template)


@given(st.text("{}%'\"* a1#-", max_size=40))
def test_any_text_can_be_checked(template):
    if "**" not in template:
        time_limit.check_operators(template)
    else:
        with contextlib.suppress(UserError):
            time_limit.check_operators(template)
