"""Inference: a loaded model, and answers from it."""

import lazy_loader

_FACE = {
    "chat": "Chat talk",
    "decoding": "AnswerRow fitting_threads",
    "loading": "fault_of generate load memory_needed model_of pick_device",
    "model": "Answer Model answer_all",
    "predictions": "Batch fitting_batch predict read_prompts",
    "sampling": "Sampling Setting check_seed settings",
    "templates": "TEMPLATES Turn render_text template_mistake",
}

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={module: names.split() for module, names in _FACE.items()}
)
