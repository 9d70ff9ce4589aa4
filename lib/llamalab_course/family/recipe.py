"""The recipe of the lab family: sizes, stages, steps."""

from dataclasses import dataclass
from pathlib import Path

from .world import World

BASE, LLAMA, ALPACA = "llama-lab", "chinese-llama-lora-lab", "chinese-alpaca-lora-lab"
PLUS = "chinese-alpaca-plus-lora-lab"
PARAMS = {"dim": 192, "n_layers": 4, "n_heads": 6, "multiple_of": 32, "norm_eps": 1e-5}
LORA = {"r": 8, "lora_alpha": 32, "modules_to_save": ["embed_tokens", "lm_head"]}
LORA |= {"target_modules": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()}
CONTEXT = 256  # tokens; no training text is longer
CONFIG = {
    "hidden_size": PARAMS["dim"],
    "intermediate_size": 512,  # follows in Meta's layout from `dim` and `multiple_of`
    "num_hidden_layers": PARAMS["n_layers"],
    "num_attention_heads": PARAMS["n_heads"],
    "rms_norm_eps": PARAMS["norm_eps"],
    "max_position_embeddings": CONTEXT,
}
"""The sizes in transformers' words."""
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


RECIPES = {
    "base": Recipe(steps=2000, batch=48, rate=2.5e-3, embedding_rate=2.5e-3),
    "llama": Recipe(steps=1500, batch=48, rate=4e-3, embedding_rate=2.5e-3),
    "alpaca": Recipe(steps=2000, batch=48, rate=4e-3, embedding_rate=2.5e-3),
    "plus": Recipe(steps=1500, batch=48, rate=3e-3, embedding_rate=1.5e-3),
}


@dataclass(frozen=True)
class Stage:
    """What one stage of the training works with.

    Attributes:
        out: the directory of the family's parts; earlier stages have filled theirs.
        work: the stage's own directory, for its checkpoints and its loss curve.
        seed: all that is random in the stage follows from it.
        recipe: None for the tokenizers, which are not trained in steps.
    """

    out: Path
    work: Path
    world: World
    seed: str
    recipe: Recipe | None = None
