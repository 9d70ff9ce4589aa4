"""Inference: a model in memory that answers prompts.

What is asked, and what an answer holds; how it grows is in `decoding`.
"""

import html
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch

from .. import catalog
from ..errors import LabWarning
from ..surgery import Tokenizer
from .decoding import AnswerRow, Decoder, fitting_threads
from .sampling import Sampling
from .templates import Turn, render_text, template_mistake


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
        decoder: what makes answers grow.
        made_of: the catalogue's parts the weights are made of, where they are known.
        family: "llama", "alpaca", or "" where neither the parts nor the vocabulary tell.
    """

    def __init__(self, network, tokenizer: Tokenizer, made_of: tuple[str, ...] = ()):
        self.network, self.tokenizer, self.made_of = network, tokenizer, made_of
        self.context_length = network.config.max_position_embeddings
        # Rows can be added for speed: it is the pieces that tell the family.
        self.family = catalog.family_of(made_of, len(tokenizer))
        self.decoder = Decoder(network, tokenizer)

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
        history: Sequence[Turn] = (),
        seed: int | None = None,
        begin: Sequence[int] = (),
        alternatives: int = 0,
        on_text: Callable[[str], None] | None = None,
        stop_when: Callable[[], bool] | None = None,
        **sampling,
    ) -> Answer:
        """Return the model's answer to `prompt`.

        Args:
            history: finished turns (instruction, answer) that come before.
            seed: fixes the sampling; None draws one, which the answer tells.
            begin: ids that the answer starts with, counted among its tokens. With the first
                ids of an earlier answer, and its settings and seed, that answer comes again.
            alternatives: how many of the most probable tokens to keep for each step.
            on_text: called with each new piece of text, in whole characters.
            stop_when: asked after each token; where it says True, the answer ends there.
            sampling: the fields of `Sampling`: template, temperature, max_new_tokens, ...

        Raises:
            UsageError: a setting out of its range.
            Incompatible: the prompt leaves no room in the context.
        """
        settings = self._settings(sampling)
        seed = random.randrange(2**31) if seed is None else seed
        text = render_text(prompt, settings.template, history)
        row = AnswerRow(
            self.tokenizer, self.context_length, text, seed, settings, begin=begin, on_text=on_text
        )
        return self._answers([row], settings, alternatives, stop_when)[0]

    def generate_batch(
        self, prompts: Sequence[str], *, seeds: Sequence[int], **sampling
    ) -> list[Answer]:
        """Return the answers to prompts that are computed at once, each with a seed of its own.

        They are those that `generate` gives one by one, up to rounding: prompts are padded on the
        left to one length, and in fp16 and bf16 that can tip a token that was nearly another.

        Args:
            sampling: the fields of `Sampling`, the same for all of them.

        Raises:
            UsageError, Incompatible: as `generate`.
        """
        settings = self._settings(sampling)
        texts = [render_text(prompt, settings.template) for prompt in prompts]
        rows = [
            AnswerRow(self.tokenizer, self.context_length, text, seed, settings)
            for text, seed in zip(texts, seeds, strict=True)
        ]
        return self._answers(rows, settings) if rows else []

    def fitting_history(
        self, prompt: str, template: str, history: Sequence[Turn], room: int
    ) -> list[Turn]:
        """Return the latest turns of `history` that leave `room` tokens for the answer.

        Args:
            room: tokens; where not even the prompt alone leaves as many, no turn is kept.
        """
        kept = list(history)
        while kept:
            length = len(self.tokenizer.encode(render_text(prompt, template, kept)))
            if length + room <= self.context_length:
                break
            del kept[0]
        return kept

    def _settings(self, sampling: dict) -> Sampling:
        settings = Sampling(**sampling).normalised()
        if mistake := template_mistake(self.family, settings.template):
            warnings.warn(mistake, LabWarning, stacklevel=3)
        return settings

    def _answers(
        self, rows: list[AnswerRow], settings: Sampling, alternatives: int = 0, stop_when=None
    ) -> list[Answer]:
        began = time.perf_counter()
        with fitting_threads(self.network), torch.inference_mode():
            self.decoder.decode([row for row in rows if not row.over], settings, stop_when)
            seconds = time.perf_counter() - began
            answers = []
            for row in rows:
                row.finish()
                answers.append(
                    Answer(
                        text=row.text,
                        prompt=row.prompt,
                        prompt_tokens=len(row.prompt_ids),
                        answer_ids=row.answer_ids,
                        seed=row.seed,
                        settings=settings.as_dict(),
                        seconds=seconds,
                        steps=self._steps(row, alternatives) if alternatives else [],
                    )
                )
        return answers

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
    model: Model, prompts: Sequence[str], *, seed: int = 0, batch_size: int = 64, **sampling
) -> list[str]:
    """Return the answers to whole prompts, templates included, computed in batches.

    Prompts of about one length go together. Greedy answers are those that `Model.generate` gives
    one by one; sampled ones all have the same seed.

    Args:
        sampling: the fields of `Sampling`; greedy answers of 48 tokens, unless told otherwise.
    """
    sampling = {"temperature": 0, "max_new_tokens": 48} | sampling
    answers = {}
    order = sorted(range(len(prompts)), key=lambda i: len(model.tokenizer.encode(prompts[i])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LabWarning)  # the template is in the prompts already
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            texts = [prompts[i] for i in chosen]
            found = model.generate_batch(texts, seeds=[seed] * len(texts), **sampling)
            answers |= {i: answer.text for i, answer in zip(chosen, found, strict=True)}
    return [answers[i] for i in range(len(prompts))]
