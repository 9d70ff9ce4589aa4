"""The set-up: one truth about versions, and a Makefile that builds, reuses and repairs."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RANGES = {
    canonicalize_name(requirement.name): requirement.specifier
    for requirement in map(
        Requirement, PROJECT["dependencies"] + PROJECT["optional-dependencies"]["test"]
    )
}
LOCK = dict(
    line.split("==")
    for line in (ROOT / "requirements.lock").read_text().splitlines()
    if not line.startswith("#")
)
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


# --- one truth -----------------------------------------------------------------------------


def test_every_range_admits_the_locked_version():
    for name, versions in RANGES.items():
        assert LOCK[name] in versions, name
        assert any(spec.operator == ">=" for spec in versions), f"{name} has no lower end"


def test_the_lock_is_plain_and_sorted_by_name():
    assert LOCK["torch"] == "2.13.0"
    assert all(name == canonicalize_name(name) for name in LOCK)
    assert not [version for version in LOCK.values() if "+" in version]


def test_the_lock_holds_what_the_locked_packages_require():
    """Followed through the installed packages' own metadata, for this machine."""
    from importlib.metadata import PackageNotFoundError, requires

    todo, seen = list(RANGES), set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            lines = requires(name) or []
        except PackageNotFoundError:
            continue  # another platform's
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(canonicalize_name(requirement.name))
    platform_only = {name for name in seen if re.match("nvidia-|cuda-|triton", name)}
    assert seen - platform_only <= set(LOCK)


def test_environment_yml_names_the_same_packages_and_ranges():
    pip = next(entry["pip"] for entry in CONDA if isinstance(entry, dict))
    assert pip[-1] == "-e ."
    found = {canonicalize_name(req.name): req.specifier for req in map(Requirement, pip[:-1])}
    conda = dict(entry.partition(" ")[::2] for entry in CONDA if isinstance(entry, str))
    found["torch"] = Requirement(f"torch {conda['pytorch']}").specifier
    assert found == RANGES
    assert conda["python"] == PROJECT["requires-python"]


def test_every_line_of_environment_yml_says_what_needs_it():
    lines = (ROOT / "environment.yml").read_text().splitlines()
    entries = [line for line in lines if line.strip().startswith("- ")]
    assert len(entries) == len(RANGES) + 6  # conda-forge, python, pip, make, "- pip:", "-e ."
    for line in entries:
        assert re.search(r"  # .{6,}", line) or line.strip() == "- pip:", line


def test_what_the_package_imports_is_declared():
    code = "\n".join(path.read_text() for path in (ROOT / "lib").rglob("*.py"))
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", code, re.MULTILINE))
    ours = {path.name for path in (ROOT / "lib").iterdir()}
    imported -= set(sys.stdlib_module_names) | ours | {"google"}
    declared = {name.replace("-", "_").replace("pyyaml", "yaml") for name in RANGES}
    assert {name.lower() for name in imported} <= declared


def test_the_version_is_said_once_the_same():
    import llamalab

    assert llamalab.__version__ == PROJECT["version"]


# --- the Makefile ---------------------------------------------------------------------------

STUB = """#!/bin/sh
case "$*" in
  *version_info*) exit ${OLD:-0};;
  *ensurepip*) exit ${NO_VENV:-0};;
  *"import torch"*) [ -n "$HAS_TORCH" ]; exit;;
  "-c "*) exit 0;;
esac
echo "$*" >> "$LOG"
case "$*" in
  "-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python";;
  *pip*) exit ${PIP_FAILS:-0};;
esac
"""


