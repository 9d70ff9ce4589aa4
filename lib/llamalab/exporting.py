"""Exporting: any checkpoint as one GGUF file, which llama.cpp reads.

llama.cpp rotates neighbouring pairs, as Meta's code does, so what is written is the view that
`as_meta` gives, under llama.cpp's names. The tokenizer travels inside the file. `gguf`, which
comes from llama.cpp's authors, knows the names, the header's format and the quantisation; the
rows pass through one block at a time, as in `writer`. Format: the GGUF specification in ggml.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import math
import os
import shutil
import stat
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import torch

from . import catalog
from .checkpoint import Checkpoint, TensorSpec, raw_bytes
from .containers import DirectFile
from .conversion import as_meta
from .errors import (
    DamagedFile,
    Incompatible,
    LabWarning,
    NotEnoughRoom,
    NotFound,
    OutputExists,
    UsageError,
)
from .estimate import size_text
from .merging import compose
from .progress import bytes_bar
from .tokenizer import fitting_model, proto
from .writer import one_thread, refuse_changed, state_of, sync_directory

try:
    import gguf
except ModuleNotFoundError:  # it is an extra
    gguf = None

TYPES = ("f16", "q8_0")
"""What matrices can be written as: 16 bits a value, or 8 and a 16-bit scale for each 32 values."""

LARGEST = {"F32": torch.finfo(torch.float32).max, "F16": 65504.0, "Q8_0": 127 * 65504.0}
"""The largest value that each encoding can hold; Q8_0's scale is in fp16."""


@dataclass(frozen=True)
class Exported:
    """What an export has made: `total_bytes` is the file's size, `type` one of `TYPES`.

    `already` is True when the file was there, byte for byte, and nothing was written.
    """

    path: Path
    type: str
    tensors: int
    total_bytes: int
    seconds: float
    already: bool = False

    def as_dict(self) -> dict:
        return asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        what = f"{self.tensors} tensors, {self.type}, {self.total_bytes / 1e6:,.1f} MB"
        how = "already made" if self.already else f"made in {self.seconds:.1f} s"
        return f"{self.path} ({what}; {how})"


def export(
    model: str | Path,
    output: str | Path,
    lora_model: str | Path | Sequence[str | Path] | None = None,
    *,
    to: str = "gguf",
    type: str = "f16",
    model_size: str | None = None,
    context_length: int | None = None,
    overwrite: bool = False,
    models_dir: str | Path = "",
) -> Exported:
    """Write a model, with adapters merged on the way if any are named, as one file for llama.cpp.

    The bytes depend on the tensors, the configuration, the tokenizer and `type` alone, and for a
    model that the catalogue does not know on the output's name, which becomes the model's.

    Args:
        model: a directory in Meta or HF layout, a catalogue name, or `hf:OWNER/REPO`.
        output: the file; it is complete when this returns, or does not exist.
        lora_model: none, one or more adapters, in order.
        to: "gguf".
        type: "f16" or "q8_0", for the matrices. The norms are written in fp32, as llama.cpp
            expects them; a matrix whose rows are no multiple of 32 values long stays in f16.
        model_size, context_length: as for `merge`.
        overwrite: replace another GGUF file; never anything else.

    Raises:
        LabError: gguf is not installed, parts that do not fit, values that the type cannot
            hold, too little disk, a file that is something else; nothing is half written.
    """
    began, out = time.monotonic(), Path(output).expanduser().resolve()
    if to != "gguf" or type not in TYPES:
        raise UsageError(
            f"There is no export to '{to}' of type '{type}'.", "", "Use gguf, and f16 or q8_0."
        )
    if gguf is None:
        raise NotFound(
            "The package gguf is not installed.",
            "It writes the format and is needed for nothing else here, so it is an extra.",
            "Run 'pip install gguf'.",
        )
    if out.is_dir():
        raise UsageError(f"{out} is a directory.", "", f"Name a file, as {out / 'model.gguf'}.")
    view = compose(
        model,
        lora_model,
        model_size=model_size,
        context_length=context_length,
        models_dir=models_dir,
    )
    plan, already = _Plan(view, type, out.stem), True
    with _exclusive(out) as partial:
        if not out.exists() or not plan.written_in(out):
            if out.exists():
                _refuse_to_replace(out, overwrite)
            plan.write(partial)
            os.replace(partial, out)
            sync_directory(out.parent)
            already = False
    return Exported(out, type, len(plan.kinds), plan.size, time.monotonic() - began, already)


