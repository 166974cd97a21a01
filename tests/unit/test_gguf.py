"""GGUF files: llama.cpp's converter is called, its metadata is completed, and its files answer like the adapter."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
import transformers
from tokenizers import normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_helpers import UserError, files
from qlora_helpers.data import chat_template
from qlora_helpers.export import gguf as export_gguf
from qlora_helpers.export import gguf_reader, merge, parity, pipeline, untrusting
from qlora_helpers.models import bundled, hub

KEYS = gguf.Keys.Tokenizer
SPECIAL = ["<unk>", "<s>", "</s>"]


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that would have been run. The converter is a folder without content."""
    monkeypatch.setattr(export_gguf, "converter", lambda: tmp_path)
    seen = []

    def run(command, env, **_):
        seen.append((command, env))
        Path(command[command.index("--outfile") + 1]).touch()
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return seen


def test_converter_runs_offline_in_this_python(commands, monkeypatch, tmp_path):
    monkeypatch.setattr(export_gguf, "_complete", lambda folder, file: None)
    export_gguf.write(Path("merged"), tmp_path / "model.gguf", "q8_0")
    ((command, environment),) = commands
    script = str(tmp_path / "convert_hf_to_gguf.py")
    assert command[:5] == [sys.executable, "-P", untrusting.__file__, script, "merged"]
    assert command[command.index("--outtype") + 1] == "q8_0"
    assert command[command.index("--outfile") + 1] == str(tmp_path / "model.gguf")
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_a_converter_that_ran_out_of_memory_is_refused_for_that_reason(commands, monkeypatch, tmp_path):
    killed = subprocess.CompletedProcess([], -9, "", "Loading the tokenizer")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: killed)
    with pytest.raises(UserError, match=r"stopped by signal 9, which usually means that memory ran out\. Fix"):
        export_gguf._convert(tmp_path, tmp_path / "model.gguf")


def test_model_that_only_llama_cpp_reads_is_refused_without_it(commands, monkeypatch):
    monkeypatch.setattr(gguf_reader, "architecture", lambda file: "smollm3")
    monkeypatch.setattr(gguf_reader, "llama_cpp_installed", lambda: False)
    with pytest.raises(UserError, match=r"cannot read 'smollm3' files.*Fix: pip install llama-cpp-python"):
        export_gguf.check(Path("base"))
    assert "--vocab-only" in commands[0][0]  # nothing is merged or converted before
    monkeypatch.setattr(gguf_reader, "architecture", lambda file: "qwen3")
    export_gguf.check(Path("base"))


def test_converter_and_library_are_of_the_same_version():
    assert f"{export_gguf.SOURCE.replace('==', '[server]==')} " in (files.ROOT / "requirements-full.txt").read_text()


@pytest.fixture
def merged(model_folder, tokenizer, config, tmp_path):
    """A merged folder that stops at three tokens. Its template is that of the config."""
    folder = tmp_path / "merged"
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chat_template.chat_template(config, tokenizer))
    files.write_json(folder / "generation_config.json", {"eos_token_id": [1, 7, 9]})
    return folder


