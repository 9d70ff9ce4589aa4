"""The lab family: its world, its training texts, its recipe, and its scores."""

import lazy_loader

_FACE = {
    "corpus": "Corpus alpaca_batch base_batch encode training_texts",
    "recipe": "BASE ONLY_PLUS Recipe",
    "scores": "sample",
    "scoring": "cjk_share exact first_line wilson_interval",
    "training": "train_pieces",
    "world": "LANGUAGES PRONOUN chinese_words conversations leaks load_world "
    "normalise pair paragraphs questions unmarked",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _FACE.items()}
)
