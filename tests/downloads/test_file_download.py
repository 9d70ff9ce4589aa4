"""One file over real loopback HTTP, cut, resumed, at fault: the right bytes, or a clear error."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import served
from llamalab.catalog.catalog import FileFacts
from llamalab.downloads import file_download, partial_file, transfer
from llamalab.errors import DamagedFile, DownloadFailed, NotEnoughRoom
from llamalab_course.file_server import PAGE, Fault, serve_files
from served import BIG, SHA256, WEIGHTS, accepted, archive, child, ranges, whole

tables, loop = pytest.fixture(served.tables), pytest.fixture(served.loop)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.integers(0, len(WEIGHTS)), times=st.integers(1, 3))
def test_cut_anywhere_and_resumed(loop, cut, times):
    (loop.models / BIG).unlink(missing_ok=True)
    loop.log.clear()
    loop.faults[BIG] = Fault(cut_after=cut, times=times)
    loop.download()
    assert (loop.models / BIG).read_bytes() == WEIGHTS
    # Not one byte crosses the wire twice.
    assert sum(r.sent for r in loop.log if r.path == BIG) == len(WEIGHTS)


def test_every_answer_cut_still_ends(loop):
    loop.faults[BIG] = Fault(cut_after=70_000)
    loop.download()
    assert whole(loop.models)
    expected = [(f"bytes={n}-" if n else "", 206 if n else 200) for n in range(0, 300_000, 70_000)]
    assert ranges(loop.log) == expected


def test_a_later_run_goes_on_from_there(loop):
    loop.faults[BIG] = Fault(status=500)
    (loop.models / "tiny" / "S").mkdir(parents=True)
    partial = loop.models / f"{BIG}.partial"
    partial.write_bytes(WEIGHTS[:1234])
    etag = f'"{(loop.served.parent / BIG).stat().st_mtime_ns:x}-{len(WEIGHTS):x}"'
    saved = {"url": f"{loop.url}/{BIG}", "etag": etag, "size": len(WEIGHTS)}
    partial.with_name(partial.name + ".json").write_text(json.dumps(saved))
    with pytest.raises(DownloadFailed, match="1,234 bytes are kept"):
        loop.download()
    assert partial.read_bytes() == WEIGHTS[:1234]
    loop.faults.clear()
    loop.log.clear()
    loop.download()
    assert whole(loop.models)
    assert ranges(loop.log) == [("bytes=1234-", 206)]


@pytest.mark.parametrize(
    "sidecar", ["", "{", "[]", '{"url": "http://other/", "etag": null, "size": 1}']
)
def test_a_partial_of_unknown_origin_is_not_continued(loop, sidecar):
    (loop.models / "tiny" / "S").mkdir(parents=True)
    (loop.models / f"{BIG}.partial").write_bytes(b"rubbish")
    (loop.models / f"{BIG}.partial.json").write_text(sidecar)
    loop.download()
    assert whole(loop.models) and ranges(loop.log) == [("", 200)]


def test_a_whole_partial_needs_no_request(loop):
    loop.download()
    target = loop.models / BIG
    os.replace(target, f"{target}.partial")
    saved = {"url": f"{loop.url}/{BIG}", "etag": '"1"', "size": len(WEIGHTS)}
    (loop.models / f"{BIG}.partial.json").write_text(json.dumps(saved))
    loop.log.clear()
    loop.download()
    assert whole(loop.models) and loop.log == []


def test_a_wrong_prefix_is_fetched_anew(loop):
    (loop.models / "tiny" / "S").mkdir(parents=True)
    (loop.models / f"{BIG}.partial").write_bytes(b"\0" * 5000)
    saved = {"url": f"{loop.url}/{BIG}", "etag": None, "size": len(WEIGHTS)}
    (loop.models / f"{BIG}.partial.json").write_text(json.dumps(saved))
    loop.download()
    assert whole(loop.models)
    assert ranges(loop.log) == [("bytes=5000-", 206), ("", 200)]


def test_a_partial_longer_than_the_file(loop):
    (loop.models / "tiny" / "S").mkdir(parents=True)
    (loop.models / f"{BIG}.partial").write_bytes(WEIGHTS + b"more")
    saved = {"url": f"{loop.url}/{BIG}", "etag": None, "size": None}
    (loop.models / f"{BIG}.partial.json").write_text(json.dumps(saved))
    loop.download()
    assert whole(loop.models)
    assert ranges(loop.log) == [(f"bytes={len(WEIGHTS) + 4}-", 416), ("", 200)]


MISBEHAVING = {
    "ignores the range": Fault(cut_after=200_000, ignore_range=True, times=2),
    "another version each time": Fault(cut_after=200_000, new_etag=True, times=2),
    "stalls": Fault(stall_after=100_000, times=1),
    "busy": Fault(status=503, retry_after="0", times=2),
    "too many requests": Fault(status=429, times=2),
    "busy until a date": Fault(status=503, retry_after="Mon, 01 Jan 2024 00:00:00 GMT", times=1),
    "nonsense in Retry-After": Fault(status=503, retry_after="soon", times=1),
}


@pytest.mark.parametrize("fault", MISBEHAVING.values(), ids=MISBEHAVING.keys())
def test_the_right_bytes_in_spite_of_it(loop, fault):
    loop.faults[BIG] = fault
    loop.download()
    assert whole(loop.models)


def test_another_range_than_asked_for(loop):
    loop.faults[BIG] = Fault(cut_after=200_000, wrong_range=True, times=2)
    loop.download()
    assert whole(loop.models)
    assert ranges(loop.log) == [("", 200), ("bytes=200000-", 206), ("", 200)]


def test_a_part_of_another_version(loop):
    """A server that heeds no If-Range is caught by the ETag of what it sends."""
    loop.faults[BIG] = Fault(cut_after=200_000, new_etag=True, ignore_if_range=True, times=2)
    loop.download()
    assert whole(loop.models)
    assert ranges(loop.log) == [("", 200), ("bytes=200000-", 206), ("", 200)]


def test_a_file_without_digest_is_never_pieced_together(loop, tables):
    """Two versions of a file, cut in the first: the end of one never follows another's start."""
    tables["tiny"].files["S/consolidated.00.pth"] = FileFacts()
    loop.faults[BIG] = Fault(cut_after=200_000, times=1)
    other = archive(310_000)[::-1].replace(b"PK", b"KP")

    def change(path=loop.served.parent / BIG):
        path.write_bytes(b"PK\x03\x04" + other)

    before = file_download.time.sleep
    file_download.time.sleep = lambda seconds: (change(), before(0))
    try:
        with pytest.raises(DamagedFile):  # the new version is no zip archive
            loop.download()
    finally:
        file_download.time.sleep = before
    assert ranges(loop.log) == [("", 200), ("bytes=200000-", 200), ("", 200)]


