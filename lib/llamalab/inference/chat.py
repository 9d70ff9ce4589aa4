"""Chat: a conversation with a model in a terminal.

The llama family continues text: each prompt stands alone. The alpaca family is told the header of
its template once, then a turn at a time; the oldest turns go when the context, counted in tokens,
would not hold them.
"""

import ast
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from ..errors import LabError, OutputExists, UsageError
from .model import Answer, Model
from .sampling import Sampling, check_seed
from .templates import Turn

HELP = """\
/help               this list
/clear              forget the conversation
/set                list the settings
/set NAME VALUE     change one, as in /set temperature 0
/save FILE          write the conversation to a new JSON file
/quit, or Ctrl-D    leave
Ctrl-C              stop the answer, or clear the line"""


class Chat:
    """A conversation: what was said, and the settings for what comes next.

    Attributes:
        sampling: the settings of the next answer.
        seed: of the next answer; None for another each time.
        turns: (instruction, answer), of the template that is in use; none without one.
        said: every answer since the beginning or the last /clear.
    """

    def __init__(self, model: Model, sampling: Sampling, seed: int | None = None):
        self.model, self.sampling, self.seed = model, sampling, seed
        self.turns: list[Turn] = []
        self.said: list[tuple[str, Answer]] = []

    @property
    def settings(self) -> dict:
        """What /set lists and changes."""
        return self.sampling.as_dict() | {"seed": self.seed}

    @property
    def has_turns(self) -> bool:
        return self.sampling.template != "none" and self.model.family != "llama"

    def ask(
        self,
        prompt: str,
        on_text: Callable[[str], None] | None = None,
        stop_when: Callable[[], bool] | None = None,
    ) -> Answer:
        """Answer `prompt` with what was said before it, as far as the context holds that."""
        room = min(self.sampling.max_new_tokens, self.model.context_length // 2)
        history = self.turns if self.has_turns else []
        history = self.model.fitting_history(prompt, self.sampling.template, history, room)
        answer = self.model.generate(
            prompt, history=history, on_text=on_text, stop_when=stop_when, **self.settings
        )
        if self.has_turns:
            self.turns = [*history, (prompt, answer.text.strip())]
        self.said.append((prompt, answer))
        return answer

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash; return what to tell.

        Raises:
            LabError: no such command, or it cannot be done; nothing has changed.
            EOFError: the conversation is over.
        """
        name, _, rest = line.strip().partition(" ")
        if name == "/help":
            return HELP
        if name == "/clear":
            self.turns, self.said = [], []
            return "Forgotten."
        if name == "/set":
            return self._set(*rest.split(maxsplit=1))
        if name == "/save":
            return self._save(rest.strip())
        if name == "/quit":
            raise EOFError
        raise UsageError(f"There is no command {name}.", "", "/help lists them.")

    def _set(self, name: str = "", text: str = "") -> str:
        if not name:
            return "\n".join(f"{key} {value}" for key, value in self.settings.items())
        if name not in self.settings:
            names = ", ".join(self.settings)
            raise UsageError(f"There is no setting '{name}'.", f"There are: {names}.")
        value: object = text
        if name != "template":
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                pass
        if name == "stop":
            value = [str(item) for item in (value if isinstance(value, list) else [value])]
        if name == "seed":
            if value is not None and type(value) is not int:
                raise UsageError(f"'{text}' is no value for seed, which is {self.seed}.")
            check_seed(value or 0)
            self.seed = value
        else:
            self.sampling = replace(self.sampling, **{name: value})
        if name == "template":
            self.turns = []
        return f"{name} {value}"

    def _save(self, file: str) -> str:
        if not file:
            raise UsageError("/save wants the name of a file.")
        answers = [
            {"prompt": prompt, "answer": answer.text, "seed": answer.seed}
            | {"settings": answer.settings}
            for prompt, answer in self.said
        ]
        try:
            with Path(file).expanduser().open("x", encoding="utf-8") as out:
                json.dump(answers, out, ensure_ascii=False, indent=1)
        except FileExistsError:
            raise OutputExists(f"{file} is there already.", "", "Name another file.") from None
        except OSError as error:
            raise UsageError(f"{file} cannot be written: {error.strerror}.") from None
        return f"{len(answers)} answers in {file}"


def talk(chat: Chat) -> None:
    """Read prompts from standard input until it ends; answers go to standard output.

    Everything else goes to standard error. Ctrl-C stops an answer, which is kept as it is.
    """
    with contextlib.suppress(ImportError):  # editing of lines, where the system has it
        import readline  # noqa: F401
    kind = "several turns" if chat.has_turns else "each prompt stands alone"
    _tell(f"{chat.sampling.template} template, {kind}. /help lists what else there is.")
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(prompt)
            if not line.strip():
                continue
            if line.startswith("/"):
                _tell(chat.command(line))
                continue
            with _stopped_by_interrupt() as stopped:
                answer = chat.ask(line, _say, stopped)
            _say("\n")
            if stopped():
                _tell("(stopped)")
            if chat.seed is None and answer.settings["temperature"] > 0:
                _tell(f"seed {answer.seed}")
        except EOFError:
            return
        except KeyboardInterrupt:
            _tell("\n(/quit or Ctrl-D leaves)")
        except LabError as error:
            _tell(f"error: {error}")


def _say(text: str) -> None:
    print(text, end="", flush=True)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _stopped_by_interrupt() -> Iterator[Callable[[], bool]]:
    stopped = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: stopped.set())
    try:
        yield stopped.is_set
    finally:
        signal.signal(signal.SIGINT, before)
