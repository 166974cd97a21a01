"""From rows in any shape to tokens and labels."""

from qlora_helpers._lazy import lazy

__all__ = [
    "build",  # what cleaning found, as tables
    "clean",  # usable rows, split into training and held-out ones, with the reason for each dropped row
    "encode",  # rows as token ids and labels
    "load",  # rows of a file, a folder, a hub id or the sample data
    "prepare",  # training and held-out examples of a config
    "select",  # the same from rows that are cleaned already
    "show_labels",  # one example with its trained tokens highlighted
]

__getattr__ = lazy(
    __name__,
    {
        "load": "sources",
        "clean": "cleaning",
        "prepare": "cleaning",
        "select": "cleaning",
        "encode": "prompts",
        "show_labels": "prompts",
        "build": "report",
    },
)