class _Plan:
    """A GGUF file before it is written.

    Attributes:
        kinds: Meta's tensor name -> how it will be encoded.
        header: everything before the first tensor, padding included.
        size: bytes of the whole file.
    """

    def __init__(self, checkpoint: Checkpoint, type: str, name: str):
        self._view = view = as_meta(checkpoint)
        wanted = gguf.GGMLQuantizationType[type.upper()]
        self.kinds = {name: _kind(spec, wanted) for name, spec in view.tensors.items()}
        writer = gguf.GGUFWriter(None, "llama")
        _describe(writer, checkpoint, view.config, type, name)
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, view.config["n_layers"])
        for name, kind in self.kinds.items():
            shape, nbytes = view.tensors[name].shape, self._nbytes(name)
            theirs = known.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor_info(theirs, shape, numpy.float16, nbytes, raw_dtype=kind)
        # Given a file of its own, in memory, it leaves the bytes of the tensors to us.
        header = io.BytesIO()
        writer.fout, writer.state = [header], gguf.WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.write_padding(header, header.tell())
        self.header = header.getvalue()
        self.size = len(self.header) + sum(map(_padded, map(self._nbytes, self.kinds)))

    def _nbytes(self, name: str) -> int:
        values, bytes_each = gguf.GGML_QUANT_SIZES[self.kinds[name]]
        return math.prod(self._view.tensors[name].shape) // values * bytes_each

    def _content(self) -> Iterator[bytes | memoryview]:
        """Yield the file, piece by piece."""
        yield self.header
        for name, kind in self.kinds.items():
            for block in self._view.blocks(name):
                yield _encoded(name, block, kind)
            yield bytes(_padded(self._nbytes(name)) - self._nbytes(name))

    def written_in(self, path: Path) -> bool:
        """Whether `path` holds exactly this file; it is read up to the first difference."""
        if path.stat().st_size != self.size:
            return False
        with open(path, "rb") as file, bytes_bar(self.size, "comparing") as bar, one_thread():
            return all(
                file.read(len(data)) == data and (bar.update(len(data)) or True)
                for data in self._content()
            )

    def write(self, path: Path) -> None:
        """Write the file to `path`; on return it is on the disk.

        Raises:
            NotEnoughRoom: before a byte is written, or when the disk has filled up meanwhile.
            DamagedFile: an input has changed meanwhile, or holds values that are none.
            Incompatible: a value is too large for its encoding.
        """
        needed, free = self.size + 2**26, shutil.disk_usage(path.parent).free
        if free < needed:
            raise NotEnoughRoom(
                f"{size_text(needed)} are needed at {path.parent}, and {size_text(free)} are free.",
                "The file is written whole before anything is replaced.",
                "Make room, or choose an --output on another disk.",
            )
        inputs = [state_of(file) for file in dict.fromkeys(self._view.inputs)]
        try:
            with one_thread(), bytes_bar(self.size, "exporting") as bar, DirectFile(path) as file:
                for data in self._content():
                    file.write(data)
                    bar.update(len(data))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise NotEnoughRoom(
                f"The disk is full at {path}.",
                "Something else has filled it since this began.",
                "Make room, and run the same command again.",
            ) from None
        for entry in inputs:
            refuse_changed(entry)


def _padded(nbytes: int) -> int:
    return nbytes + -nbytes % gguf.GGUF_DEFAULT_ALIGNMENT


