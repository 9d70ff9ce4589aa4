"""Verifying: a whole directory held against what is published or recorded of its files."""

from __future__ import annotations

import html
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from . import catalog, places
from .catalog import FileFacts
from .checkpoint import digest_tensors, open_checkpoint, read_json, tensor_digest
from .digest import Row, checklist_facts, hash_file, judge
from .errors import LabError, NotFound
from .progress import bytes_bar
from .writer import RECORD


@dataclass(frozen=True)
class Verification:
    """A row for each file of a directory."""

    path: Path
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether something could be compared and nothing is wrong or missing."""
        statuses = {row.status for row in self.rows}
        return "OK" in statuses and not statuses & {"WRONG", "MISSING"}

    def as_dict(self) -> dict:
        return {"path": str(self.path), "ok": self.ok, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        lines, width = [], max((len(row.file) for row in self.rows), default=0)
        for row in self.rows:
            good = row.status == "OK"
            names = ", ".join(part.split()[0] for part in row.expected.split(", ")) if good else ""
            lines.append(f"{row.status:8} {row.file:{width}}  {names}".rstrip())
            details = {} if good else {k: getattr(row, k) for k in ("expected", "found", "cause")}
            lines += [f"{'':8}   {key:9} {text}" for key, text in details.items() if text]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        keys = ("status", "file", "expected", "found", "cause")
        cells = [[html.escape(getattr(row, key)) for key in keys] for row in self.rows]
        body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in cells)
        return f"<table><tr>{''.join(f'<th>{key}</th>' for key in keys)}</tr>{body}</table>"


def verify(
    path: str | os.PathLike,
    as_name: str | None = None,
    models_dir: str | os.PathLike = "",
    against: str | os.PathLike | None = None,
) -> Verification:
    """Compare every file of a directory with what is published or recorded of it.

    `path` is a directory or a name under the models directory. Known are: the catalogue's facts
    of the part that the directory's name, or `as_name`, says; the directory's checklists; its
    `llamalab.json`, if llamalab made it; with `against`, the files of another directory instead.

    Raises:
        NotFound: there is no such directory, no such part, or no file in the directory.
    """
    directory = places.locate(path, models_dir).resolve()
    parts = catalog.parts()
    if as_name and as_name not in parts:
        raise catalog.unknown(as_name, parts, "part")
    here = _files(directory)
    rows, known = [], {}
    if against is not None:
        other = places.locate(against, models_dir).resolve()
        here.pop(RECORD, None)  # how they were made may differ
        for name, size in _files(other).items():
            if name == RECORD:
                continue
            known[name] = FileFacts(size, sha256=hash_file(other / name)["sha256"])
    elif (directory / RECORD).exists():
        rows, known, covered = _verify_made(directory)
        here = {name: size for name, size in here.items() if name not in covered}
    else:
        known, rows = checklist_facts(directory)
        part = parts.get(as_name or directory.name)
        for name, facts in part.files.items() if part else ():
            known[name] = replace(facts, md5=facts.md5 or known.get(name, FileFacts()).md5)
    names = sorted((here.keys() | known.keys()) - {row.file for row in rows})
    if not names and not rows:
        raise NotFound(f"There is no file in '{directory}'.", "", "Give the directory of a model.")
    lock = threading.Lock()
    with bytes_bar(sum(here.values()), directory.name) as bar, ThreadPoolExecutor() as pool:

        def advance(count: int) -> None:
            with lock:
                bar.update(count)

        def row_of(name: str) -> Row:
            return judge(directory / name, name, known.get(name, FileFacts()), advance)

        rows += pool.map(row_of, names)
    return Verification(directory, tuple(sorted(rows, key=lambda row: row.file)))


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
        return [Row("(tensors)", "WRONG", expected, cause=error.why or error.what)], known, covered
    found = "tensors " + tensor_digest({n: (made.tensors[n], sha) for n, sha in sums.items()})
    then = record.get("tensors", {})
    changed = [name for name in sorted(sums | then) if sums.get(name) != then.get(name)]
    cause = f"{len(changed)} of {len(sums)} tensors differ, {changed[0]} first." if changed else ""
    status = "OK" if found == expected else "WRONG"
    return [Row("(tensors)", status, expected, found, cause)], known, covered
