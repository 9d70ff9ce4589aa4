"""The stages of `gpu.py` that measure the card and our own step, line by line."""

from __future__ import annotations

import statistics
import subprocess
import time
from importlib.util import find_spec

import torch

from fused_decode import Decoder, fuse
from gpu_measure import (
    DTYPES,
    SAMPLING,
    Setting,
    captured,
    copy_speed,
    decoding,
    kernels_of,
    matrices,
    memory,
    network_of,
    prompt,
    random,
    random_weights,
    read_bytes,
    seconds_of,
    wait,
)
from gpu_tune import tune


def card(setting: Setting) -> None:
    """What the card is, how fast it copies, and how fast it multiplies one row."""
    import transformers

    told = {"torch": torch.__version__, "transformers": transformers.__version__}
    told["packages"] = [n for n in ("triton", "bitsandbytes", "torchao") if find_spec(n)]
    if setting.gpu:
        command = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem"]
        done = subprocess.run([*command, "--format=csv,noheader"], capture_output=True, text=True)
        facts = torch.cuda.get_device_properties(0)
        told |= {"card": facts.name, "smi": done.stdout.strip(), "memory": facts.total_memory}
    setting.line("versions", **told)
    speeds = copy_speed(setting)
    setting.line("copy", gb_s=max(speeds) / 1e9, gb_s_median=statistics.median(speeds) / 1e9)
    for dtype in ("bf16", "fp16"):
        for name, (outputs, inputs) in matrices(setting.shape, setting.vocab).items():
            setting.attempt(
                f"product {name} {outputs} x {inputs}, {dtype}",
                lambda outputs=outputs, inputs=inputs, dtype=dtype: product(
                    setting, outputs, inputs, DTYPES[dtype]
                ),
            )


def product(setting: Setting, outputs: int, inputs: int, dtype: torch.dtype) -> dict:
    """Time one row times a matrix, over so many matrices that no cache holds them."""
    whole = 2**30 if setting.gpu else 2**22
    count = max(2, whole // (outputs * inputs * 2))
    weights = [random(outputs, inputs, dtype, setting.device) for _ in range(count)]
    x = random(1, inputs, dtype, setting.device, std=1.0)

    def action() -> None:
        for weight in weights:
            torch.nn.functional.linear(x, weight)

    with torch.inference_mode():
        found = seconds_of(captured(action, setting.device), setting.device)
    moved = sum(weight.nbytes for weight in weights)
    each = min(found) / count
    return {"gb_s": moved / min(found) / 1e9, "us": each * 1e6}


def equal(setting: Setting) -> None:
    """Our step against transformers' eager network: logits, and 32 greedy tokens."""
    layers = min(4, setting.shape.layers)
    for dtype in ("fp32", "bf16") if setting.size != "slice" else ("bf16",):
        network = network_of(setting, DTYPES[dtype], layers)
        weights = fuse({name: w.data for name, w in network.state_dict().items()})
        ids, count = prompt(setting, 64), 32 if setting.size != "slice" else 6
        with torch.inference_mode():
            given = torch.tensor([ids], device=setting.device)
            theirs = network.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False
            )
            logits = network(theirs[:, :-1]).logits[0, len(ids) - 1 :].float()
            exact = network.float()(theirs[:, :-1]).logits[0, len(ids) - 1 :]
        off = max(error(a, b) for a, b in zip(logits, exact, strict=True))
        setting.line(f"transformers, {dtype}", error=off)
        theirs = theirs[0, len(ids) :].tolist()
        for variant in setting.variants:
            if dtype == "fp32":  # one way of compiling is enough for exactness
                variant = variant.replace("cdt", "compile")
            setting.attempt(
                f"{variant}, {dtype}",
                lambda variant=variant, given=(weights, ids, theirs, exact): compared(
                    setting, variant, *given
                ),
            )


def compared(setting: Setting, variant: str, weights, ids, theirs: list[int], logits) -> dict:
    """Return how far our logits are from transformers', and how many tokens are the same.

    The logits are compared with transformers' in fp32, where both were given the same tokens; the
    line "transformers" tells how far its own in this dtype are from those. `gap` is how far apart
    its two best tokens were where the answers part first: within such an error, or not.
    """
    decoder = made(setting, variant, weights, 512 if setting.gpu else 128)
    ours = decoder.answer([ids], len(theirs))[0]
    decoder.read([ids])
    errors = [error(decoder.logits[0], logits[0])]
    for token, want in zip(theirs[:-1], logits[1:], strict=True):
        decoder.token.fill_(token)
        decoder.run()
        errors.append(error(decoder.logits[0], want))
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    told = {"same": same, "of": len(theirs), "error": max(errors)}
    if ours != theirs:
        first = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        best = logits[first].topk(2).values.tolist()
        gap = (best[0] - best[1]) / logits[first].abs().max().item()
        told |= {"parted_at": first, "gap": gap}
        told["words"] = f"parted where two logits are {gap:.4f} of the largest apart"
        told["words"] += ": less than the error" if gap < max(errors) else ": a real difference"
    return told


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest difference, as a share of the largest logit."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def made(setting: Setting, variant: str, weights, length: int, rows=1, sampling=None) -> Decoder:
    """Return a decoder, prepared; of `variant`, HOW/ATTENTION."""
    how, _, attention = variant.partition("/")
    decoder = Decoder(
        weights,
        setting.shape,
        setting.vocab,
        length=length,
        rows=rows,
        how=how,
        attention=attention or "sdpa",
        sampling=sampling,
        backend=setting.backend,
    )
    if setting.gpu and setting.stage != "equal":
        tune(setting, decoder)
    decoder.prepare()
    return decoder


