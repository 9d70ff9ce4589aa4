"""The tiles of our kernels, chosen by trying them on the card."""

from __future__ import annotations

import json
import time

import torch
import torch.nn.functional as F

from fused_decode import Decoder
from gpu_measure import Setting, captured, random, seconds_of

TUNED: dict[str, tuple] = {}
"""What was chosen in this process."""

LAYERS = 8
"""Layers of a step in which tiles are tried: 3 GB at 7B, far more than a cache holds."""

SECONDS = 40
"""After which no more is tried."""

ORDER = ("o", "down", "gate_up", "qkv", "attend", "head")


def tune(setting: Setting, decoder: Decoder) -> None:
    if decoder.how.startswith("triton"):
        tune_alone(setting, decoder)
    elif decoder.how.startswith("lean"):
        tune_in_step(setting, decoder)


def tune_alone(setting: Setting, decoder: Decoder) -> None:
    """Choose each product's tiles by trying all over all layers' weights."""
    import decode_kernels

    kernels, weights = decoder._layer.__self__, decoder.weights
    for name, first in kernels.matrices.items():
        key = f"{name} {first.dtype} {len(weights.layers)}"
        if key not in TUNED:
            every = (
                [getattr(layer, name) for layer in weights.layers] if name != "head" else [first]
            )
            x = random(1, first.shape[1], first.dtype, setting.device, std=1.0)[0]
            found = {}
            for config in decode_kernels.CONFIGS:

                def action(every=every, x=x, name=name, config=config) -> None:
                    for weight in every:
                        kernels.product(name, x, weight, config=config)

                with torch.inference_mode():
                    run = captured(action, setting.device)
                    found[config] = min(seconds_of(run, setting.device, 3))
            best = min(found, key=found.get)
            TUNED[key] = best
            gb_s = sum(weight.nbytes for weight in every) / found[best] / 1e9
            setting.line(f"kernel {key}, tiles {best}", gb_s=gb_s)
        kernels.chosen[name] = TUNED[key]


def tune_in_step(setting: Setting, decoder: Decoder) -> None:
    """Choose what each kernel is told by the time of a whole step of a few layers.

    One kernel after the other, each where the best of those before it is in its place; so what a
    kernel spares the next one counts. What one "lean" way found the others take.
    """
    import lean_kernels

    kernels, weights = decoder._layer.__self__, decoder.weights
    kept = setting.out / "tiles.json"  # what an earlier stage found
    before = json.loads(kept.read_text()) if kept.exists() else {}
    layers, until = min(LAYERS, len(weights.layers)), time.monotonic() + SECONDS
    for name in ORDER:
        key = f"{name} {weights.embed.dtype} in a step"
        if key in before:
            TUNED[key] = type(kernels.chosen[name])(*before[key])
        if key not in TUNED:
            few = weights._replace(layers=weights.layers[:layers])
            own = type(kernels)(few, kernels.shape, pdl=kernels.pdl, apart=kernels.apart)
            own.chosen |= kernels.chosen
            found = {}
            for config in lean_kernels.CONFIGS[name]:
                if time.monotonic() > until:
                    break
                own.chosen[name] = config
                try:
                    found[config] = seconds_of_step(setting, decoder, own)
                except Exception as error:  # it may ask for more than the card has
                    print(name, config, repr(error)[:500], flush=True)
            if not found:
                continue
            TUNED[key] = min(found, key=found.get)
            told = {"us": found[TUNED[key]] * 1e6, "us_at_most": max(found.values()) * 1e6}
            tiles = tuple(TUNED[key])
            setting.line(f"step of {layers} layers, {name} {tiles} of {len(found)}", **told)
            kept.write_text(json.dumps(before := before | {key: tiles}))
        kernels.chosen[name] = TUNED[key]


@torch.inference_mode()
def seconds_of_step(setting: Setting, decoder: Decoder, kernels) -> float:
    """Return the seconds of one step of a few layers, with 192 tokens in the cache."""
    position = torch.full_like(decoder.position, min(192, decoder.length - 1))
    token = torch.zeros_like(decoder.token)[:, None]
    layers = kernels.layers

    def action() -> None:
        x = F.embedding(token, decoder.weights.embed)
        cos, sin = decoder.cos[position], decoder.sin[position]
        for layer, (keys, values) in zip(layers, decoder.caches, strict=False):
            x = kernels.layer(x, layer, keys, values, cos, sin, position)
        kernels.last(x, decoder.weights.norm, decoder.weights.head)

    run, times = captured(action, setting.device), 4 if setting.gpu else 1

    def several() -> None:
        for _ in range(times):
            run()

    return min(seconds_of(several, setting.device, 6 if setting.gpu else 1)) / times
