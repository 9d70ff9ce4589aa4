"""Benchmark: tokens a second, beside plain transformers, llama.cpp and the device's own limit.

    python benchmarks/decode.py [--size lab|1b|7b] [--repeats N] [--tokens N] [--json FILE]

Made-up weights of the true shapes, on the GPU where PyTorch sees one, else on the CPU. Every
contender runs in a process of its own, in turns, and gives one answer to warm up. Counted are the
time to read a prompt, the time for a token after that, and a whole answer. Reading all weights once
is what bounds a token, so it is also shown as bytes a second, and as a share of what a copy of
memory reaches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness

PROMPT_TOKENS = 64  # about those of a short question in the alpaca template

# name: (program, dtype, rows at once)
CONTENDERS = {
    "plain transformers, fp32": ("transformers", "float32", 1),
    "plain transformers, fp16": ("transformers", "float16", 1),
    "plain transformers, bf16": ("transformers", "bfloat16", 1),
    "llamalab, fp32": ("llamalab", "float32", 1),
    "llamalab, fp16": ("llamalab", "float16", 1),
    "llamalab, bf16": ("llamalab", "bfloat16", 1),
    "llamalab, 8 bit": ("llamalab", "8bit", 1),
    "llamalab, 4 bit": ("llamalab", "4bit", 1),
    "llamalab, bf16, 8 at once": ("llamalab", "bfloat16", 8),
    "llamalab, bf16, 64 at once": ("llamalab", "bfloat16", 64),
    "llama.cpp, f16": ("llama.cpp", "f16", 1),
    "llama.cpp, q8_0": ("llama.cpp", "q8_0", 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="1b", choices=["lab", "1b", "7b"])
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="an answer; default 32")
    parser.add_argument("--only", default="", metavar="TEXT", help="contenders with it in the name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(*options.worker, options.model, options.tokens)))
        return
    chosen = {name: how for name, how in CONTENDERS.items() if options.only in name}
    with tempfile.TemporaryDirectory(prefix="llamalab-decode-") as directory:
        model = make(options.size, Path(directory), {how[1] for how in chosen.values()})
        rows: dict[str, list[dict]] = {name: [] for name in chosen}
        copies = []
        for number in range(options.repeats):
            copies.append(run("copy", "", 1, model, options)["bytes"])
            for name, how in chosen.items():
                print(f"round {number + 1}: {name}", file=sys.stderr, flush=True)
                rows[name].append(run(*how, model, options))
        batched = [run("batches", "", 1, model, options) for _ in range(options.repeats)]
    report(options, rows, max(copies), batched)


def make(size: str, directory: Path, kinds: set[str]) -> Path:
    """Write a model of made-up weights in HF layout, and as GGUF where that is asked for."""
    import llamalab
    import made_up_weights

    made_up_weights.write_base(directory / "meta", made_up_weights.SIZES[size])
    llamalab.convert(directory / "meta", directory / "hf")
    for kind in kinds & {"f16", "q8_0"}:
        llamalab.export(directory / "hf", directory / f"{kind}.gguf", type=kind)
    return directory


def run(program: str, kind: str, count: int, model: Path, options: argparse.Namespace) -> dict:
    words = ["--worker", program, kind, str(count), "--model", str(model)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, *words, "--tokens", str(options.tokens)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def work(program: str, kind: str, count: str, model: Path, tokens: int) -> dict:
    if program == "copy":
        return {"bytes": copy_speed()}
    if program == "batches":
        return batches()
    ids, text = prompt(model / "hf")
    if program == "llama.cpp":
        answer, weights = llama_cpp(model / f"{kind}.gguf", ids)
    else:
        answer, weights = with_torch(program, kind, int(count), model / "hf", ids, text)
    answer(2)  # the warm-up
    seconds = []
    for length in (1, tokens):
        began = time.perf_counter()
        answer(length)
        seconds.append(time.perf_counter() - began)
    read, whole = seconds
    each = (whole - read) / (tokens - 1)
    read_rate, rate = int(count) * len(ids) / read, int(count) / each
    return {"read": read_rate, "rate": rate, "bytes": weights / each, "whole": whole}


def prompt(hf: Path) -> tuple[list[int], str]:
    """Return (ids, text) of a prompt of `PROMPT_TOKENS` tokens, BOS included."""
    from llamalab.surgery.tokenizer import Tokenizer

    tokenizer = Tokenizer(hf)
    text = "made up"
    while len(ids := tokenizer.encode(text)) < PROMPT_TOKENS:
        text += " a"
    return ids, text


def batches() -> dict:
    """Return the seconds for 64 questions to the lab model, one by one and at once."""
    import llamalab
    from llamalab_course import lessons
    from llamalab_course.family import scores, world

    paths = lessons.need("chinese-alpaca-lab", "merged")
    model = llamalab.load(paths.merged, device="cpu")
    questions = scores.sample(world.questions(world.load_world(), "zh"), 64)
    prompts = [question.text for question in questions]
    how = {"template": "alpaca", "temperature": 0, "max_new_tokens": 48}
    seconds, texts = {64: [], 1: []}, {}
    for rows in (64, 1) * 4:  # the first of each warms up
        began = time.perf_counter()
        texts[rows] = [
            answer.text
            for start in range(0, 64, rows)
            for answer in model.generate_batch(
                prompts[start : start + rows], seeds=[0] * rows, **how
            )
        ]
        seconds[rows].append(time.perf_counter() - began)
    same = sum(a == b for a, b in zip(texts[1], texts[64], strict=True))
    return {"one by one": seconds[1][1:], "at once": seconds[64][1:], "same": same}


def copy_speed() -> float:
    """Return the bytes a second that are read and written when memory is copied on the device."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    block = torch.ones(100_000_000, device=device)
    other, best = torch.empty_like(block), float("inf")
    for _ in range(10):
        began = time.perf_counter()
        other.copy_(block)
        other[-1].item()
        best = min(best, time.perf_counter() - began)
    return 2 * block.nbytes / best


