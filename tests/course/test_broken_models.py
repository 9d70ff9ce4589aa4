"""Broken models: every broken model gets the right finding, and no other one."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from llamalab.diagnosis import diagnose
from llamalab.errors import findings
from llamalab_course import broken_models

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", broken_models.CASES)
def test_each_case_gets_its_finding_and_no_other(name, lab):
    arguments = broken_models.break_model(name, lab)
    found = diagnose(**arguments, device="cpu")
    assert found.names == [broken_models.CASES[name].finding], str(found)
    finding = found.findings[0]
    assert finding.found and finding.cause and finding.command
    assert not found.ok and finding.name in str(found)


def test_there_are_cases_enough_and_nearly_every_finding_has_one():
    assert len(broken_models.CASES) >= 16
    # The versions are those of this environment: a test of their own changes them.
    without = findings().keys() - {case.finding for case in broken_models.CASES.values()}
    assert without == {"versions"}


def test_a_case_is_made_anew_and_the_sound_models_stay_sound(lab):
    before = {p: p.read_bytes() for p in (lab / "chinese-llama-lab").iterdir()}
    for name in ("resized", "borrowed", "form"):
        broken_models.break_model(name, lab)
        broken_models.break_model(name, lab)
    assert {p: p.read_bytes() for p in (lab / "chinese-llama-lab").iterdir()} == before
    assert not (lab / "broken" / "form").exists()  # the mistake is in the command alone


def run(*arguments):
    command = [sys.executable, "-m", "llamalab_course.broken_models", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_from_the_command_line_to_the_finding(lab):
    listed = run()
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(broken_models.CASES)
    made = run("second-first", "--models-dir", str(lab))
    assert made.returncode == 0, made.stderr
    words = shlex.split(made.stdout)
    assert words[:2] == ["llamalab", "diagnose"]
    done = subprocess.run(
        [sys.executable, "-m", "llamalab", *words[1:]], capture_output=True, text=True
    )
    assert done.returncode == 1 and "FOUND    missing-predecessor" in done.stdout, done.stderr
    unknown = run("twise")
    assert unknown.returncode == 1 and "Did you mean twice" in unknown.stderr


def test_the_command_says_what_was_asked():
    asked = {"base_model": "a b", "lora_model": ["x", "y"], "with_prompt": False, "prompt": "苹果"}
    assert shlex.split(broken_models.command_of(asked))[2:] == [
        "--base-model", "a b", "--lora-model", "x,y", "--without-prompt", "--prompt", "苹果",
    ]  # fmt: skip
    assert broken_models.command_of({"base_model": "m", "with_prompt": True}).endswith(
        "--with-prompt"
    )
