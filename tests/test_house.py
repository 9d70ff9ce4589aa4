"""The house's rules hold, and each of them can be broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import house

RUFF = ["check", "--no-cache", "--isolated", "--line-length", "100"]
LIMITS = [
    ["--select", "C901,PLR0915", "--config", "lint.mccabe.max-complexity=10"]
    + ["--config", "lint.pylint.max-statements=40"],
    ["--preview", "--select", "PLC2701,PLR0917", "--config", "lint.pylint.max-positional-args=5"],
]


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """A copy of lib, which the rules look at, to be broken."""
    lib = tmp_path / "lib"
    shutil.copytree(house.LIB, lib, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    monkeypatch.setattr(house, "LIB", lib)
    return lib


def run(*words: object, cwd: Path = house.ROOT) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name(str(words[0]))), *map(str, words[1:])]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def python(code: str) -> subprocess.CompletedProcess:
    return run("python", "-c", code)


def lint_imports(lib: Path) -> subprocess.CompletedProcess:
    code = f"import sys; sys.path.insert(0, {str(lib)!r}); sys.argv[0] = 'lint-imports'\n"
    code += "from importlinter.cli import lint_imports_command; lint_imports_command()"
    return run("python", "-c", code + "\n")


@pytest.mark.parametrize("rule", house.RULES, ids=lambda rule: rule.__name__)
def test_the_house_is_in_order(rule):
    assert list(rule()) == []


@pytest.mark.parametrize(
    "rule, file, text, said",
    [
        (house.too_large, "llamalab/units.py", "x = 0\n" * 400, "units.py has"),
        (house.too_large, "llamalab/units.py", "def f():\n" + "    x = 0\n" * 46, "function f"),
        (house.too_large, "llamalab/units.py", "class C:\n" + "    x = 0\n" * 201, "class C"),
        (house.ambiguous, "llamalab/units.py", "def permute(): pass\n", "permute is defined in"),
        (
            house.through_the_wall,
            "llamalab/diagnosis.py",
            "from .checkpoints.writer import write\n",
            "diagnosis.py imports from",
        ),
        (house.undrawn, "llamalab/oracle.py", "x = 0\n", "oracle.py is not in README's tree"),
    ],
)
def test_each_rule_can_be_broken(copied, rule, file, text, said):
    with open(copied / file, "a", encoding="utf-8") as module:
        module.write("\n\n" + text)
    assert any(said in sentence for sentence in rule())


def test_a_folder_without_a_face_is_found(monkeypatch):
    import llamalab.surgery

    monkeypatch.setattr(llamalab.surgery, "__all__", ["permute", "nothing"])
    assert list(house.faceless()) == ["llamalab.surgery lists nothing, which it does not have"]


def test_what_counts_as_a_line_of_code():
    text = (
        '"""A\nmodule."""\n\n# why\nx = (\n    1,\n)\n\n\ndef f():\n    """Say."""\n    return x\n'
    )
    assert house.code_lines(text) == {5, 6, 7, 10, 12}


def test_arrows_go_down_only(copied):
    done = lint_imports(house.ROOT / "lib")
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout
    with open(copied / "llamalab" / "errors.py", "a", encoding="utf-8") as module:
        module.write("\nimport llamalab_runs.runner\n")
    broken = lint_imports(copied)
    assert broken.returncode == 1 and "The course stands on the runs" in broken.stdout
    assert "BROKEN" in broken.stdout


@pytest.mark.parametrize("limits", LIMITS, ids=["complexity", "positional"])
def test_functions_are_simple(limits, tmp_path):
    done = run("ruff", *RUFF, *limits, house.LIB)
    assert done.returncode == 0, done.stdout
    branches = "".join(f"    if a == {i}:\n        return {i}\n" for i in range(12))
    (tmp_path / "bad.py").write_text(f"def f(a, b, c, d, e, g):\n{branches}")
    assert run("ruff", *RUFF, *limits, tmp_path).returncode == 1


def test_one_lock_one_room_check_one_record():
    lib = [path for path in house.modules()]

    def holding(text: str) -> list[str]:
        return [path.name for path in lib if text in path.read_text(encoding="utf-8")]

    assert holding("fcntl.flock") == holding("shutil.disk_usage") == ["files.py"]
    assert len(holding('"llamalab.json"')) == 1


def test_what_is_imported_with_what():
    code = "import sys, llamalab.surgery, llamalab.downloads\n"
    code += "from llamalab.surgery import merge; from llamalab.downloads import download\n"
    assert python(code + "assert not {'transformers', 'peft'} & set(sys.modules)").returncode == 0
    code = "import sys, llamalab_runs.sweep; assert 'torch' not in sys.modules"
    assert python(code).returncode == 0
    code = "import sys, llamalab.cli; llamalab.cli.main(['models'])\n"
    assert python(code + "assert 'torch' not in sys.modules").returncode == 0
