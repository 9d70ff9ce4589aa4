"""What the stages of `gpu.py` share: lines of figures, timing, random weights of true shapes."""

from __future__ import annotations

import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fused_decode import Decoder, Layer, Weights
from llamalab.catalog import Shape
from llamalab.catalog import sizes as estimate
from made_up_weights import EXTENDED, SIZES

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

SAMPLING = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.1}


@dataclass
class Setting:
    """What a stage is told: where it runs, at what size, and where its lines go.

    `tokens` are those of a timed answer; `prompt` of its prompt; `length` of the cache.
    """

    stage: str
    size: str
    device: str
    backend: str
    file: Path
    out: Path
    data: Path
    variants: tuple[str, ...]
    goal: float

    @property
    def shape(self) -> Shape:
        return replace(SIZES["7b"], layers=1) if self.size == "slice" else SIZES[self.size]

    @property
    def vocab(self) -> int:
        return 2436 if self.size == "lab" else EXTENDED

    @property
    def gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def tokens(self) -> int:
        return {"7b": 256, "lab": 24, "slice": 4}[self.size]

    def line(self, name: str, **figures) -> None:
        """Append one line of figures to the file, at once."""
        figures = {"stage": self.stage, "name": name} | figures
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(figures) + "\n")

    def attempt(self, name: str, action: Callable[[], dict | None]) -> None:
        """Write what `action` returns as a line, or what went wrong; free its memory."""
        torch._dynamo.reset()
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            figures = action()
        except Exception as error:  # one variant's failure is a figure, too
            text = " ".join(str(error).split())
            self.line(name, failed=f"{type(error).__name__}: {text[:300]}")
            warnings.warn(f"{name}: {error!r}", stacklevel=2)
        else:
            if figures is not None:
                self.line(name, **figures)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(action: Callable[[], object], device: str, repeats: int = 5) -> list[float]:
    """Return the seconds of each repeat, by CUDA events or the clock; one goes before."""
    action()
    wait(device)
    found = []
    for _ in range(repeats):
        if device == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            action()
            ended.record()
            torch.cuda.synchronize()
            found.append(began.elapsed_time(ended) / 1000)
        else:
            start = time.perf_counter()
            action()
            found.append(time.perf_counter() - start)
    return found


def captured(action: Callable[[], object], device: str) -> Callable[[], object]:
    """Return `action` as a CUDA graph to be replayed; on a CPU `action` itself."""
    if device != "cuda":
        return action
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(2):
            action()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action()
    return graph.replay


def copy_speed(setting: Setting) -> list[float]:
    """Return bytes a second of copies on the device, read and written counted, each repeat."""
    count = 2**31 if setting.gpu else 2**24
    block = torch.randint(0, 255, (count,), dtype=torch.uint8, device=setting.device)
    other = torch.empty_like(block)
    return [2 * count / one for one in seconds_of(lambda: other.copy_(block), setting.device, 10)]


def random(rows: int, columns: int, dtype: torch.dtype, device: str, std: float = 0.02) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, device=device).normal_(std=std)


