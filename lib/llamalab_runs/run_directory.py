"""The directory of one run: the executed notebook, its HTML, and `manifest.json`."""

import contextlib
import copy
import hashlib
import json
import os
import platform
import secrets
import shutil
import subprocess
import time
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path

import nbformat
from nbformat import NotebookNode, v4

from llamalab import __version__
from llamalab.catalog import project_directory
from llamalab.files import write_whole

from .html_report import write_report
from .notebooks import Notebook

MANIFEST = "manifest.json"
BANNER = "papermill-error-cell-tag"  # papermill takes cells with this tag out of a next run


class Status(StrEnum):
    """What became of a run, and of each of its code cells."""

    OK = "ok"
    FAILED = "failed"
    KILLED = "killed"  # the kernel died
    TIMEOUT = "timeout"  # a cell took too long
    NOT_RUN = "not run"  # a cell that was not reached; a run is never that


@dataclass(frozen=True)
class Job:
    """One notebook that is to run once.

    Attributes:
        parameters: values that fit.
        directory: where the run will lie; it appears whole, under this name, or not at all.
        cell_timeout: seconds that one cell may take.
        memory_limit: bytes of its own that the kernel may hold.
    """

    notebook: Notebook
    parameters: dict
    directory: Path
    cell_timeout: int | None = None
    memory_limit: int | None = None


@dataclass
class Run:
    """One run of one notebook, as `manifest.json` holds it.

    `status` is a `Status`; `results` are what the notebook recorded; each of `cells` holds index
    (in the executed notebook), status, seconds and peak_rss_bytes of the kernel's process;
    `digests` are sha256.
    """

    notebook: str
    parameters: dict
    directory: Path
    status: str = Status.FAILED
    error: str = ""
    seconds: float = 0.0
    peak_rss_bytes: int | None = None
    versions: dict = field(default_factory=dict)
    commit: str | None = None
    cells: list[dict] = field(default_factory=list)
    results: dict = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        return self.directory / f"{Path(self.notebook).stem}.html"


def new_directory(output_dir: str | Path, notebook: Notebook, key: str = "") -> Path:
    """Return a name that no other run has: `<UTC>-<stem>-<6 hex>`, the last by chance or `key`."""
    began = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name = f"{began}-{notebook.path.stem}-{key or secrets.token_hex(3)}"
    return Path(output_dir).absolute() / name


def read_run(directory: Path) -> Run | None:
    """Return the run that a directory holds, or None where there is no whole one."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return Run(**manifest | {"directory": directory})
    except (OSError, ValueError, TypeError):
        return None


def partial_directory(directory: Path) -> Path:
    """Return where a run lies until it is whole."""
    return directory.with_name(f".{directory.name}.partial")


def abandon(directory: Path) -> None:
    """Remove what there is of a run that is not whole, though its writer may be at work still."""
    partial = partial_directory(directory)
    # Under another name nothing can be added to it, nor can it become a whole run.
    gone = partial.with_name(f".{directory.name}.gone.partial")
    with contextlib.suppress(OSError):
        os.rename(partial, gone)
    shutil.rmtree(gone, ignore_errors=True)


def write_run(run: Run, notebook: NotebookNode, source_digest: str) -> None:
    """Write notebook, report and manifest into a run's partial directory; give it its name."""
    partial = partial_directory(run.directory)
    run.versions, run.commit = _versions(), _commit()
    about = notebook.metadata.setdefault("papermill", {})
    about |= {"input_path": run.notebook, "output_path": run.notebook}
    about |= {"exception": run.status != Status.OK}
    notebook.metadata.setdefault("llamalab", {}).update(status=run.status, error=run.error)
    if run.status != Status.OK:
        text = "".join(f"    {line}\n" for line in (run.error or "failed").splitlines())
        banner = v4.new_markdown_cell(f"**This run: {run.status}**\n\n{text}")
        banner.metadata["tags"] = [BANNER]
        notebook.cells.insert(0, banner)
        for cell in run.cells:
            cell["index"] += 1
    executed, report = partial / run.notebook, partial / run.report.name
    write_whole(executed, nbformat.writes(notebook))
    write_report(notebook, report)
    run.digests = {"source": source_digest}
    for name, file in (("executed", executed), ("report", report)):
        run.digests[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    write_whole(partial / MANIFEST, as_json(run))
    (partial / "journal").unlink(missing_ok=True)
    os.replace(partial, run.directory)


def write_unrun(job: Job, status: Status, error: str) -> Run:
    """Write and return the run of a job that nobody is left to tell of: no cell has run."""
    run = Run(job.notebook.path.name, job.parameters, job.directory, status, error)
    notebook = copy.deepcopy(job.notebook.node)
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            unknown = {"status": Status.NOT_RUN, "seconds": None, "peak_rss_bytes": None}
            run.cells.append({"index": index} | unknown)
    partial_directory(job.directory).mkdir(parents=True)
    write_run(run, notebook, job.notebook.digest)
    return run


def as_json(run: Run) -> str:
    """Return the text of a manifest."""
    manifest = asdict(run) | {"directory": str(run.directory)}
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "transformers", "papermill", "nbclient")}
    return {"llamalab": __version__, "python": platform.python_version()} | packages


def _commit() -> str | None:
    """Return the checkout's commit, or None outside a checkout."""
    command = ["git", "-C", str(project_directory()), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
