"""The command line in real processes: documented commands, exit codes, streams, bad input."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import pytest

from command_line import llamalab

pytestmark = pytest.mark.slow

COMMANDS = "check models download verify convert merge generate export run".split()


def test_the_whole_route_from_any_directory(tmp_path):
    """download, convert, merge by both routes, generate: as in the README, in Chinese at the end."""
    models = tmp_path / "models"

    def run(*arguments):
        return llamalab(*arguments, cwd=tmp_path, models=models, check=0)

    assert run("download", "chinese-alpaca-lab").stdout.splitlines() == [
        str(models / "llama-lab"),
        str(models / "chinese-alpaca-lora-lab"),
    ]
    report = json.loads(run("verify", "llama-lab", "--json").stdout)
    assert report["ok"] and {row["status"] for row in report["rows"]} == {"OK"}
    run("convert", "--input-dir", "llama-lab", "--output-dir", "models/llama-lab-hf")
    lora = ("--lora-model", "chinese-alpaca-lora-lab")
    run("merge", "--base-model", "llama-lab-hf", *lora, "--output-dir", "models/chinese-alpaca-lab")
    run("merge", "--base_model", "llama-lab", "--lora_model", lora[1], "--output_dir", "fused")
    names = ("model.safetensors", "config.json", "tokenizer.json")
    for name in names:
        steps = (models / "chinese-alpaca-lab" / name).read_bytes()
        assert (tmp_path / "fused" / name).read_bytes() == steps
    assert (
        "already made"
        in run("merge", "--base-model", "llama-lab", *lora, "--output-dir", "fused").stdout
    )
    run("verify", "fused", "--against", "models/chinese-alpaca-lab", "--json")
    prompt = ("--with-prompt", "--prompt", "苹果是植物吗", "--max-new-tokens", "60")
    merged = run("generate", "--base-model", "chinese-alpaca-lab", *prompt, "--temperature", "0")
    assert merged.stdout.count("\n") == 1 and merged.stdout.strip()
    unmerged = run(
        "generate", "--base-model", "llama-lab", *lora, *prompt, "--temperature", "0", "--only_cpu"
    )
    assert unmerged.stdout == merged.stdout
    from llamalab_course.family.scoring import cjk_share

    assert cjk_share(merged.stdout) == 1.0
    seeded = run("generate", "--base-model", "fused", *prompt)
    seed = seeded.stderr.split("seed ")[1].split()[0]
    assert run("generate", "--base-model", "fused", *prompt, "--seed", seed).stdout == seeded.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    text = llamalab(command, "--help", check=0).stdout
    assert text.startswith(f"usage: llamalab {command}")


def test_check_and_models_as_json():
    held = json.loads(llamalab("check", "--model", "chinese-alpaca-lab", "--json").stdout)
    assert {"OK", "INFO"} & {row["status"] for row in held["rows"]}
    held = json.loads(llamalab("models", "--json", check=0).stdout)
    names = {model["name"] for model in held["models"]}
    assert {"chinese-alpaca-lab", "chinese-alpaca-plus-7b"} <= names
    assert "chinese-alpaca-plus-7b" in llamalab("models", check=0).stdout


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        ((), 2, "COMMAND"),
        (("mergee",), 2, "mergee"),
        (("convert",), 2, "--input-dir"),
        (("convert", "--input", "x", "--output-dir", "y"), 2, "--input"),  # no abbreviations
        (
            ("convert", "--input-dir", "x", "--output-dir", "y", "--context-length", "0"),
            2,
            "above 0",
        ),
        (("download", "chinese-alpaca-lap"), 1, "Did you mean chinese-alpaca-lab"),
        (("download", "llama-7b"), 1, "source"),
        (("convert", "--input-dir", "nowhere/x", "--output-dir", "y"), 1, "no directory"),
        (("generate", "--base-model", "hfl/model", "--prompt", "x"), 2, "hf:hfl/model"),
        (
            ("generate", "--base-model", "chinese-alpaca-7b", "--prompt", "x"),
            1,
            "llamalab download",
        ),
        (("generate", "--base-model", "x", "--data-file", "y"), 2, "belong together"),
        (("generate", "--base-model", "x", "--prompt", "y", "--on", "ray"), 2, "--data-file"),
        (("check", "--model", "gpt-5"), 1, "no model called"),
        (("run", "04", "-p", "modle=x"), 2, "Did you mean model"),
        (("run", "04", "-p", "seed=many"), 2, "wants int"),
        (("run", "44"), 1, "no notebook"),
        (("run", "-p", "seed"), 2, "NAME=VALUE"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_and_wrong_names(tmp_path, arguments, code, words):
    done = llamalab(*arguments, cwd=tmp_path, check=code)
    assert words in done.stderr and not done.stdout
    assert list(tmp_path.iterdir()) == []


def test_errors_as_json(tmp_path):
    done = llamalab("verify", "nowhere", "--json", cwd=tmp_path, check=1)
    assert json.loads(done.stdout)["error"] == "NotFound" and not done.stderr


class Attack:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def damage_missing(base):
    (base / "7B" / "consolidated.00.pth").unlink()


def damage_html(base):
    (base / "7B" / "consolidated.00.pth").write_bytes(b"<!doctype html><html>Sign in</html>")


def damage_pickle(base):
    (base / "7B" / "consolidated.00.pth").write_bytes(pickle.dumps(Attack()))


def damage_tokenizer(base):
    (base / "tokenizer.model").unlink()


@pytest.mark.parametrize(
    "damage, words",
    [
        (damage_missing, "consolidated.00.pth"),
        (damage_html, "HTML page"),
        (damage_pickle, "pickle"),
        (damage_tokenizer, "tokenizer.model"),
    ],
)
def test_bad_files_one_message_exit_1_nothing_written(copied, tmp_path, damage, words):
    base = copied("base")
    damage(base)
    before = sorted(tmp_path.rglob("*"))
    done = llamalab("convert", "--input-dir", "base", "--output-dir", "out", cwd=tmp_path, check=1)
    assert words.lower() in done.stderr.lower()
    assert sorted(tmp_path.rglob("*")) == before


def test_wrong_layout_and_adapter_for_another_base(family, tmp_path):
    done = llamalab(
        "convert", "--input-dir", family / "base-hf", "--output-dir", "out", cwd=tmp_path, check=1
    )
    assert "HF layout already" in done.stderr
    lora = shutil.copytree(family / "llama-lora", tmp_path / "lora")
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    for base, adapter, words in (
        (family / "llama-lora", family / "llama-lora", "adapter, not a model"),
        (family / "base", lora, "use_dora"),
        (family / "base", family / "base", "no adapter_config.json"),
    ):
        arguments = ("--base-model", base, "--lora-model", adapter, "--output-dir", "out")
        done = llamalab("merge", *arguments, cwd=tmp_path, check=1)
        assert words in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora"]


def test_what_the_system_refuses_is_one_sentence(family, tmp_path):
    (tmp_path / "file").touch()
    arguments = ("convert", "--input-dir", family / "base", "--output-dir", "file/out")
    done = llamalab(*arguments, cwd=tmp_path, check=1)
    assert "refused" in done.stderr


def test_verify_finds_a_flipped_byte(copied, tmp_path):
    made = copied("base-hf")
    llamalab("verify", made, check=0)
    content = bytearray((made / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (made / "model.safetensors").write_bytes(content)
    assert "WRONG" in llamalab("verify", made, check=1).stdout


def test_interrupted_exits_130_and_says_how_to_go_on(family, tmp_path):
    script = (
        "import sys, time\nfrom llamalab.checkpoints import TensorFile\nfrom llamalab.cli import main\n"
        "def wait(*a):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "TensorFile.read = wait\nsys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, "convert", "--input-dir", str(family / "base")]
        + ["--output-dir", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "same command" in errors and "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_a_closed_pipe_is_no_traceback():
    command = f"'{sys.executable}' -m llamalab models | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr and done.stdout.startswith("model")


def test_importing_is_quick_and_converting_needs_no_transformers(family, tmp_path):
    script = (
        "import sys, llamalab\n"
        "assert not {'torch', 'transformers', 'IPython'} & set(sys.modules)\n"
        "llamalab.merge(*sys.argv[1:])\n"
        "assert 'transformers' not in sys.modules and 'peft' not in sys.modules"
    )
    arguments = [str(family / "base"), str(family / "llama-lora"), str(tmp_path / "out")]
    subprocess.run([sys.executable, "-c", script, *arguments], check=True, timeout=120)


def test_relative_paths_are_the_current_directorys(tmp_path):
    """A notebook resolves `models_dir` against the project; a shell's user means the directory."""
    done = llamalab("download", "llama-lab", "--models-dir", "here", cwd=tmp_path, check=0)
    assert done.stdout == f"{tmp_path / 'here' / 'llama-lab'}\n"
    shutil.copytree(tmp_path / "here" / "llama-lab", tmp_path / "copy")
    arguments = ["verify", "llama-lab", "--models-dir", "here", "--against", "copy"]
    assert "WRONG" not in llamalab(*arguments, cwd=tmp_path, check=0).stdout
    (tmp_path / "copy" / "lab" / "params.json").write_text("{}")
    assert llamalab(*arguments, cwd=tmp_path).returncode == 1