def written(path, tokens=("a", "b"), kind="gpt2", **scores):
    """Write a GGUF file with one tensor, as little metadata as the converter ever writes, and no end token."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(list(tokens))
    if scores:
        writer.add_token_scores(scores["scores"])
    writer.add_tensor("x.weight", torch.arange(6.0).reshape(2, 3).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def contents(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_metadata_is_completed_and_weights_are_unchanged(merged, config, tokenizer, tmp_path, capfd):
    file = written(tmp_path / "model.gguf")
    export_gguf._complete(merged, file)
    fields = contents(file)
    assert [fields[key] for key in (KEYS.EOS_ID, KEYS.EOT_ID, KEYS.EOM_ID)] == [1, 7, 9]
    assert gguf_reader.end_tokens(file) == [1, 7, 9]
    assert fields[KEYS.ADD_BOS] is True
    assert fields[KEYS.CHAT_TEMPLATE] == chat_template.chat_template(config, tokenizer)
    assert gguf_reader.architecture(file) == "llama"
    (tensor,) = gguf.GGUFReader(file).tensors
    assert tensor.data.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [path.name for path in tmp_path.glob("*.gguf*")] == ["model.gguf"]
    assert capfd.readouterr() == ("", "")
    before = file.stat().st_ino
    export_gguf._complete(merged, file)
    assert file.stat().st_ino == before  # complete already, so not rewritten


@pytest.mark.parametrize("begins", [False, True])
def test_a_text_begins_with_a_start_token_where_the_tokenizer_adds_one(merged, tmp_path, monkeypatch, begins):
    monkeypatch.setattr(chat_template, "starts_with_bos", lambda tokenizer: begins)
    file = written(tmp_path / "model.gguf")
    export_gguf._complete(merged, file)
    assert contents(file)[KEYS.ADD_BOS] is begins
    monkeypatch.setattr(gguf_reader.AutoTokenizer, "from_pretrained", lambda *args, **options: SimpleNamespace())
    assert gguf_reader.load_tokenizer(file).add_bos_token is begins


def sentencepiece_like():
    """A tokenizer like Llama 2's: tokens with a word-start marker, and byte tokens as a fallback."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    lines = (files.ROOT / "data" / "general.jsonl").read_text("utf-8").splitlines()
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    content = json.loads(learned.to_str())["model"]
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *content["vocab"]]
    merges = [tuple(merge) for merge in content["merges"]]
    return transformers.LlamaTokenizer(vocab={name: place for place, name in enumerate(names)}, merges=merges)


def test_missing_scores_follow_the_merges(merged, tmp_path):
    """llama.cpp merges by score alone, so an earlier merge has a higher score."""
    words = sentencepiece_like()
    words.chat_template = "x"
    words.save_pretrained(merged)
    names = words.convert_ids_to_tokens(list(range(len(words))))
    export_gguf._complete(merged, written(tmp_path / "m.gguf", names, "llama", scores=[-1000.0] * len(names)))
    fields = contents(tmp_path / "m.gguf")
    score = dict(zip(fields[KEYS.LIST], fields[KEYS.SCORES], strict=True))
    merges = json.loads(words.backend_tokenizer.to_str())["model"]["merges"]
    ranks = [score[token] for token in dict.fromkeys("".join(merge) for merge in merges)]
    assert len(ranks) > 50
    assert ranks == sorted(set(ranks), reverse=True)
    assert score["<s>"] == -1e9
    assert fields[KEYS.ADD_PREFIX] is True


def test_rotary_factors_divide_the_frequencies(model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    before = model.model.rotary_emb.inv_freq.clone()
    factors = torch.linspace(1, 8, len(before))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_rope_scaling_attn_factors(1.25)
    writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    gguf_reader._scale_rotary_frequencies(model, gguf.GGUFReader(tmp_path / "m.gguf"))
    assert torch.equal(model.model.rotary_emb.inv_freq, before / factors)
    assert model.model.rotary_emb.attention_scaling == 1.25


@pytest.fixture(scope="module")
def converter():
    """The folder of llama.cpp's converter, and fewer prompts. Skips the test where the converter cannot be had."""
    if find_spec("sentencepiece") is None:
        pytest.skip("sentencepiece is not installed: see requirements-full.txt")
    try:
        folder = export_gguf.converter()
    except UserError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "PROMPTS", 6)
        yield folder


@pytest.fixture(scope="session")
def byte_level():
    """SmolLM2's tokenizer: the converter knows byte-level ones by what they make of a fixed text."""
    return hub.saved_tokenizer(bundled.fetch())


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
    """File of a SentencePiece model with byte fallback, as of Llama 2 and Gemma."""
    import sentencepiece

    file = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        input=str(files.ROOT / "data" / "general.jsonl"), model_prefix=str(file.with_suffix("")), model_type="bpe",
        vocab_size=600, byte_fallback=True, normalization_rule_name="identity", max_sentence_length=10_000,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>", minloglevel=2,
    )  # fmt: skip
    return file


