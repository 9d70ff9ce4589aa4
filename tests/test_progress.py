"""Progress: a bar on a terminal, now and then a plain line in a log, nothing for short work."""

import contextlib
import os
import pty
import subprocess
import sys
import termios
import time

CODE = """
import sys, time
from llamalab import progress
progress.LOG_SECONDS = float(sys.argv[1])
with progress.bytes_bar(1000, "file") as bar:
    for _ in range(20):
        time.sleep(0.02)
        bar.update(50)
    progress.say("a word")
"""


def test_a_log_gets_whole_lines_now_and_then():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CODE, "0.1"], capture_output=True, text=True)
    took = time.monotonic() - began
    *lines, last = done.stderr.splitlines()
    assert last == "a word" and done.stdout == "" and "\r" not in done.stderr
    assert 1 <= len(lines) <= took / 0.1 and len(lines) < 20
    assert all(line.startswith("file:") and "B/s" in line for line in lines), lines


def test_short_work_says_nothing():
    done = subprocess.run([sys.executable, "-c", CODE, "30"], capture_output=True, text=True)
    assert done.stderr == "a word\n"


def test_a_terminal_gets_a_bar_that_goes_away():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen([sys.executable, "-c", CODE, "30"], stderr=theirs, stdout=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # that is how a terminal says that nobody is there
        while block := os.read(ours, 1000):
            shown += block
    process.wait(timeout=30)
    os.close(ours)
    assert b"file:" in shown and b"B/s" in shown and b"\ra word" in shown
    assert shown.endswith(b"\r")  # the bar was wiped
