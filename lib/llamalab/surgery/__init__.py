"""Surgery: what changes weights and vocabularies, as lazy views over a checkpoint."""

import lazy_loader

_FACE = {
    "adapter": "Adapter adapter_list",
    "compatibility": "contains",
    "conversion": "as_hf as_meta convert hf_config names permute unpermute",
    "gguf_export": "export",
    "merging": "compose merge with_adapters with_lora",
    "tokenizer": "Tokenizer appended extend fitting_model read_model tokenizer_json",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _FACE.items()}
)
