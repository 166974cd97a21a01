"""Render conversations as text and locate the answers in it, with a built-in template or the model's chat template."""

import re
from functools import lru_cache
from typing import Any

from qlora_helpers.config import Config
from qlora_helpers.data import time_limit
from qlora_helpers.data.builtin_templates import BuiltinTemplate, Span, Turns, UnplacedAnswer
from qlora_helpers.data.chat_rendering import ChatTemplate, any_of
from qlora_helpers.data.frames import sample
from qlora_helpers.errors import UserError
from qlora_helpers.models import hub

SETTINGS = ("template", "system", "thinking", "template_date", "end_token")  # what a rendered text depends on


def template_of(config: Config, tokenizer: Any) -> "BuiltinTemplate | ChatTemplate":
    """Return the template that the config names. Raises `UserError` if the model lacks what the template needs."""
    return _template(config, tokenizer, getattr(tokenizer, "chat_template", None), tokenizer.eos_token)


@lru_cache(maxsize=16)
def _template(config: Config, tokenizer: Any, chat_template: str | None, _: str | None) -> Any:
    if config.template != "auto":
        return BuiltinTemplate(config, tokenizer)
    if not chat_template:
        raise UserError(
            f"template: {config.model} has no chat template. Fix: template=guanaco or template=instruction."
        )
    time_limit.check_operators(chat_template)
    template = ChatTemplate(config, tokenizer)
    try:
        template.render(sample(1))
    except UnplacedAnswer as error:
        raise _unusable(config, error) from None
    return template


def _unusable(config: Config, error: Exception) -> UserError:
    return UserError(f"template: {config.model}: {error}. Fix: template=guanaco or template=instruction.")


def render(messages: Turns, config: Config, tokenizer: Any) -> tuple[str, list[Span]]:
    """Return the text of a conversation and the character spans of its answers, including their end tokens.

    Raises `UserError` if the model's chat template is missing, and `UnplacedAnswer` if it cannot show the conversation.
    """
    return template_of(config, tokenizer).render(messages)


def render_prompt(messages: Turns, config: Config, tokenizer: Any) -> str:
    """Return the text of a conversation up to where the next answer begins.

    As in training, a space between the marker and the answer is left for the model to generate. Raises `UserError` if
    the model's chat template is missing or refuses the conversation.
    """
    try:
        return template_of(config, tokenizer).prompt(messages)
    except UnplacedAnswer as error:
        raise _unusable(config, error) from None


def control_marks(config: Config, tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern for text that only the template may write: the markers between turns, and start and end tokens.

    Such text in a row would end its turn and start another.
    """
    template = template_of(config, tokenizer)
    own = {tokenizer.bos_token, tokenizer.eos_token, *template.ends} - {None}
    return any_of({*template.marks, *own})


def end_tokens(config: Config, tokenizer: Any) -> list[int]:
    """Return the ids of the tokens that end an answer, the tokenizer's own end token first.

    They come from the tokenizer, the template, and the model's generation config. Training, answers, exports and the
    chat use the same set.
    """
    ids = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(template_of(config, tokenizer).ends))]
    return list(dict.fromkeys(i for i in [*ids, *hub.generation_ends(config)] if i is not None))


def template_warnings(config: Config, tokenizer: Any) -> list[str]:
    """Return one-line warnings: the model's own chat template is replaced, or it does not end an answer."""
    lines = template_of(config, tokenizer).warnings()
    if config.template != "auto" and getattr(tokenizer, "chat_template", None):
        lines.append(
            f"template: {config.model} was trained with its own chat template and must learn the {config.template} "
            "format from scratch. It needs more rows to answer and stop equally well, and must be prompted in that "
            "format afterwards. template=auto uses its own template. Published experiments that use another one are "
            "reproduced unchanged."
        )
    return lines
