"""Greedy answers of a model, and metrics of them: wording, endings, invented turns, repetition, length."""

import inspect
from math import inf
from typing import Any

import torch

from qlora_helpers.config import Config
from qlora_helpers.data.prompts import Example, render_prompt, tokenize
from qlora_helpers.data.schema import TURN_MARKER, Message
from qlora_helpers.device import Device, autocast
from qlora_helpers.evaluation import intervals
from qlora_helpers.evaluation.intervals import Interval
from qlora_helpers.planning.memory import MOST_ANSWERS

PUBLISHED_PROMPTS = ("Explain what is a variable in programming.", "How do computers store data?")
BLEU_RESAMPLES = 1000  # sacrebleu's own bootstrap

Shots = tuple[Message, ...]


def heldout_prompts(heldout: list[Example], number: int) -> list[dict[str, Any]]:
    """Prompts to answer: two published questions, then the first question of each of `number` held-out rows."""
    asked = [{"prompt": prompt, "reference": None} for prompt in PUBLISHED_PROMPTS]
    for example in heldout[:number]:
        question, answer = example.row.messages[:2]
        given = f"\n\n{question['input']}" if question.get("input") else ""
        asked.append({"prompt": question["content"] + given, "reference": answer["content"]})
    return asked


def generate(
    model: Any,
    tokenizer: Any,
    config: Config,
    device: Device,
    asked: list[dict[str, Any]],
    shots: Shots = (),
    batch_size: int = MOST_ANSWERS,
) -> list[dict[str, Any]]:
    """Greedy answers to each prompt; `shots` are example turns that precede it.

    Adds to each entry: `answer`; `stopped`, whether the model ended it within `max_new_tokens`; `invented`, whether the
    model continued with a turn of someone else; `tokens`, the length of the answer.
    """
    texts = [render_prompt((*shots, {"role": "user", "content": a["prompt"]}), config, tokenizer) for a in asked]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # similar lengths together: less padding
    was_training, side = model.training, tokenizer.padding_side
    model.eval()
    tokenizer.padding_side = "left"  # padding between prompt and answer would be read as text
    answered: dict[int, dict[str, Any]] = {}
    try:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            outputs = _continue(model, tokenizer, config, device, [texts[i] for i in part])
            described = (_describe(ids, tokenizer) for ids in outputs)
            answered |= {i: asked[i] | answer for i, answer in zip(part, described, strict=True)}
    finally:  # the tokenizer is shared by all runs of a notebook
        tokenizer.padding_side = side
        model.train(was_training)
    return [answered[i] for i in range(len(asked))]


def cache_argument(model: Any) -> str:
    """Name of the cache argument in this version of transformers: newer versions warn about the old name."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(inner.forward).parameters else "past_key_values"


def _continue(model: Any, tokenizer: Any, config: Config, device: Device, texts: list[str]) -> list[list[int]]:
    batch = tokenize(texts, tokenizer, return_tensors="pt", padding=True)
    batch = batch.to(model.get_input_embeddings().weight.device)
    with torch.inference_mode(), autocast(device):
        output = model.generate(
            **batch,
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return output[:, batch["input_ids"].shape[1] :].tolist()


def _describe(ids: list[int], tokenizer: Any) -> dict[str, Any]:
    stopped = tokenizer.eos_token_id in ids
    kept = ids[: ids.index(tokenizer.eos_token_id)] if stopped else ids
    return {
        "answer": tokenizer.decode(kept, skip_special_tokens=True).strip(),
        "stopped": stopped,
        "invented": bool(TURN_MARKER.search(tokenizer.decode(kept))),
        "tokens": len(kept),
    }


def text_metrics(answers: list[dict[str, Any]]) -> dict[str, Interval]:
    """Metrics over the answers that have a reference, each with its 95% interval.

    ROUGE-L (rouge-score), BLEU and chrF (sacrebleu, 0 to 100); the shares of answers that the model ended and of those
    with an invented turn (Wilson's interval); the share of repeated word 4-grams (seq-rep-4, Welleck et al., "Neural
    text generation with unlikelihood training", 2020, eq. 10); words of the answers per word of the references.
    """
    rows = [row for row in answers if row["reference"]]
    if not rows:
        return {}
    texts, references = [row["answer"] for row in rows], [row["reference"] for row in rows]
    ones = [1.0] * len(rows)
    return {
        "ROUGE-L": intervals.ratio(_rouge(texts, references), ones).within(0, 1),
        **_sacrebleu(texts, references),
        "ends by itself": intervals.share(sum(row["stopped"] for row in rows), len(rows)),
        "invents a turn": intervals.share(sum(row["invented"] for row in rows), len(rows)),
        "repeats itself": intervals.ratio([_repeated(text) for text in texts], ones).within(0, 1),
        "length": intervals.ratio(_words(texts), _words(references)).within(0, inf),
    }


def _words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def _rouge(texts: list[str], references: list[str]) -> list[float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(texts, references, strict=True)]


def _sacrebleu(texts: list[str], references: list[str]) -> dict[str, Interval]:
    from sacrebleu.metrics import BLEU, CHRF

    class PlainChrf(CHRF):
        """Always returns Python's float: the library mixes it with numpy's, and fails on a mix."""

        def _compute_f_score(self, statistics: Any) -> float:
            return float(super()._compute_f_score(statistics))

    scores = {}
    for name, metric in (("BLEU", BLEU()), ("chrF", PlainChrf())):
        value = metric.corpus_score(texts, [references]).score
        if len(texts) < 2:  # one answer says nothing about others
            scores[name] = Interval(value, 0.0, 100.0)
            continue
        resampled = metric.corpus_score(texts, [references], n_bootstrap=BLEU_RESAMPLES)
        low, high = (float(resampled._mean + sign * resampled._ci) for sign in (-1, 1))
        scores[name] = Interval(value, max(0.0, low), high)
    return scores


def _repeated(text: str) -> float:
    words = text.split()
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
