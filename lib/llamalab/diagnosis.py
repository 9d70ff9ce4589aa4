"""Diagnosing: what makes a model answer nonsense, or in the wrong language, though nothing fails.

`diagnose` takes the options of `generate` and looks at everything between them and an answer.
What `load` refuses is found by the same code: those errors carry the name of their finding.
The rest are doubts that no program of the field raises, each one a function here.

`findings.toml` beside this file is the one table of them all; README's is made from it:

    python -m llamalab.diagnosis
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from packaging.specifiers import SpecifierSet

from . import catalog, surgery
from .catalog import locate
from .checkpoints import Checkpoint, open_checkpoint, read_json
from .errors import LabError, findings
from .inference import Model, fault_of, model_of, pick_device, render_text, template_mistake
from .progress import bytes_bar
from .reports import Report, Row

PAGES = (
    "What is the capital of France? The capital of France is Paris.\n"
    "What does a cow eat? A cow eats grass.\n"
    "Is an apple an animal? No, an apple is not an animal, an apple is a fruit.\n",
    "Where does a doctor work? A doctor works in a hospital.\n"
    "What is cheese made from? Cheese is made from milk.\n"
    "Which continent is Egypt in? Egypt is in Africa.\n",
    "How many legs does a horse have? A horse has four legs.\n"
    "What is the currency of Japan? The currency of Japan is the yen.\n"
    "Is a dog an animal? Yes, a dog is an animal.\n",
)
"""Questions and answers that any sound model finds easy, once it has seen how they go on."""

_FOREIGN = {"enable_lora", "merge_weights"}
"""Keys in the published adapters' configurations that later versions of PEFT do not know."""

_BREAKING = (
    ("peft", "<0.3", "leaves out, without a word, a tensor whose name it does not know", set()),
    ("peft", ">=0.6,<0.14", "raises TypeError on enable_lora and merge_weights", _FOREIGN),
    ("transformers", "<4.28", "has no LLaMA", set()),
)
"""(package, versions, what they do, keys of the adapter they do it for), read in their wheels."""


@dataclass(frozen=True, repr=False)
class Diagnosis(Report):
    """What was looked at, and what was found.

    Attributes:
        rows: what the weights are, what could not be judged and why, and a row with the status
            FOUND for each finding, in the order of `findings.toml`: the first is the one to mend first.
        looked_at: what was looked at.
    """

    rows: tuple[Row, ...]
    looked_at: tuple[str, ...] = ()

    @property
    def findings(self) -> list[Row]:
        return [row for row in self.rows if row.status == "FOUND"]

    @property
    def names(self) -> list[str]:
        return [finding.name for finding in self.findings]

    @property
    def notes(self) -> list[str]:
        """What could not be judged, and why."""
        return [row.found for row in self.rows if row.name == "note"]

    def as_dict(self) -> dict:
        return super().as_dict() | {"looked_at": self.looked_at}


def diagnose(
    base_model: str | Path,
    lora_model: str | Path | Sequence[str | Path] | None = None,
    *,
    with_prompt: bool | None = None,
    prompt: str = "",
    quick: bool = False,
    device: str = "auto",
    models_dir: str | Path = "",
) -> Diagnosis:
    """Find what would make the answers of these options of `generate` meaningless.

    Args:
        base_model: a directory in either layout, a catalogue name, or `hf:OWNER/REPO`.
        lora_model: adapters in order, likewise.
        with_prompt: whether prompts stand inside the alpaca template; None means not said, and
            then the template is not judged.
        prompt: a prompt that must leave room in the context.
        quick: leave out what reads every weight, and what computes with them.
        device: where the forward passes run; they need the model's memory.

    Raises:
        NotFound, UsageError: there is nothing under one of the names, or no such device.
    """
    pick_device(device)
    adapters = [locate(item, models_dir) for item in surgery.adapter_list(lora_model)]
    case = _Case(locate(base_model, models_dir), adapters)
    view = case.look("layout", lambda: surgery.as_hf(open_checkpoint(case.directory)))
    opened = [case.look("adapters", surgery.Adapter, path) for path in adapters]
    if adapters and view and all(opened):
        view = case.look("adapters", surgery.with_adapters, view, opened) or view
    if view is None:
        return case.end("The weights could not be opened.")
    # From here on, each check goes on only where it would not tell an earlier fault again.
    if adapters and not case.findings:
        case.look("adapters", _check_new_pieces, opened, view)
    if not case.findings:
        case.look("tokenizer", surgery.fitting_model, view)
        case.look("dtypes", _check_dtypes, view)
    sound = not case.findings
    # Rows can be added for speed: it is the pieces that tell the family.
    rows = len(surgery.Tokenizer(view.tokenizer)) if sound else view.vocab_size
    family = catalog.family_of(view.made_of, rows)
    if sound:
        _look_around(case, view, prompt, bool(with_prompt))
    # A base that is merged has the family asked for.
    if sound or list(case.findings) == ["applied-twice"]:
        _check_template(case, family, with_prompt)
    if adapters:
        case.look("versions", _check_versions, opened)
    unread = "the values of all weights, and the order of q and k (by a forward pass)"
    if quick or not sound:
        why = "Left out by --quick" if quick else "Not looked at before what was found is mended"
        case.notes.append(f"{why}: {unread}.")
    elif case.look("values", _check_values, view):
        _check_order(case, view, device)
    return case.end(_subject(view, family))


