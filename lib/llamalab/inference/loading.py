"""Loading: from any checkpoint to a model in memory, on the device that there is.

A base with its adapters not yet merged is read through the same views that the writer uses, so
that it computes with exactly the merged weights. What it will take is known before the first
weight is read, and what cannot fit is refused with the arithmetic.
"""

import importlib.util
import inspect
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from ..catalog import FP32_BELOW, RUNTIME, Shape, kv_cache_bytes, workspace_bytes
from ..checkpoints import Checkpoint
from ..environment import memory_available
from ..errors import LabWarning, NotEnoughRoom, NotFound, UsageError
from ..surgery import Tokenizer, compose, fitting_model
from ..units import size_text
from .half_linear import read_prompts_in_float32
from .model import Answer, Model


def pick_device(device: str = "auto") -> torch.device:
    """Return the device for "auto", "cpu", "cuda", "cuda:N" or "mps".

    Auto picks CUDA, then Apple's MPS, then the CPU.

    Raises:
        UsageError: it is none of these.
        NotFound: this machine does not have it.
    """
    if device == "auto":
        found = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device("mps" if torch.backends.mps.is_available() else found)
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda", "mps"):
        raise UsageError(
            f"There is no device '{device}'.", "", "Use auto, cpu, cuda, cuda:1 or mps."
        )
    counts = {"cpu": 1, "cuda": torch.cuda.device_count()}
    counts["mps"] = int(torch.backends.mps.is_available())
    if (wanted.index or 0) >= counts[wanted.type]:
        raise NotFound(
            f"This machine has no device '{device}'.",
            "PyTorch does not see it; 'llamalab check' tells what it sees.",
            "Use --device auto, which takes the best one there is.",
        )
    return wanted


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

QUANTIZED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""Bytes a value in a layer's matrices: 8 bits, or 4 and a scale of fp32 for 64 values.

