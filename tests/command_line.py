"""The command line in a process of its own, as a user would run it."""

from __future__ import annotations

import os
import subprocess
import sys


def llamalab(*arguments, cwd=None, models=None, check=None):
    """Run one command as a user would; `check` is the exit code expected."""
    environment = os.environ | {"LLAMALAB_MODELS_DIR": str(models or cwd or "/nonexistent")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "llamalab", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if check is not None:
        assert done.returncode == check, done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b[" not in done.stdout + done.stderr  # colour only on a terminal
    return done
