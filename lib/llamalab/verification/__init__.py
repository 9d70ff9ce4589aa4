"""Verification: is a directory, file by file, what was published, recorded or given?"""

import lazy_loader

_FACE = {
    "verification": "verify",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _FACE.items()}
)
