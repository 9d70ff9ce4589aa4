"""A result as an explorer gives it, without a model."""

from __future__ import annotations

import pytest

from llamalab_course.explorer.requests import PromptRequest, Result


@pytest.fixture
def made_up():
    """Return a function: prompt and what else a request has -> a result."""

    def make(prompt="苹果是植物吗", **more) -> Result:
        request = PromptRequest("chinese-alpaca-lab", prompt, template="alpaca", **more)
        step = (5, 0.75, [(5, "是", 0.75), (6, "不", 0.25)])
        return Result(request, "是", [5], ["是"], [step], tokens_per_second=3.5, memory=7)

    return make
