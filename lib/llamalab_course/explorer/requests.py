"""What the explorer asks a model, what it gets, and both as text."""

from __future__ import annotations

import difflib
import json
import re
import uuid
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime

import yaml

from llamalab.errors import UsageError
from llamalab.inference import Sampling, Turn

ALTERNATIVES = 5
"""How many of the most probable tokens are kept for each place of an answer."""


@dataclass(frozen=True)
class PromptRequest:
    """All that an answer depends on: the same request gives the same answer, token for token.

    Attributes:
        model: a name of the catalogue; a base's name is the base in HF layout.
        turns: finished turns of a conversation, before `prompt`.
        begin: ids that the answer starts with: a branch from an earlier one.
    """

    model: str
    prompt: str
    template: str = "none"
    temperature: float = Sampling.temperature
    top_p: float = Sampling.top_p
    top_k: int = Sampling.top_k
    repetition_penalty: float = Sampling.repetition_penalty
    max_new_tokens: int = 60
    seed: int = 1
    turns: tuple[Turn, ...] = ()
    begin: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, values: dict) -> PromptRequest:
        turns = tuple((question, answer) for question, answer in values.get("turns", ()))
        return cls(**values | {"turns": turns, "begin": tuple(values.get("begin", ()))})

    def settings(self) -> dict:
        """Return what `Model.generate` takes besides the prompt."""
        values = asdict(self) | {"history": self.turns, "alternatives": ALTERNATIVES}
        return {n: value for n, value in values.items() if n not in ("model", "prompt", "turns")}

    def parameters(self) -> dict:
        """Return the parameters with which lesson 06 answers this again."""
        values = asdict(self)
        values["turns"] = json.dumps(self.turns, ensure_ascii=False) if self.turns else ""
        values["begin"] = " ".join(map(str, self.begin))
        return values

    @classmethod
    def from_parameters(cls, turns: str = "", begin: str = "", **values) -> PromptRequest:
        """Return the request that `parameters` wrote down.

        Raises:
            UsageError: `turns` is no JSON list of pairs, or `begin` no list of ids.
        """
        try:
            pairs = [(str(question), str(answer)) for question, answer in json.loads(turns or "[]")]
            ids = tuple(map(int, begin.split()))
        except (ValueError, TypeError) as error:
            raise UsageError(
                "'turns' or 'begin' cannot be read.",
                f"turns is a JSON list of pairs, begin a list of ids ({error}).",
                "Export the answer again.",
            ) from None
        return cls(turns=tuple(pairs), begin=ids, **values)


@dataclass(frozen=True)
class Result:
    """A finished answer, with what it takes to get it again.

    Attributes:
        pieces: the answer's tokens as text, whose concatenation need not be `text`.
        steps: for each token (id, probability, alternatives); an alternative is (id, piece,
            probability).
        memory: bytes that the process held in memory when the answer was there.
        stopped: whether a person ended it.
    """

    request: PromptRequest
    text: str
    ids: list[int] = field(repr=False)
    pieces: list[str] = field(repr=False)
    steps: list[tuple] = field(repr=False)
    tokens_per_second: float
    memory: int
    stopped: bool = False
    starred: bool = False
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    made: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @classmethod
    def from_dict(cls, values: dict) -> Result:
        return cls(**values | {"request": PromptRequest.from_dict(values["request"])})

    def again(self) -> PromptRequest:
        """Return the request that gives this text; where it was stopped, that many tokens."""
        if self.stopped and self.ids:
            return replace(self.request, max_new_tokens=len(self.ids))
        return self.request

    def branch(self, place: int, token: int) -> PromptRequest:
        """Return the request whose answer is this one's up to `place`, and there `token`."""
        return replace(self.request, begin=(*self.ids[:place], token))


@dataclass(frozen=True)
class Token:
    """A token as it is shown, a space as U+2581, a byte of a fallback as its number.

    `kind` is "control" (BOS), "byte" or "text".
    """

    id: int
    piece: str
    kind: str


def differences(first: str, second: str) -> list[tuple[str, bool]]:
    """Return `second` in pieces: (text, whether it differs from `first` there).

    Where something is only missing, the piece is the mark U+2038 (a caret).
    """
    pieces = []
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    for kind, _, _, start, end in matcher.get_opcodes():
        pieces.append((second[start:end] or "\u2038", kind != "equal"))
    return pieces


def as_text(result: Result, form: str) -> str:
    """Return `result` as "json", as "markdown", or as "yaml".

    The YAML holds lesson 06's parameters: `llamalab run 06 -f FILE` and `papermill -f FILE` give
    the same answer.
    """
    if form == "json":
        return json.dumps(asdict(result), indent=2, ensure_ascii=False) + "\n"
    if form == "yaml":
        return yaml.safe_dump(result.again().parameters(), allow_unicode=True, sort_keys=False)
    if form != "markdown":
        raise UsageError(f"There is no form '{form}'.", "There are json, markdown and yaml.")
    request = result.again()
    lines = [f"## {request.model}, {result.made}", ""]
    for question, answer in request.turns:
        lines += ["Asked before:", _fenced(question), "Answered:", _fenced(answer)]
    lines += ["Prompt:", _fenced(request.prompt), "Answer:", _fenced(result.text), ""]
    for name, value in request.parameters().items():
        if name not in ("model", "prompt", "turns"):
            lines.append(f"- {name}: {value}")
    return "\n".join(lines) + "\n"


def _fenced(text: str) -> str:
    """Return a code block that `text` cannot end, whatever it holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"\n{fence}text\n{text}\n{fence}\n"
