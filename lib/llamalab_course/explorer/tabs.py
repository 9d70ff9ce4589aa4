"""The explorer's three tabs: ask in columns, talk, look at what was answered before."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import ipywidgets as widgets

from llamalab import catalog
from llamalab.inference import TEMPLATES, settings, template_mistake
from llamalab.units import size_text

from .answer_history import AnswerHistory
from .requests import PromptRequest, Result, as_text
from .session import Listener
from .widgets import LEGEND, Tokens, escaped, html_box, marked, row, side_by_side, token_boxes

if TYPE_CHECKING:
    from .view import ExplorerView

EXAMPLES = {
    "苹果是植物吗": "Is an apple a plant? Look for: the language of the answer, base against merged.",
    "索尼最新的耳机": "Sony's newest headphones. Look for: does the model know, or admit it?",
    "An apple is": "Look for: several good endings; click a pale token and take another one.",
    "月亮是什么？": "What is the moon? Look for: the same question with and without the template.",
}
"""Questions to begin with, each with the thing to look for."""


def _with_base(first: PromptRequest, names: Sequence[str]) -> list[PromptRequest]:
    entry = catalog.model(first.model)
    if entry.base.name not in names or not entry.adapters:
        raise ValueError("choose a merged model first, whose converted base is on disk")
    return [first, replace(first, model=entry.base.name)]


def _with_other_template(first: PromptRequest, names: Sequence[str]) -> list[PromptRequest]:
    return [first, replace(first, template="alpaca" if first.template == "none" else "none")]


def _with_other_models(first: PromptRequest, names: Sequence[str]) -> list[PromptRequest]:
    return [first, *(replace(first, model=name) for name in names if name != first.model)]


COMPARISONS = {
    "one answer": lambda first, names: [first],
    "base against merged": _with_base,
    "temperature 0 against 1": lambda first, names: [
        replace(first, temperature=degrees) for degrees in (0.0, 1.0)
    ],
    "with and without the template": _with_other_template,
    "every model on disk": _with_other_models,
}
"""What can be compared: from the first column's request and the models on disk, all requests."""

ENDINGS = {"json": ".json", "markdown": ".md", "yaml": ".yaml"}
REDRAW_SECONDS = 0.05  # the page need not hear of every token
WIDE = {"width": "95%"}


def set_controls(controls: dict[str, widgets.Widget], request: PromptRequest) -> None:
    """Set each control to the value of the request's field that it is named by."""
    for name, control in controls.items():
        control.value = getattr(request, name)


def slider(name: str) -> widgets.Widget:
    """Return a slider over what a setting usually is."""
    control = widgets.interactive.widget_from_tuple(settings()[name].usual)
    control.description = name.replace("_", " ").capitalize()
    control.style.description_width = "initial"
    return control


class Column:
    """One answer: what differs from the other columns, and what came of it."""

    def __init__(self, view: ExplorerView, request: PromptRequest):
        self.view = view
        self.controls = {
            "model": widgets.Dropdown(options=view.explorer.names(), description="Model"),
            "template": widgets.Dropdown(options=list(TEMPLATES), description="Template"),
            "temperature": slider("temperature"),
        }
        set_controls(self.controls, request)
        self.note, self.answer, self.facts = html_box(), html_box(), html_box()
        self.tokens = Tokens()
        self.result: Result | None = None
        parts = [*self.controls.values(), self.note, self.answer, self.tokens, self.facts]
        self.box = widgets.VBox(parts)
        self.box.add_class("llamalab-column")

    def begin(self) -> None:
        self.result, self.text, self.drawn = None, "", 0.0
        self.answer.value, self.facts.value, self.tokens.tokens = "", "waiting …", []

    def grow(self, text: str) -> None:
        self.text += text
        if time.monotonic() - self.drawn > REDRAW_SECONDS:
            self._draw()

    def finish(self, result: Result) -> None:
        self.result, self.text = result, result.text
        self._draw()
        self.tokens.show(result)
        self.facts.value = (
            f"{len(result.ids)} tokens{', stopped' if result.stopped else ''}, "
            f"{result.tokens_per_second:.0f} tokens/s, {size_text(result.memory)} of memory"
        )

    def fail(self, error: Exception) -> None:
        self.facts.value = "no answer"
        self.view.show_error(error)

    def _draw(self) -> None:
        self.drawn = time.monotonic()
        self.answer.value = f"<pre>{escaped(self.text)}</pre>"
        self.facts.value = "answering …"


