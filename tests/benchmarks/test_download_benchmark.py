"""The benchmark of downloads runs, and says what it promises to say; how fast is not asserted."""

import json
import shutil
import subprocess
import sys

import pytest

from llamalab.catalog.models_dir import project_directory

pytestmark = pytest.mark.slow


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl on this machine")
def test_the_benchmark_runs():
    script = project_directory() / "benchmarks" / "download.py"
    command = [sys.executable, "-W", "ignore", str(script), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    held = json.loads(last)
    assert all(row["rate"] > 0 for row in held["rows"]) and len(held["rows"]) == 15
    assert {"throttled, ours / curl", "4 connections / 1", "verify / md5sum"} <= set(held["ratios"])
    assert all(any(name in line for line in table) for name in held["ratios"])
