"""Requests and results as text: what is written down is read again, and nothing breaks out."""

from __future__ import annotations

import json

import pytest
import yaml

from llamalab.errors import UsageError
from llamalab_course.explorer.requests import PromptRequest, Result, as_text, differences

HOSTILE = "`\"'\\ ```` </pre><script>alert(1)</script>\x00\x1b\r\n 是吗 😀 {prompt}: #"


def test_exports(made_up):
    turns = (("苹果是植物吗", "是的。"),)
    result = made_up(HOSTILE, turns=turns, begin=(5, 6))
    assert Result.from_dict(json.loads(as_text(result, "json"))).request == result.request
    again = PromptRequest.from_parameters(**yaml.safe_load(as_text(result, "yaml")))
    assert again == result.request
    text = as_text(result, "markdown")
    fence = "`" * 5  # one more than the prompt holds
    assert f"\n{fence}text\n" in text and text.count(fence) == 2
    with pytest.raises(UsageError):
        as_text(result, "html")
    for wrong in ({"turns": "[1]"}, {"turns": "x"}, {"begin": "a"}):
        with pytest.raises(UsageError):
            PromptRequest.from_parameters(model="m", prompt="p", **wrong)


def test_differences_are_marked():
    assert differences("abc", "abc") == [("abc", False)]
    assert differences("a b", "a c") == [("a ", False), ("c", True)]
    assert differences("abc", "ac") == [("a", False), ("\u2038", True), ("c", False)]
