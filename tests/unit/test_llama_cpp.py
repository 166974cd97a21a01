"""The GGUF files in a real llama.cpp: the same tokens, the same answers, the same end, on the embedded model.

transformers reads these files too, and forgives what llama.cpp does not: it takes no notice of how a file says that
text is split, or whether a start token is added.
"""

import importlib.util

import numpy as np
import pytest
import torch

from qlora_helpers.__main__ import main
from qlora_helpers.export import gguf, merge, parity, serve
from qlora_helpers.models import bundled, hub

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llama_cpp") is None, reason="llama.cpp is not installed: make test-full compiles it"
    ),
]

TEXTS = [
    "Explain 'x' in 2024?\n\n  Ünï 😀 don't,  12345 tabs\t\tand   spaces",
    "### Human: a\r\nb### Assistant: x = [1, 2];<|im_end|>\n<|im_start|>user",
    "日本語 text — “quoted” … naïve",
]


@pytest.fixture(scope="module")
def base():
    return bundled.fetch()


@pytest.fixture(scope="module", params=["guanaco", "auto"])
def made(request, base, make_run, tmp_path_factory):
    """In each layout: the merged folder of a run on the embedded model, and what its adapter answers."""
    what = merge.source(make_run(base, words=hub.saved_tokenizer(base), template=request.param))
    merged = tmp_path_factory.mktemp(request.param) / "merged"
    merge.merge(what, merged)
    return request.param, merged, parity.of_adapter(what, parity.choose_device(base), parity.prompts())


def opened(path):
    import llama_cpp

    return llama_cpp.Llama(str(path), n_ctx=512, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False)


def asked_by_llama_cpp(llama, reference):
    """Each question as its server asks it, by the file's own template, tokens and ends; and the text that it sends."""
    for question, r in zip(parity.prompts(), reference, strict=True):
        turns = [{"role": "user", "content": question}]
        said = llama.create_chat_completion(  # one more than compared: what it makes last, it does not read
            turns, temperature=0.0, max_tokens=parity.NEW_TOKENS + 1
        )
        ids = llama.input_ids[: llama.n_tokens].tolist()
        prompt = ids[: said["usage"]["prompt_tokens"]]
        answer = ids[len(prompt) :]
        stopped = said["choices"][0]["finish_reason"] == "stop" and len(answer) < parity.NEW_TOKENS
        llama.reset()
        llama.eval(r.prompt + r.answer)
        scores = torch.from_numpy(np.array(llama.scores[len(r.prompt) - 1 : llama.n_tokens]))
        llama.reset()
        logprobs = torch.log_softmax(scores.float(), -1)
        yield parity.Asked(prompt, answer, stopped, logprobs), said["choices"][0]["message"]["content"]


@pytest.mark.parametrize("kind", gguf.KINDS)
def test_llama_cpp_answers_as_the_adapter_does(made, tmp_path, kind):
    template, merged, reference = made
    gguf.write(merged, tmp_path / "model.gguf", kind)
    llama = opened(tmp_path / "model.gguf")
    asked, texts = zip(*asked_by_llama_cpp(llama, reference), strict=True)
    found = parity.judge(kind, "bfloat16", reference, asked, same_ends=True)  # its products round to 16 bits, or to 8
    print(found)
    assert found.problems() == []
    tokenizer = hub.saved_tokenizer(merged)
    for said, text in zip(asked, texts, strict=True):
        assert "<|im_end|>" not in text
        if said.stopped:
            assert tokenizer.decode(said.answer) == text
    if template == "auto":
        assert any(said.stopped for said in asked)
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"]


def test_the_command_makes_q4_k_m(make_run, base, tmp_path, capfd):
    run = make_run(base, words=hub.saved_tokenizer(base))
    assert main(["export", str(run.path), "--out", str(tmp_path / "out"), "--gguf", "q4_k_m"]) == 0
    said = capfd.readouterr()
    assert "| q4_k_m | 20 of 20 |" in said.out
    assert "llama_model_quantize" not in said.err
    files = sorted(path.name for path in (tmp_path / "out" / "gguf").iterdir())
    assert files == ["Modelfile", "model-q4_k_m.gguf"]


@pytest.mark.skipif(bool(serve._lacking(serve.LLAMA_CPP)), reason="its server is not installed: requirements-full.txt")
def test_openais_client_gets_llama_cpps_own_answer(made, tmp_path, serving):
    _, merged, _ = made
    gguf.write(merged, tmp_path / "mine.gguf", "f16")
    question = [{"role": "user", "content": "How do computers store data?"}]
    asked = {"messages": question, "temperature": 0.0, "max_tokens": 24}
    said = opened(tmp_path / "mine.gguf").create_chat_completion(**asked)["choices"][0]["message"]["content"]
    own = {**asked, "extra_body": {"repeat_penalty": 1.0}}  # its default is 1.1: see what the command prints
    with serving(tmp_path / "mine.gguf", "/v1/models") as (name, ask):
        assert name == "mine"
        assert ask(**own) == [said]
        pieces = ask(**own, stream=True)
    assert "".join(pieces) == said
    assert len(pieces) > 3
