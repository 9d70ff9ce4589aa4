"""How well the lab family answers held-out questions."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamalab.inference import TEMPLATES, Model, answer_all, load

from .recipe import ALPACA, BASE, LLAMA, ONLY_PLUS, PLUS
from .scoring import cjk_share, exact, first_line, wilson_interval
from .world import Question, conversations, load_world, questions


@dataclass(frozen=True)
class Score:
    """One line of the table: a share of `total` held-out questions (or a mean CJK share)."""

    model: str
    measure: str
    value: float
    total: int
    low: float | None = None
    high: float | None = None


IN_TEMPLATE = [
    "zh alpaca", "zh alpaca two-turn", "en alpaca", "en alpaca two-turn", "zh alpaca plus", "zh",
]  # fmt: skip
MEASURES = {
    "llama-lab": ([], ["en", "en two-turn", "zh", "zh alpaca"]),
    "chinese-llama-lab": ([LLAMA], ["zh", "en", "zh alpaca"]),
    "chinese-alpaca-lab": ([ALPACA], IN_TEMPLATE),
    "chinese-alpaca-plus-lab": ([LLAMA, PLUS], IN_TEMPLATE),
}
"""What the table holds: of each model its adapters and what is asked, in words: a language, then
"alpaca" inside the template, "two-turn" conversations, "plus" the facts of the plus adapter."""


def sample(questions: Sequence[Question], size: int) -> list[Question]:
    """Return `size` questions, always the same ones, spread by a digest of their slots."""
    key = lambda q: hashlib.sha256(q.slot.encode()).digest()  # noqa: E731
    return sorted(questions, key=key)[:size]


def score(directory: Path, size: int = 400) -> list[Score]:
    """Measure the shipped files on held-out questions, greedy; `size` questions a line."""
    world, scores = load_world(), []
    for name, (adapters, measures) in MEASURES.items():
        model = load(directory / BASE, [directory / a for a in adapters], device="cpu")
        for measure in measures:
            language, *words = measure.split()
            ask = conversations if "two-turn" in words else questions
            asked = [question for question in ask(world, language) if question.held_out]
            asked = [q for q in asked if (q.table == ONLY_PLUS) == ("plus" in words)]
            scores += _scores(model, name, language, words, sample(asked, size))
    return scores


def _scores(
    model: Model, name: str, language: str, words: Sequence[str], asked: Sequence[Question]
) -> list[Score]:
    """Return the share of exact answers and, of Chinese ones, the mean CJK share."""
    title = {"en": "English", "zh": "Chinese"}[language]
    title += " invented facts" * ("plus" in words) + " two-turn" * ("two-turn" in words)
    if "alpaca" in words:
        title += ", in the template"
        prompts = [TEMPLATES["alpaca"].render(q.text, q.history) for q in asked]
        answers = answer_all(model, prompts)
    else:
        prompts = [_page(question) for question in asked]
        answers = [first_line(answer) for answer in answer_all(model, prompts)]
    right = sum(exact(answer, q.answer) for answer, q in zip(answers, asked, strict=True))
    share, interval = right / len(asked), wilson_interval(right, len(asked))
    scores = [Score(name, f"{title}: exact", share, len(asked), *interval)]
    shares = [share for answer in answers if (share := cjk_share(answer)) is not None]
    if shares and language == "zh":
        mean = sum(shares) / len(shares)
        scores.append(Score(name, f"{title}: CJK share", mean, len(shares)))
    return scores


def _page(question: Question) -> str:
    """Return a conversation without a template: a page, question and answer a line."""
    gap = "" if question.language == "zh" else " "
    return "".join(f"{text}{gap}{answer}\n" for text, answer in question.history) + question.text


def score_table(scores: Sequence[Score], again: Sequence[Score] = ()) -> str:
    """Return the scores as a Markdown table, shares with their 95 % Wilson intervals.

    Args:
        again: the same measures of another run of the recipe, for one column more.
    """
    heads = ["model", "measure", "value", "95 % interval", "n"] + ["other seed"] * bool(again)
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    others = {(s.model, s.measure): f"{s.value:.3f}" for s in again}
    for s in scores:
        interval = "" if s.low is None else f"{s.low:.3f} to {s.high:.3f}"
        cells = [s.model, s.measure, f"{s.value:.3f}", interval, str(s.total)]
        cells += [others[s.model, s.measure]] if again else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
