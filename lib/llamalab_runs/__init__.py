"""Notebooks executed by papermill, truthfully: runs, sweeps, and both on a Ray cluster."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "runner": ["run"],
    },
)
