"""Kernels in Triton for one LLaMA layer and one token: five a layer, nothing computed twice.

In `decode_kernels` each of a product's thousands of programs computes the norm of its input again,
which takes as many instructions as the product itself. Here what ends with a sum (`o`, `down`)
also writes its result times the next norm's weight, and each program its sum of squares; the next
product multiplies what was so prepared and its own result by 1 / root mean square, once at its
end. With `apart` a kernel of its own does the norm instead, exactly as transformers rounds it.

The last program of a head to end combines what the others found. With `pdl` all that does not
depend on the kernel before is read before waiting for it: weights and the cache of older tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from decode_kernels import rotated
from fused_decode import EPSILON


class Tiles(NamedTuple):
    """Outputs a program, inputs at once, warps; how many inputs are fetched into L2 ahead."""

    rows: int
    block: int
    warps: int
    ahead: int = 0


class Parts(NamedTuple):
    """Parts into which a head's keys are cut, keys looked at at once, warps."""

    splits: int
    block: int
    warps: int


SHAPES = [(2, 1024, 4), (2, 2048, 8), (4, 1024, 4), (4, 512, 4), (4, 1024, 8), (8, 512, 4)]
SHAPES += [(16, 256, 4)]
WHOLE = [(1, 4096, 4), (1, 4096, 8), (2, 4096, 8)]
FETCHED = [(2, 1024, 4, 4096), (2, 2048, 8, 4096), (4, 1024, 4, 4096), (4, 512, 4, 4096)]
WIDE = [Tiles(*one) for one in SHAPES + WHOLE + FETCHED]
CONFIGS = {"qkv": WIDE, "gate_up": WIDE, "head": WIDE}
CONFIGS["o"] = [*WIDE, *(Tiles(*one, 4096) for one in WHOLE)]
CONFIGS["down"] = [Tiles(*one) for one in SHAPES]
CONFIGS["down"] += [Tiles(2, 1024, 4, 8192), Tiles(4, 1024, 4, 8192), Tiles(8, 512, 4, 8192)]
CONFIGS["attend"] = [Parts(16, 32, 4), Parts(8, 32, 4), Parts(8, 64, 4), Parts(4, 64, 8)]
CONFIGS["attend"] += [Parts(1, 64, 8)]
"""What is tried for each kernel of a step."""

FIRST = {"qkv": Tiles(4, 1024, 4), "o": Tiles(2, 1024, 4, 4096), "gate_up": Tiles(2, 2048, 8)}
FIRST |= {"down": Tiles(4, 1024, 4), "head": Tiles(4, 1024, 4), "attend": Parts(16, 32, 4)}
"""What a step begins with, where nothing was tried."""


