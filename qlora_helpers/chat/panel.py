"""Chat with the base model and its adapters side by side, in a program or in a panel of a notebook.

The answers grow a few tokens at a time. The browser requests each step through a Play widget, so the kernel is free
between steps and receives a stop. A thread or task in the kernel would not work: Colab shows changes of a widget only
while the kernel answers the browser (googlecolab/colabtools, issue 3373).
"""

import html
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from threading import RLock
from typing import Any

import torch

from qlora_helpers.chat.side_by_side import Entry, Loaded, Table, bundle
from qlora_helpers.data import prompts, rendering, schema
from qlora_helpers.data.schema import Message
from qlora_helpers.device import autocast
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation.answers import cache_argument, neutral_generation
from qlora_helpers.notebook import is_interactive

STEP = 4  # tokens of each answer per step; buttons are handled between steps
TICK = 40  # milliseconds that the browser waits before it requests the next step
NEW_TOKENS = 128
CUT = "\ufffd"  # an incomplete character at the end of an unfinished answer decodes to this
HELP = "Write a question and send it."
HELP_7 = "Write a question. ▶ sends it, and ■ stops the answers."
STYLE = {
    "user": "margin:.6em 0 .3em;font-weight:bold",
    "assistant": "margin:0;padding:.3em .6em;border-left:3px solid rgba(128,128,128,.5)",
}


class Conversation:
    """A conversation with all models at once. Every model gets the same questions and sees only its own answers."""

    def __init__(self, loaded: Loaded, new_tokens: int = NEW_TOKENS) -> None:
        self.loaded = loaded
        self.new_tokens = new_tokens  # at most, per answer
        self.clear()

    def clear(self) -> None:
        """Delete all turns."""
        self.turns: dict[str, list[Message]] = {name: [] for name in self.loaded.configs}

    def ask(self, question: str, temperature: float = 0.0) -> Iterator[None]:
        """Ask every model a question. Each step of the iterator makes all answers in `turns` a little longer.

        To stop the answers, stop iterating. At temperature 0 decoding is greedy. Raises `UserError` at the first step,
        and leaves `turns` unchanged, if the conversation does not fit the model's context.
        """
        user_turn = {"role": "user", "content": question.strip()}
        prompts = {name: self._prompt(name, (*turns, user_turn)) for name, turns in self.turns.items()}
        growing = {name: self._tokens(name, prompt, temperature) for name, prompt in prompts.items()}
        for turns in self.turns.values():
            turns += [dict(user_turn), {"role": "assistant", "content": ""}]
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
        """Tokens of the conversation in the format of training, up to the start of the next answer: (1, tokens)."""
        base, tokenizer = self.loaded.adapters.model, self.loaded.tokenizer
        text = rendering.render_prompt(turns, self.loaded.configs[name], tokenizer)
        ids = torch.tensor(prompts.tokenize([text], tokenizer))
        context = getattr(base.config, "max_position_embeddings", None)
        fix = "clear the conversation, or ask a shorter question"
        prompts.check_context(turns[-1]["content"], ids.shape[1], self.new_tokens, context, fix)
        return ids.to(base.get_input_embeddings().weight.device)

    def _tokens(self, name: str, prompt: torch.Tensor, temperature: float) -> Iterator[list[int]]:
        """Yield the tokens of the answer so far, `STEP` more each time. Earlier tokens stay in the key-value cache."""
        tokenizer = self.loaded.tokenizer
        ends = rendering.end_tokens(self.loaded.configs[name], tokenizer)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        ids, cache = prompt, None
        for left in range(self.new_tokens, 0, -STEP):
            with (
                self.loaded.use(name) as switched,
                neutral_generation(switched),
                torch.inference_mode(),
                autocast(self.loaded.device),
            ):
                argument = cache_argument(switched)
                output = switched.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), **{argument: cache},
                    max_new_tokens=min(STEP, left), eos_token_id=ends, pad_token_id=tokenizer.pad_token_id,
                    return_dict_in_generate=True, **sampling,
                )  # fmt: skip
            ids, cache = output.sequences, output[argument]
            answer = ids[0, prompt.shape[1] :].tolist()
            yield answer
            if answer[-1] in ends:
                return

    def row(self, name: str) -> dict[str, Any]:
        """Return the conversation with one model as a row of a data set, in the `messages` format.

        Raises `UserError` if loading the row would drop it, because there is no answer or an empty one.
        """
        record = {"messages": [dict(turn) for turn in self.turns[name]]}
        try:
            schema.to_row(record, "messages", name, Counter())
        except ValueError as reason:
            raise UserError(
                f"row: the conversation with {name} is not a valid row ({reason}). Fix: ask a question and wait for "
                "the answer."
            ) from None
        return record

    def entries(self) -> list[Entry]:
        """Return each question with the answers of all models."""
        entries: list[Entry] = []
        for turns in zip(*self.turns.values(), strict=True):
            if turns[0]["role"] == "user":
                entries.append({"prompt": turns[0]["content"]})
            else:
                entries[-1] |= {name: turn["content"] for name, turn in zip(self.turns, turns, strict=True)}
        return entries


