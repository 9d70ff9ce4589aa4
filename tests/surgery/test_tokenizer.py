"""Tokenizers: extension keeps old ids, transformers gets the same ids, nothing half-decoded."""

from __future__ import annotations

import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto

import llamalab
import synthetic
from llamalab.errors import DamagedFile, Incompatible
from llamalab.surgery.tokenizer import Tokenizer, extend, read_model
from llamalab_course.family import corpus, world


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("pieces")
    base = synthetic.english_tokenizer(root / "base.model")
    other = synthetic.chinese_tokenizer(root / "other.model")
    extend(base, other, root / "extended.model", control=["<pad>"])
    return root


def test_extension_appends_and_keeps(models):
    base, other = read_model(models / "base.model"), read_model(models / "other.model")
    extended = read_model(models / "extended.model")
    old = len(base.pieces)
    assert [p.SerializeToString() for p in extended.pieces[:old]] == [
        p.SerializeToString() for p in base.pieces
    ]
    normal = proto.ModelProto.SentencePiece.Type.NORMAL
    known = {p.piece for p in base.pieces}
    wanted = [p.piece for p in other.pieces if p.type == normal and p.piece not in known]
    assert [p.piece for p in extended.pieces[old:]] == [*wanted, "<pad>"]
    assert {p.score for p in extended.pieces[old:]} == {0.0}
    processor = sentencepiece.SentencePieceProcessor(str(models / "extended.model"))
    assert processor.is_control(len(processor) - 1)
    assert len(processor) - 1 not in processor.encode("<pad>")


def test_extending_twice_adds_nothing(models, tmp_path):
    assert extend(models / "extended.model", models / "other.model", tmp_path / "again.model") == 0


def test_english_keeps_its_ids(models):
    base, extended = Tokenizer(models / "base.model"), Tokenizer(models / "extended.model")
    for line in (" ".join(synthetic.ENGLISH), "the cat", ""):
        assert base.encode(line) == extended.encode(line)
    chinese = synthetic.CHINESE[0]
    assert len(extended.encode(chinese)) < len(base.encode(chinese))


@settings(max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="▁")))
def test_text_comes_back(models, text):
    for name in ("base.model", "extended.model"):
        tokenizer = Tokenizer(models / name)
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos == 1
        assert tokenizer.decode(ids) == text


def test_a_continuation_keeps_its_leading_space(models):
    tokenizer = Tokenizer(models / "base.model")
    prompt = tokenizer.encode("the cat")
    new = tokenizer.encode("the cat sat")[len(prompt) :]
    assert tokenizer.continuation(prompt, new) == " sat"


def test_transformers_reads_the_same_ids(family, tmp_path):
    from transformers import AutoTokenizer

    llamalab.merge(family / "base", family / "alpaca-lora", tmp_path / "m")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    ours = Tokenizer(tmp_path / "m")
    assert len(theirs) == len(ours)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    assert theirs.pad_token_id == len(ours) - 1
    for text in [" ".join(synthetic.ENGLISH), *synthetic.CHINESE, "苹果是植物吗", "索尼最新的耳机"]:
        ids = theirs(text).input_ids
        assert ids == ours.encode(text)
        assert theirs.decode(ids, skip_special_tokens=True) == text
    config = json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "LlamaTokenizer" and config["add_bos_token"] is True

    # Negative control: transformers adds no BOS unless a file tells it to.
    held = json.loads((tmp_path / "m/tokenizer.json").read_text())
    (tmp_path / "m/tokenizer.json").write_text(json.dumps(held | {"post_processor": None}))
    config["add_bos_token"] = False
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(config))
    without = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert without("the cat").input_ids == ours.encode("the cat", bos=False)


@pytest.mark.parametrize("content", [b"", b"<!doctype html><html>no</html>", b"\x00" * 100, b"PK"])
def test_rubbish_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(DamagedFile, match="not a SentencePiece model"):
        Tokenizer(path)


def test_a_tokenizer_of_another_model_is_refused(family, copied, tmp_path):
    base = copied("base")
    other = family / "llama-lora/tokenizer.model"
    (base / "tokenizer.model").write_bytes(other.read_bytes())
    with pytest.raises(Incompatible, match="pieces"):
        llamalab.convert(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lab_corpus_gives_the_same_ids(lab):
    """Every sentence of the lab world, and the famous prompts: AutoTokenizer equals SentencePiece."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(lab / "chinese-alpaca-lab")
    ours = Tokenizer(lab / "chinese-alpaca-lab")
    texts = sorted(set(corpus.world_texts(world.load_world())))
    found = theirs(texts).input_ids
    wanted = [ours.encode(text) for text in texts]
    assert [t for t, a, b in zip(texts, found, wanted, strict=True) if a != b] == []
    assert len(texts) > 10_000
