"""Does what is shipped answer as the adapter did? Adapter, merged folder and GGUF on the same 20 prompts.

Three things go wrong in export, and all three look like a bad model: the weights are others, the question is put in
another layout, the end of an answer is not known. Each is measured by itself.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

from qlora_helpers.config import Config
from qlora_helpers.data import chat_template, prompts, sources
from qlora_helpers.device import GIB, Device, detect
from qlora_helpers.errors import UserError
from qlora_helpers.export.merge import Source
from qlora_helpers.models import bundled, hub, qlora, safetensors_io

PROMPTS = 20
NEW_TOKENS = 32  # of each greedy answer: where two models differ, they do so early
ROOM = 1.3  # memory that is needed to ask a model, over that of its weights


@dataclass(frozen=True)
class Limits:
    """How far an export may be from the adapter."""

    kl: float  # nats a token, mean over all tokens of the adapter's answers
    top1: float  # share of those tokens where both find the same next one the likeliest
    texts: float  # share of answers that are equal to the letter


# Measured on SmolLM2-135M, in float32. Sound: a merge rounded once to bf16 is 6e-5 nats off, and so is its f16
# file; 19 of 20 answers are equal, and 99.8% of the likeliest tokens. q8_0 rounds each weight to 8 bits: 1.3e-3, 14
# of 20, 98.6%. Broken: merged into 4 bits 0.33 nats and 77%; with alpha doubled or halved, after 36 steps of
# training, 6e-3, 3e-3. Few equal answers are asked for, since one close call changes all that follows.
# q4_k_m, by which a model this small loses most: 0.056 nats, 1 of 20, 90.7%; in llama.cpp itself 0.059, 0 of 20,
# 87.5%. What it is made of, the merged folder, has to be within the close limits all the same.
LIMITS = {"merged": Limits(1e-3, 0.97, 0.7), "f16": Limits(1e-3, 0.97, 0.7), "q8_0": Limits(5e-3, 0.95, 0.4)}
LIMITS |= {"q4_k_m": Limits(0.12, 0.82, 0.0)}
# Models too large for float32 are asked in 16 bits, where a sound merge is 1.8e-3 nats off, with 5 of 8 answers equal
# and 97.9% of the tokens (q8_0: 3.6e-3, 3 of 8): the sums are rounded at other places.
ROUNDING = Limits(4e-3, -0.03, -0.3)


@dataclass(frozen=True)
class Asked:
    """One prompt to one model: its tokens, the greedy answer's, whether that ended by itself, and log-probabilities of
    every next token of the adapter's answer.
    """

    prompt: list[int]
    answer: list[int]
    stopped: bool
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Parity:
    """One export against the adapter."""

    name: str
    dtype: str
    prompts: int
    tokens: int
    same_layout: int
    same_ends: bool
    same_stops: int
    same_texts: int
    top1: float
    kl: float
    kl_max: float

    @property
    def limits(self) -> Limits:
        """What this export may differ by, in the arithmetic that it was asked in."""
        exact = LIMITS[self.name]
        if self.dtype == "float32":
            return exact
        return Limits(exact.kl + ROUNDING.kl, exact.top1 + ROUNDING.top1, exact.texts + ROUNDING.texts)

    def problems(self) -> list[str]:
        """What differs more than it may, in words; empty if the export is sound."""
        limits, found = self.limits, []
        if self.same_layout < self.prompts:
            found.append(f"{self.prompts - self.same_layout} of {self.prompts} prompts become other tokens (template)")
        if not self.same_ends:
            found.append("the tokens that end an answer differ (stop tokens)")
        if not self.kl <= limits.kl:
            found.append(f"KL divergence {self.kl:.2g} nats a token, at most {limits.kl:g} (weights)")
        if not self.top1 >= limits.top1:
            found.append(f"the likeliest token agrees in {self.top1:.1%}, at least {limits.top1:.0%} (weights)")
        if not self.same_texts >= limits.texts * self.prompts:
            found.append(f"{self.same_texts} of {self.prompts} answers are equal, at least {limits.texts:.0%}")
        # An end is one more likeliest token, and may be another as often as those: a close call is no lost end.
        if self.same_texts - self.same_stops > (1 - limits.top1) * self.prompts:
            found.append(f"{self.same_texts - self.same_stops} equal answers stop at another place")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as written to `parity.json`."""
        return asdict(self) | {"limits": asdict(self.limits), "problems": self.problems()}


