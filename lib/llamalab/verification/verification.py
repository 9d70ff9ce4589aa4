"""Verifying: a whole directory held against what is published or recorded of its files."""

import hashlib
import math
import os
import shlex
import threading
import time
from collections.abc import Callable, Container
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
    TensorSpec,
    checklist_facts,
    compare_file,
    digest_tensors,
    hash_file,
    open_checkpoint,
    raw_bytes,
    read_json,
    recognise_bases,
    tensor_digest,
)
from ..errors import LabError, NotFound
from ..files import partial_of
from ..progress import bytes_bar
from ..reports import Report, Row
from ..units import size_text
from . import misplaced_files
from .misplaced_files import Move

TENSORS = "(tensors)"  # the row that speaks of all of them
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
        return super().ok and any(row.status == "OK" for row in self.rows)

    def as_dict(self) -> dict:
        return super().as_dict() | asdict(self) | {"path": str(self.path)}

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
    if as_name and as_name not in catalog.parts():
        raise catalog.unknown(as_name, catalog.parts(), "part")
    if against is not None:
        return _verify_against(directory, locate(against, models_dir).resolve())
    if (directory / RECORD).exists():
        return _verify_made(directory)
    return _verify_published(directory, as_name, fix)


def _verify_against(directory: Path, other: Path) -> Verification:
    """Compare with another directory: tensors one by one if both have them, else file by file."""
    rows, covered = [], {RECORD}  # how they were made may differ
    try:
        ours, theirs = open_checkpoint(directory), open_checkpoint(other)
    except LabError:
        pass  # an adapter, or files that are no model: bytes are compared
    else:
        rows = _compare_tensors(ours, theirs)
        for root, checkpoint in ((directory, ours), (other, theirs)):
            inside = [file for file in checkpoint.inputs if file.is_relative_to(root)]
            covered |= {file.relative_to(root).as_posix() for file in inside if _is_weights(file)}
    known = {
        name: FileFacts(size, sha256=hash_file(other / name)["sha256"])
        for name, size in _files(other, covered).items()
    }
    return _report(directory, _files(directory, covered), known, rows)


def _verify_made(directory: Path) -> Verification:
    """Check a directory that llamalab made, by its record: tensors by their digests.

    All tensors together have one row; a container's bytes may differ where its tensors do not.
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
        row = Row("WRONG", TENSORS, "", expected, error.why or error.what)
    else:
        found = "tensors " + tensor_digest({n: (made.tensors[n], sha) for n, sha in sums.items()})
        recorded = record.get("tensors", {})
        changed = [n for n in sorted(sums | recorded) if sums.get(n) != recorded.get(n)]
        cause = ""
        if changed:
            cause = f"{len(changed)} of {len(sums)} tensors differ, {changed[0]} first."
        row = Row("OK" if found == expected else "WRONG", TENSORS, found, expected, cause)
    return _report(directory, _files(directory, covered), known, [row])


def _verify_published(directory: Path, as_name: str | None, fix: bool) -> Verification:
    """Compare with what the catalogue and the directory's own checklists say of its files."""
    catalogue, files = catalog.parts(), _files(directory)
    part = catalogue.get(as_name or directory.name)
    parts = [part] if part else recognise_bases(directory, files)
    inside = [part for part in catalogue.values() if (directory / part.name).is_dir()]
    known, rows = checklist_facts(directory)
    of_size = [part for part in parts if part.folder == directory.name and "params.json" in files]
    if of_size:  # the size folder itself: the part is the directory above, with what else is its
        prefix, directory = f"{directory.name}/", directory.parent
        files = {prefix + name: size for name, size in files.items()}
        known = {prefix + name: facts for name, facts in known.items()}
        rows = [replace(row, name=prefix + row.name) for row in rows]
        beside = [directory / name for name in of_size[0].files if "/" not in name]
        files |= {file.name: file.stat().st_size for file in beside if file.is_file()}
    published = {n: f for part in parts if part not in inside for n, f in part.files.items()}
    moves = misplaced_files.arrange(directory, published, files)
    if fix and moves:
        misplaced_files.apply(directory, moves)
        return verify(directory, as_name)
    published |= {f"{part.name}/{n}": f for part in inside for n, f in part.files.items()}
    for name, facts in published.items():
        known[name] = replace(facts, md5=facts.md5 or known.get(name, FileFacts()).md5)
    known |= {move.found: known[move.place] for move in moves}
    report = _report(directory, files, known, rows)
    lies_at = {move.place: f"It lies at '{move.found}'; --fix moves it." for move in moves}
    rows = tuple(replace(row, cause=lies_at.get(row.name, row.cause)) for row in report.rows)
    names = dict.fromkeys(part.name for part in [*parts, *inside])
    return replace(report, rows=rows, parts=tuple(names), moves=tuple(moves))


