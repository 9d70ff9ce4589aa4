"""Dress rehearsal: lessons 00 to 04 as somebody with licensed weights runs them, on made-up ones.

    python benchmarks/rehearsal.py [--size 1b|7b] [--work-dir DIR] [--json FILE]

A base and an adapter of the true shapes are made, entered into a catalogue with their digests,
served from this machine, and then downloaded, verified, converted, merged and asked, each lesson by
the command a reader would type. Everything but the values is the real thing. What each step took
stands beside what lesson 00 foretold. All of it is removed at the end, the reports excepted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

import harness
import made_up_weights
from llamalab.catalog import sizes
from llamalab.catalog.catalog import ModelEntry, Part
from llamalab.catalog.models_dir import project_directory
from llamalab.checkpoints.digests import hash_file
from llamalab.environment import disk_free, memory_available
from llamalab.units import size_text
from llamalab_course.file_server import serve_files

BASE, ADAPTER, MODEL = "made-up-base", "made-up-lora", "made-up-model"
CONTEXT = 2048
BOTH = ("md5", "sha256")
LESSONS = ("00", "01", "02", "03", "04")


@dataclass
class Step:
    """What a lesson took beside what was foretold: seconds, and bytes of disk and memory.

    `disk` is what the models directory holds when the lesson is over; `peak_disk` is the most
    that everything of the rehearsal held meanwhile, the mirror included; `memory` is the most
    (RssAnon) that one process held.
    """

    lesson: str
    status: str
    seconds: float
    disk: int
    disk_foretold: int
    peak_disk: int
    memory: int
    memory_foretold: int
    streaming: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="7b", choices=["1b", "7b"])
    default = project_directory() / "models" / "rehearsal"
    parser.add_argument("--work-dir", type=Path, default=default, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    model = entry(options.size)
    say_what_it_needs(model, options.work_dir)
    options.work_dir.mkdir(parents=True)  # not one that holds something
    try:
        steps = rehearse(model, options.size, options.work_dir)
    finally:
        for name in ("mirror", "models", "catalog.toml"):
            remove(options.work_dir / name)
    report(model, steps, options)
    return 0 if all(step.status == "ok" for step in steps) else 1


def entry(size: str) -> ModelEntry:
    """Return the model that is rehearsed, as the catalogue will hold it."""
    shape = made_up_weights.SIZES[size]
    base = Part(
        BASE, "base", {}, made_up_weights.VOCABULARY, folder="7B", context=CONTEXT, shape=shape
    )
    adapter = Part(
        ADAPTER, "adapter", {}, made_up_weights.EXTENDED, family="llama", base=BASE, rank=8
    )
    return ModelEntry(MODEL, base, (adapter,))


def say_what_it_needs(model: ModelEntry, work: Path) -> None:
    needs = sizes.needs(model)
    disk = needs.disk + 2 * 10**9
    print(needs, "", sep="\n")
    print(
        f"The rehearsal takes up to {size_text(disk)} of disk in {work}, all of it removed later."
    )
    if work.exists():
        raise SystemExit(f"{work} is there already: remove it, or name another --work-dir.")
    if disk_free(work) < disk:
        raise SystemExit(f"There are {size_text(disk_free(work))} free.")
    if (memory_available() or needs.cpu_memory) < needs.cpu_memory:
        raise SystemExit(f"Lesson 04 needs {size_text(needs.cpu_memory)} of memory.")


def rehearse(model: ModelEntry, size: str, work: Path) -> list[Step]:
    mirror, models = work / "mirror", work / "models"
    began = time.monotonic()
    made_up_weights.write_base(mirror / BASE, model.base.shape)
    made_up_weights.write_adapter(
        mirror / ADAPTER, model.base.shape, mirror / BASE / "tokenizer.model"
    )
    (work / "catalog.toml").write_text(catalogue(model, mirror))
    print(f"made {size_text(held_in(mirror))} in {time.monotonic() - began:.0f} s", flush=True)
    needs, steps = sizes.needs(model), []
    foretold = {
        "00": (0, 0),
        "01": (needs.download, 0),
        "02": (needs.download + needs.converted, needs.streaming_memory),
        "03": (needs.disk, needs.streaming_memory),
        "04": (needs.disk, needs.cpu_memory),
    }
    with serve_files(mirror) as url:
        for lesson in LESSONS:
            words = ["-p", f"model={MODEL}", "-p", f"models_dir={models}"]
            if lesson == "01":
                words += ["-p", f"source={url}"]
            if lesson == "04":
                words += ["-p", "max_new_tokens=8"]
            steps.append(run(lesson, words, work, *foretold[lesson]))
            print(f"{lesson} {steps[-1].status}, {steps[-1].seconds:.0f} s", flush=True)
            if steps[-1].status != "ok":
                break
            if lesson == "01":  # one copy is enough: the mirror goes on with the downloaded one
                for file in [path for path in mirror.rglob("*") if path.is_file()]:
                    file.unlink()
                    os.link(models / file.relative_to(mirror), file)
    return steps


def catalogue(model: ModelEntry, mirror: Path) -> str:
    """Return the entry in the catalogue's form, with the digests of the files just made.

    The base gets its checklist of md5 digests, as Meta's have one.
    """
    lines = []
    for part in model.parts:
        fields = {"vocab": part.vocab}
        if part.kind == "base":
            shape = ", ".join(f"{name} = {value}" for name, value in asdict(part.shape).items())
            fields |= {"folder": f'"{part.folder}"', "context": part.context}
            fields["shape"] = f"{{ {shape} }}"
        else:
            fields |= {"family": f'"{part.family}"', "base": f'"{part.base}"', "rank": part.rank}
        lines.append(f"[{part.kind}.{part.name}]")
        lines += [f"{name} = {value}" for name, value in fields.items()]
        lines.append(f"[{part.kind}.{part.name}.files]")
        digests = {
            file: hash_file(file, BOTH) for file in sorted((mirror / part.name).rglob("*.*"))
        }
        if part.kind == "base":
            checklist = mirror / part.name / part.folder / "checklist.chk"
            own = [file for file in digests if file.parent == checklist.parent]
            checklist.write_text("".join(f"{digests[f]['md5']}  {f.name}\n" for f in own))
            digests[checklist] = hash_file(checklist, BOTH)
        for file, digest in digests.items():
            name = file.relative_to(mirror / part.name).as_posix()
            size = file.stat().st_size
            lines.append(f'"{name}" = {{ sha256 = "{digest["sha256"]}", size = {size} }}')
    lines += [f"[model.{MODEL}]", f'base = "{BASE}"', f'adapters = ["{ADAPTER}"]']
    return "\n".join(lines) + "\n"


def run(lesson: str, words: list[str], work: Path, disk_foretold: int, foretold: int) -> Step:
    environment = os.environ | {"LLAMALAB_CATALOG": str(work / "catalog.toml")}
    command = harness.llamalab("run", lesson, *words, "--output-dir", work / "runs")
    began, peaks = time.monotonic(), [0, 0]
    before = set((work / "runs").glob("*"))
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    over = threading.Event()
    watcher = threading.Thread(target=watch, args=(process.pid, work, peaks, over))
    watcher.start()
    try:
        process.wait()
    finally:
        over.set()
        watcher.join()
        process.terminate()
    seconds = time.monotonic() - began
    manifest = {}
    for directory in set((work / "runs").glob("*")) - before:
        if (directory / "manifest.json").exists():
            manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
    return Step(
        lesson,
        manifest.get("status", "failed"),
        seconds,
        held_in(work / "models"),
        disk_foretold,
        peaks[0],
        peaks[1],
        foretold,
        manifest.get("results", {}).get("memory", 0) if lesson in ("02", "03") else 0,
    )


def watch(pid: int, work: Path, peaks: list[int], over: threading.Event) -> None:
    while not over.wait(0.2):
        try:
            family = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            return
        peaks[0] = max(peaks[0], held_in(work))
        peaks[1] = max(peaks[1], *(harness.memory(one)["RssAnon"] for one in family))


def held_in(directory: Path) -> int:
    """Return the bytes on the disk of everything in `directory`, a file with two names once."""
    found = {}
    for path in directory.rglob("*"):
        try:
            facts = path.stat()
        except FileNotFoundError:  # renamed or removed a moment ago
            continue
        if path.is_file():
            found[facts.st_ino] = facts.st_blocks * 512
    return sum(found.values())


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def report(model: ModelEntry, steps: list[Step], options: argparse.Namespace) -> None:
    facts = harness.facts(options.size)
    print(
        f"\nLessons 00 to 04 on made-up weights ({options.size})\n{facts['machine']}; {facts['date']}\n"
    )
    print("| lesson | | seconds | models on disk | foretold | peak memory | foretold |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for step in steps:
        memory = f"{size_text(step.memory)}"
        if step.streaming:
            memory += f", {size_text(step.streaming)} for the step"
        told = [size_text(n) if n else "–" for n in (step.disk_foretold, step.memory_foretold)]
        cells = (step.lesson, step.status, f"{step.seconds:.0f}", size_text(step.disk), told[0])
        print(f"| {' | '.join(cells)} | {memory} | {told[1]} |")
    print(
        f"\nin all {sum(step.seconds for step in steps) / 60:.1f} minutes; at most "
        f"{size_text(max(step.peak_disk for step in steps))} of disk; reports in {options.work_dir}/runs"
    )
    if options.json:
        held = facts | {"steps": [asdict(step) for step in steps]}
        options.json.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
