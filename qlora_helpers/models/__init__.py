"""Model files, the base model in 4 bits, its weights, and the LoRA adapter."""

from qlora_helpers._lazy import lazy

__all__ = [
    "attach_lora",  # add a new adapter to a base model
    "load_adapter",  # load a saved adapter onto a base model
    "load_adapters",  # load several adapters onto one base model and switch between them
    "load_base",  # load the base model, quantized and frozen
    "load_tokenizer",  # load the tokenizer of the configured model
    "weight_table",  # dtype and size of the stored weights
]

__getattr__ = lazy(
    __name__,
    {
        "load_tokenizer": "hub",
        "load_base": "base",
        "attach_lora": "qlora",
        "load_adapter": "qlora",
        "load_adapters": "qlora",
        "weight_table": "weights",
    },
)
