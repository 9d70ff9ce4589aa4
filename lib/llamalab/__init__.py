"""llamalab: from Meta's LLaMA files to a Chinese-speaking model, one checked step at a time.

The verbs are functions, named as the commands are: `check, download, verify, convert, merge,
load, generate, diagnose, export`. Each is imported on first use, so that `import llamalab`
stays quick and converting or merging never loads transformers.
"""

import logging

import lazy_loader

__version__ = "0.1.0"

# PEFT imports bitsandbytes, if that is there. On some processors it then asks for a package that
# downloads programs from the Hub; when it quantises, it says the same for each product.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "environment": ["check"],
        "downloads": ["download"],
        "verification": ["verify"],
        "surgery": ["convert", "merge", "export"],
        "inference": ["load", "generate"],
        "diagnosis": ["diagnose"],
    },
)