Embeddings and norms keep their dtype. The work is done by bitsandbytes, the extra `quantize`.
"""


def load(
    base_model: str | Path,
    lora_model: str | Path | Sequence[str | Path] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    tokenizer_path: str | Path | None = None,
    models_dir: str | Path = "",
    force: bool = False,
) -> Model:
    """Load a model, adapters that are not merged yet included.

    Args:
        base_model: a directory in either layout, a catalogue name, or `hf:OWNER/REPO`.
        lora_model: adapters to add, in order; they are merged in memory, exactly as on disk.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        dtype: "float16", "bfloat16", "float32"; auto means the checkpoint's own, but float32
            on a CPU for models below `catalog.FP32_BELOW` parameters.
        quantize: "8bit" or "4bit" (LLM.int8(), NF4), which saves memory, not time.
        tokenizer_path: a `tokenizer.model` or its directory, to be used instead of the model's.
        force: allow an adapter that the base contains already.

    Raises:
        LabError: nothing to load, parts that do not fit, or too little memory.
    """
    pick_device(device)  # a wrong name is said before anything is read
    view = view_of(base_model, lora_model, tokenizer_path, models_dir, force)
    return model_of(view, device=device, dtype=dtype, quantize=quantize)


def view_of(base_model, lora_model=None, tokenizer_path=None, models_dir="", force=False):
    """Return what `load` would read, as a view; for the arguments see there."""
    view = compose(base_model, lora_model, models_dir=models_dir, force=force)
    if tokenizer_path:
        view.tokenizer = Tokenizer(tokenizer_path).path
    return view


def model_of(
    view: Checkpoint, *, device: str = "auto", dtype: str = "auto", quantize: str | None = None
) -> Model:
    """Load a checkpoint in HF layout, a view with adapters included; otherwise as `load`."""
    where = pick_device(device)
    fitting_model(view)  # an id beyond the embedding would be an error far from its cause
    chosen = pick_dtype(view, where, dtype)
    if quantize not in (None, *QUANTIZED):
        raise UsageError(f"There is no quantisation '{quantize}'.", "", "Use 8bit or 4bit.")
    if quantize and not importlib.util.find_spec("bitsandbytes"):
        raise NotFound(
            "bitsandbytes, which quantises, is not installed.",
            "It is an extra.",
            "Run: pip install 'llamalab[quantize]'",
        )
    _require_memory(view, where, chosen, quantize)
    network = read_network(view, where, chosen, quantize)
    return Model(network, Tokenizer(view.tokenizer), view.made_of)


def pick_dtype(view: Checkpoint, where: torch.device, dtype: str = "auto") -> torch.dtype:
    """Return the dtype that `load` takes for a checkpoint on a device."""
    if dtype not in (*DTYPES, "auto"):
        raise UsageError(f"There is no dtype '{dtype}'.", "", f"Use auto, {', '.join(DTYPES)}.")
    small = view.total_bytes // view.dtype.itemsize < FP32_BELOW
    auto = torch.float32 if where.type == "cpu" and small else view.dtype
    return DTYPES.get(dtype, auto)


def memory_needed(view: Checkpoint, dtype: torch.dtype, quantize: str | None = None) -> dict:
    """Return what answering will take, in bytes: weights, KV cache, workspace, runtime.

    Cache and workspace are for a full context, of which short answers use a part.
    """
    config, width = view.config, dtype.itemsize
    shape = shape_of(config)
    tokens = config["max_position_embeddings"]
    values = {name: spec.nbytes // spec.dtype.itemsize for name, spec in view.tensors.items()}
    inside = sum(count for name, count in values.items() if name.endswith("_proj.weight"))
    layers = inside * QUANTIZED[quantize] if quantize else inside * width
    return {
        "weights": int(layers) + (sum(values.values()) - inside) * width,
        "KV cache": kv_cache_bytes(shape, tokens, 1, width),
        "workspace": workspace_bytes(shape, config["vocab_size"], tokens, width),
        "runtime": RUNTIME,
    }


def shape_of(config: dict) -> Shape:
    """Return the shape that a configuration of transformers tells."""
    return Shape(
        dim=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        ffn=config["intermediate_size"],
    )


def memory_free(where: torch.device) -> int | None:
    """Return the bytes free on a device, or None where nobody can tell."""
    return torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else memory_available()


def _require_memory(view: Checkpoint, where, dtype: torch.dtype, quantize: str | None) -> None:
    def total(dtype: torch.dtype, quantize: str | None = None) -> int:
        parts = memory_needed(view, dtype, quantize)
        return sum(parts.values()) - (parts["runtime"] if where.type == "cuda" else 0)

    needed = total(dtype, quantize)
    free = memory_free(where)
    if free is None or needed <= free:
        return
    smaller = {
        "--dtype bfloat16": total(torch.bfloat16),
        "--quantize 8bit": total(torch.bfloat16, "8bit"),
        "--quantize 4bit": total(torch.bfloat16, "4bit"),
    }
    ways = [f"{way} ({size_text(size)})" for way, size in smaller.items() if size <= free]
    if where.type == "cuda":
        ways.append("--device cpu, or device_map='auto' of transformers, over GPUs and CPU")
    parts = memory_needed(view, dtype, quantize)
    name = str(dtype).removeprefix("torch.") + (f", {quantize}" if quantize else "")
    raise NotEnoughRoom(
        f"In {name} the model needs {size_text(needed)} on {where}, and {size_text(free)} are free.",
        " + ".join(f"{part} {size_text(size)}" for part, size in parts.items()) + ".",
        f"Use {'; '.join([*ways, 'a smaller model'])}.",
    )


def fault_of(weights: torch.Tensor) -> str:
    """Return what is wrong with the values of a weight or a block of it, or "".

    One sum finds NaN and infinities; only where it is 0 are the values looked at.
    """
    total = weights.sum(dtype=torch.float32)
    if not torch.isfinite(total):
        return "hold NaN or infinite values"
    return "are all zero" if total == 0 and not weights.any() else ""


def read_network(view: Checkpoint, where: torch.device, dtype: torch.dtype, quantize: str | None):
    """Return transformers' network with the weights of `view`, block by block, on a device."""
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    weights = {}
    for name, spec in view.tensors.items():
        weights[name], at = torch.empty(spec.shape, dtype=dtype), 0
        for block in view.blocks(name):
            weights[name][at : at + len(block)] = block
            at += len(block)
        if fault := fault_of(weights[name]):
            text = f"The weights {name} {fault}: the answers will mean nothing."
            warnings.warn(text, LabWarning, stacklevel=3)
    more = {}
    if quantize:
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=quantize == "8bit",
            load_in_4bit=quantize == "4bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
        more["device_map"] = {"": where}
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network = LlamaForCausalLM.from_pretrained(
            None, config=LlamaConfig.from_dict(view.config), state_dict=weights, dtype=dtype, **more
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    if where.type == "cpu" and dtype == torch.float16:
        read_prompts_in_float32(network)
    return (network if quantize else network.to(where)).eval()


def generate(
    base_model: str | Path,
    prompt: str,
    lora_model: str | Path | Sequence[str | Path] | None = None,
    *,
    with_prompt: bool = False,
    **options,
) -> Answer:
    """Load a model and answer one prompt.

    Args:
        with_prompt: put the alpaca template around `prompt`.
        options: those of `load` (device, dtype, quantize, ...), and those of `Model.generate`
            (temperature, max_new_tokens, seed, ...).

    Raises:
        LabError: as `load` and `Model.generate`.
    """
    of_load = inspect.signature(load).parameters.keys() & options.keys()
    model = load(base_model, lora_model, **{name: options.pop(name) for name in of_load})
    return model.generate(prompt, template="alpaca" if with_prompt else "none", **options)
