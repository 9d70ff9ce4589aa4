"""Diagnosing: what makes a model answer nonsense, or in the wrong language, though nothing fails.

`diagnose` takes the options of `generate` and looks at everything between them and an answer.
What `load` refuses is found by the same code: those errors carry the name of their finding.
The rest are doubts that no program of the field raises, each one a function here.

`FINDINGS` is the one table of them all; README's troubleshooting table is made from it:

    python -m llamalab.diagnosis
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from packaging.specifiers import SpecifierSet

from . import catalog
from .checkpoint import Checkpoint, open_checkpoint, read_json
from .conversion import as_hf, permute, unpermute
from .errors import LabError
from .inference import Model, model_of, template_mistake, unsound
from .merging import Adapter, adapter_list, with_adapters
from .places import locate
from .progress import bytes_bar
from .templates import TEMPLATES
from .tokenizer import Tokenizer, appended, fitting_model


class Kind(NamedTuple):
    """One line of the troubleshooting table: what a reader sees, why, and the command that helps.

    In the command, MODEL and ADAPTER stand for what was given; BASE, META and OUT are the reader's
    to fill in: the base model, Meta's files and a new directory.
    """

    symptom: str
    cause: str
    command: str


FINDINGS = {
    "adapter-as-model": Kind(
        "An adapter's directory is given as a model",
        "An adapter holds changes to a base model and is none itself.",
        "llamalab merge --base-model BASE --lora-model MODEL --output-dir OUT",
    ),
    "no-config": Kind(
        "`does not appear to have a file named config.json`",
        "These are no weights in HF layout: the directory is another one, or its config.json is "
        "missing.",
        "llamalab convert --input-dir META --output-dir OUT",
    ),
    "meta-weights": Kind(
        "A config.json was brought over, and the model still does not load, or loads with random "
        "weights",
        "The weights are in Meta layout: other names, and another order of rows.",
        "llamalab convert --input-dir MODEL --output-dir OUT",
    ),
    "hf-weights": Kind(
        "Weights in HF layout lie in a consolidated.00.pth",
        "A file was renamed. The layouts differ in names and in the order of q and k rows.",
        "llamalab convert --input-dir META --output-dir OUT",
    ),
    "damaged-file": Kind(
        "`An HTML page, not the file`, a file that ends early, or one that is missing",
        "A download was answered by a login or error page, or was cut off.",
        "llamalab verify MODEL",
    ),
    "unexpected-dtype": Kind(
        "Weights of whole numbers, or of several dtypes",
        "The file was quantised, or put together from two models.",
        "llamalab verify MODEL",
    ),
    "borrowed-config": Kind(
        "A size mismatch for embed_tokens when the model is loaded",
        "The config.json is of another model, often of the plain base: its vocab_size is not "
        "that of the weights.",
        "llamalab merge --base-model BASE --lora-model ADAPTER --output-dir OUT",
    ),
    "no-tokenizer": Kind(
        "There is no tokenizer.model",
        "Without it nobody can say which piece a row of the embedding stands for.",
        "cp ADAPTER/tokenizer.model MODEL/",
    ),
    "base-tokenizer": Kind(
        "Chinese comes out as single bytes, or not at all",
        "The base's tokenizer lies beside the merged model: it knows no Chinese piece.",
        "cp ADAPTER/tokenizer.model MODEL/",
    ),
    "mixed-vocabularies": Kind(
        "49,953 meets 49,954: `fewer than the base's`",
        "Tokenizer, adapter and model are of both families; alpaca has one pad token more.",
        "llamalab merge --base-model BASE --lora-model ADAPTER --output-dir OUT",
    ),
    "vocabulary-mismatch": Kind(
        "The tokenizer has more or fewer pieces than the embedding has rows",
        "Tokenizer and weights are of two models.",
        "cp ADAPTER/tokenizer.model MODEL/",
    ),
    "no-bos": Kind(
        "Plain transformers answers worse than llamalab",
        "The tokenizer's files do not ask for BOS, with which every text began in training.",
        "llamalab convert --input-dir META --output-dir OUT",
    ),
    "applied-twice": Kind(
        "`The base already contains the adapter`; where it is not refused: repetitions, nonsense",
        "The model is merged, and --lora-model was given again: every change counts twice.",
        "llamalab generate --base-model MODEL",
    ),
    "another-size": Kind(
        "The adapter's matrices do not fit the base's",
        "It was trained on a model of another size.",
        "llamalab models",
    ),
    "another-base": Kind(
        "The adapter fits, and the answers mean nothing",
        "It was trained on other weights of the same shape, another generation perhaps.",
        "llamalab merge --base-model BASE --lora-model ADAPTER --output-dir OUT",
    ),
    "missing-predecessor": Kind(
        "A plus or pro model answers badly",
        "Its adapter was trained on top of another one, which was not merged before it.",
        "llamalab merge --base-model BASE --lora-model FIRST,LAST --output-dir OUT",
    ),
    "adapter-without-embeddings": Kind(
        "The merged model reads Chinese as noise",
        "The adapter was saved without the embeddings that its configuration promises.",
        "llamalab download ADAPTER",
    ),
    "unsupported-adapter": Kind(
        "`which this merge does not support`",
        "The adapter is not a plain LoRA (DoRA, say).",
        "merge_and_unload of PEFT",
    ),
    "untrained-rows": Kind(
        "A Chinese question gets English words that say little",
        "The vocabulary was extended and the new rows were never filled: the adapter's embeddings "
        "were dropped on the way.",
        "llamalab merge --base-model BASE --lora-model ADAPTER --output-dir OUT",
    ),
    "unsound-values": Kind(
        "One token for ever, or `nan`",
        "Weights are all zero, NaN or infinite.",
        "llamalab verify MODEL",
    ),
    "q-k-order": Kind(
        "Fluent for some words, then nonsense",
        "The rows of q and k are in the wrong order: permuted never, or twice.",
        "llamalab convert --input-dir META --output-dir OUT",
    ),
    "template-on-llama": Kind(
        "A Chinese question, an English answer",
        "A llama model continues text; inside the English template it goes on in English.",
        "llamalab generate --base-model MODEL",
    ),
    "no-template": Kind(
        "An alpaca model rambles",
        "It follows instructions inside its template only.",
        "llamalab generate --base-model MODEL --with-prompt",
    ),
    "long-prompt": Kind(
        "The end of a long prompt is not answered",
        "The prompt leaves no room in the context.",
        "a shorter prompt",
    ),
    "versions": Kind(
        "PEFT fails on a published adapter, or leaves its embeddings out",
        "Versions of PEFT and transformers that are known to break this path.",
        "llamalab check",
    ),
}
"""Every finding by name, in the order in which a reader should look for it."""

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


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: what was seen, what follows from it, and what mends it."""

    name: str
    evidence: str
    consequence: str
    mend: str
    command: str

    def __str__(self) -> str:
        rows = asdict(self)
        lines = [f"FOUND  {rows.pop('name')}"]
        return "\n".join(lines + [f"       {key:12} {text}" for key, text in rows.items() if text])


