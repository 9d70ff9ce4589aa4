"""Inference: a model in memory that answers prompts.

`load` reads any checkpoint, a base with its adapters not yet merged included, through the same
views that the writer uses, so that an unmerged model computes with exactly the merged weights.
Text is encoded with SentencePiece, the tokenizer the models were trained with.
"""

from __future__ import annotations

import contextlib
import html
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from . import catalog
from .checkpoint import Checkpoint
from .environment import memory_available
from .errors import Incompatible, LabWarning, NotEnoughRoom, NotFound, UsageError
from .merging import compose
from .templates import TEMPLATES, Turn
from .tokenizer import Tokenizer, fitting_model

SAMPLING = {
    "temperature": 0.2,
    "top_p": 0.9,
    "top_k": 40,
    "repetition_penalty": 1.1,
    "max_new_tokens": 400,
}
"""The sampling settings of the Chinese-LLaMA-Alpaca project's inference script."""


ONE_THREAD_BELOW = 10_000_000
"""Parameters of a model that is answered by one thread on a CPU."""


@dataclass(frozen=True)
class Answer:
    """An answer and what is needed to get it again.

    `text` is the answer alone; `prompt` the exact text the model was given; `settings` every
    setting in effect; `seconds` include reading the prompt.
    """

    text: str
    prompt: str
    prompt_tokens: int
    answer_ids: list[int] = field(repr=False)
    seed: int
    settings: dict
    seconds: float

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
        made_of: the catalogue's parts the weights are made of, where they are known.
        family: "llama", "alpaca", or "" where neither the parts nor the vocabulary tell.
    """

    def __init__(self, network, tokenizer: Tokenizer, made_of: tuple[str, ...] = ()):
        self.network, self.tokenizer, self.made_of = network, tokenizer, made_of
        self.context_length = network.config.max_position_embeddings
        # Rows can be added for speed: it is the pieces that tell the family.
        self.family = catalog.family_of(made_of, len(tokenizer))

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
        on_text: Callable[[str], None] | None = None,
    ) -> Answer:
        """Return the model's answer to `prompt`.

        Args:
            template: the name of the prompt template put around it ("none", "alpaca").
            history: finished turns (instruction, answer) that come before.
            temperature: 0 is greedy: no sampling, and the repetition penalty is 1.0.
            max_new_tokens: at most; the context length may end an answer earlier.
            seed: fixes the sampling; None draws one, which the answer tells.
            stop: texts that end the answer and are not part of it.
            on_text: called with each new piece of text, in whole characters.

        Raises:
            UsageError: a setting out of its range.
            Incompatible: the prompt leaves no room in the context.
        """
        settings = {
            "template": template,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "repetition_penalty": repetition_penalty if temperature > 0 else 1.0,
            "max_new_tokens": max_new_tokens,
            "stop": [stop] if isinstance(stop, str) else list(stop),
        }
        _check_settings(settings | {"seed": seed or 0})
        if mistake := template_mistake(self.family, template):
            warnings.warn(mistake, LabWarning, stacklevel=2)
        text = TEMPLATES[template].render(prompt, history)
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair is no character
        ids = self.tokenizer.encode(text)
        room = self.context_length - len(ids)
        if room < 1:
            raise Incompatible(
                f"The prompt has {len(ids)} tokens, and the context holds {self.context_length}.",
                "The model was never trained on longer texts.",
                "Shorten the prompt or the conversation.",
                finding="long-prompt",
            )
        seed = random.randrange(2**31) if seed is None else seed
        emitter = _Emitter(self.tokenizer, ids, settings["stop"], on_text)
        began = time.perf_counter()
        answer_ids = self._sample(ids, settings, min(max_new_tokens, room), seed, emitter)
        seconds = time.perf_counter() - began
        emitter.finish()
        return Answer(emitter.text, text, len(ids), answer_ids, seed, settings, seconds)

    def _sample(self, ids, settings: dict, length: int, seed: int, emitter) -> list[int]:
        prompt = torch.tensor([ids], device=self.device)
        output = self.continued(
            prompt, torch.ones_like(prompt), settings, length, seed, stopping_criteria=[emitter]
        )
        return output[0]

    @torch.inference_mode()
    def continued(
        self, ids: torch.Tensor, mask: torch.Tensor, settings: dict, length: int, seed: int, **more
    ) -> list[list[int]]:
        """Return the new ids of each row of prompts `[batch, length]`, without EOS."""
        sampling = {"do_sample": False}
        if settings["temperature"] > 0:
            sampling = {"do_sample": True, "top_k": settings["top_k"]}
            for name in ("temperature", "top_p", "repetition_penalty"):
                sampling[name] = float(settings[name])  # transformers refuses a plain 1
        devices = [self.device] if self.device.type == "cuda" else []
        eos = self.tokenizer.eos
        # Rows without a piece must not come up; there are some where embeddings were padded.
        beyond = list(range(len(self.tokenizer), self.network.config.vocab_size))
        # A caller's own random numbers stay as they are.
        with torch.random.fork_rng(devices), _fitting_threads(self.network):
            torch.manual_seed(seed)
            output = self.network.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=length,
                pad_token_id=eos,
                eos_token_id=eos,
                suppress_tokens=beyond or None,
                **sampling,
                **more,
            )
        rows = output[:, ids.shape[1] :].tolist()
        return [row[: row.index(eos)] if eos in row else row for row in rows]


@contextlib.contextmanager
def _fitting_threads(network) -> Iterator[None]:
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

    Prompts of about one length go together, padded on the left. Greedy answers are those that
    `Model.generate` gives one by one; sampled ones all draw from one seed.
    """
    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    settings |= {"repetition_penalty": repetition_penalty}
    tokenizer, answers = model.tokenizer, {}
    encoded = {i: tokenizer.encode(text) for i, text in enumerate(prompts)}
    order = sorted(encoded, key=lambda i: len(encoded[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = len(encoded[chosen[-1]])
        # Padded with <unk>, id 0: a repetition penalty on EOS would draw the answers out.
        ids = torch.zeros(len(chosen), longest, dtype=torch.long, device=model.device)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, longest - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask[row, longest - len(encoded[i]) :] = 1
        rows = model.continued(ids, mask, settings, max_new_tokens, seed)
        for i, row in zip(chosen, rows, strict=True):
            answers[i] = tokenizer.continuation(encoded[i], row)
    return [answers[i] for i in range(len(prompts))]


class _Emitter:
    """Follows an answer token by token: gives out its text, and says when a stop text has come.

    transformers calls it as a stopping criterion after every token. Text that may still change
    is held back: half of a character's bytes, or what could be the start of a stop text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop, on_text):
        self._tokenizer, self._prompt_ids = tokenizer, list(prompt_ids)
        self._stop, self._on_text = [s for s in stop if s], on_text
        self.text, self._given = "", 0

    def __call__(self, input_ids: torch.Tensor, scores=None, **_) -> torch.Tensor:
        new = input_ids[0, len(self._prompt_ids) :].tolist()
        self.text = self._tokenizer.continuation(self._prompt_ids, new)
        ends = [at for at in map(self.text.find, self._stop) if at >= 0]
        if ends:
            self.text = self.text[: min(ends)]
        else:
            self._give(self._safe_length())
        return torch.tensor([bool(ends)], device=input_ids.device)

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

    def finish(self) -> None:
        """Give out what was held back: the answer is over."""
        self._give(len(self.text))


def template_mistake(family: str, template: str) -> str:
    """Return one sentence on a template that the family was not trained with, or ""."""
    if family == "llama" and template != "none":
        return (
            f"The llama family continues text; inside the '{template}' template it meets a text "
            "that it was never trained on."
        )
    if family == "alpaca" and template == "none":
        return "The alpaca family follows instructions only inside its template (--with-prompt)."
    return ""


def _check_settings(settings: dict) -> None:
    if settings["template"] not in TEMPLATES:
        known = ", ".join(TEMPLATES)
        raise UsageError(f"There is no template '{settings['template']}'.", f"There are: {known}.")
    ranges = {
        "temperature": (0, 100),
        "top_p": (1e-6, 1),
        "top_k": (0, 10**6),
        "repetition_penalty": (0.01, 100),
        "max_new_tokens": (1, 10**6),
        "seed": (0, 2**63 - 1),
    }
    if 0 < settings["temperature"] < 0.01:
        raise UsageError(
            "temperature is too near to 0 to divide by.", "", "Use 0, which is greedy."
        )
    for name, (low, high) in ranges.items():
        if not low <= settings[name] <= high:
            raise UsageError(f"{name} is {settings[name]}; it must be between {low} and {high}.")


def pick_device(device: str = "auto") -> torch.device:
    """Return the device for "auto", "cpu", "cuda", "cuda:N" or "mps".

    Auto picks CUDA, then Apple's MPS, then the CPU.

    Raises:
        UsageError: it is none of these.
        NotFound: this machine does not have it.
    """
    if device == "auto":
        found = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device("mps" if torch.backends.mps.is_available() else found)
    try:
        wanted = torch.device(device)
    except RuntimeError:
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda", "mps"):
        raise UsageError(
            f"There is no device '{device}'.", "", "Use auto, cpu, cuda, cuda:1 or mps."
        )
    counts = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if (wanted.index or 0) >= counts[wanted.type]:
        raise NotFound(
            f"This machine has no device '{device}'.",
            "PyTorch does not see it; 'llamalab check' tells what it sees.",
            "Use --device auto, which takes the best one there is.",
        )
    return wanted


DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def load(
    base_model: str | Path,
    lora_model: str | Path | Sequence[str | Path] | None = None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    models_dir: str | Path = "",
    force: bool = False,
) -> Model:
    """Load a model, adapters that are not merged yet included.

    Args:
        base_model: a directory in either layout, a catalogue name, or `hf:OWNER/REPO`.
        lora_model: adapters to add, in order; they are merged in memory, exactly as on disk.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        dtype: "float16", "bfloat16", "float32"; auto means the checkpoint's own on a GPU and
            float32 on a CPU.
        force: allow an adapter that the base contains already.

    Raises:
        LabError: nothing to load, parts that do not fit, or too little memory.
    """
    pick_device(device)  # a wrong name is said before anything is read
    view = compose(base_model, lora_model, models_dir=models_dir, force=force)
    return model_of(view, device=device, dtype=dtype)


def model_of(view: Checkpoint, *, device: str = "auto", dtype: str = "auto") -> Model:
    """Load a checkpoint in HF layout, a view with adapters included; otherwise as `load`."""
    where = pick_device(device)
    fitting_model(view)  # an id beyond the embedding would be an error far from its cause
    if dtype not in (*DTYPES, "auto"):
        raise UsageError(f"There is no dtype '{dtype}'.", "", f"Use auto, {', '.join(DTYPES)}.")
    auto = torch.float32 if where.type == "cpu" else view.dtype
    chosen = DTYPES.get(dtype, auto)
    _require_memory(view, where, chosen)
    return Model(_network(view, where, chosen), Tokenizer(view.tokenizer), view.made_of)


def _require_memory(view: Checkpoint, where: torch.device, dtype: torch.dtype) -> None:
    values = sum(spec.nbytes // spec.dtype.itemsize for spec in view.tensors.values())
    needed = values * dtype.itemsize
    if where.type == "cuda":
        free = torch.cuda.mem_get_info(where)[0]
    else:
        free = memory_available() or needed
    if needed > free:
        raise NotEnoughRoom(
            f"{values / 1e9:.1f} billion values of {dtype.itemsize} bytes need {needed / 1e9:.1f} GB "
            f"on {where}, and {free / 1e9:.1f} GB are free.",
            "The weights alone do not fit.",
            "Use --dtype float16, another --device, or a smaller model.",
        )


def unsound(weights: torch.Tensor) -> str:
    """Return what is wrong with the values of a weight or a block of it, or "".

    One sum finds NaN and infinities; only where it is 0 are the values looked at.
    """
    total = weights.sum(dtype=torch.float32)
    if not torch.isfinite(total):
        return "hold NaN or infinite values"
    return "are all zero" if total == 0 and not weights.any() else ""


def _network(view: Checkpoint, where: torch.device, dtype: torch.dtype):
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    weights = {}
    for name in view.tensors:
        weights[name] = torch.cat(list(view.blocks(name))).to(dtype)
        if fault := unsound(weights[name]):
            text = f"The weights {name} {fault}: the answers will mean nothing."
            warnings.warn(text, LabWarning, stacklevel=3)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network = LlamaForCausalLM.from_pretrained(
            None, config=LlamaConfig.from_dict(view.config), state_dict=weights, dtype=dtype
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    return network.to(where).eval()


def generate(
    base_model: str | Path,
    prompt: str,
    lora_model: str | Path | Sequence[str | Path] | None = None,
    *,
    with_prompt: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    models_dir: str | Path = "",
    force: bool = False,
    **settings,
) -> Answer:
    """Load a model and answer one prompt; `settings` are those of `Model.generate`.

    Args:
        with_prompt: put the alpaca template around `prompt`.
    """
    model = load(
        base_model, lora_model, device=device, dtype=dtype, models_dir=models_dir, force=force
    )
    return model.generate(prompt, template="alpaca" if with_prompt else "none", **settings)
