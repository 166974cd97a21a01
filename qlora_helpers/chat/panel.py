"""A conversation with the base model and its adapters side by side, as a program has it and as a panel to chat in.

The answers grow a few tokens at a time, and the browser asks for the next ones: it counts while it plays. So the kernel
is free between two steps, which is when a stop arrives. A thread or a task of the kernel's would not do: Colab
shows what changes a widget only while the kernel answers the browser (googlecolab/colabtools, issue 3373).
"""

import html
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from threading import RLock
from typing import Any

import torch

from qlora_helpers.chat.side_by_side import Entry, Loaded, Table, bundle
from qlora_helpers.data import chat_template, prompts, schema
from qlora_helpers.data.schema import Message
from qlora_helpers.device import autocast
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation.answers import cache_argument
from qlora_helpers.notebook import is_interactive

STEP = 4  # tokens of each answer between two looks at the buttons
TICK = 40  # milliseconds that the browser waits before it asks for more
NEW_TOKENS = 128
CUT = "\ufffd"  # what the bytes of half a character are decoded to
HELP = "Write a question. ▶, the first button, sends it; ■, the last, stops the answers where they are; ❚❚ pauses."
STYLE = {
    "user": "margin:.6em 0 .3em;font-weight:bold",
    "assistant": "margin:0;padding:.3em .6em;border-left:3px solid rgba(128,128,128,.5)",
}


class Conversation:
    """One question to all models, and then the next: each sees its own answers only."""

    def __init__(self, loaded: Loaded, new_tokens: int = NEW_TOKENS) -> None:
        self.loaded = loaded
        self.new_tokens = new_tokens  # of each answer, at most
        self.turns: dict[str, list[Message]] = {}
        self.clear()

    def clear(self) -> None:
        """Forget all that was said."""
        self.turns = {name: [] for name in self.loaded.configs}

    def ask(self, question: str, temperature: float = 0.0) -> Iterator[None]:
        """Put a question to every model; each step of the iterator makes all answers a little longer, in `turns`.

        Whoever stops iterating stops the answers. At temperature 0 they are greedy. Raises `UserError` at the first
        step, with nothing said, if the conversation does not fit the model's context.
        """
        asked = {"role": "user", "content": question.strip()}
        prompts = {name: self._prompt(name, (*turns, asked)) for name, turns in self.turns.items()}
        growing = {name: self._tokens(name, prompt, temperature) for name, prompt in prompts.items()}
        for turns in self.turns.values():
            turns += [dict(asked), {"role": "assistant", "content": ""}]
        while growing:
            for name in list(growing):
                if (tokens := next(growing[name], None)) is None:
                    del growing[name]
                else:
                    text = self.loaded.tokenizer.decode(tokens, skip_special_tokens=True)
                    self.turns[name][-1]["content"] = text.rstrip(CUT).strip()
            if growing:
                yield

    def _prompt(self, name: str, turns: tuple[Message, ...]) -> torch.Tensor:
        """Tokens of the conversation in the layout that the model was trained in, up to where its answer begins."""
        base, tokenizer = self.loaded.adapters.model, self.loaded.tokenizer
        text = prompts.render_prompt(turns, self.loaded.configs[name], tokenizer)
        ids = prompts.tokenize([text], tokenizer, return_tensors="pt")["input_ids"]
        context = getattr(base.config, "max_position_embeddings", None)
        mend = "clear the conversation, or ask a shorter question"
        prompts.check_context(turns[-1]["content"], ids.shape[1], self.new_tokens, context, mend)
        return ids.to(base.get_input_embeddings().weight.device)

    def _tokens(self, name: str, prompt: torch.Tensor, temperature: float) -> Iterator[list[int]]:
        """Tokens of the answer so far, `STEP` more each time; what was computed for the earlier ones is kept."""
        tokenizer = self.loaded.tokenizer
        ends = chat_template.stops(self.loaded.configs[name], tokenizer)
        how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        ids, cache = prompt, None
        for left in range(self.new_tokens, 0, -STEP):
            with self.loaded.use(name) as switched, torch.inference_mode(), autocast(self.loaded.device):
                argument = cache_argument(switched)
                output = switched.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **{argument: cache},
                    max_new_tokens=min(STEP, left), eos_token_id=ends, pad_token_id=tokenizer.pad_token_id,
                    return_dict_in_generate=True, **how,
                )  # fmt: skip
            ids, cache = output.sequences, output[argument]
            said = ids[0, prompt.shape[1] :].tolist()
            yield said
            if said[-1] in ends:
                return

    def row(self, name: str) -> dict[str, Any]:
        """The conversation with one model in the `messages` layout, a row of a data set.

        Raises `UserError` if whoever reads it would drop it: nothing was said, or an answer is empty.
        """
        record = {"messages": [dict(turn) for turn in self.turns[name]]}
        try:
            schema.to_row(record, "messages", name, Counter())
        except ValueError as reason:
            raise UserError(
                f"row: the conversation with {name} makes none ({reason}). Fix: ask a question and let it be answered."
            ) from None
        return record

    def entries(self) -> list[Entry]:
        """Round by round: the question, and every model's answer."""
        rounds = zip(*self.turns.values(), strict=True)
        found: list[Entry] = []
        for said in rounds:
            if said[0]["role"] == "user":
                found.append({"prompt": said[0]["content"]})
            else:
                found[-1] |= {name: turn["content"] for name, turn in zip(self.turns, said, strict=True)}
        return found