def lean(setting: Setting) -> None:
    """Kernels that may bring the card into disorder: a stage of their own."""
    ours(setting)


def variants(setting: Setting) -> None:
    """More ways to run our step, which take long to compile or may fail."""
    ours(setting)


def ours(setting: Setting) -> None:
    """Our decoder at batch 1, greedy, each variant."""
    weights = random_weights(setting, torch.bfloat16)
    length = 512 if setting.gpu else 128
    for variant in setting.variants:
        setting.attempt(
            f"ours {variant}, bf16", lambda v=variant: decoded(setting, v, weights, length)
        )


def decoded(setting: Setting, variant: str, weights, length: int, ids=None, **more) -> dict:
    """Return the figures of one variant, with its kernels where it stays below the goal."""
    from torch._dynamo.utils import counters

    began = time.perf_counter()
    decoder = made(setting, variant, weights, length, **more)
    wait(setting.device)
    first = time.perf_counter() - began
    graphs = counters["stats"]["unique_graphs"]
    ids = ids or prompt(setting, 64)
    rows = more.get("rows", 1)
    figures = decoding(decoder, [ids] * rows, setting.tokens, read_bytes(weights))
    for count in (5, 17, 40):
        decoder.answer([prompt(setting, count, seed=count)] * rows, min(8, setting.tokens))
    figures["error"] = of_a_step(decoder, ids, rows)
    figures |= {"first_s": first, "captures": decoder.captures, "graphs": graphs}
    figures["recompiled"] = counters["stats"]["unique_graphs"] - graphs
    figures |= memory(setting, length, rows, weights.embed.itemsize)
    if setting.gpu and figures["gb_s"] < setting.goal * 1.2 and variant.split("/")[0] != "eager":
        with torch.inference_mode():
            decoder.read([ids] * rows)
            try:
                figures["syncs"] = synchronisations(decoder)
                figures["kernels"] = kernels_of(decoder.run, 10)
            except Exception as error:  # the figures are worth more than the profile
                figures["kernels"] = [{"kernel": repr(error)[:200], "us": 0, "times": 0}]
    return figures


@torch.inference_mode()
def of_a_step(decoder: Decoder, ids: list[int], rows: int) -> float:
    """Return how far the logits of the eighth step are from those of reading all at once."""
    decoder.look, look = 8, decoder.look
    found = decoder.answer([ids] * rows, 9)
    decoder.look, logits = look, decoder.logits.clone()
    decoder.read([ids + found[0][:8]] * rows)
    return error(logits[0], decoder.logits[0])


def synchronisations(decoder: Decoder) -> int:
    """Return how often PyTorch waits for the device in 16 steps and one look at them."""
    import warnings

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(16):
            decoder.run()
        decoder._look(0, 16)
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in seen)


def more(setting: Setting) -> None:
    """The first variant sampled, in fp16, and in int8; two at a context of 1,024 tokens."""
    variants, length = setting.variants, 512 if setting.gpu else 128
    long = 1024 if setting.gpu else 128
    weights = random_weights(setting, torch.bfloat16)
    ids = prompt(setting, long - setting.tokens)

    def one(name: str, variant: str, *given, **told) -> None:
        setting.attempt(
            f"ours {variant}, {name}", lambda: decoded(setting, variant, *given, **told)
        )

    one("bf16, sampled", variants[0], weights, length, sampling=SAMPLING)
    for variant in variants[:2]:
        one(f"bf16, cache and context of {long}", variant, weights, long, ids=ids)
    half = "fp16" if setting.gpu else "fp32"  # in which a CPU may take one row after the other
    weights = random_weights(setting, DTYPES[half])
    one(half, variants[0], weights, length)
    weights = random_weights(setting, torch.bfloat16, int8=True)
    one("int8", "cdt/sdpa" if setting.backend == "inductor" else "eager/sdpa", weights, length)


def batches(setting: Setting) -> None:
    """8 and 64 answers at once, with the libraries' products of many rows."""
    weights = random_weights(setting, torch.bfloat16)
    length = 512 if setting.gpu else 128
    for rows in (8, 64) if setting.gpu else (2,):
        for variant in ("compile/sdpa", "graph/sdpa")[: 2 if rows < 64 else 1]:
            setting.attempt(
                f"ours {variant}, bf16, {rows} at once",
                lambda rows=rows, variant=variant: decoded(
                    setting, variant, weights, length, rows=rows
                ),
            )
