"""Exploring prompts: ask models on disk, one flight at a time, and keep what came of it.

This is the part of the explorer that knows no widgets: `Request` says all that an answer depends
on, `Explorer` answers requests in a thread, `History` keeps the results in a file, and `export`
writes one down as JSON, as Markdown, or as the parameters that lesson 06 answers again.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import threading
import uuid
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

import psutil
import torch
import yaml

from . import catalog
from .errors import DamagedFile, LabError, LabWarning, NotFound, UsageError
from .inference import SAMPLING, Model
from .loading import load
from .partial import locked
from .places import models_directory, project_directory
from .report import write_text
from .templates import TEMPLATES, Turn
from .tokenizer import Tokenizer

ALTERNATIVES = 5
"""How many of the most probable tokens are kept for each place of an answer."""

KEPT = 200
"""Results that a history holds; the oldest go first, starred ones never."""

LARGE = 2_000_000_000
"""Bytes of weights from which on only one model stays in memory."""


@dataclass(frozen=True)
class Request:
    """All that an answer depends on: the same request gives the same answer, token for token.

    Attributes:
        model: a name of the catalogue; a base's name is the base in HF layout.
        turns: finished turns of a conversation, before `prompt`.
        begin: ids that the answer starts with: a branch from an earlier one.
    """

    model: str
    prompt: str
    template: str = "none"
    temperature: float = SAMPLING["temperature"]
    top_p: float = SAMPLING["top_p"]
    top_k: int = SAMPLING["top_k"]
    repetition_penalty: float = SAMPLING["repetition_penalty"]
    max_new_tokens: int = 60
    seed: int = 1
    turns: tuple[Turn, ...] = ()
    begin: tuple[int, ...] = ()

    @classmethod
    def from_dict(cls, values: dict) -> Request:
        turns = tuple((question, answer) for question, answer in values.get("turns", ()))
        return cls(**values | {"turns": turns, "begin": tuple(values.get("begin", ()))})

    def settings(self) -> dict:
        """Return what `Model.generate` takes besides the prompt."""
        values = asdict(self) | {"history": self.turns}
        return {n: value for n, value in values.items() if n not in ("model", "prompt", "turns")}

    def parameters(self) -> dict:
        """Return the parameters with which lesson 06 answers this again."""
        values = asdict(self)
        values["turns"] = json.dumps(self.turns, ensure_ascii=False) if self.turns else ""
        values["begin"] = " ".join(map(str, self.begin))
        return values

    @classmethod
    def from_parameters(cls, turns: str = "", begin: str = "", **values) -> Request:
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

    request: Request
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
        return cls(**values | {"request": Request.from_dict(values["request"])})

    def again(self) -> Request:
        """Return the request that gives this text; where it was stopped, that many tokens."""
        if self.stopped and self.ids:
            return replace(self.request, max_new_tokens=len(self.ids))
        return self.request

    def branch(self, place: int, token: int) -> Request:
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


class History:
    """Results in a JSON file, which outlive the kernel; the newest comes last."""

    def __init__(self, path: str | os.PathLike = ""):
        self.path = Path(path) if path else project_directory() / "runs" / "explorer.json"
        self._lock = threading.Lock()

    def read(self) -> list[Result]:
        """Return every result.

        Raises:
            DamagedFile: the file is there and is no history; it is left alone.
        """
        try:
            return [Result.from_dict(values) for values in json.loads(self.path.read_text("utf-8"))]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedFile(
                f"{self.path} is not a history of answers.",
                f"It was cut off or changed by hand ({type(error).__name__}).",
                "Move it away: a new one is begun.",
            ) from None

    def add(self, result: Result) -> None:
        self._change(lambda results: [*results, result])

    def delete(self, chosen: Sequence[str]) -> None:
        self._change(lambda results: [r for r in results if r.id not in chosen])

    def star(self, chosen: Sequence[str]) -> None:
        """Star the chosen results, or take the star away."""
        self._change(
            lambda results: [
                replace(r, starred=not r.starred) if r.id in chosen else r for r in results
            ]
        )

    def _change(self, change: Callable[[list[Result]], list[Result]]) -> None:
        # Read anew: another notebook may have added something, and none may do so meanwhile.
        with self._lock, locked(self.path.parent):
            results = change(self.read())
            plain = [r for r in results if not r.starred]
            spare = {r.id for r in plain[: max(0, len(plain) - KEPT)]}
            lines = [json.dumps(asdict(r), ensure_ascii=True) for r in results if r.id not in spare]
            write_text(self.path, "[\n" + ",\n".join(lines) + "\n]\n")


def export(result: Result, form: str) -> str:
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


@dataclass
class Listener:
    """What a flight tells, from its own thread; `place` is the request's among those given."""

    on_text: Callable[[int, str], None] = lambda place, text: None
    on_result: Callable[[int, Result], None] = lambda place, result: None
    on_error: Callable[[int, Exception], None] = lambda place, error: None
    on_end: Callable[[], None] = lambda: None


