"""Verifying: a whole directory held against what is published or recorded of its files."""

import os
import shlex
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from .. import catalog, checkpoints
from ..catalog import FileFacts, locate
from ..checkpoints import RECORD, Checkpoint, TensorSpec
from ..errors import LabError, NotFound
from ..files import partial_of
from ..progress import bytes_bar
from ..reports import Report, Row
from ..units import size_text
from . import misplaced_files

TENSORS = "(tensors)"  # the row that speaks of all of them
WEIGHTS = (".safetensors", ".bin", ".pth", ".index.json")  # how the names of their files end
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
    moves: tuple[misplaced_files.Move, ...] = ()
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
        ours, theirs = checkpoints.open_checkpoint(directory), checkpoints.open_checkpoint(other)
    except LabError:
        pass  # an adapter, or files that are no model: bytes are compared
    else:
        rows = _compare_tensors(ours, theirs)
        for root, checkpoint in ((directory, ours), (other, theirs)):
            inside = [file for file in checkpoint.inputs if file.is_relative_to(root)]
            weights = [file for file in inside if file.name.endswith(WEIGHTS)]
            covered |= {file.relative_to(root).as_posix() for file in weights}
    known = {}
    for name, size in _files(other, covered).items():
        known[name] = FileFacts(size, sha256=checkpoints.hash_file(other / name)["sha256"])
    return _report(directory, _files(directory, covered), known, rows)


def _verify_made(directory: Path) -> Verification:
    """Check a directory that llamalab made, by its record: tensors by their digests.

    All tensors together have one row; a container's bytes may differ where its tensors do not.
    """
    record = checkpoints.read_json(directory / RECORD)
    small = record.get("settings", {}).get("files", {})
    known = {name: FileFacts(sha256=sha256) for name, sha256 in small.items()}
    expected, covered = f"tensors {record.get('tensor_digest', '')}", {RECORD}
    try:
        made = checkpoints.open_checkpoint(directory)
        covered |= {path.name for path in made.inputs} - known.keys()
        with bytes_bar(made.total_bytes, "tensors") as bar:
            sums = checkpoints.digest_tensors(made, bar.update)
        digest = checkpoints.tensor_digest({n: (made.tensors[n], sha) for n, sha in sums.items()})
        recorded = record.get("tensors", {})
        changed = [n for n in sorted(sums | recorded) if sums.get(n) != recorded.get(n)]
        cause = _first_of(changed, sums) if changed else ""
        status = "OK" if digest == record.get("tensor_digest") else "WRONG"
        row = Row(status, TENSORS, f"tensors {digest}", expected, cause)
    except LabError as error:
        row = Row("WRONG", TENSORS, "", expected, error.why or error.what)
    return _report(directory, _files(directory, covered), known, [row])


def _verify_published(directory: Path, as_name: str | None, fix: bool) -> Verification:
    """Compare with what the catalogue and the directory's own checklists say of its files."""
    catalogue, files = catalog.parts(), _files(directory)
    part = catalogue.get(as_name or directory.name)
    parts = [part] if part else checkpoints.recognise_bases(directory, files)
    inside = [part for part in catalogue.values() if (directory / part.name).is_dir()]
    known, rows = checkpoints.checklist_facts(directory)
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
    for move in moves:
        known[move.found] = known[move.place]
        cause = f"It lies at '{move.found}'; --fix moves it."
        rows.append(Row("MISSING", move.place, cause=cause))
    names = dict.fromkeys(part.name for part in [*parts, *inside])
    report = _report(directory, files, known, rows)
    return replace(report, parts=tuple(names), moves=tuple(moves))


