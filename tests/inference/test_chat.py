"""Chat: turns and commands, and the real program in a pseudo-terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from llamalab.errors import OutputExists, UsageError
from llamalab.inference.chat import Chat
from llamalab.inference.loading import load
from llamalab.inference.sampling import Sampling

SETTINGS = {"template": "alpaca", "temperature": 0, "top_p": 0.9, "top_k": 40, "stop": []}
SETTINGS |= {"repetition_penalty": 1.1, "max_new_tokens": 30}
SAMPLING = Sampling(**SETTINGS)
SETTINGS |= {"seed": None}


@pytest.fixture(scope="module")
def model(lab):
    return load(lab / "chinese-alpaca-lab", device="cpu")


@pytest.fixture
def chat(model):
    return Chat(model, SAMPLING)


def test_a_turn_knows_the_turns_before_it(chat, model):
    first = chat.ask("苹果是植物吗")
    second = chat.ask("它是什么？")
    assert second.prompt.count("Below is an instruction") == 1
    assert second.prompt.count("### Instruction:") == 2
    alone = model.generate(
        "它是什么？", history=[("苹果是植物吗", first.text.strip())], **SETTINGS | {"seed": 0}
    )
    assert second.answer_ids == alone.answer_ids
    assert "苹果" in second.text
    chat.command("/clear")
    assert chat.ask("它是什么？").prompt.count("### Instruction:") == 1


def test_the_llama_family_answers_each_prompt_alone(lab):
    chat = Chat(load(lab / "chinese-llama-lab", device="cpu"), replace(SAMPLING, template="none"))
    chat.ask("苹果是")
    assert chat.ask("它是").prompt == "它是" and not chat.has_turns


def test_the_oldest_turns_go_by_tokens(chat, model):
    for i in range(8):
        answer = chat.ask(f"第{i}个问题：苹果是植物吗")
        assert answer.prompt_tokens + SETTINGS["max_new_tokens"] <= model.context_length
        assert f"第{i}个问题" in answer.prompt
    assert len(chat.turns) < 8 and len(chat.said) == 8
    assert chat.turns[-1][0].startswith("第7个")


@pytest.mark.parametrize(
    "line, name, value",
    [
        ("/set temperature 0.7", "temperature", 0.7),
        ("/set top_k 3", "top_k", 3),
        ("/set seed 12", "seed", 12),
        ("/set seed None", "seed", None),
        ("/set stop 。", "stop", ["。"]),
        ("/set stop ['a', 'b']", "stop", ["a", "b"]),
        ("/set template none", "template", "none"),
    ],
)
def test_a_setting_is_changed(chat, line, name, value):
    chat.command(line)
    assert chat.settings == SETTINGS | {name: value}
    assert f"{name} {value}" in chat.command("/set")


@pytest.mark.parametrize(
    "line",
    ["/set x 1", "/set temperature hot", "/set temperature -1", "/set top_k 0.5", "/set seed -1"]
    + ["/set template x", "/set top_p True", "/set max_new_tokens 0", "/frob", "/", "/save"]
    + ["/set temperature", "/save /no/such/directory/x.json"],
)
def test_a_wrong_command_changes_nothing(chat, line):
    with pytest.raises(UsageError):
        chat.command(line)
    assert chat.settings == SETTINGS


def test_a_conversation_is_saved_and_nothing_overwritten(chat, tmp_path):
    answer = chat.ask("苹果是植物吗")
    file = tmp_path / "talk.json"
    chat.command(f"/save {file}")
    held = json.loads(file.read_text(encoding="utf-8"))
    assert [(turn["prompt"], turn["answer"]) for turn in held] == [("苹果是植物吗", answer.text)]
    assert held[0]["settings"] == answer.settings and held[0]["seed"] == answer.seed
    with pytest.raises(OutputExists):
        chat.command(f"/save {file}")


class Terminal:
    """The program in a pseudo-terminal: what a person sees and types."""

    def __init__(self, *arguments):
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "llamalab",
                "generate",
                *map(str, arguments),
            ],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # its terminal
        )
        os.close(theirs)
        os.set_blocking(self.ours, False)
        self.seen = ""

    def type(self, text):
        os.write(self.ours, text.encode())

    def wait_for(self, pattern, seconds=90):
        """Return what came, up to and with the first match of `pattern`; it is then used up."""
        until = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < until, self.seen
            try:
                self.seen += os.read(self.ours, 65536).decode("utf-8", "replace")
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                raise AssertionError(f"It ended: {self.seen}") from None
        before, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return before

    def end(self):
        code = self.process.wait(timeout=60)
        os.close(self.ours)
        return code


@pytest.fixture
def terminal(request):
    made = []

    def start(*arguments):
        made.append(Terminal(*arguments))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


@pytest.mark.slow
def test_talking_in_a_terminal(lab, terminal, tmp_path):
    talk = terminal("--base-model", lab / "chinese-alpaca-lab", "--interactive")
    talk.wait_for(r"several turns.*\n")
    talk.wait_for("> ")
    talk.type("/set temperature 0\n")
    talk.wait_for("temperature 0\r\n> ")
    talk.type("苹果是香蕉\x7f\x7f植物吗\n")  # with two characters taken back
    assert "是的，苹果是植物。" in talk.wait_for(r"植物。\r\n> ")
    talk.type("它是什么？\n")
    assert "苹果" in talk.wait_for(r"\n> ").split("\n", 1)[1]
    talk.type("/nonsense\n")
    talk.wait_for("error: There is no command /nonsense")
    talk.type(f"/save {tmp_path}/talk.json\n")
    talk.wait_for("2 answers in")
    talk.type("\x03")  # at the prompt it leaves nothing
    talk.wait_for("Ctrl-D leaves")
    talk.type("\x04")
    assert talk.end() == 0
    held = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [turn["prompt"] for turn in held] == ["苹果是植物吗", "它是什么？"]


@pytest.mark.slow
def test_an_interrupt_stops_the_answer_and_not_the_program(lab, terminal):
    # The base rambles up to its context, a second or more, when it is told not to end.
    words = ("--max-new-tokens", "250", "--temperature", "5", "--top-k", "0", "--top-p", "1")
    talk = terminal("--base-model", lab / "llama-lab", "--interactive", *words, "--seed", "1")
    talk.wait_for("stands alone.*\n")
    for _ in range(5):  # one answer may be over before the interrupt comes
        talk.wait_for("> ")
        talk.type("The\n")
        talk.wait_for(r"The\r\n.")
        os.killpg(talk.process.pid, signal.SIGINT)
        if "(stopped)" in talk.wait_for(r"\(stopped\)|leaves\)"):
            break
    else:
        raise AssertionError("no answer was stopped")
    talk.wait_for("> ")
    talk.type("/quit\n")
    assert talk.end() == 0


def test_prompts_by_a_pipe_give_answers_alone(lab):
    words = ["--base-model", str(lab / "chinese-alpaca-lab"), "--interactive", "--temperature", "0"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "llamalab", "generate", *words],
        input="苹果是植物吗\n\n/help\n苹果是植物吗\n",
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "是的，苹果是植物。\n" * 2
    assert "/clear" in done.stderr
