"""Turn data sets in several schemas into tokens and labels."""

from qlora_helpers._lazy import lazy

__all__ = [
    "build",  # data report: counts, lengths, duplicates and quality checks
    "clean",  # clean and split a data set; each dropped row keeps its reason
    "encode",  # encode rows as token ids and labels
    "load",  # load rows from a file, a folder, the hub or the sample data
    "prepare",  # load, clean, split and encode a data set
    "select",  # the same, from rows that are already cleaned
    "show_labels",  # show one example with its trained tokens highlighted
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
