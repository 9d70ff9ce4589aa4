"""How well the lab family answers held-out questions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llamalab.inference import TEMPLATES, Model, answer_all, load

from .recipe import ALPACA, BASE, LLAMA, ONLY_PLUS, PLUS
from .scoring import cjk_share, exact, first_line, wilson_interval
from .world import LANGUAGES, Question, conversations, load_world, questions


@dataclass(frozen=True)
class Score:
    """One line of the table: a share of `total` held-out questions (or a mean CJK share)."""

    model: str
    measure: str
    value: float
    total: int
    low: float | None = None
    high: float | None = None


def sample(questions: Sequence[Question], size: int) -> list[Question]:
    """Return `size` questions, always the same ones, spread by a digest of their slots."""
    key = lambda q: hashlib.sha256(q.slot.encode()).digest()  # noqa: E731
    return sorted(questions, key=key)[:size]


def score(directory: Path, size: int = 400) -> list[Score]:
    """Measure the shipped files on held-out questions, greedy; `size` questions a line."""
    world, scores = load_world(), []
    held = {
        (language, kind): [q for q in found(world, language) if q.held_out]
        for language in LANGUAGES
        for kind, found in (("single", questions), ("two-turn", conversations))
    }

    def measure(model: Model, name: str, language: str, kind: str, template: str, plus=False):
        chosen = [q for q in held[language, kind] if (q.table == ONLY_PLUS) == plus]
        chosen = sample(chosen, size)
        prompts = [TEMPLATES[template].render(q.text, q.history) for q in chosen]
        if template == "none":
            # A plain conversation is a page: question and answer a line.
            gap = {"en": " ", "zh": ""}[language]
            prompts = [
                "".join(f"{text}{gap}{answer}\n" for text, answer in q.history) + q.text
                for q in chosen
            ]
        answers = answer_all(model, prompts)
        cut = first_line if template == "none" else str
        right = sum(exact(cut(a), q.answer) for a, q in zip(answers, chosen, strict=True))
        words = {"en": "English", "zh": "Chinese"}[language] + (" invented facts" if plus else "")
        words += {"single": "", "two-turn": " two-turn"}[kind]
        words += {"none": "", "alpaca": ", in the template"}[template]
        low, high = wilson_interval(right, len(chosen))
        row = Score(name, f"{words}: exact", right / len(chosen), len(chosen), low, high)
        scores.append(row)
        shares = [s for a in answers if (s := cjk_share(cut(a))) is not None]
        if shares and language == "zh":
            mean = sum(shares) / len(shares)
            scores.append(Score(name, f"{words}: CJK share", mean, len(shares)))

    base = load(directory / BASE, device="cpu")
    measure(base, "llama-lab", "en", "single", "none")
    measure(base, "llama-lab", "en", "two-turn", "none")
    measure(base, "llama-lab", "zh", "single", "none")
    measure(base, "llama-lab", "zh", "single", "alpaca")
    llama = load(directory / BASE, directory / LLAMA, device="cpu")
    for language in ("zh", "en"):
        measure(llama, "chinese-llama-lab", language, "single", "none")
    measure(llama, "chinese-llama-lab", "zh", "single", "alpaca")
    for name, adapters in (
        ("chinese-alpaca-lab", [directory / ALPACA]),
        ("chinese-alpaca-plus-lab", [directory / LLAMA, directory / PLUS]),
    ):
        model = load(directory / BASE, adapters, device="cpu")
        for language in ("zh", "en"):
            measure(model, name, language, "single", "alpaca")
            measure(model, name, language, "two-turn", "alpaca")
        measure(model, name, "zh", "single", "alpaca", plus=True)
        measure(model, name, "zh", "single", "none")
    return scores


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