def _look_around(case: _Case, view: Checkpoint, prompt: str, with_prompt: bool) -> None:
    """Look at what surrounds sound weights: BOS, the prompt, the rows that were appended."""
    if not case.adapters:
        case.look("BOS", _check_bos, case, view)
    if prompt:
        case.look("prompt", _check_prompt, view, prompt, with_prompt)
    case.look("new rows", _check_appended_rows, view)


class _Case:
    """A diagnosis in the making: runs checks, and keeps what they raise as findings."""

    def __init__(self, directory: Path, adapters: Sequence[Path]):
        self.directory, self.adapters = directory, adapters
        self.findings: dict[str, Row] = {}
        self.notes: list[str] = []
        self.looked_at: list[str] = []

    def look(self, what: str, check: Callable, *arguments):
        """Return what `check` returns, or None if it raised: then there is one finding more."""
        self.looked_at.append(what)
        try:
            return check(*arguments)
        except LabError as error:
            name = error.finding or "damaged-file"
            if name not in self.findings:
                command = self._filled_in(findings()[name].command)
                self.findings[name] = Row(
                    "FOUND", name, error.what, cause=error.why, fix=error.fix, command=command
                )
            return None

    def _filled_in(self, command: str) -> str:
        """Put what was given for MODEL and ADAPTER; a tokenizer belongs beside the last of them."""
        last = [self.directory, *self.adapters][-1]
        given = {"MODEL": str(self.directory), "MODEL/": f"{last}/"}
        if self.adapters:
            given["ADAPTER"] = ",".join(map(str, self.adapters))
        words = (shlex.quote(given[word]) if word in given else word for word in command.split())
        return " ".join(words)

    def end(self, subject: str) -> Diagnosis:
        looked_at = tuple(dict.fromkeys(self.looked_at))
        rows = [Row("INFO", "model", subject), *(Row("INFO", "note", note) for note in self.notes)]
        rows += [self.findings[name] for name in findings() if name in self.findings]
        if not self.findings:
            rows.append(Row("OK", "findings", f"none; looked at: {', '.join(looked_at)}"))
        return Diagnosis(tuple(rows), looked_at)


def _subject(view: Checkpoint, family: str) -> str:
    made = " + ".join(view.made_of) or "Weights that the catalogue does not know"
    told = f"{family} family" if family else "family not known"
    return f"{made}: {view.vocab_size:,} rows, {told}."


def _check_versions(adapters: Sequence[surgery.Adapter | None]) -> None:
    keys = set().union(*(adapter.config for adapter in adapters if adapter))
    for package, versions, what, needed in _BREAKING:
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        broken = SpecifierSet(versions).contains(installed, prereleases=True)
        if broken and needed <= keys:
            raise LabError(f"{package} {installed} is installed; it {what}.", finding="versions")


def _check_new_pieces(adapters: Sequence[surgery.Adapter], view: Checkpoint) -> None:
    """Hold an adapter that promises no embeddings to the tokenizer that lies beside it."""
    for adapter in adapters:
        if adapter.tokenizer and not adapter.whole:
            pieces = len(surgery.Tokenizer(adapter.tokenizer))
            if pieces > view.vocab_size:
                what = f"{adapter.tokenizer} has {pieces:,} pieces, the model has "
                what += f"{view.vocab_size:,} rows, and the adapter brings no embeddings."
                raise LabError(what, finding="adapter-without-embeddings")


