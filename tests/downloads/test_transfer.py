"""Downloads over real loopback HTTP, honest and at fault: the right bytes, or a clear error."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import namedtuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import served
from llamalab.catalog.catalog import FileFacts
from llamalab.downloads import file_download, partial_file, sources, transfer
from llamalab.errors import (
    DamagedFile,
    DownloadFailed,
    LabError,
    NotEnoughRoom,
    NotFound,
    UsageError,
)
from llamalab_course.file_server import PAGE, Fault, serve_files
from served import (
    BIG,
    CHECKLIST,
    CONTENT,
    PARAMS,
    SHA256,
    WEIGHTS,
    accepted,
    archive,
    child,
    lay_out,
    whole,
)

tables, loop = pytest.fixture(served.tables), pytest.fixture(served.loop)


def ranges(log, path=BIG):
    return [(r.range, r.status) for r in log if r.path == path]


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


def test_a_query_and_a_password_go_along_and_are_not_shown(loop):
    signed = loop.url.replace("//", "//me:secret@") + "/?Policy=secret"
    loop.faults[BIG] = Fault(cut_after=1000)
    loop.faults["tiny/S/params.json"] = Fault(status=404)
    with pytest.raises(LabError) as error:
        loop.download(signed)
    assert "secret" not in str(error.value)
    assert all(r.with_credentials for r in loop.log)
    notes = [path.read_text() for path in loop.models.rglob("*.partial.json")]
    assert "secret" not in "".join(notes)


def test_credentials_stay_with_the_host_they_were_given_for(loop, tmp_path):
    log = []
    with serve_files(loop.served.parent, log=log) as elsewhere:
        loop.faults[BIG] = Fault(redirect=f"{elsewhere}/{BIG}")
        loop.download(loop.url.replace("//", "//me:secret@"))
    assert whole(loop.models)
    assert [(r.path, r.status, r.with_credentials) for r in log] == [(BIG, 200, False)]


# --- cut, resumed ------------------------------------------------------------------------------


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
    note = {"url": f"{loop.url}/{BIG}", "etag": etag, "size": len(WEIGHTS)}
    partial.with_name(partial.name + ".json").write_text(json.dumps(note))
    with pytest.raises(DownloadFailed, match="1,234 bytes are kept"):
        loop.download()
    assert partial.read_bytes() == WEIGHTS[:1234]
    loop.faults.clear()
    loop.log.clear()
    loop.download()
    assert whole(loop.models)
    assert ranges(loop.log) == [("bytes=1234-", 206)]


def test_forms_that_do_not_exist_cost_nothing_of_what_has_arrived(loop):
    with serve_files(loop.served, log=loop.log) as url:  # without the part's name: the second form
        (loop.models / "tiny" / "S").mkdir(parents=True)
        (loop.models / f"{BIG}.partial").write_bytes(WEIGHTS[:1234])
        note = {"url": f"{url}/{BIG[5:]}", "etag": None, "size": len(WEIGHTS)}
        (loop.models / f"{BIG}.partial.json").write_text(json.dumps(note))
        (loop.models / "tiny" / "S" / "checklist.chk").write_bytes(CHECKLIST)
        loop.download(url)
    assert whole(loop.models)
    assert ranges(loop.log) == [("", 404)]
    assert ranges(loop.log, BIG[5:]) == [("bytes=1234-", 206)]


@pytest.mark.parametrize(
    "note", ["", "{", "[]", '{"url": "http://other/", "etag": null, "size": 1}']
)
def test_a_partial_of_unknown_origin_is_not_continued(loop, note):
    (loop.models / "tiny" / "S").mkdir(parents=True)
    (loop.models / f"{BIG}.partial").write_bytes(b"rubbish")
    (loop.models / f"{BIG}.partial.json").write_text(note)
    loop.download()
    assert whole(loop.models) and ranges(loop.log) == [("", 200)]


def test_a_whole_partial_needs_no_request(loop):
    loop.download()
    target = loop.models / BIG
    os.replace(target, f"{target}.partial")
    note = {"url": f"{loop.url}/{BIG}", "etag": '"1"', "size": len(WEIGHTS)}
    (loop.models / f"{BIG}.partial.json").write_text(json.dumps(note))
    loop.log.clear()
    loop.download()
    assert whole(loop.models) and loop.log == []


def test_a_wrong_prefix_is_fetched_anew(loop):
    (loop.models / "tiny" / "S").mkdir(parents=True)
    (loop.models / f"{BIG}.partial").write_bytes(b"\0" * 5000)
    note = {"url": f"{loop.url}/{BIG}", "etag": None, "size": len(WEIGHTS)}
    (loop.models / f"{BIG}.partial.json").write_text(json.dumps(note))
    loop.download()
    assert whole(loop.models)
    assert ranges(loop.log) == [("bytes=5000-", 206), ("", 200)]


def test_a_partial_longer_than_the_file(loop):
    (loop.models / "tiny" / "S").mkdir(parents=True)
    (loop.models / f"{BIG}.partial").write_bytes(WEIGHTS + b"more")
    note = {"url": f"{loop.url}/{BIG}", "etag": None, "size": None}
    (loop.models / f"{BIG}.partial.json").write_text(json.dumps(note))
    loop.download()
    assert whole(loop.models)
    assert ranges(loop.log) == [(f"bytes={len(WEIGHTS) + 4}-", 416), ("", 200)]


# --- servers at fault --------------------------------------------------------------------------

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


def test_another_size_is_refused_before_it_is_fetched(loop):
    (loop.served / "S" / "consolidated.00.pth").write_bytes(archive(900_000))
    with pytest.raises(DamagedFile, match="are expected"):
        loop.download()
    assert not list(loop.models.rglob("*.partial"))


def test_a_page_in_place_of_404_does_not_hide_the_flat_form(loop):
    lay_out(loop.served.parent)
    loop.faults.update({f"tiny/{name}": Fault(html=True) for name in CONTENT})
    loop.download()
    assert whole(loop.models)


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


@pytest.mark.parametrize("status, error", [(404, NotFound), (403, DownloadFailed)])
def test_files_that_are_refused(loop, status, error):
    loop.faults.update({name: Fault(status=status) for name in (BIG, BIG[5:], BIG[7:])})
    with pytest.raises(error):
        loop.download()


def test_a_redirect_to_another_scheme(loop):
    loop.faults[BIG] = Fault(redirect="ftp://127.0.0.1/file")
    with pytest.raises(DownloadFailed):
        loop.download()


def test_a_proxy_is_not_asked_for_loopback(loop, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    loop.download()
    assert whole(loop.models)


# --- room, sources, names ----------------------------------------------------------------------


def test_room_is_asked_for_before(loop, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(NotEnoughRoom):
        loop.download()
    assert BIG not in {r.path for r in loop.log}


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


def test_no_default_source_says_what_to_do(loop):
    with pytest.raises(NotFound) as error:
        transfer.download("tiny-model", loop.models)
    assert "licensed copy" in error.value.why
    assert "llamalab download tiny-model --source tiny=WHERE" in error.value.fix
    assert not loop.models.exists()


def test_a_lab_part_comes_from_the_checkout(loop, tables, monkeypatch):
    object.__setattr__(tables["tiny"], "source", "lab")
    monkeypatch.setattr(sources, "project_directory", lambda: loop.models.parent)
    with pytest.raises(NotFound, match="data/lab"):
        transfer.download("tiny", loop.models)
    lay_out(loop.models.parent / "data" / "lab" / "tiny")
    transfer.download("tiny", loop.models)
    assert whole(loop.models)


def test_a_named_source_goes_to_its_part(loop):
    lay_out(loop.served.parent / "tiny-lora", {"a.json": b"{}"})
    both = [loop.url, f"tiny-lora={loop.url}"]
    made = transfer.download("tiny-model", loop.models, both)
    assert made == [loop.models / "tiny", loop.models / "tiny-lora"]
    assert (loop.models / "tiny-lora" / "a.json").read_bytes() == b"{}"


@pytest.mark.parametrize(
    "source, error, match",
    [
        ("ftp://127.0.0.1/x", UsageError, "ftp:"),
        ("file:///etc", UsageError, "file:"),
        ("hf:nothing", UsageError, "hf:"),
        ("http://", UsageError, "http:"),
        ("tinny=http://127.0.0.1/", UsageError, "tinny"),
        ("nowhere/at/all", NotFound, "no directory"),
        ("tiny=", NotFound, "no directory"),
        ("no\0where", NotFound, "no directory"),
        ("HTTP://127.0.0.1/", UsageError, "HTTP:"),
        ("http:/127.0.0.1/", UsageError, "http:"),
        ("http://127.0.0.1:port/", UsageError, "not a complete address"),
        ("http://127.0.0.1:99999/", UsageError, "not a complete address"),
        ("http://[::1/", UsageError, "not a complete address"),
        ("http://me:secret@/", UsageError, "not a complete address"),
        ("http://?x", UsageError, "not a complete address"),
        ("data:text/plain,x", NotFound, "no directory"),
        ("hf:../x", UsageError, "Hub repository"),
        ("hf:a/b/c", UsageError, "hf:"),
        ("hf:a/b@", UsageError, "hf:"),
        ("hf:a/b@v 1", UsageError, "hf:"),
        ("hf:a/b?x", UsageError, "hf:"),
        ("tiny=nowhere", NotFound, "no directory"),
    ],
)
def test_sources_that_are_none(loop, source, error, match):
    with pytest.raises(error, match=match) as refusal:
        loop.download(source)
    assert "secret" not in str(refusal.value)
    assert not loop.models.exists()


def test_a_source_for_no_part(loop):
    with pytest.raises(UsageError, match="for no part"):
        loop.download(name="tiny-lora")


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


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_in_place_of_files_are_replaced_and_not_followed(loop, link):
    mine = loop.served.parent / "mine"
    mine.write_bytes(b"precious")
    (loop.models / "tiny" / "S").mkdir(parents=True)
    link(mine, loop.models / "tiny" / "tokenizer.model")
    link(mine, loop.models / f"{BIG}.partial")
    note = {"url": f"{loop.url}/{BIG}", "etag": None, "size": len(WEIGHTS)}
    (loop.models / f"{BIG}.partial.json").write_text(json.dumps(note))
    loop.download()
    assert whole(loop.models) and mine.read_bytes() == b"precious"
    assert not (loop.models / "tiny" / "tokenizer.model").is_symlink()


def test_a_directory_in_the_place_of_a_file_is_left_alone(loop):
    (loop.models / BIG / "mine").mkdir(parents=True)
    with pytest.raises(OSError):
        loop.download()
    assert (loop.models / BIG / "mine").is_dir()


def test_an_address_of_ipv6(loop):
    """Brackets, a port, a password, a query and a fragment, in one address."""
    from http.server import ThreadingHTTPServer

    class Six(ThreadingHTTPServer):
        address_family = socket.AF_INET6

    try:
        with Six(("::1", 0), None):
            pass
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with serve_files(loop.served.parent, log=loop.log) as url:
        with tunnel(int(url.rpartition(":")[2])) as port:
            loop.download(f"http://me:secret@[::1]:{port}/tiny/?key=secret#part")
    assert whole(loop.models) and all(r.with_credentials for r in loop.log)


@contextlib.contextmanager
def tunnel(port):
    """Pass connections to [::1] on to 127.0.0.1:`port`; yield the port there."""
    import socketserver
    import threading

    class Pass(socketserver.BaseRequestHandler):
        def handle(self):
            with socket.create_connection(("127.0.0.1", port)) as there:
                up = threading.Thread(target=self.copy, args=(self.request, there), daemon=True)
                up.start()
                self.copy(there, self.request)

        def copy(self, source, target):
            with contextlib.suppress(OSError):
                while block := source.recv(1 << 16):
                    target.sendall(block)

    class Server(socketserver.ThreadingTCPServer):
        address_family, daemon_threads = socket.AF_INET6, True

    with Server(("::1", 0), Pass) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


# --- real processes ----------------------------------------------------------------------------


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


HUB_FILE = "me/repo/resolve/v1/w.pth"


@pytest.fixture
def hub(tmp_path):
    """A Hub that leads to another host for large files: its faults, both logs, its environment."""
    lay_out(tmp_path / "hub", {HUB_FILE: b""})
    lay_out(tmp_path / "store", {"blob": WEIGHTS})
    log, store_log, faults, store_faults = [], [], {}, {}
    with serve_files(tmp_path / "store", store_faults, store_log) as store:
        with serve_files(tmp_path / "hub", faults, log) as url:
            promise = {"X-Linked-ETag": f'"{SHA256}"', "X-Linked-Size": str(len(WEIGHTS))}
            promise["X-Repo-Commit"] = "a" * 40
            faults[HUB_FILE] = Fault(redirect=f"{store}/blob", headers=promise)
            settings = {"HF_ENDPOINT": url, "HF_TOKEN": "hf_secret", "HF_HOME": str(tmp_path / "h")}
            yield Hub(faults, log, store_faults, store_log, settings)


Hub = namedtuple("Hub", "faults log store_faults store_log settings")


def from_hub(models, sha256, settings, code=0):
    """Download `w.pth` of `hf:me/repo@v1` in a process of its own; return what it said."""
    process = child(sha256, "hf:me/repo@v1", models, "w.pth", **settings)
    _, messages = process.communicate(timeout=60)
    assert process.returncode == code, messages.decode()
    assert b"hf_secret" not in messages
    return messages.decode()


def test_a_hub_repository_by_endpoint_and_token(hub, tmp_path):
    """The Hub's own URL and header building, and no token for the host that it redirects to."""
    from_hub(tmp_path / "models", SHA256, hub.settings)
    assert (tmp_path / "models" / "tiny" / "w.pth").read_bytes() == WEIGHTS
    files = [r for r in hub.log if r.path.startswith("me/")]
    assert [(r.path, r.status, r.with_credentials) for r in files] == [
        ("me/repo/resolve/v1/tiny/w.pth", 404, True),
        (HUB_FILE, 302, True),
    ]
    assert [(r.status, r.with_credentials) for r in hub.store_log] == [(200, False)]


