"""GGUF files of the bundled model in a real llama.cpp: same tokens, same answers, same end.

transformers reads these files too, but it ignores two fields that llama.cpp uses: the pre-tokenizer, and whether a
start token is added.
"""

import importlib.util

import pytest

from qlora_helpers.__main__ import main
from qlora_helpers.export import gguf, gguf_reader, merge, parity, serve
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
    """For two prompt formats: the merged folder of a run on the bundled model, and its adapter's responses."""
    source = merge.source(make_run(base, words=hub.saved_tokenizer(base), template=request.param))
    merged = tmp_path_factory.mktemp(request.param) / "merged"
    merge.merge(source, merged)
    reference = parity.adapter_responses(source, parity.choose_device(base), parity.questions())
    return request.param, merged, reference


@pytest.mark.parametrize("kind", gguf.KINDS)
def test_llama_cpp_answers_like_the_adapter(made, tmp_path, kind):
    template, merged, reference = made
    gguf.write(merged, tmp_path / "model.gguf", kind)
    responses = list(parity.llama_cpp_responses(tmp_path / "model.gguf", reference, parity.questions()))
    result = parity.judge(kind, "float16", reference, responses, same_ends=True)
    print(result)
    assert result.problems() == []
    tokenizer = hub.saved_tokenizer(merged)
    file = gguf_reader.LlamaCpp(tmp_path / "model.gguf", context=512)
    for question, response in zip(parity.questions()[:5], responses, strict=False):
        *_, stopped, text = file.answer(question, parity.NEW_TOKENS)
        assert "<|im_end|>" not in text
        assert not stopped or tokenizer.decode(response.answer) == text
    if template == "auto":
        assert any(response.stopped for response in responses)
    for text in TEXTS:
        assert file.llama.tokenize(text.encode(), add_bos=True, special=True) == tokenizer(text)["input_ids"]


def test_export_command_writes_q4_k_m(make_run, base, tmp_path, capfd):
    run = make_run(base, words=hub.saved_tokenizer(base))
    assert main(["export", str(run.path), "--out", str(tmp_path / "out"), "--gguf", "q4_k_m"]) == 0
    captured = capfd.readouterr()
    assert "| q4_k_m | 20 of 20 |" in captured.out
    assert "llama_model_quantize" not in captured.err
    files = sorted(path.name for path in (tmp_path / "out" / "gguf").iterdir())
    assert files == ["Modelfile", "model-q4_k_m.gguf"]


@pytest.mark.skipif(
    bool(serve._missing_package(serve.LLAMA_CPP)), reason="llama.cpp's server is missing: see requirements-full.txt"
)
def test_openai_client_gets_the_same_answer_as_llama_cpp(made, tmp_path, serving):
    _, merged, _ = made
    gguf.write(merged, tmp_path / "mine.gguf", "f16")
    question = [{"role": "user", "content": "How do computers store data?"}]
    request = {"messages": question, "temperature": 0.0, "max_tokens": 24}
    *_, answer = gguf_reader.LlamaCpp(tmp_path / "mine.gguf", context=512).answer(question[0]["content"], 23)
    own = {**request, "extra_body": {"repeat_penalty": 1.0}}  # the server's default is 1.1
    with serving(tmp_path / "mine.gguf", "/v1/models") as (name, ask):
        assert name == "mine"
        assert ask(**own) == [answer]
        pieces = ask(**own, stream=True)
    assert "".join(pieces) == answer
    assert len(pieces) > 3
