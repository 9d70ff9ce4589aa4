"""Notebooks executed by papermill, truthfully: runs, sweeps, and both on a Ray cluster."""

import lazy_loader

_FACE = {
    "runner": "run",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _FACE.items()}
)
