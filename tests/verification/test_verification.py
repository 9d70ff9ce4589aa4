"""Verifying directories: a row a file, and every wrong file named for what it is."""

import hashlib
import json
import shutil
import subprocess

import pytest

import synthetic
from llamalab.catalog.catalog import FileFacts, Part
from llamalab.checkpoints.digests import read_checklist
from llamalab.errors import NotFound
from llamalab.verification import verification

WEIGHTS, PARAMS = synthetic.zip_archive(), b'{"dim": 8}\n'
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
    monkeypatch.setattr("llamalab.catalog.catalog._tables", lambda: ({"tiny": part}, {}))
    return folder


def statuses(verification):
    return {row.name: row.status for row in verification.rows}


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
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    config = {"model_type": "llama", "vocab_size": 4} | dict.fromkeys(keys, 1)
    (folder / "config.json").write_text(json.dumps(config))
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


def test_a_right_part_is_ok(part):
    result = verification.verify(part)
    assert statuses(result) == {
        "S/checklist.chk": "UNKNOWN",
        "S/consolidated.00.pth": "OK",
        "S/params.json": "OK",
    }
    assert result.ok
    # What was found is what an independent computation finds.
    found = {row.name: row.found for row in result.rows}
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert found["S/consolidated.00.pth"] == f"md5 {MD5}, sha256 {sha256}"
    assert found["S/params.json"] == f"md5 {hashlib.md5(PARAMS).hexdigest()}"


def test_wrong_missing_and_unknown(part):
    (part / "S" / "consolidated.00.pth").write_bytes(b"<html>sign in</html>")
    (part / "S" / "params.json").unlink()
    (part / "S" / "params.json.partial").write_bytes(PARAMS[:4])
    (part / "S" / "params.json.partial.json").write_text("{}")  # its sidecar
    (part / "notes.txt").write_text("mine")
    result = verification.verify(part)
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
    result = verification.verify(part)
    assert statuses(result)["S/checklist.chk"] == "WRONG" and not result.ok
    assert statuses(result)["S/consolidated.00.pth"] == "OK"


def test_a_directory_of_another_name(part):
    moved = part.rename(part.with_name("renamed"))
    assert "recognised: tiny" in str(verification.verify(moved))
    (moved / "S" / "consolidated.00.pth").unlink()  # by which it was recognised
    assert set(statuses(verification.verify(moved)).values()) == {"OK", "UNKNOWN"}
    (moved / "S" / "consolidated.00.pth").write_bytes(WEIGHTS)
    assert verification.verify(moved, as_name="tiny").ok
    with pytest.raises(NotFound, match="tiny"):
        verification.verify(moved, as_name="tinny")


