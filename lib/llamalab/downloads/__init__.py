"""Downloads: every file of a model comes to its place with the right bytes, or not at all."""

import lazy_loader

_FACE = {
    "transfer": "download",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _FACE.items()}
)
