"""No hidden state: the course twice in one directory, each lesson alone, and in shuffled order.

    python tests/nightly.py [--seed N] [NOTEBOOK …]

Every run starts without models of its own, in a fresh models directory; the first two rounds share
one. The checkout must look afterwards as it did before. Exit code 1 when a lesson does not end ok.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from llamalab.catalog.models_dir import project_directory
from llamalab_runs import notebooks, runner


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", help="default: the whole course")
    parser.add_argument("--seed", type=int, help="of the shuffled order; default: a new one")
    options = parser.parse_args()
    lessons = [notebooks.find_notebook(name) for name in options.notebooks]
    lessons = lessons or notebooks.lesson_notebooks()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    shuffled = random.Random(seed).sample(lessons, len(lessons))
    rounds = [("twice in one directory", lessons + lessons)]
    rounds += [(f"{lesson.stem} alone", [lesson]) for lesson in lessons]
    rounds += [(f"shuffled with seed {seed}", shuffled)]
    before, failed = _checkout(), []
    for name, order in rounds:
        print(f"{name}:", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            runs = runner.run(
                order,
                {"models_dir": f"{folder}/models"},
                output_dir=Path(folder) / "runs",
                on_end=lambda run: print(
                    f"  {run.status:7} {run.notebook} {run.error}", flush=True
                ),
            )
        failed += [(name, run.notebook) for run in runs if run.status != "ok"]
    if _checkout() != before:
        failed.append(("a lesson changed the checkout", _checkout()))
    for name, what in failed:
        print(f"FAIL {name}: {what}", file=sys.stderr)
    return 1 if failed else 0


def _checkout() -> str:
    command = ["git", "-C", str(project_directory()), "status", "--porcelain"]
    return subprocess.run(command, capture_output=True, text=True).stdout


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