def test_the_sha256_that_the_hub_promises_is_held_against_the_published_one(hub, tmp_path):
    other = "0" * 64
    assert other in from_hub(tmp_path / "models", other, hub.settings, code=1)
    assert accepted(tmp_path / "models") == set()
    assert len(hub.store_log) == 1  # looked at once, and not taken


def test_the_token_is_stored_nowhere(hub, tmp_path):
    hub.store_faults["blob"] = Fault(stall_after=200_000)
    process = child(SHA256, "hf:me/repo@v1", tmp_path / "models", "w.pth", **hub.settings)
    partial = tmp_path / "models" / "tiny" / "w.pth.partial"
    while not (partial.exists() and partial.stat().st_size == 200_000):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    files = [path for path in (tmp_path / "models").rglob("*") if path.is_file()]
    assert len(files) == 2 and not [path for path in files if b"hf_secret" in path.read_bytes()]


MODEL = """
    import sys
    from llamalab.catalog import FileFacts, ModelEntry, Part, catalog
    from llamalab.cli import main
    base = Part("tiny", "base", {"p.json": FileFacts()}, vocab=8)
    files = {"w.pth": FileFacts(sha256=sys.argv[1])}
    lora = Part("tiny-lora", "adapter", files, vocab=8, base="tiny", source="hf:me/repo@v1")
    parts = {"tiny": base, "tiny-lora": lora}
    catalog._tables = lambda: (parts, {"model": ModelEntry("model", base, (lora,))})
    sys.exit(main(["download", "model", "--models-dir", sys.argv[2], "--source", sys.argv[3]]))
"""


