"""The model's own chat template: what it writes around the turns, and where the answers are.

Chat templates write turns in context: they drop earlier thoughts, move a system prompt, or end the last turn
differently. The text around the answers is therefore learned from the template itself, by rendering the same roles with
placeholders.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any

from qlora_helpers.config import Config
from qlora_helpers.data.builtin_templates import Span, Turns, UnplacedAnswer, end_text
from qlora_helpers.data.conversation import Message
from qlora_helpers.errors import UserError

CHAT_MARK = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|[^\s<>\[\]]+")  # such as <|user|>, [INST] and USER:
THOUGHT_MARK = re.compile(r"</?\|?(think|thinking|thought|reasoning)\|?>")  # part of an answer, not between turns
TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")  # how chat templates ask for today's date
PLACE = re.compile("\ue000(\\d+)\ue000")  # private-use characters, which occur in no text and no template
PROBE = "\ue001"


@dataclass(frozen=True)
class Frame:
    """What a chat template writes around the turns of a sequence of roles.

    `order` are the turns in the order of the text: `before[i]` precedes turn `order[i]`, and `tail` follows the last.
    """

    order: tuple[int, ...]
    before: tuple[str, ...]
    tail: str

    def places(self, contents: list[str]) -> tuple[str, dict[int, Span]]:
        """Return the text with these contents, and the span of each turn's content."""
        text, spans = "", {}
        for turn, glue in zip(self.order, self.before, strict=True):
            start = len(text) + len(glue)
            text += glue + contents[turn]
            spans[turn] = (start, len(text))
        return text + self.tail, spans

    def glue(self, turn: int) -> str:
        """Return the text between the content before a turn and that of the turn."""
        return self.before[self.order.index(turn)]


