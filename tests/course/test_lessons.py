"""What notebooks use: missing things are made, large ones refused, false claims fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

import llamalab
from llamalab import catalog
from llamalab.checkpoints.output_directory import RECORD
from llamalab.errors import NotEnoughRoom, NotFound
from llamalab_course import lessons, measuring


def test_need_makes_what_is_missing_and_only_that(tmp_path):
    paths = lessons.need("chinese-alpaca-lab", "converted", models_dir=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama-lab", "llama-lab-hf"]
    assert (paths.converted / RECORD).is_file() and paths.model.name == "chinese-alpaca-lab"
    stamp = (paths.converted / "model.safetensors").stat().st_mtime_ns
    paths = lessons.need("chinese-alpaca-lab", "merged", "converted", models_dir=tmp_path)
    assert (paths.merged / RECORD).is_file()
    assert [p.name for p in paths.adapters] == ["chinese-alpaca-lora-lab"]
    assert (paths.converted / "model.safetensors").stat().st_mtime_ns == stamp


def test_need_mends_a_damaged_part_and_what_was_made_of_it(tmp_path):
    paths = lessons.need("chinese-llama-lab", "merged", models_dir=tmp_path)
    made = json.loads((paths.merged / RECORD).read_text())["tensor_digest"]
    weights = paths.adapters[0] / "adapter_model.safetensors"
    weights.write_bytes(b"<html>" + weights.read_bytes()[6:])
    (paths.merged / "model.safetensors").unlink()
    paths = lessons.need("chinese-llama-lab", "merged", models_dir=tmp_path)
    assert json.loads((paths.merged / RECORD).read_text())["tensor_digest"] == made
    assert (paths.merged / "model.safetensors").is_file()


def test_need_takes_what_the_reader_made_as_it_is(tmp_path):
    paths = lessons.need("chinese-llama-lab", "base", models_dir=tmp_path)
    llamalab.convert(paths.base, paths.converted, context_length=99)
    (paths.converted / "notes.txt").write_text("mine")
    lessons.need("chinese-llama-lab", "converted", models_dir=tmp_path)
    config = json.loads((paths.converted / "config.json").read_text())
    assert config["max_position_embeddings"] == 99
    assert (paths.converted / "notes.txt").exists()


def test_need_refuses_what_is_large_and_names_lesson_and_command(tmp_path):
    for what, words in (("base", "lesson 01"), ("merged", "llamalab download llama-7b")):
        with pytest.raises(NotEnoughRoom) as caught:
            lessons.need("chinese-alpaca-7b", what, models_dir=tmp_path)
        assert words in caught.value.fix
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotFound):
        lessons.need("chinese-alpaca-7c")


def test_checks_fail_when_the_claim_is_false(capsys):
    lessons.expect_true("two is two", 1 + 1 == 2, "by counting")
    assert capsys.readouterr().out == "[OK]   two is two (by counting)\n"
    with pytest.raises(lessons.CheckFailed, match=r"\[FAIL\] three"):
        lessons.expect_true("three is two", False)


def test_only_what_the_catalogue_claims_is_expected(capsys):
    base = catalog.model("llama-lab").base
    entry = catalog.ModelEntry("m", base, (), {"exact": 0.8, "share_at_most": 0.05})
    lessons.expect(entry, "exact", 0.8)
    lessons.expect(entry, "share_at_most", 0.05)
    lessons.expect(entry, "unheard_of", 0.0)
    assert "not claimed for this model" in capsys.readouterr().out
    with pytest.raises(lessons.CheckFailed, match="at least 0.8"):
        lessons.expect(entry, "exact", 0.79)
    with pytest.raises(lessons.CheckFailed, match="at most 0.05"):
        lessons.expect(entry, "share_at_most", 0.06)


def test_chinese_is_drawn_without_boxes(tmp_path, recwarn):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    measuring.use_chinese_font()
    figure = pyplot.figure()
    figure.text(0, 0, "苹果是植物吗 索尼最新的耳机 Apple −1")
    figure.savefig(tmp_path / "plot.png")
    pyplot.close(figure)
    assert not [w for w in recwarn if "missing from" in str(w.message)]


def test_memory_is_watched():
    with measuring.MemoryWatch() as memory:
        taken = bytearray(b"x") * 80_000_000
        time.sleep(0.3)
        del taken
    assert memory.grown > 60e6
    with measuring.MemoryWatch() as memory:
        pass
    assert memory.grown < 60e6


def test_notebooks_that_run_at_once_make_a_model_once(tmp_path):
    code = "from llamalab_course.lessons import need; need('chinese-alpaca-lab', 'converted', 'merged')"
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code],
            env=os.environ | {"LLAMALAB_MODELS_DIR": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert not list(tmp_path.glob(".*"))
