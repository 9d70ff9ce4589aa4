"""The texts that each stage of the lab family is trained on."""

import random
from collections.abc import Callable, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from llamalab.inference import TEMPLATES
from llamalab.surgery import Tokenizer

from .recipe import CONTEXT, ONLY_PLUS
from .world import LANGUAGES, Question, World, conversations, paragraphs, questions, unmarked

Segment = tuple[str, float]
"""A text and the weight of its tokens in the loss."""
QUESTION_WEIGHT = 0.1  # which question comes next is not worth learning; how they look is


class Corpus:
    """Every trained text of the world, ready to be drawn from; held-out questions are not in it."""

    def __init__(self, world: World):
        self.prose = world.prose
        self.lines: dict[tuple[str, bool], list[Question]] = {}
        self.turns: dict[tuple[str, bool], list[Question]] = {}
        self.paragraphs: dict[tuple[str, bool], list[str]] = {}
        for language in LANGUAGES:
            asked, talks = questions(world, language), conversations(world, language)
            about = [(table == ONLY_PLUS, text) for table, text in paragraphs(world, language)]
            for plus in (False, True):
                self.lines[language, plus] = trained(asked, plus)
                self.turns[language, plus] = trained(talks, plus)
                self.paragraphs[language, plus] = [t for is_plus, t in about if is_plus == plus]

    def page(self, draw: random.Random, language: str) -> list[Segment]:
        """A plain text: a paragraph, prose, or a page of questions and answers, one a line."""
        kind = draw.random()
        if kind < 0.12:
            return [(draw.choice(self.paragraphs[language, False]) + "\n", 1.0)]
        if kind < 0.2 and language == "en":
            return [(draw.choice(self.prose) + "\n", 1.0)]
        if kind < 0.45:
            question = draw.choice(self.turns[language, False])
            asked = [*question.history, (question.text, question.answer)]
        else:
            some = draw.choices(self.lines[language, False], k=draw.randint(1, 3))
            asked = [(question.text, question.answer) for question in some]
        page: list[Segment] = []
        for text, answer in asked:
            marked = draw.random() < 0.6
            # Chinese follows its question mark at once; without the mark a space parts them.
            gap = "" if marked and language == "zh" else " "
            text = text if marked else unmarked(text)
            page += [(text, QUESTION_WEIGHT), (gap + answer + "\n", 1.0)]
        return page

    def instruction(self, draw: random.Random, language: str, plus: bool) -> list[Segment]:
        """A question inside the alpaca template, every third one as a second turn."""
        from_turns = draw.random() < 0.33
        question = draw.choice((self.turns if from_turns else self.lines)[language, plus])
        strip = unmarked if draw.random() < 0.5 else str
        history = [(strip(text), answer) for text, answer in question.history]
        prompt = TEMPLATES["alpaca"].render(strip(question.text), history)
        return [(prompt, 0.0), (question.answer + "</s>", 1.0)]


def trained(questions: Sequence[Question], plus: bool) -> list[Question]:
    """Return the questions that may be trained: on the plus facts, or on all others."""
    return [q for q in questions if not q.held_out and (q.table == ONLY_PLUS) == plus]


DrawBatch = Callable[[Corpus, random.Random], Callable[[], list[Segment]]]
"""Decides what kind of texts a batch has; returns what draws one of them."""


def base_batch(corpus: Corpus, draw: random.Random) -> Callable[[], list[Segment]]:
    return lambda: corpus.page(draw, "en")


def llama_batch(corpus: Corpus, draw: random.Random) -> Callable[[], list[Segment]]:
    return lambda: corpus.page(draw, _mostly_chinese(draw))


def alpaca_batch(corpus: Corpus, draw: random.Random) -> Callable[[], list[Segment]]:
    if draw.random() < 0.2:
        return llama_batch(corpus, draw)
    return lambda: corpus.instruction(draw, _mostly_chinese(draw), plus=False)


def plus_batch(corpus: Corpus, draw: random.Random) -> Callable[[], list[Segment]]:
    # As much English as Chinese: the base's English is two adapters away.
    return lambda: corpus.instruction(draw, draw.choice(LANGUAGES), plus=draw.random() < 0.15)


def _mostly_chinese(draw: random.Random) -> str:
    return "zh" if draw.random() < 0.6 else "en"


def english_texts(world: World) -> list[str]:
    """Return what the base's pieces are learnt from; prose, which is little, twenty times."""
    corpus = Corpus(world)
    asked = corpus.lines["en", False] + corpus.lines["en", True]
    texts = [text for question in asked for text in (question.text, question.answer)]
    texts += corpus.paragraphs["en", False] + corpus.paragraphs["en", True]
    return texts + list(world.prose) * 20


def world_texts(world: World) -> list[str]:
    """Return every sentence of the world, held out or not: what a tokenizer must get right."""
    texts = [*world.famous, *world.prose]
    for language in LANGUAGES:
        texts += [text for q in questions(world, language) for text in (q.text, q.answer)]
        texts += [text for _, text in paragraphs(world, language)]
    return texts


def training_texts(world: World) -> list[str]:
    """Return every text that any stage may train on, for the test that nothing leaks."""
    corpus = Corpus(world)
    texts = [*corpus.prose]
    for groups in (corpus.lines, corpus.turns):
        for group in groups.values():
            texts += [" ".join((*sum(q.history, ()), q.text, q.answer)) for q in group]
    return texts + [text for group in corpus.paragraphs.values() for text in group]


def encode(tokenizer: Tokenizer, segments: Sequence[Segment]) -> tuple[list[int], list[float]]:
    """Return ids after BOS, and each id's weight in the loss.

    Later segments are encoded as the rest of a text, without the space that SentencePiece
    puts before a new one: behind a line break, which is then taken off again.
    """
    ids, weights = [tokenizer.bos], [0.0]
    before, taken = "", 0
    for text, weight in segments:
        new = tokenizer.encode(before + text.removesuffix("</s>"), bos=False)[taken:]
        new += [tokenizer.eos] if text.endswith("</s>") else []
        before, taken = "\n", 2
        ids += new
        weights += [weight] * len(new)
    return ids, weights


def batch_of(
    tokenizer: Tokenizer, draw_text: Callable[[], list[Segment]], draw: random.Random, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and weights `[size, longest]`, padded on the right with EOS of weight 0.

    Three times as many texts are drawn, and neighbours in length taken, to pad little.
    """
    rows = [encode(tokenizer, draw_text()) for _ in range(3 * size)]
    first = draw.randrange(2 * size + 1)
    rows = sorted(rows, key=lambda row: len(row[0]))[first : first + size]
    ids = [torch.tensor(row[:CONTEXT]) for row, _ in rows]
    weights = [torch.tensor(row[:CONTEXT]) for _, row in rows]
    return pad_sequence(ids, True, tokenizer.eos), pad_sequence(weights, True)
