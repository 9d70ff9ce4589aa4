"""Decoding: rows of a batch that grow a token at a time, each with numbers of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from ..errors import Incompatible
from ..surgery import Tokenizer
from .sampling import check_seed

ONE_THREAD_BELOW = 10_000_000
"""Parameters of a model that is answered by one thread on a CPU."""


@contextlib.contextmanager
def fitting_threads(network) -> Iterator[None]:
    """Give a tiny model on the CPU one thread.

    Its products are too small to be shared: on two idle cores a second thread brings little,
    and on busy ones waiting for it made an answer twenty times as slow (measured).
    """
    before = torch.get_num_threads()
    if network.device.type == "cpu" and network.num_parameters() < ONE_THREAD_BELOW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class AnswerRow:
    """One answer while it grows: its ids, its text, and how much of that was given out.

    Text that may still change is held back: half of a character's bytes, or what could be the
    start of a stop text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context_length: int,
        prompt: str,
        seed: int,
        settings: dict,
        begin: Sequence[int] = (),
        on_text: Callable[[str], object] | None = None,
    ):
        check_seed(seed)
        self.prompt, self.seed = prompt, seed
        self._tokenizer = tokenizer
        self.prompt_ids = tokenizer.encode(prompt)
        self.answer_ids = list(begin)
        room = context_length - len(self.prompt_ids)
        if room < 1:
            raise Incompatible(
                f"The prompt has {len(self.prompt_ids)} tokens, and the context holds "
                f"{context_length}.",
                "The model was never trained on longer texts.",
                "Shorten the prompt or the conversation.",
                finding="long-prompt",
            )
        self.length = min(settings["max_new_tokens"], room)
        """Tokens of the answer, at most."""
        self._stop, self._on_text = [s for s in settings["stop"] if s], on_text
        self.text, self._given = "", 0
        self.over = len(self.answer_ids) >= self.length
        """Nothing more is to be added."""

    @property
    def is_followed(self) -> bool:
        return bool(self._stop or self._on_text)

    def take(self, new: list[int], eos: int) -> None:
        """Add the ids of a finished answer, up to EOS, and no more than fit."""
        self.over |= eos in new
        new = new[: new.index(eos)] if eos in new else new
        self.answer_ids = [*self.answer_ids, *new][: self.length]
        self.over |= len(self.answer_ids) >= self.length

    def ends(self, ids: list[int]) -> bool:
        """Follow the answer, whose ids are now `ids`; return whether a stop text has come."""
        self.text = self._tokenizer.continuation(self.prompt_ids, ids)
        ends = [at for at in map(self.text.find, self._stop) if at >= 0]
        self.over |= bool(ends)
        if ends:
            self.text = self.text[: min(ends)]
        else:
            self._give(self._safe_length())
        return bool(ends)

    def finish(self) -> None:
        """The answer is over: give out what was held back."""
        self.ends(self.answer_ids)
        self._give(len(self.text))

    def _safe_length(self) -> int:
        length = len(self.text.rstrip("\ufffd"))
        for stop in self._stop:
            for size in range(1, len(stop)):
                if self.text.endswith(stop[:size]):
                    length = min(length, len(self.text) - size)
        return length

    def _give(self, length: int) -> None:
        if self._on_text and length > self._given:
            self._on_text(self.text[self._given : length])
        self._given = max(self._given, length)


class Ends:
    """Says after each token which rows are over; transformers calls it, as a stopping criterion.

    With `halved`, all of them stop as soon as half are over.
    """

    def __init__(self, rows: list[AnswerRow], start: int, eos: int, halved: bool, stop_when):
        self._rows, self._start, self._eos = rows, start, eos
        self._halved, self._stop_when = halved, stop_when
        self._begun = [list(row.answer_ids) for row in rows]
        self._over = [False] * len(rows)

    def __call__(self, input_ids: torch.Tensor, scores=None, **_) -> torch.Tensor:
        new = input_ids[:, self._start :]
        count, last = new.shape[1], new[:, -1].tolist()
        for i, (row, begun) in enumerate(zip(self._rows, self._begun, strict=True)):
            self._over[i] |= last[i] == self._eos or len(begun) + count >= row.length
            if row.is_followed:
                self._over[i] |= row.ends([*begun, *new[i].tolist()])
        over = self._over
        if self._stop_when and self._stop_when():
            over = [True] * len(over)
            for row in self._rows:
                row.over = True
        elif self._halved and 2 * sum(over) >= len(over):
            over = [True] * len(over)
        return torch.tensor(over, device=input_ids.device)


class Draw:
    """Draws each row's next token with the row's own random numbers.

    transformers' sampling draws for a whole batch from one stream, so that an answer would depend
    on its neighbours. Here the n-th token of an answer comes of the n-th number of its seed, on
    every device. transformers calls this as a logits processor, and takes the largest logit.
    """

    def __init__(self, rows: list[AnswerRow], settings: dict, start: int):
        from transformers.generation import logits_process as parts

        self._start = start - torch.tensor([len(row.answer_ids) for row in rows])
        longest = max(row.length for row in rows)
        # In float64, as a generator gives the same numbers however many are asked for.
        generators = [torch.Generator().manual_seed(row.seed) for row in rows]
        self._numbers = torch.stack(
            [torch.rand(longest, generator=g, dtype=torch.float64) for g in generators]
        )
        self._warpers = parts.LogitsProcessorList()
        if settings["temperature"] != 1:
            self._warpers.append(parts.TemperatureLogitsWarper(float(settings["temperature"])))
        if settings["top_k"] > 0:
            self._warpers.append(parts.TopKLogitsWarper(settings["top_k"]))
        if settings["top_p"] < 1:
            self._warpers.append(parts.TopPLogitsWarper(float(settings["top_p"])))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        at = input_ids.shape[1] - self._start
        numbers = self._numbers.gather(1, at[:, None]).float().to(scores.device)
        shares = self._warpers(input_ids, scores).float().softmax(dim=-1)
        reached = shares.cumsum(dim=-1)
        # The first token at which the probabilities' sum is above the number. The largest number
        # may round to the sum of all, above which there is none.
        numbers = torch.minimum(numbers * reached[:, -1:], reached[:, -1:] * (1 - 1e-6))
        chosen = torch.searchsorted(reached, numbers, right=True)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)