@triton.jit
def fetch_ahead(start, AHEAD: tl.constexpr):
    """Ask for lines of 128 bytes of two-byte values into L2, without waiting for them."""
    lines = start[:, None] + (tl.arange(0, AHEAD // 64) * 64)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], tl.int32, False, 1
    )


@triton.jit
def given(x, here, INPUTS: tl.constexpr):
    values = tl.load(x + here, mask=here < INPUTS, other=0.0, eviction_policy="evict_last")
    return values.to(tl.float32)


@triton.jit
def tile(start, here, INPUTS: tl.constexpr):
    inside = (here < INPUTS)[None, :]
    place = start[:, None] + here[None, :]
    return tl.load(place, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def multiplied(start, x, first, second, ROWS: tl.constexpr, BLOCK: tl.constexpr,
               INPUTS: tl.constexpr, PAIR: tl.constexpr):  # fmt: skip
    """Return the products of x and the rows at start, and of x and those PAIR rows further on."""
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    other = tl.zeros([ROWS, BLOCK], tl.float32)
    for at in range(0, INPUTS, BLOCK):
        values = given(x, at + columns, INPUTS)
        if BLOCK < INPUTS:  # asked for before the last is used
            then = tile(start, at + BLOCK + columns, INPUTS)
            if PAIR > 0:
                later = tile(start + PAIR * INPUTS, at + BLOCK + columns, INPUTS)
        total += first.to(tl.float32) * values[None, :]
        if PAIR > 0:
            other += second.to(tl.float32) * values[None, :]
        if BLOCK < INPUTS:
            first = then
            if PAIR > 0:
                second = later
    result = tl.sum(total, axis=1)
    if PAIR > 0:
        beside = tl.sum(other, axis=1)
    else:
        beside = result
    return result, beside


@triton.jit
def product_kernel(x, squares, weight, residual, norm, out, ready, partial, eps,
                   INPUTS: tl.constexpr, PAIR: tl.constexpr, COUNT: tl.constexpr,
                   PADDED: tl.constexpr, ADD: tl.constexpr, PREPARE: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
                   PDL: tl.constexpr):  # fmt: skip
    """out [outputs] = weight [outputs, INPUTS] @ x [INPUTS], scaled before and added to after.

    With PAIR > 0 the weight has 2 PAIR outputs, gate and up, and out = silu(gate) * up. COUNT sums
    of squares make the scale. With PREPARE ready = out * norm, and partial are its own squares.
    """
    outputs = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = weight + outputs * INPUTS
    first = tile(start, tl.arange(0, BLOCK), INPUTS)
    second = first
    if PAIR > 0:
        second = tile(start + PAIR * INPUTS, tl.arange(0, BLOCK), INPUTS)
    if AHEAD > 0:
        fetch_ahead(start, AHEAD)
        if PAIR > 0:
            fetch_ahead(start + PAIR * INPUTS, AHEAD)
    if PREPARE:
        factor = tl.load(norm + outputs).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if ADD:
        before = tl.load(residual + outputs).to(tl.float32)
    if COUNT > 0:
        at = tl.arange(0, PADDED)
        each = tl.load(squares + at, mask=at < COUNT, other=0.0, eviction_policy="evict_last")
    result, beside = multiplied(start, x, first, second, ROWS, BLOCK, INPUTS, PAIR)
    if COUNT > 0:
        scale = tl.rsqrt(tl.sum(each, axis=0) / INPUTS + eps)
        result, beside = result * scale, beside * scale
    if PAIR > 0:
        result = result / (1 + tl.exp(-result)) * beside
    if ADD:
        result += before
    rounded = result.to(out.dtype.element_ty)
    tl.store(out + outputs, rounded)
    if PREPARE:
        wide = rounded.to(tl.float32)
        tl.store(ready + outputs, (wide * factor).to(ready.dtype.element_ty))
        tl.store(partial + tl.program_id(0), tl.sum(wide * wide, axis=0))


@triton.jit
def prepare_kernel(x, norm, ready, partial, ROWS: tl.constexpr, PDL: tl.constexpr):
    """What a product with PREPARE does at its end, for the first layer."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    factor = tl.load(norm + at).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    wide = tl.load(x + at).to(tl.float32)
    tl.store(ready + at, (wide * factor).to(ready.dtype.element_ty))
    tl.store(partial + tl.program_id(0), tl.sum(wide * wide, axis=0))


@triton.jit
def norm_kernel(x, norm, out, eps, SIZE: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr):
    """The norm of x [SIZE], by one program."""
    at = tl.arange(0, PADDED)
    factor = tl.load(norm + at, mask=at < SIZE, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    wide = tl.load(x + at, mask=at < SIZE, other=0.0).to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, axis=0) / SIZE + eps)
    rounded = wide.to(out.dtype.element_ty).to(tl.float32) * factor
    tl.store(out + at, rounded.to(out.dtype.element_ty), mask=at < SIZE)


@triton.jit
def combine(mixed, stats, head, out, SIZE: tl.constexpr, SPLITS: tl.constexpr):
    """out [heads, SIZE]: what the parts of a head found, weighed; it is in L2, not in L1."""
    at, rows = tl.arange(0, SIZE), head * SPLITS + tl.arange(0, SPLITS)
    best = tl.load(stats + rows * 2, cache_modifier=".cg")
    weight = tl.exp(best - tl.max(best, axis=0))
    whole = tl.sum(weight * tl.load(stats + rows * 2 + 1, cache_modifier=".cg"), axis=0)
    parts = tl.load(mixed + rows[:, None] * SIZE + at[None, :], cache_modifier=".cg")
    result = tl.sum(parts * weight[:, None], axis=0) / whole
    tl.store(out + head * SIZE + at, result.to(out.dtype.element_ty))


@triton.jit
def weighed(q, k, v, there, best, whole, total):
    """Add keys and values [BLOCK, SIZE], of which some are there, to a softmax under way."""
    scores = tl.where(there, tl.sum(q[None, :] * k.to(tl.float32), axis=1), -1e30)
    higher = tl.maximum(best, tl.max(scores, axis=0))
    shares = tl.where(there, tl.exp(scores - higher), 0.0)
    shrink = tl.exp(best - higher)
    whole = whole * shrink + tl.sum(shares, axis=0)
    return higher, whole, total * shrink + tl.sum(shares[:, None] * v.to(tl.float32), axis=0)


@triton.jit
def arrive(mixed, stats, arrived, out, best, whole, total, SIZE: tl.constexpr,
           SPLITS: tl.constexpr):  # fmt: skip
    """Leave what this program found; the last of a head's to do so combines them all."""
    head, at = tl.program_id(0), tl.arange(0, SIZE)
    if SPLITS == 1:
        tl.store(out + head * SIZE + at, (total / whole).to(out.dtype.element_ty))
    else:
        row = head * SPLITS + tl.program_id(1)
        tl.store(mixed + row * SIZE + at, total)
        tl.store(stats + row * 2, best)
        tl.store(stats + row * 2 + 1, whole)
        tl.debug_barrier()  # all of this program's stores come before its one arrival
        if tl.atomic_add(arrived + head, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            combine(mixed, stats, head, out, SIZE, SPLITS)
            tl.store(arrived + head, 0)


@triton.jit
def attend_kernel(qkv, cos, sin, position, keys, values, mixed, stats, arrived, out, scale, length,
                  HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr,
                  SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """One head over one part of the keys: mixed [heads, SPLITS, SIZE], stats [heads, SPLITS, 2].

    The part that holds the newest token writes its key and value into the cache. The program that
    is the last of its head to arrive writes out [heads, SIZE], and sets `arrived` [heads] back.
    """
    head, at = tl.program_id(0), tl.arange(0, SIZE)
    kv = head // (HEADS // KV_HEADS)
    newest = tl.load(position).to(tl.int32)
    each = (newest + SPLITS * BLOCK) // (SPLITS * BLOCK) * BLOCK
    first = tl.program_id(1) * each
    last = tl.minimum(first + each, newest + 1)
    cache = kv * length * SIZE
    tokens = first + tl.arange(0, BLOCK)
    place = cache + tokens[:, None] * SIZE + at[None, :]
    old = (tokens < tl.minimum(last, newest))[:, None]
    k, v = tl.load(keys + place, mask=old, other=0.0), tl.load(values + place, mask=old, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    q = rotated(qkv + head * SIZE, cos, sin, SIZE) * scale
    key = rotated(qkv + (HEADS + kv) * SIZE, cos, sin, SIZE).to(keys.dtype.element_ty)
    value = tl.load(qkv + (HEADS + KV_HEADS + kv) * SIZE + at)
    if (first <= newest) & (newest < last) & (head % (HEADS // KV_HEADS) == 0):
        tl.store(keys + cache + newest * SIZE + at, key)
        tl.store(values + cache + newest * SIZE + at, value)
    best = tl.full([], -1e30, tl.float32)
    whole = tl.full([], 0.0, tl.float32)
    total = tl.zeros([SIZE], tl.float32)
    for begun in range(first, last, BLOCK):
        tokens = begun + tl.arange(0, BLOCK)
        now = (tokens == newest)[:, None]
        k, v = tl.where(now, key[None, :], k), tl.where(now, value[None, :], v)
        best, whole, total = weighed(q, k, v, tokens < last, best, whole, total)
        place += BLOCK * SIZE
        old = (tokens + BLOCK < tl.minimum(last, newest))[:, None]
        k = tl.load(keys + place, mask=old, other=0.0)
        v = tl.load(values + place, mask=old, other=0.0)
    arrive(mixed, stats, arrived, out, best, whole, total, SIZE, SPLITS)


class Kernels:
    """The step of one token in one row, in the place of `layer_step` and `last_logits`.

    Attributes:
        chosen: product -> its Tiles; "attend" -> its Parts.
    """

    def __init__(self, weights, shape, *, pdl=False, apart=False, chosen: dict | None = None):
        self.shape, self.pdl, self.apart = shape, pdl, apart
        self.chosen = FIRST | (chosen or {})
        self.size, embed = shape.dim // shape.heads, weights.embed
        most = max(parts.splits for parts in CONFIGS["attend"])
        self.mixed = torch.empty(shape.heads, most, self.size, device=embed.device)
        self.stats = torch.empty(shape.heads, most, 2, device=embed.device)
        self.arrived = torch.zeros(shape.heads, dtype=torch.int32, device=embed.device)
        norms = [layer.norm for layer in weights.layers] + [weights.norm]
        self.next_norm = dict(zip(map(id, weights.layers), norms[1:], strict=True))
        self.layers = weights.layers
        self.ready = None
        # What is not yet scaled may be small for fp16.
        self.wide = torch.float32 if embed.dtype == torch.float16 else embed.dtype
        self.more = {"launch_pdl": True} if pdl else {}

    def product(self, name, x, weight, *, squares=None, residual=None, norm=None, dtype=None):
        """Return weight @ x as [outputs], and (it times the next norm, its squares) or None."""
        tiles, inputs = self.chosen[name], weight.shape[1]
        pair = len(weight) // 2 if name == "gate_up" else 0
        outputs, count = pair or len(weight), 0 if squares is None else len(squares)
        out = torch.empty(outputs, dtype=dtype or weight.dtype, device=x.device)
        programs, ready = outputs // tiles.rows, None
        if norm is not None:
            ready = torch.empty(outputs, dtype=self.wide, device=x.device), self._sums(programs)
        product_kernel[(programs,)](
            x, squares if count else x, weight, x if residual is None else residual,
            x if norm is None else norm, out, *(ready or (out, out)), EPSILON,
            INPUTS=inputs, PAIR=pair, COUNT=count, ADD=residual is not None,
            PADDED=triton.next_power_of_2(max(count, 1)), PREPARE=norm is not None,
            ROWS=tiles.rows, BLOCK=tiles.block, AHEAD=tiles.ahead * (tiles.ahead <= inputs),
            PDL=self.pdl, num_warps=tiles.warps, **self.more,
        )  # fmt: skip
        return out, ready

    def _sums(self, programs: int) -> torch.Tensor:
        return torch.empty(programs, device=self.arrived.device)

    def _normed(self, x, norm):
        """Return what the product after a norm is given: values, and squares or None."""
        if not self.apart:
            return self.ready
        out = torch.empty_like(x)
        padded = triton.next_power_of_2(len(x))
        told = {"SIZE": len(x), "PADDED": padded, "PDL": self.pdl, "num_warps": 16}
        norm_kernel[(1,)](x, norm, out, EPSILON, **told, **self.more)
        return out, None

    def _begin(self, x, norm) -> None:
        rows = self.chosen["down"].rows
        sums = self._sums(len(x) // rows)
        self.ready = torch.empty(len(x), dtype=self.wide, device=x.device), sums
        told = {"ROWS": rows, "PDL": self.pdl, "num_warps": 1}
        prepare_kernel[(len(x) // rows,)](x, norm, *self.ready, **told, **self.more)

    def _attend(self, qkv, keys, values, cos, sin, positions):
        shape, size, (splits, block, warps) = self.shape, self.size, self.chosen["attend"]
        out = torch.empty(shape.heads * size, dtype=qkv.dtype, device=qkv.device)
        attend_kernel[(shape.heads, splits)](
            qkv, cos, sin, positions, keys, values, self.mixed, self.stats, self.arrived, out,
            size**-0.5, keys.shape[2], HEADS=shape.heads, KV_HEADS=shape.kv_heads, SIZE=size,
            SPLITS=splits, BLOCK=block, PDL=self.pdl, num_warps=warps, **self.more,
        )  # fmt: skip
        return out

    def layer(self, x, layer, keys, values, cos, sin, positions):
        """x [1, 1, dim]; keys, values [1, kv_heads, length, head_dim]; positions [1]."""
        flat = x.view(-1)
        if layer is self.layers[0] and not self.apart:
            self._begin(flat, layer.norm)
        norms = (None, None) if self.apart else (layer.norm2, self.next_norm[id(layer)])
        given, squares = self._normed(flat, layer.norm)
        qkv, _ = self.product("qkv", given, layer.qkv, squares=squares)
        out = self._attend(qkv, keys, values, cos, sin, positions)
        flat, self.ready = self.product("o", out, layer.o, residual=flat, norm=norms[0])
        given, squares = self._normed(flat, layer.norm2)
        inner, _ = self.product("gate_up", given, layer.gate_up, squares=squares)
        flat, self.ready = self.product("down", inner, layer.down, residual=flat, norm=norms[1])
        return flat.view_as(x)

    def last(self, x, norm, head):
        given, squares = self._normed(x.view(-1), norm)
        return self.product("head", given, head, squares=squares, dtype=torch.float32)[0][None]
