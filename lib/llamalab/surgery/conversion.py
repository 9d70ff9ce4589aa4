"""Converting: a checkpoint in Meta layout seen in HF layout, and the way back.

Two things differ between the layouts: the names of the tensors, and the order of the rows of
the query and key projections. Meta rotates neighbouring pairs of a head's values (0 with 1, 2
with 3, ...); transformers rotates the first half against the second (0 with d/2, 1 with
d/2 + 1, ...). Reordering the rows of q and k, head by head, makes one the other; everything
else is a plain copy, with every bit kept.
"""

from pathlib import Path

import torch

from .. import catalog
from ..checkpoints import Checkpoint, Made, MetaCheckpoint, write
from ..errors import DamagedFile, Incompatible
from .tokenizer import tokenizer_files

DEFAULT_CONTEXT_LENGTH = 2048
"""LLaMA-1's context length, assumed where the catalogue does not know the base."""

_OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

_IN_LAYER = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}


def names(layers: int) -> dict[str, str]:
    """Return Meta's name -> Hugging Face's name for every tensor of a model of `layers` layers."""
    result = {"tok_embeddings.weight": _OUTSIDE["tok_embeddings.weight"]}
    for layer in range(layers):
        for meta, hf in _IN_LAYER.items():
            result[f"layers.{layer}.{meta}"] = f"model.layers.{layer}.{hf}"
    return result | _OUTSIDE


