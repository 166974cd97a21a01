"""Model files, the base model in 4 bits, its weights, and the LoRA adapter."""

from qlora_helpers._lazy import lazy

_MODULES = {
    "attach_lora": "qlora",  # add a new adapter to a base model
    "load_adapter": "qlora",  # load a saved adapter onto a base model
    "load_adapters": "qlora",  # load several adapters onto one base model and switch between them
    "load_base": "base",  # load the base model, quantized and frozen
    "load_tokenizer": "hub",  # load the tokenizer of the configured model
    "weight_table": "weights",  # dtype and size of the stored weights
}
__all__ = list(_MODULES)
__getattr__ = lazy(__name__, _MODULES)