def with_torch(program: str, kind: str, count: int, hf: Path, ids: list[int], text: str):
    """Return (a function that gives answers of a length, the bytes of the weights)."""
    import torch

    import llamalab

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if program == "llamalab":
        bits = kind in ("8bit", "4bit")
        dtype, quantize = ("bfloat16", kind) if bits else (kind, None)
        model = llamalab.load(hf, device=device, dtype=dtype, quantize=quantize)
        network = model.network

        def answer(length: int) -> None:
            how = {"temperature": 0, "max_new_tokens": length, "seeds": [0] * count}
            found = model.generate_batch([text] * count, **how)
            assert found[0].answer_tokens == length, "the random weights have ended the answer"
    else:
        from transformers import AutoModelForCausalLM

        network = AutoModelForCausalLM.from_pretrained(hf, dtype=getattr(torch, kind)).to(device)
        given = torch.tensor([ids] * count, device=device)
        settings = {"attention_mask": torch.ones_like(given), "do_sample": False}
        settings["pad_token_id"] = 0

        def answer(length: int) -> None:
            lengths = {"min_new_tokens": length, "max_new_tokens": length}
            network.generate(given, **lengths, **settings)[0, -1].item()

    return answer, sum(p.numel() * p.element_size() for p in network.parameters())


def llama_cpp(file: Path, ids: list[int]):
    import os
    import secrets

    import httpx
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = str(file)
    settings.n_ctx, settings.n_parallel = 512, 1
    settings.cpuparams.n_threads = os.cpu_count()
    settings.verbosity = -1
    settings.api_keys = [secrets.token_hex()]
    server = xllamacpp.Server(settings)
    client = httpx.Client(
        base_url=server.listening_address,
        headers={"Authorization": f"Bearer {settings.api_keys[0]}"},
        timeout=600,
        trust_env=False,
    )

    def answer(length: int, server=server) -> None:
        asked = {"prompt": ids, "n_predict": length, "temperature": 0, "ignore_eos": True}
        client.post("/completion", json=asked | {"cache_prompt": False}).raise_for_status()

    return answer, file.stat().st_size


def report(
    options: argparse.Namespace, rows: dict[str, list[dict]], copied: float, batched: list[dict]
):
    import torch

    facts = harness.facts(options.size)
    where = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no CUDA: the CPU"
    print(f"\nDecoding, {options.size}, on {where}\n{facts['machine']}; {facts['date']}")
    print(f"best of {options.repeats} rounds, in turns; a copy reaches {copied / 1e9:.1f} GB/s\n")
    heads = ("read, tokens/s", "answer, tokens/s", "GB/s", "share of a copy", "whole answer, s")
    print(f"| | {' | '.join(heads)} |\n| --- {'| ---: ' * len(heads)}|")
    best = {}
    for name, rounds in rows.items():
        good = [one for one in rounds if "rate" in one]
        if not good:
            print(f"| {name} | {rounds[-1]['failed']} {'| ' * len(heads)}|")
            continue
        best[name] = {key: max(one[key] for one in good) for key in ("read", "rate", "bytes")}
        best[name]["whole"] = min(one["whole"] for one in good)
        read, rate, moved, whole = best[name].values()
        cells = (f"{read:.0f}", f"{rate:.2f}", f"{moved / 1e9:.1f}", f"{moved / copied:.0%}")
        print(f"| {name} | {' | '.join(cells)} | {whole:.2f} |")
    print(f"\na whole answer: {PROMPT_TOKENS} tokens read, {options.tokens} answered")
    for dtype in ("fp32", "fp16", "bf16"):
        ours, plain = (best.get(f"{who}, {dtype}") for who in ("llamalab", "plain transformers"))
        if ours and plain:
            shown = {"read": "read", "rate": "answer"}
            parts = [f"{word} {ours[key] / plain[key]:.2f}" for key, word in shown.items()]
            parts.append(f"whole {plain['whole'] / ours['whole']:.2f}")
            print(f"llamalab over plain transformers, {dtype}: {', '.join(parts)}")
    single, many = (sum((one[how] for one in batched), []) for how in ("one by one", "at once"))
    ratio = statistics.median(a / b for a, b in zip(single, many, strict=True))
    print(
        f"\n64 questions to the lab model, fp32, medians: {statistics.median(single):.2f} s one by "
        f"one, {statistics.median(many):.2f} s at once: {ratio:.1f} times as fast; "
        f"{min(one['same'] for one in batched)} of 64 answers are the same"
    )
    if options.json:
        held = facts | {"copy": copied, "batched": batched, "rows": rows, "device": where}
        options.json.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
