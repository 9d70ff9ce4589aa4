"""Prototype: LLaMA's forward pass in plain PyTorch, its one-token step compiled or captured.

q, k and v are one matrix, gate and up another; keys and values lie in a cache of fixed length; a
token goes from one step to the next on the device. The host looks at what was answered once in
`look` tokens, and cuts off what came after EOS.

Shapes are written [rows, tokens, dim]; `rows` are answers computed at once, `length` is the
cache's, in tokens.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

EPSILON, THETA = 1e-6, 10_000.0

QUERY_BLOCKS = "compute_q_blocks" in inspect.signature(BlockMask.from_kv_blocks).parameters

HOWS = {
    "eager": None,
    "graph": None,
    "compile": {},
    "cdt": {"options": {"coordinate_descent_tuning": True}},
    "pdl": {"options": {"coordinate_descent_tuning": True, "triton.enable_pdl": True}},
    "max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "triton": None,
    "triton-pdl": None,
    "lean": None,
    "lean-pdl": None,
    "lean-norm-pdl": None,
}
"""How a step runs -> what `torch.compile` is told. All but "eager" and "reduce-overhead" are
captured in one CUDA graph; "cdt" turns products of one row into tuned reductions, "pdl" also lets
a kernel start before the last has ended; "triton" are the kernels of `decode_kernels`, "lean" those
of `lean_kernels`, "norm" with kernels of their own for norms."""


class Layer(NamedTuple):
    """One layer: norms [dim]; qkv [(heads + 2 kv_heads) head_dim, dim]; o [dim, dim];
    gate_up [2 ffn, dim]; down [dim, ffn]. A matrix may be (int8 values, scale [outputs])."""

    norm: Tensor
    qkv: Tensor
    o: Tensor
    norm2: Tensor
    gate_up: Tensor
    down: Tensor


class Weights(NamedTuple):
    """embed [vocab, dim], norm [dim], head [vocab padded to a multiple of 64, dim]."""

    embed: Tensor
    layers: list[Layer]
    norm: Tensor
    head: Tensor


def fuse(state: dict[str, Tensor]) -> Weights:
    """Return the weights of a state dict that has transformers' names."""
    layers = []
    while (stem := f"model.layers.{len(layers)}.") + "input_layernorm.weight" in state:
        q, k, v, o = (state[f"{stem}self_attn.{name}_proj.weight"] for name in "qkvo")
        gate, up, down = (state[f"{stem}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        norm, norm2 = (state[f"{stem}{n}_layernorm.weight"] for n in ("input", "post_attention"))
        fused = torch.cat([q, k, v]), o, norm2, torch.cat([gate, up]), down
        layers.append(Layer(norm, *fused))
    head = state["lm_head.weight"]
    head = F.pad(head, (0, 0, 0, -len(head) % 64))
    return Weights(state["model.embed_tokens.weight"], layers, state["model.norm.weight"], head)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return weight * wide.to(x.dtype)


def linear(x: Tensor, weight: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    if isinstance(weight, tuple):
        return F.linear(x, weight[0].to(x.dtype)) * weight[1]
    return F.linear(x, weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn x [rows, heads, tokens, head_dim] by the angles of its tokens [tokens, head_dim]."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def attend_sdpa(q, keys, values, positions):
    """q [rows, heads, tokens, head_dim]; keys, values [rows, kv_heads, length, head_dim]."""
    mask = torch.arange(keys.shape[2], device=q.device) <= positions[:, None]
    grouped = q.shape[1] != keys.shape[1]
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=grouped)


def attend_matmul(q, keys, values, positions):
    rows, heads, tokens, size = q.shape
    grouped = q.reshape(rows, keys.shape[1], -1, size)  # a key's query heads are neighbours
    scores = (grouped @ keys.transpose(2, 3)).float() * size**-0.5
    mask = torch.arange(keys.shape[2], device=q.device) <= positions[:, None]
    mask = mask.repeat(heads // keys.shape[1], 1)
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(q.dtype)
    return (shares @ values).view(rows, heads, tokens, size)


def attend_flex(q, keys, values, positions, block=128):
    """Only blocks of keys that hold a token are read; `length` is a multiple of `block`."""
    blocks = torch.arange(keys.shape[2] // block, device=q.device, dtype=torch.int32)
    count = (positions // block + 1).to(torch.int32).view(1, 1, 1)
    more = {"mask_mod": lambda row, head, at, key: key <= positions[0]}
    more |= {"BLOCK_SIZE": block, "seq_lengths": (q.shape[2], keys.shape[2])}
    if QUERY_BLOCKS:  # only training needs them
        more["compute_q_blocks"] = False
    mask = BlockMask.from_kv_blocks(count, blocks.view(1, 1, 1, -1), **more)
    grouped = q.shape[1] != keys.shape[1]
    return flex_attention(q, keys, values, block_mask=mask, enable_gqa=grouped)


ATTENTIONS = {"sdpa": attend_sdpa, "matmul": attend_matmul, "flex": attend_flex}


def layer_step(x, layer, keys, values, cos, sin, positions, *, heads, kv_heads, attend):
    """Return x [rows, tokens, dim] after one layer; write its keys and values at `positions`."""
    rows, tokens, dim = x.shape
    parts = linear(rms_norm(x, layer.norm), layer.qkv).view(rows, tokens, -1, dim // heads)
    q, k, v = parts.transpose(1, 2).split([heads, kv_heads, kv_heads], dim=1)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    keys[:, :, positions] = k
    values[:, :, positions] = v
    mixed = attend(q, keys, values, positions).transpose(1, 2).reshape(rows, tokens, -1)
    x = x + linear(mixed, layer.o)
    gate, up = linear(rms_norm(x, layer.norm2), layer.gate_up).chunk(2, dim=-1)
    return x + linear(F.silu(gate) * up, layer.down)


def last_logits(x: Tensor, norm: Tensor, head: Tensor) -> Tensor:
    return linear(rms_norm(x[:, -1], norm), head)


def draw(logits, seen, number, temperature, top_k, top_p, repetition_penalty) -> Tensor:
    """Return a token [rows] for logits [rows, vocab] in float32, by a number [rows, 1] in [0, 1).

    It is the first at which the sum of the probabilities, in the order of the vocabulary, exceeds
    the number; `seen` [rows, vocab] tells the tokens of prompt and answer.
    """
    penalised = torch.where(logits < 0, logits * repetition_penalty, logits / repetition_penalty)
    scores = torch.where(seen, penalised, logits) / temperature
    scores, ids = scores.topk(top_k or scores.shape[1])
    rest = scores.softmax(-1).flip(-1).cumsum(-1).flip(-1)
    rest[:, 0] = 1.0
    ids, order = ids.sort()
    shares = scores.masked_fill(rest <= 1 - top_p, -torch.inf).softmax(-1).gather(1, order)
    reached = shares.cumsum(-1)
    number = torch.minimum(number * reached[:, -1:], reached[:, -1:] * (1 - 1e-6))
    return ids.gather(1, torch.searchsorted(reached, number, right=True))[:, 0]


def kernels_of(how: str, weights: Weights, shape):
    """Return the kernels in Triton that take the place of `layer_step` and `last_logits`."""
    pdl = how.endswith("pdl")
    if how.startswith("lean"):
        import lean_kernels

        return lean_kernels.Kernels(weights, shape, pdl=pdl, apart="norm" in how)
    import decode_kernels

    return decode_kernels.Kernels(weights, shape, pdl=pdl)


class Decoder:
    """Answers prompts with fixed memory: `length` tokens of prompt and answer, `rows` at once.

    Attributes:
        reads: how often the host read from the device.
        captures: how many CUDA graphs were captured.
        logits: [rows, vocab] in float32, of the last step.
    """

    def __init__(
        self,
        weights: Weights,
        shape,
        vocab: int,
        *,
        length: int,
        rows: int = 1,
        how="compile",
        attention="sdpa",
        sampling=None,
        backend="inductor",
        look=16,
    ):
        self.weights, self.vocab, self.how, self.look = weights, vocab, how, look
        self.sampling, self.reads, self.captures, self.length = sampling, 0, 0, length
        embed, size = weights.embed, shape.dim // shape.heads
        self.device = device = embed.device
        cache = len(weights.layers), 2, rows, shape.kv_heads, length, size
        self.caches = torch.zeros(cache, dtype=embed.dtype, device=device).unbind()
        powers = torch.arange(0, size, 2, device=device).float() / size
        angles = torch.outer(torch.arange(length, device=device).float(), THETA**-powers)
        angles = torch.cat([angles, angles], dim=1)
        self.cos, self.sin = angles.cos().to(embed.dtype), angles.sin().to(embed.dtype)
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.count = torch.zeros_like(self.position)
        self.answers = torch.zeros(rows, length, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(rows, length, device=device)
        self.seen = torch.zeros(rows, vocab, dtype=torch.bool, device=device)
        self.logits = torch.zeros(rows, vocab, device=device)
        self._choose_way(shape, attention, backend)

    def _choose_way(self, shape, attention: str, backend: str) -> None:
        told = {"heads": shape.heads, "kv_heads": shape.kv_heads}
        self._read_layer = lambda *parts: layer_step(*parts, attend=attend_sdpa, **told)
        self._layer = lambda *parts: layer_step(*parts, attend=ATTENTIONS[attention], **told)
        self._last = last_logits
        how, compiled = self.how, HOWS[self.how]
        if how.startswith(("triton", "lean")):
            kernels = kernels_of(how, self.weights, shape)
            self._layer, self._last = kernels.layer, kernels.last
        elif compiled is not None and how != "reduce-overhead":
            fixed = {"fullgraph": True, "dynamic": False, "backend": backend}
            fixed |= compiled if backend == "inductor" else {}
            self._layer = torch.compile(self._layer, **fixed)
            self._last = torch.compile(last_logits, **fixed)
        self.run = self._step
        if how == "reduce-overhead":
            self._fix_addresses()
            self.run = torch.compile(self._step, fullgraph=True, dynamic=False, **compiled)

    def _fix_addresses(self) -> None:
        held = [value for value in vars(self).values() if isinstance(value, Tensor)]
        held += [*self.caches, *self.weights[:1], *self.weights[2:]]
        for tensor in held + [part for layer in self.weights.layers for part in layer]:
            torch._dynamo.mark_static_address(tensor)

    def _forward(self, ids: Tensor, positions: Tensor, layer_of, last) -> Tensor:
        x = F.embedding(ids, self.weights.embed)
        cos, sin = self.cos[positions], self.sin[positions]
        for layer, (keys, values) in zip(self.weights.layers, self.caches, strict=True):
            x = layer_of(x, layer, keys, values, cos, sin, positions)
        return last(x, self.weights.norm, self.weights.head)

    def _step(self) -> None:
        """From the token at `position` make the next one: all on the device."""
        logits = self._forward(self.token[:, None], self.position, self._layer, self._last)
        self.position.add_(1)
        self._choose(logits)

    def _choose(self, logits: Tensor) -> None:
        self.logits.copy_(logits[:, : self.vocab])
        if self.sampling:
            number = self.numbers.index_select(1, self.count)
            token = draw(self.logits, self.seen, number, **self.sampling)
            self.seen.scatter_(1, token[:, None], True)
        else:
            token = self.logits.argmax(-1)
        self.token.copy_(token)
        self.answers.index_copy_(1, self.count, token[:, None])
        self.count.add_(1)

    @torch.inference_mode()
    def prepare(self) -> None:
        """Compile the step and capture it; what was answered before is forgotten."""
        self.position.zero_()
        self.count.zero_()
        if self.device.type != "cuda" or self.how in ("eager", "reduce-overhead"):
            for _ in range(3):
                self.run()
            return
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self.captures, self.run = self.captures + 1, graph.replay

    @torch.inference_mode()
    def read(self, prompts: list[list[int]], seeds: list[int] | None = None) -> None:
        """Read prompts of one length, one a row, and choose each answer's first token."""
        ids = torch.tensor(prompts, device=self.device)
        self.position.fill_(ids.shape[1])
        self.count.zero_()
        if self.sampling:
            makers = [torch.Generator().manual_seed(seed) for seed in seeds or [0] * len(prompts)]
            drawn = [torch.rand(self.length, generator=g, dtype=torch.float64) for g in makers]
            self.numbers.copy_(torch.stack(drawn))
            self.seen.zero_().scatter_(1, ids, True)
        positions = torch.arange(ids.shape[1], device=self.device)
        self._choose(self._forward(ids, positions, self._read_layer, last_logits))

    @torch.inference_mode()
    def answer(self, prompts, tokens: int, eos: int | None = None, seeds=None) -> list[list[int]]:
        """Return up to `tokens` tokens for each prompt, without EOS and what follows it."""
        if len(prompts[0]) + tokens > self.length:
            raise ValueError(f"{len(prompts[0])} + {tokens} tokens do not fit in {self.length}")
        self.read(prompts, seeds)
        made, found = 1, [[] for _ in prompts]
        while True:
            before = len(found[0])
            for _ in range(min(self.look, tokens - made)):
                self.run()
                made += 1
            for row, new in zip(found, self._look(before, made), strict=True):
                row += new
            if made >= tokens or all(eos in row for row in found):
                return [row[: row.index(eos)] if eos in row else row for row in found]

    def _look(self, first: int, last: int) -> list[list[int]]:
        """The one place where the host waits for the device."""
        self.reads += 1
        return self.answers[:, first:last].tolist()
