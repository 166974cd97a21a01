"""QLoRA fine-tuning in notebooks: the package that the notebooks import.

Importing it is cheap: torch and the Hugging Face libraries are imported by the modules that use them.
"""

from qlora_helpers.config import Config
from qlora_helpers.errors import UserError

__version__ = "0.1.0"
__all__ = ["Config", "UserError", "__version__"]
