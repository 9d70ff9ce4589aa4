"""Inference: a loaded model, and answers from it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "chat": ["Chat", "talk"],
        "decoding": ["AnswerRow", "fitting_threads"],
        "loading": ["fault_of", "generate", "load", "memory_needed", "model_of", "pick_device"],
        "model": ["Answer", "FEWEST_HALVED", "Model", "answer_all"],
        "predictions": ["Batch", "fitting_batch", "predict", "read_prompts"],
        "sampling": ["SAMPLING", "check_seed", "effective", "template_mistake"],
        "templates": ["TEMPLATES", "Turn"],
    },
)
