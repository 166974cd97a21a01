"""One run: the trainer, its callbacks, and what stops it."""

from qlora_helpers._lazy import lazy

_MODULES = {
    "LiveLoss": "callbacks",  # a figure that is redrawn while a run trains
    "build_trainer": "trainer",  # TRL's trainer, configured
    "collator": "batches",  # batches without padding, for a CPU
    "train": "trainer",  # train a config, or go on where it was interrupted
}
__all__ = list(_MODULES)
__getattr__ = lazy(__name__, _MODULES)