class Explorer:
    """Answers requests to the models on disk; one flight at a time.

    Args:
        history: where results are kept; None keeps none.
    """

    def __init__(
        self,
        models_dir: str | os.PathLike = "",
        device: str = "auto",
        history: History | None = None,
    ):
        self.models_dir, self.device, self.history = models_dir, device, history
        self._models: dict[str, Model] = {}
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def names(self) -> list[str]:
        """Return the catalogue's models that are on disk, the bases first."""
        known = [name for name, part in catalog.parts().items() if part.kind == "base"]
        return [name for name in [*known, *catalog.models()] if self._is_there(name)]

    def directory(self, name: str) -> Path:
        """Return where the model `name` lies in HF layout, whether or not it is there."""
        entry = catalog.model(name)
        made = name if entry.adapters else f"{entry.base.name}-hf"
        return models_directory(self.models_dir) / made

    def _is_there(self, name: str) -> bool:
        directory = self.directory(name)
        return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))

    def model(self, name: str) -> Model:
        """Return the model, in memory.

        Raises:
            NotFound: it has not been made yet.
        """
        with self._loading:
            if name not in self._models:
                if not self._is_there(name):
                    raise NotFound(
                        f"'{name}' is not in {models_directory(self.models_dir)}.",
                        "It has not been converted or merged yet.",
                        "Lessons 02 and 03 make it.",
                    )
                size = sum(file.stat().st_size for file in self.directory(name).glob("*.safe*"))
                if size > LARGE:
                    self._models.clear()
                self._models[name] = load(self.directory(name), device=self.device)
            return self._models[name]

    def text_for(self, request: Request) -> str:
        """Return the exact text that the model is given."""
        text = TEMPLATES[request.template].render(request.prompt, request.turns)
        return text.encode("utf-8", "replace").decode()  # as Model.text_for, without the model

    def tokens(self, request: Request) -> list[Token]:
        """Return the tokens that the model is given, BOS first."""
        tokenizer = _tokenizer(self.directory(request.model))
        ids, controls = tokenizer.encode(self.text_for(request)), (tokenizer.bos, tokenizer.eos)
        found = []
        for number, piece in zip(ids, tokenizer.pieces(ids), strict=True):
            kind = "byte" if re.fullmatch("<0x[0-9A-F]{2}>", piece) else "text"
            found.append(Token(number, piece, "control" if number in controls else kind))
        return found

    def fitted(self, request: Request) -> Request:
        """Return `request` with as many of its latest turns as leave the answer some room."""
        model = self.model(request.model)
        room = min(request.max_new_tokens, model.context_length // 4)
        turns = model.fitting_history(request.prompt, request.template, request.turns, room)
        return replace(request, turns=tuple(turns))

    def answer(
        self,
        request: Request,
        on_text: Callable[[str], None] | None = None,
        stop_when: Callable[[], bool] | None = None,
    ) -> Result:
        """Return the answer to `request`, in this thread.

        Raises:
            LabError: no such model, a setting out of its range, a prompt that is too long.
        """
        model = self.model(request.model)
        with warnings.catch_warnings():
            # A template that does not fit is the point of an experiment: the view says so.
            warnings.simplefilter("ignore", LabWarning)
            answer = model.generate(
                request.prompt,
                **request.settings(),
                alternatives=ALTERNATIVES,
                on_text=on_text,
                stop_when=stop_when,
            )
        spell = model.tokenizer.pieces
        steps = []
        for step in answer.steps:
            top = [(number, spell([number])[0], share) for number, share in step.top]
            steps.append((step.id, step.probability, top))
        return Result(
            request,
            answer.text,
            answer.answer_ids,
            spell(answer.answer_ids),
            steps,
            answer.tokens_per_second,
            _memory(model),
            stopped=bool(stop_when and stop_when()),
        )

    def start(
        self, requests: Sequence[Request | Callable[[], Request]], listener: Listener
    ) -> None:
        """Answer `requests` one after another in a thread; what flies already is stopped first.

        A request may be a function that returns one, called in the thread.
        """
        with self._lock:
            self.stop()
            self._stop = threading.Event()
            flight = (list(requests), listener, self._stop, self._thread)
            self._thread = threading.Thread(target=self._fly, args=flight, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End what is being answered after the token that is being computed."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is being answered; return whether that is so."""
        if self._thread:
            self._thread.join(seconds)
        return not (self._thread and self._thread.is_alive())

    def _fly(self, requests, listener: Listener, stop: threading.Event, before) -> None:
        if before:
            before.join()
        try:
            for place, request in enumerate(requests):
                if stop.is_set():
                    break
                try:
                    request = request() if callable(request) else request
                    result = self.answer(
                        request, lambda text, at=place: listener.on_text(at, text), stop.is_set
                    )
                    listener.on_result(place, result)
                    if self.history:
                        self.history.add(result)
                except Exception as error:  # shown to the person, whatever it is
                    listener.on_error(place, error)
        finally:
            listener.on_end()


def sentence(error: Exception) -> str:
    """Return what to tell a person about `error`."""
    if isinstance(error, LabError):
        return str(error).replace("\n", " ")
    return f"{type(error).__name__}: {error}"


@lru_cache(maxsize=8)
def _tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


def _memory(model: Model) -> int:
    if model.device.type == "cuda":
        return torch.cuda.memory_allocated(model.device)
    return psutil.Process().memory_info().rss