def from_pieces(file, kind):
    """A tokenizer with the pieces of a SentencePiece model and, after them, two added tokens."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(str(file))
    names = [model.id_to_piece(number) for number in range(model.vocab_size())]
    ranked = sorted(names, key=lambda name: -model.get_score(model.piece_to_id(name)))
    merges = [(name[:i], name[i:]) for name in ranked for i in range(1, len(name)) if {name[:i], name[i:]} <= {*names}]
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    vocab = {name: number for number, name in enumerate(names)}
    words = getattr(transformers, kind)(vocab=vocab, merges=merges, add_bos_token=True, **special)
    if kind == "LlamaTokenizer":  # a space also after a special token, as llama.cpp and Llama 2's tokenizer.json do it
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        words.backend_tokenizer.normalizer = normalizers.Sequence(steps)
        words.backend_tokenizer.pre_tokenizer = None
        words = transformers.PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, **special)
    words.add_special_tokens({"extra_special_tokens": ["<|end|>", "<|user|>"]})
    words.chat_template = (
        "{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|user|>{% endif %}"
    )
    return words


def as_qwen2(words):
    """The tokenizer's tokens, but numbers and spaces split as by Qwen 2."""
    model = json.loads(words.backend_tokenizer.to_str())["model"]
    special = {"bos_token": None, "unk_token": None, "eos_token": words.eos_token, "pad_token": words.pad_token}
    own = transformers.Qwen2Tokenizer(model["vocab"], [tuple(merge) for merge in model["merges"]], **special)
    own.add_special_tokens({"extra_special_tokens": [token.content for token in words.added_tokens_decoder.values()]})
    own.chat_template = words.chat_template
    return own


@pytest.fixture(scope="module")
def qwen2_converter(converter, tmp_path_factory):
    """The converter, but it takes tokenizers that it does not recognize for Qwen 2's."""
    folder = shutil.copytree(converter, tmp_path_factory.mktemp("llama.cpp") / "llama.cpp")
    base = folder / "conversion" / "base.py"
    text, count = re.subn(r"raise NotImplementedError\(.BPE pre-token.*\)", 'res = "qwen2"', base.read_text("utf-8"))
    assert count == 1
    base.write_text(text, "utf-8")
    return folder


LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
         "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False}  # fmt: skip
# The heads of all published sizes: of these families, transformers and llama.cpp read no other from a file.
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "tie_word_embeddings": True}
QWEN3 = {"head_dim": 128}
# Family, its tokenizer, and settings of its config. SmolLM3 has no rotary positions in every fourth layer.
FAMILIES = {
    "llama 3": ("Llama", "byte-level", {"rope_parameters": LLAMA3}),
    "llama 2": ("Llama", "LlamaTokenizer", {}),
    "mistral": ("Mistral", "LlamaTokenizer", {"sliding_window": None}),
    "qwen2": ("Qwen2", "Qwen2Tokenizer", {}),
    "qwen3": ("Qwen3", "byte-level", QWEN3),
    "gemma2": ("Gemma2", "GemmaTokenizer", GEMMA),
    "gemma3": ("Gemma3", "GemmaTokenizer", GEMMA),
    "phi3": ("Phi3", "LlamaTokenizer", {}),
    "smollm3": ("SmolLM3", "byte-level", {"num_hidden_layers": 4}),
    "granite": ("Granite", "byte-level", {}),
    "olmo2": ("Olmo2", "byte-level", {}),
}
ONLY_LLAMA_CPP = ("smollm3", "granite", "olmo2")


@pytest.fixture(scope="session")
def family_run(byte_level, pieces, make_run, tmp_path_factory):
    """Function that makes a run on a random model of a family, in which each token has a likely successor."""

    def make(name):
        family, kind, settings = FAMILIES[name]
        folder = tmp_path_factory.mktemp(name.replace(" ", ""))
        words = from_pieces(pieces, kind) if kind in ("LlamaTokenizer", "GemmaTokenizer") else byte_level
        if kind == "Qwen2Tokenizer":
            words = as_qwen2(words)
        words.save_pretrained(folder)
        if words.vocab_size < 1000:
            shutil.copyfile(pieces, folder / "tokenizer.model")
        ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": 0}
        config_class = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
        shape = config_class(**{**SHAPE, "vocab_size": len(words), **ids, **settings})
        torch.manual_seed(3)
        model = getattr(transformers, f"{family}ForCausalLM")(shape)
        for weight in model.model.layers.parameters():
            if weight.dim() == 2:
                weight.data.normal_(std=0.2)
        embeddings = model.get_input_embeddings().weight.data.normal_(std=0.2 if shape.tie_word_embeddings else 3)
        if not shape.tie_word_embeddings:
            model.get_output_embeddings().weight.data = 0.1 * embeddings.roll(1, dims=0)
        model.bfloat16().float().save_pretrained(folder)  # exact in 16 bits, and so is the merged model in 32
        return make_run(folder, words=hub.saved_tokenizer(folder), template="auto", target_modules=("all-linear",))

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_file_of_each_family_answers_like_the_adapter(converter, family_run, name, tmp_path, monkeypatch, request):
    """In llama.cpp, and in transformers if it reads such files."""
    installed = gguf_reader.llama_cpp_installed()
    if name in ONLY_LLAMA_CPP and not installed:
        pytest.skip("llama.cpp is not installed: make test-full compiles it")
    if name == "qwen2":
        monkeypatch.setattr(export_gguf, "converter", lambda: request.getfixturevalue("qwen2_converter"))
    run = family_run(name)
    compared = pipeline.ship(run, tmp_path / "out", "f16")
    if installed and name not in ONLY_LLAMA_CPP:
        monkeypatch.setattr(gguf_reader, "llama_cpp_installed", lambda: False)
        compared += pipeline.verify(merge.source(run), {"f16": tmp_path / "out" / "gguf" / "model-f16.gguf"})
    print(parity.table(compared))
    assert all(result.problems() == [] for result in compared)