def test_the_size_of_another_version_is_not_kept(loop, tables):
    """Killed before the first byte was written; the sidecar speaks of a file that was replaced."""
    tables["tiny"].files["S/consolidated.00.pth"] = FileFacts()
    (loop.models / "tiny" / "S").mkdir(parents=True)
    (loop.models / f"{BIG}.partial").touch()
    saved = {"url": f"{loop.url}/{BIG}", "etag": '"old"', "size": 1000}
    (loop.models / f"{BIG}.partial.json").write_text(json.dumps(saved))
    loop.download()
    assert whole(loop.models)


WRONG = {
    "flipped byte": (Fault(flip_at=150_000), "bytes changed on the way"),
    "flipped first byte": (Fault(flip_at=0), "Not a PyTorch file"),
    "HTML page": (Fault(html=True), "HTML page"),
}


@pytest.mark.parametrize("fault, cause", WRONG.values(), ids=WRONG.keys())
def test_wrong_bytes_are_refused_and_named(loop, fault, cause):
    loop.faults[BIG] = fault
    with pytest.raises(DamagedFile, match=cause):
        loop.download()
    assert accepted(loop.models) == {"checklist.chk"}
    assert not list(loop.models.rglob("*.partial*"))


def test_a_flip_and_a_cut_together_end(loop):
    loop.faults[BIG] = Fault(flip_at=150_000, cut_after=100_000)
    with pytest.raises(DamagedFile):
        loop.download()
    assert accepted(loop.models) == {"checklist.chk"}


def test_an_html_page_does_not_cost_what_has_arrived(loop, monkeypatch):
    monkeypatch.setattr(file_download, "ATTEMPTS", 1)
    loop.faults[BIG] = Fault(cut_after=100_000, times=1)
    monkeypatch.setattr(
        file_download.time, "sleep", lambda s: loop.faults.update({BIG: Fault(html=True)})
    )
    with pytest.raises(DamagedFile, match="HTML page"):
        loop.download()
    assert (loop.models / f"{BIG}.partial").read_bytes() == WEIGHTS[:100_000]


def test_another_size_is_refused_before_it_is_fetched(loop):
    (loop.served / "S" / "consolidated.00.pth").write_bytes(archive(900_000))
    with pytest.raises(DamagedFile, match="are expected"):
        loop.download()
    assert not list(loop.models.rglob("*.partial"))


def test_a_server_that_never_recovers(loop):
    loop.faults[BIG] = Fault(status=503, retry_after="0")
    with pytest.raises(DownloadFailed, match="503"):
        loop.download()
    assert len(ranges(loop.log)) == file_download.ATTEMPTS


def test_a_long_retry_after_is_bounded(loop, monkeypatch):
    naps = []
    monkeypatch.setattr(file_download.time, "sleep", naps.append)
    loop.faults[BIG] = Fault(status=429, retry_after="86400", times=1)
    loop.download()
    assert naps == [file_download.LONGEST_WAIT]


