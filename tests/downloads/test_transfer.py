"""A model, part by part and file by file, over real loopback HTTP or from a directory."""

import json
import shutil
from collections import namedtuple

import pytest

import served
from llamalab.catalog.catalog import FileFacts
from llamalab.downloads import file_download, transfer
from llamalab.errors import DamagedFile, DownloadFailed, NotEnoughRoom, NotFound
from llamalab_course.file_server import Fault, serve_files
from served import BIG, CHECKLIST, CONTENT, PARAMS, WEIGHTS, accepted, lay_out, ranges, whole

tables, loop = pytest.fixture(served.tables), pytest.fixture(served.loop)


def test_a_plain_download(loop):
    assert loop.download() == [loop.models / "tiny"]
    assert whole(loop.models)
    assert {r.status for r in loop.log} == {200}


def test_what_is_right_is_kept_and_not_fetched(loop):
    loop.download()
    loop.log.clear()
    (loop.models / "tiny" / "tokenizer.model").write_bytes(b"other")
    loop.download()
    assert whole(loop.models)
    assert [r.path for r in loop.log] == ["tiny/tokenizer.model"]


def test_nothing_is_asked_when_all_is_there(loop):
    loop.download()
    transfer.download("tiny", loop.models)  # Meta's weights, put in place by hand: no source needed


@pytest.mark.parametrize("flat", [False, True])
def test_the_shorter_forms_of_a_path(loop, tmp_path, flat):
    content = {name.rpartition("/")[2] if flat else name: data for name, data in CONTENT.items()}
    lay_out(tmp_path / "other", content)
    log = []
    with serve_files(tmp_path / "other", log=log) as url:
        loop.download(url + "/")
    assert whole(loop.models)
    assert [r.status for r in log].count(404) <= 2  # the form that worked is tried first


def test_forms_that_do_not_exist_cost_nothing_of_what_has_arrived(loop):
    with serve_files(loop.served, log=loop.log) as url:  # without the part's name: the second form
        (loop.models / "tiny" / "S").mkdir(parents=True)
        (loop.models / f"{BIG}.partial").write_bytes(WEIGHTS[:1234])
        saved = {"url": f"{url}/{BIG[5:]}", "etag": None, "size": len(WEIGHTS)}
        (loop.models / f"{BIG}.partial.json").write_text(json.dumps(saved))
        (loop.models / "tiny" / "S" / "checklist.chk").write_bytes(CHECKLIST)
        loop.download(url)
    assert whole(loop.models)
    assert ranges(loop.log) == [("", 404)]
    assert ranges(loop.log, BIG[5:]) == [("bytes=1234-", 206)]


def test_a_page_in_place_of_404_does_not_hide_the_flat_form(loop):
    lay_out(loop.served.parent)
    loop.faults.update({f"tiny/{name}": Fault(html=True) for name in CONTENT})
    loop.download()
    assert whole(loop.models)


@pytest.mark.parametrize("name", ["S/params.json", "S/checklist.chk", "tokenizer.model"])
def test_small_files_are_looked_at_too(loop, name):
    loop.faults[f"tiny/{name}"] = Fault(html=True)
    with pytest.raises(DamagedFile, match="HTML page"):
        loop.download()
    assert name.rpartition("/")[2] not in accepted(loop.models)


def test_the_checklist_counts(loop):
    (loop.served / "S" / "params.json").write_bytes(PARAMS.replace(b"8", b"9"))
    with pytest.raises(DamagedFile, match="params.json"):
        loop.download()
    assert "params.json" not in accepted(loop.models)


def test_a_checklist_that_contradicts_the_catalogue(loop):
    (loop.served / "S" / "checklist.chk").write_text(f"{'0' * 32}  consolidated.00.pth\n")
    with pytest.raises(DamagedFile, match="contradicts"):
        loop.download()
    assert accepted(loop.models) == {"checklist.chk"}


@pytest.mark.parametrize("status, error", [(404, NotFound), (403, DownloadFailed)])
def test_files_that_are_refused(loop, status, error):
    loop.faults.update({name: Fault(status=status) for name in (BIG, BIG[5:], BIG[7:])})
    with pytest.raises(error):
        loop.download()


def test_room_is_asked_for_before(loop, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(NotEnoughRoom):
        loop.download()
    assert BIG not in {r.path for r in loop.log}


@pytest.mark.parametrize("case", ["large", "large, and no links here", "small"])
def test_from_a_directory(loop, monkeypatch, case):
    """A large file is linked where it can be; a small one is the reader's own, and copied."""
    assert transfer.COPIED_BELOW == 64 << 20
    if case != "small":
        monkeypatch.setattr(transfer, "COPIED_BELOW", len(WEIGHTS))
    if "no links" in case:
        monkeypatch.setattr(file_download.os, "link", lambda *a: (_ for _ in ()).throw(OSError()))
    loop.download(str(loop.served.parent))
    assert whole(loop.models)
    linked = [n for n in CONTENT if (loop.models / "tiny" / n).samefile(loop.served / n)]
    assert linked == (["S/consolidated.00.pth"] if case == "large" else [])


@pytest.mark.parametrize(
    "name",
    ["../evil.json", "/evil.json", "S/../../evil.json", "..", "a\0b", "a\nb", "C:evil", "a\\b"],
)
def test_names_cannot_leave_the_directory(loop, tables, name):
    tables["tiny"].files[name] = FileFacts()
    (loop.served.parent / "evil.json").write_text("{}")
    with pytest.raises(DamagedFile, match="outside"):
        loop.download()
    assert not (loop.models / "evil.json").exists()


def test_names_that_a_server_gives_are_not_heard(loop):
    head = {"Content-Disposition": 'attachment; filename="../../evil"', "Content-Location": "/evil"}
    loop.faults[BIG] = Fault(headers=head)
    loop.download()
    assert whole(loop.models) and not list(loop.models.parent.rglob("*evil*"))


def test_a_directory_in_the_place_of_a_file_is_left_alone(loop):
    (loop.models / BIG / "mine").mkdir(parents=True)
    with pytest.raises(OSError):
        loop.download()
    assert (loop.models / BIG / "mine").is_dir()