def _check_bos(case: _Case, view: Checkpoint) -> None:
    """Hold the tokenizer files that plain transformers reads to BOS; SentencePiece needs none.

    With a tokenizer.json its own post-processor decides, else `add_bos_token` does (ran with
    transformers 5.23; a tokenizer.model alone is read by another class, with other ids).
    """
    directory = case.directory
    if not (directory / "config.json").is_file():
        if (directory / "tokenizer_config.json").is_file():
            what = f"{directory} holds Meta's weights beside transformers' tokenizer_config.json."
            raise LabError(what, finding="meta-weights")
        case.notes.append(
            "Weights in Meta layout. transformers does not read them ('does not appear to have a "
            f"file named config.json'): for it, llamalab convert --input-dir {directory}."
        )
        return  # programs that read Meta's own layout add BOS themselves
    fast, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if fast.is_file():
        try:
            begins = tokenizers.Tokenizer.from_file(str(fast)).encode("a").ids[0]
        except Exception as error:  # a bare Exception is all that the library raises
            what = f"{fast} cannot be read: {error}."
            raise LabError(what, finding="damaged-file") from None
        adds_bos = begins == surgery.Tokenizer(view.tokenizer).bos
        seen, mend = f"{fast.name} does not begin a text with BOS.", "Make the model again."
    else:
        config_json = read_json(config) if config.is_file() else {}
        adds_bos = config_json.get("add_bos_token") is True
        seen = f"{config.name} {'does not say' if config.is_file() else 'is missing, as is'} "
        seen += "add_bos_token." if config.is_file() else "tokenizer.json."
        mend = 'Put "add_bos_token": true into tokenizer_config.json, or make the model again.'
    if not adds_bos:
        raise LabError(f"In {directory}, {seen}", fix=mend, finding="no-bos")


def _check_dtypes(view: Checkpoint) -> None:
    dtypes = {spec.dtype: name for name, spec in view.tensors.items()}
    if len(dtypes) > 1:
        seen = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
        what = f"The weights are of {len(dtypes)} dtypes: {seen}."
        raise LabError(what, finding="unexpected-dtype")


def _check_template(case: _Case, family: str, with_prompt: bool | None) -> None:
    if not family:
        case.notes.append("The family is not known, so the prompt template is not judged.")
        return
    if with_prompt is None:
        option = "--with-prompt" if family == "alpaca" else "without --with-prompt"
        case.notes.append(f"The {family} family is to be asked {option}.")
        return

    def check() -> None:
        template = "alpaca" if with_prompt else "none"
        if mistake := template_mistake(family, template):
            name = "template-on-llama" if family == "llama" else "no-template"
            raise LabError(mistake, finding=name)

    case.look("template", check)


def _check_prompt(view: Checkpoint, prompt: str, with_prompt: bool) -> None:
    text = render_text(prompt, "alpaca" if with_prompt else "none")
    tokens = len(surgery.Tokenizer(view.tokenizer).encode(text))
    context = view.config["max_position_embeddings"]
    if tokens >= context:
        what = f"The prompt has {tokens:,} tokens, and the context holds {context:,}."
        raise LabError(what, finding="long-prompt")


def _check_appended_rows(view: Checkpoint) -> None:
    """Hold the rows of appended pieces against the rows that were there before.

    An initialiser leaves rows that are all zero, all alike (the mean of the old rows), or drawn
    at random: then their lengths hardly differ, by 1 / sqrt(2 d) of their mean in d dimensions.
    Trained rows differ several times as much.
    """
    model = surgery.fitting_model(view)
    first, last = surgery.appended(model), len(model.pieces)
    if last - first < 8 or first < 8:
        return
    for name in (view.embedding, "lm_head.weight"):
        usual = (2 * view.tensors[name].shape[1]) ** -0.5
        old, new = (_spread_and_variance(view, name, *rows) for rows in ((3, first), (first, last)))
        if not new.variance:
            seen = "are all equal"
        elif new.variance < 1e-3 * old.variance:
            seen = "are all nearly equal"
        elif new.spread < 1.5 * usual and old.spread > 2.5 * usual:
            seen = f"vary in length by {new.spread:.1%}, as random ones do ({usual:.1%})"
        else:
            continue
        what = f"The {last - first:,} appended rows of {name} {seen}; "
        raise LabError(what + f"the old ones vary by {old.spread:.1%}.", finding="untrained-rows")


