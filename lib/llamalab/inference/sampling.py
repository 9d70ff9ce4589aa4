"""How an answer is drawn: the settings, what they may be, and what they usually are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import NamedTuple

from ..errors import UsageError
from .templates import TEMPLATES


class Setting(NamedTuple):
    """A number among the settings: what it may be, what it usually is, and what it does."""

    type: type
    default: float
    low: float
    high: float
    usual: tuple[float, float, float]
    """Lowest and highest value that anybody tries, and a step between two of them."""
    help: str


def _number(*setting):
    return field(default=setting[1], metadata={"setting": Setting(*setting)})


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The settings of one answer; the defaults are those of Chinese-LLaMA-Alpaca's script.

    Attributes:
        template: the name of the prompt template put around the prompt.
        temperature: 0 is greedy: no sampling, and the repetition penalty is 1.
        top_p, top_k: only the most probable tokens are drawn, up to this share, this many.
        repetition_penalty: by which the logits of tokens that came already are divided.
        max_new_tokens: at most; the context length may end an answer earlier.
        stop: texts that end the answer and are not part of it.

    Raises:
        UsageError: a setting out of its range.
    """

    template: str = "none"
    temperature: float = _number(float, 0.2, 0, 100, (0, 2, 0.1), "0 is greedy")
    top_p: float = _number(float, 0.9, 1e-6, 1, (0.05, 1, 0.05), "share of the likeliest tokens")
    top_k: int = _number(int, 40, 0, 10**6, (0, 200, 1), "how many of them; 0 is all")
    repetition_penalty: float = _number(float, 1.1, 0.01, 100, (1, 2, 0.05), "1 is none")
    max_new_tokens: int = _number(int, 400, 1, 10**6, (1, 1000, 1), "tokens of an answer, at most")
    stop: Sequence[str] = ()

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if self.template not in TEMPLATES:
            known = ", ".join(TEMPLATES)
            raise UsageError(f"There is no template '{self.template}'.", f"There are: {known}.")
        for name, setting in settings().items():
            value = getattr(self, name)
            allowed = int if setting.type is int else (int, float)
            is_number = isinstance(value, allowed) and not isinstance(value, bool)
            if not is_number or not setting.low <= value <= setting.high:
                bounds = f"{setting.low} and {setting.high}"
                raise UsageError(f"{name} is {value!r}; it must be between {bounds}.")
        if 0 < self.temperature < 0.01:
            raise UsageError(
                "temperature is too near to 0 to divide by.", "", "Use 0, which is greedy."
            )

    def normalised(self) -> Sampling:
        """Return the settings that an answer goes by: a greedy one knows no penalty."""
        return self if self.temperature > 0 else replace(self, repetition_penalty=1.0)

    def as_dict(self) -> dict:
        return asdict(self) | {"stop": list(self.stop)}


def settings() -> dict[str, Setting]:
    """Return the settings that are numbers, by name."""
    numbers = [one for one in fields(Sampling) if one.metadata]
    return {one.name: one.metadata["setting"] for one in numbers}


def check_seed(seed: int) -> None:
    """Raise UsageError for a seed that random numbers cannot be made from."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed is {seed}; it must be between 0 and {2**63 - 1}.")
