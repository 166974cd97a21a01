"""QLoRA fine-tuning in notebooks: the package that the notebooks import.

Importing it is cheap: torch and the Hugging Face libraries are imported by the modules that use them.
"""

import logging
import os
import sys
import warnings

from qlora_helpers.config import Config
from qlora_helpers.errors import UserError

# Noise that a reader can do nothing about: bitsandbytes looking for an optional faster kernel, and the announcement of
# a new name that only transformers 5.2x knows.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)

# Memory freed by one tensor then serves any other: without this a run reserves much more than it uses. It comes too
# late where torch and transformers were imported before. Older versions know the second name; only Linux has it.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
    os.environ.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))

__version__ = "0.1.0"
__all__ = ["Config", "UserError", "__version__"]