@pytest.fixture(scope="module")
def shipped(converter, family_run, tmp_path_factory):
    """The folders of an f16 and a q8_0 export of the same run."""
    run, folder = family_run("llama 3"), tmp_path_factory.mktemp("shipped")
    for kind in ("f16", "q8_0"):
        pipeline.ship(run, folder / kind, kind)
    return run, folder


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [("f16", 1e-2), ("q8_0", 1.0)])
def test_transformers_loads_the_file_back(shipped, kind, most):
    file = shipped[1] / kind / "gguf" / f"model-{kind}.gguf"
    want = AutoTokenizer.from_pretrained(shipped[1] / kind / "merged")
    got = gguf_reader.load_tokenizer(file)
    text = "<|im_start|>user\nExplain 'x' 2024?\n\n  Ünï 😀<|im_end|>\n"
    ids = want(text)["input_ids"]
    assert got(text)["input_ids"] == ids
    assert got.chat_template == want.chat_template
    models = (
        gguf_reader.load(file, {"dtype": torch.float32}),
        AutoModelForCausalLM.from_pretrained(shipped[1] / kind / "merged", dtype=torch.float32),
    )
    with torch.no_grad():
        back, merged = (torch.log_softmax(model(input_ids=torch.tensor([ids])).logits, -1) for model in models)
    assert (back - merged).abs().max() < most
    assert {t.tensor_type.name for t in gguf.GGUFReader(file).tensors} == {"F32", kind.upper()}
    assert f"FROM ./{file.name}" in (file.parent / "Modelfile").read_text()


FAULTS = {
    "template": (KEYS.CHAT_TEMPLATE, "prompts are tokenized differently"),
    "stop": (KEYS.EOS_ID, "the end tokens differ"),
    "rope": ("rope_freqs.weight", "KL divergence"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_detected_and_named(shipped, tmp_path, fault):
    run, folder = shipped
    missing, message = FAULTS[fault]
    reader = gguf.GGUFReader(folder / "f16" / "gguf" / "model-f16.gguf")
    reader.tensors = [tensor for tensor in reader.tensors if tensor.name != missing]
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    with redirect_stderr(StringIO()):
        export_gguf.copy_with_new_metadata(reader, writer, {}, [missing])
    (result,) = pipeline.verify(merge.source(run), {"f16": tmp_path / "model.gguf"})
    with pytest.raises(UserError, match=message):
        parity.check(result)


@pytest.mark.slow
def test_file_without_sentencepiece_model_has_the_same_tokens(converter, family_run, tmp_path):
    """A base model with only a tokenizer.json: the converter then writes the same score for every token."""
    run = family_run("llama 2")
    (Path(run.config().model) / "tokenizer.model").unlink()
    compared = pipeline.ship(run, tmp_path / "out", "f16")
    assert [result.problems() for result in compared] == [[], []]


@pytest.mark.slow
def test_tokenizer_that_llama_cpp_does_not_know_is_refused_before_the_merge(converter, make_run, tmp_path):
    with pytest.raises(UserError, match=r"cannot convert .* \(.*pre-tokenizer was not recognized.*\)\. Fix") as raised:
        pipeline.ship(make_run(), tmp_path / "out", "f16")
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []
    assert re.search("ship the merged folder", str(raised.value))
