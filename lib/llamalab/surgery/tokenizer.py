"""Tokenizers: reading and extending SentencePiece models, and the files transformers reads.

SentencePiece is the reference: the models were trained with it, so `Tokenizer` encodes with
it. `tokenizer_files` writes the same vocabulary once more as `tokenizer.json` for plain
transformers, which ranks merges where SentencePiece compares scores; the two part on some
text when pieces share a score, as all appended Chinese pieces do.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2 as proto

from .. import catalog
from ..checkpoints import Checkpoint, diagnose_bytes
from ..errors import DamagedFile, Incompatible, NotFound

_NORMAL = proto.ModelProto.SentencePiece.Type.NORMAL
_CONTROL = proto.ModelProto.SentencePiece.Type.CONTROL


def read_model(path: Path) -> proto.ModelProto:
    """Return the SentencePiece model in `path`.

    Raises:
        NotFound, DamagedFile: there is no such file, or it is not a SentencePiece model.
    """
    if not path.is_file():
        raise NotFound(
            f"{path} is missing.", "", "Bring the tokenizer that belongs to the weights."
        )
    model = proto.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:  # protobuf raises one class or another, by its implementation
        model.Clear()
    if not model.pieces:
        raise DamagedFile(
            f"{path} is not a SentencePiece model.",
            f"{diagnose_bytes(path) or 'it holds no pieces'}.".capitalize(),
            "Download tokenizer.model again, and verify it.",
        )
    return model


class Tokenizer:
    """A SentencePiece tokenizer with LLaMA's habits: BOS first, EOS never.

    Args:
        path: a `tokenizer.model`, or the directory that holds one.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        self.path = path / "tokenizer.model" if path.is_dir() else path
        self._sp = sentencepiece.SentencePieceProcessor(
            model_proto=read_model(self.path).SerializeToString()
        )
        self.bos, self.eos = self._sp.bos_id(), self._sp.eos_id()

    def __len__(self) -> int:
        return self._sp.get_piece_size()

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Return the ids of `text`, after BOS."""
        return ([self.bos] if bos else []) + self._sp.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`; control pieces such as BOS and EOS give no text."""
        return self._sp.decode(list(ids))

    def continuation(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """Return the text that `ids` add after `prompt_ids`, a leading space kept.

        Decoding `ids` alone would lose that space, which SentencePiece takes for the one it
        puts before every text.
        """
        known = self.decode(prompt_ids)
        return self.decode([*prompt_ids, *ids])[len(known) :]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the pieces of `ids` as the vocabulary spells them, a space as U+2581."""
        return [self._sp.id_to_piece(i) for i in ids]


def extend(
    base_model: str | Path, other_model: str | Path, out: str | Path, control: Sequence[str] = ()
) -> int:
    """Extend a vocabulary: append to `base_model` the pieces only `other_model` has.

    The old ids stay as they are; the new pieces follow in `other_model`'s order, with score 0,
    as in the published Chinese models, then the `control` pieces (a pad token, say), which no
    text ever encodes to.

    Returns:
        The number of pieces appended.
    """
    model, other = read_model(Path(base_model)), read_model(Path(other_model))
    known = {piece.piece for piece in model.pieces}
    new = [(p.piece, _NORMAL) for p in other.pieces if p.type == _NORMAL and p.piece not in known]
    new += [(name, _CONTROL) for name in control if name not in known]
    for piece, kind in new:
        model.pieces.add(piece=piece, score=0.0, type=kind)
    model.trainer_spec.vocab_size = len(model.pieces)
    Path(out).write_bytes(model.SerializeToString())
    return len(new)


def _merges(model: proto.ModelProto, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Return the merges that stand for the pieces' scores, the first to apply first.

    A piece may come of any two pieces that spell it. The best score goes first, as in
    SentencePiece; pieces of one score go by id, where SentencePiece takes the leftmost.
    """
    ranked = []
    for piece in model.pieces:
        if piece.type != _NORMAL:
            continue
        text = piece.piece
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in vocab and right in vocab:
                ranked.append((-piece.score, vocab[text], vocab[left], left, right))
    ranked.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in ranked]


def tokenizer_json(model: proto.ModelProto) -> str:
    """Return the text of the `tokenizer.json` that transformers' LlamaTokenizer reads."""
    vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
    bpe = tokenizers.models.BPE(
        vocab, _merges(model, vocab), unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace("▁", "first", split=False)
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    special = [p.piece for i, p in enumerate(model.pieces) if i < 3 or p.type == _CONTROL]
    tokenizer.add_special_tokens(
        [tokenizers.AddedToken(piece, special=True, normalized=False) for piece in special]
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer.to_str(pretty=True)


def fitting_model(checkpoint: Checkpoint) -> proto.ModelProto:
    """Return the SentencePiece model that belongs to `checkpoint`.

    Raises:
        NotFound: the checkpoint comes with no tokenizer.model.
        Incompatible: its vocabulary and the embedding differ in length.
    """
    if checkpoint.tokenizer is None:
        raise NotFound("No tokenizer.model belongs to this model.", finding="no-tokenizer")
    model = read_model(checkpoint.tokenizer)
    pieces, rows = len(model.pieces), checkpoint.vocab_size
    if pieces == rows or (padded(rows, pieces) and not _one_pad_apart(model, rows)):
        return model
    finding = "vocabulary-mismatch"
    if _one_pad_apart(model, rows):
        finding = "mixed-vocabularies"
    elif pieces < rows and appended(model) == pieces:
        finding = "base-tokenizer"
    raise Incompatible(
        f"{checkpoint.tokenizer} has {pieces:,} pieces, and the embedding has {rows:,} rows.",
        finding=finding,
    )


def padded(rows: int, pieces: int) -> bool:
    """Whether `rows` is `pieces` rounded up to a multiple of 8, 16, ... or 256, for speed."""
    return any(0 < rows - pieces < m and rows % m == 0 for m in (8, 16, 32, 64, 128, 256))


def appended(model: proto.ModelProto) -> int:
    """Return the id of the first appended piece: of the run of score 0 at the end."""
    first = len(model.pieces)
    while first > 3 and model.pieces[first - 1].score == 0:  # <unk>, <s> and </s> come first
        first -= 1
    return first


def _one_pad_apart(model: proto.ModelProto, rows: int) -> bool:
    """Whether tokenizer and embedding are of the llama and the alpaca family, or the reverse."""
    pieces, last_is_pad = len(model.pieces), model.pieces[-1].type == _CONTROL
    if rows == pieces - 1:
        return last_is_pad and appended(model) < rows
    known = {(part.vocab, part.family) for part in catalog.parts().values() if part.family}
    return rows == pieces + 1 and (
        (not padded(rows, pieces) and not last_is_pad and appended(model) < pieces)
        or {(pieces, "llama"), (rows, "alpaca")} <= known
    )


def tokenizer_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the tokenizer files of a model directory in HF layout: name -> content.

    `tokenizer.model` is kept for llama.cpp and others; `tokenizer_config.json` makes
    AutoTokenizer add BOS, which transformers 5 leaves out unless told.

    Raises:
        NotFound, Incompatible: as `fitting_model`.
    """
    model = fitting_model(checkpoint)
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": checkpoint.config["max_position_embeddings"],
    }
    if model.pieces[-1].type == _CONTROL:
        config["pad_token"] = model.pieces[-1].piece
    return {
        "tokenizer.model": checkpoint.tokenizer.read_bytes(),
        "tokenizer.json": tokenizer_json(model).encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n",
    }
