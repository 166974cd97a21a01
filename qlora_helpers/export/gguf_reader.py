"""Run a GGUF file: in llama.cpp where it is installed, else in transformers, which cannot read every family."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import Keys
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

from qlora_helpers.models import bundled

END_KEYS = (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)  # llama.cpp stops at each of them
# Tensors by which llama.cpp divides the rotary frequencies: of Llama 3, and of long-context models up to their original
# context length.
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_short.weight")


def llama_cpp_installed() -> bool:
    """Whether llama.cpp is installed with its bindings for Python."""
    return find_spec("llama_cpp") is not None


def field(reader: gguf.GGUFReader, key: str) -> Any:
    """Return a value of the file's metadata, or None."""
    entry = reader.get_field(key)
    return entry.contents() if entry else None


def architecture(file: Path) -> str:
    """Return llama.cpp's name of the file's architecture."""
    return str(field(gguf.GGUFReader(file), Keys.General.ARCHITECTURE))


def end_tokens(file: Path) -> list[int]:
    """Return the ids of the file's end tokens. Servers stop at each of them; transformers reads only the first."""
    reader = gguf.GGUFReader(file)
    return [int(token) for key in END_KEYS if (token := field(reader, key)) is not None]


def load(file: Path, options: dict[str, Any]) -> Any:
    """Load the model with transformers. `options` are passed to `from_pretrained`."""
    with _no_progress_bar():
        model: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False, **options, **bundled.unpacked()
        )
    _scale_rotary_frequencies(model, gguf.GGUFReader(file))
    return model.eval()


def load_tokenizer(file: Path) -> Any:
    """Return a GGUF file's tokenizer as transformers reads it, with a start token if the file asks for one.

    Where llama.cpp puts a space before every text, also after a special token, so does this tokenizer. As transformers
    reads the file, it would do so only at the beginning.
    """
    reader = gguf.GGUFReader(file)
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    tokenizer.add_bos_token = bool(field(reader, Keys.Tokenizer.ADD_BOS))  # ignored by older versions
    if field(reader, Keys.Tokenizer.ADD_PREFIX):
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)
        tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


def _scale_rotary_frequencies(model: Any, reader: gguf.GGUFReader) -> None:
    """Apply the file's rotary scaling as llama.cpp does. transformers ignores these tensors and this field."""
    for tensor in reader.tensors:
        if tensor.name in ROPE_FACTORS:
            frequencies = model.base_model.rotary_emb.inv_freq
            frequencies /= torch.tensor(np.array(tensor.data)).to(frequencies)
    for name in reader.fields:
        if name.endswith(".rope.scaling.attn_factor"):
            model.base_model.rotary_emb.attention_scaling = float(field(reader, name))


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide the bar of transformers' GGUF reader, which ignores `transformers.utils.logging.disable_progress_bar`."""
    reader: Any = modeling_gguf_pytorch_utils
    progress_bar = reader.tqdm
    reader.tqdm = lambda steps, **_: steps
    try:
        yield
    finally:
        reader.tqdm = progress_bar


class LlamaCpp:
    """A GGUF file in llama.cpp on the CPU, with the file's own tokenizer, chat template and end tokens."""

    def __init__(self, file: Path, context: int) -> None:
        import llama_cpp

        self.llama = llama_cpp.Llama(str(file), n_ctx=context, logits_all=True, n_gpu_layers=0, verbose=False)

    def answer(self, question: str, new_tokens: int) -> tuple[list[int], list[int], bool, str]:
        """Answer as llama.cpp's server does: tokens of the prompt and of the greedy answer, whether it ended, its text.

        The answer has at most `new_tokens` tokens.
        """
        turns = [{"role": "user", "content": question}]
        # One token more, because the last generated token is not in `input_ids`.
        completion = self.llama.create_chat_completion(turns, temperature=0.0, max_tokens=new_tokens + 1)
        ids = self.llama.input_ids[: self.llama.n_tokens].tolist()
        prompt = ids[: completion["usage"]["prompt_tokens"]]
        answer = ids[len(prompt) :]
        self.llama.reset()
        choice = completion["choices"][0]
        stopped = choice["finish_reason"] == "stop" and len(answer) < new_tokens
        # Inside a character of several bytes, it continues beyond the limit.
        return prompt, answer[:new_tokens], stopped, choice["message"]["content"]

    def logprobs(self, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the next token after the prompt and each answer token: (tokens + 1, vocabulary)."""
        self.llama.eval([*prompt, *answer])
        scores = torch.from_numpy(np.array(self.llama.scores[len(prompt) - 1 : self.llama.n_tokens]))
        self.llama.reset()
        return torch.log_softmax(scores.float(), -1)