def _kind(spec: TensorSpec, wanted):
    """Return how a tensor is encoded: norms in fp32, matrices as `wanted` if their rows allow it."""
    if len(spec.shape) == 1:
        return gguf.GGMLQuantizationType.F32
    fits = spec.shape[1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if fits else gguf.GGMLQuantizationType.F16


def _encoded(name: str, block: torch.Tensor, kind) -> memoryview:
    """Return the bytes of `block`, rows of the tensor `name`, in the encoding `kind`."""
    low, high = torch.aminmax(block)
    largest = float(torch.maximum(-low, high))
    if not math.isfinite(largest):
        raise DamagedFile(
            f"Tensor {name} holds NaN or infinite values.",
            "No program could answer with them.",
            "Verify the model's files; nothing was written.",
            finding="unsound-values",
        )
    if largest > LARGEST[kind.name]:
        raise Incompatible(
            f"Tensor {name} holds a value of size {largest:g}, "
            f"and {kind.name.lower()} ends at {LARGEST[kind.name]:,.0f}.",
            f"The weights are in {str(block.dtype).removeprefix('torch.')}, which reaches farther.",
            "Nothing was written; use --type q8_0, or the model as it is.",
        )
    if kind == gguf.GGMLQuantizationType.Q8_0:
        return gguf.quants.quantize(block.float().numpy(), kind).reshape(-1).data
    return raw_bytes(block.half() if kind == gguf.GGMLQuantizationType.F16 else block.float())


def _describe(writer, checkpoint: Checkpoint, params: dict, type: str, name: str) -> None:
    """Add what llama.cpp must know besides the tensors: sizes, settings, the vocabulary."""
    made_of = checkpoint.made_of
    known = [m.name for m in catalog.models().values() if tuple(p.name for p in m.parts) == made_of]
    writer.add_type("model")
    writer.add_name(known[0] if known else name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    heads = params["n_heads"]
    writer.add_vocab_size(checkpoint.vocab_size)
    writer.add_context_length(checkpoint.config["max_position_embeddings"])
    writer.add_embedding_length(params["dim"])
    writer.add_block_count(params["n_layers"])
    writer.add_feed_forward_length(checkpoint.config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(params.get("n_kv_heads", heads))
    writer.add_rope_dimension_count(params["dim"] // heads)
    writer.add_rope_freq_base(params.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(params["norm_eps"])
    _describe_tokenizer(writer, fitting_model(checkpoint), checkpoint.vocab_size)


def _describe_tokenizer(writer, model: proto.ModelProto, rows: int) -> None:
    """Add the vocabulary, with a filler for each row of the embedding that has no piece."""
    trained, normal = model.trainer_spec, model.normalizer_spec
    if trained.model_type != trained.BPE:
        raise Incompatible(
            "The tokenizer is not of SentencePiece's kind BPE.",
            "llama.cpp would cut text by other rules, and the model would not know the pieces.",
            "Use the tokenizer.model that the model was trained with.",
        )
    if normal.precompiled_charsmap or normal.remove_extra_whitespaces:
        warnings.warn(
            f"The tokenizer changes text before it cuts it ('{normal.name}'); llama.cpp does not, "
            "and will give some text other tokens.",
            LabWarning,
            stacklevel=2,
        )
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    filler = gguf.TokenType.UNUSED
    pieces += [(f"<unused {i}>", 0.0, filler) for i in range(len(pieces), rows)]
    texts, scores, types = zip(*pieces, strict=True)
    writer.add_tokenizer_model("llama")  # llama.cpp's word for SentencePiece's BPE
    writer.add_tokenizer_pre("default")
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)  # the two number them alike
    writer.add_bos_token_id(trained.bos_id)
    writer.add_eos_token_id(trained.eos_id)
    writer.add_unk_token_id(trained.unk_id)
    last = len(model.pieces) - 1
    appended_pad = last if last > 2 and model.pieces[last].type == gguf.TokenType.CONTROL else -1
    if (pad := trained.pad_id if trained.pad_id >= 0 else appended_pad) >= 0:
        writer.add_pad_token_id(pad)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(normal.add_dummy_prefix)


def _is_gguf(descriptor: int) -> bool:
    return os.pread(descriptor, 4, 0) == b"GGUF"


def _refuse_to_replace(out: Path, overwrite: bool) -> None:
    with open(out, "rb") as file:
        ours = _is_gguf(file.fileno())
    if not ours or not overwrite:
        raise OutputExists(
            f"{out} exists, and was left as it is.",
            "It is other than this export would be: of another model, another type or version."
            if ours
            else "It is no GGUF file, and --overwrite replaces nothing else.",
            "Choose another --output" + (", or add --overwrite to replace it." if ours else "."),
        )


@contextlib.contextmanager
def _exclusive(out: Path) -> Iterator[Path]:
    """Hold and yield `OUT.partial`; it goes again unless it has become OUT."""
    partial = out.with_name(out.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        raise _in_the_way(partial) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat())
        except BlockingIOError:
            held = False
        if not held:
            raise OutputExists(
                f"Another process is writing {partial.name}.",
                "Two commands were given the same output.",
                "Wait for the other one to end, then run this again.",
            )
        found = os.fstat(descriptor)
        plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
        if not plain or (found.st_size and not _is_gguf(descriptor)):
            raise _in_the_way(partial)
        try:
            yield partial
        finally:
            if partial.exists() and os.path.samestat(found, partial.stat()):
                partial.unlink()
    finally:
        os.close(descriptor)


def _in_the_way(partial: Path) -> OutputExists:
    return OutputExists(
        f"{partial} is something that we did not make.",
        "Work under way lies there, and what is there already would be lost.",
        "Move it away, or choose another --output.",
    )
