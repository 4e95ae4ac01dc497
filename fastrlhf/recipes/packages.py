"""Check on import that the packages of the recipes are installed.

If some are missing, the error names them and the command that installs them.
"""

from importlib.util import find_spec

_PACKAGES = (
    "transformers",
    "peft",
    "accelerate",
    "gguf",
    "matplotlib",
    "rich",
    "tensorboard",
    "vaderSentiment",
)
INSTALL = 'pip install "fastrlhf[recipes]"'

missing = [name for name in _PACKAGES if find_spec(name) is None]
if missing:
    raise ModuleNotFoundError(f"The recipes need {', '.join(missing)}: {INSTALL}")
