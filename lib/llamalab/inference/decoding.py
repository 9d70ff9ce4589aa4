"""Decoding: rows of a batch that grow a token at a time.

The loop is transformers' own. Ours is what surrounds it: SentencePiece, the tokenizer the models
were trained with; chance that is fixed by seed and position, so that an answer does not depend on
the prompts that were answered beside it; text given out in whole characters.
"""

import contextlib
import os
from collections.abc import Callable, Sequence

import torch

from ..checkpoints import one_thread
from ..errors import Incompatible
from ..surgery import Tokenizer
from .sampling import Sampling, check_seed

FEWEST_HALVED = 8
"""Rows of a batch that goes on without its finished rows as soon as they are half of it."""

COMPILED_FROM = 1_000_000_000
"""Parameters of a model whose decoding step is compiled on CUDA; below, it would not pay."""


ONE_THREAD_BELOW = 10_000_000
"""Parameters of a model that is answered by one thread on a CPU."""


def fitting_threads(network) -> contextlib.AbstractContextManager:
    """Give a tiny model on the CPU one thread.

    Its products are too small to be shared: on two idle cores a second thread brings little,
    and on busy ones waiting for it made an answer twenty times as slow (measured).
    """
    small = network.device.type == "cpu" and network.num_parameters() < ONE_THREAD_BELOW
    return one_thread() if small else contextlib.nullcontext()


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
        sampling: Sampling,
        *,
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
                finding="long-prompt",
            )
        self.length = min(sampling.max_new_tokens, room)
        """Tokens of the answer, at most."""
        self._stop, self._on_text = [s for s in sampling.stop if s], on_text
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

    def __init__(self, rows: list[AnswerRow], start: int, eos: int, *, halved: bool, stop_when):
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

    def __init__(self, rows: list[AnswerRow], sampling: Sampling, start: int):
        from transformers.generation import logits_process as parts

        self._start = start - torch.tensor([len(row.answer_ids) for row in rows])
        longest = max(row.length for row in rows)
        # In float64, as a generator gives the same numbers however many are asked for.
        generators = [torch.Generator().manual_seed(row.seed) for row in rows]
        self._numbers = torch.stack(
            [torch.rand(longest, generator=g, dtype=torch.float64) for g in generators]
        )
        self._warpers = parts.LogitsProcessorList()
        if sampling.temperature != 1:
            self._warpers.append(parts.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k > 0:
            self._warpers.append(parts.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(parts.TopPLogitsWarper(float(sampling.top_p)))

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


class Decoder:
    """Lets transformers continue the rows of a batch.

    Attributes:
        options: what transformers' `generate` is told besides, for speed.
    """

    def __init__(self, network, tokenizer: Tokenizer):
        self.network, self.tokenizer = network, tokenizer
        # With a cache of fixed size, transformers compiles the step into one CUDA graph.
        large = network.device.type == "cuda" and network.num_parameters() >= COMPILED_FROM
        self.options = {"cache_implementation": "static"} if large else {}

    def decode(self, rows: list[AnswerRow], sampling: Sampling, stop_when=None) -> None:
        """Let transformers continue every row; set the rows' `answer_ids`."""
        if not rows:
            return
        starts = [[*row.prompt_ids, *row.answer_ids] for row in rows]
        # What all prompts begin with, a template's header perhaps, is read once for all of them.
        shared = min(len(os.path.commonprefix(starts)), min(map(len, starts)) - 1)
        shared = shared if len(rows) > 1 and not self.options else 0
        longest = max(map(len, starts))
        # Padded with BOS, which each prompt holds: a repetition penalty meets nothing new.
        ids = torch.full((len(rows), longest), self.tokenizer.bos)
        mask = torch.zeros_like(ids)
        for i, start in enumerate(starts):
            for place in (slice(shared), slice(longest - len(start) + shared, None)):
                mask[i, place] = 1
            ids[i, mask[i] == 1] = torch.tensor(start)
        ids, mask, cache = ids.to(self.network.device), mask.to(self.network.device), None
        if shared:
            cache = self.network(ids[:1, :shared]).past_key_values
            cache.batch_repeat_interleave(len(rows))
        while True:
            ids, cache = self._continue(
                rows, ids, mask, cache, sampling=sampling, stop_when=stop_when
            )
            left = [i for i, row in enumerate(rows) if not row.over]
            if not left:
                return
            rows = [rows[i] for i in left]
            cache.batch_select_indices(torch.tensor(left, device=self.network.device))
            new = mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])
            ids, mask = ids[left], torch.cat([mask, new], dim=1)[left]

    def _continue(self, rows: list[AnswerRow], ids, mask, cache, *, sampling: Sampling, stop_when):
        """Let transformers continue the rows until all have ended, or half of many have.

        Args:
            ids, mask: what was read or answered so far, `[rows, tokens]`, padded on the left.
            cache: of the tokens that were read already, or None.

        Returns:
            The ids, longer by the new ones, and the cache for them.
        """
        start, eos = ids.shape[1], self.tokenizer.eos
        # Rows without a piece must not come up; there are some where embeddings were padded.
        beyond = list(range(len(self.tokenizer), self.network.config.vocab_size))
        more = {} if cache is None else {"past_key_values": cache}
        if sampling.temperature > 0:
            more["repetition_penalty"] = float(sampling.repetition_penalty)
            more["logits_processor"] = [Draw(rows, sampling, start)]
        halved = len(rows) >= FEWEST_HALVED and not self.options  # else it is compiled for so many
        if halved or stop_when or any(row.is_followed for row in rows):
            more["stopping_criteria"] = [Ends(rows, start, eos, halved=halved, stop_when=stop_when)]
        output = self.network.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(row.length - len(row.answer_ids) for row in rows),
            do_sample=False,
            pad_token_id=eos,
            eos_token_id=eos,
            suppress_tokens=beyond or None,
            return_dict_in_generate=True,
            **self.options,
            **more,
        )
        for row, new in zip(rows, output.sequences[:, start:].tolist(), strict=True):
            row.take(new, eos)
        return output.sequences, output.past_key_values