def matrices(shape: Shape, vocab: int) -> dict[str, tuple[int, int]]:
    """Return the five products of a step: name -> (outputs, inputs)."""
    size = shape.dim // shape.heads
    return {
        "qkv": ((shape.heads + 2 * shape.kv_heads) * size, shape.dim),
        "o": (shape.dim, shape.dim),
        "gate_up": (2 * shape.ffn, shape.dim),
        "down": (shape.dim, shape.ffn),
        "head": (-(-vocab // 64) * 64, shape.dim),
    }


def random_weights(setting: Setting, dtype: torch.dtype, int8: bool = False) -> Weights:
    """Return random weights, fused, made on the device; with int8 the layers' matrices are."""
    torch.manual_seed(0)
    shape, device, layers = setting.shape, setting.device, []
    sizes = matrices(shape, setting.vocab)

    def norm() -> Tensor:
        return 1 + 0.1 * torch.randn(shape.dim, device=device).to(dtype)

    def matrix(name: str):
        if not int8 or name == "head":
            return random(*sizes[name], dtype, device)
        values = torch.randint(-127, 128, sizes[name], dtype=torch.int8, device=device)
        return values, torch.full(sizes[name][:1], 0.02 / 73, dtype=dtype, device=device)

    for _ in range(shape.layers):
        layers.append(
            Layer(norm(), matrix("qkv"), matrix("o"), norm(), matrix("gate_up"), matrix("down"))
        )
    return Weights(
        random(setting.vocab, shape.dim, dtype, device), layers, norm(), matrix("head")
    )  # fmt: skip


def read_bytes(weights: Weights) -> int:
    """Return the bytes of weights that a token reads: all but the embedding."""
    found = [weights.norm, weights.head]
    for part in [part for layer in weights.layers for part in layer]:
        found += part if isinstance(part, tuple) else [part]
    return sum(tensor.nbytes for tensor in found)


def prompt(setting: Setting, tokens: int, seed: int = 0) -> list[int]:
    """Return a made-up prompt: BOS and random pieces."""
    generator = torch.Generator().manual_seed(seed)
    return [1, *torch.randint(3, setting.vocab, (tokens - 1,), generator=generator).tolist()]


@torch.inference_mode()
def decoding(decoder: Decoder, prompts: list[list[int]], tokens: int, moved: int) -> dict:
    """Return the figures of decoding alone: the reading of the prompt is timed apart.

    Args:
        moved: bytes of weights that a step reads.
    """
    device = decoder.device.type
    steps, reading = [], []
    for _ in range(4):
        began = time.perf_counter()
        decoder.read(prompts)
        wait(device)
        reading.append(time.perf_counter() - began)
        reads, made, began = decoder.reads, 1, time.perf_counter()
        while made < tokens:
            for _ in range(min(decoder.look, tokens - made)):
                decoder.run()
                made += 1
            decoder._look(max(0, made - decoder.look), made)
        wait(device)
        steps.append((time.perf_counter() - began) / (tokens - 1))
    steps, rows = steps[1:], len(prompts)
    best, middle = min(steps), statistics.median(steps)
    return {
        "rate": rows / best,
        "rate_median": rows / middle,
        "ms_a_step": best * 1000,
        "gb_s": moved / best / 1e9,
        "read_ms": min(reading[1:]) * 1000,
        "host_reads": decoder.reads - reads,
        "tokens": tokens,
    }


def memory(setting: Setting, tokens: int, rows: int = 1, width: int = 2) -> dict:
    """Return peak memory beside what the arithmetic foretells, in GB."""
    shape, vocab = setting.shape, setting.vocab
    foretold = estimate.inference_bytes(shape, vocab, tokens, width) - estimate.RUNTIME
    foretold += (rows - 1) * estimate.kv_cache_bytes(shape, tokens, 1, width)
    told = {"foretold_gb": foretold / 1e9}
    if setting.gpu:
        free, whole = torch.cuda.mem_get_info()
        told |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}
        told |= {"reserved_gb": torch.cuda.max_memory_reserved() / 1e9}
        told |= {"used_gb": (whole - free) / 1e9}
    return told


def kernels_of(action: Callable[[], object], steps: int) -> list[dict]:
    """Return the twelve kernels that took most time: name, microseconds a step, times a step."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(steps):
            action()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            one = found.setdefault(event.name[:90], [0.0, 0])
            one[0] += event.device_time if hasattr(event, "device_time") else event.cuda_time
            one[1] += 1
    order = sorted(found.items(), key=lambda item: -item[1][0])[:12]
    rows = [
        {"kernel": name, "us": total / steps, "times": count / steps}
        for name, (total, count) in order
    ]
    whole = sum(total for total, _ in found.values()) / steps
    count = sum(count for _, count in found.values()) / steps
    return [{"kernel": "all", "us": whole, "times": count}, *rows]


def network_of(setting: Setting, dtype: torch.dtype, layers: int | None = None, device=None):
    """Return transformers' LLaMA with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = setting.shape
    config = LlamaConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.ffn,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=setting.vocab,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device or setting.device):
            network = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    for weight in network.parameters():
        if weight.dim() == 2:
            weight.data.normal_(std=0.02 if setting.shape.dim > 1000 else 0.06)
    network.generation_config.eos_token_id = None  # an answer has the length that is asked for
    network.generation_config.pad_token_id = 0
    return network.eval()