class AskTab:
    """One prompt, in one column or in several that differ in one thing.

    Attributes:
        controls: what all columns have in common, by the names of a request's fields.
    """

    def __init__(self, view: ExplorerView, request: PromptRequest):
        self.view, self.explorer = view, view.explorer
        examples = [("an example …", "")] + [(f"{q}  ({n})", q) for q, n in EXAMPLES.items()]
        self.example = widgets.Dropdown(options=examples, description="Example", layout=WIDE)
        self.compare = widgets.Dropdown(options=list(COMPARISONS), description="Compare")
        self.controls = {
            "prompt": widgets.Textarea(description="Prompt", layout=WIDE),
            **{name: slider(name) for name in settings() if name != "temperature"},
            "seed": widgets.BoundedIntText(min=0, max=2**31 - 1, description="Seed"),
        }
        set_controls(self.controls, request)
        self.hint, self.seen, self.differences = html_box(), html_box(), html_box()
        self.columns_box = row([])
        self.box = self._laid_out()
        self._set_columns([], [request])
        view.on_change(self.example, self.take_example)
        view.on_change(self.controls["prompt"], self.look)
        view.on_change(self.compare, self.set_comparison)
        view.guarded(self.look)()

    def _laid_out(self) -> widgets.VBox:
        prompt, *sliders, seed = self.controls.values()
        button = self.view.button
        self.buttons = [
            button("Generate", self.ask, button_style="primary", icon="play", tooltip="Ctrl+Enter"),
            button("Stop", self.explorer.stop, icon="stop", tooltip="Esc"),
            button("Again, same seed", self.ask),
            button("Roll", self.ask_anew, tooltip="Another seed"),
        ]
        tokens = widgets.HTML(f"Tokens: {LEGEND}. Click one for its alternatives.")
        top = [self.example, self.hint, prompt, self.compare, row(sliders)]
        seen = widgets.Accordion([self.seen], titles=["What the model sees: text and tokens"])
        columns = [self.columns_box, self.differences, seen]
        return widgets.VBox([*top, row([*self.buttons, seed]), tokens, *columns])

    def _set_columns(self, kept: list[Column], requests: Sequence[PromptRequest]) -> None:
        """Keep some columns, and put one behind them for each request."""
        for column in (added := [Column(self.view, request) for request in requests]):
            branch = self.view.guarded(lambda _, message, __, at=column: self.branch(at, message))
            column.tokens.on_msg(branch)
            for name in ("model", "template"):
                self.view.on_change(column.controls[name], self.look)
        self.columns = kept + added
        self.columns_box.children = [column.box for column in self.columns]

    def request(self, column: Column) -> PromptRequest:
        """Return what the controls ask of `column`."""
        controls = self.controls | column.controls
        values = {name: control.value for name, control in controls.items()}
        return PromptRequest(**values | {"temperature": round(values["temperature"], 2)})

    def take_example(self) -> None:
        if self.example.value:
            self.controls["prompt"].value = self.example.value
            self.hint.value = f"<div class='llamalab-note'>{EXAMPLES[self.example.value]}</div>"

    def look(self) -> None:
        """Show the exact text and its tokens, and say where a template does not fit."""
        parts = []
        for column in self.columns:
            request = self.request(column)
            family = catalog.model(request.model).family or "llama"
            mistake = template_mistake(family, request.template)
            column.note.value = f"<div class='llamalab-note'>Note: {mistake}</div>" * bool(mistake)
            tokens = self.explorer.tokens(request)
            text = escaped(self.explorer.text_for(request)[:20_000])
            parts.append(
                f"<b>{request.model}</b>, {len(tokens)} tokens (▁ a space, dashed: one byte, "
                f"bold: BOS)<pre>{text}</pre><div>{token_boxes(tokens)}</div>"
            )
        self.seen.value = "<hr>".join(parts)

    def set_comparison(self) -> None:
        """Set up the columns of the chosen comparison from the first one."""
        first, names = self.request(self.columns[0]), self.explorer.names()
        requests = COMPARISONS[self.compare.value](first, names)
        set_controls(self.columns[0].controls, requests[0])
        self._set_columns(self.columns[:1], requests[1:])
        self.look()

    def ask(self) -> None:
        self.answer(self.columns, [self.request(column) for column in self.columns])

    def ask_anew(self) -> None:
        self.controls["seed"].value = random.randrange(2**31)
        self.ask()

    def ask_again(self, request: PromptRequest) -> None:
        """Answer `request` in one column, all its settings in the controls."""
        self.compare.value = "one answer"
        set_controls(self.controls | self.columns[0].controls, request)
        self.answer(self.columns[:1], [request])

    def branch(self, column: Column, message: dict) -> None:
        if column.result:
            self.answer([column], [column.result.branch(message["place"], message["id"])])

    def answer(self, columns: Sequence[Column], requests: Sequence[PromptRequest]) -> None:
        """Answer into `columns`; what was being answered is stopped and replaced."""
        self.differences.value = ""
        flight = []
        for column, request in zip(columns, requests, strict=True):
            column.begin()
            flight.append((request, Listener(column.grow, column.finish, column.fail)))

        def ended() -> None:
            for column in columns:
                if column.facts.value == "waiting …":
                    column.facts.value = "not begun"
            results = [column.result for column in self.columns if column.result]
            if len(results) > 1:
                legend = f"Differences from the first answer are {marked('like this')}:"
                self.differences.value = legend + side_by_side(results)

        self.view.start(flight, ended)


