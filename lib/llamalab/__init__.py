"""llamalab: from Meta's LLaMA files to a Chinese-speaking model, one checked step at a time.

The verbs are functions, named as the commands are: `check, download, verify, convert, merge,
load, generate, diagnose, export, run`. Each is imported on first use, so that `import llamalab`
stays quick and converting or merging never loads transformers.
"""

import logging
from importlib import import_module

__version__ = "0.1.0"

# PEFT imports bitsandbytes, if that is there. On some processors it then asks for a package that
# downloads programs from the Hub; when it quantises, it says the same for each product.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

_VERBS = {
    "check": "environment",
    "download": "course",
    "verify": "verification",
    "convert": "conversion",
    "merge": "merging",
    "load": "loading",
    "generate": "loading",
    "diagnose": "diagnosis",
    "export": "exporting",
    "run": "runner",
}

__all__ = [*_VERBS, "__version__"]


def __getattr__(name: str):
    if name not in _VERBS:
        raise AttributeError(f"module 'llamalab' has no attribute '{name}'")
    value = getattr(import_module(f"llamalab.{_VERBS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
