"""Benchmark: what a GPU gives at 7B, measured in one run of eight minutes, stage by stage.

    python benchmarks/gpu.py [--size 7b|lab] [--device cuda|cpu] [--stages a,b] [--json FILE]

The ceilings of the card, the equality of what is computed, tokens a second of our compiled step
(`fused_decode.py`) beside transformers' own ways and llamalab as it is, batches, memory beside the
estimate, and once convert, merge and load. Weights are random, in the true shapes. Each stage is a
process of its own with a deadline; each figure is on the disk at once. A stage that fails or hangs
costs itself.

    stages, in order: card equal ours lean lab peers more batches quantized course variants

`--stages card,ours=triton-pdl+cdt/matmul,lean` names the variants that a stage is to try.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

# PyTorch must not touch the driver in this process, whose children use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from llamalab.catalog import project_directory  # noqa: E402

GOAL = 0.8
"""The share of a copy's speed at which weights are to be read at batch 1."""

LEAN = ("lean-pdl", "lean-norm-pdl", "lean")
BEST = ("lean-pdl", "compile/sdpa")
MAIN = ("triton-pdl", "graph/sdpa", "compile/sdpa", "cdt/matmul")
OTHERS = ("triton", "cdt/sdpa", "pdl/matmul", "cdt/flex", "compile/matmul")
OTHERS += ("max-autotune/sdpa", "reduce-overhead/sdpa")
CPU = ("compile/matmul", "eager/sdpa")

# name: (seconds at most, variants on a GPU); in order of importance
STAGES = {
    "card": (40, ()),
    "equal": (75, ("lean-pdl", "lean-norm-pdl", "triton-pdl", "compile/sdpa")),
    "ours": (80, MAIN),
    "lean": (80, LEAN),
    "lab": (35, ()),
    "peers": (120, ()),
    "more": (110, BEST),
    "batches": (60, ()),
    "quantized": (80, ()),
    "course": (100, ()),
    "variants": (170, OTHERS),
}

FORKED_BADLY = 77


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="7b", choices=["7b", "lab", "slice"])
    found = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    parser.add_argument("--device", default=found, choices=["cuda", "cpu"])
    parser.add_argument("--stages", default=",".join(STAGES), metavar="A,B")
    parser.add_argument("--variants", default="", metavar="HOW/ATTENTION,...", help="of our step")
    parser.add_argument("--backend", default="", help="of torch.compile; inductor or eager")
    parser.add_argument("--budget", type=float, default=470, metavar="S", help="seconds in all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for lines, logs and scratch files")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.backend = options.backend or default_backend(options.device)
    if options.worker:
        work(options.worker, options)
        return 0
    with tempfile.TemporaryDirectory(prefix="llamalab-gpu-") as scratch:
        options.out = (options.out or Path(scratch)).absolute()
        options.out.mkdir(parents=True, exist_ok=True)
        return run(options)


def default_backend(device: str) -> str:
    """Inductor, unless this is a CPU without a C++ compiler."""
    return "inductor" if device == "cuda" or shutil.which("g++") else "eager"


def run(options: argparse.Namespace) -> int:
    began, options.told, fresh = time.monotonic(), 0, False
    file = options.out / "lines.jsonl"
    file.write_text("")
    (options.out / "tiles.json").unlink(missing_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.out / "inductor"))
    chosen = dict(one.partition("=")[::2] for one in options.stages.split(","))
    if unknown := set(chosen) - set(STAGES):
        raise SystemExit(f"gpu.py: no such stage: {', '.join(sorted(unknown))}")
    everywhere = options.variants
    for name in [stage for stage in STAGES if stage in chosen]:
        options.variants = chosen[name].replace("+", ",") or everywhere
        left = options.budget - (time.monotonic() - began)
        limit = min(STAGES[name][0], left)
        if limit < 10 and name != next(iter(chosen)):
            write(file, stage=name, name="-", skipped="the time for the run is over")
            continue
        start = time.monotonic()
        ended = stage(name, options, limit, fresh)
        if ended == FORKED_BADLY and not fresh:
            fresh = True
            ended = stage(name, options, limit, fresh)
        taken = time.monotonic() - start
        problem = {0: {}, None: {"stopped": f"after {limit:.0f} s"}}
        problem = problem.get(
            ended, {"failed": f"exit status {ended}; {last_words(options, name)}"}
        )
        write(file, stage=name, name="stage", seconds=round(taken, 1), **problem)
        show(options)
        save(options, lines_of(file), time.monotonic() - began)
    return report(options, lines_of(file), time.monotonic() - began)


def stage(name: str, options: argparse.Namespace, limit: float, fresh: bool) -> int | None:
    """Run a stage in a process of its own; return its exit status, None if it was stopped."""
    import subprocess

    options.limit = limit
    if fresh:
        words = ["--worker", name, "--size", options.size, "--device", options.device]
        words += ["--variants", options.variants, "--backend", options.backend]
        command = [sys.executable, __file__, *words, "--out", str(options.out)]
        process = subprocess.Popen(command, start_new_session=True)
        wait, status = process.wait, lambda: process.poll()
    else:
        # What all stages import is imported once.
        from transformers import LlamaForCausalLM  # noqa: F401

        import gpu_package  # noqa: F401
        import gpu_stages  # noqa: F401

        forked = multiprocessing.get_context("fork").Process(target=work, args=(name, options))
        forked.start()
        process, wait, status = forked, forked.join, lambda: forked.exitcode
    until = time.monotonic() + limit
    while status() is None and (left := until - time.monotonic()) > 0:
        try:
            wait(min(left, 1))
        except subprocess.TimeoutExpired:
            pass
        show(options)
    ended = status()
    try:
        os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
    except (ProcessLookupError, PermissionError):
        pass
    wait()
    return ended


