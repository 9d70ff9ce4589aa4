"""What the tests of downloading share: a small part of a catalogue, served over loopback HTTP.

`tables` and `loop` are fixtures of the modules that say so: `loop = pytest.fixture(served.loop)`.
"""

import hashlib
import io
import os
import subprocess
import sys
import textwrap
import zipfile
from collections import namedtuple

from llamalab.catalog.catalog import FileFacts, ModelEntry, Part
from llamalab.downloads import file_download, transfer
from llamalab_course.file_server import serve_files


def archive(size: int) -> bytes:
    """Return a zip archive of `size` random bytes and a little more, as PyTorch's files are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        blocks = (hashlib.sha256(i.to_bytes(8, "little")).digest() for i in range(size // 32))
        file.writestr("consolidated/data/0", b"".join(blocks))
    return buffer.getvalue()


WEIGHTS, PARAMS, TOKENIZER = archive(300_000), b'{"dim": 8}\n', b"\n\x0e\n\x05<unk>"
CHECKLIST = f"{hashlib.md5(PARAMS).hexdigest()}  params.json\n".encode()
CONTENT = {
    "S/checklist.chk": CHECKLIST,
    "S/consolidated.00.pth": WEIGHTS,
    "S/params.json": PARAMS,
    "tokenizer.model": TOKENIZER,
}
BIG, SHA256 = "tiny/S/consolidated.00.pth", hashlib.sha256(WEIGHTS).hexdigest()

Set = namedtuple("Set", "served models download url log faults")


def facts(content: bytes) -> FileFacts:
    md5, sha256 = (hashlib.new(k, content).hexdigest() for k in ("md5", "sha256"))
    return FileFacts(len(content), md5, sha256)


def tables(monkeypatch):
    """A catalogue of one base, of which two digests are known, and one adapter."""
    files = {name: FileFacts() for name in CONTENT}
    files["S/consolidated.00.pth"] = facts(WEIGHTS)
    files["tokenizer.model"] = FileFacts(sha256=hashlib.sha256(TOKENIZER).hexdigest())
    parts = {
        "tiny": Part("tiny", "base", files, vocab=8),
        "tiny-lora": Part("tiny-lora", "adapter", {"a.json": FileFacts()}, 8, source="hf:me/lora"),
    }
    models = {"tiny-model": ModelEntry("tiny-model", parts["tiny"], (parts["tiny-lora"],))}
    monkeypatch.setattr("llamalab.catalog.catalog._tables", lambda: (parts, models))
    return parts


def lay_out(folder, content=CONTENT):
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def whole(models, part="tiny") -> bool:
    """Whether the part holds exactly the published bytes, and nothing else."""
    files = {p for p in (models / part).rglob("*") if p.is_file()}
    return {p.relative_to(models / part).as_posix(): p.read_bytes() for p in files} == CONTENT


def accepted(models) -> set[str]:
    """The names of the files that have got their final name."""
    files = {p.name for p in models.rglob("*") if p.is_file()} if models.exists() else set()
    return {name for name in files if ".partial" not in name}


def ranges(log, path=BIG):
    """The ranges that were asked for of a file, and the status of each answer."""
    return [(r.range, r.status) for r in log if r.path == path]


class Acts(dict):
    """Faults that come one after the other, a request each; None is an honest answer."""

    def __init__(self, path, acts):
        super().__init__()
        self.path, self.acts = path, list(acts)

    def get(self, name, default):
        """Return the next act for the file, or an honest answer."""
        return (self.acts.pop(0) or default) if self.acts and name == self.path else default


def loop(tables, tmp_path, monkeypatch):
    """A mirror that serves the part "tiny", and a download from it."""
    monkeypatch.setattr(file_download, "BACK_OFF_SECONDS", 0.001)
    monkeypatch.setattr(file_download, "STALL_SECONDS", 0.5)
    served, models, log, faults = lay_out(tmp_path / "served" / "tiny"), tmp_path / "models", [], {}
    with serve_files(served.parent, faults, log) as url:

        def download(source=url, name="tiny"):
            return transfer.download(name, models, [source])

        yield Set(served, models, download, url, log, faults)


CHILD = """
    import sys
    from llamalab.catalog import FileFacts, Part, catalog
    from llamalab.cli import main
    from llamalab.downloads import transfer
    sha256, url, models, name, *options = sys.argv[1:]
    part = Part("tiny", "base", {name: FileFacts(sha256=sha256)}, vocab=8)
    catalog._tables = lambda: ({"tiny": part}, {})
    transfer.PIECE = 1 << 20
    command = ["download", "tiny", "--models-dir", models, "--source", url, *options]
    sys.exit(main(command))
"""


def child(sha256, *arguments, **environment):
    """Start a process: `llamalab download tiny`; arguments are url, models, name, options."""
    command = [sys.executable, "-c", textwrap.dedent(CHILD), sha256, *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE)
