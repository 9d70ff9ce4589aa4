"""Predictions: a file of prompts in, a file of answers out, in batches that a kill cannot harm.

Both are for machines: a prompt a line, or JSON Lines; and one JSON object a line for the answers,
in the order of the prompts. What is in the file whole is never asked again.
"""

import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..catalog import kv_cache_bytes
from ..errors import DamagedFile, Incompatible, NotFound, OutputExists
from ..files import lock_now
from ..progress import bar
from .loading import memory_free, shape_of
from .model import Answer, Model
from .sampling import Sampling, check_seed
from .templates import render_text

BATCH = 64
"""Prompts that are answered at once, at most."""

Batch = tuple[list[str], list[int]]
"""Prompts, and the seed for each."""


@dataclass(frozen=True)
class Predictions:
    """A finished file: how many lines it has, and how many of them were there already."""

    path: Path
    lines: int
    already: int
    seed: int

    def __str__(self) -> str:
        before = f", {self.already} of them from before" if self.already else ""
        return f"{self.path}: {self.lines} answers{before}, seed {self.seed}"


def read_prompts(path: str | Path) -> list[str]:
    """Return the prompts of a file: a line each, or the `prompt` of each object of a `.jsonl`.

    Lines of nothing but blanks are no prompts.

    Raises:
        NotFound: there is no such file.
        DamagedFile: it is not UTF-8, or a line is no object with a `prompt`; the line is named.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFound(f"There is no file {path}.", "", "It holds a prompt a line, or is a .jsonl.")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DamagedFile(f"{path} is not UTF-8 text: {error}.") from None
    # Not splitlines: a prompt may hold a form feed, or a line separator of Unicode.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, TypeError, KeyError):
            prompt = None
        if not isinstance(prompt, str):
            raise DamagedFile(
                f"{path}, line {number}, is no JSON object with a text as its 'prompt'.",
                "A .jsonl has one such object a line.",
                'For example: {"prompt": "苹果是植物吗"}',
            )
        prompts.append(prompt)
    return prompts


def predict(
    model: Model,
    data_file: str | Path,
    predictions_file: str | Path,
    *,
    sampling: Sampling,
    seed: int | None = None,
    origin: dict | None = None,
    batch_size: int | None = None,
    answer: Callable[[list[Batch], Sampling], Iterator[list[Answer]]] | None = None,
) -> Predictions:
    """Answer every prompt of `data_file`; append to `predictions_file` what it lacks.

    Args:
        model: the one that answers; with `answer`, only its tokenizer and its limits are used.
        sampling: the settings of every answer.
        seed: line i is drawn with `seed + i`, and is what `generate` gives with that seed. None
            goes on with the seed of the file, or draws one.
        origin: what else the answers depend on, such as the model's name; kept with the settings.
        batch_size: prompts at once; None takes 64, or what memory holds.
        answer: given batches and settings, yields their answers in the same order.

    Raises:
        OutputExists: the file holds something else, or answers of other prompts or settings.
        Incompatible: a prompt leaves no room in the context; nothing has been asked.
    """
    sampling = sampling.normalised()
    prompts = read_prompts(data_file)
    settings = sampling.as_dict() | (origin or {})
    longest = _longest(model, prompts, sampling.template, data_file)
    if batch_size is None:
        tokens = longest + sampling.max_new_tokens
        batch_size = BATCH if answer else fitting_batch(model, tokens)
    path = Path(predictions_file)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path) as file, bar(len(prompts), path.name, unit=" prompts") as shown:
        seed, already = _resume(file, path, prompts, settings, seed)
        check_seed(seed + len(prompts))
        shown.update(already)
        # Batches begin at the same lines whether or not the file was begun before.
        starts = [i for i in range(already, len(prompts)) if i == already or i % batch_size == 0]
        batches = [
            (prompts[start:end], list(range(seed + start, seed + end)))
            for start, end in pairwise([*starts, len(prompts)])
        ]
        given = answer(batches, sampling) if answer else _answers(model, batches, sampling)
        for start, answers in zip(starts, given, strict=True):
            lines = [
                _line(start + i, prompts[start + i], one, settings) for i, one in enumerate(answers)
            ]
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
            shown.update(len(lines))
    return Predictions(path, len(prompts), already, seed)


def _answers(model: Model, batches: list[Batch], sampling: Sampling) -> Iterator[list[Answer]]:
    for prompts, seeds in batches:
        yield model.generate_batch(prompts, seeds=seeds, **sampling.as_dict())


def _line(index: int, prompt: str, answer: Answer, settings: dict) -> str:
    line = {
        "index": index,
        "prompt": prompt,
        "answer": answer.text.strip(),
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": answer.answer_tokens,
        "seed": answer.seed,
        "settings": settings,
    }
    return json.dumps(line, ensure_ascii=False) + "\n"


@contextmanager
def _locked(path: Path) -> Iterator:
    """Open the file to be read and appended to, by nobody else at the same time."""
    with path.open("a+b") as file:
        if not lock_now(file):
            raise OutputExists(
                f"{path} is being written by another process.",
                "Two that answer into one file would mix their lines.",
                "Wait for it, or name another --predictions-file.",
            )
        yield file


def _resume(file, path: Path, prompts: list[str], settings: dict, seed: int | None):
    """Return (seed, finished lines); cut away the half line that a kill has left."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines()
    try:
        objects = [json.loads(line) for line in lines]
        found = [
            (line["index"], line["prompt"], line["seed"], line["settings"]) for line in objects
        ]
    except (ValueError, TypeError, KeyError):
        found = None
    if seed is None and found:
        seed = found[0][2]
    elif seed is None:
        seed = random.randrange(2**31) if settings["temperature"] > 0 else 0
    settings = json.loads(json.dumps(settings))
    wanted = [(i, prompt, seed + i, settings) for i, prompt in enumerate(prompts)]
    if found is None or found != wanted[: len(found)] or (not lines and content[:1] not in b"{"):
        raise OutputExists(
            f"{path} holds something else than the first answers to these prompts.",
            "Its prompts, its settings or its seed are others, or it is no file of answers.",
            "Name another --predictions-file, or remove that one.",
        )
    file.truncate(whole)
    return seed, len(found)


def _longest(model: Model, prompts: list[str], template: str, data_file: str | Path) -> int:
    longest = 0
    for i, prompt in enumerate(prompts):
        length = len(model.tokenizer.encode(render_text(prompt, template)))
        if length >= model.context_length:
            raise Incompatible(
                f"Prompt {i} of {data_file} has {length} tokens, and the context holds "
                f"{model.context_length}: {prompt[:40]}...",
                "The model was never trained on longer texts; no prompt has been asked yet.",
                "Shorten it.",
            )
        longest = max(longest, length)
    return longest


def fitting_batch(model: Model, tokens: int) -> int:
    """Return how many rows of so many tokens have room for their caches in half the free memory."""
    tokens = min(tokens, model.context_length)
    width = model.network.dtype.itemsize
    row = kv_cache_bytes(shape_of(model.network.config.to_dict()), tokens, 1, width)
    free = memory_free(model.device)
    return BATCH if free is None else max(1, min(BATCH, free // 2 // row))
