"""Verifying: a whole directory held against what is published or recorded of its files."""

from __future__ import annotations

import hashlib
import math
import os
import shlex
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .. import catalog
from ..catalog import FileFacts, locate
from ..checkpoints import (
    RECORD,
    SAFETENSORS_NAMES,
    Checkpoint,
    checklist_facts,
    compare_file,
    digest_tensors,
    hash_file,
    open_checkpoint,
    raw_bytes,
    read_json,
    recognition,
    tensor_digest,
)
from ..errors import LabError, NotFound
from ..progress import bytes_bar
from ..reports import Report, Row
from ..units import size_text
from . import misplaced_files
from .misplaced_files import Move

FIRST = 10  # tensors that differ which are named; the rest are counted


@dataclass(frozen=True, repr=False)
class Verification(Report):
    """A row for each file of a directory.

    Attributes:
        parts: the catalogue's parts that were recognised there.
        moves: what would bring misplaced files to their places.
        bytes, seconds: what was read, and how long reading and hashing took.
        read_share: the share of that time that reading took: the speed of verifying, as a share
            of the plain read speed of the same threads.
    """

    path: Path
    rows: tuple[Row, ...]
    parts: tuple[str, ...] = ()
    moves: tuple[Move, ...] = ()
    bytes: int = 0
    seconds: float = 0.0
    read_share: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether something could be compared and nothing is wrong or missing."""
        statuses = {row.status for row in self.rows}
        return "OK" in statuses and not statuses & {"WRONG", "MISSING"}

    def as_dict(self) -> dict:
        return super().as_dict() | {
            "path": str(self.path),
            "parts": self.parts,
            "moves": [asdict(move) for move in self.moves],
            "bytes": self.bytes,
            "seconds": self.seconds,
            "read_share": self.read_share,
        }

    def remarks(self) -> list[str]:
        lines = []
        if self.parts and self.path.name not in self.parts:
            lines.append(f"recognised: {', '.join(self.parts)}")
        if self.moves:
            lines.append("The files lie elsewhere than the course looks for them. To be moved:")
            lines += [f"    {move}" for move in self.moves]
            lines.append(f"'llamalab verify {shlex.quote(str(self.path))} --fix' moves them.")
        if self.seconds:
            rate = f"{size_text(self.bytes)} at {size_text(self.bytes / self.seconds)}/s"
            lines.append(f"{rate}, {self.read_share:.0%} of the plain read speed")
        return lines


def verify(
    path: str | os.PathLike,
    as_name: str | None = None,
    models_dir: str | os.PathLike = "",
    against: str | os.PathLike | None = None,
    fix: bool = False,
) -> Verification:
    """Compare every file of a directory with what is published or recorded of it.

    `path` is a directory or a name under the models directory. Known are: the catalogue's facts
    of the part that the directory's name or `as_name` says, or else of those that its files
    give away; the directory's checklists; its `llamalab.json`, if llamalab made it. With
    `against`, it is compared with another directory instead: tensor by tensor where both are
    models, whatever files they lie in.

    Args:
        fix: move files that lie elsewhere than the course looks for them, each named first.

    Raises:
        NotFound: there is no such directory, no such part, or no file in the directory.
    """
    directory = locate(path, models_dir).resolve()
    catalogue, parts = catalog.parts(), []
    if as_name and as_name not in catalogue:
        raise catalog.unknown(as_name, catalogue, "part")
    here, rows, known, moves = _files(directory), [], {}, []
    if against is not None:
        other = locate(against, models_dir).resolve()
        rows, known, covered = _verify_against(directory, other)
        here = {name: size for name, size in here.items() if name not in covered}
    elif (directory / RECORD).exists():
        rows, known, covered = _verify_made(directory)
        here = {name: size for name, size in here.items() if name not in covered}
    else:
        part = catalogue.get(as_name or directory.name)
        parts = [part] if part else recognition.recognise_bases(directory, here)
        inside = [part for part in catalogue.values() if (directory / part.name).is_dir()]
        known, rows = checklist_facts(directory)
        for part in parts:
            if part.folder == directory.name and "params.json" in here:  # the size folder itself
                directory = directory.parent
                here = {f"{part.folder}/{name}": size for name, size in here.items()}
                known = {f"{part.folder}/{name}": facts for name, facts in known.items()}
                rows = [replace(row, name=f"{part.folder}/{row.name}") for row in rows]
                beside = [directory / name for name in part.files if "/" not in name]
                here |= {file.name: file.stat().st_size for file in beside if file.is_file()}
        published = {n: f for part in parts if part not in inside for n, f in part.files.items()}
        moves = misplaced_files.arrange(directory, published, here)
        if fix and moves:
            misplaced_files.apply(directory, moves)
            return verify(directory, as_name, models_dir)
        published |= {f"{part.name}/{n}": f for part in inside for n, f in part.files.items()}
        parts += [part for part in inside if part not in parts]
        for name, facts in published.items():
            known[name] = replace(facts, md5=facts.md5 or known.get(name, FileFacts()).md5)
        known |= {move.found: known[move.place] for move in moves}
    names = sorted((here.keys() | known.keys()) - {row.name for row in rows})
    if not names and not rows:
        raise NotFound(f"There is no file in '{directory}'.", "", "Give the directory of a model.")
    judged, spent = _judge_all(directory, names, known, sum(here.values()))
    if any(row.name == "(tensors)" for row in rows):
        spent = ()  # the larger part was read elsewhere
    found = {move.place: f"It lies at '{move.found}'; --fix moves it." for move in moves}
    rows += [replace(row, cause=found.get(row.name, row.cause)) for row in judged]
    names = tuple(part.name for part in parts)
    rows = tuple(sorted(rows, key=lambda row: row.name))
    return Verification(directory, rows, names, tuple(moves), *spent)


def _judge_all(directory: Path, names: list[str], known: dict[str, FileFacts], total: int):
    """Judge files in parallel; return the rows, and (bytes, seconds, share spent on reading)."""
    lock, read, busy, start = threading.Lock(), [0, 0.0], [0.0], time.perf_counter()
    with bytes_bar(total, directory.name) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:

        def advance(count: int) -> None:
            with lock:
                bar.update(count)
                read[0] += count

        def add_read(seconds: float) -> None:
            with lock:
                read[1] += seconds

        def row_of(name: str) -> Row:
            began = time.perf_counter()
            facts = known.get(name, FileFacts())
            row = compare_file(directory / name, name, facts, advance, on_read=add_read)
            with lock:
                busy[0] += time.perf_counter() - began
            return row

        rows = list(pool.map(row_of, names))
    seconds = time.perf_counter() - start
    return rows, (read[0], seconds if read[0] else 0.0, read[1] / busy[0] if busy[0] else 0.0)


def _files(directory: Path) -> dict[str, int]:
    """Return {path inside `directory`: bytes}, without downloads that are still under way."""
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    unfinished = (".partial", ".partial.json")
    return {
        file.relative_to(directory).as_posix(): file.stat().st_size
        for file in files
        if not file.name.endswith(unfinished)
    }


def _verify_made(directory: Path) -> tuple[list[Row], dict[str, FileFacts], set[str]]:
    """Check a directory that llamalab made, by its record: tensors by their digests.

    Returns a row for all tensors together, what is recorded of the other files, and the names
    of the files that the row covers. A container's bytes may differ where its tensors do not.
    """
    record = read_json(directory / RECORD)
    small = record.get("settings", {}).get("files", {})
    known = {name: FileFacts(sha256=sha256) for name, sha256 in small.items()}
    expected, covered = f"tensors {record.get('tensor_digest', '')}", {RECORD}
    try:
        made = open_checkpoint(directory)
        covered |= {path.name for path in made.inputs} - known.keys()
        with bytes_bar(made.total_bytes, "tensors") as bar:
            sums = digest_tensors(made, bar.update)
    except LabError as error:
        return (
            [Row("WRONG", "(tensors)", "", expected, error.why or error.what)],
            known,
            covered,
        )
    found = "tensors " + tensor_digest({n: (made.tensors[n], sha) for n, sha in sums.items()})
    then = record.get("tensors", {})
    changed = [name for name in sorted(sums | then) if sums.get(name) != then.get(name)]
    cause = f"{len(changed)} of {len(sums)} tensors differ, {changed[0]} first." if changed else ""
    status = "OK" if found == expected else "WRONG"
    return [Row(status, "(tensors)", found, expected, cause)], known, covered


def _verify_against(
    directory: Path, other: Path
) -> tuple[list[Row], dict[str, FileFacts], set[str]]:
    """Compare with another directory: tensors one by one if both have them, else file by file.

    Returns rows for the tensors, what is known of the other files, and the names of the files
    here that the rows cover.
    """
    rows, covered = [], {RECORD}  # how they were made may differ
    try:
        ours, theirs = open_checkpoint(directory), open_checkpoint(other)
    except LabError:
        pass  # an adapter, or files that are no model: bytes are compared
    else:
        rows = _compare_tensors(ours, theirs)
        for checkpoint in (ours, theirs):
            covered |= {
                file.relative_to(root).as_posix()
                for file in checkpoint.inputs
                for root in (directory, other)
                if file.is_relative_to(root) and _holds_tensors(file)
            }
    known = {
        name: FileFacts(size, sha256=hash_file(other / name)["sha256"])
        for name, size in _files(other).items()
        if name not in covered
    }
    return rows, known, covered


def _holds_tensors(file: Path) -> bool:
    return file.name.endswith((".safetensors", ".bin", ".pth", ".index.json"))


def _compare_tensors(ours: Checkpoint, theirs: Checkpoint) -> list[Row]:
    """Return a row for all tensors, and one for each of the first that differ and by how much.

    Read block by block, so memory does not grow with the model.
    """
    differ, sums = [], {}
    with bytes_bar(ours.total_bytes, "tensors") as bar:
        for name in dict.fromkeys([*ours.tensors, *theirs.tensors]):
            mine, other = (checkpoint.tensors.get(name) for checkpoint in (ours, theirs))
            found, expected = (
                f"{SAFETENSORS_NAMES[spec.dtype]} {'x'.join(map(str, spec.shape))}"
                if spec
                else "absent"
                for spec in (mine, other)
            )
            if not mine or not other or mine.shape != other.shape:
                differ.append(Row("WRONG", name, found, expected))
                continue
            sha256, count, most = hashlib.sha256(), 0, 0.0
            for start, stop in mine.blocks():
                block = ours.read(name, start, stop)
                changed, gap = _difference(block, theirs.read(name, start, stop))
                sha256.update(raw_bytes(block))
                count, most = count + changed, max(most, gap)
                bar.update(block.nbytes)
            sums[name] = (mine, sha256.hexdigest())
            if count or mine.dtype != other.dtype:
                cause = (
                    f"{count:,} of {math.prod(mine.shape):,} values differ, by {most:.3g} at most."
                )
                differ.append(Row("WRONG", name, found, expected, cause))
    if differ:
        total = len(ours.tensors.keys() | theirs.tensors.keys())
        cause = f"{len(differ):,} of {total:,} tensors differ, {differ[0].name} first."
        if ours.layout != theirs.layout:
            cause = "One is in Meta layout and one in HF layout: convert the one, then compare."
            differ = []
        return [Row("WRONG", "(tensors)", cause=cause), *differ[:FIRST]]
    return [Row("OK", "(tensors)", *[f"tensors {tensor_digest(sums)}"] * 2)]


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[int, float]:
    """Return how many values differ, and the most by which one does (infinite where one is NaN)."""
    if ours.dtype == theirs.dtype:  # by their bits, so that a NaN equals itself
        kind = {2: torch.int16, 4: torch.int32}[ours.dtype.itemsize]
        changed = ours.contiguous().view(kind) != theirs.contiguous().view(kind)
    else:
        changed = ours.float() != theirs.float()
    gaps = (ours[changed].double() - theirs[changed].double()).abs()
    return len(gaps), float(gaps.nan_to_num(nan=math.inf, posinf=math.inf).max()) if len(
        gaps
    ) else 0.0
