"""Fixtures of all tests: a small tokenizer, a tiny random Llama, and configs that use them. Nothing is downloaded."""

import gc
import json
import os
import sys

# Set before any Hugging Face library is imported. A test that needs the hub is broken.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from hypothesis import settings

from qlora_helpers import files
from qlora_helpers.config import Config
from qlora_helpers.data.schema import Row
from qlora_helpers.files import ROOT

settings.register_profile("tests", derandomize=True, deadline=None, database=None)
settings.load_profile("tests")


def pytest_collection_finish():
    """Keep the garbage collector from searching the libraries, which took half of the time of a tiny run."""
    gc.collect()
    gc.freeze()


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(kind="plain"):
    """Train a byte-level BPE tokenizer with 1,000 tokens.

    The kind `llama3` looks up whole words first, like Llama 3; older versions of tokenizers then lost the offsets
    (issue 1688). The kind `trimmed` leaves leading spaces out of its offsets, like RoBERTa.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    lines = (ROOT / "data" / "conversations.jsonl").read_text("utf-8").splitlines()
    bpe = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))])
    bpe.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=kind == "trimmed"), start])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer():
    """Function that trains a tokenizer of another kind."""
    return train_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """The tiny model's tokenizer."""
    return train_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory):
    """Folder of a random Llama with two layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # for products this small, waiting threads take ten times as long
    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def config(model_folder):
    """16 rows in 4 steps on the tiny model. Tests change settings with `config.replace`."""
    return Config.from_params(
        profile="cpu",
        model=str(model_folder),
        n_samples=16,
        n_heldout=6,
        max_length=64,
        rank=4,
        alpha=8,
        learning_rate=0.01,
        max_new_tokens=8,
        eval_steps=2,
        save_steps=2,
        compute_dtype="float32",  # the same on every machine; test_cpu_speed.py tests the choice
    )


@pytest.fixture(scope="module")
def data(config, tokenizer):
    """The rows of `config`, which may be a module's own."""
    from qlora_helpers.data import cleaning

    return cleaning.prepare(config, tokenizer)


@pytest.fixture(scope="session")
def make_run(config, tokenizer, tmp_path_factory):
    """Function that writes a finished run folder with an adapter that changes the answers.

    `base` is the folder of another base model, and `words` is its tokenizer.
    """
    import torch

    from qlora_helpers.device import detect
    from qlora_helpers.models import hub, qlora, safetensors_io
    from qlora_helpers.runs import RunFolder

    def make(base=None, words=tokenizer, **changes):
        run = RunFolder(tmp_path_factory.mktemp("run") / "exp1")
        own = config.replace(quantization="none", **({"model": str(base)} if base else {}), **changes)
        built = qlora.attach_lora(qlora.load_base(own, detect("float32")), own)
        torch.manual_seed(1)
        for name, p in built.named_parameters():
            if "lora_B" in name or (p.requires_grad and name.endswith("bias")):
                p.data.normal_(std=0.1)
        built.save_pretrained(run.adapter)
        words.save_pretrained(run.adapter)
        files.write_json(run / "config.json", {"identity": {}, "config": own.to_dict()})
        data = {"heldout_ids": ["a", "b"], "source_fingerprint": "x"}
        trained_on = {"revision": None, "fingerprint": safetensors_io.fingerprint(hub.model_folder(own))}
        manifest = {"versions": {"torch": "2"}, "data": data, "model": trained_on, "baseline": "base-0"}
        manifest |= {"device": {"dtype": "float32"}}
        files.write_json(run / "manifest.json", manifest)
        metrics = {"train_rows": 1, "epochs": 1, "steps": 1, "device": "x", "compute_dtype": "float32", "seed": 0}
        metrics |= {"trainable_parameters": 1, "eval_loss": 1.0, "base_eval_loss": 2.0}
        files.write_json(run / "metrics.json", metrics)
        return run

    return make


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of all runs, which share the losses of their base model."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(runs):
    """A run that has not begun."""
    from qlora_helpers.runs import RunFolder

    return RunFolder(runs / f"begun{len(list(runs.iterdir()))}")


