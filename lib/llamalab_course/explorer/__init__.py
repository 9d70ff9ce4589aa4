"""The explorer: one prompt, many settings, side by side."""

import lazy_loader

_FACE = {
    "answer_history": "AnswerHistory KEPT",
    "requests": "PromptRequest Result as_text differences",
    "session": "Explorer Listener",
    "view": "COMPARISONS EXAMPLES ExplorerView escaped side_by_side",
    "widgets": "Keys Tokens",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _FACE.items()}
)
