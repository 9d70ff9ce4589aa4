"""The explorer: one prompt, many settings, side by side."""

import lazy_loader

_FACE = {
    "answer_history": "AnswerHistory",
    "requests": "PromptRequest Result as_text differences",
    "session": "Explorer Listener",
    "view": "ExplorerView",
    "widgets": "side_by_side",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _FACE.items()}
)