def work(name: str, options: argparse.Namespace) -> None:
    """Be the process of a stage: its output goes to a log of its own."""
    if os.getpid() != os.getsid(0):
        os.setsid()
    log = os.open(options.out / f"{name}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
    if seconds := getattr(options, "limit", 0):  # where a stage was when its time was over
        faulthandler.dump_traceback_later(max(seconds - 2, seconds / 2), file=log)
    try:
        import torch

        if options.device == "cuda":
            torch.zeros(1, device="cuda")
        elif options.size == "lab":  # its products are too small to be shared
            torch.set_num_threads(1)
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(FORKED_BADLY)  # it may be that the parent touched the driver
    try:
        import gpu_measure
        import gpu_package
        import gpu_stages

        home = gpu_stages if hasattr(gpu_stages, name) else gpu_package
        getattr(home, name)(setting_of(gpu_measure.Setting, name, options))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)


def setting_of(kind, name: str, options: argparse.Namespace):
    variants = STAGES[name][1] if options.device == "cuda" else CPU
    if options.variants:
        variants = tuple(options.variants.split(","))
    file = options.out / "lines.jsonl"
    copies = [line["gb_s"] for line in lines_of(file) if line["name"] == "copy"]
    goal = GOAL * copies[0] if copies else float("inf")
    data = project_directory() / "data" / "lab"
    return kind(
        name, options.size, options.device, options.backend, file, options.out, data, variants, goal
    )


def last_words(options: argparse.Namespace, name: str) -> str:
    try:
        text = (options.out / f"{name}.log").read_text(errors="replace").strip()
    except OSError:
        return ""
    return text.splitlines()[-1][:300] if text else ""


def write(file: Path, **figures) -> None:
    with open(file, "a", encoding="utf-8") as out:
        out.write(json.dumps(figures) + "\n")


def lines_of(file: Path) -> list[dict]:
    if not file.exists():
        return []
    found = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:  # a stage was stopped while it wrote
            continue
    return found


def show(options: argparse.Namespace) -> None:
    """Print the lines that are new, as they are."""
    found = lines_of(options.out / "lines.jsonl")
    for line in found[options.told :]:
        rest = {key: value for key, value in line.items() if key not in ("stage", "name")}
        kernels = rest.pop("kernels", [])
        text = ", ".join(f"{key} {brief(value)}" for key, value in rest.items())
        print(f"{line['stage']}: {line['name']}: {text}", flush=True)
        for one in kernels:
            print(f"    {one['us']:9.1f} us {one['times']:6.1f} x {one['kernel']}", flush=True)
    options.told = len(found)


def brief(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


COLUMNS = {
    "rate": "tokens/s",
    "ms_a_step": "ms a step",
    "gb_s": "GB/s",
    "share": "share of a copy",
    "first_s": "first call, s",
    "peak_gb": "peak, GB",
    "foretold_gb": "foretold, GB",
    "seconds": "seconds",
}


def save(options: argparse.Namespace, lines: list[dict], taken: float) -> dict:
    """Write the figures so far, with shares of a copy and the goals; return them."""
    copies = [line["gb_s"] for line in lines if line["name"] == "copy"]
    for line in lines:
        if copies and "gb_s" in line:
            line["share"] = line["gb_s"] / copies[0]
    held = {"date": datetime.date.today().isoformat(), "size": options.size}
    held["device"] = next((line["card"] for line in lines if "card" in line), options.device)
    held |= {"seconds": taken, "goals": goals_of(lines), "lines": lines}
    if options.json:
        options.json.write_text(json.dumps(held, indent=1) + "\n")
    return held


NOTES = ("same", "of", "error", "parted_at", "words", "recompiled", "captures", "host_reads")
NOTES += ("syncs", "us", "us_at_most", "load_s", "loaded_gb", "host_gb", "on_disk_gb")
NOTES += ("failed", "stopped", "skipped")


def report(options: argparse.Namespace, lines: list[dict], taken: float) -> int:
    """Print the table, and write the figures; 1 where a stage failed or was stopped."""
    held = save(options, lines, taken)
    print(f"\n{held['size']} on {held['device']}, {held['date']}, {taken:.0f} s in all\n")
    print(f"| stage | | {' | '.join(COLUMNS.values())} | |")
    print(f"| --- | --- |{' ---: |' * len(COLUMNS)} --- |")
    for line in lines:
        cells = [brief(line[key]) if key in line else "" for key in COLUMNS]
        note = ", ".join(f"{key} {brief(line[key])}" for key in NOTES if key in line)
        print(f"| {line['stage']} | {line['name']} | {' | '.join(cells)} | {note[:160]} |")
    print(*(f"\n{text}" for text in held["goals"]), sep="")
    return int(any(line["name"] == "stage" and len(line) > 3 for line in lines))


def goals_of(lines: list[dict]) -> list[str]:
    """Return, in words, how the best of ours at batch 1 stands to the goals."""
    rates = {line["name"]: line["rate"] for line in lines if "rate" in line}
    ours = [name for name in rates if name.startswith("ours ") and name.endswith(", bf16")]
    if not ours:
        return []
    best = max((line for line in lines if line["name"] in ours), key=lambda line: line["rate"])
    told = [f"best of ours: {best['name']}, {best['rate']:.1f} tokens/s"]
    if "share" in best:
        told[0] += f", {best['share']:.2f} of a copy (goal {GOAL})"
    for name, rate in rates.items():
        if name.startswith(("transformers", "llamalab today")):
            told.append(f"best of ours over {name}: {best['rate'] / rate:.2f}")
    return told


if __name__ == "__main__":
    sys.exit(main())
