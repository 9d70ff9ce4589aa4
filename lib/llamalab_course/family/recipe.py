"""The recipe of the lab family: sizes, stages, steps."""

from __future__ import annotations

from dataclasses import dataclass

BASE, LLAMA, ALPACA = "llama-lab", "chinese-llama-lora-lab", "chinese-alpaca-lora-lab"
PLUS = "chinese-alpaca-plus-lora-lab"
PARAMS = {"dim": 192, "n_layers": 4, "n_heads": 6, "multiple_of": 32, "norm_eps": 1e-5}
CONTEXT = 256  # tokens; no training text is longer
PIECES = {"base": 1000, "chinese": 1700}
CHECKPOINT_EVERY = 250  # steps
ONLY_PLUS = "invented"  # the table of facts that only the plus adapter is taught


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a stage trains; `batch` is in texts, `rate` the peak learning rate."""

    steps: int
    batch: int
    rate: float
    embedding_rate: float
