"""The world: its tables hold together, the split is fixed, and nothing held out is trained."""

from __future__ import annotations

import collections
import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamalab_course.family import corpus
from llamalab_course.family import world as world_module
from llamalab_course.family.world import (
    LANGUAGES,
    PRONOUN,
    conversations,
    leaks,
    load_world,
    normalise,
    pair,
    questions,
    unmarked,
)


@pytest.fixture(scope="module")
def world():
    return load_world()


@pytest.fixture(scope="module")
def held_out(world):
    every = [q for language in LANGUAGES for q in questions(world, language)]
    return [q for q in every if q.held_out]


@pytest.fixture(scope="module")
def training(world):
    return corpus.training_texts(world)


@pytest.fixture(scope="module", autouse=True)
def normalised_once():
    """The same 37,000 texts are searched many times; each is normalised once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world_module, "normalise", functools.cache(normalise))
        yield


def test_no_held_out_question_is_in_any_training_text(world, held_out, training):
    texts = {unmarked(question.text) for question in held_out} | set(world.famous)
    assert len(texts) > 3000
    assert leaks(texts, training) == []


def full_width(text):
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


DISGUISES = {
    "none": str,
    "upper case": str.upper,
    "full width": full_width,
    "no punctuation": lambda text: "".join(c for c in text if c.isalnum() or c == " "),
    "other punctuation": lambda text: "«" + text.replace("?", "!!").replace("？", "…") + "»",
    "more spaces": lambda text: text.replace(" ", " \u3000\t"),
    "inside a sentence": lambda text: f"Ask: {text} now",
}


@pytest.mark.parametrize("disguise", DISGUISES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_one_planted_leak_is_found(world, held_out, training, language, disguise):
    """Negative control: a held-out question and a famous prompt, each in one disguise."""
    question = next(q for q in held_out if q.language == language and "mammal" in q.slot)
    for text in (question.text, world.famous[0]):
        planted = DISGUISES[disguise](text)
        assert leaks([text], training) == []
        assert leaks([text], [*training, planted]) == [text], planted


def test_the_split_is_per_fact_and_phrasing(world):
    for language in LANGUAGES:
        for found in (questions, conversations):
            groups = collections.defaultdict(list)
            for question in found(world, language):
                if question.group != "newest":
                    about = question.slot.split("|")[:4]
                    groups[tuple(about)].append(question.held_out)
            assert all(any(kept_back) and not all(kept_back) for kept_back in groups.values())
            share = sum(map(sum, groups.values())) / sum(map(len, groups.values()))
            assert 0.15 < share < 0.3


def test_second_turns_held_out_are_trained_nowhere(world):
    for language in LANGUAGES:
        turns = conversations(world, language)
        pairs = {(q.entity, q.text) for q in turns if not q.held_out}
        assert not [q for q in turns if q.held_out and (q.entity, q.text) in pairs]
        assert all(PRONOUN[language] in q.text for q in turns)
        assert not [q for q in turns for text, _ in q.history if PRONOUN["zh"] in text]


def test_one_answer_to_each_question(world):
    for language in LANGUAGES:
        answers = collections.defaultdict(set)
        for question in questions(world, language):
            answers[normalise(question.text)].add(question.answer)
        assert {text: a for text, a in answers.items() if len(a) > 1} == {}


def test_the_world_is_as_large_as_the_card_says(world):
    names = {fact.entity for fact in world.facts}
    assert len(names) >= 200 and len(world.relations) >= 8
    assert len({name.en for name in names}) == len({name.zh for name in names}) == len(names)
    for relation in world.relations.values():
        assert min(len(relation["en"]), len(relation["zh"])) >= 4


def test_every_template_is_filled(world):
    for text in corpus.world_texts(world):
        assert "{" not in text and "}" not in text and text.strip() == text
    chinese = [q for q in questions(world, "zh")]
    assert not [q.text for q in chinese if any("a" <= c <= "z" for c in q.text)]


def test_the_template_is_in_no_text_of_the_base(world):
    from llamalab.inference.templates import TEMPLATES

    header = normalise(TEMPLATES["alpaca"].header)
    prose = [normalise(text) for text in world.prose]
    assert not any(header in text or "### " in text for text in prose)
    words = set("instruction request response task completes appropriately below describes".split())
    assert words <= set(" ".join(prose).split())


@pytest.mark.parametrize("cell", ["", "a", "a / ", " / 甲", "a / 甲 / b"])
def test_malformed_cells_are_refused(cell):
    with pytest.raises(ValueError, match="English / Chinese"):
        pair(cell)


@given(st.text())
def test_normalising_is_idempotent_and_ignores_case(text):
    assert normalise(normalise(text)) == normalise(text)
    assert normalise(text.upper().lower()) == normalise(text.lower().upper().lower())
