"""Compare exports with the adapter: adapter, merged folder and GGUF file answer the same 20 prompts.

Three things can go wrong in an export, and all three look like a bad model: the weights differ, the prompt is formatted
differently, or the end of an answer is not recognized. Each is measured separately.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qlora_helpers import parse
from qlora_helpers.config import Config
from qlora_helpers.data import prompts, rendering, sources, time_limit
from qlora_helpers.device import GIB, Device, cpu, detect
from qlora_helpers.errors import UserError
from qlora_helpers.evaluation.answers import neutral_generation
from qlora_helpers.export import gguf_reader
from qlora_helpers.export.merge import Source
from qlora_helpers.models import hub, qlora, safetensors_io
from qlora_helpers.wording import counted

PROMPTS = 20
NEW_TOKENS = 32  # per greedy answer: two models that differ do so early
ROOM = 1.3  # memory needed to run a model, as a multiple of its weights


@dataclass(frozen=True)
class Limits:
    """How far an export may be from the adapter."""

    kl: float  # largest KL divergence: nats per token, mean over all tokens of the adapter's answers
    top1: float  # smallest share of those tokens for which both rank the same next token first
    texts: float  # smallest share of identical answers


# Measured on SmolLM2-135M in float32. Correct exports: a merge rounded once to bf16 is 6e-5 nats off, and so is its f16
# file; 19 of 20 answers are identical, and 99.8% of the most likely tokens. q8_0 rounds each weight to 8 bits: 1.3e-3,
# 14 of 20, 98.6%. Broken exports: merged into 4 bits, 0.33 nats and 77%; with alpha doubled or halved, after 36 steps
# of training, 6e-3 and 3e-3. Few identical answers are required, because one near tie changes all tokens after it.
# q4_k_m, from which a model this small suffers most: 0.056 nats, 1 of 20, 90.7%; in llama.cpp itself 0.059, 0 of 20,
# 87.5%. The merged folder that it is made from must still meet the strict limits.
LIMITS = {"merged": Limits(1e-3, 0.97, 0.7), "f16": Limits(1e-3, 0.97, 0.7), "q8_0": Limits(5e-3, 0.95, 0.4)}
LIMITS |= {"q4_k_m": Limits(0.12, 0.82, 0.0)}
# Models too large for float32 run in 16 bits. There a correct merge is 1.8e-3 nats off, with 5 of 8 answers identical
# and 97.9% of the tokens (q8_0: 3.6e-3, 3 of 8), because the sums are rounded in other places.
ROUNDING = Limits(4e-3, -0.03, -0.3)


@dataclass(frozen=True)
class Response:
    """How one model responds to one prompt.

    `answer` is greedy and has no end token; `stopped` tells whether there was one. `logprobs` are those of the next
    token after the prompt and after each token of the adapter's answer: (tokens + 1, vocabulary).
    """

    prompt: list[int]
    answer: list[int]
    stopped: bool
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Parity:
    """How one export compares with the adapter."""

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
        """The limits for this kind of export in the dtype that it ran in."""
        exact = LIMITS[self.name]
        if self.dtype == "float32":
            return exact
        return Limits(exact.kl + ROUNDING.kl, exact.top1 + ROUNDING.top1, exact.texts + ROUNDING.texts)

    def problems(self) -> list[str]:
        """Describe every difference beyond the limits. Empty if the export passes."""
        limits, n = self.limits, self.prompts
        problems = []
        if self.same_layout < n:
            problems.append(f"{n - self.same_layout} of {n} prompts are tokenized differently (template)")
        if not self.same_ends:
            problems.append("the end tokens differ (stop tokens)")
        if not self.kl <= limits.kl:
            problems.append(f"the KL divergence is {self.kl:.2g} nats per token, above {limits.kl:g} (weights)")
        if not self.top1 >= limits.top1:
            problems.append(f"{self.top1:.1%} of the most likely tokens agree, below {limits.top1:.0%} (weights)")
        if not self.same_texts >= limits.texts * n:
            problems.append(f"{self.same_texts} of {n} answers are identical, below {limits.texts:.0%}")
        # Rounding may change the most likely token, and an end token is one of those. So as many ends may differ.
        if self.same_texts - self.same_stops > (1 - limits.top1) * n:
            others = counted(self.same_texts - self.same_stops, "identical answer")
            problems.append(f"the end token differs in {others}")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as written to `parity.json`."""
        return asdict(self) | {"limits": asdict(self.limits), "problems": self.problems()}


def questions() -> list[str]:
    """Return the fixed questions: the first ones of the package's general data."""
    config = Config.from_params(profile="cpu", dataset=str(sources.general_data()))
    rows = [row for row in sources.load(config).rows if len(row.messages) == 2 and not row.messages[0].get("input")]
    return [row.messages[0]["content"] for row in rows[:PROMPTS]]


def adapter_responses(source: Source, device: Device, questions: Sequence[str]) -> list[Response]:
    """Run the adapter on its 16-bit base model, with prompts in the format of training. This is the reference.

    Raises `UserError` if a question does not fit the model's context.
    """
    config = source.config.replace(quantization="none")
    tokenizer = hub.saved_tokenizer(source.run.adapter)
    turns = [({"role": "user", "content": question},) for question in questions]
    ids = prompts.tokenize([rendering.render_prompt(t, config, tokenizer) for t in turns], tokenizer)
    context = parse.model_config(source.base / "config.json").get("max_position_embeddings")
    for question, prompt in zip(questions, ids, strict=True):
        prompts.check_context(question, len(prompt), NEW_TOKENS, context, "ask a shorter one")
    model = qlora.load_adapter(qlora.load_base(config, device), source.run.adapter)
    answers = _answers(model, ids, rendering.end_tokens(config, tokenizer))
    return [
        Response(prompt, answer, stopped, _logprobs(model, prompt, answer))
        for prompt, (answer, stopped) in zip(ids, answers, strict=True)
    ]


