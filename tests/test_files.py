"""Files that appear whole or not at all, and room on the disk."""

from __future__ import annotations

import errno
import os

import pytest

from llamalab.errors import NotEnoughRoom
from llamalab.files import disk_free, full_disk_named, require_room, write_whole


def test_a_file_holds_the_old_or_the_new(tmp_path, monkeypatch):
    file = tmp_path / "record.json"
    write_whole(file, "old")
    write_whole(file, b"new")
    assert file.read_bytes() == b"new"
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
            patch.setattr(os, step, lambda *_: (_ for _ in ()).throw(OSError("full")))
            write_whole(file, "newer")
        assert file.read_bytes() == b"new" and os.listdir(tmp_path) == ["record.json"]


def test_halves_of_characters_become_escapes(tmp_path):
    write_whole(tmp_path / "t", "苹果 \ud83d")
    assert (tmp_path / "t").read_text("utf-8") == "苹果 \\ud83d"


def test_room_is_asked_for_where_the_directory_will_be(tmp_path):
    there = tmp_path / "not" / "yet"
    assert require_room(there, 1) == disk_free(there) > 0
    with pytest.raises(NotEnoughRoom, match="are needed at .*yet") as error:
        require_room(there, 10**18, "why", "fix")
    assert (error.value.why, error.value.fix) == ("why", "fix") and not there.exists()


def test_only_a_full_disk_is_named(tmp_path):
    with pytest.raises(NotEnoughRoom, match="disk is full"), full_disk_named(tmp_path, "", ""):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), full_disk_named(tmp_path, "", ""):
        raise PermissionError(errno.EACCES, "Permission denied")
