"""The history: shared by processes, thinned but never of stars, and a damaged one left alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llamalab.errors import DamagedFile
from llamalab_course.explorer.answer_history import KEPT, AnswerHistory
from llamalab_course.explorer.requests import as_text


def test_results_can_be_starred_deleted_and_thinned(made_up, tmp_path):
    history = AnswerHistory(tmp_path / "kept" / "history.json")
    first, second = made_up(seed=1), made_up("\ud800", seed=2)
    history.add(first)
    history.add(second)
    assert AnswerHistory(history.path).read()[1].request.prompt == "\ud800"
    history.star([first.id])
    for number in range(3):
        history.add(made_up(seed=number))
    history.delete([second.id])
    assert [r.starred for r in history.read()] == [True, False, False, False]
    many = [json.loads(as_text(second, "json")) | {"id": str(n)} for n in range(KEPT + 5)]
    starred = json.loads(as_text(history.read()[0], "json"))
    history.path.write_text(json.dumps([starred, *many]))
    history.add(second)
    assert len(history.read()) == KEPT + 1 and history.read()[0].starred


ADDING = """
import json, sys
from llamalab_course.explorer import AnswerHistory, Result
values = json.loads(sys.argv[2])
for number in range(30):
    AnswerHistory(sys.argv[1]).add(Result.from_dict(values | {"id": f"{sys.argv[3]}-{number}"}))
"""


def test_two_processes_lose_nothing_of_each_others(made_up, tmp_path):
    path = tmp_path / "history.json"
    values = as_text(made_up(), "json")
    command = [sys.executable, "-W", "ignore", "-c", ADDING, str(path), values]
    both = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    wanted = {f"{name}-{number}" for name in "ab" for number in range(30)}
    assert {result.id for result in AnswerHistory(path).read()} == wanted
    assert [p.name for p in tmp_path.iterdir()] == ["history.json"]


@pytest.mark.parametrize("text", ["", "[{]", '[{"id": 1}]', "{}x", '["a"]', "5"])
def test_a_damaged_history_is_said_and_left_alone(tmp_path, text):
    path = tmp_path / "history.json"
    path.write_text(text)
    history = AnswerHistory(path)
    with pytest.raises(DamagedFile, match="history.json"):
        history.read()
    with pytest.raises(DamagedFile):
        history.delete(["x"])
    assert path.read_text() == text
