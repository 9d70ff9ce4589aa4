"""The lab family: its world, its training texts, its recipe, and its scores."""

import lazy_loader

_FACE = {
    "corpus": "training_texts",
    "recipe": "ONLY_PLUS",
    "scores": "sample",
    "scoring": "cjk_share exact first_line wilson_interval",
    "world": "chinese_words conversations fact_questions leaks load_world pair questions unmarked",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _FACE.items()}
)
