"""Benchmark: an adapter with an extended vocabulary into its base, beside transformers and PEFT.

    python benchmarks/merge.py [--size lab|1b|7b] [--repeats N] [--no-peers] [--json FILE]

Two routes of ours: from HF layout, and from Meta's files in one pass; the peers need one program
after the other for the second. Made-up weights of the true shapes; the adapter is in the form of
the published ones (49,953 tokens, rank 8, all seven projections).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import convert
import harness
import made_up_weights
from llamalab.checkpoints.layouts import HFCheckpoint


def compared(ours: Path, theirs: Path) -> str:
    """Say how many of their values differ from ours, and by how much."""
    a, b = HFCheckpoint(ours), HFCheckpoint(theirs)
    differing, total, most = 0, 0, 0.0
    for name in a.tensors:
        for x, y in zip(a.blocks(name), b.blocks(name), strict=True):
            differing += int((x != y).sum())
            most = max(most, float((x.float() - y.float()).abs().max()))
            total += x.numel()
    return f"{differing:,} of its {total:,} values differ from ours, by {most:.1e} at most."


def main() -> None:
    options = harness.arguments(__doc__.partition("\n")[0])
    work = options.work_dir.resolve()
    base = convert.base(work, options.size)
    weights, hf, out = base / "7B" / "consolidated.00.pth", work / "base-hf", work / "out"
    adapter = work / f"adapter-{options.size}"
    if not (adapter / "tokenizer.model").exists():
        shutil.rmtree(adapter, ignore_errors=True)
        shape = made_up_weights.SIZES[options.size]
        made_up_weights.write_adapter(adapter, shape, base / "tokenizer.model")
    to_hf = harness.llamalab("convert", "--overwrite", "--input-dir", base, "--output-dir", hf)
    harness.compete([harness.Contender("the base in HF layout, to start from", to_hf)], [], 1)

    def merged(source: Path, target: Path) -> list[str]:
        words = ("--base-model", source, "--lora-model", adapter, "--output-dir", target)
        return harness.llamalab("merge", *words)

    contenders = harness.limits(weights, work / "copy")
    contenders += [
        harness.Contender("llamalab merge", merged(hf, out), out),
        harness.Contender("llamalab merge, from Meta's files", merged(base, out), out),
    ]
    if options.peer_repeats:
        theirs = work / "theirs"
        code = [sys.executable, str(Path(__file__).with_name("peer_merge.py"))]
        words = [str(hf), str(adapter), str(theirs), str(made_up_weights.EXTENDED)]

        def check() -> str:
            kept = work / "kept"
            command = merged(hf, kept)
            harness.compete([harness.Contender("ours, to compare", command)], [], 1)
            said = compared(kept, theirs)
            shutil.rmtree(kept)
            return said

        contenders += [
            convert.script(base, work, work / "converted"),
            harness.Contender("transformers and PEFT", [*code, *words], theirs, check=check),
        ]
        for peer in contenders[-2:]:
            peer.repeats = options.peer_repeats
    rows = harness.compete(contenders, [base, hf, adapter], options.repeats)
    shutil.rmtree(hf)
    facts = harness.facts(options.size, options.repeats)
    size = f"{weights.stat().st_size / 1e9:.1f} GB"
    harness.report(f"Merge into {size} ({options.size})", rows, facts, options.json)
    if options.peer_repeats:
        fused, *peers = (row.median for row in rows[-3:])
        print(
            f"\nBoth peers in a row: {sum(peers):.1f} s, {sum(peers) / fused:.1f} x our one pass."
        )


if __name__ == "__main__":
    main()
