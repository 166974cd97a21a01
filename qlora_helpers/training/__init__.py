"""One run: the trainer, its callbacks, and what stops it."""

from qlora_helpers._lazy import lazy

__all__ = [
    "LiveLoss",  # a figure that is redrawn while a run trains
    "build_trainer",  # TRL's trainer, configured
    "collator",  # batches without padding, for a CPU
    "train",  # train a config, or go on where it was interrupted
]

__getattr__ = lazy(
    __name__, {"train": "trainer", "build_trainer": "trainer", "LiveLoss": "callbacks", "collator": "batches"}
)
