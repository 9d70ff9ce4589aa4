"""The directory of one run: the executed notebook, its HTML, and `manifest.json`."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import nbformat
from nbformat import NotebookNode, v4

from llamalab import __version__
from llamalab.catalog import project_directory
from llamalab.files import write_whole

from .html_report import write_report


def new_directory(output_dir: str | Path, notebook: Path, key: str = "") -> Path:
    """Return a name that no other run has: `<UTC>-<stem>-<6 hex>`, the last by chance or `key`."""
    began = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return Path(output_dir).absolute() / f"{began}-{notebook.stem}-{key or secrets.token_hex(3)}"


MANIFEST = "manifest.json"
BANNER = "papermill-error-cell-tag"  # papermill takes cells with this tag out of a next run


@dataclass
class Run:
    """One run of one notebook, as `manifest.json` holds it.

    `status` is "ok", "failed", "killed" (the kernel died) or "timeout" (a cell took too long);
    `results` are what the notebook recorded; each of `cells` holds index (in the executed
    notebook), status, seconds and peak_rss_bytes of the kernel's process; `digests` are sha256.
    """

    notebook: str
    parameters: dict
    directory: Path
    status: str = "failed"
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


def read_run(directory: Path) -> Run | None:
    """Return the run that a directory holds, or None where there is no whole one."""
    try:
        held = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return Run(**held | {"directory": directory})
    except (OSError, ValueError, TypeError):
        return None


def partial_directory(directory: Path) -> Path:
    """Return where a run lies until it is whole."""
    return directory.with_name(f".{directory.name}.partial")


def write_run(run: Run, notebook: NotebookNode, source_digest: str) -> None:
    """Write a run's directory: notebook, report, manifest; then give it its name."""
    partial = partial_directory(run.directory)
    partial.mkdir(parents=True, exist_ok=True)
    run.versions, run.commit = _versions(), _commit()
    told = notebook.metadata.setdefault("papermill", {})
    told |= {"input_path": run.notebook, "output_path": run.notebook}
    told |= {"exception": run.status != "ok"}
    notebook.metadata["llamalab"] = {"status": run.status, "error": run.error}
    if run.status != "ok":
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
        run.digests[name] = notebook_digest(file)
    write_whole(partial / MANIFEST, as_json(run))
    (partial / "journal").unlink(missing_ok=True)
    os.replace(partial, run.directory)


def write_unrun(run: Run, source: Path) -> None:
    """Write the directory of a run that nobody is left to tell of: no cell of `source` has run."""
    notebook = nbformat.read(source, as_version=4)
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            unknown = {"status": "not run", "seconds": None, "peak_rss_bytes": None}
            run.cells.append({"index": index} | unknown)
    write_run(run, notebook, notebook_digest(source))


def as_json(run: Run) -> str:
    """Return the text of a manifest."""
    held = asdict(run) | {"directory": str(run.directory)}
    return json.dumps(held, indent=2, ensure_ascii=False) + "\n"


def notebook_digest(file: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "papermill", "nbclient")
    found = {name: version(name) for name in names}
    return {"llamalab": __version__, "python": platform.python_version()} | found


def _commit() -> str | None:
    """Return the checkout's commit, or None outside a checkout."""
    command = ["git", "-C", str(project_directory()), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