@dataclass(frozen=True)
class ChatTemplate:
    """The model's own chat template.

    An answer begins where the generation prompt ends: after the longest beginning that the prompt and the whole text
    share. It ends with the first special token after its content. Where the template writes no end, `end_text` is added
    to the last answer.
    """

    config: Config
    tokenizer: Any
    frames: dict[Any, Frame] = field(default_factory=dict, compare=False)

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
                called = max(text.find(name, start) for name in _called(turns[number]))
                ends = any_of({*self._plain_ends, self.tokenizer.eos_token} - {None}).search(text, called, content_end)
                end = ends.end() if ends else end
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
        asked, _, asked_again, answer = sample(2)
        calls = {"role": "assistant", "content": "", "tool_calls": [call]}
        with_tools = (asked, calls, asked_again | {"role": "tool", "tool_call_id": "call00000"}, answer)
        try:
            return tuple(dict.fromkeys([*self._plain_ends, *self._last_tokens(with_tools)]))
        except UnplacedAnswer:  # many templates take no tools
            return self._plain_ends

    @cached_property
    def _plain_ends(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self._last_tokens(sample(2))))

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
        text, spans = self.render(sample(1))
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
        turns = [_with_input(turn) for turn in messages]
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
        source = self.tokenizer.get_chat_template(tools=tools)
        # Dates are pinned, so that a run resumed on another day trains on the same text.
        options["chat_template"] = TODAY.sub(lambda call: repr(self._today.strftime(call[2])), source)
        if self.config.thinking is not None:
            options["enable_thinking"] = self.config.thinking
        # Some templates take the arguments of a tool call as an object, others as text.
        given, other = _arguments(given, json.loads), _arguments(given, json.dumps)
        reasons = []
        for variant in [given] if given == other else [given, other]:
            try:
                return str(self.tokenizer.apply_chat_template(variant, tools=tools, tokenize=False, **options))
            except Exception as error:  # a template can raise many kinds of jinja errors
                reasons.append(str(error).splitlines()[0])
        raise UnplacedAnswer(f"the chat template refuses these turns ({reasons[0]})")

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
        if key not in self.frames:
            turns = [{"role": role, "content": place_of(number)} for number, role in enumerate(roles)]
            parts = PLACE.split(self._apply(turns, **options))
            self.frames[key] = Frame(tuple(map(int, parts[1::2])), tuple(parts[:-1:2]), parts[-1])
        return self.frames[key]

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
        prompt = self._frame(tuple(turn["role"] for turn in turns[:number]), add_generation_prompt=True)
        rest = _after_prompt(frame.glue(number), prompt.tail)
        return len(rest) if rest.strip("\n") else 0

    def _before_answer(self, roles: tuple[str, ...]) -> str:
        """Return what the template writes between the generation prompt after these roles and the next answer."""
        glue = self._frame((*roles, "assistant")).before[-1]
        return _after_prompt(glue, self._frame(roles, add_generation_prompt=True).tail)

    def _by_difference(self, turns: list[Message], text: str, number: int, frame: Frame) -> Span:
        """Locate an answer that the template rewrites, as the part of the text that changes with it."""
        probe = {"role": "assistant", "content": PROBE}
        other = self._apply([*turns[:number], probe, *turns[number + 1 :]])
        place = other.find(PROBE)
        if place < 0:
            raise UnplacedAnswer("the chat template does not show an answer")
        start = self._whole(text, _shared(text, other))
        end = max(start, self._whole(text, len(text) - _shared(text[::-1], other[::-1])))
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
        header = asking[_shared(asking, self._apply(before)) :]
        starts = header.strip() and written.lstrip().startswith(header.strip())
        return len(written) - len(_after_prompt(written, header)) if starts else 0

    def _whole(self, text: str, place: int) -> int:
        """Return the start of the special token that `place` is inside of, or `place`."""
        inside = (match for match in self._special.finditer(text) if match.start() < place < match.end())
        return next((match.start() for match in inside), place)

    def _end(self, text: str, content_end: int) -> int | None:
        """Return where the end of an answer ends, or None if no special token follows its content."""
        match = re.compile(rf"\s*({self._special.pattern})").match(text, content_end)
        return match.end() if match else None

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Pattern of the tokens that the tokenizer treats as a unit, except those around a thought."""
        tokens = {str(token.content) for token in self.tokenizer.added_tokens_decoder.values()}
        tokens |= set(self.tokenizer.all_special_tokens)
        return any_of(token for token in tokens if token.strip() and not THOUGHT_MARK.fullmatch(token))


def _arguments(turns: list[Message], change: Callable[[Any], Any]) -> list[Message]:
    """Return the turns with the arguments of their tool calls as an object (`json.loads`) or as text (`json.dumps`)."""
    wanted = str if change is json.loads else dict
    changed = []
    for turn in turns:
        calls = []
        for call in turn.get("tool_calls") or []:
            function = call.get("function", {})
            given = function.get("arguments")
            try:
                arguments = change(given) if isinstance(given, wanted) else given
            except ValueError:  # text that is not JSON
                arguments = given
            calls.append(call | {"function": function | {"arguments": arguments}})
        changed.append(turn | {"tool_calls": calls} if calls else turn)
    return changed


def _check_place(turns: list[Message], number: int, written: str) -> None:
    """Raise `UnplacedAnswer` if a tool call or a thought is missing, or the result of a call is within the answer.

    Many templates leave out the thoughts of earlier answers, as the model is used; that of the last is to be learned.
    """
    calls = _called(turns[number])
    if not all(name in written for name in calls):
        raise UnplacedAnswer("the chat template has no place for tool calls")
    thought = turns[number]["content"].partition("</think>")[0].removeprefix("<think>").strip()
    if number == len(turns) - 1 and "</think>" in turns[number]["content"] and thought not in written:
        raise UnplacedAnswer("the chat template leaves out the thought of an answer")
    results = [turn["content"] for turn in turns[number + 1 :] if turn["role"] == "tool"]
    if calls and any(result.strip() and result.strip() in written for result in results):
        raise UnplacedAnswer("the chat template writes a tool's result inside an answer")


def _called(turn: Message) -> list[str]:
    """Return the names of the functions that a turn calls."""
    return [str(call.get("function", call).get("name")) for call in turn.get("tool_calls") or []]


def _with_input(turn: Message) -> Message:
    given = {key: value for key, value in turn.items() if key != "input"}
    return given | {"content": f"{turn['content']}\n\n{turn['input']}"} if turn.get("input") else given


def place_of(number: int) -> str:
    """Return the placeholder of a turn."""
    return f"\ue000{number}\ue000"


def sample(rounds: int) -> Turns:
    """Return a conversation of placeholders."""
    roles = ("user", "assistant") * rounds
    return tuple({"role": role, "content": place_of(number)} for number, role in enumerate(roles))


def _after_prompt(glue: str, prompt: str) -> str:
    """Return the part of the text before an answer that follows the generation prompt.

    The prompt is the beginning that both share. In some templates they differ in blanks, which are skipped.
    """
    at = 0
    for mark in prompt:
        rest = glue[at:].lstrip()
        if glue.startswith(mark, at):
            at += 1
        elif rest.startswith(mark):
            at = len(glue) - len(rest) + 1
        elif not mark.isspace():
            break
    return glue[at:]


def _shared(a: str, b: str) -> int:
    """Return the length of the beginning that two texts share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def any_of(words: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the words, the longest first."""
    ordered = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
