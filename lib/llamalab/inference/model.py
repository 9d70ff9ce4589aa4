"""Inference: a model in memory that answers prompts.

Decoding is transformers' own. Ours is what surrounds it: SentencePiece, the tokenizer the models
were trained with; chance that is fixed by seed and position, so that an answer does not depend on
the prompts that were answered beside it; text given out in whole characters.
"""

from __future__ import annotations

import html
import os
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from .. import catalog
from ..errors import LabWarning
from ..surgery import Tokenizer
from .decoding import AnswerRow, Draw, Ends, fitting_threads
from .sampling import SAMPLING, effective, template_mistake
from .templates import TEMPLATES, Turn

FEWEST_HALVED = 8
"""Rows of a batch that goes on without its finished rows as soon as they are half of it."""

COMPILED_FROM = 1_000_000_000
"""Parameters of a model whose decoding step is compiled on CUDA; below, it would not pay."""


@dataclass(frozen=True)
class Step:
    """One token of an answer, and what else the model thought of there.

    Attributes:
        id: the token.
        probability: the model's own for it, before temperature, top-k, top-p and penalty.
        top: the most probable tokens, each (id, probability), the best first.
    """

    id: int
    probability: float
    top: list[tuple[int, float]] = field(repr=False)


@dataclass(frozen=True)
class Answer:
    """An answer and what is needed to get it again.

    `text` is the answer alone; `prompt` the exact text the model was given; `settings` every
    setting in effect; `seconds` include reading the prompt, and for an answer of a batch they are
    the whole batch's; `steps` has an entry a token where alternatives were asked for.
    """

    text: str
    prompt: str
    prompt_tokens: int
    answer_ids: list[int] = field(repr=False)
    seed: int
    settings: dict
    seconds: float
    steps: list[Step] = field(default_factory=list, repr=False)

    @property
    def answer_tokens(self) -> int:
        return len(self.answer_ids)

    @property
    def tokens_per_second(self) -> float:
        return self.answer_tokens / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict:
        return asdict(self) | {"answer_tokens": self.answer_tokens}

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        # What a model says is shown as text, never as HTML.
        return f"<pre style='white-space: pre-wrap'>{html.escape(self.text)}</pre>"


