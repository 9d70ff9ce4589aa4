"""Exporting: any checkpoint as one GGUF file, which llama.cpp reads.

llama.cpp rotates neighbouring pairs, as Meta's code does, so what is written is the view that
`as_meta` gives, under llama.cpp's names. The tokenizer travels inside the file. `gguf`, which
comes from llama.cpp's authors, knows the names, the header's format and the quantisation; the
rows pass through one block at a time, as in `writer`. Format: the GGUF specification in ggml.
"""

import io
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
import torch
from sentencepiece import sentencepiece_model_pb2 as proto

from .. import catalog, checkpoints
from ..errors import DamagedFile, Incompatible, LabWarning, NotFound, OutputExists, UsageError
from ..files import require_room, sync_directory
from ..progress import bytes_bar
from .conversion import as_meta
from .merging import compose
from .tokenizer import fitting_model

try:
    import gguf
except ModuleNotFoundError:  # it is an extra
    gguf = None

TYPES = ("f16", "q8_0")
"""What matrices can be written as: 16 bits a value, or 8 and a 16-bit scale for each 32 values."""

LARGEST = {"F32": torch.finfo(torch.float32).max, "F16": 65504.0, "Q8_0": 127 * 65504.0}
"""The largest value that each encoding can hold; Q8_0's scale is in fp16."""


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
) -> checkpoints.Made:
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
    options = {"model_size": model_size, "context_length": context_length}
    view = compose(model, lora_model, models_dir=models_dir, **options)
    plan = _Plan(view, type, out.stem)
    with checkpoints.exclusive(out) as partial:
        unfinished = partial / "gguf.unfinished"
        unfinished.unlink(missing_ok=True)  # of a run that was cut off; it takes room
        already = out.exists() and plan.written_in(out)
        if not already:
            _refuse_to_replace(out, overwrite)
            plan.write(unfinished)
            _refuse_to_replace(out, overwrite)  # something may have come there meanwhile
            os.replace(unfinished, out)
            sync_directory(out.parent)
        seconds = time.monotonic() - began
        return checkpoints.Made(out, len(plan.kinds), plan.size, seconds, already, type=type)


class _Plan:
    """A GGUF file before it is written.

    Attributes:
        kinds: Meta's tensor name -> how it will be encoded.
        header: everything before the first tensor, padding included.
        size: bytes of the whole file.
    """

    def __init__(self, checkpoint: checkpoints.Checkpoint, type: str, name: str):
        self._view = view = as_meta(checkpoint)
        wanted = gguf.GGMLQuantizationType[type.upper()]
        self.kinds = {name: _kind(spec, wanted) for name, spec in view.tensors.items()}
        writer = gguf.GGUFWriter(None, "llama")
        _describe(writer, checkpoint, view.config, type, name)
        known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, view.config["n_layers"])
        for metas, kind in self.kinds.items():
            shape, nbytes = view.tensors[metas].shape, self._nbytes(metas)
            theirs = known.get_name(metas, try_suffixes=(".weight",))
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
        with (
            open(path, "rb") as file,
            bytes_bar(self.size, "comparing") as bar,
            checkpoints.one_thread(),
        ):
            for data in self._content():
                if file.read(len(data)) != data:
                    return False
                bar.update(len(data))
        return True

    def write(self, unfinished: Path) -> None:
        """Write the file to `unfinished`; on return it is on the disk, after an error it is gone.

        Raises:
            NotEnoughRoom: before a byte is written.
            DamagedFile: an input has changed meanwhile.
            Incompatible: a value is none, or too large for its encoding.
        """
        require_room(
            unfinished.parent.parent,
            self.size + 2**26,
            "The file is written whole before anything is replaced.",
            "Make room, or choose an --output on another disk.",
        )
        inputs = [checkpoints.state_of(file) for file in dict.fromkeys(self._view.inputs)]
        try:
            with (
                checkpoints.one_thread(),
                bytes_bar(self.size, "exporting") as bar,
                checkpoints.DirectFile(unfinished) as file,
            ):
                for data in self._content():
                    file.write(data)
                    bar.update(len(data))
            for entry in inputs:
                checkpoints.refuse_changed(entry)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def _padded(nbytes: int) -> int:
    return nbytes + -nbytes % gguf.GGUF_DEFAULT_ALIGNMENT


