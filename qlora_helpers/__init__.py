"""QLoRA fine-tuning in notebooks: the package that the notebooks import.

Importing it is fast: only the modules that use torch or the Hugging Face libraries import them.
"""

import logging
import os
import sys
import warnings

from qlora_helpers.config import Config
from qlora_helpers.errors import UserError

# Hide messages that users cannot act on: bitsandbytes looking for an optional faster kernel, and transformers
# announcing a new argument name that only its versions 5.2x accept.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*deprecated", category=FutureWarning)

# Reserve GPU memory in segments that can grow, so that memory freed by one tensor can serve any other. Otherwise a run
# reserves much more than it uses. This has no effect if torch and transformers were imported before. Older versions of
# torch read the second name. Available on Linux only.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR):
    os.environ.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))

__version__ = "0.1.0"
__all__ = ["Config", "UserError", "__version__"]