@pytest.fixture(scope="session")
def device():
    """This machine in float32, in which losses can be compared closely."""
    from qlora_helpers.device import detect

    return detect("float32")


@pytest.fixture
def write_rows(tmp_path):
    """Function that writes rows as JSON lines and returns the path of the file."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(path)

    return write


@pytest.fixture(scope="session")
def make_row():
    """Function that makes a conversation from its turns. The first turn is the user's."""

    def make(*turns, given=""):
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        if given:
            messages[0]["input"] = given
        return Row(tuple(messages), "line 1")

    return make


@pytest.fixture(scope="module")
def kernel():
    """A real kernel: functions that run code or send other messages like a front end, and return all outputs."""
    import jupyter_client

    manager = jupyter_client.KernelManager(kernel_name="python3")
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    client.wait_for_ready(60)

    def run(code, person=True):
        return until_idle(client.execute(code, allow_stdin=person))

    def send(comm, data):
        message = client.session.msg("comm_msg", {"comm_id": comm, "data": data})
        client.shell_channel.send(message)
        return message["header"]["msg_id"]

    def until_idle(sent):
        messages = []
        while True:
            message = client.get_iopub_msg(timeout=60)
            messages.append(message)
            if message["parent_header"].get("msg_id") == sent and message["content"].get("execution_state") == "idle":
                return messages

    run.send, run.until_idle = send, until_idle
    yield run
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def setup(config, device, tokenizer):
    """A float32 model with an adapter that changes its outputs, and held-out rows of many lengths."""
    import torch

    from qlora_helpers.data import cleaning
    from qlora_helpers.models import qlora

    plain = config.replace(quantization="none", max_length=48, n_heldout=11, n_samples=1)
    built = qlora.attach_lora(qlora.load_base(plain, device), plain)
    torch.manual_seed(0)
    for name, p in built.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    rows = cleaning.prepare(plain, tokenizer).heldout
    for length in (32, 40, 56):
        rows += cleaning.prepare(plain.replace(max_length=length), tokenizer).heldout[:2]
    return built.eval(), rows


@pytest.fixture
def port():
    """A free port of this machine."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture
def serving(port, tmp_path):
    """Context manager that runs the serve command and waits until the server answers at `probe`.

    It yields the model's name on the server, and a function that queries it through OpenAI's own client and returns the
    pieces of the answer.
    """
    import subprocess
    import time
    import urllib.request
    from contextlib import contextmanager

    from openai import OpenAI

    def answers(url):
        try:
            return urllib.request.urlopen(url, timeout=5)
        except OSError:
            return None

    @contextmanager
    def served(path, probe):
        words = [sys.executable, "-m", "qlora_helpers", "serve", str(path), "--port", str(port)]
        # A file, because a pipe would fill up: llama.cpp's server prints 200 KB.
        output, url = tmp_path / "server.log", f"http://127.0.0.1:{port}/v1"
        with open(output, "w") as log, subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=log) as process:
            try:
                while not answers(url.replace("/v1", probe)):
                    assert process.poll() is None, output.read_text()
                    time.sleep(0.2)
                name, address = (line.split()[1] for line in output.read_text().splitlines()[:2])
                assert address == url
                create = OpenAI(base_url=url, api_key="none", timeout=60, max_retries=0).chat.completions.create

                def ask(messages, stream=False, **options):
                    response = create(model=name, messages=messages, stream=stream, **options)
                    if not stream:
                        return [response.choices[0].message.content]
                    pieces = [chunk.choices[0].delta.content for chunk in response if chunk.choices]
                    return [piece for piece in pieces if piece]

                yield name, ask
            finally:
                process.terminate()  # the command has become the server, so no other process remains
                process.wait(30)

    return served
