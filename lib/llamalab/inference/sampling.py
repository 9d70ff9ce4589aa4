"""The settings that an answer is drawn with, and their ranges."""

from __future__ import annotations

from ..errors import UsageError
from .templates import TEMPLATES

SAMPLING = {
    "temperature": 0.2,
    "top_p": 0.9,
    "top_k": 40,
    "repetition_penalty": 1.1,
    "max_new_tokens": 400,
}
"""The sampling settings of the Chinese-LLaMA-Alpaca project's inference script."""


def template_mistake(family: str, template: str) -> str:
    """Return one sentence on a template that the family was not trained with, or ""."""
    if family == "llama" and template != "none":
        return (
            f"The llama family continues text; inside the '{template}' template it meets a text "
            "that it was never trained on."
        )
    if family == "alpaca" and template == "none":
        return "The alpaca family follows instructions only inside its template (--with-prompt)."
    return ""


def effective(settings: dict) -> dict:
    """Return the settings that `Model.generate` goes by for those that it is given.

    Raises:
        UsageError: one is out of its range.
    """
    check_settings(settings)
    stop = settings["stop"]
    settings = settings | {"stop": [stop] if isinstance(stop, str) else list(stop)}
    return settings if settings["temperature"] > 0 else settings | {"repetition_penalty": 1.0}


def check_settings(settings: dict) -> None:
    """Raise UsageError for a setting of `Model.generate` that is out of its range."""
    if settings["template"] not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise UsageError(f"There is no template '{settings['template']}'.", f"There are: {known}.")
    ranges = {
        "temperature": (0, 100),
        "top_p": (1e-6, 1),
        "top_k": (0, 10**6),
        "repetition_penalty": (0.01, 100),
        "max_new_tokens": (1, 10**6),
    }
    if 0 < settings["temperature"] < 0.01:
        raise UsageError(
            "temperature is too near to 0 to divide by.", "", "Use 0, which is greedy."
        )
    for name, (low, high) in ranges.items():
        if not low <= settings[name] <= high:
            raise UsageError(f"{name} is {settings[name]}; it must be between {low} and {high}.")


def check_seed(seed: int) -> None:
    """Raise UsageError for a seed that random numbers cannot be made from."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed is {seed}; it must be between 0 and {2**63 - 1}.")