def _report(
    directory: Path, files: dict[str, int], known: dict[str, FileFacts], rows: list[Row]
) -> Verification:
    """Compare in parallel the files that are there or known, but those that `rows` speak of."""
    names = sorted((files.keys() | known.keys()) - {row.name for row in rows})
    if not names and not rows:
        raise NotFound(f"There is no file in '{directory}'.", "", "Give the directory of a model.")
    start, counts, reads, busy = time.perf_counter(), [], [], []

    def advance(count: int) -> None:
        counts.append(count)
        with bar.get_lock():  # files are read side by side
            bar.update(count)

    def compare(name: str) -> Row:
        began, facts = time.perf_counter(), known.get(name, FileFacts())
        row = checkpoints.compare_file(directory / name, name, facts, advance, on_read=reads.append)
        busy.append(time.perf_counter() - began)
        return row

    total = sum(files.values())
    with bytes_bar(total, directory.name) as bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = sorted([*rows, *pool.map(compare, names)], key=lambda row: row.name)
    report = Verification(directory, tuple(rows))
    if not counts or any(row.name == TENSORS for row in rows):
        return report  # nothing was read, or the larger part elsewhere
    seconds = time.perf_counter() - start
    return replace(report, bytes=sum(counts), seconds=seconds, read_share=sum(reads) / sum(busy))


def _files(directory: Path, but: Collection[str] = ()) -> dict[str, int]:
    """Return {path inside `directory`: bytes}, without downloads that are still under way."""
    files = {}
    for file in sorted(directory.rglob("*")):
        name = file.relative_to(directory).as_posix()
        partial = file.with_suffix("") if file.suffix == ".json" else file  # of which it speaks
        is_unfinished = partial == partial_of(partial.with_suffix(""))
        if file.is_file() and not is_unfinished and name not in but:
            files[name] = file.stat().st_size
    return files


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
                cause, sha256 = _compare_tensor(ours, theirs, name, bar)
                sums[name] = (mine, sha256)
            if cause or mine != other:
                differ.append(Row("WRONG", name, _described(mine), _described(other), cause))
    if not differ:
        return [Row("OK", TENSORS, *[f"tensors {checkpoints.tensor_digest(sums)}"] * 2)]
    cause = _first_of([row.name for row in differ], names)
    if ours.layout != theirs.layout:
        cause = "One is in Meta layout and one in HF layout: convert the one, then compare."
        differ = []
    return [Row("WRONG", TENSORS, cause=cause), *differ[:FIRST]]


def _first_of(differ: list[str], names: Collection[str]) -> str:
    return f"{len(differ):,} of {len(names):,} tensors differ, {differ[0]} first."


def _described(tensor: TensorSpec | None) -> str:
    if tensor is None:
        return "absent"
    return f"{checkpoints.SAFETENSORS_NAMES[tensor.dtype]} {'x'.join(map(str, tensor.shape))}"


def _compare_tensor(ours: Checkpoint, theirs: Checkpoint, name: str, bar) -> tuple[str, str]:
    """Return how a tensor that both have in one shape differs, or "", and the sha256 of ours.

    The most by which a value differs is infinite where one is NaN.
    """
    spec, digests, count, most = ours.tensors[name], checkpoints.Digests(["sha256"]), 0, 0.0
    for start, stop in spec.blocks():
        block, other = ours.read(name, start, stop), theirs.read(name, start, stop)
        digests.update(checkpoints.raw_bytes(block))
        if block.dtype == other.dtype:  # by their bits, so that a NaN equals itself
            kind = {2: torch.int16, 4: torch.int32}[block.dtype.itemsize]
            changed = block.contiguous().view(kind) != other.contiguous().view(kind)
        else:
            changed = block.float() != other.float()
        distances = (block[changed].double() - other[changed].double()).abs()
        if len(distances):
            count += len(distances)
            most = max(most, float(distances.nan_to_num(nan=torch.inf, posinf=torch.inf).max()))
        bar.update(block.nbytes)
    cause = f"{count:,} of {torch.Size(spec.shape).numel():,} values differ, by {most:.3g} at most."
    differ = count or spec != theirs.tensors[name]
    return cause if differ else "", digests.hexdigests()["sha256"]
