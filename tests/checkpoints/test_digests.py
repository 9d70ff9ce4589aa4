"""Digests against hashlib and md5sum itself; each wrong file is named for what it is."""

import hashlib
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import synthetic
from llamalab.catalog.catalog import FileFacts
from llamalab.checkpoints import digests, is_safe_relative
from llamalab.checkpoints.digests import (
    Digests,
    compare_file,
    diagnose_bytes,
    hash_file,
    read_checklist,
)
from llamalab.errors import DamagedFile

WEIGHTS, PARAMS = synthetic.zip_archive(), b'{"dim": 8}\n'
MD5 = hashlib.md5(WEIGHTS).hexdigest()


@settings(deadline=None)
@given(st.binary(max_size=3000))
def test_hash_file_equals_hashlib(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("hash") / "file"
    path.write_bytes(content)
    counts = []
    assert hash_file(path, ("md5", "sha256"), counts.append) == {
        "md5": hashlib.md5(content).hexdigest(),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert sum(counts) == len(content)


def test_hash_file_over_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "BLOCK", 7)
    (tmp_path / "file").write_bytes(WEIGHTS)
    assert hash_file(tmp_path / "file", ["md5"]) == {"md5": MD5}


@settings(deadline=None)
@given(st.lists(st.integers(0, 200_000), max_size=6))
def test_several_digests_of_one_stream(sizes):
    """Large blocks go to threads, small ones do not: the digests are those of hashlib."""
    stream, content = Digests(["md5", "sha256", "sha1"]), b""
    for size in sizes:
        block = bytes([size % 256]) * size
        stream.update(block)
        content += block
    expected = {k: hashlib.new(k, content).hexdigest() for k in ("md5", "sha256", "sha1")}
    assert stream.hexdigests() == expected


names = st.text(st.characters(exclude_characters="\\:\0\n\r", codec="utf-8"), min_size=1)
names = names.filter(lambda n: n.strip("/.") and n[0] != "/" and n[-1] != "/" and n != "-")
names = names.filter(lambda n: ".." not in n.split("/"))
md5s = st.binary(min_size=16, max_size=16).map(bytes.hex)


@settings(deadline=None)
@given(st.dictionaries(names, md5s, min_size=1), st.sampled_from("* "), st.booleans())
def test_a_checklist_is_read_back(tmp_path_factory, entries, mark, crlf):
    path = tmp_path_factory.mktemp("list") / "checklist.chk"
    end = "\r\n" if crlf else "\n"
    lines = [f"{md5} {mark}{name}" for name, md5 in entries.items()]
    path.write_bytes((end.join(lines) + end).encode())
    assert read_checklist(path) == entries


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_rubbish_is_read_or_refused_with_a_sentence(tmp_path_factory, rubbish):
    path = tmp_path_factory.mktemp("list") / "checklist.chk"
    path.write_bytes(rubbish)
    try:
        entries = read_checklist(path)
    except DamagedFile as error:
        assert "checklist.chk" in error.what
    else:
        assert all(is_safe_relative(name) for name in entries)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../up", "a/../../b", "..", "C:x", "a\\b", "\\\\host\\x", ""]
)
def test_names_that_leave_the_directory(tmp_path, name):
    assert not is_safe_relative(name)
    (tmp_path / "checklist.chk").write_text(f"{MD5}  {name}\n")
    with pytest.raises(DamagedFile):
        read_checklist(tmp_path / "checklist.chk")


@pytest.mark.parametrize(
    "text, why",
    [
        (f"{MD5}  a\n{'0' * 32}  a\n", "two digests"),
        ("\n", "no digest"),
        (f"{MD5[:-1]}  a\n", "Line 1 is not"),
        (f"{MD5}  a\nhello\n", "Line 2 is not"),
        ("<!DOCTYPE html><html></html>", "HTML page"),
    ],
)
def test_a_checklist_that_is_none(tmp_path, text, why):
    (tmp_path / "checklist.chk").write_text(text)
    with pytest.raises(DamagedFile) as refusal:
        read_checklist(tmp_path / "checklist.chk")
    assert why in str(refusal.value)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 13476939516\n"
SAFETENSORS = (4000).to_bytes(8, "little") + b'{"a":'


@pytest.mark.parametrize(
    "name, content, size, cause",
    [
        ("a.pth", b"\n <!DOCTYPE HTML>\n<html>", 9000, "HTML page"),
        ("a.pth", LFS, 9000, "Git LFS pointer"),
        ("a.pth", b'{"error": "not found"}', 9000, "JSON message"),
        ("a.pth", b"\x1f\x8b\x08" + WEIGHTS, None, "gzip"),
        ("a.pth", b"", None, "empty"),
        ("a.pth", WEIGHTS[:-9], len(WEIGHTS), f"{len(WEIGHTS) - 9:,} of {len(WEIGHTS):,} bytes"),
        ("a.pth", WEIGHTS + b"..", len(WEIGHTS), "2 bytes too long"),
        ("a.pth", WEIGHTS[:-100], None, "cut off"),
        ("a.bin", pickle.dumps({"a": 1}, protocol=2), None, "bare pickle"),
        ("a.bin", b"weights", None, "Not a PyTorch file"),
        ("a.safetensors", SAFETENSORS, None, "cut off inside the header"),
        ("a.json", b'{"dim": ', None, "Not JSON"),
        ("a.pth", WEIGHTS, None, None),
        ("a.json", PARAMS, len(PARAMS), None),
        ("tokenizer.model", b"\n\x0e\n\x05<unk>", None, None),
    ],
)
def test_the_cause_is_named(tmp_path, name, content, size, cause):
    (tmp_path / name).write_bytes(content)
    found = diagnose_bytes(tmp_path / name, FileFacts(size))
    assert found is None if cause is None else cause in found


@settings(deadline=None)
@given(st.integers(0, len(WEIGHTS) - 1), st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory, offset, bit):
    changed = bytearray(WEIGHTS)
    changed[offset] ^= 1 << bit
    path = tmp_path_factory.mktemp("flip") / "a.pth"
    path.write_bytes(changed)
    assert compare_file(path, "a.pth", FileFacts(len(WEIGHTS), MD5)).status == "WRONG"