class Panel:
    """A notebook widget: ask, watch all answers grow, stop, clear, and export a conversation as a row."""

    def __init__(self, conversation: Conversation, question: str = "") -> None:
        import ipywidgets as widgets

        self.conversation = conversation
        self.growing: Iterator[None] | None = None
        self.running = False
        self.lock = RLock()  # JupyterLab 4 handles each click in its own thread
        wide, whole_words = widgets.Layout(width="auto"), {"description_width": "initial"}
        self.columns = {
            name: widgets.HTML(layout=widgets.Layout(flex="1 1 14em", min_width="0")) for name in conversation.turns
        }
        self.question = widgets.Textarea(value=question, rows=2, placeholder="your question", layout=wide)
        # It ticks in the browser, so that clicks reach the kernel between two ticks. The kernel can start it with
        # ipywidgets 8 only. With 7, as on Colab, it stands in the place of the buttons.
        self.clock = widgets.Play(min=0, max=10**9, interval=TICK, show_repeat=False)
        self.startable = self.clock.has_trait("playing")
        self.help = HELP if self.startable else HELP_7
        self.send = widgets.Button(description="Send", icon="paper-plane", button_style="primary")
        self.stop = widgets.Button(description="Stop", icon="stop", disabled=True)
        self.temperature = widgets.FloatSlider(
            value=0.0, min=0.0, max=2.0, step=0.1, description="temperature", style=whole_words
        )
        self.clear = widgets.Button(description="Clear")
        names = list(conversation.turns)
        self.which = widgets.Dropdown(
            options=names, value=names[-1], description="conversation with", style=whole_words
        )
        self.take = widgets.Button(description="As a row", tooltip="one line of JSON for your next data set")
        self.row = widgets.Textarea(rows=2, placeholder="one line for a .jsonl file: select and copy", layout=wide)
        self.status = widgets.HTML()
        if self.startable:
            self.clock.layout.display = "none"
        buttons = [self.send, self.stop, self.clock] if self.startable else [self.clock]
        bars = [[*buttons, self.clear, self.temperature], [self.which, self.take]]
        wrapped = widgets.Layout(flex_flow="row wrap")
        ask, more = (widgets.HBox(bar, layout=wrapped) for bar in bars)
        answers = widgets.HBox(list(self.columns.values()), layout=wrapped)
        self.box = widgets.VBox([answers, self.question, ask, self.status, more, self.row])
        self.clock.observe(self._tick, names="value")
        self.send.on_click(self._send)
        self.stop.on_click(self._stop)
        self.clear.on_click(self._clear)
        self.take.on_click(self._take)
        self._draw()
        self._say(self.help)

    def _send(self, button: Any) -> None:
        with self.lock:
            if self.growing is None and self.question.value.strip():
                self._run(True)

    def _stop(self, button: Any) -> None:
        with self.lock:
            self._rest(self.help)

    def _run(self, running: bool) -> None:
        setattr(self.clock, "playing" if self.startable else "_playing", running)
        self.running = self.send.disabled = running
        self.stop.disabled = not running

    def _tick(self, change: Any) -> None:
        """The clock advanced by one, or was set back to 0, with ipywidgets 7 also by a click on ■."""
        with self.lock:
            asked = self.running or (not self.startable and (self.growing or self.question.value.strip()))
            if change["new"] == 0:
                if self.growing:
                    self._rest(self.help)
            elif asked:
                self._grow()
            else:  # it advanced once more before it learned that the answers are complete
                self._rest()

    def _grow(self) -> None:
        first = self.growing is None
        growing = self.growing or self.conversation.ask(self.question.value, self.temperature.value)
        try:
            next(growing)
        except StopIteration:
            self._rest(self.help)
        except Exception as error:
            self._rest(f"error: {error}")
            if not isinstance(error, UserError):
                raise
        else:
            self.growing = growing
            self._draw()
            if first:
                self.question.value = ""
                self._say("The answers grow …")

    def _rest(self, message: str | None = None) -> None:
        """Stop the clock. The answers so far stay."""
        self.growing = None
        self._run(False)
        self.clock.value = 0
        if message:
            self._say(message)

    def _clear(self, button: Any) -> None:
        with self.lock:
            self._rest(self.help)
            self.conversation.clear()
            self.row.value = ""
            self._draw()

    def _take(self, button: Any) -> None:
        with self.lock:
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
        stored = "A chat panel: it works only in a running notebook."
        return bundle(self.box, stored, f"<p>{stored}</p>")


def show(loaded: Loaded, questions: Sequence[str], new_tokens: int = NEW_TOKENS) -> Table | Panel:
    """Return a panel with the first question filled in if a person runs the notebook, else a table.

    The table shows one conversation with all questions and their greedy answers. It contains no widget, because a
    stored notebook would keep the widget's state.
    """
    conversation = Conversation(loaded, new_tokens)
    if is_interactive():
        return Panel(conversation, questions[0])
    for question in questions:
        for _ in conversation.ask(question):
            pass
    return Table(conversation.entries())


def _column(name: str, turns: list[Message]) -> str:
    """Render one conversation as HTML. Texts are escaped; `tex2jax_ignore` keeps dollar signs from becoming math."""
    shown = "".join(
        f'<div style="white-space:pre-wrap;{STYLE[turn["role"]]}">{html.escape(turn["content"]) or " "}</div>'
        for turn in turns
    )
    head = f'<div style="opacity:.7">{html.escape(name)}</div>'
    # A reversed column that scrolls stays at its end while the text in it grows.
    style = "display:flex;flex-direction:column-reverse;max-height:24em;overflow-y:auto"
    scrolled = f'<div style="{style}"><div>{shown}</div></div>'
    return f'<div class="tex2jax_ignore" style="line-height:1.4;overflow-wrap:anywhere">{head}{scrolled}</div>'
