"""The explorer: one prompt, many settings, side by side."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "answer_history": ["AnswerHistory", "KEPT"],
        "requests": ["PromptRequest", "Result", "as_text", "differences"],
        "session": ["Explorer", "Listener"],
        "view": ["COMPARISONS", "EXAMPLES", "ExplorerView", "escaped", "side_by_side"],
        "widgets": ["Keys", "Tokens"],
    },
)