@dataclass(frozen=True)
class Diagnosis:
    """What was looked at, and what was found.

    Attributes:
        subject: what the weights are, as far as that can be told.
        findings: in the order of `FINDINGS`' checks; the first one is the one to mend first.
        notes: what could not be judged, and why.
    """

    subject: str
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    looked_at: tuple[str, ...] = field(default=(), repr=False)

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def names(self) -> list[str]:
        return [finding.name for finding in self.findings]

    def as_dict(self) -> dict:
        return {"ok": self.ok} | asdict(self)

    def __str__(self) -> str:
        lines = [f"INFO   {text}" for text in (self.subject, *self.notes)]
        lines += [str(finding) for finding in self.findings]
        if self.ok:
            lines.append(f"OK     nothing found ({', '.join(self.looked_at)})")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre style='white-space: pre-wrap'>{html.escape(str(self))}</pre>"


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
        NotFound, UsageError: there is nothing under one of the names.
    """
    adapters = [locate(item, models_dir) for item in adapter_list(lora_model)]
    case = _Case(locate(base_model, models_dir), adapters)
    view = case.look("layout", lambda: as_hf(open_checkpoint(case.directory)))
    if adapters:
        opened = [case.look("adapters", Adapter, path) for path in adapters]
        if view and all(opened):
            view = case.look("adapters", with_adapters, view, opened) or view
        case.look("versions", _check_versions, opened)
    if view is None:
        return case.end("The weights could not be opened.")
    family = catalog.family_of(view.made_of, view.vocab_size)
    # From here on, each check goes on only where it would not tell an earlier fault again.
    if not case.names:
        if case.look("tokenizer", fitting_model, view) is not None:
            if not adapters:
                case.look("BOS", _check_bos, case.directory, view)
            if prompt:
                case.look("prompt", _check_prompt, view, prompt, bool(with_prompt))
        case.look("dtypes", _check_dtypes, view)
    sound = not case.names
    if sound or case.names == ["applied-twice"]:  # a base that is merged has the family asked for
        _check_template(case, family, with_prompt)
    if sound:
        case.look("new rows", _check_appended_rows, view)
    if quick:
        case.notes.append("Left out by --quick: the values of all weights; the order of q and k.")
    elif sound and case.look("values", _check_values, view):
        _check_order(case, view, device)
    return case.end(_subject(view, family))


class _Case:
    """A diagnosis in the making: runs checks, and keeps what they raise as findings."""

    def __init__(self, directory: Path, adapters: Sequence[Path]):
        self.directory, self.adapters = directory, adapters
        self.findings: list[Finding] = []
        self.notes: list[str] = []
        self.looked_at: list[str] = []

    @property
    def names(self) -> list[str]:
        return [finding.name for finding in self.findings]

    def look(self, what: str, check: Callable, *arguments):
        """Return what `check` returns, or None if it raised: then there is one finding more."""
        self.looked_at.append(what)
        try:
            return check(*arguments)
        except LabError as error:
            name = error.finding or "damaged-file"
            kind = FINDINGS[name]
            given = {"MODEL": self.directory, "ADAPTER": ",".join(map(str, self.adapters))}
            words = [re.sub(r"^(MODEL|ADAPTER)", lambda m: str(given[m[1]] or m[1]), word)
                     for word in kind.command.split()]  # fmt: skip
            why, command = error.why or kind.cause, " ".join(words)
            if name not in self.names:
                self.findings.append(Finding(name, error.what, why, error.fix, command))
            return None

    def end(self, subject: str) -> Diagnosis:
        looked_at = tuple(dict.fromkeys(self.looked_at))
        return Diagnosis(subject, tuple(self.findings), tuple(self.notes), looked_at)


def _subject(view: Checkpoint, family: str) -> str:
    made = " + ".join(view.made_of) or "Weights that the catalogue does not know"
    told = f"{family} family" if family else "family not known"
    return f"{made}: {view.vocab_size:,} rows, {told}."


def _found(name: str, evidence: str, why: str = "", fix: str = "") -> LabError:
    return LabError(evidence, why, fix, finding=name)


# --- From headers and small files ---------------------------------------------------------


def _check_versions(adapters: Sequence[Adapter | None]) -> None:
    keys = set().union(*(adapter.config for adapter in adapters if adapter))
    for package, versions, what, needed in _BREAKING:
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        broken = SpecifierSet(versions).contains(installed, prereleases=True)
        if broken and needed <= keys:
            raise _found(
                "versions",
                f"{package} {installed} is installed; it {what}.",
                "llamalab merges without it; scripts that merge with it may give other weights.",
                f"Install a {package} in the range that 'llamalab check' shows.",
            )


def _check_bos(directory: Path, view: Checkpoint) -> None:
    """Hold the tokenizer files that plain transformers reads to BOS; SentencePiece needs none.

    With a tokenizer.json its own post-processor decides, else `add_bos_token` does (ran with
    transformers 5.23; a tokenizer.model alone is read by another class, with other ids).
    """
    if not (directory / "config.json").is_file():
        if (directory / "tokenizer_config.json").is_file():
            raise _found(
                "meta-weights",
                f"{directory} holds Meta's weights beside transformers' tokenizer_config.json.",
                "transformers finds no config.json here, and no weights under its names.",
                f"Run 'llamalab convert --input-dir {directory} --output-dir OUT'.",
            )
        return  # Meta's own layout, which only programs read that add BOS themselves
    fast, config = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if fast.is_file():
        try:
            begins = tokenizers.Tokenizer.from_file(str(fast)).encode("a").ids[0]
        except Exception as error:  # a bare Exception is all that the library raises
            raise _found("damaged-file", f"{fast} cannot be read: {error}.") from None
        told = begins == Tokenizer(view.tokenizer).bos
        seen = f"{fast.name} does not begin a text with BOS."
    else:
        said = read_json(config) if config.is_file() else {}
        told = said.get("add_bos_token") is True
        seen = f"{config.name} {'does not say' if config.is_file() else 'is missing, as is'} "
        seen += "add_bos_token." if config.is_file() else "tokenizer.json."
    if not told:
        raise _found(
            "no-bos",
            f"In {directory}, {seen}",
            "Plain transformers gives the model texts without BOS, which it was never trained on.",
            'Put "add_bos_token": true into tokenizer_config.json, or make the model again.',
        )


def _check_dtypes(view: Checkpoint) -> None:
    dtypes = {spec.dtype: name for name, spec in view.tensors.items()}
    if len(dtypes) > 1:
        seen = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
        raise _found(
            "unexpected-dtype",
            f"The weights are of {len(dtypes)} dtypes: {seen}.",
            "One model is written in one dtype; this one was put together from two.",
            "Make the model again from its parts.",
        )


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
            raise _found(name, mistake)

    case.look("template", check)


def _check_prompt(view: Checkpoint, prompt: str, with_prompt: bool) -> None:
    text = TEMPLATES["alpaca" if with_prompt else "none"].render(prompt)
    tokens, context = len(Tokenizer(view.tokenizer).encode(text)), _context(view)
    if tokens >= context:
        raise _found(
            "long-prompt",
            f"The prompt has {tokens:,} tokens, and the context holds {context:,}.",
            "The model was never trained on longer texts.",
            "Shorten the prompt or the conversation.",
        )


def _context(view: Checkpoint) -> int:
    return view.config["max_position_embeddings"]


# --- From the embeddings ------------------------------------------------------------------


def _check_appended_rows(view: Checkpoint) -> None:
    """Hold the rows of appended pieces against the rows that were there before.

    An initialiser leaves rows that are all zero, all alike (the mean of the old rows), or drawn
    at random: then their lengths hardly differ, by 1 / sqrt(2 d) of their mean in d dimensions.
    Trained rows differ several times as much.
    """
    first = appended(fitting_model(view))
    last = len(fitting_model(view).pieces)
    if last - first < 8 or first < 8:
        return
    for name in (view.embedding, "lm_head.weight"):
        old, new = view.read(name, 3, first).float(), view.read(name, first, last).float()
        usual = (2 * new.shape[1]) ** -0.5
        if not new.any():
            seen = "are all zero"
        elif new.var(0).mean() < 1e-3 * old.var(0).mean():
            seen = "are all alike"
        elif _spread(new) < 1.5 * usual and _spread(old) > 2.5 * usual:
            seen = f"vary in length by {_spread(new):.1%}, as random ones do ({usual:.1%})"
        else:
            continue
        raise _found(
            "untrained-rows",
            f"The {last - first:,} appended rows of {name} {seen}; the old ones vary by "
            f"{_spread(old):.1%}.",
            "They are as an initialiser left them: the adapter's embeddings were dropped.",
            "Merge again with 'llamalab merge', which replaces both embeddings whole.",
        )


def _spread(rows: torch.Tensor) -> float:
    """Return the standard deviation of the rows' lengths, as a share of their mean."""
    lengths = rows.norm(dim=1)
    return (lengths.std() / lengths.mean()).item()