def _report(
    directory: Path, files: dict[str, int], known: dict[str, FileFacts], rows: list[Row]
) -> Verification:
    """Compare one by one the files that are there or known, but for those that `rows` speak of."""
    names = sorted((files.keys() | known.keys()) - {row.name for row in rows})
    if not names and not rows:
        raise NotFound(f"There is no file in '{directory}'.", "", "Give the directory of a model.")
    compared, spent = _compare_files(directory, names, known, sum(files.values()))
    if any(row.name == TENSORS for row in rows):
        spent = ()  # the larger part was read elsewhere
    rows = sorted([*rows, *compared], key=lambda row: row.name)
    return Verification(directory, tuple(rows), (), (), *spent)


def _compare_files(
    directory: Path, names: list[str], known: dict[str, FileFacts], total: int
) -> tuple[list[Row], tuple[int, float, float]]:
    """Compare files in parallel; return the rows, and (bytes, seconds, share spent on reading)."""
    lock, start, bar = threading.Lock(), time.perf_counter(), bytes_bar(total, directory.name)

    def compare(name: str) -> tuple[Row, int, float, float]:
        counts, reads, began = [], [], time.perf_counter()

        def advance(count: int) -> None:
            counts.append(count)
            with lock:
                bar.update(count)

        facts = known.get(name, FileFacts())
        row = compare_file(directory / name, name, facts, advance, on_read=reads.append)
        return row, sum(counts), sum(reads), time.perf_counter() - began

    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        compared = list(pool.map(compare, names))
    count, reading, busy = (sum(each[i] for each in compared) for i in (1, 2, 3))
    seconds = time.perf_counter() - start if count else 0.0
    return [row for row, *_ in compared], (count, seconds, reading / busy if busy else 0.0)


def _files(directory: Path, but: Container[str] = ()) -> dict[str, int]:
    """Return {path inside `directory`: bytes}, without downloads that are still under way."""
    files = {
        file.relative_to(directory).as_posix(): file.stat().st_size
        for file in sorted(directory.rglob("*"))
        if file.is_file() and not _is_unfinished(file)
    }
    return {name: size for name, size in files.items() if name not in but}


def _is_unfinished(file: Path) -> bool:
    """Whether a file is a download under way, or the sidecar of one."""
    partial = file.with_suffix("") if file.suffix == ".json" else file
    return partial == partial_of(partial.with_suffix(""))


def _is_weights(file: Path) -> bool:
    return file.name.endswith((".safetensors", ".bin", ".pth", ".index.json"))


def _compare_tensors(ours: Checkpoint, theirs: Checkpoint) -> list[Row]:
    """Return a row for all tensors, and one for each of the first that differ and by how much.

    Read block by block, so memory does not grow with the model.
    """
    differ, sums = [], {}
    names = dict.fromkeys([*ours.tensors, *theirs.tensors])
    with bytes_bar(ours.total_bytes, "tensors") as bar:
        for name in names:
            mine, other = ours.tensors.get(name), theirs.tensors.get(name)
            cause = ""
            if mine and other and mine.shape == other.shape:
                cause, sha256 = _compare_tensor(ours, theirs, name, bar.update)
                sums[name] = (mine, sha256)
            if cause or mine != other:
                differ.append(Row("WRONG", name, _described(mine), _described(other), cause))
    if not differ:
        return [Row("OK", TENSORS, *[f"tensors {tensor_digest(sums)}"] * 2)]
    if ours.layout != theirs.layout:
        cause = "One is in Meta layout and one in HF layout: convert the one, then compare."
        return [Row("WRONG", TENSORS, cause=cause)]
    cause = f"{len(differ):,} of {len(names):,} tensors differ, {differ[0].name} first."
    return [Row("WRONG", TENSORS, cause=cause), *differ[:FIRST]]


def _described(tensor: TensorSpec | None) -> str:
    if tensor is None:
        return "absent"
    return f"{SAFETENSORS_NAMES[tensor.dtype]} {'x'.join(map(str, tensor.shape))}"


def _compare_tensor(
    ours: Checkpoint, theirs: Checkpoint, name: str, on_bytes: Callable[[int], object]
) -> tuple[str, str]:
    """Return how a tensor that both have in one shape differs, or "", and the sha256 of ours."""
    spec, sha256, count, most = ours.tensors[name], hashlib.sha256(), 0, 0.0
    for start, stop in spec.blocks():
        block = ours.read(name, start, stop)
        changed, distance = _difference(block, theirs.read(name, start, stop))
        sha256.update(raw_bytes(block))
        count, most = count + changed, max(most, distance)
        on_bytes(block.nbytes)
    cause = f"{count:,} of {math.prod(spec.shape):,} values differ, by {most:.3g} at most."
    return cause if count or spec != theirs.tensors[name] else "", sha256.hexdigest()


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[int, float]:
    """Return how many values differ, and the most by which one does (infinite where one is NaN)."""
    if ours.dtype == theirs.dtype:  # by their bits, so that a NaN equals itself
        kind = {2: torch.int16, 4: torch.int32}[ours.dtype.itemsize]
        changed = ours.contiguous().view(kind) != theirs.contiguous().view(kind)
    else:
        changed = ours.float() != theirs.float()
    distances = (ours[changed].double() - theirs[changed].double()).abs()
    if not len(distances):
        return 0, 0.0
    return len(distances), float(distances.nan_to_num(nan=math.inf, posinf=math.inf).max())