def questions() -> list[str]:
    """The fixed questions: the first of the project's own general ones."""
    rows = [row for row in sources.load(_general()).rows if len(row.messages) == 2 and not row.messages[0].get("input")]
    return [row.messages[0]["content"] for row in rows[:PROMPTS]]


def of_adapter(what: Source, device: Device, questions: Sequence[str]) -> list[Asked]:
    """What is compared with: the adapter on its 16-bit base, asked in the layout that it was trained in."""
    config = what.config.replace(quantization="none")
    tokenizer = hub.saved_tokenizer(what.run.adapter)
    turns = [({"role": "user", "content": question},) for question in questions]
    asked = [prompts.tokenize([prompts.render_prompt(t, config, tokenizer)], tokenizer) for t in turns]
    ids = [entry["input_ids"][0] for entry in asked]
    _check_context(what, questions, ids)
    built = qlora.load_adapter(qlora.load_base(config, device), what.run.adapter)
    said = _answers(built, ids, chat_template.stops(config, tokenizer))
    return [
        Asked(prompt, answer, stopped, _logprobs(built, prompt, answer))
        for prompt, (answer, stopped) in zip(ids, said, strict=True)
    ]


def compare(
    name: str, export: Path, reference: list[Asked], questions: Sequence[str], device: Device, ends: list[int]
) -> Parity:
    """One export, loaded and asked as anyone would: by its own tokenizer, chat template and end tokens.

    `export` is a merged folder or a GGUF file, `name` the key of its limits, `ends` the tokens that end an answer.
    """
    loaded, tokenizer, own_ends = _load(export, device)
    ids = [_prompt(tokenizer, question) for question in questions]
    said = _answers(loaded, ids, own_ends)
    asked = (
        Asked(prompt, answer, stopped, _logprobs(loaded, r.prompt, r.answer))
        for r, prompt, (answer, stopped) in zip(reference, ids, said, strict=True)
    )
    return judge(name, device.dtype, reference, asked, set(own_ends) == set(ends))


def judge(name: str, dtype: str, reference: list[Asked], export: Iterable[Asked], same_ends: bool) -> Parity:
    """What an export said against what the adapter said to the same questions, whatever program asked it.

    The log-probabilities of both are those after the adapter's tokens, `dtype` the arithmetic of the export's.
    """
    layouts, equal, ended, kl, agree = [], [], [], [], []
    for r, e in zip(reference, export, strict=True):
        layouts.append(e.prompt == r.prompt)
        equal.append(e.answer[: len(r.answer)] == r.answer)
        ended.append((len(e.answer), e.stopped) == (len(r.answer), r.stopped))
        kl.append((r.logprobs.exp() * (r.logprobs - e.logprobs)).sum(-1))
        agree.append(r.logprobs.argmax(-1) == e.logprobs.argmax(-1))
    divergence = torch.cat(kl)
    return Parity(
        name=name,
        dtype=dtype,
        prompts=len(reference),
        tokens=len(divergence),
        same_layout=sum(layouts),
        same_ends=same_ends,
        same_stops=sum(e and s for e, s in zip(equal, ended, strict=True)),
        same_texts=sum(equal),
        top1=torch.cat(agree).double().mean().item(),
        kl=divergence.double().mean().item(),
        kl_max=divergence.max().item(),
    )


def check(parity: Parity) -> None:
    """Raise `UserError` with what differs, if it differs more than it may."""
    if problems := parity.problems():
        raise UserError(
            f"export: the {parity.name} model does not answer as its adapter does: {'; '.join(problems)}. Fix: export "
            "again from the run's own files; if it stays so, do not ship it."
        )


