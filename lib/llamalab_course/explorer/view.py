"""The prompt explorer as a tool: `Explorer`, seen through ipywidgets.

What ipywidgets cannot do, clicks on tokens and keys, is done by two small widgets of our own.
Tested in JupyterLab 4 and, as a page, in Voilà.
"""

from collections.abc import Callable

import ipywidgets as widgets

from llamalab.errors import LabError

from .requests import PromptRequest
from .session import Explorer, Flight, Listener
from .tabs import AskTab, ChatTab, HistoryTab
from .widgets import Keys, escaped, html_box


class ExplorerView:
    """The tool: show `box`. Holds the three tabs, and what they share.

    Args:
        explorer: what answers.
        request: what the controls begin with.

    Attributes:
        error: where whatever goes wrong in the tool is said; empty while nothing has.
    """

    def __init__(self, explorer: Explorer, request: PromptRequest):
        self.explorer = explorer
        self.error = html_box()
        self._flight: Flight | None = None
        self.ask = AskTab(self, request)
        self.chat = ChatTab(self)
        self.history = HistoryTab(self)
        boxes = [self.ask.box, self.chat.box, self.history.box]
        self.tabs = widgets.Tab(boxes, titles=["Ask", "Chat", "History"])
        keys = Keys()
        keys.on_msg(self.guarded(lambda _, message, __: self.press(message["key"])))
        self.box = widgets.VBox([keys, self.error, self.tabs])
        self.box.add_class("llamalab-explorer")

    def guarded(self, call: Callable) -> Callable:
        """Return `call` with its errors shown in the tool: in a callback nobody else would."""

        def guard(*arguments):
            try:
                call(*arguments)
            except Exception as error:
                self.show_error(error)

        return guard

    def show_error(self, error: Exception) -> None:
        kind = "" if isinstance(error, LabError) else f"{type(error).__name__}: "
        text = escaped(kind + str(error).replace("\n", " "))
        self.error.value = f"<div role='alert' class='llamalab-error'>Error: {text}</div>"

    def button(self, text: str, call: Callable[[], None], **more) -> widgets.Button:
        button = widgets.Button(description=text, **more)
        button.on_click(self.guarded(lambda _: call()))
        return button

    def on_change(self, control: widgets.Widget, call: Callable[[], None]) -> None:
        control.observe(self.guarded(lambda _: call()), "value")

    def press(self, key: str) -> None:
        """Do what a key asks for: "stop", or "generate" in the tab that is open."""
        if key == "stop":
            self.explorer.stop()
        elif self.tabs.selected_index == 1:
            self.chat.say()
        else:
            self.ask.ask()

    def start(self, flight: Flight, end: Callable[[], None] = lambda: None) -> None:
        """Start a flight; what an earlier one still has to tell is not heard."""
        self.error.value = ""
        self._flight = flight

        def heard(call: Callable) -> Callable:
            return lambda *arguments: self._flight is flight and self.guarded(call)(*arguments)

        def ended() -> None:
            self.guarded(end)()
            self.history.refresh()

        heard_flight = [(asked, Listener(*map(heard, listener))) for asked, listener in flight]
        self.explorer.start(heard_flight, heard(ended))

    def drop_flight(self) -> None:
        """Stop what is being answered, and hear nothing more of it."""
        self._flight = None
        self.explorer.stop()
