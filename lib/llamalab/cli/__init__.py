"""The command line: one command a verb of the package."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "options": ["Parser", "positive", "size"],
        "program": ["main"],
    },
)