def test_nothing_known_is_not_ok(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert not verification.verify(tmp_path).ok


def test_an_empty_or_absent_directory(tmp_path):
    with pytest.raises(NotFound, match="no file"):
        verification.verify(tmp_path)
    with pytest.raises(NotFound):
        verification.verify(tmp_path / "nowhere")


def test_against_another_directory(part, tmp_path):
    copy = shutil.copytree(part, tmp_path / "copy")
    assert verification.verify(copy, against=part).ok
    (copy / "S" / "params.json").write_bytes(PARAMS.replace(b"8", b"9"))
    (copy / "S" / "consolidated.00.pth").unlink()
    assert statuses(verification.verify(copy, against=part)) == {
        "S/checklist.chk": "OK",
        "S/consolidated.00.pth": "MISSING",
        "S/params.json": "WRONG",
    }


@pytest.fixture
def pair(made, tmp_path):
    """Two directories of the same tensors, in one shard and in two, and a way to change one."""
    from safetensors.torch import save_file

    folder, tensors, _ = made
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "model.safetensors").unlink()

    def write(tensors):
        index = {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}
        for name, file in index.items():
            save_file({name: tensors[name]}, other / file)
        (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    write(tensors)
    return folder, other, tensors, write


def test_against_the_same_tensors_in_other_files(pair):
    folder, other, *_ = pair
    (other / "tokenizer.model").write_bytes(b"one more")
    (folder / "tokenizer.model").write_bytes(b"one more")
    result = verification.verify(folder, against=other)
    assert statuses(result) == {"(tensors)": "OK", "config.json": "OK", "tokenizer.model": "OK"}
    recorded = json.loads((folder / "llamalab.json").read_text())["tensor_digest"]
    assert result.rows[0].found == f"tensors {recorded}" and result.ok
    assert "read speed" not in str(result)  # the tensors are not in that figure


def test_against_names_the_tensors_that_differ_and_by_how_much(pair):
    folder, other, tensors, write = pair
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    changed["model.norm.weight"][1] += 0.5
    changed["model.norm.weight"][2] -= 0.25
    write(changed)
    rows = {row.name: row for row in verification.verify(folder, against=other).rows}
    assert rows["(tensors)"].cause == "1 of 2 tensors differ, model.norm.weight first."
    assert rows["model.norm.weight"].cause == "2 of 3 values differ, by 0.5 at most."


@pytest.mark.parametrize("value, gap", [("nan", "inf"), ("inf", "inf"), ("-0.0", "1")])
def test_against_sees_what_subtraction_does_not(pair, value, gap):
    folder, other, tensors, write = pair
    tensors["model.norm.weight"][0] = float(value)
    write(tensors)
    rows = {row.name: row for row in verification.verify(folder, against=other).rows}
    assert rows["model.norm.weight"].cause == f"1 of 3 values differ, by {gap} at most."
    # On both sides it is the same value, a NaN as well.
    assert verification.verify(other, against=other).rows[0].status == "OK"


def test_against_other_shapes_dtypes_and_names(pair):
    folder, other, tensors, write = pair
    more = {name: tensor.float() for name, tensor in tensors.items()}
    more["model.norm.weight"] = more["model.norm.weight"][:2].contiguous()
    more["extra.weight"] = more["model.norm.weight"].clone()
    write(more)
    rows = {row.name: row for row in verification.verify(folder, against=other).rows}
    assert rows["(tensors)"].cause.startswith("3 of 3 tensors differ")
    embedding, norm = rows["model.embed_tokens.weight"], rows["model.norm.weight"]
    assert (embedding.expected, embedding.found) == ("F32 4x3", "F16 4x3")
    assert embedding.cause == "0 of 12 values differ, by 0 at most."
    assert (norm.expected, norm.found) == ("F32 2", "F16 3")
    assert (rows["extra.weight"].expected, rows["extra.weight"].found) == ("F32 2", "absent")


def test_against_another_layout_says_to_convert(family):
    result = verification.verify(family / "base", against=family / "base-hf")
    assert "convert" in result.rows[0].cause and not result.ok


def test_against_adapters_compares_files(family, tmp_path):
    assert verification.verify(family / "llama-lora", against=family / "llama-lora").ok
    assert not verification.verify(family / "llama-lora", against=family / "alpaca-lora").ok


def test_its_speed_is_a_share_of_reading(part):
    result = verification.verify(part)
    assert result.bytes == len(WEIGHTS) + len(PARAMS) and 0 < result.read_share < 1
    assert str(result).endswith(f"{result.read_share:.0%} of the plain read speed")
    assert "plain read speed" in result._repr_html_()


def test_it_shows_itself_as_text_json_and_html(part):
    (part / "a<b>.txt").write_text("x")
    result = verification.verify(part)
    assert "OK       S/params.json          md5\n" in str(result)
    assert json.loads(json.dumps(result.as_dict()))["ok"] is True
    assert ">a&lt;b&gt;.txt</td>" in result._repr_html_()


def test_a_directory_that_we_made(made):
    folder, tensors, save_file = made
    result = verification.verify(folder)
    assert statuses(result) == {"(tensors)": "OK", "config.json": "OK"} and result.ok
    # Another container of the same tensors has other bytes and the same digest.
    before = (folder / "model.safetensors").read_bytes()
    save_file(tensors, folder / "model.safetensors", metadata={"written": "again"})
    assert (folder / "model.safetensors").read_bytes() != before
    assert verification.verify(folder).ok


def test_a_made_directory_with_one_changed_weight(made):
    folder, tensors, save_file = made
    tensors["model.norm.weight"][1] += 1
    save_file(tensors, folder / "model.safetensors")
    row = verification.verify(folder).rows[0]
    assert (row.name, row.status) == ("(tensors)", "WRONG")
    assert row.cause == "1 of 2 tensors differ, model.norm.weight first."


def test_a_made_directory_without_its_weights(made):
    folder, *_ = made
    (folder / "model.safetensors").unlink()
    assert not verification.verify(folder).ok


def test_what_convert_makes_verifies(family):
    """The record that the writer leaves is the one that is read here."""
    result = verification.verify(family / "base-hf")
    assert result.ok and set(statuses(result).values()) == {"OK"}, str(result)


def test_md5sum_itself_writes_what_we_read(part):
    if not shutil.which("md5sum"):
        pytest.skip("no md5sum on this machine")
    for flag in ("-b", "-t"):
        command = ["md5sum", flag, "consolidated.00.pth", "params.json"]
        made = subprocess.run(command, cwd=part / "S", capture_output=True, check=True).stdout
        (part / "S" / "checklist.chk").write_bytes(made)
        assert read_checklist(part / "S" / "checklist.chk") == {
            "consolidated.00.pth": MD5,
            "params.json": hashlib.md5(PARAMS).hexdigest(),
        }