# --- From every weight --------------------------------------------------------------------


def _check_values(view: Checkpoint) -> bool:
    """Read every weight once; True when all are sound."""
    with bytes_bar(view.total_bytes, "values") as bar:
        for name in view.tensors:
            faults = []
            for block in view.blocks(name):
                faults.append(unsound(block))
                bar.update(block.nbytes)
            wrong = [fault for fault in faults if "zero" not in fault and fault]
            if wrong or all(faults):
                raise _found(
                    "unsound-values",
                    f"The weights {name} {(wrong or faults)[0]}.",
                    "Every answer passes through them, and none will mean anything.",
                    "Run 'llamalab verify' on the directory; make or download the model again.",
                )
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
            ("permuted once more", permute, unpermute),
            ("permuted back", unpermute, permute),
        ):
            _reorder(model, there)
            losses[other] = answer_loss(model)
            _reorder(model, back)
        best = min(losses, key=losses.get)
        # Worse than a blind guess means nothing: a random model has no right order.
        guess = torch.tensor(float(view.vocab_size)).log().item()
        if losses[best] < as_is - 1 and losses[best] < guess - 1:
            never = best == "permuted once more"
            raise _found(
                "q-k-order",
                f"The loss is {as_is:.2f} nats a token as it is, and {losses[best]:.2f} with the "
                f"rows of q and k {best}.",
                f"They were {'never permuted' if never else 'permuted twice'}: the model mixes up "
                "which words are near each other.",
                "Convert Meta's original files again with 'llamalab convert'.",
            )

    case.look("order of q and k", check)


def _reorder(model: Model, order: Callable) -> None:
    config = model.network.config
    for layer in model.network.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            weight = projection.weight.data
            head_dim = getattr(config, "head_dim", None)
            weight.copy_(
                order(weight, head_dim or config.hidden_size // config.num_attention_heads)
            )


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


def table() -> str:
    """Return README's troubleshooting table, in Markdown."""
    lines = ["| what you see | why | what helps | `diagnose` says |", "|---|---|---|---|"]
    for name, kind in FINDINGS.items():
        is_command = kind.command.startswith(("llamalab ", "cp "))
        helps = f"`{kind.command}`" if is_command else kind.command
        lines.append(f"| {kind.symptom} | {kind.cause} | {helps} | {name} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
