"""A reader's own folder: what is there, what is missing, and how it gets to its place."""

import hashlib
import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import served
from llamalab import verify
from llamalab.catalog.catalog import FileFacts, Part
from llamalab.cli import main
from llamalab.errors import OutputExists
from llamalab.verification import misplaced_files

WEIGHTS, TOKENIZER = served.WEIGHTS, b"\n\x0e\n\x05<unk>"
PARAMS = b'{"dim": 8}\n'
CHECKLIST = f"{hashlib.md5(WEIGHTS).hexdigest()}  consolidated.00.pth\n".encode()
RIGHT = {
    "7B/checklist.chk": CHECKLIST,
    "7B/consolidated.00.pth": WEIGHTS,
    "7B/params.json": PARAMS,
    "tokenizer.model": TOKENIZER,
}


@pytest.fixture
def tiny(monkeypatch):
    """A catalogue of one base model in Meta layout."""
    files = {name: served.facts(content) for name, content in RIGHT.items()}
    files["7B/checklist.chk"] = FileFacts()
    part = Part("tiny", "base", files, vocab=8, folder="7B")
    monkeypatch.setattr("llamalab.catalog.catalog._tables", lambda: ({"tiny": part}, {}))
    return part


def flat(content):
    return {name.rpartition("/")[2]: data for name, data in content.items()}


ARRANGEMENTS = {
    "flat": flat(RIGHT),
    "nested": {f"LLaMA/{name}": data for name, data in RIGHT.items()},
    "nested twice": {f"a/LLaMA/{name}": data for name, data in RIGHT.items()},
    "tokenizer inside": {f"7B/{n}" if "/" not in n else n: data for n, data in RIGHT.items()},
    "nested and flat": {f"LLaMA/{name}": data for name, data in flat(RIGHT).items()},
}


def content_of(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("content", ARRANGEMENTS.values(), ids=ARRANGEMENTS.keys())
def test_a_wrong_arrangement_is_named_and_only_then_fixed(tiny, tmp_path, capsys, content):
    folder = served.lay_out(tmp_path / "mine", content | {"notes.txt": b"mine"})
    report = verify(folder)
    assert content_of(folder) == content | {"notes.txt": b"mine"}  # looking moves nothing
    assert not report.ok and report.parts == ("tiny",)
    wrong = {place: name for name, place in zip(content, RIGHT, strict=True) if name != place}
    assert {move.place: move.found for move in report.moves} == wrong
    assert "recognised: tiny" in str(report) and "--fix" in str(report)
    # What lies elsewhere is compared all the same.
    by_file = {row.name: row.status for row in report.rows}
    assert by_file[wrong.get("tokenizer.model", "tokenizer.model")] == "OK"
    capsys.readouterr()
    assert main(["verify", str(folder), "--fix"]) == 0
    said = capsys.readouterr()
    assert content_of(folder) == RIGHT | {"notes.txt": b"mine"}
    for place, name in wrong.items():
        assert f"moving {name} -> {place}" in said.err
    assert "MISSING" not in said.out
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["7B"]
    assert main(["verify", str(folder), "--fix"]) == 0  # nothing is left to be done
    assert "moving" not in capsys.readouterr().err


def test_the_size_folder_itself(tiny, tmp_path):
    other = {"13B/checklist.chk": CHECKLIST, "notes.txt": b"mine", "tiny/tokenizer.model": b"?"}
    folder = served.lay_out(tmp_path / "mine", RIGHT | other)  # what lies beside is not its own
    report = verify(folder / "7B")
    assert report.ok and report.path == folder and not report.moves
    assert {row.name for row in report.rows} == set(RIGHT)


def test_a_directory_of_parts(tiny, tmp_path):
    served.lay_out(tmp_path / "models" / "tiny", RIGHT)
    served.lay_out(tmp_path / "models" / "tiny-hf", {"tokenizer.model": TOKENIZER})
    (tmp_path / "models" / "tiny" / "tokenizer.model").unlink()
    report = verify(tmp_path / "models")
    by_file = {row.name: row.status for row in report.rows}
    assert by_file["tiny/tokenizer.model"] == "MISSING" and not report.moves
    assert by_file["tiny/7B/consolidated.00.pth"] == "OK"


def test_what_is_missing_and_lies_nowhere(tiny, tmp_path):
    folder = served.lay_out(tmp_path / "mine", flat(RIGHT))
    (folder / "params.json").unlink()
    report = verify(folder, as_name="tiny")
    assert {row.name: row.status for row in report.rows}["7B/params.json"] == "MISSING"
    assert "7B/params.json" not in {move.place for move in report.moves}


@pytest.mark.parametrize("doubt", ["rival", "size", "link"])
def test_in_doubt_nothing_is_moved(tiny, tmp_path, doubt):
    folder = served.lay_out(tmp_path / "mine", flat(RIGHT))
    if doubt == "rival":
        served.lay_out(folder, {"other/params.json": PARAMS})
    elif doubt == "size":
        (folder / "params.json").write_bytes(PARAMS + b" ")
    else:
        (folder / "params.json").rename(tmp_path / "params.json")
        os.symlink("../params.json", folder / "params.json")
    before = content_of(folder)
    assert "7B/params.json" not in {move.place for move in verify(folder, as_name="tiny").moves}
    assert main(["verify", str(folder), "--as", "tiny", "--fix"]) == 1
    assert (folder / "params.json").read_bytes() == before["params.json"]


def test_nothing_is_overwritten(tmp_path):
    served.lay_out(tmp_path, {"a": b"1", "d/a": b"2"})
    with pytest.raises(OutputExists):
        misplaced_files.apply(tmp_path, [misplaced_files.Move("a", "d/a")])
    assert content_of(tmp_path) == {"a": b"1", "d/a": b"2"}


def test_as_json_the_moves_are_data(tiny, tmp_path, capsys):
    folder = served.lay_out(tmp_path / "mine", flat(RIGHT))
    assert main(["verify", str(folder), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert {"found": "params.json", "place": "7B/params.json"} in report["moves"]
    assert report["parts"] == ["tiny"] and report["bytes"] > 0 and 0 <= report["read_share"] <= 1
    assert main(["verify", str(folder), "--json", "--fix"]) == 0
    assert json.loads(capsys.readouterr().out)["moves"] == []


parts = st.lists(st.sampled_from(["a", "b", "7B", "LLaMA"]), max_size=3)
paths = st.builds(lambda folders, name: "/".join([*folders, name]), parts, st.sampled_from("xyz"))


@settings(deadline=None)
@given(st.sets(paths, min_size=1, max_size=4), st.sets(paths, max_size=6))
def test_no_move_loses_or_overwrites_a_file(tmp_path_factory, wanted, there):
    folder = tmp_path_factory.mktemp("any")
    content = {name: name.encode() for name in there}
    served.lay_out(folder, content)
    known = {name: FileFacts() for name in wanted}
    try:
        moves = misplaced_files.arrange(folder, known, {name: len(name) for name in there})
        misplaced_files.apply(folder, moves)
        assert sorted(content_of(folder).values()) == sorted(content.values())
    finally:
        shutil.rmtree(folder)
