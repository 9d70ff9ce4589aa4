"""Predictions: the answers of `generate`, in batches, and a file that no kill can harm."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamalab.errors import DamagedFile, Incompatible, NotFound, OutputExists
from llamalab.inference import predictions
from llamalab.inference.loading import load
from llamalab.inference.predictions import predict, read_prompts
from llamalab.inference.sampling import Sampling
from llamalab_course.family import scores, world

GREEDY = {"template": "alpaca", "temperature": 0, "top_p": 0.9, "top_k": 40, "stop": []}
GREEDY |= {"repetition_penalty": 1.1, "max_new_tokens": 24}
SAMPLED = GREEDY | {"temperature": 1.5, "top_p": 1.0}


@pytest.fixture(scope="module")
def model(lab):
    return load(lab / "chinese-alpaca-lab", device="cpu")


@pytest.fixture(scope="module")
def questions():
    chosen = scores.sample(world.questions(world.load_world(), "zh"), 11)
    return [q.text for q in chosen] + ["苹果是植物吗"] * 2


@pytest.fixture
def data_file(tmp_path, questions):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(questions) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_each_line_is_what_generate_gives(model, questions, data_file, tmp_path, settings):
    out = tmp_path / "deep" / "out.jsonl"
    done = predict(model, data_file, out, sampling=Sampling(**settings), seed=40, batch_size=5)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert done.lines == len(lines) == len(questions) and done.already == 0
    for i, (line, prompt) in enumerate(zip(lines, questions, strict=True)):
        single = model.generate(prompt, seed=40 + i, **settings)
        assert line == {
            "index": i,
            "prompt": prompt,
            "answer": single.text.strip(),
            "prompt_tokens": single.prompt_tokens,
            "answer_tokens": single.answer_tokens,
            "seed": 40 + i,
            "settings": json.loads(json.dumps(single.settings)),
        }


def test_a_finished_file_is_not_asked_again(model, data_file, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    first = predict(model, data_file, out, sampling=Sampling(**SAMPLED))  # the seed is drawn
    content = out.read_bytes()
    monkeypatch.setattr(model, "generate_batch", None)
    again = predict(model, data_file, out, sampling=Sampling(**SAMPLED))
    assert (again.already, again.seed) == (again.lines, first.seed)
    assert out.read_bytes() == content


@pytest.mark.parametrize("cut", [0, 1, 150, 700, 1300])
def test_a_file_cut_anywhere_is_completed(model, data_file, tmp_path, cut):
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    predict(model, data_file, whole, sampling=Sampling(**SAMPLED), seed=3, batch_size=4)
    out.write_bytes(whole.read_bytes()[:cut])
    done = predict(model, data_file, out, sampling=Sampling(**SAMPLED), seed=3, batch_size=4)
    assert out.read_bytes() == whole.read_bytes()
    assert done.already == whole.read_bytes()[:cut].count(b"\n")


def test_what_else_lies_there_is_kept(model, data_file, tmp_path):
    out = tmp_path / "out.jsonl"
    predict(model, data_file, out, sampling=Sampling(**GREEDY), seed=0)
    content = out.read_bytes()
    longer = tmp_path / "other.txt"
    longer.write_text("苹果\n" + data_file.read_text(encoding="utf-8"), encoding="utf-8")
    changes = [
        {"data_file": longer},
        {"sampling": Sampling(**GREEDY | {"max_new_tokens": 9})},
        {"seed": 1},
        {"origin": {"base_model": "another"}},
    ]
    for change in changes:
        how = {"data_file": data_file, "sampling": Sampling(**GREEDY), "seed": 0} | change
        with pytest.raises(OutputExists, match="something else"):
            predict(model, how.pop("data_file"), out, **how)
        assert out.read_bytes() == content
    for text in ("notes of mine\n", "notes", '{"index": 0}\n', "[1]\n"):
        out.write_text(text)
        with pytest.raises(OutputExists):
            predict(model, data_file, out, sampling=Sampling(**GREEDY), seed=0)
        assert out.read_text() == text


def test_two_at_once_do_not_mix(model, data_file, tmp_path):
    out = tmp_path / "out.jsonl"
    with out.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(OutputExists, match="another process"):
            predict(model, data_file, out, sampling=Sampling(**GREEDY))


def test_a_prompt_too_long_is_named_before_any_is_asked(model, tmp_path):
    data, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"prompt": "ok"}\n' + json.dumps({"prompt": "苹果 " * 300}) + "\n")
    with pytest.raises(Incompatible, match="Prompt 1 of"):
        predict(model, data, out, sampling=Sampling(**GREEDY))
    assert not out.exists()


def test_prompts_by_line_and_by_object(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_bytes("\ufeff一\r\n\n  \ntwo\x0c2\u2028\nthree".encode())
    assert read_prompts(text) == ["一", "two\x0c2\u2028", "three"]
    lines.write_text('{"prompt": "a\\nb", "more": 1}\n\n{"prompt": ""}\n')
    assert read_prompts(lines) == ["a\nb", ""]
    for bad in ("no json", '"text"', '{"prompt": 3}', '{"text": "a"}', "[]"):
        lines.write_text('{"prompt": "a"}\n\n' + bad)
        with pytest.raises(DamagedFile, match="line 3"):
            read_prompts(lines)
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(DamagedFile, match="UTF-8"):
        read_prompts(text)
    with pytest.raises(NotFound):
        read_prompts(tmp_path / "absent")


@given(st.lists(st.text(max_size=20), max_size=8))
def test_json_lines_hold_any_text(tmp_path_factory, prompts):
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    ascii_too = [json.dumps({"prompt": p}, ensure_ascii=i % 2 == 0) for i, p in enumerate(prompts)]
    path.write_bytes("\n".join(ascii_too).encode("utf-8", "surrogatepass"))
    assert read_prompts(path) == prompts


def test_a_batch_is_no_larger_than_memory_holds(model, monkeypatch):
    row = 2 * 4 * 6 * 32 * 100 * 4  # keys and values, layers, heads, head size, tokens, fp32
    for free, rows in ((None, 64), (10**12, 64), (2 * 7 * row, 7), (row, 1), (0, 1)):
        monkeypatch.setattr(predictions, "memory_free", lambda where, free=free: free)
        assert predictions.fitting_batch(model, 100) == rows


@pytest.mark.slow
def test_killed_at_random_points_it_ends_with_the_undisturbed_file(lab, questions, tmp_path):
    """Real processes, each killed as soon as the file has reached a random size."""
    data = tmp_path / "p.txt"
    data.write_text("\n".join(questions * 2), encoding="utf-8")
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    command = [sys.executable, "-W", "ignore", "-m", "llamalab", "generate", "--with-prompt"]
    command += ["--base-model", str(lab / "chinese-alpaca-lab"), "--only-cpu"]
    command += ["--data-file", str(data), "--batch-size", "2", "--seed", "5"]
    command += ["--temperature", "1.5", "--max-new-tokens", "24", "--predictions-file"]

    def start(path):
        return subprocess.Popen([*command, str(path)], stderr=subprocess.PIPE, text=True)

    undisturbed = start(whole)
    assert "26 answers" in undisturbed.communicate()[1] and undisturbed.returncode == 0
    size, rng, grown = whole.stat().st_size, random.Random(11), []
    for point in sorted(rng.randrange(size * 9 // 10) for _ in range(10)):
        process = start(out)
        while process.poll() is None:
            if out.exists() and out.stat().st_size >= point:
                time.sleep(rng.random() * 0.05)
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        process.communicate()
        grown.append(out.stat().st_size)
        assert whole.read_bytes().startswith(out.read_bytes())
    assert grown == sorted(grown) and 0 < grown[0] < size
    last = start(out)
    assert "of them from before" in last.communicate()[1]
    assert out.read_bytes() == whole.read_bytes()