def table(compared: Sequence[Parity]) -> str:
    """Every export against the adapter, as Markdown."""
    lines = ["| export | same tokens | same ends | equal answers | top-1 | KL mean | KL max | verdict |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for p in compared:
        verdict = "; ".join(p.problems()) or "sound"
        lines.append(
            f"| {p.name} | {p.same_layout} of {p.prompts} | {'yes' if p.same_ends else 'no'} "
            f"| {p.same_texts} of {p.prompts} | {p.top1:.1%} | {p.kl:.1e} | {p.kl_max:.1e} | {verdict} |"
        )
    return "\n".join(lines)


def choose_device(base: Path) -> Device:
    """Where both models are asked: in float32 if memory allows, which leaves rounding out, else in 16 bits.

    Raises `UserError` if not even that fits.
    """
    weights = sum(torch.Size(tensor.shape).numel() for tensor in safetensors_io.tensors(base))
    first = detect()
    places = [first] if first.kind == "cpu" else [first, _computer(first)]
    for dtype, size in (("float32", 4), (first.dtype, 2)):
        for place in places:
            if place.free_gib > ROOM * weights * size / GIB:
                return replace(place, dtype=dtype)
    raise UserError(
        f"parity: {weights / 1e9:.1f} billion weights need {ROOM * weights * 2 / GIB:.0f} GiB of memory. "
        "Fix: close other programs, or export on a machine with more memory."
    )


def _computer(gpu: Device) -> Device:
    import psutil

    memory = psutil.virtual_memory()
    return replace(gpu, kind="cpu", name="CPU", memory_gib=memory.total / GIB, free_gib=memory.available / GIB)


def _general() -> Config:
    return Config.from_params(profile="cpu", dataset=str(sources.general_data()))


def _check_context(what: Source, questions: Sequence[str], ids: list[list[int]]) -> None:
    context = json.loads((what.base / "config.json").read_text("utf-8")).get("max_position_embeddings")
    for question, prompt in zip(questions, ids, strict=True):
        prompts.check_context(question, len(prompt), NEW_TOKENS, context, "ask a shorter one")


def _load(export: Path, device: Device) -> tuple[Any, Any, list[int]]:
    """Model, tokenizer and end tokens, from nothing but the export itself."""
    options: dict[str, Any] = {"dtype": getattr(torch, device.dtype)}
    options["device_map"] = {"": 0} if device.kind == "cuda" else None
    if export.is_dir():
        loaded = AutoModelForCausalLM.from_pretrained(export, use_safetensors=True, **options)
        found = loaded.generation_config.eos_token_id
        ends = found if isinstance(found, list) else [found]
        return loaded.eval(), hub.saved_tokenizer(export), [end for end in ends if end is not None]
    source: dict[str, Any] = {"pretrained_model_name_or_path": export.parent, "gguf_file": export.name}
    with patch.object(modeling_gguf_pytorch_utils, "tqdm", lambda steps, **_: steps):  # its bar knows no off switch
        loaded = AutoModelForCausalLM.from_pretrained(**source, **options, **bundled.unpacked())
    fields = gguf.GGUFReader(export).fields  # a server ends at both of them; transformers knows the first alone
    keys = [f"tokenizer.ggml.{key}_token_id" for key in ("eos", "eot")]
    ends = [int(fields[key].contents()) for key in keys if key in fields]
    return loaded.eval(), gguf_tokenizer(export), ends


def gguf_tokenizer(file: Path) -> Any:
    """A GGUF file's tokenizer as transformers reads it, with a start token where the file says so: older versions pass
    that over.
    """
    fields = gguf.GGUFReader(file).fields
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.add_bos_token = bool(fields["tokenizer.ggml.add_bos_token"].contents())
    return tokenizer


def _prompt(tokenizer: Any, question: str) -> list[int]:
    if not tokenizer.chat_template:  # a server then sends the text as it is
        return tokenizer(question)["input_ids"]
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]


def _answers(loaded: Any, ids: list[list[int]], ends: list[int]) -> list[tuple[list[int], bool]]:
    """Greedy answers, less their end token, and whether they had one."""
    longest = max(map(len, ids))
    batch = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in ids], device=loaded.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in ids], device=loaded.device)
    with torch.inference_mode():
        output = loaded.generate(
            input_ids=batch, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False,
            eos_token_id=ends or [-1], pad_token_id=0,
        )  # fmt: skip
    found = []
    for said in output[:, longest:].tolist():
        end = next((place for place, token in enumerate(said) if token in ends), None)
        found.append((said[:end], end is not None))
    return found


def _logprobs(loaded: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities of the next token after the prompt and after each of the answer: (tokens + 1, vocabulary)."""
    ids = torch.tensor([prompt + answer], device=loaded.device)
    with torch.inference_mode():
        logits = loaded(input_ids=ids).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits.float(), dim=-1).cpu()