class Checkout:
    """A copy of the set-up's files, in a directory with a space, with a stand-in for Python.

    The stand-in writes down what it is asked to do: what is tested is when `make setup`
    builds, updates and does nothing, not pip.
    """

    def __init__(self, path: Path):
        self.path, self.log = path / "a checkout", path / "log"
        self.path.mkdir()
        for name in ("Makefile", "pyproject.toml", "requirements.lock"):
            shutil.copy(ROOT / name, self.path)
        self.tools = path / "bin"
        self.tools.mkdir()
        for tool in "sh make awk cat cksum cp grep mkdir rm uname du cut".split():
            (self.tools / tool).symlink_to(shutil.which(tool))
        (self.tools / "python3").write_text(STUB)
        (self.tools / "python3").chmod(0o755)

    def make(self, *arguments: str, ok: bool = True, **env: str) -> str:
        """Run make; return its output, and what Python was asked to do in `self.asked`."""
        self.log.write_text("")
        done = subprocess.run(
            ["make", *arguments],
            cwd=self.path,
            env={"PATH": str(self.tools), "LOG": str(self.log), **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert (done.returncode == 0) == ok, done.stdout
        asked = self.log.read_text()
        self.built, self.installed = "venv --clear" in asked, "-e .[test]" in asked
        self.asked = asked
        return done.stdout

    @property
    def stamped(self) -> bool:
        return (self.path / ".venv" / "llamalab.stamp").exists()


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_make_alone_documents_every_target(checkout):
    text = checkout.make()
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split()
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    assert targets == set(phony) >= {"run", "test", "test-heavy", "lab", "clean"}
    assert all(re.search(rf"make {target} +[A-Z]", text) for target in targets)
    assert not checkout.asked


def test_setup_builds_once_then_does_nothing(checkout):
    text = checkout.make("setup")
    assert checkout.built and checkout.installed and checkout.stamped
    assert "390 MB" in text
    assert "-c requirements.lock -e .[test]" in checkout.asked
    assert checkout.make("setup") == "" and not checkout.asked
    os.utime(checkout.path / "pyproject.toml")
    assert checkout.make("setup") == "" and not checkout.asked


@pytest.mark.parametrize("name", ["pyproject.toml", "requirements.lock"])
def test_changed_inputs_update_what_is_there(checkout, name):
    checkout.make("setup")
    with (checkout.path / name).open("a") as file:
        file.write("# changed\n")
    checkout.make("setup")
    assert checkout.installed and not checkout.built
    checkout.make("setup")
    assert not checkout.asked


def test_an_install_that_fails_leaves_no_stamp_and_is_begun_anew(checkout):
    checkout.make("setup", ok=False, PIP_FAILS="1")
    assert not checkout.stamped
    checkout.make("setup")
    assert checkout.built and checkout.stamped
    with (checkout.path / "requirements.lock").open("a") as file:
        file.write("# changed\n")
    checkout.make("setup", ok=False, PIP_FAILS="1")
    assert not checkout.stamped


def test_a_moved_or_broken_environment_is_built_anew(checkout):
    checkout.make("setup")
    checkout.path = checkout.path.rename(checkout.path.with_name("moved"))
    checkout.make("setup")
    assert checkout.built
    (checkout.path / ".venv" / "bin" / "python").unlink()
    checkout.make("setup")
    assert checkout.built


def test_targets_in_parallel_set_up_once(checkout):
    for tool in ("llamalab", "ruff"):
        (checkout.tools / tool).symlink_to(shutil.which("true"))
    (checkout.tools / "python").symlink_to(shutil.which("true"))
    checkout.make("-j4", "run", "test", "test-heavy")
    assert checkout.asked.count("venv --clear") == 1


def test_no_python_that_is_new_enough(checkout):
    text = checkout.make("run", ok=False, OLD="1")
    assert "No Python 3.11 or newer was found." in text and "PYTHON=" in text
    text = checkout.make("run", "PYTHON=/no/such", ok=False)
    assert "PYTHON=/no/such is not a Python 3.11 or newer." in text
    text = checkout.make("run", ok=False, NO_VENV="1")
    assert "without its venv module" in text
    assert not checkout.asked


def test_another_build_of_pytorch(checkout):
    text = checkout.make("setup", "TORCH_INDEX=http://127.0.0.1/cpu")
    assert "from http://127.0.0.1/cpu" in text
    first = checkout.asked.splitlines()[1]
    assert "--index-url http://127.0.0.1/cpu torch==2.13.0" in first and "--no-deps" in first
    checkout.make("setup")
    assert not checkout.asked
    checkout.make("setup", "TORCH_INDEX=http://127.0.0.1/cu130")
    assert "--force-reinstall --index-url http://127.0.0.1/cu130" in checkout.asked


def test_the_active_conda_environment_is_used(checkout, tmp_path):
    prefix = tmp_path / "conda envs" / "llamalab"
    (prefix / "bin").mkdir(parents=True)
    shutil.copy(checkout.tools / "python3", prefix / "bin" / "python")
    conda = dict(CONDA_PREFIX=str(prefix), CONDA_DEFAULT_ENV="llamalab")
    checkout.make("setup", HAS_TORCH="1", **conda)
    assert checkout.installed and not checkout.built and "-c" not in checkout.asked.split()
    assert (prefix / "llamalab.stamp").exists() and not (checkout.path / ".venv").exists()
    checkout.make("setup", **conda)
    assert not checkout.asked
    conda["CONDA_DEFAULT_ENV"] = "base"
    checkout.make("setup", **conda)
    assert checkout.stamped


def test_clean_keeps_the_models_and_says_so(checkout):
    checkout.make("setup")
    (checkout.path / "models").mkdir()
    (checkout.path / "runs").mkdir()
    assert "Kept: models/" in checkout.make("clean")
    assert not (checkout.path / ".venv").exists() and not (checkout.path / "runs").exists()
    assert (checkout.path / "models").exists()


def test_ci_runs_the_documented_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert "set -euo pipefail" in script and re.search(r"^make test$", script, re.MULTILINE)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


def test_lesson_00_shows_the_range_of_peft_that_holds():
    text = (ROOT / "notebooks" / "00_environment.ipynb").read_text()
    shown = re.search(r'asked = \\"(.*?)\\"', text).group(1)
    assert Requirement(f"peft{shown}").specifier == RANGES["peft"]