def _kind(spec: checkpoints.TensorSpec, wanted):
    """Return how a tensor is encoded: norms in fp32, matrices as `wanted` if their rows allow it."""
    if len(spec.shape) == 1:
        return gguf.GGMLQuantizationType.F32
    fits = spec.shape[1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if fits else gguf.GGMLQuantizationType.F16


def _encoded(name: str, block: torch.Tensor, kind) -> memoryview:
    """Return the bytes of `block`, rows of the tensor `name`, in the encoding `kind`."""
    low, high = torch.aminmax(block)
    largest = float(torch.maximum(-low, high))
    if not largest <= LARGEST[kind.name]:  # nor where it is NaN
        raise Incompatible(
            f"Tensor {name} holds a value of size {largest:g}, "
            f"and {kind.name.lower()} ends at {LARGEST[kind.name]:g}.",
            "Written as infinite or as none, it would make every answer meaningless.",
            "Verify the model's files; where the value is sound, q8_0 reaches farther than f16.",
        )
    if kind == gguf.GGMLQuantizationType.Q8_0:
        return gguf.quants.quantize(block.float().numpy(), kind).reshape(-1).data
    return checkpoints.raw_bytes(
        block.half() if kind == gguf.GGMLQuantizationType.F16 else block.float()
    )


def _describe(
    writer, checkpoint: checkpoints.Checkpoint, params: dict, type: str, name: str
) -> None:
    """Add what llama.cpp must know besides the tensors: sizes, settings, the vocabulary."""
    made_of = checkpoint.made_of
    known = [m.name for m in catalog.models().values() if tuple(p.name for p in m.parts) == made_of]
    writer.add_type("model")
    writer.add_name(known[0] if known else name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{type.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    heads, context = params["n_heads"], checkpoint.config["max_position_embeddings"]
    if not isinstance(context, int) or not 0 < context < 2**32:
        raise DamagedFile(
            f"config.json gives {context!r} as max_position_embeddings.",
            "A whole number of tokens belongs there.",
            "Bring the config.json that belongs to the weights, or give --context-length.",
        )
    writer.add_vocab_size(checkpoint.vocab_size)
    writer.add_context_length(context)
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
    writer.add_token_list(texts)
    writer.add_token_scores(scores)
    writer.add_token_types(types)  # the two number them alike
    pad, last = trained.pad_id, len(model.pieces) - 1
    if pad < 0 and last > 2 and model.pieces[last].type == gguf.TokenType.CONTROL:
        pad = last  # appended with the alpaca family's vocabulary
    ids = {"bos": trained.bos_id, "eos": trained.eos_id, "unk": trained.unk_id, "pad": pad}
    for token, number in ids.items():
        if number >= 0:  # below it the vocabulary has none
            getattr(writer, f"add_{token}_token_id")(number)
    writer.add_add_bos_token(trained.bos_id >= 0)
    writer.add_add_space_prefix(normal.add_dummy_prefix)


def _is_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def _refuse_to_replace(out: Path, overwrite: bool) -> None:
    """Refuse to replace what lies at `out`, if anything does: it is not what would be written."""
    if not out.exists():
        return
    if not out.is_file() or not _is_gguf(out):
        raise OutputExists(
            f"{out} is no GGUF file, and was left as it is.",
            "--overwrite replaces a GGUF file by another, and nothing else.",
            "Choose another --output, or remove what is there yourself.",
        )
    if not overwrite:
        raise OutputExists(
            f"{out} exists, and was left as it is.",
            "It was made of another model, as another type, or by another version.",
            "Choose another --output, or add --overwrite to replace it.",
        )
