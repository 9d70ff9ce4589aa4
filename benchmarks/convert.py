"""Benchmark: Meta layout to HF layout, beside a plain copy and beside transformers' own script.

    python benchmarks/convert.py [--size lab|1b|7b] [--repeats N] [--no-peers] [--json FILE]

Everything is done on made-up weights of the true shapes. Our figure includes the fsync, the
sha256 of every input and of every tensor, and Python's start.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch

import harness
import made_up_weights
from llamalab.checkpoints.layouts import HFCheckpoint


def base(work: Path, size: str) -> Path:
    """Return the directory of a base model of this size, in Meta layout, made when missing."""
    directory = work / f"base-{size}"
    if not (directory / "tokenizer.model").exists():  # it is written last
        shutil.rmtree(directory, ignore_errors=True)
        made_up_weights.write_base(directory, made_up_weights.SIZES[size])
    return directory


def script(directory: Path, work: Path, out: Path) -> harness.Contender:
    """Return transformers' script, which wants the tokenizer beside the weights."""
    flat = work / "flat"
    shutil.rmtree(flat, ignore_errors=True)
    flat.mkdir()
    for path in [directory / "tokenizer.model", *(directory / "7B").iterdir()]:
        (flat / path.name).symlink_to(path)
    module = "transformers.models.llama.convert_llama_weights_to_hf"
    command = [sys.executable, "-m", module, "--input_dir", str(flat), "--model_size", "7B"]
    return harness.Contender(
        f"transformers {harness.PEER}",
        [*command, "--llama_version", "1", "--output_dir", str(out)],
        out,
        environment=harness.peer_environment(work),
    )


def compared(ours: Path, theirs: Path) -> str:
    """Say how their weights differ from ours, value by value."""
    a, b = HFCheckpoint(ours), HFCheckpoint(theirs)
    differing = beyond = total = 0
    for name, spec in a.tensors.items():
        for x, y in zip(a.blocks(name), b.blocks(name), strict=True):
            differing += int((x != y).sum())
            beyond += int((x.to(torch.bfloat16).to(spec.dtype) != y).sum())
            total += x.numel()
    return (
        f"{differing / total:.1%} of its {total:,} values differ from ours, all of them because "
        f"it rounds to bfloat16 on the way; {beyond} for another reason."
    )


def main() -> None:
    options = harness.arguments(__doc__.partition("\n")[0])
    work = options.work_dir.resolve()
    directory = base(work, options.size)
    weights, out, kept = directory / "7B" / "consolidated.00.pth", work / "out", work / "kept"
    convert = harness.llamalab("convert", "--input-dir", directory, "--output-dir")
    contenders = harness.limits(weights, work / "copy")
    contenders.append(harness.Contender("llamalab convert", [*convert, str(out)], out))
    if options.peer_repeats:
        peer = script(directory, work, work / "theirs")
        peer.repeats = options.peer_repeats

        def check() -> str:
            harness.compete([harness.Contender("ours, to compare", [*convert, str(kept)])], [], 1)
            said = compared(kept, work / "theirs")
            shutil.rmtree(kept)
            return said

        peer.check = check
        contenders.append(peer)
    rows = harness.compete(contenders, [directory], options.repeats)
    facts = harness.facts(options.size, options.repeats)
    size = f"{weights.stat().st_size / 1e9:.1f} GB"
    harness.report(f"Convert {size} ({options.size})", rows, facts, options.json)


if __name__ == "__main__":
    main()
