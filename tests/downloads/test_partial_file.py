"""A file on its way: whatever was written and wherever it was cut, no byte is claimed wrongly."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamalab import files
from llamalab.catalog.catalog import FileFacts
from llamalab.downloads import partial_file
from llamalab.downloads.partial_file import PartialFile, Stale
from llamalab.downloads.response import Head
from llamalab.files import lock_now, locked

CONTENT = bytes(i * 7 % 251 for i in range(1000))
FACTS = FileFacts(len(CONTENT), sha256=hashlib.sha256(CONTENT).hexdigest())
URL = "http://127.0.0.1/file"


def head(etag, headers=None, status=200):
    headers = {"Content-Length": "1000", "Accept-Ranges": "bytes", "ETag": etag} | (headers or {})
    return Head(httpx.Response(status, headers=headers))


def begin(folder, first=None, facts=FACTS, piece=None):
    partial = PartialFile(folder / "file", URL, facts)
    gap = partial.take()
    partial.begin(gap, first or head('"1"'), piece)
    return partial, gap


@settings(deadline=None, max_examples=200)
@given(
    piece=st.integers(1, 400) | st.just(len(CONTENT)),
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 120)), max_size=40),
    noted=st.integers(0, 40),
)
def test_after_a_kill_nothing_is_claimed_that_is_not_here(piece, steps, noted):
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as copy:
        partial, first = begin(Path(folder), piece=piece)
        taken = {0: first}
        for number, (worker, count) in enumerate(steps):
            gap = taken.get(worker) or partial.take()
            if gap is None:
                continue
            taken[worker] = gap
            if partial.write(gap, CONTENT[gap.start : gap.start + count]):
                del taken[worker]
            if number == noted:  # the sidecar is as old as that when the process dies
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(partial_file, "SIDECAR_SECONDS", -1)
                    partial.follow()
        for path in (partial.path, partial.sidecar):
            shutil.copy(path, copy)
        after = PartialFile(Path(copy, "file"), URL, FACTS)
        missing = {i for gap in after.gaps for i in range(gap.start, gap.stop)}
        content = after.path.read_bytes()
        assert all(content[i] == CONTENT[i] for i in range(len(CONTENT)) if i not in missing)
        assert after.have == len(CONTENT) - len(missing) <= partial.have
        if piece == len(CONTENT):  # one connection loses nothing at all
            assert after.have == partial.have
        partial.stop()  # not killed but stopped: nothing is lost
        assert PartialFile(Path(folder, "file"), URL, FACTS).have == partial.have
        partial.close()


@settings(deadline=None)
@given(
    st.recursive(st.none() | st.integers(-5, 2000) | st.text(max_size=3), st.lists, max_leaves=9)
)
def test_a_sidecar_of_nonsense_is_none(missing):
    with tempfile.TemporaryDirectory() as folder:
        partial, gap = begin(Path(folder))
        partial.write(gap, CONTENT[:500])
        partial.stop()
        saved = json.loads(partial.sidecar.read_text()) | {"missing": missing}
        partial.sidecar.write_text(json.dumps(saved))
        after = PartialFile(Path(folder, "file"), URL, FACTS)
    covered = sum(gap.stop - gap.start for gap in after.gaps if gap.stop is not None)
    assert after.have <= 500 and (after.have == 0 or after.have + covered == len(CONTENT))


@pytest.mark.parametrize(
    "change", [{"url": "other"}, {"size": 400}, {"etag": None, "sha256": None}]
)
def test_what_could_be_another_file_is_not_continued(tmp_path, change):
    partial, gap = begin(tmp_path, facts=FileFacts())
    partial.write(gap, CONTENT[:500])
    partial.stop()
    partial.sidecar.write_text(json.dumps(json.loads(partial.sidecar.read_text()) | change))
    assert PartialFile(tmp_path / "file", URL, FileFacts()).have == 0


def test_the_digests_follow_the_part_without_a_gap(tmp_path, monkeypatch):
    monkeypatch.setattr(partial_file, "BLOCK", 100)
    partial, first = begin(tmp_path, piece=500)
    second = partial.take()
    partial.write(second, CONTENT[500:])
    assert not partial.follow()  # the front is still missing
    partial.write(first, CONTENT)  # more than the gap: the rest is another's
    while partial.follow():
        pass
    assert partial.digests() == {"sha256": FACTS.sha256}
    assert partial.path.read_bytes() == CONTENT and partial.joined
    partial.close()


OTHERS = {
    "another version": ({"ETag": '"2"'}, 200),
    "another size": ({"Content-Length": "999"}, 200),
    "another part": ({"Content-Range": "bytes 10-999/1000"}, 206),
    "compressed": ({"Content-Range": "bytes 0-999/1000", "Content-Encoding": "gzip"}, 206),
    "less than is here": ({"ETag": "", "Content-Range": "bytes 0-9/*", "X-Linked-Size": "9"}, 206),
}


@pytest.mark.parametrize("headers, status", OTHERS.values(), ids=OTHERS.keys())
def test_what_does_not_go_with_what_is_here_is_not_begun(tmp_path, headers, status):
    partial, gap = begin(tmp_path, head('"1"'))
    if "X-Linked-Size" in headers:  # nothing was said of the size, and ten bytes came
        partial, gap = begin(tmp_path, head("", {"Content-Length": ""}), FileFacts())
        partial.write(gap, CONTENT[:10])
        headers = headers | {"Content-Range": "bytes 10-19/*"}
    with pytest.raises(Stale):
        partial.begin(gap, head('"1"', headers, status))
    partial.close()


def test_whoever_comes_late_writes_nothing(tmp_path):
    partial, gap = begin(tmp_path)
    partial.write(gap, CONTENT[:10])
    partial.restart()
    fresh = partial.take()
    partial.begin(fresh, head('"2"'))
    with pytest.raises(Stale):
        partial.write(gap, b"old version")
    assert partial.path.read_bytes() == b""
    partial.close()


def test_a_lock_keeps_another_process_out_until_it_is_given_back(tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom llamalab.files import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    settings = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    first = subprocess.Popen(command, text=True, **settings)
    assert first.stdout.readline() == "held\n"
    others = [subprocess.Popen(command, text=True, **settings) for _ in range(2)]
    for other in others:
        assert "waiting" in other.stderr.readline()
    first.kill()  # a killed process holds no lock
    first.communicate()
    deadline = time.monotonic() + 20
    while len(others) and time.monotonic() < deadline:
        for other in others:
            if os.path.exists(f"/proc/{other.pid}/fd/0"):
                other.stdin.close()
        others = [other for other in others if other.poll() is None]
        time.sleep(0.05)
    assert not others
    with locked(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock.partial"]
    assert list(tmp_path.iterdir()) == []


def test_without_locks_on_the_file_system_nobody_is_kept_out(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with open(tmp_path / "file", "w") as file:
        assert lock_now(file)
    with locked(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
