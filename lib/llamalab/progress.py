"""Progress of long work: a widget in a notebook, a line on a terminal, now and then one in a log."""

import sys
import warnings

from tqdm import tqdm as terminal_bar

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tqdm calls its choice between the two experimental
    from tqdm.autonotebook import tqdm as fitting_bar
LOG_SECONDS = 30.0  # between two lines of a log


class _LogBar(terminal_bar):
    """Whole lines without carriage returns, none for what is done within `LOG_SECONDS`."""

    @staticmethod
    def status_printer(file):
        return lambda text: print(text, file=file, flush=True)

    def close(self) -> None:
        """End without a last line: what was done is said by whoever did it."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


def bytes_bar(total: int | None, description: str) -> terminal_bar:
    """Return a bar of bytes, rate and time left; a context manager with `update(count)`."""
    return bar(total, description, unit="B", unit_scale=True)


def bar(total: int | None, description: str, **more) -> terminal_bar:
    """Return a bar of anything that is counted; `more` are tqdm's settings."""
    settings = {"total": total, "desc": description, **more}
    if fitting_bar is not terminal_bar:
        return fitting_bar(**settings)
    if sys.stderr.isatty():
        return terminal_bar(**settings, leave=False)
    wait = {"mininterval": LOG_SECONDS, "delay": LOG_SECONDS, "miniters": 1}
    return _LogBar(**settings, **wait, bar_format="{l_bar}{r_bar}")


def say(text: str) -> None:
    """Tell a person something beside the bar: under the cell, or on standard error."""
    if fitting_bar is not terminal_bar:
        print(text)
    elif sys.stderr.isatty():
        terminal_bar.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)