class Panel:
    """Ask, watch all answers grow, stop, clear, and take a conversation along as a row."""

    def __init__(self, conversation: Conversation, question: str = "") -> None:
        import ipywidgets as widgets

        self.conversation = conversation
        self.growing: Iterator[None] | None = None
        self.turn = RLock()  # JupyterLab 4 brings each click in a thread of its own
        wide, whole_words = widgets.Layout(width="auto"), {"description_width": "initial"}
        self.columns = {
            name: widgets.HTML(layout=widgets.Layout(flex="1 1 14em", min_width="0")) for name in conversation.turns
        }
        self.question = widgets.Textarea(value=question, rows=2, placeholder="your question", layout=wide)
        self.clock = widgets.Play(min=0, max=10**9, interval=TICK, show_repeat=False)
        self.temperature = widgets.FloatSlider(
            value=0.0, min=0.0, max=2.0, step=0.1, description="temperature", style=whole_words
        )
        self.clear = widgets.Button(description="clear")
        names = list(conversation.turns)
        self.which = widgets.Dropdown(options=names, value=names[-1], description="the talk with", style=whole_words)
        self.take = widgets.Button(description="as a row", tooltip="one line of JSON for the next data set")
        self.row = widgets.Textarea(rows=2, placeholder="one line for a .jsonl file: select and copy", layout=wide)
        self.status = widgets.HTML()
        bars = [[self.clock, self.temperature, self.clear], [self.which, self.take]]
        wrapped = widgets.Layout(flex_flow="row wrap")
        ask, more = (widgets.HBox(bar, layout=wrapped) for bar in bars)
        answers = widgets.HBox(list(self.columns.values()), layout=wrapped)
        self.box = widgets.VBox([answers, self.question, ask, self.status, more, self.row])
        self.clock.observe(self._tick, names="value")
        self.clear.on_click(self._clear)
        self.take.on_click(self._take)
        self._draw()
        self._say(HELP)

    def _tick(self, change: Any) -> None:
        """The browser counted one on, or went back to nought because someone pressed ■."""
        with self.turn:
            if change["new"] == 0:
                if self.growing:
                    self._rest(HELP)
            elif self.growing or self.question.value.strip():
                self._grow()
            else:  # it had counted on before it heard of the end
                self._rest()

    def _grow(self) -> None:
        first = self.growing is None
        growing = self.growing or self.conversation.ask(self.question.value, self.temperature.value)
        try:
            next(growing)
        except StopIteration:
            self._rest(HELP)
        except Exception as error:
            self._rest(f"error: {error}")
            if not isinstance(error, UserError):
                raise
        else:
            self.growing = growing
            self._draw()
            if first:
                self.question.value = ""
                self._say("■ stops the answers.")

    def _rest(self, said: str | None = None) -> None:
        """No more answers: the browser stops counting, and what has grown so far stays."""
        self.growing = None
        setattr(self.clock, "playing" if self.clock.has_trait("playing") else "_playing", False)  # ipywidgets 8, and 7
        self.clock.value = 0
        if said:
            self._say(said)

    def _clear(self, button: Any) -> None:
        with self.turn:
            self._rest(HELP)
            self.conversation.clear()
            self.row.value = ""
            self._draw()

    def _take(self, button: Any) -> None:
        with self.turn:
            try:
                self.row.value = json.dumps(self.conversation.row(self.which.value), ensure_ascii=False)
            except UserError as error:
                self._say(f"error: {error}")

    def _draw(self) -> None:
        for name, turns in self.conversation.turns.items():
            self.columns[name].value = _column(name, turns)

    def _say(self, text: str) -> None:
        self.status.value = html.escape(text)

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        stored = "A panel to chat in: it lives in a running notebook."
        return bundle(self.box, stored, f"<p>{stored}</p>")


def show(loaded: Loaded, questions: Sequence[str], new_tokens: int = NEW_TOKENS) -> Table | Panel:
    """A panel with the first question in its box, if someone is there to use it; else all the questions in one
    conversation with their greedy answers, as a table, and no widget that a stored notebook would keep.
    """
    conversation = Conversation(loaded, new_tokens)
    if is_interactive():
        return Panel(conversation, questions[0])
    for question in questions:
        for _ in conversation.ask(question):
            pass
    return Table(conversation.entries())


def _column(name: str, turns: list[Message]) -> str:
    """One conversation as a page on which nothing takes effect as HTML. `tex2jax_ignore`: nor as a formula."""
    said = "".join(
        f'<div style="white-space:pre-wrap;{STYLE[turn["role"]]}">{html.escape(turn["content"]) or " "}</div>'
        for turn in turns
    )
    head = f'<div style="opacity:.7">{html.escape(name)}</div>'
    return f'<div class="tex2jax_ignore" style="line-height:1.4;overflow-wrap:anywhere">{head}{said}</div>'
