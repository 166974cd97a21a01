"""Export the prompt format used in training: as a chat template, stop tokens and an Ollama Modelfile.

A server that uses another prompt format, or does not know where an answer ends, makes a good model look broken.
"""

from typing import Any

from qlora_helpers import quoting
from qlora_helpers.config import Config
from qlora_helpers.data import prompts, rendering
from qlora_helpers.data.builtin_templates import answer_prefix, render_question
from qlora_helpers.data.frames import place_of
from qlora_helpers.data.schema import Message
from qlora_helpers.errors import UserError

USER_1, INPUT, ASSISTANT_1, USER_2, ASSISTANT_2 = map(place_of, range(5))


def chat_template(config: Config, tokenizer: Any) -> str:
    """Return a Jinja chat template that renders conversations as in training, including the start token."""
    start = _start(config, tokenizer)
    if config.template != "auto":
        return start + _builtin_template(config)
    template = tokenizer.get_chat_template()
    if config.system:
        system = f"[{{'role': 'system', 'content': {config.system!r}}}]"
        start += f"{{% if messages[0]['role'] != 'system' %}}{{% set messages = {system} + messages %}}{{% endif %}}"
    return start + template


def _start(config: Config, tokenizer: Any) -> str:
    """Return the beginning with which a rendered prompt has the tokens of training.

    Some tokenizers put a space before a text, but not before a text that begins with their start token.
    """
    prompt = rendering.render_prompt(_turns("Hi"), config, tokenizer)
    bos = tokenizer.bos_token
    if not starts_with_bos(tokenizer) or prompt.startswith(bos):  # none, or the template already writes it
        return ""
    (ids,) = prompts.tokenize([prompt], tokenizer)
    for start, text in ((bos, "{{ bos_token }}"), (f"{bos} ", "{{ bos_token + ' ' }}")):
        if tokenizer(start + prompt, add_special_tokens=False)["input_ids"] == ids:
            return text
    return "{{ bos_token }}"


def _builtin_template(config: Config) -> str:
    """Convert a built-in template to Jinja. The markers come from the code that renders the training rows."""
    template = config.template
    system = f"{config.system}\n\n" if config.system else ""
    end = repr(config.end_token) if config.end_token else "eos_token"
    whole = render_question({"role": "user", "content": USER_1, "input": INPUT}, template)
    head, rest = whole.split(USER_1)
    between, tail = rest.split(INPUT)
    message = f"the {template} template has turns of system, user and assistant only"
    return (
        f"{{% set ns = namespace(system={system!r}) %}}{{% for message in messages %}}"
        "{% if message['role'] == 'system' %}{% set ns.system = message['content'] + '\n\n' %}"
        f"{{% elif message['role'] == 'user' %}}{{{{ {head!r} + ns.system + message['content'] }}}}"
        "{% set ns.system = '' %}"
        f"{{% if message['input'] %}}{{{{ {between!r} + message['input'] }}}}{{% endif %}}"
        f"{{{{ {tail!r} }}}}"
        "{% elif message['role'] == 'assistant' %}"
        f"{{{{ {answer_prefix(template)!r} + message['content'] + {end} }}}}"
        f"{{% else %}}{{{{ raise_exception({message!r}) }}}}{{% endif %}}{{% endfor %}}"
    )


def starts_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer adds a start token to a text."""
    return tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def modelfile(config: Config, tokenizer: Any, gguf: str) -> str:
    """Return an Ollama Modelfile for a GGUF file in the same folder, with a Go template and the stop tokens.

    The markers between turns are taken from a rendered conversation. The start token is omitted if the tokenizer adds
    it. System turns are omitted because the model was trained without them, or always with the same one. Raises
    `UserError` if an end token cannot be written there.
    """
    text, _ = rendering.render(_turns(USER_1, ASSISTANT_1, USER_2, ASSISTANT_2), config, tokenizer)
    first, rest = text.split(USER_1)
    answer, rest = rest.split(ASSISTANT_1)
    between = rest.split(USER_2)[0]
    ask = rendering.render_prompt(_turns(USER_1), config, tokenizer).split(USER_1)[1]
    if starts_with_bos(tokenizer):
        first = first.removeprefix(tokenizer.bos_token)
    first, between, answer, ask = map(quoting.go_template, (first, between, answer.removeprefix(ask), ask))
    user = (
        f"{{{{ if $later }}}}{between}{{{{ else }}}}{first}{{{{ end }}}}{{{{ .Content }}}}{ask}{{{{ $later = true }}}}"
    )
    lines = [
        f"FROM ./{gguf}",
        'TEMPLATE """{{ $later := false }}{{ range .Messages }}{{ if eq .Role "user" }}'
        f'{user}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ .Content }}}}'
        '{{ end }}{{ end }}"""',
    ]
    ends = [tokenizer.convert_ids_to_tokens(token) for token in rendering.end_tokens(config, tokenizer)]
    try:
        lines += [f"PARAMETER stop {quoting.modelfile(end)}" for end in ends]
    except ValueError as error:
        raise UserError(f"template: an end token holds {error}. Fix: end_token=TOKEN with another one.") from None
    return "\n".join([*lines, "PARAMETER temperature 0", "PARAMETER repeat_penalty 1.0", ""])  # the default is 1.1


def _turns(*texts: str) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    return tuple({"role": roles[number % 2], "content": text} for number, text in enumerate(texts))