class _Rows(NamedTuple):
    """Of some rows: how much their lengths differ, as a share of their mean; their variance."""

    spread: float
    variance: float


def _spread_and_variance(view: Checkpoint, name: str, start: int, stop: int) -> _Rows:
    """Look at rows [start, stop) of `name`, a few thousand at a time."""
    lengths, total, squares = [], 0.0, 0.0
    for first in range(start, stop, 4096):
        rows = view.read(name, first, min(first + 4096, stop)).double()
        lengths.append(rows.norm(dim=1))
        total, squares = total + rows.sum(0), squares + rows.square().sum(0)
    lengths, count = torch.cat(lengths), stop - start
    variance = (squares / count - (total / count).square()).clamp(min=0).mean()
    mean = lengths.mean()
    return _Rows((lengths.std() / mean).item() if mean else 0.0, variance.item())


def _check_values(view: Checkpoint) -> bool:
    """Read every weight once; True when all are sound."""
    with bytes_bar(view.total_bytes, "values") as bar:
        for name in view.tensors:
            faults = []
            for block in view.blocks(name):
                faults.append(fault_of(block))
                bar.update(block.nbytes)
            wrong = [fault for fault in faults if "zero" not in fault and fault]
            if wrong or all(faults):
                what = f"The weights {name} {(wrong or faults)[0]}."
                raise LabError(what, finding="unsound-values")
    return True


def _check_order(case: _Case, view: Checkpoint, device: str) -> None:
    """Compute the loss with the q and k rows as they are, permuted, and permuted back."""
    try:
        model = model_of(view, device=device)
    except LabError as error:
        case.notes.append(f"The order of q and k was not judged: {error.what}")
        return

    def check() -> None:
        as_is = answer_loss(model)
        losses = {}
        for other, there, back in (
            ("permuted once more", surgery.permute, surgery.unpermute),
            ("permuted back", surgery.unpermute, surgery.permute),
        ):
            _reorder(model, there)
            losses[other] = answer_loss(model)
            _reorder(model, back)
        best = min(losses, key=losses.get)
        # Worse than a blind guess means nothing: a random model has no right order.
        guess = torch.tensor(float(view.vocab_size)).log().item()
        if losses[best] < as_is - 1 and losses[best] < guess - 1:
            never = best == "permuted once more"
            raise LabError(
                f"The loss is {as_is:.2f} nats a token as it is, and {losses[best]:.2f} with the "
                f"rows of q and k {best}.",
                f"They were {'never permuted' if never else 'permuted twice'}: the model mixes up "
                "which words are near each other.",
                finding="q-k-order",
            )

    case.look("order of q and k", check)


def _reorder(model: Model, order: Callable) -> None:
    config = model.network.config
    for layer in model.network.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            weight = projection.weight.data
            weight.copy_(order(weight, config.hidden_size // config.num_attention_heads))


def answer_loss(model: Model, pages: Sequence[str] = PAGES) -> float:
    """Return the mean loss, in nats a token, of the answers on `pages`.

    The first line of a page shows how the others go on; of those, what follows the question
    mark counts.
    """
    losses = []
    for page in pages:
        ids, read = model.tokenizer.encode(page), ""
        chances = -model.logits(ids[:-1]).log_softmax(-1)
        each = chances[range(len(ids) - 1), ids[1:]]  # of token i + 1, in place i
        for number, line in enumerate(page.splitlines(keepends=True)):
            asked = len(model.tokenizer.encode(read + line.partition("?")[0] + "?"))
            read += line
            if number > 0:
                losses.append(each[asked - 1 : len(model.tokenizer.encode(read)) - 1])
    return torch.cat(losses).mean().item()


def findings_table() -> str:
    """Return README's troubleshooting table, in Markdown."""
    lines = ["| what you see | why | what helps | `diagnose` says |", "|---|---|---|---|"]
    for name, kind in findings().items():
        is_command = kind.command.startswith(("llamalab ", "cp "))
        helps = f"`{kind.command}`" if is_command else kind.command
        lines.append(f"| {kind.symptom} | {kind.cause} | {helps} | {name} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(findings_table())
