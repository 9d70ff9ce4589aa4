"""The command line: one command a verb of the package."""

import lazy_loader

_FACE = {
    "options": "Parser positive size",
    "program": "main",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _FACE.items()}
)
