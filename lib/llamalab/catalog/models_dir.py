"""Where things lie: the project, the models directory, and what a model option points to."""

import os
import re
from pathlib import Path

from ..errors import NotFound, UsageError
from . import catalog


def project_directory() -> Path:
    """Return the checkout this package runs from, or the working directory when installed alone."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "data" / "lab").is_dir() else Path.cwd()


def models_directory(given: str | os.PathLike = "") -> Path:
    """Return the directory that holds every part and every model made.

    A relative or empty `given` resolves against the project, not the working directory;
    empty means `$LLAMALAB_MODELS_DIR`, else `models`.
    """
    given = os.fspath(given) or os.environ.get("LLAMALAB_MODELS_DIR") or "models"
    return project_directory() / Path(given).expanduser()


def part_directory(name: str, models_dir: str | os.PathLike = "") -> Path:
    """Return where the part or made model `name` lies, whether or not it is there yet."""
    return models_directory(models_dir) / name


def locate(model: str | os.PathLike, models_dir: str | os.PathLike = "") -> Path:
    """Return the directory that a model option means.

    `model` is a directory, a name found under the models directory (a part, a `<base>-hf` or
    a merged model), or `hf:OWNER/REPO[@REVISION]`, which is fetched into the Hub cache.

    Raises:
        NotFound: none of these; the message says what would make it right.
        UsageError: a bare OWNER/REPO, which is never taken for a download.
    """
    given = os.fspath(model)
    if given.startswith("hf:"):
        return _from_hub(given)
    path = Path(given).expanduser()
    if path.is_dir():
        return path
    made = models_directory(models_dir) / given
    if path.name == given and made.is_dir():
        return made
    if path.is_file():
        raise NotFound(
            f"'{given}' is a file; a directory is needed.",
            "A model is a directory of weights, configuration and tokenizer.",
            f"Give the directory that holds it: '{path.parent}'.",
        )
    if given in catalog.parts() or given in catalog.models():
        raise NotFound(
            f"'{given}' is in the catalogue but not in {models_directory(models_dir)}.",
            "It has not been downloaded or made yet.",
            f"Run 'llamalab download {given}' first"
            + (", then convert and merge it." if given in catalog.models() else "."),
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", given) and not path.is_absolute():
        raise UsageError(
            f"There is no directory '{given}'.",
            "It looks like a Hub repository, which is only fetched when that is said.",
            f"Write 'hf:{given}' for the repository, or correct the path.",
        )
    if path.name != given:
        raise NotFound(
            f"There is no directory '{given}'.", "", "Check the path for a typing error."
        )
    names = [*catalog.parts(), *catalog.models()]
    raise catalog.unknown(given, names, what="directory or model")


def _from_hub(reference: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = reference.removeprefix("hf:").partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None))
    except HFValidationError as error:
        raise UsageError(f"'{reference}' is not a Hub repository.", str(error)) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise NotFound(
            f"'{reference}' could not be fetched from the Hub.",
            str(error).strip().split("\n")[0],
            "Check the name, the network and, for a gated repository, HF_TOKEN.",
        ) from None
