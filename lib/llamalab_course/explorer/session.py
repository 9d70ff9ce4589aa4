"""Exploring prompts: ask models on disk, one flight at a time, and keep what came of it.

This part of the explorer knows no widgets. A `PromptRequest` says all that an answer depends on;
`Explorer` answers requests in a thread, and adds the results to an `AnswerHistory`.
"""

import os
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from llamalab import catalog
from llamalab.errors import LabWarning, NotFound
from llamalab.inference import Model, load, render_text
from llamalab.surgery import Tokenizer

from ..lessons import LessonModel
from .answer_history import AnswerHistory
from .requests import PromptRequest, Result, Token

LARGE = 2_000_000_000
"""Bytes of weights from which on only one model stays in memory."""


class Listener(NamedTuple):
    """What is told, from the flight's own thread, of the answer to one request."""

    on_text: Callable[[str], None] = lambda text: None
    on_result: Callable[[Result], None] = lambda result: None
    on_error: Callable[[Exception], None] = lambda error: None


Flight = Sequence[tuple[PromptRequest | Callable[[], PromptRequest], Listener]]
"""Requests that are answered one after another; a function, called in the thread, returns one."""


class Explorer:
    """Answers requests to the models on disk; one flight at a time.

    Args:
        history: where results are kept; None keeps none.
    """

    def __init__(
        self,
        models_dir: str | os.PathLike = "",
        device: str = "auto",
        history: AnswerHistory | None = None,
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
        return LessonModel(catalog.model(name), self.models_dir).merged

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
                        f"'{name}' is not in {catalog.models_directory(self.models_dir)}.",
                        "It has not been converted or merged yet.",
                        "Lessons 02 and 03 make it.",
                    )
                size = sum(file.stat().st_size for file in self.directory(name).glob("*.safe*"))
                if size > LARGE:
                    self._models.clear()
                self._models[name] = load(self.directory(name), device=self.device)
            return self._models[name]

    def text_for(self, request: PromptRequest) -> str:
        """Return the exact text that the model is given."""
        return render_text(request.prompt, request.template, request.turns)

    def tokens(self, request: PromptRequest) -> list[Token]:
        """Return the tokens that the model is given, BOS first."""
        tokenizer = _tokenizer(self.directory(request.model))
        ids, controls = tokenizer.encode(self.text_for(request)), (tokenizer.bos, tokenizer.eos)
        tokens = []
        for number, piece in zip(ids, tokenizer.pieces(ids), strict=True):
            kind = "byte" if re.fullmatch("<0x[0-9A-F]{2}>", piece) else "text"
            tokens.append(Token(number, piece, "control" if number in controls else kind))
        return tokens

    def fitted(self, request: PromptRequest) -> PromptRequest:
        """Return `request` with as many of its latest turns as leave the answer some room."""
        model = self.model(request.model)
        room = min(request.max_new_tokens, model.context_length // 4)
        turns = model.fitting_history(request.prompt, request.template, request.turns, room)
        return replace(request, turns=tuple(turns))

    def answer(self, request: PromptRequest, **hooks: Callable) -> Result:
        """Return the answer to `request`, in this thread.

        Args:
            hooks: `on_text` and `stop_when`, as `Model.generate` takes them.

        Raises:
            LabError: no such model, a setting out of its range, a prompt that is too long.
        """
        model = self.model(request.model)
        with warnings.catch_warnings():
            # A template that does not fit is the point of an experiment: the view says so.
            warnings.simplefilter("ignore", LabWarning)
            answer = model.generate(request.prompt, **request.settings(), **hooks)
        ids, speed, spell = answer.answer_ids, answer.tokens_per_second, model.tokenizer.pieces
        steps = []
        for step in answer.steps:
            top = [(number, spell([number])[0], share) for number, share in step.top]
            steps.append((step.id, step.probability, top))
        memory, stopped = _memory(model), "stop_when" in hooks and hooks["stop_when"]()
        return Result(request, answer.text, ids, spell(ids), steps, speed, memory, stopped)

    def start(self, flight: Flight, on_end: Callable[[], None] = lambda: None) -> None:
        """Answer the requests of `flight` in a thread; what is under way is stopped first."""
        with self._lock:
            self.stop()
            self._stop = threading.Event()
            arguments = (flight, on_end, self._stop, self._thread)
            self._thread = threading.Thread(target=self._fly, args=arguments, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End what is being answered after the token that is being computed."""
        self._stop.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until nothing is being answered; return whether that is so."""
        if self._thread:
            self._thread.join(seconds)
        return not (self._thread and self._thread.is_alive())

    def _fly(self, flight: Flight, on_end: Callable, stop: threading.Event, before) -> None:
        if before:
            before.join()
        try:
            for request, listener in flight:
                if stop.is_set():
                    break
                try:
                    request = request() if callable(request) else request
                    hooks = {"on_text": listener.on_text, "stop_when": stop.is_set}
                    listener.on_result(result := self.answer(request, **hooks))
                    if self.history:
                        self.history.add(result)
                except Exception as error:  # shown to the person, whatever it is
                    listener.on_error(error)
        finally:
            on_end()


@lru_cache(maxsize=8)
def _tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


def _memory(model: Model) -> int:
    if model.device.type == "cuda":
        return torch.cuda.memory_allocated(model.device)
    return psutil.Process().memory_info().rss
