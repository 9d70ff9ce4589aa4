"""Prompt templates: the field's exact text, one header, a block a turn."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llamalab.inference.templates import TEMPLATES

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n\n{}\n\n### Response:\n\n"
)


@given(st.text())
def test_the_alpaca_text_is_the_published_one_whatever_is_typed(prompt):
    before, after = ALPACA.split("{}")
    assert TEMPLATES["alpaca"].render(prompt) == before + prompt + after
    assert TEMPLATES["none"].render(prompt) == prompt


def test_a_second_turn_repeats_the_block_and_not_the_header():
    text = TEMPLATES["alpaca"].render("它吃什么？", [("牛是什么？", "牛是哺乳动物。")])
    first = ALPACA.format("牛是什么？") + "牛是哺乳动物。"
    assert text == first + "\n\n### Instruction:\n\n它吃什么？\n\n### Response:\n\n"
    assert text.count("Below is") == 1
