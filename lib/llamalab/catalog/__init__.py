"""The catalogue: which models there are, what they cost, and where they lie."""

import lazy_loader

_FACE = {
    "catalog": "FileFacts ModelEntry Part Shape family_of model models parts parts_of unknown",
    "models_dir": "locate models_directory part_directory project_directory",
    "sizes": "AFFORDABLE FP32_BELOW Needs RUNTIME STREAMED adapter_bytes "
    "kv_cache_bytes needs projections workspace_bytes",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _FACE.items()}
)
