"""Where files come from: what a WHERE means, and which address a file has there."""

import contextlib
import re
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import huggingface_hub.utils

from ..catalog import Part, project_directory
from ..errors import DownloadFailed, NotFound, UsageError


class NotHere(Exception):
    """There is no such file; another form of its path may be tried. Its cause says more, if any."""


def assign(parts: tuple[Part, ...], sources: list[str]) -> dict[str, list[str]]:
    """Return {part name: its sources, to be tried in order}.

    Raises:
        UsageError, NotFound: a source that is none, or that is for no part.
    """
    by_part: dict[str, list[str]] = {part.name: [] for part in parts}
    for source in sources:
        named = re.fullmatch(r"(?s)([\w.-]+)=(.*)", source)
        head, where = named.groups() if named else ("", source)
        if named and head not in by_part:
            raise UsageError(f"'{head}' is not a part of it.", f"It has {', '.join(by_part)}.")
        _require_readable(where)
        takers = [head] if named else [part.name for part in parts if part.source is None]
        if not takers:
            fix = f"Write it as {parts[0].name}=WHERE to replace the default source of that part."
            raise UsageError(f"The source {shown(where)} is for no part.", "", fix)
        for taker in takers:
            by_part[taker].append(where)
    for part in parts:
        if part.source and not by_part[part.name]:
            lab = project_directory() / "data" / "lab"
            if part.source == "lab" and not lab.is_dir():
                fix = "Clone the project and run llamalab from there."
                raise NotFound("The lab family lies in the checkout's data/lab.", "", fix)
            by_part[part.name].append(str(lab) if part.source == "lab" else part.source)
    return by_part


def _require_readable(where: str) -> None:
    """Refuse what is neither an http(s) address, nor hf:OWNER/REPO, nor a directory."""
    with contextlib.suppress(httpx.InvalidURL, ValueError):
        if hub := re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(@[\w./-]+)?", where):
            return huggingface_hub.utils.validate_repo_id(hub[1])
        if re.match("https?://[^/]", where) and httpx.URL(where).host and urlsplit(where).port != 0:
            return
    if re.match(r"[\w+.-]+://|hf:|https?:", where):
        what = f"'{shown(where)}' is not a complete address or Hub repository."
        raise UsageError(what, "A source is an http(s):// address, hf:OWNER/REPO or a directory.")
    if not where or "\0" in where or not Path(where).expanduser().is_dir():
        raise NotFound(f"There is no directory {where!r}.", "It was given as a source.")


def local_file(where: str, path: str) -> Path | None:
    """Return the file `path` of a source where it lies on this machine, or None.

    Of a directory that is the file itself, of a Hub repository what the Hub's own cache holds.
    """
    if where.startswith("hf:"):
        file = huggingface_hub.try_to_load_from_cache(**_repository(where), filename=path)
        return Path(file) if isinstance(file, str) else None
    file = Path(where).expanduser() / path
    return file if file.is_file() else None


def address(where: str, path: str) -> tuple[str, dict[str, str]]:
    """Return the URL of the file `path` in a source, and the headers that go with it.

    Raises:
        NotHere: the source is a directory, or HF_HUB_OFFLINE forbids to ask the Hub.
    """
    if where.startswith(("http://", "https://")):
        url = urlsplit(where)
        whole = url._replace(path=f"{url.path.rstrip('/')}/{quote(path)}", fragment="")
        return whole.geturl(), {}
    if not where.startswith("hf:"):
        raise NotHere
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        what = f"'{path}' of {where} is not whole in the Hub cache, and HF_HUB_OFFLINE is set."
        fix = "Unset HF_HUB_OFFLINE, or give a directory as --source PART=WHERE."
        raise NotHere from DownloadFailed(what, "", fix)
    url = huggingface_hub.hf_hub_url(**_repository(where), filename=path)
    return url, huggingface_hub.utils.build_hf_headers(library_name="llamalab")


def _repository(where: str) -> dict[str, str | None]:
    repository, _, revision = where.removeprefix("hf:").partition("@")
    return {"repo_id": repository, "revision": revision or None}


def shown(where: str) -> str:
    """Return a source or URL without what may be secret: user, password and query."""
    return re.sub(r"(?is)^([\w+.-]+:/+|https?:)([^/?#]*@)?([^?#]*).*", r"\1\3", where)
