"""Where files come from: what a WHERE means, and which address a file has there."""

import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx

from ..catalog import Part, project_directory
from ..errors import DownloadFailed, LabError, NotFound, UsageError


class NotHere(Exception):
    """There is no such file; another form of its path may be tried. `failure` says more, if any."""

    def __init__(self, failure: LabError | None = None):
        super().__init__()
        self.failure = failure


def assign(parts: tuple[Part, ...], sources: Iterable[str]) -> dict[str, list[str]]:
    """Return {part name: its sources, to be tried in order}.

    Raises:
        UsageError, NotFound: a source that is none, or that is for no part.
    """
    by_part: dict[str, list[str]] = {part.name: [] for part in parts}
    for source in sources:
        head, equals, tail = source.partition("=")
        named = bool(equals) and re.fullmatch(r"[\w.-]+", head) is not None
        if named and head not in by_part:
            known = ", ".join(by_part)
            raise UsageError(f"'{head}' is not a part of it.", f"The parts are {known}.")
        where = tail if named else source
        _require_readable(where)
        takers = [head] if named else [part.name for part in parts if part.source is None]
        if not takers:
            raise UsageError(
                f"The source {shown(where)} is for no part.",
                "Every part has a default source, which only a named one replaces.",
                f"Write it as {parts[0].name}=WHERE to replace that of {parts[0].name}.",
            )
        for taker in takers:
            by_part[taker].append(where)
    for part in parts:
        if part.source and not by_part[part.name]:
            by_part[part.name].append(_lab_family() if part.source == "lab" else part.source)
    return by_part


def _lab_family() -> str:
    """Return the directory of the lab family that comes with the checkout."""
    directory = project_directory() / "data" / "lab"
    if not directory.is_dir():
        raise NotFound(
            "The lab family is not here.",
            "It lies in the checkout's data/lab, and llamalab was installed without its checkout.",
            "Clone the project and run llamalab from there.",
        )
    return str(directory)


def _require_readable(where: str) -> None:
    """Refuse what is neither an http(s) address, nor hf:OWNER/REPO, nor a directory."""
    if match := re.fullmatch(r"hf:([\w.-]+/[\w.-]+)(@[\w./-]+)?", where):
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            return validate_repo_id(match[1])
        except HFValidationError as error:
            raise UsageError(f"'{where}' is not a Hub repository.", str(error)) from None
    if re.match(r"https?://[^/]", where):
        try:
            address, port = httpx.URL(where), urlsplit(where).port
        except (httpx.InvalidURL, ValueError):
            address = port = None
        if address and address.host and port != 0:
            return
        raise UsageError(f"'{shown(where)}' is not a complete address.", "", "Check its spelling.")
    if re.match(r"[\w+.-]+://|hf:|https?:", where):
        scheme = where.partition(":")[0]
        raise UsageError(
            f"A source that begins with '{scheme}:' cannot be read.",
            "Only http:// and https:// addresses, hf:OWNER/REPO and directories can.",
        )
    if not where or "\0" in where or not Path(where).expanduser().is_dir():
        raise NotFound(f"There is no directory {where!r}.", "It was given as a source.")


def is_remote(where: str) -> bool:
    """Whether a source is an address or a Hub repository, and no directory."""
    return where.startswith(("http://", "https://", "hf:"))


PATH_FORMS = ("{part}/{name}", "{name}", "{bare}")  # under which a source may hold a file


def path_of(path_form: str, part: str, name: str) -> str:
    """Return the path in a source of the file `name` of a part, by one of `PATH_FORMS`."""
    return path_form.format(part=part, name=name, bare=name.rpartition("/")[2])


def cached(where: str, path: str) -> Path | None:
    """Return the file `path` of a Hub repository where the Hub's own cache holds it, or None."""
    from huggingface_hub import try_to_load_from_cache

    repository, revision = _repository(where)
    file = try_to_load_from_cache(repository, path, revision=revision)
    return Path(file) if isinstance(file, str) else None


def address(where: str, path: str) -> tuple[str, dict[str, str]]:
    """Return the URL of the file `path` in a source, and the headers that go with it.

    Raises:
        NotHere: HF_HUB_OFFLINE forbids to ask the Hub.
    """
    if not where.startswith("hf:"):
        url = urlsplit(where)
        whole = url._replace(path=f"{url.path.rstrip('/')}/{quote(path)}", fragment="")
        return whole.geturl(), {}
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        raise NotHere(
            DownloadFailed(
                f"'{path}' of {where} is not in the Hub cache, or not whole.",
                "HF_HUB_OFFLINE is set, so the Hub was not asked.",
                "Unset HF_HUB_OFFLINE, or give a directory as --source PART=WHERE.",
            )
        )
    repository, revision = _repository(where)
    url = hf_hub_url(repository, path, revision=revision)
    return url, build_hf_headers(library_name="llamalab")


def _repository(where: str) -> tuple[str, str | None]:
    repository, _, revision = where.removeprefix("hf:").partition("@")
    return repository, revision or None


def shown(where: str) -> str:
    """Return a source or URL without what may be secret: user, password and query."""
    if not where.startswith(("http://", "https://")):
        return where
    scheme, _, rest = where.partition("://")
    host, slash, path = re.split("[?#]", rest)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"
