"""Kernels in Triton for one LLaMA layer and one token: six a layer, each reading weights once.

Norms are computed inside the products that follow them, SiLU and the residual sums inside those
that go before; rotation and the writing of keys and values are part of attention. With `pdl` a
kernel starts while the last one ends, and has its first weights when that one's result comes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fused_decode import EPSILON

CONFIGS = [(1, 2048, 8), (2, 1024, 4), (2, 2048, 8), (4, 1024, 4), (4, 512, 2), (1, 512, 2)]
"""(outputs a program, inputs at once, warps) that are tried for each product."""

SPLITS, BLOCK = 8, 32
"""Parts into which a head's keys are cut, and keys that a program looks at at once."""


@triton.jit
def product_kernel(x, weight, norm, residual, out, eps, INPUTS: tl.constexpr, PAIR: tl.constexpr,
                   NORM: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """out [outputs] = weight [outputs, INPUTS] @ x [INPUTS], its norm before, a sum after.

    With PAIR > 0 the weight has 2 PAIR outputs, gate and up, and out = silu(gate) * up.
    """
    outputs = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    start = weight + outputs[:, None] * INPUTS
    inside = columns < INPUTS
    first = tl.load(start + columns[None, :], mask=inside[None, :], other=0.0)
    if PAIR > 0:
        second = tl.load(start + PAIR * INPUTS + columns[None, :], mask=inside[None, :], other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    other = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = tl.zeros([BLOCK], tl.float32)
    for at in range(0, INPUTS, BLOCK):
        here = at + columns
        given = tl.load(x + here, mask=here < INPUTS, other=0.0).to(tl.float32)
        if NORM:
            squares += given * given
            given *= tl.load(norm + here, mask=here < INPUTS, other=0.0).to(tl.float32)
        after = here + BLOCK
        inside = after < INPUTS
        total += first.to(tl.float32) * given[None, :]
        first = tl.load(start + after[None, :], mask=inside[None, :], other=0.0)
        if PAIR > 0:
            other += second.to(tl.float32) * given[None, :]
            second = tl.load(
                start + PAIR * INPUTS + after[None, :], mask=inside[None, :], other=0.0
            )
    result = tl.sum(total, axis=1)
    scale = 1.0
    if NORM:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / INPUTS + eps)
        result *= scale
    if PAIR > 0:
        result = result / (1 + tl.exp(-result)) * (tl.sum(other, axis=1) * scale)
    if ADD:
        result += tl.load(residual + outputs).to(tl.float32)
    tl.store(out + outputs, result.to(out.dtype.element_ty))


@triton.jit
def rotated(part, cos, sin, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    opposite = tl.where(at < SIZE // 2, at + SIZE // 2, at - SIZE // 2)
    sign = tl.where(at < SIZE // 2, -1.0, 1.0)
    here, there = tl.load(part + at).to(tl.float32), tl.load(part + opposite).to(tl.float32)
    return here * tl.load(cos + at).to(tl.float32) + sign * there * tl.load(sin + at).to(tl.float32)


@triton.jit
def attend_kernel(qkv, cos, sin, position, keys, values, mixed, stats, scale, length,
                  HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr,
                  SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One head over one part of the keys: mixed [heads, SPLITS, SIZE], stats [heads, SPLITS, 2].

    The part that holds the newest token writes its key and value into the cache.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head, split = tl.program_id(0), tl.program_id(1)
    kv = head // (HEADS // KV_HEADS)
    at = tl.arange(0, SIZE)
    newest = tl.load(position).to(tl.int32)
    q = rotated(qkv + head * SIZE, cos, sin, SIZE) * scale
    key = rotated(qkv + (HEADS + kv) * SIZE, cos, sin, SIZE).to(keys.dtype.element_ty)
    value = tl.load(qkv + (HEADS + KV_HEADS + kv) * SIZE + at)
    each = (newest + SPLITS * BLOCK) // (SPLITS * BLOCK) * BLOCK
    first = split * each
    last = tl.minimum(first + each, newest + 1)
    cache = kv * length * SIZE
    if (first <= newest) & (newest < last) & (head % (HEADS // KV_HEADS) == 0):
        tl.store(keys + cache + newest * SIZE + at, key)
        tl.store(values + cache + newest * SIZE + at, value)
    best = tl.full([], -1e30, tl.float32)
    whole = tl.full([], 0.0, tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    for start in range(first, last, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        place = cache + tokens[:, None] * SIZE + at[None, :]
        old, now = tokens[:, None] < newest, tokens[:, None] == newest
        k = tl.where(now, key[None, :], tl.load(keys + place, mask=old, other=0.0))
        v = tl.where(now, value[None, :], tl.load(values + place, mask=old, other=0.0))
        scores = tl.sum(q[None, :] * k.to(tl.float32), axis=1)
        scores = tl.where(tokens < last, scores, -1e30)
        higher = tl.maximum(best, tl.max(scores, axis=0))
        shares = tl.where(tokens < last, tl.exp(scores - higher), 0.0)
        shrink = tl.exp(best - higher)
        whole = whole * shrink + tl.sum(shares, axis=0)
        total = total * shrink + tl.sum(shares[:, None] * v.to(tl.float32), axis=0)
        best = higher
    row = head * SPLITS + split
    tl.store(mixed + row * SIZE + at, total)
    tl.store(stats + row * 2, best)
    tl.store(stats + row * 2 + 1, whole)


@triton.jit
def combine_kernel(mixed, stats, out, SIZE: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr):
    """out [heads, SIZE]: what the parts of a head found, weighed."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    head = tl.program_id(0)
    at, rows = tl.arange(0, SIZE), head * SPLITS + tl.arange(0, SPLITS)
    best = tl.load(stats + rows * 2)
    weight = tl.exp(best - tl.max(best, axis=0))
    whole = tl.sum(weight * tl.load(stats + rows * 2 + 1), axis=0)
    parts = tl.load(mixed + rows[:, None] * SIZE + at[None, :])
    result = tl.sum(parts * weight[:, None], axis=0) / whole
    tl.store(out + head * SIZE + at, result.to(out.dtype.element_ty))


class Kernels:
    """The step of one token in one row, in the place of `layer_step` and `last_logits`.

    Attributes:
        chosen: product -> (outputs a program, inputs at once, warps).
    """

    def __init__(self, weights, shape, *, pdl: bool = False, chosen: dict | None = None):
        self.shape, self.pdl = shape, pdl
        first = weights.layers[0]
        self.matrices = {"qkv": first.qkv, "o": first.o, "gate_up": first.gate_up}
        self.matrices |= {"down": first.down, "head": weights.head}
        self.chosen = dict.fromkeys(self.matrices, (2, 1024, 4)) | (chosen or {})
        size, device = shape.dim // shape.heads, weights.embed.device
        self.mixed = torch.empty(shape.heads, SPLITS, size, device=device)
        self.stats = torch.empty(shape.heads, SPLITS, 2, device=device)
        self.more = {"launch_pdl": True} if pdl else {}

    def product(self, name, x, weight, norm=None, residual=None, out_dtype=None, config=None):
        """Return weight @ x as [outputs]; `gate_up` gives silu(gate) * up."""
        rows, block, warps = config or self.chosen[name]
        pair = len(weight) // 2 if name == "gate_up" else 0
        outputs = pair or len(weight)
        out = torch.empty(outputs, dtype=out_dtype or x.dtype, device=x.device)
        product_kernel[(outputs // rows,)](
            x, weight, weight if norm is None else norm, weight if residual is None else residual,
            out, EPSILON, INPUTS=weight.shape[1], PAIR=pair, NORM=norm is not None,
            ADD=residual is not None, ROWS=rows, BLOCK=block, PDL=self.pdl, num_warps=warps,
            **self.more,
        )  # fmt: skip
        return out

    def layer(self, x, layer, keys, values, cos, sin, positions):
        """x [1, 1, dim]; keys, values [1, kv_heads, length, head_dim]; positions [1]."""
        shape, flat = self.shape, x.view(-1)
        size = shape.dim // shape.heads
        qkv = self.product("qkv", flat, layer.qkv, norm=layer.norm)
        sizes = {"SIZE": size, "SPLITS": SPLITS, "PDL": self.pdl}
        attend_kernel[(shape.heads, SPLITS)](
            qkv, cos, sin, positions, keys, values, self.mixed, self.stats, size**-0.5,
            keys.shape[2], HEADS=shape.heads, KV_HEADS=shape.kv_heads, BLOCK=BLOCK, **sizes,
            **self.more,
        )  # fmt: skip
        out = torch.empty_like(flat)
        combine_kernel[(shape.heads,)](self.mixed, self.stats, out, **sizes, **self.more)
        flat = self.product("o", out, layer.o, residual=flat)
        inner = self.product("gate_up", flat, layer.gate_up, norm=layer.norm2)
        return self.product("down", inner, layer.down, residual=flat).view_as(x)

    def last(self, x, norm, head):
        out = self.product("head", x.view(-1), head, norm=norm, out_dtype=torch.float32)
        return out[None]
