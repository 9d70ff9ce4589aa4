"""Downloading: every file of a model comes to its place with the right bytes, or not at all.

A model is its parts, a part its files; each file is asked for at every source, by every form of
its path, until one has it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from .. import catalog
from ..checkpoints import bytes_arrived, checklist_facts, compare_file, is_safe_relative
from ..errors import DamagedFile, LabError, NotFound
from ..files import locked, require_room
from ..progress import bytes_bar, say
from ..units import size_text
from . import sources
from .file_download import FileDownload

CONNECTIONS = 4  # at once for one large file, where the server gives parts of it
PIECE = 32 << 20  # bytes that a connection takes on
COPIED_BELOW = 64 << 20  # bytes of a local file; a larger one is linked


def download(
    name: str,
    models_dir: str | Path = "",
    source: str | list[str] = "",
    connections: int = CONNECTIONS,
) -> list[Path]:
    """Bring every part of `name`, a model or a part, to its directory; return the directories.

    Args:
        source: `[PART=]WHERE`, once or several times; WHERE is an http(s) URL,
            `hf:OWNER/REPO[@REVISION]` or a directory. Without `PART=` it is for every part that
            has no default source.
        connections: how many to use at once for one large file, at most.

    Files that are there and right are kept. `WHERE/PART/FILE` is tried, then `WHERE/FILE`,
    then the file's bare name.

    Raises:
        UsageError, NotFound, DamagedFile, DownloadFailed, NotEnoughRoom: nothing wrong is kept.
    """
    parts = catalog.parts_of(name)
    given = [source] if isinstance(source, str) else source
    by_part = sources.assign(parts, [item for item in given if item])
    root = catalog.models_directory(models_dir)
    needed = sum(_needed(part, root / part.name) for part in parts if by_part[part.name])
    if needed > 0:
        free = size_text(require_room(root, needed))
        say(f"{name}: about {size_text(needed)} to download to '{root}', where {free} are free.")
    for part in parts:
        PartDownload(part, root / part.name, by_part[part.name], connections, name).run()
    return [root / part.name for part in parts]


def _needed(part: catalog.Part, directory: Path) -> int:
    """Return the bytes that are still to come, an adapter's weights by arithmetic."""
    total = 0
    for name, facts in part.files.items():
        path, size = directory / name, facts.size
        base = catalog.parts().get(part.base)
        if size is None and base and name.startswith("adapter_model"):
            size = catalog.adapter_bytes(part, base.shape)
        if not path.is_file() or facts.size not in (None, path.stat().st_size):
            total += max(0, (size or 0) - bytes_arrived(path))
    return total


@dataclass(eq=False)
class PartDownload:
    """One part of a model on its way to its directory.

    Attributes:
        part: as the catalogue has it.
        directory: where its files belong.
        sources: where it may come from, to be tried in order.
        connections: how many are used at once for one large file, at most.
        asked: the name of model or part that the reader gave.
    """

    part: catalog.Part
    directory: Path
    sources: list[str]
    connections: int
    asked: str
    _form: int = 0  # of the path, that led to a file last; it is tried first

    def run(self) -> None:
        """Bring the files of the part; those that are there and right are left alone."""
        files = self.part.files
        if not files:
            raise NotFound(f"The catalogue lists no file of '{self.part.name}'.")
        total = sum(facts.size or 0 for facts in files.values())
        with bytes_bar(total or None, self.part.name) as self._bar:
            # Checklists first: what they say then holds for the other files too.
            self._bring([name for name in files if name.endswith("checklist.chk")])
            self._bring([name for name in files if not name.endswith("checklist.chk")])

    def _bring(self, names: list[str]) -> None:
        wanted = self._wrong(names, self._bar.update)
        if not wanted:
            return
        if not self.sources:
            part, names = self.part.name, self.part.files
            missing = [name for name in names if not (self.directory / name).is_file()]
            raise NotFound(
                f"'{part}' has no default source (missing or wrong: {', '.join(missing or names)}).",
                "Meta's weights are under a licence: you bring a licensed copy, we ship none.",
                f"Run 'llamalab download {self.asked} --source {part}=WHERE', where WHERE is the "
                "directory, address or hf:OWNER/REPO of your copy.",
            )
        with locked(self.directory):
            # Once more: another process may have brought them while we waited for the lock.
            for name, facts in self._wrong(list(wanted)).items():
                self._bring_file(name, facts)

    def _wrong(self, names: list[str], on_bytes=None) -> dict[str, catalog.FileFacts]:
        """Return what is known of those files that are missing or wrong."""
        known = {name: self._known(name) for name in names}
        rows = [compare_file(self.directory / name, name, known[name], on_bytes) for name in known]
        return {row.name: known[row.name] for row in rows if row.is_bad}

    def _known(self, name: str) -> catalog.FileFacts:
        """Return the catalogue's facts of a file, with the md5 of the part's checklist."""
        if not is_safe_relative(name):
            raise DamagedFile(f"The file name '{name}' leads outside the part's directory.")
        facts = self.part.files[name]
        md5 = checklist_facts(self.directory)[0].get(name, catalog.FileFacts()).md5
        if facts.md5 and md5 and facts.md5.lower() != md5:
            what = f"The checklist of '{self.part.name}' contradicts the published md5 of '{name}'."
            fix = f"Remove it in '{self.directory}' and download again, from another source."
            raise DamagedFile(what, "", fix, finding="damaged-file")
        return replace(facts, md5=facts.md5 or md5)

    def _bring_file(self, name: str, facts: catalog.FileFacts) -> None:
        """Try every source, and in each every form of the path, the one that worked last first."""
        failure: LabError | None = None
        (self.directory / name).parent.mkdir(parents=True, exist_ok=True)
        forms = [f"{self.part.name}/{name}", name, name.rpartition("/")[2]]
        last = forms[self._form]
        for source in self.sources:
            for path in dict.fromkeys([last, *forms]):
                try:
                    self._bring_from(source, path, name, facts)
                except sources.NotHere as error:
                    failure = failure or error.__cause__
                except DamagedFile as error:
                    failure = failure or error  # a page in place of a "404", perhaps
                else:
                    self._form = self._form if path == last else forms.index(path)
                    return
        raise failure or NotFound(
            f"'{name}' was not found in {' or '.join(map(sources.shown, self.sources))}.",
            f"'{forms[0]}' was tried there, and the shorter forms of that path.",
            "Give the address of the directory that holds the file, as --source PART=WHERE.",
        )

    def _bring_from(self, source: str, path: str, name: str, facts: catalog.FileFacts) -> None:
        """Bring the file `path` of one source, out of the Hub's cache if it lies there."""
        what = (self.directory / name, name, facts, self._bar, self.connections, PIECE)
        if file := sources.local_file(source, path):
            try:
                return FileDownload(*what, str(file), {}).copy(COPIED_BELOW)
            except DamagedFile:
                if not source.startswith("hf:"):
                    raise
                say(f"'{path}' in the Hub cache is damaged; it is left there and fetched anew.")
        FileDownload(*what, *sources.address(source, path)).fetch()
