"""The model's own chat template: what it writes around the turns, and where the answers are.

Chat templates write turns in context: they drop earlier thoughts, move a system prompt, or end the last turn
differently. The text around the answers is therefore learned from the template itself, by rendering the same roles with
placeholders.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any, cast

from qlora_helpers.config import Config
from qlora_helpers.data import frames, time_limit
from qlora_helpers.data.builtin_templates import Span, Turns, UnplacedAnswer, end_text
from qlora_helpers.data.conversation import Message
from qlora_helpers.data.frames import Frame
from qlora_helpers.data.turns import arguments, called, split_thought, with_input
from qlora_helpers.errors import UserError

CHAT_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|[^\s<>\[\]]+")  # such as <|user|>, [INST] and USER:
THOUGHT_MARK = re.compile(r"</?\|?(think|thinking|thought|reasoning)\|?>")  # part of an answer, not between turns
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # how chat templates ask for today's date
PROBE = "\ue001"


@dataclass(frozen=True)
class ChatTemplate:
    """The model's own chat template.

    An answer begins where the generation prompt ends: after the longest beginning that the prompt and the whole text
    share. It ends with the first special token after its content. Where the template writes no end, `end_text` is added
    to the last answer.
    """

    config: Config
    tokenizer: Any
    known: dict[Any, Any] = field(default_factory=dict, compare=False)  # what does not depend on the words of a row

    def render(self, messages: Turns) -> tuple[str, list[Span]]:
        """Return the text of a conversation and the spans of its learned answers. Raises `UnplacedAnswer`."""
        turns = self._turns(messages)
        text = self._apply(turns)
        asked = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        contents = self._contents(turns, text, asked)
        spans = []
        for number in asked:
            start, content_end = contents[number]
            _check_place(turns, number, text[start:content_end])
            end = self._end(text, content_end)
            if turns[number].get("tool_calls"):  # what changes with a call may include the turn of its result
                last_call = max(text.find(name, start) for name in called(turns[number]))
                ends = any_of({*self._plain_ends, self.tokenizer.eos_token} - {None})
                mark = ends.search(text, last_call, content_end)
                end = mark.end() if mark else end
            if end is None and number == len(turns) - 1:
                text = text[:content_end] + end_text(self.config, self.tokenizer)
                end = len(text)
            if turns[number].get("learn", True):
                spans.append((start, content_end if end is None else end))
        return text, spans

    def prompt(self, messages: Turns) -> str:
        """Return the text up to where the next answer begins. Raises `UnplacedAnswer`."""
        turns = self._turns(messages)
        text = self._apply(turns, add_generation_prompt=True)
        before = self._before_answer(tuple(turn["role"] for turn in turns))
        # Some generation prompts lack the line break that the template writes before an answer.
        return text if before.strip("\n") else text + before

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """Tokens that end an answer: in the middle and at the end of a conversation, and after a tool call."""
        call = {"type": "function", "id": "call00000", "function": {"name": "clock", "arguments": {}}}
        asked, _, asked_again, answer = frames.sample(2)
        calls = {"role": "assistant", "content": "", "tool_calls": [call]}
        with_tools = (asked, calls, asked_again | {"role": "tool", "tool_call_id": "call00000"}, answer)
        try:
            return tuple(dict.fromkeys([*self._plain_ends, *self._last_tokens(with_tools)]))
        except UnplacedAnswer:  # many templates take no tools
            return self._plain_ends

    @cached_property
    def _plain_ends(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._last_tokens(frames.sample(2))))

    def _last_tokens(self, messages: Turns) -> list[str]:
        """Return the special token at the end of each answer."""
        text, spans = self.render(messages)
        return [token for start, end in spans for token in self._special.findall(text[start:end])[-1:]]

    @cached_property
    def marks(self) -> set[str]:
        """Text that only the template may write: markers between turns, also of system turns.

        Plain words, such as the name of a role, are excluded because ordinary text can contain them.
        """
        frame = self._frame(("user", "assistant", "user", "assistant"))
        between = " ".join([*frame.before[1:], frame.tail])
        between += " " + between.replace("user", "system").replace("USER", "SYSTEM")
        marks = {mark for mark in CHAT_MARK.findall(between) if not mark.isalnum() and len(mark) > 2}
        return {mark for mark in marks if not THOUGHT_MARK.fullmatch(mark)} - set(self.preamble.split())

    @cached_property
    def preamble(self) -> str:
        """Text that the template writes between the generation prompt and the words of an answer."""
        text, spans = self.render(frames.sample(1))
        return text[spans[0][0] : spans[0][1]].split("\ue000")[0]

    def warnings(self) -> list[str]:
        """Return what the user should know about the template, one line each."""
        if self._end(self._frame(("user", "assistant")).tail, 0) is not None:
            return []
        return [
            f"template: the chat template of {self.config.model} does not end an answer. "
            f"{end_text(self.config, self.tokenizer)!r} is added to the last answer, so that the model learns to stop. "
            "end_token=TOKEN chooses another token."
        ]

    def _turns(self, messages: Turns) -> list[Message]:
        """Return the turns as the template takes them: inputs joined to their questions, and the system prompt first.

        Where the template has no place for a system prompt, it goes before the first question.
        """
        turns = [with_input(turn) for turn in messages]
        if self.config.system and not any(turn["role"] == "system" for turn in turns):
            turns.insert(0, {"role": "system", "content": self.config.system})
        if len(turns) > 1 and turns[0]["role"] == "system" and not self._takes_system:
            system, asked, *rest = turns
            turns = [system | asked | {"content": f"{system['content']}\n\n{asked['content']}"}, *rest]
        return turns

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template shows a system turn."""
        try:
            return 0 in self._frame(("system", "user", "assistant")).order
        except UnplacedAnswer:
            return False

    def _apply(self, turns: list[Message], **options: Any) -> str:
        tools = next((json.loads(turn["tools"]) for turn in turns if turn.get("tools")), None)
        given = [{key: value for key, value in turn.items() if key not in ("learn", "tools")} for turn in turns]
        options["chat_template"] = self._dated(self.tokenizer.get_chat_template(tools=tools))
        if self.config.thinking is not None:
            options["enable_thinking"] = self.config.thinking
        # Some templates take the arguments of a tool call as an object, others as text.
        given, other = arguments(given, json.loads), arguments(given, json.dumps)
        reasons = []
        for variant in [given] if given == other else [given, other]:
            try:
                with time_limit.limited():
                    return str(self.tokenizer.apply_chat_template(variant, tools=tools, tokenize=False, **options))
            except UserError:
                raise
            except Exception as error:  # a template can raise many kinds of jinja errors
                reasons.append(str(error).splitlines()[0])
        raise UnplacedAnswer(f"the chat template refuses these turns ({reasons[0]})")

    def _dated(self, source: str) -> str:
        """Return a chat template with its date pinned, so that a run resumed on another day trains on the same text."""
        if source not in self.known:
            self.known[source] = TODAY.sub(lambda call: repr(self._today.strftime(call[2])), source)
        return str(self.known[source])

    @cached_property
    def _today(self) -> date:
        try:
            return date.fromisoformat(self.config.template_date)
        except ValueError:
            given = self.config.template_date
            raise UserError(f"template_date: '{given}' is not a date. Fix: write it as 2026-01-01.") from None

    def _frame(self, roles: tuple[str, ...], **options: Any) -> Frame:
        """Return what the template writes around turns with these roles. Raises `UnplacedAnswer`."""
        key = (roles, *options)
        if key not in self.known:
            turns = [{"role": role, "content": frames.place_of(number)} for number, role in enumerate(roles)]
            parts = frames.PLACE.split(self._apply(turns, **options))
            self.known[key] = Frame(tuple(map(int, parts[1::2])), tuple(parts[:-1:2]), parts[-1])
        return cast(Frame, self.known[key])

    def _contents(self, turns: list[Message], text: str, asked: list[int]) -> dict[int, Span]:
        """Return where each answer begins, at the end of the generation prompt, and where its content ends."""
        frame = self._frame(tuple(turn["role"] for turn in turns))
        if not set(asked) <= set(frame.order):
            raise UnplacedAnswer("the chat template does not show an answer")
        for change in (str, str.strip):
            written, places = frame.places([change(turn["content"]) for turn in turns])
            if written == text and len(frame.order) == len(places):
                return {n: (places[n][0] - self._preamble_length(turns, n, frame), places[n][1]) for n in asked}
        return {number: self._by_difference(turns, text, number, frame) for number in asked}

    def _preamble_length(self, turns: list[Message], number: int, frame: Frame) -> int:
        """Return the number of characters between the end of the generation prompt and the content of an answer."""
        key = (frame, roles := tuple(turn["role"] for turn in turns[:number]))
        if key not in self.known:
            rest = frames.after_prompt(frame.glue(number), self._frame(roles, add_generation_prompt=True).tail)
            self.known[key] = len(rest) if rest.strip("\n") else 0
        return int(self.known[key])

    def _before_answer(self, roles: tuple[str, ...]) -> str:
        """Return what the template writes between the generation prompt after these roles and the next answer."""
        glue = self._frame((*roles, "assistant")).before[-1]
        return frames.after_prompt(glue, self._frame(roles, add_generation_prompt=True).tail)

    def _by_difference(self, turns: list[Message], text: str, number: int, frame: Frame) -> Span:
        """Locate an answer that the template rewrites, as the part of the text that changes with it."""
        probe = {"role": "assistant", "content": PROBE}
        other = self._apply([*turns[:number], probe, *turns[number + 1 :]])
        place = other.find(PROBE)
        if place < 0:
            raise UnplacedAnswer("the chat template does not show an answer")
        start = self._whole(text, frames.shared(text, other))
        end = max(start, self._whole(text, len(text) - frames.shared(text[::-1], other[::-1])))
        if start == end:
            raise UnplacedAnswer("the chat template does not show an answer")
        if other[:place].endswith(frame.glue(number)):
            start = min(start, place - self._preamble_length(turns, number, frame))
        return start + self._header_length(turns[:number], text[start:end]), end

    def _header_length(self, before: list[Message], written: str) -> int:
        """Return the length of the generation prompt at the beginning of a part of the text.

        Some templates write another blank before the turn of a tool call, which makes the whole turn differ.
        """
        asking = self._apply(before, add_generation_prompt=True)
        header = asking[frames.shared(asking, self._apply(before)) :]
        starts = header.strip() and written.lstrip().startswith(header.strip())
        return len(written) - len(frames.after_prompt(written, header)) if starts else 0

    def _whole(self, text: str, place: int) -> int:
        """Return the start of the special token that `place` is inside of, or `place`."""
        inside = (match for match in self._special.finditer(text) if match.start() < place < match.end())
        return next((match.start() for match in inside), place)

    def _end(self, text: str, content_end: int) -> int | None:
        """Return where the end of an answer ends, or None if no special token follows its content."""
        match = self._blanks_and_special.match(text, content_end)
        return match.end() if match else None

    @cached_property
    def _blanks_and_special(self) -> re.Pattern[str]:
        return re.compile(rf"\s*({self._special.pattern})")

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Pattern of the tokens that the tokenizer treats as a unit, except those around a thought."""
        tokens = {str(token.content) for token in self.tokenizer.added_tokens_decoder.values()}
        tokens |= set(self.tokenizer.all_special_tokens)
        return any_of(token for token in tokens if token.strip() and not THOUGHT_MARK.fullmatch(token))


def _check_place(turns: list[Message], number: int, written: str) -> None:
    """Raise `UnplacedAnswer` if a tool call or a thought is missing, or the result of a call is within the answer.

    Many templates leave out the thoughts of earlier answers, as the model is used; that of the last is to be learned.
    """
    calls = called(turns[number])
    if not all(name in written for name in calls):
        raise UnplacedAnswer("the chat template has no place for tool calls")
    thought, _ = split_thought(turns[number]["content"].strip())
    if number == len(turns) - 1 and thought not in written:
        raise UnplacedAnswer("the chat template leaves out the thought of an answer")
    results = [turn["content"] for turn in turns[number + 1 :] if turn["role"] == "tool"]
    if calls and any(result.strip() and result.strip() in written for result in results):
        raise UnplacedAnswer("the chat template writes a tool's result inside an answer")


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the words, the longest first."""
    ordered = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