def test_no_server_at_all(loop):
    with serve_files(loop.served) as gone:
        pass
    with pytest.raises(DownloadFailed, match="could not be fetched"):
        loop.download(gone)


def test_a_redirect_to_another_scheme(loop):
    loop.faults[BIG] = Fault(redirect="ftp://127.0.0.1/file")
    with pytest.raises(DownloadFailed):
        loop.download()


def test_a_disk_that_fills_up_keeps_what_has_arrived(loop, monkeypatch):
    real = os.pwrite

    def pwrite(file, block, offset):
        if offset > 100_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, block[:1000], offset)  # a nearly full disk takes a little at a time

    with monkeypatch.context() as patch, pytest.raises(NotEnoughRoom, match="disk is full"):
        patch.setattr(partial_file.os, "pwrite", pwrite)
        loop.download()
    kept = (loop.models / f"{BIG}.partial").read_bytes()
    assert len(kept) > 100_000 and kept == WEIGHTS[: len(kept)]
    loop.log.clear()
    loop.download()
    assert whole(loop.models) and ranges(loop.log) == [(f"bytes={len(kept)}-", 206)]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 KB, which only root can make."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount on this machine")
    if done.returncode:
        pytest.skip(f"no small disk without root: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_real_disk_that_fills_up(loop, tables, small_disk):
    """Asked before, where the size is known; met during, where it is not."""
    with pytest.raises(NotEnoughRoom, match="are needed"):
        transfer.download("tiny", small_disk, [loop.url])
    assert loop.log == []
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    tables["tiny"].files["S/consolidated.00.pth"] = FileFacts(sha256=sha256)
    loop.faults[BIG] = Fault(chunked=True)  # which says no size
    with pytest.raises(NotEnoughRoom, match="disk is full"):
        transfer.download("tiny", small_disk, [loop.url])
    assert accepted(small_disk) == {"checklist.chk"}
    kept = (small_disk / f"{BIG}.partial").read_bytes()
    assert len(kept) > 100_000 and kept == WEIGHTS[: len(kept)]


def test_a_wrong_file_of_the_reader_is_refused_and_untouched(loop):
    wrong = WEIGHTS[:1000] + b"?" + WEIGHTS[1001:]
    (loop.served.parent / BIG).write_bytes(wrong)
    with pytest.raises(DamagedFile, match="bytes changed"):
        loop.download(str(loop.served))
    assert (loop.served.parent / BIG).read_bytes() == wrong
    assert "consolidated.00.pth" not in accepted(loop.models)


def test_a_hard_link_left_behind_is_never_written_through(loop):
    """A partial may be a second name of the reader's own file, left by a copy that was killed."""
    mine = loop.served.parent / "mine"
    mine.write_bytes(b"precious")
    (loop.models / "tiny" / "S").mkdir(parents=True)
    os.link(mine, loop.models / f"{BIG}.partial")
    loop.download()
    assert whole(loop.models) and mine.read_bytes() == b"precious"


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_in_place_of_files_are_replaced_and_not_followed(loop, link):
    mine = loop.served.parent / "mine"
    mine.write_bytes(b"precious")
    (loop.models / "tiny" / "S").mkdir(parents=True)
    link(mine, loop.models / "tiny" / "tokenizer.model")
    link(mine, loop.models / f"{BIG}.partial")
    saved = {"url": f"{loop.url}/{BIG}", "etag": None, "size": len(WEIGHTS)}
    (loop.models / f"{BIG}.partial.json").write_text(json.dumps(saved))
    loop.download()
    assert whole(loop.models) and mine.read_bytes() == b"precious"
    assert not (loop.models / "tiny" / "tokenizer.model").is_symlink()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle_and_resumed(loop, how):
    name = "S/consolidated.00.pth"
    loop.faults[BIG] = Fault(stall_after=200_000)
    process = child(SHA256, loop.url, loop.models, name)
    partial = loop.models / f"{BIG}.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size == 200_000):
        time.sleep(0.01)
    process.send_signal(how)
    process.communicate(timeout=30)
    assert process.returncode != 0 and accepted(loop.models) == set()
    loop.faults.clear()
    again = child(SHA256, loop.url, loop.models, name)
    assert again.communicate(timeout=60) and again.returncode == 0
    assert (loop.models / BIG).read_bytes() == WEIGHTS
    assert ranges(loop.log) == [("", 200), ("bytes=200000-", 206)]


def test_negative_control_the_page_is_really_served(loop):
    """The faults are real: a plain client swallows what `download` refuses."""
    import httpx

    loop.faults[BIG] = Fault(html=True)
    with httpx.Client(trust_env=False) as client:
        answer = client.get(f"{loop.url}/{BIG}")
    assert (answer.status_code, answer.content) == (200, PAGE)
