"""Where weights come from, the base model in 4 bits, and the adapter on it."""

from qlora_helpers._lazy import lazy

__all__ = [
    "attach_lora",  # a new adapter on a base model
    "load_adapter",  # a saved adapter on a base model
    "load_adapters",  # several adapters on one base model, switched on one at a time
    "load_base",  # base model, quantized and frozen
    "load_tokenizer",  # tokenizer of a config's model
    "weight_table",  # what is stored, in which dtype, and how large it is
]

__getattr__ = lazy(
    __name__,
    {
        "load_tokenizer": "hub",
        "load_base": "qlora",
        "attach_lora": "qlora",
        "load_adapter": "qlora",
        "load_adapters": "qlora",
        "weight_table": "qlora",
    },
)
