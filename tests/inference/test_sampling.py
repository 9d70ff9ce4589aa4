"""The settings of an answer are spelt once; all who ask for them take them from there."""

from __future__ import annotations

import pytest

from llamalab.cli.commands import build_parser
from llamalab.errors import UsageError
from llamalab.inference import Sampling, settings


def test_every_number_has_its_range_and_its_usual_one():
    assert settings().keys() == Sampling().as_dict().keys() - {"template", "stop"}
    for name, setting in settings().items():
        low, high, step = setting.usual
        assert setting.low <= low < low + step <= high <= setting.high, name
        for value in (setting.low, setting.high, setting.default, low, high):
            assert value == 0 or Sampling(**{name: setting.type(value)})
        for value in (setting.low - 1, setting.high * 2, "1", None, True):
            with pytest.raises(UsageError, match=name):
                Sampling(**{name: value})


def test_a_greedy_answer_knows_no_penalty_and_forgets_nothing():
    greedy = Sampling(temperature=0, repetition_penalty=1.3)
    assert greedy.normalised().repetition_penalty == 1.0 and greedy.repetition_penalty == 1.3
    assert Sampling(temperature=0.5, repetition_penalty=1.3).normalised().repetition_penalty == 1.3


def test_a_text_that_ends_the_answer_may_stand_alone():
    assert Sampling(stop="。").stop == Sampling(stop=["。"]).stop == ("。",)
    assert Sampling(stop=["a", "b"]).as_dict()["stop"] == ["a", "b"]


def test_the_command_line_takes_its_options_and_defaults_from_here():
    asked = build_parser().parse_args(["generate", "--base-model", "M", "--prompt", "p"])
    defaults = Sampling()
    for name in settings():
        assert getattr(asked, name) == getattr(defaults, name), name