def permute(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of whole heads from Meta's rotary order to transformers'.

    Args:
        rows: `[heads * head_dim, ...]`, q or k rows of one or more whole heads.
        head_dim: rows of one head.

    Within each head, the rows `(head_dim / 2, 2)` become `(2, head_dim / 2)`: even rows first.
    """
    heads = rows.shape[0] // head_dim
    paired = rows.reshape(heads, head_dim // 2, 2, *rows.shape[1:])
    return paired.transpose(1, 2).reshape(rows.shape)


def unpermute(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo `permute`: from transformers' row order back to Meta's."""
    heads = rows.shape[0] // head_dim
    halves = rows.reshape(heads, 2, head_dim // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


class _InLayout(Checkpoint):
    """A checkpoint under the other layout's names, with q and k rows reordered."""

    def __init__(
        self, source: Checkpoint, layout: str, config: dict, name_of: dict[str, str], order
    ):
        self.layout, self.config = layout, config
        self._source, self._name_of, self._order = source, name_of, order
        self.tensors = {name: source.tensors[name_of[name]] for name in name_of}
        self.tokenizer, self.inputs = source.tokenizer, source.inputs
        self.made_of = source.made_of
        hf = config if layout == "hf" else source.config
        self._head_dim = hf["hidden_size"] // hf["num_attention_heads"]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        source = self._name_of[name]
        if not name.endswith(("q_proj.weight", "k_proj.weight", "wq.weight", "wk.weight")):
            return self._source.read(source, start, stop)
        # Rows move within their head, so whole heads are read around the rows asked for.
        stop = self.tensors[name].rows if stop is None else stop
        first = start - start % self._head_dim
        last = stop + -stop % self._head_dim
        rows = self._order(self._source.read(source, first, last), self._head_dim)
        return rows[start - first : stop - first]


def as_hf(checkpoint: Checkpoint, context_length: int | None = None) -> Checkpoint:
    """Return a view of `checkpoint` in HF layout, its tensors held against its configuration.

    Args:
        context_length: written as `max_position_embeddings`; Meta's params.json does not hold
            it. None means what config.json says, or what the catalogue knows of the base, else
            2048.

    Raises:
        DamagedFile: tensors and configuration disagree.
    """
    layers = checkpoint.config["n_layers" if checkpoint.layout == "meta" else "num_hidden_layers"]
    if checkpoint.layout == "hf":
        same = {name: name for name in names(layers).values()}
        config = dict(checkpoint.config)
        if context_length or "max_position_embeddings" not in config:
            config["max_position_embeddings"] = context_length or DEFAULT_CONTEXT_LENGTH
        _check_names(checkpoint, set(same))
        _check_shapes(checkpoint, config, same)
        return _InLayout(checkpoint, "hf", config, same, lambda rows, head_dim: rows)
    name_of = {hf: meta for meta, hf in names(layers).items()}
    _check_names(checkpoint, set(name_of.values()))
    config = hf_config(checkpoint, context_length)
    _check_shapes(checkpoint, config, name_of)
    return _InLayout(checkpoint, "hf", config, name_of, permute)


def as_meta(checkpoint: Checkpoint) -> Checkpoint:
    """Return a view of `checkpoint` in Meta layout, the exact inverse of `as_hf`."""
    if checkpoint.layout == "meta":
        return checkpoint
    config = checkpoint.config
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise Incompatible(
            f"The model scales its rotary positions ({scaling}), which Meta's layout cannot say.",
            "The same weights would answer differently there.",
            "Use the model in HF layout, which --output-type huggingface gives.",
        )
    name_of = names(config["num_hidden_layers"])
    _check_names(checkpoint, set(name_of.values()))
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "norm_eps": config.get("rms_norm_eps", 1e-6),  # the default of LlamaConfig
        "vocab_size": checkpoint.vocab_size,
    }
    if (kv_heads := config.get("num_key_value_heads", params["n_heads"])) != params["n_heads"]:
        params["n_kv_heads"] = kv_heads
    if (theta := _rope_theta(config)) != 10000.0:
        params["rope_theta"] = theta
    params |= _ffn_parameters(config["hidden_size"], config["intermediate_size"])
    return _InLayout(checkpoint, "meta", params, name_of, unpermute)


def _check_names(checkpoint: Checkpoint, expected: set[str]) -> None:
    for missing in sorted(expected - set(checkpoint.tensors)):
        raise DamagedFile(
            f"The checkpoint holds no tensor '{missing}'.",
            "Its configuration promises one: the file is incomplete, or of another model.",
            finding="damaged-file",
        )
    for extra in sorted(set(checkpoint.tensors) - expected):
        raise DamagedFile(
            f"The checkpoint holds a tensor '{extra}' that a LLaMA does not have.",
            "It would be lost, so nothing was written.",
            "Check that this is a plain LLaMA-1 or Llama-2 checkpoint.",
        )


def _check_numbers(config: dict, file: str) -> None:
    """Refuse a configuration whose numbers cannot be those of a LLaMA."""
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if type(kv_heads) is not int or kv_heads < 1 or heads % kv_heads:
        raise DamagedFile(
            f"{file} gives {kv_heads!r} key and value heads to {heads} heads.",
            "Each of them serves a whole number of heads.",
            finding="damaged-file",
        )
    if dim % (2 * heads) or config.get("head_dim", dim // heads) not in (None, dim // heads):
        raise DamagedFile(
            f"{file} gives {heads} heads to a width of {dim}.",
            "The width of a head must be a whole, even number, or no pairs could be rotated.",
            finding="damaged-file",
        )
    positive = {"rms_norm_eps": config.get("rms_norm_eps", 1e-6), "rope_theta": _rope_theta(config)}
    for key, value in positive.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0:
            raise DamagedFile(
                f"{file} gives {value!r} as {key}.",
                "A number above 0 belongs there, or the answers would mean nothing.",
                finding="damaged-file",
            )


def _check_shapes(checkpoint: Checkpoint, config: dict, name_of: dict[str, str]) -> None:
    """Hold every tensor to the shape that the configuration promises."""
    file = "config.json" if checkpoint.layout == "hf" else "params.json"
    _check_numbers(config, file)
    dim, ffn, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    heads = config["num_attention_heads"]
    kv = dim // heads * (config.get("num_key_value_heads") or heads)
    shapes = {
        "embed_tokens": (vocab, dim), "lm_head": (vocab, dim), "norm": (dim,),
        "input_layernorm": (dim,), "post_attention_layernorm": (dim,),
        "q_proj": (dim, dim), "k_proj": (kv, dim), "v_proj": (kv, dim), "o_proj": (dim, dim),
        "gate_proj": (ffn, dim), "up_proj": (ffn, dim), "down_proj": (dim, ffn),
    }  # fmt: skip
    for hf, name in name_of.items():
        kind, found = hf.split(".")[-2], checkpoint.tensors[name].shape
        expected = shapes[kind]
        if found == expected:
            continue
        what = f"Tensor {name} has the shape {found}, not {expected}."
        if kind in ("embed_tokens", "lm_head") and found[1:] == expected[1:]:
            raise DamagedFile(what, finding="borrowed-config")
        why = f"{file} and the weights are not of the same model."
        raise DamagedFile(what, why, finding="damaged-file")


def hf_config(checkpoint: Checkpoint, context_length: int | None = None) -> dict:
    """Return the content of config.json for a checkpoint in Meta layout.

    Sizes that Meta's params.json leaves out or sets to -1 are taken from the tensors; the
    context length from the catalogue.
    """
    params = checkpoint.config
    if context_length is None:
        known = [catalog.parts()[name].context for name in checkpoint.made_of]
        context_length = known[0] if known else DEFAULT_CONTEXT_LENGTH
    theta = _rope_theta(params)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": params["dim"],
        "intermediate_size": checkpoint.tensors["layers.0.feed_forward.w1.weight"].rows,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "head_dim": params["dim"] // params["n_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": theta,  # older readers look for it here, newer ones in rope_parameters
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "max_position_embeddings": context_length,
        "vocab_size": checkpoint.vocab_size,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": str(checkpoint.dtype).removeprefix("torch."),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
    }


def _rope_theta(config: dict):
    """Return the base of the rotary angles; what is no number is left for the checks to name."""
    nested = config.get("rope_parameters")
    nested = nested.get("rope_theta") if isinstance(nested, dict) else None
    theta = nested or config.get("rope_theta", 10000.0)
    return float(theta) if type(theta) in (int, float) else theta


def _ffn_parameters(dim: int, ffn: int) -> dict:
    """Return the `multiple_of` (and multiplier) that give `ffn` by Meta's formula.

    ffn = multiple_of * ceil(int(multiplier * int(8 * dim / 3)) / multiple_of)
    """
    plain = int(8 * dim / 3)
    for multiple_of in (256, 128, 64, 32, 1024, 4096, 16, 8, 4, 2, 1):
        if ffn % multiple_of == 0 and -(-plain // multiple_of) * multiple_of == ffn:
            return {"multiple_of": multiple_of}
    return {"multiple_of": 1, "ffn_dim_multiplier": (ffn + 0.5) / plain}


def convert(
    input_dir: str | Path,
    output_dir: str | Path,
    *,
    model_size: str | None = None,
    max_shard_size: str | int = "2GB",
    context_length: int | None = None,
    overwrite: bool = False,
) -> Made:
    """Convert a base model from Meta layout to HF layout, with every bit of the weights kept.

    Args:
        input_dir: the folder of one size, or its parent.
        output_dir: absent or empty; it is complete when this returns, or does not exist.
        model_size: the size folder's name, where the parent holds several.
        max_shard_size: bytes, or text such as "2GB"; a larger tensor gets a shard of its own.
        context_length: see `as_hf`.
        overwrite: replace an output directory that holds something else.

    Raises:
        LabError: bad input, too little disk, or an output directory that holds something else.
    """
    base = MetaCheckpoint(input_dir, model_size)
    view = as_hf(base, context_length)
    options = {"max_shard_size": max_shard_size, "overwrite": overwrite}
    return write(view, output_dir, files=tokenizer_files(view), made_by="convert", **options)
