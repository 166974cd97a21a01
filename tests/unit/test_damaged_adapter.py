"""An adapter that is not as its run saved it is noticed wherever it is used."""

import shutil

import pytest

from qlora_helpers import UserError, files
from qlora_helpers.device import detect
from qlora_helpers.export import merge, push
from qlora_helpers.models import qlora
from qlora_helpers.runs import RunFolder


@pytest.fixture(scope="module")
def run(make_run):
    run = make_run()
    files.write_json(run / "metrics.json", run.read("metrics.json") | {"adapter_sha256": files.hashes(run.adapter)})
    return run


@pytest.mark.parametrize("damage", ["empty", "one flipped bit"])
def test_a_damaged_adapter_is_not_exported_pushed_or_loaded(run, tmp_path, config, damage):
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "exp1"))
    merge.source(copy)
    file = copy.adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(b"" if damage == "empty" else whole[:-1] + bytes([whole[-1] ^ 1]))
    base = qlora.load_base(config.replace(quantization="none"), detect("float32"))
    for use in (
        lambda: merge.source(copy),
        lambda: push.prepare(copy.path, "me/model"),
        lambda: qlora.load_adapter(base, copy.adapter),
        lambda: qlora.load_adapters(base, {"a": copy.adapter}),
    ):
        with pytest.raises(UserError, match="is damaged, or was changed after training"):
            use()