def compare(
    name: str, export: Path, reference: list[Response], questions: Sequence[str], device: Device, ends: list[int]
) -> Parity:
    """Load an export as any program would, with its own tokenizer, chat template and end tokens, and compare it.

    `export` is a merged folder or a GGUF file, `name` selects its limits, and `ends` are the expected end tokens. A
    GGUF file runs in llama.cpp if that is installed.
    """
    if export.is_dir() or not gguf_reader.llama_cpp_installed():
        model, tokenizer, own_ends = _load(export, device)
        ids = [_prompt(tokenizer, question) for question in questions]
        answers = zip(reference, ids, _answers(model, ids, own_ends), strict=True)
        responses = (Response(prompt, *answer, _logprobs(model, r.prompt, r.answer)) for r, prompt, answer in answers)
        return judge(name, device.dtype, reference, responses, set(own_ends) == set(ends))
    same_ends = set(gguf_reader.end_tokens(export)) == set(ends)
    return judge(name, "float16", reference, llama_cpp_responses(export, reference, questions), same_ends)


def llama_cpp_responses(file: Path, reference: list[Response], questions: Sequence[str]) -> Iterator[Response]:
    """Yield the responses of a GGUF file in llama.cpp, which computes in 16 bits or fewer."""
    longest = max(len(r.prompt) + len(r.answer) for r in reference)
    llama = gguf_reader.LlamaCpp(file, context=2 * longest + NEW_TOKENS)
    for r, question in zip(reference, questions, strict=True):
        prompt, answer, stopped, _ = llama.answer(question, NEW_TOKENS)
        yield Response(prompt, answer, stopped, llama.logprobs(r.prompt, r.answer))


def judge(name: str, dtype: str, reference: list[Response], export: Iterable[Response], same_ends: bool) -> Parity:
    """Compare an export's responses with the adapter's to the same questions, whatever program produced them.

    Both have log-probabilities for the adapter's tokens. `dtype` is the compute dtype of the export.
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
    """Raise `UserError` if an export differs from the adapter by more than its limits."""
    if problems := parity.problems():
        raise UserError(
            f"export: the {parity.name} model does not answer like its adapter: {'; '.join(problems)}. Fix: export "
            "again from the run's own files; if the problem remains, do not ship the model."
        )


def table(compared: Sequence[Parity]) -> str:
    """Return a Markdown table with a row for each export. The verdict stands first, where a phone shows it."""
    lines = ["| export | verdict | same tokens | same ends | equal answers | top-1 | KL mean | KL max |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for p in compared:
        verdict = "; ".join(p.problems()) or "passes"
        lines.append(
            f"| {p.name} | {verdict} | {p.same_layout} of {p.prompts} | {'yes' if p.same_ends else 'no'} "
            f"| {p.same_texts} of {p.prompts} | {p.top1:.1%} | {p.kl:.1e} | {p.kl_max:.1e} |"
        )
    return "\n".join(lines)


def choose_device(base: Path) -> Device:
    """Choose device and dtype: float32 if memory allows, which rules out rounding, else 16 bits.

    Raises `UserError` if not even 16 bits fit.
    """
    weights = sum(torch.Size(tensor.shape).numel() for tensor in safetensors_io.tensors(base))
    first = detect()
    devices = [first] if first.kind == "cpu" else [first, cpu("float32")]
    for dtype, size in (("float32", 4), (first.dtype, 2)):
        for device in devices:
            if device.free_gib > ROOM * weights * size / GIB:
                return replace(device, dtype=dtype)
    raise UserError(
        f"parity: {weights / 1e9:.1f} billion weights need {ROOM * weights * 2 / GIB:.0f} GiB of memory. "
        "Fix: close other programs, or export on a machine with more memory."
    )


def _load(export: Path, device: Device) -> tuple[Any, Any, list[int]]:
    """Load model, tokenizer and end tokens from the export alone."""
    options: dict[str, Any] = {"dtype": getattr(torch, device.dtype)}
    options["device_map"] = {"": 0} if device.kind == "cuda" else None
    if not export.is_dir():
        return gguf_reader.load(export, options), gguf_reader.load_tokenizer(export), gguf_reader.end_tokens(export)
    model = AutoModelForCausalLM.from_pretrained(export, use_safetensors=True, trust_remote_code=False, **options)
    eos = model.generation_config.eos_token_id
    ends = eos if isinstance(eos, list) else [eos]
    return model.eval(), hub.saved_tokenizer(export), [end for end in ends if end is not None]


def _prompt(tokenizer: Any, question: str) -> list[int]:
    if not tokenizer.chat_template:  # a server then sends the text unchanged
        return tokenizer(question)["input_ids"]
    turns = [{"role": "user", "content": question}]
    with time_limit.limited():
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]


def _answers(model: Any, ids: list[list[int]], ends: list[int]) -> list[tuple[list[int], bool]]:
    """Return greedy answers without their end token, and whether they had one. Both sides use neutral settings."""
    longest = max(map(len, ids))
    batch = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in ids], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in ids], device=model.device)
    with torch.inference_mode(), neutral_generation(model):
        output = model.generate(
            input_ids=batch, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False,
            eos_token_id=ends or [-1], pad_token_id=0,
        )  # fmt: skip
    answers = []
    for tokens in output[:, longest:].tolist():
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        answers.append((tokens[:end], end is not None))
    return answers


def _logprobs(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log-probabilities of the next token after the prompt and each token of the answer: (tokens + 1, vocabulary)."""
    ids = torch.tensor([prompt + answer], device=model.device)
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits.float(), dim=-1).cpu()