class ChatTab:
    """A conversation with a model of the alpaca family, with the settings of `AskTab`."""

    def __init__(self, view: ExplorerView):
        self.view = view
        names = [n for n in view.explorer.names() if catalog.model(n).family == "alpaca"]
        self.model = widgets.Dropdown(options=names, description="Model")
        self.transcript = html_box()
        self.message = widgets.Textarea(description="You", layout=WIDE)
        buttons = [
            view.button("Send", self.say, button_style="primary"),
            view.button("Stop", view.explorer.stop),
            view.button("New conversation", self.forget),
        ]
        note = widgets.HTML("Temperature and the other settings are those of “Ask”.")
        parts = [self.model, self.transcript, self.message, widgets.HBox(buttons), note]
        self.box = widgets.VBox(parts)
        self.turns: list[tuple[str, str]] = []

    def forget(self) -> None:
        self.view.drop_flight()
        self.turns, self.transcript.value = [], ""

    def _show(self, turns: Sequence[tuple[str, str]]) -> None:
        self.transcript.value = "".join(
            f"<pre><b>You:</b> {escaped(question)}</pre><pre><b>Model:</b> {escaped(answer)}</pre>"
            for question, answer in turns
        )

    def say(self) -> None:
        """Send the message, after as many of the earlier turns as the context holds."""
        name, question = self.model.value, self.message.value
        if name is None:
            raise ValueError("no model of the alpaca family is on disk; lesson 03 makes one")
        if not question.strip():
            raise ValueError("write a message first")
        self.message.value = ""
        ask, template = self.view.ask, catalog.model(name).template
        request = replace(ask.request(ask.columns[0]), model=name, template=template)
        request = replace(request, prompt=question, turns=tuple(self.turns))
        pieces = []

        def grow(text: str) -> None:
            pieces.append(text)
            self._show([*self.turns, (question, "".join(pieces))])

        def finish(result: Result) -> None:
            self.turns.append((question, result.text))
            self._show(self.turns)

        self._show([*self.turns, (question, "")])
        # How many turns fit is found in the flight's thread: it takes the model, loaded.
        fitted = partial(self.view.explorer.fitted, request)
        self.view.start([(fitted, Listener(grow, finish, self.view.show_error))])


class HistoryTab:
    """The results that were kept: to be answered again, compared, starred, exported."""

    def __init__(self, view: ExplorerView):
        self.view, self.history = view, view.explorer.history
        self.runs = widgets.SelectMultiple(layout=WIDE | {"height": "14em"}, description="Runs")
        self.form = widgets.Dropdown(options=list(ENDINGS), description="Export as")
        self.shown = html_box()
        buttons = [
            view.button("Run again", self.run_again),
            view.button("Compare", self.compare),
            view.button("Star", lambda: self._change(AnswerHistory.star)),
            view.button("Delete", lambda: self._change(AnswerHistory.delete)),
            self.form,
            view.button("Export", self.export),
        ]
        self.box = widgets.VBox([self.runs, row(buttons), self.shown])
        view.guarded(self.refresh)()

    def refresh(self) -> None:
        """List what is kept now, the newest first."""
        chosen = self.runs.value
        results = self._kept()[::-1]
        self.runs.options = [(_line(result), result.id) for result in results]
        self.runs.value = [value for value in chosen if value in {r.id for r in results}]

    def _kept(self) -> list[Result]:
        return self.history.read() if self.history else []

    def chosen(self) -> list[Result]:
        """Return the chosen results.

        Raises:
            ValueError: none is chosen.
        """
        results = [r for r in self._kept() if r.id in self.runs.value]
        if not results:
            raise ValueError("choose a run in the list first")
        return results

    def run_again(self) -> None:
        request = self.chosen()[-1].again()
        self.view.tabs.selected_index = 0
        self.view.ask.ask_again(request)

    def compare(self) -> None:
        self.shown.value = side_by_side(self.chosen())

    def _change(self, change: Callable[[AnswerHistory, list[str]], None]) -> None:
        change(self.history, [result.id for result in self.chosen()])
        self.refresh()

    def export(self) -> None:
        """Write the chosen runs beside the history, each to a file, and show them."""
        parts = []
        for result in self.chosen():
            text = as_text(result, self.form.value)
            path = self.history.path.with_name(f"answer-{result.id}{ENDINGS[self.form.value]}")
            path.write_bytes(text.encode("utf-8", "replace"))
            parts.append(f"<b>{escaped(str(path))}</b><pre>{escaped(text)}</pre>")
        self.shown.value = "".join(parts)


def _line(result: Result) -> str:
    """Return a result as a line of the list."""
    star, request = "★" if result.starred else "–", result.request
    prompt, text = (" ".join(t.split())[:40] for t in (request.prompt, result.text))
    return (
        f"{star} {result.made[:19]} {request.model} T {request.temperature:g} "
        f"seed {request.seed}: {prompt} → {text}"
    )