def test_the_base_from_where_it_is_said_and_the_adapter_from_the_hub(hub, tmp_path):
    """As `download chinese-llama-7b --source llama-7b=WHERE` does, each part to its place."""
    mine, models = lay_out(tmp_path / "mine", {"p.json": b"{}"}), tmp_path / "models"
    command = [sys.executable, "-c", textwrap.dedent(MODEL), SHA256, str(models), f"tiny={mine}"]
    environment = os.environ | hub.settings
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == [str(models / "tiny"), str(models / "tiny-lora")], (
        done.stderr
    )
    assert (models / "tiny" / "p.json").read_bytes() == (mine / "p.json").read_bytes()
    assert (models / "tiny-lora" / "w.pth").read_bytes() == WEIGHTS


def test_a_hub_cache_made_by_the_hubs_own_code(hub, tmp_path):
    """Offline, what the cache holds is taken over and verified; what it does not is said."""
    code = "import huggingface_hub as h; h.hf_hub_download('me/repo', 'w.pth', revision='v1')"
    environment = os.environ | hub.settings
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    hub.log.clear()
    offline = hub.settings | {"HF_HUB_OFFLINE": "1"}
    from_hub(tmp_path / "models", SHA256, offline)
    (blob,) = (tmp_path / "h" / "hub" / "models--me--repo" / "blobs").iterdir()
    assert (tmp_path / "models" / "tiny" / "w.pth").read_bytes() == blob.read_bytes()
    (tmp_path / "models" / "tiny" / "w.pth").unlink()
    blob.write_bytes(WEIGHTS[:-1] + b"?")  # damaged in the cache: fetched, if that is allowed
    assert "HF_HUB_OFFLINE" in from_hub(tmp_path / "models", SHA256, offline, code=1)
    assert hub.log == []
    assert "damaged" in from_hub(tmp_path / "models", SHA256, hub.settings)
    assert (tmp_path / "models" / "tiny" / "w.pth").read_bytes() == WEIGHTS
    assert blob.read_bytes() == WEIGHTS[:-1] + b"?"


def test_negative_control_the_page_is_really_served(loop):
    """The faults are real: a plain client swallows what `download` refuses."""
    import httpx

    loop.faults[BIG] = Fault(html=True)
    with httpx.Client(trust_env=False) as client:
        answer = client.get(f"{loop.url}/{BIG}")
    assert (answer.status_code, answer.content) == (200, PAGE)