class Model:
    """A LLaMA on a device, with its tokenizer.

    Attributes:
        network: transformers' `LlamaForCausalLM`.
        tokenizer: the SentencePiece `Tokenizer`.
        context_length: the longest prompt and answer together, in tokens.
        decoding: what transformers' `generate` is told besides, for speed.
        made_of: the catalogue's parts the weights are made of, where they are known.
        family: "llama", "alpaca", or "" where neither the parts nor the vocabulary tell.
    """

    def __init__(self, network, tokenizer: Tokenizer, made_of: tuple[str, ...] = ()):
        self.network, self.tokenizer, self.made_of = network, tokenizer, made_of
        self.context_length = network.config.max_position_embeddings
        # Rows can be added for speed: it is the pieces that tell the family.
        self.family = catalog.family_of(made_of, len(tokenizer))
        # With a cache of fixed size, transformers compiles the step into one CUDA graph.
        large = network.device.type == "cuda" and network.num_parameters() >= COMPILED_FROM
        self.decoding = {"cache_implementation": "static"} if large else {}

    @property
    def device(self) -> torch.device:
        return self.network.device

    @torch.inference_mode()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Return the logits `[len(ids), vocabulary]` in float32 on the CPU, for one sequence."""
        return self.network(torch.tensor([ids], device=self.device)).logits[0].float().cpu()

    def generate(
        self,
        prompt: str,
        *,
        template: str = "none",
        history: Sequence[Turn] = (),
        temperature: float = SAMPLING["temperature"],
        top_p: float = SAMPLING["top_p"],
        top_k: int = SAMPLING["top_k"],
        repetition_penalty: float = SAMPLING["repetition_penalty"],
        max_new_tokens: int = SAMPLING["max_new_tokens"],
        seed: int | None = None,
        stop: Sequence[str] = (),
        begin: Sequence[int] = (),
        alternatives: int = 0,
        on_text: Callable[[str], None] | None = None,
        stop_when: Callable[[], bool] | None = None,
    ) -> Answer:
        """Return the model's answer to `prompt`.

        Args:
            template: the name of the prompt template put around it ("none", "alpaca").
            history: finished turns (instruction, answer) that come before.
            temperature: 0 is greedy: no sampling, and the repetition penalty is 1.0.
            max_new_tokens: at most; the context length may end an answer earlier.
            seed: fixes the sampling; None draws one, which the answer tells.
            stop: texts that end the answer and are not part of it.
            begin: ids that the answer starts with, counted among its tokens. With the first
                ids of an earlier answer, and its settings and seed, that answer comes again.
            alternatives: how many of the most probable tokens to keep for each step.
            on_text: called with each new piece of text, in whole characters.
            stop_when: asked after each token; where it says True, the answer ends there.

        Raises:
            UsageError: a setting out of its range.
            Incompatible: the prompt leaves no room in the context.
        """
        settings = self._settings(
            template=template,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            max_new_tokens=max_new_tokens,
            stop=stop,
        )
        seed = random.randrange(2**31) if seed is None else seed
        text = self.text_for(prompt, template, history)
        row = AnswerRow(self.tokenizer, self.context_length, text, seed, settings, begin, on_text)
        return self._answers([row], settings, alternatives, stop_when)[0]

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        template: str = "none",
        temperature: float = SAMPLING["temperature"],
        top_p: float = SAMPLING["top_p"],
        top_k: int = SAMPLING["top_k"],
        repetition_penalty: float = SAMPLING["repetition_penalty"],
        max_new_tokens: int = SAMPLING["max_new_tokens"],
        seeds: Sequence[int],
        stop: Sequence[str] = (),
    ) -> list[Answer]:
        """Return the answers to prompts that are computed at once, each with a seed of its own.

        They are those that `generate` gives one by one, up to rounding: prompts are padded on the
        left to one length, and in fp16 and bf16 that can tip a token that was nearly another.

        Raises:
            UsageError, Incompatible: as `generate`.
        """
        settings = self._settings(
            template=template,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
            max_new_tokens=max_new_tokens,
            stop=stop,
        )
        rows = [
            AnswerRow(
                self.tokenizer, self.context_length, self.text_for(prompt, template), seed, settings
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return self._answers(rows, settings) if rows else []

    def text_for(self, prompt: str, template: str, history: Sequence[Turn] = ()) -> str:
        """Return the exact text that the model is given."""
        text = TEMPLATES[template].render(prompt, history)
        return text.encode("utf-8", "replace").decode()  # half a surrogate pair is no character

    def fitting_history(
        self, prompt: str, template: str, history: Sequence[Turn], room: int
    ) -> list[Turn]:
        """Return the latest turns of `history` that leave `room` tokens for the answer.

        Args:
            room: tokens; where not even the prompt alone leaves as many, no turn is kept.
        """
        kept = list(history)
        while kept:
            length = len(self.tokenizer.encode(self.text_for(prompt, template, kept)))
            if length + room <= self.context_length:
                break
            del kept[0]
        return kept

    def _settings(self, **settings) -> dict:
        settings = effective(settings)
        if mistake := template_mistake(self.family, settings["template"]):
            warnings.warn(mistake, LabWarning, stacklevel=3)
        return settings

    def _answers(self, rows: list[AnswerRow], settings: dict, alternatives=0, stop_when=None):
        began = time.perf_counter()
        with fitting_threads(self.network), torch.inference_mode():
            self._decode([row for row in rows if not row.over], settings, stop_when)
            seconds = time.perf_counter() - began
            answers = []
            for row in rows:
                row.finish()
                steps = self._steps(row, alternatives) if alternatives else []
                answers.append(
                    Answer(
                        row.text,
                        row.prompt,
                        len(row.prompt_ids),
                        row.answer_ids,
                        row.seed,
                        settings,
                        seconds,
                        steps,
                    )
                )
        return answers

    def _decode(self, rows: list[AnswerRow], settings: dict, stop_when=None) -> None:
        """Let transformers continue every row; set the rows' `answer_ids`."""
        if not rows:
            return
        starts = [[*row.prompt_ids, *row.answer_ids] for row in rows]
        # What all prompts begin with, a template's header perhaps, is read once for all of them.
        shared = min(len(os.path.commonprefix(starts)), min(map(len, starts)) - 1)
        shared = shared if len(rows) > 1 and not self.decoding else 0
        longest = max(map(len, starts))
        # Padded with BOS, which each prompt holds: a repetition penalty meets nothing new.
        ids = torch.full((len(rows), longest), self.tokenizer.bos)
        mask = torch.zeros_like(ids)
        for i, start in enumerate(starts):
            for place in (slice(shared), slice(longest - len(start) + shared, None)):
                mask[i, place] = 1
            ids[i, mask[i] == 1] = torch.tensor(start)
        ids, mask, cache = ids.to(self.device), mask.to(self.device), None
        if shared:
            cache = self.network(ids[:1, :shared]).past_key_values
            cache.batch_repeat_interleave(len(rows))
        while True:
            ids, cache = self._continue(rows, ids, mask, cache, settings, stop_when)
            left = [i for i, row in enumerate(rows) if not row.over]
            if not left:
                return
            rows = [rows[i] for i in left]
            cache.batch_select_indices(torch.tensor(left, device=self.device))
            new = mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])
            ids, mask = ids[left], torch.cat([mask, new], dim=1)[left]

    def _continue(self, rows: list[AnswerRow], ids, mask, cache, settings: dict, stop_when):
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
        if settings["temperature"] > 0:
            more["repetition_penalty"] = float(settings["repetition_penalty"])
            more["logits_processor"] = [Draw(rows, settings, start)]
        halved = len(rows) >= FEWEST_HALVED and not self.decoding  # else it is compiled for so many
        if halved or stop_when or any(row.is_followed for row in rows):
            more["stopping_criteria"] = [Ends(rows, start, eos, halved, stop_when)]
        output = self.network.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(row.length - len(row.answer_ids) for row in rows),
            do_sample=False,
            pad_token_id=eos,
            eos_token_id=eos,
            suppress_tokens=beyond or None,
            return_dict_in_generate=True,
            **self.decoding,
            **more,
        )
        for row, new in zip(rows, output.sequences[:, start:].tolist(), strict=True):
            row.take(new, eos)
        return output.sequences, output.past_key_values

    def _steps(self, row: AnswerRow, alternatives: int) -> list[Step]:
        """Read prompt and answer once more, for the probabilities at every place."""
        if not row.answer_ids:
            return []
        ids = torch.tensor([[*row.prompt_ids, *row.answer_ids]], device=self.device)
        logits = self.network(ids, logits_to_keep=len(row.answer_ids) + 1).logits[0, :-1]
        shares = logits.float().softmax(dim=-1).cpu()
        best = shares.topk(min(alternatives, shares.shape[1]))
        return [
            Step(token, share[token].item(), list(zip(top, values, strict=True)))
            for token, share, top, values in zip(
                row.answer_ids, shares, best.indices.tolist(), best.values.tolist(), strict=True
            )
        ]


def answer_all(
    model: Model,
    prompts: Sequence[str],
    *,
    temperature: float = 0,
    top_p: float = SAMPLING["top_p"],
    top_k: int = SAMPLING["top_k"],
    repetition_penalty: float = SAMPLING["repetition_penalty"],
    max_new_tokens: int = 48,
    seed: int = 0,
    batch_size: int = 64,
) -> list[str]:
    """Return the answers to whole prompts, templates included, computed in batches.

    Prompts of about one length go together. Greedy answers are those that `Model.generate` gives
    one by one; sampled ones all have the same seed.
    """
    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    settings |= {"repetition_penalty": repetition_penalty, "max_new_tokens": max_new_tokens}
    answers = {}
    order = sorted(range(len(prompts)), key=lambda i: len(model.tokenizer.encode(prompts[i])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LabWarning)  # the template is in the prompts already
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            texts = [prompts[i] for i in chosen]
            found = model.generate_batch(texts, seeds=[seed] * len(texts), **settings)
            answers |= {i: answer.text for i, answer in zip(chosen, found, strict=True)}
    return [answers[i] for i in range(len(prompts))]
