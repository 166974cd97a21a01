"""One run without a notebook: what the command `train` runs, and what `notebook_launcher` runs in each process."""

from typing import Any

from qlora_helpers import distributed, parse, runs
from qlora_helpers.runs import RunFolder


def train(folder: str, params: dict[str, Any]) -> RunFolder:
    """Resolve `params` as `Config.from_params` takes them, load the data, and train into `folder`.

    Each of several processes calls it, before anything else uses CUDA. Process 0 loads the data for all. Raises
    `UserError` like `trainer.train`.
    """
    distributed.begin()
    from qlora_helpers.config import Config
    from qlora_helpers.data import cleaning
    from qlora_helpers.models import hub
    from qlora_helpers.training import trainer

    config = distributed.from_main(lambda: Config.from_params(**params))
    path = parse.path(folder, "output folder", is_input=False).resolve()
    run = RunFolder(runs.workdir(str(path.parent)) / path.name)
    distributed.from_main(lambda: runs.check_free(run, config))
    with distributed.main_first():
        tokenizer = hub.load_tokenizer(config)
    data = distributed.from_main(lambda: cleaning.prepare(config, tokenizer))
    run = trainer.train(config, data, tokenizer, run)
    distributed.end()
    return run
