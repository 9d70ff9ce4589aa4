"""Digests against hashlib and md5sum itself; each wrong file is named for what it is."""

import hashlib
import io
import json
import pickle
import shutil
import subprocess
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamalab import catalog, digest
from llamalab.catalog import FileFacts, Part
from llamalab.errors import DamagedFile, NotFound


def archive(content=b"x" * 5000) -> bytes:
    """Return a zip archive, as PyTorch's files are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("consolidated/data/0", content)
    return buffer.getvalue()


WEIGHTS, PARAMS = archive(), b'{"dim": 8}\n'
MD5 = hashlib.md5(WEIGHTS).hexdigest()


@pytest.fixture
def part(tmp_path, monkeypatch):
    """A base model "tiny" on disk, right in every byte, and in the catalogue."""
    folder = tmp_path / "tiny"
    (folder / "S").mkdir(parents=True)
    (folder / "S" / "consolidated.00.pth").write_bytes(WEIGHTS)
    (folder / "S" / "params.json").write_bytes(PARAMS)
    (folder / "S" / "checklist.chk").write_text(f"{hashlib.md5(PARAMS).hexdigest()}  params.json\n")
    files = {
        "S/checklist.chk": FileFacts(),
        "S/consolidated.00.pth": FileFacts(
            len(WEIGHTS), MD5.upper(), hashlib.sha256(WEIGHTS).hexdigest()
        ),
        "S/params.json": FileFacts(),
    }
    part = Part("tiny", "base", files, vocab=8)
    monkeypatch.setattr(catalog, "_tables", lambda: ({"tiny": part}, {}))
    return folder


def statuses(verification):
    return {row.file: row.status for row in verification.rows}


@settings(deadline=None)
@given(st.binary(max_size=3000))
def test_hash_file_equals_hashlib(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("hash") / "file"
    path.write_bytes(content)
    counts = []
    assert digest.hash_file(path, ("md5", "sha256"), counts.append) == {
        "md5": hashlib.md5(content).hexdigest(),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert sum(counts) == len(content)


def test_hash_file_over_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "BLOCK", 7)
    (tmp_path / "file").write_bytes(WEIGHTS)
    assert digest.hash_file(tmp_path / "file", ["md5"]) == {"md5": MD5}


names = st.text(st.characters(exclude_characters="\\:\0\n\r", codec="utf-8"), min_size=1)
names = names.filter(lambda n: n.strip("/.") and n[0] != "/" and n[-1] != "/" and n != "-")
names = names.filter(lambda n: ".." not in n.split("/"))
digests = st.binary(min_size=16, max_size=16).map(bytes.hex)


@settings(deadline=None)
@given(st.dictionaries(names, digests, min_size=1), st.sampled_from("* "), st.booleans())
def test_a_checklist_is_read_back(tmp_path_factory, entries, mark, crlf):
    path = tmp_path_factory.mktemp("list") / "checklist.chk"
    end = "\r\n" if crlf else "\n"
    lines = [f"{md5} {mark}{name}" for name, md5 in entries.items()]
    path.write_bytes((end.join(lines) + end).encode())
    assert digest.read_checklist(path) == entries


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_rubbish_is_read_or_refused_with_a_sentence(tmp_path_factory, rubbish):
    path = tmp_path_factory.mktemp("list") / "checklist.chk"
    path.write_bytes(rubbish)
    try:
        entries = digest.read_checklist(path)
    except DamagedFile as error:
        assert "checklist.chk" in error.what
    else:
        assert all(digest.inside(name) for name in entries)


def test_md5sum_itself_writes_what_we_read(part):
    if not shutil.which("md5sum"):
        pytest.skip("no md5sum on this machine")
    for flag in ("-b", "-t"):
        command = ["md5sum", flag, "consolidated.00.pth", "params.json"]
        made = subprocess.run(command, cwd=part / "S", capture_output=True, check=True).stdout
        (part / "S" / "checklist.chk").write_bytes(made)
        assert digest.read_checklist(part / "S" / "checklist.chk") == {
            "consolidated.00.pth": MD5,
            "params.json": hashlib.md5(PARAMS).hexdigest(),
        }


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../up", "a/../../b", "..", "C:x", "a\\b", "\\\\host\\x", ""]
)
def test_names_that_leave_the_directory(tmp_path, name):
    assert not digest.inside(name)
    (tmp_path / "checklist.chk").write_text(f"{MD5}  {name}\n")
    with pytest.raises(DamagedFile):
        digest.read_checklist(tmp_path / "checklist.chk")


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
        digest.read_checklist(tmp_path / "checklist.chk")
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
    found = digest.diagnose_bytes(tmp_path / name, FileFacts(size))
    assert found is None if cause is None else cause in found


def test_a_right_part_is_ok(part):
    result = digest.verify(part)
    assert statuses(result) == {
        "S/checklist.chk": "UNKNOWN",
        "S/consolidated.00.pth": "OK",
        "S/params.json": "OK",
    }
    assert result.ok
    # What was found is what an independent computation finds.
    found = {row.file: row.found for row in result.rows}
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert found["S/consolidated.00.pth"] == f"md5 {MD5}, sha256 {sha256}"
    assert found["S/params.json"] == f"md5 {hashlib.md5(PARAMS).hexdigest()}"


@settings(deadline=None)
@given(st.integers(0, len(WEIGHTS) - 1), st.integers(0, 7))
def test_any_flipped_bit_is_found(tmp_path_factory, offset, bit):
    changed = bytearray(WEIGHTS)
    changed[offset] ^= 1 << bit
    path = tmp_path_factory.mktemp("flip") / "a.pth"
    path.write_bytes(changed)
    assert digest.judge(path, "a.pth", FileFacts(len(WEIGHTS), MD5)).status == "WRONG"


def test_wrong_missing_and_unknown(part):
    (part / "S" / "consolidated.00.pth").write_bytes(b"<html>sign in</html>")
    (part / "S" / "params.json").unlink()
    (part / "S" / "params.json.partial").write_bytes(PARAMS[:4])
    (part / "notes.txt").write_text("mine")
    result = digest.verify(part)
    assert statuses(result) == {
        "S/checklist.chk": "UNKNOWN",
        "S/consolidated.00.pth": "WRONG",
        "S/params.json": "MISSING",
        "notes.txt": "UNKNOWN",
    }
    assert not result.ok
    assert "HTML page" in str(result) and "4 bytes have arrived" in str(result)


def test_a_wrong_checklist_is_itself_a_finding(part):
    (part / "S" / "checklist.chk").write_text("<html></html>")
    result = digest.verify(part)
    assert statuses(result)["S/checklist.chk"] == "WRONG" and not result.ok
    assert statuses(result)["S/consolidated.00.pth"] == "OK"


def test_a_directory_of_another_name(part):
    moved = part.rename(part.with_name("renamed"))
    assert statuses(digest.verify(moved))["S/consolidated.00.pth"] == "UNKNOWN"
    assert digest.verify(moved, as_name="tiny").ok
    with pytest.raises(NotFound, match="tiny"):
        digest.verify(moved, as_name="tinny")


def test_nothing_known_is_not_ok(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert not digest.verify(tmp_path).ok


def test_an_empty_or_absent_directory(tmp_path):
    with pytest.raises(NotFound, match="no file"):
        digest.verify(tmp_path)
    with pytest.raises(NotFound):
        digest.verify(tmp_path / "nowhere")


def test_against_another_directory(part, tmp_path):
    copy = shutil.copytree(part, tmp_path / "copy")
    assert digest.verify(copy, against=part).ok
    (copy / "S" / "params.json").write_bytes(PARAMS.replace(b"8", b"9"))
    (copy / "S" / "consolidated.00.pth").unlink()
    assert statuses(digest.verify(copy, against=part)) == {
        "S/checklist.chk": "OK",
        "S/consolidated.00.pth": "MISSING",
        "S/params.json": "WRONG",
    }


def test_it_shows_itself_as_text_json_and_html(part):
    (part / "a<b>.txt").write_text("x")
    result = digest.verify(part)
    assert "OK       S/params.json          md5\n" in str(result)
    assert json.loads(json.dumps(result.as_dict()))["ok"] is True
    assert "<td>a&lt;b&gt;.txt</td>" in result._repr_html_()


@pytest.fixture
def made(tmp_path):
    """A model directory as llamalab leaves it, written by other means than its writer."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    folder = tmp_path / "made"
    folder.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.arange(12, dtype=torch.float16).reshape(4, 3),
        "model.norm.weight": torch.ones(3, dtype=torch.float16),
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    sums = {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in tensors.items()}
    shapes = {n: "x".join(map(str, t.shape)) for n, t in tensors.items()}
    lines = "".join(f"{n} F16 {shapes[n]} {sums[n]}\n" for n in sorted(tensors))
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    record = {
        "tensor_digest": hashlib.sha256(lines.encode()).hexdigest(),
        "tensors": sums,
        "settings": {"files": {"config.json": config}},
    }
    (folder / "llamalab.json").write_text(json.dumps(record))
    return folder, tensors, save_file


def test_a_directory_that_we_made(made):
    folder, tensors, save_file = made
    result = digest.verify(folder)
    assert statuses(result) == {"(tensors)": "OK", "config.json": "OK"} and result.ok
    # Another container of the same tensors has other bytes and the same digest.
    before = (folder / "model.safetensors").read_bytes()
    save_file(tensors, folder / "model.safetensors", metadata={"written": "again"})
    assert (folder / "model.safetensors").read_bytes() != before
    assert digest.verify(folder).ok


def test_a_made_directory_with_one_changed_weight(made):
    folder, tensors, save_file = made
    tensors["model.norm.weight"][1] += 1
    save_file(tensors, folder / "model.safetensors")
    row = digest.verify(folder).rows[0]
    assert (row.file, row.status) == ("(tensors)", "WRONG")
    assert row.cause == "1 of 2 tensors differ, model.norm.weight first."


def test_a_made_directory_without_its_weights(made):
    folder, *_ = made
    (folder / "model.safetensors").unlink()
    assert not digest.verify(folder).ok


def test_what_convert_makes_verifies(family):
    """The record that the writer leaves is the one that is read here."""
    result = digest.verify(family / "base-hf")
    assert result.ok and set(statuses(result).values()) == {"OK"}, str(result)
