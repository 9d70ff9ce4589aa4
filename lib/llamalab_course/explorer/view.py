"""The prompt explorer: a view of `exploring.Explorer` made of ipywidgets.

What ipywidgets cannot do, clicks on tokens and keys, is done by two small anywidgets whose
JavaScript stands below and fetches nothing. All that comes from a model or a person is escaped
here, or set as plain text there. Tested in JupyterLab 4 and, as a page, in Voilà.
"""

from __future__ import annotations

import html
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import ipywidgets as widgets

from llamalab import catalog
from llamalab.inference import TEMPLATES, template_mistake
from llamalab.units import size_text

from .requests import PromptRequest, Result, as_text, differences
from .session import Explorer, Listener, sentence
from .widgets import Keys, Tokens

EXAMPLES = {
    "苹果是植物吗": "Is an apple a plant? Look for: the language of the answer, base against merged.",
    "索尼最新的耳机": "Sony's newest headphones. Look for: does the model know, or admit it?",
    "An apple is": "Look for: several good endings; click a pale token and take another one.",
    "月亮是什么？": "What is the moon? Look for: the same question with and without the template.",
}
"""Questions to begin with, each with the thing to look for."""

COMPARISONS = [
    "one answer",
    "base against merged",
    "temperature 0 against 1",
    "with and without the template",
    "every model on disk",
]

BANDS = [(0.9, "sure"), (0.5, "likely"), (0.1, "unsure"), (0.0, "surprising")]
"""Least probability of each band; a band has a shade and a line of its own."""
FORMS = {"json": ".json", "markdown": ".md", "yaml": ".yaml"}

STYLE = """
.llamalab-explorer, .llamalab-explorer .widget-html-content, .llamalab-explorer pre {
  color: var(--jp-ui-font-color1, #222); line-height: 1.5 }
.llamalab-explorer.llamalab-explorer pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  font-family: inherit; background: none }
.llamalab-explorer .widget-textarea textarea { min-height: 5em }
.llamalab-column { border: 1px solid var(--jp-border-color1, #999); padding: 6px; flex: 1 1 20em;
  min-width: 0; overflow-wrap: anywhere }
.llamalab-error { color: #fff; background: #b00020; padding: 4px 8px; font-weight: bold }
.llamalab-note { border-left: 4px solid #888; padding-left: 8px }
.llamalab-byte { border: 1px dashed currentColor } .llamalab-control { font-weight: bold }
.llamalab-token { display: inline-block; margin: 1px 3px; padding: 0 3px;
  border: 1px solid var(--jp-border-color1, #999) }
.llamalab-token small { opacity: .75 }
.llamalab-answer { cursor: pointer; display: inline-block; white-space: pre-wrap;
  border-bottom: 2px none currentColor }
.llamalab-answer:focus { outline: 2px solid currentColor }
.sure { background: none }
.likely { background: rgba(60, 120, 216, .18); border-bottom-style: dotted }
.unsure { background: rgba(60, 120, 216, .36); border-bottom-style: dashed }
.surprising { background: rgba(60, 120, 216, .54); border-bottom: 4px double currentColor }
"""

MARK = "color: inherit; background: none; font-weight: bold; text-decoration: underline 2px"
"""The style of a difference: written where it is used, for reports have no style of ours."""


def escaped(text: str) -> str:
    """Return HTML that shows `text` as it is, control characters by their pictures."""
    pictures = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
    text = text.encode("utf-8", "replace").decode()
    return html.escape(text.translate(pictures))


def side_by_side(results: Sequence[Result]) -> str:
    """Return HTML, which needs no widgets: the answers beside each other, differences marked.

    A mark is bold and underlined: it differs from the first answer there; ‸ stands where
    something is missing.
    """
    cells = []
    for result in results:
        request = result.request
        text = "".join(
            f"<mark style='{MARK}'>{escaped(piece)}</mark>" if differs else escaped(piece)
            for piece, differs in differences(results[0].text, result.text)
        )
        title = f"{request.model}, template {request.template}, T {request.temperature:g}"
        cells.append(
            f"<td style='text-align: left; vertical-align: top; border: 1px solid'>"
            f"<b>{escaped(title)}</b><pre style='white-space: pre-wrap'>{text}</pre></td>"
        )
    return f"<table><tr>{''.join(cells)}</tr></table>"


def shown_tokens(result: Result) -> list[dict]:
    """Return what `Tokens` draws of an answer."""
    found = []
    for piece, (_, share, top) in zip(result.pieces, result.steps, strict=True):
        band = next(name for least, name in BANDS if share >= least)
        others = [{"id": i, "text": p.replace("▁", "␣"), "share": s} for i, p, s in top]
        text = piece.replace("▁", "␣")
        found.append({"text": text, "share": share, "band": band, "top": others})
    return found


def _html(**more) -> widgets.HTML:
    return widgets.HTML(layout=widgets.Layout(width="auto"), **more)


class Column:
    """One answer: what differs from the other columns, and what came of it."""

    def __init__(self, view: ExplorerView, request: PromptRequest):
        names = view.explorer.names()
        self.model = widgets.Dropdown(options=names, value=request.model, description="Model")
        self.template = widgets.Dropdown(
            options=list(TEMPLATES), value=request.template, description="Template"
        )
        self.temperature = widgets.FloatSlider(
            value=request.temperature, min=0, max=2, step=0.1, description="Temperature"
        )
        self.temperature.style.description_width = "initial"
        self.note, self.answer, self.facts = _html(), _html(), _html()
        self.tokens = Tokens()
        self.result: Result | None = None
        self.tokens.on_msg(view.guarded(lambda _, message, __: view.branch(self, message)))
        for control in (self.model, self.template):
            control.observe(view.guarded(lambda _: view.look()), "value")
        parts = [self.model, self.template, self.temperature, self.note]
        self.box = widgets.VBox([*parts, self.answer, self.tokens, self.facts])
        self.box.add_class("llamalab-column")

    def begin(self) -> None:
        self.result, self.text, self.shown = None, "", 0.0
        self.answer.value, self.facts.value, self.tokens.tokens = "", "waiting …", []

    def grow(self, text: str) -> None:
        self.text += text
        if time.monotonic() - self.shown > 0.05:  # the page need not be told of every token
            self.show_text()

    def show_text(self) -> None:
        self.shown = time.monotonic()
        self.answer.value = f"<pre>{escaped(self.text)}</pre>"
        self.facts.value = "answering …"

    def finish(self, result: Result) -> None:
        self.result, self.text = result, result.text
        self.show_text()
        self.tokens.tokens = shown_tokens(result)
        self.facts.value = (
            f"{len(result.ids)} tokens{', stopped' if result.stopped else ''}, "
            f"{result.tokens_per_second:.0f} tokens/s, {size_text(result.memory)} of memory"
        )


class ExplorerView:
    """The tool: show `box`.

    Args:
        explorer: what answers.
        request: what the controls begin with.
    """

    def __init__(self, explorer: Explorer, request: PromptRequest):
        self.explorer = explorer
        self.error = _html()
        self.columns_box = widgets.HBox(layout=widgets.Layout(flex_flow="row wrap"))
        self.columns: list[Column] = []
        self._flight: object = None
        self._make_controls(request)
        self._make_history()
        self._make_chat()
        self.columns = [Column(self, request)]
        self.columns_box.children = [self.columns[0].box]
        keys = Keys()
        keys.on_msg(self.guarded(lambda _, message, __: self.key(message)))
        one = widgets.VBox([self._top, self.columns_box, self.compared, self._seen])
        self.tabs = widgets.Tab([one, self._chat_box, self._history_box])
        self.tabs.titles = ("Ask", "Chat", "History")
        style = widgets.HTML(f"<style>{STYLE}</style>")
        self.box = widgets.VBox([style, keys, self.error, self.tabs])
        self.box.add_class("llamalab-explorer")
        self.guarded(self.look)()
        self.guarded(self.list_history)()

    def guarded(self, call: Callable) -> Callable:
        """Return `call` with its errors shown in the tool: in a callback nobody else would."""

        def guard(*arguments):
            try:
                call(*arguments)
            except Exception as error:
                self.show_error(error)

        return guard

    def show_error(self, error: Exception) -> None:
        text = escaped(sentence(error))
        self.error.value = f"<div role='alert' class='llamalab-error'>Error: {text}</div>"

    def _button(self, text: str, call: Callable[[], None], **more) -> widgets.Button:
        button = widgets.Button(description=text, **more)
        button.on_click(self.guarded(lambda _: call()))
        return button

    def _make_controls(self, request: PromptRequest) -> None:
        examples = [("an example …", "")] + [(f"{q}  ({n})", q) for q, n in EXAMPLES.items()]
        wide = widgets.Layout(width="95%")
        self.example = widgets.Dropdown(options=examples, description="Example", layout=wide)
        self.hint = _html()
        self.prompt = widgets.Textarea(value=request.prompt, description="Prompt", layout=wide)
        self.compare = widgets.Dropdown(options=COMPARISONS, description="Compare")
        self.sliders = {
            "top_p": widgets.FloatSlider(min=0.05, max=1, step=0.05, description="Top-p"),
            "top_k": widgets.IntSlider(min=0, max=200, description="Top-k"),
            "repetition_penalty": widgets.FloatSlider(
                min=1, max=2, step=0.05, description="Penalty"
            ),
            "max_new_tokens": widgets.IntSlider(min=1, max=1000, description="Max tokens"),
        }
        for name, slider in self.sliders.items():
            slider.value = getattr(request, name)
        self.seed = widgets.BoundedIntText(
            value=request.seed, min=0, max=2**31 - 1, description="Seed"
        )
        self.generate = self._button("Generate", self.ask, button_style="primary", icon="play")
        self.generate.tooltip = "Ctrl+Enter"
        self.stop = self._button("Stop", self.explorer.stop, icon="stop", tooltip="Esc")
        self.again = self._button("Again, same seed", self.ask)
        self.roll = self._button("Roll", self.ask_anew, tooltip="Another seed")
        self.seen, self.compared = _html(), _html()
        self._seen = widgets.Accordion([self.seen])
        self._seen.titles = ("What the model sees: text and tokens",)
        self.example.observe(self.guarded(lambda _: self.take_example()), "value")
        self.prompt.observe(self.guarded(lambda _: self.look()), "value")
        self.compare.observe(self.guarded(lambda _: self.lay_out()), "value")
        sliders = widgets.HBox(
            list(self.sliders.values()), layout=widgets.Layout(flex_flow="row wrap")
        )
        buttons = [self.generate, self.stop, self.again, self.roll, self.seed]
        row = widgets.HBox(buttons, layout=widgets.Layout(flex_flow="row wrap"))
        shades = " ".join(
            f"<span class='llamalab-answer {name}'>{name} (≥ {least:.0%})</span>"
            for least, name in BANDS
        )
        self._top = widgets.VBox(
            [self.example, self.hint, self.prompt, self.compare, sliders, row]
            + [widgets.HTML(f"Tokens: {shades}. Click one for its alternatives.")]
        )

    def request(self, column: Column) -> PromptRequest:
        """Return what the controls ask of `column`."""
        shared = {name: slider.value for name, slider in self.sliders.items()}
        return PromptRequest(
            column.model.value,
            self.prompt.value,
            column.template.value,
            round(column.temperature.value, 2),
            seed=self.seed.value,
            **shared,
        )

    def take_example(self) -> None:
        if self.example.value:
            self.prompt.value = self.example.value
            self.hint.value = f"<div class='llamalab-note'>{EXAMPLES[self.example.value]}</div>"

    def look(self) -> None:
        """Show the exact text and its tokens, and say where a template does not fit."""
        parts = []
        for column in self.columns:
            request = self.request(column)
            entry = catalog.model(request.model)
            mistake = template_mistake(entry.family or "llama", request.template)
            column.note.value = f"<div class='llamalab-note'>Note: {mistake}</div>" * bool(mistake)
            found = self.explorer.tokens(request)
            boxes = "".join(
                f"<span class='llamalab-token llamalab-{t.kind}'>{escaped(t.piece)} "
                f"<small>{t.id}</small></span>"
                for t in found[:1000]
            )
            more = f" … and {len(found) - 1000} more" if len(found) > 1000 else ""
            text = escaped(self.explorer.text_for(request)[:20_000])
            parts.append(
                f"<b>{request.model}</b>, {len(found)} tokens (▁ a space, dashed: one byte, "
                f"bold: BOS)<pre>{text}</pre><div>{boxes}{more}</div>"
            )
        self.seen.value = "<hr>".join(parts)

    def lay_out(self) -> None:
        """Set up the columns of the chosen comparison from the first one."""
        first, chosen = self.request(self.columns[0]), self.compare.value
        names, entry = self.explorer.names(), catalog.model(first.model)
        others = []
        if chosen == "base against merged":
            if entry.base.name not in names or not entry.adapters:
                raise ValueError("choose a merged model first, whose converted base is on disk")
            others = [replace(first, model=entry.base.name)]
        elif chosen == "temperature 0 against 1":
            self.columns[0].temperature.value = 0.0
            others = [replace(first, temperature=1.0)]
        elif chosen == "with and without the template":
            other = "alpaca" if first.template == "none" else "none"
            others = [replace(first, template=other)]
        elif chosen == "every model on disk":
            others = [replace(first, model=name) for name in names if name != first.model]
        self.columns = [self.columns[0]] + [Column(self, request) for request in others]
        self.columns_box.children = [column.box for column in self.columns]
        self.look()

    def ask(self) -> None:
        self.fly(self.columns, [self.request(column) for column in self.columns])

    def ask_anew(self) -> None:
        self.seed.value = random.randrange(2**31)
        self.ask()

    def branch(self, column: Column, message: dict) -> None:
        if column.result is None:
            return
        self.fly([column], [column.result.branch(int(message["place"]), int(message["id"]))])

    def key(self, message: dict) -> None:
        if message["key"] == "stop":
            self.explorer.stop()
        elif self.tabs.selected_index == 1:
            self.say()
        else:
            self.ask()

    def fly(self, columns: list[Column], requests: list[PromptRequest]) -> None:
        """Answer into `columns`; what was being answered is stopped and replaced."""
        self.error.value = self.compared.value = ""
        for column in columns:
            column.begin()

        def failed(place: int, error: Exception) -> None:
            columns[place].facts.value = "no answer"
            self.show_error(error)

        def ended() -> None:
            for column in columns:
                if column.facts.value == "waiting …":
                    column.facts.value = "not begun"
            results = [column.result for column in self.columns if column.result]
            if len(results) > 1:
                legend = (
                    f"Differences from the first answer are <mark style='{MARK}'>like this</mark>:"
                )
                self.compared.value = legend + side_by_side(results)
            self.guarded(self.list_history)()

        self.start(
            requests,
            lambda place, text: columns[place].grow(text),
            lambda place, result: columns[place].finish(result),
            failed,
            ended,
        )

    def start(self, requests: Sequence, *calls: Callable) -> None:
        """Start a flight; what an earlier one still has to tell is not heard."""
        flight = self._flight = object()

        def heard(call: Callable) -> Callable:
            return lambda *arguments: self._flight is flight and self.guarded(call)(*arguments)

        self.explorer.start(requests, Listener(*map(heard, calls)))

    # History

    def _make_history(self) -> None:
        wide = widgets.Layout(width="95%", height="14em")
        self.runs = widgets.SelectMultiple(layout=wide, description="Runs")
        self.form = widgets.Dropdown(options=list(FORMS), description="Export as")
        self.history_shows = _html()
        buttons = [
            self._button("Run again", self.run_again),
            self._button("Compare", self.compare_chosen),
            self._button("Star", self.star),
            self._button("Delete", self.delete),
            self.form,
            self._button("Export", self.export),
        ]
        row = widgets.HBox(buttons, layout=widgets.Layout(flex_flow="row wrap"))
        self._history_box = widgets.VBox([self.runs, row, self.history_shows])

    def list_history(self) -> None:
        if self.explorer.history is None:
            return
        chosen = self.runs.value
        results = self.explorer.history.read()[::-1]
        self.runs.options = [(self._line(result), result.id) for result in results]
        self.runs.value = [value for value in chosen if value in {r.id for r in results}]

    @staticmethod
    def _line(result: Result) -> str:
        star = "★" if result.starred else "–"
        prompt, text = (" ".join(t.split())[:40] for t in (result.request.prompt, result.text))
        request = result.request
        return (
            f"{star} {result.made[:19]} {request.model} T {request.temperature:g} "
            f"seed {request.seed}: {prompt} → {text}"
        )

    def chosen(self) -> list[Result]:
        """Return the chosen results.

        Raises:
            ValueError: none is chosen.
        """
        results = [r for r in self.explorer.history.read() if r.id in self.runs.value]
        if not results:
            raise ValueError("choose a run in the list first")
        return results

    def run_again(self) -> None:
        """Answer the chosen run anew, all its settings in the controls."""
        request = self.chosen()[-1].again()
        self.compare.value = "one answer"
        column = self.columns[0]
        self.prompt.value, self.seed.value = request.prompt, request.seed
        column.model.value, column.template.value = request.model, request.template
        column.temperature.value = request.temperature
        for name, slider in self.sliders.items():
            slider.value = getattr(request, name)
        self.tabs.selected_index = 0
        self.fly([column], [request])

    def compare_chosen(self) -> None:
        self.history_shows.value = side_by_side(self.chosen())

    def star(self) -> None:
        self.explorer.history.star([result.id for result in self.chosen()])
        self.list_history()

    def delete(self) -> None:
        self.explorer.history.delete([result.id for result in self.chosen()])
        self.list_history()

    def export(self) -> None:
        """Write the chosen runs beside the history, each to a file, and show them."""
        shown = []
        for result in self.chosen():
            text = as_text(result, self.form.value)
            name = f"answer-{result.id}{FORMS[self.form.value]}"
            path = self.explorer.history.path.with_name(name)
            path.write_bytes(text.encode("utf-8", "replace"))
            shown.append(f"<b>{escaped(str(path))}</b><pre>{escaped(text)}</pre>")
        self.history_shows.value = "".join(shown)

    # Chat

    def _make_chat(self) -> None:
        alpaca = [n for n in self.explorer.names() if catalog.model(n).family == "alpaca"]
        self.chat_model = widgets.Dropdown(options=alpaca, description="Model")
        self.turns: list[tuple[str, str]] = []
        self.transcript = _html()
        self.message = widgets.Textarea(description="You", layout=widgets.Layout(width="95%"))
        buttons = [
            self._button("Send", self.say, button_style="primary"),
            self._button("Stop", self.explorer.stop),
            self._button("New conversation", self.forget),
        ]
        note = widgets.HTML("Temperature and the other settings are those of “Ask”.")
        self._chat_box = widgets.VBox(
            [self.chat_model, self.transcript, self.message, widgets.HBox(buttons), note]
        )

    def forget(self) -> None:
        self._flight = None
        self.explorer.stop()
        self.turns = []
        self.show_turns()

    def show_turns(self, question: str = "", answer: str = "") -> None:
        turns = self.turns + ([(question, answer)] if question else [])
        self.transcript.value = "".join(
            f"<pre><b>You:</b> {escaped(q)}</pre><pre><b>Model:</b> {escaped(a)}</pre>"
            for q, a in turns
        )

    def say(self) -> None:
        """Send the message, after as many of the earlier turns as the context holds."""
        name, question = self.chat_model.value, self.message.value
        if name is None:
            raise ValueError("no model of the alpaca family is on disk; lesson 03 makes one")
        if not question.strip():
            raise ValueError("write a message first")
        self.error.value, self.message.value = "", ""
        template = catalog.model(name).template
        settings = replace(self.request(self.columns[0]), model=name, template=template)
        settings = replace(settings, prompt=question, turns=tuple(self.turns))
        so_far = []

        def grow(_, text: str) -> None:
            so_far.append(text)
            self.show_turns(question, "".join(so_far))

        def finish(_, result: Result) -> None:
            self.turns.append((question, result.text))
            self.show_turns()

        self.show_turns(question)
        self.start(
            [lambda: self.explorer.fitted(settings)],  # in the thread: it needs the model
            grow,
            finish,
            lambda _, error: self.show_error(error),
            self.list_history,
        )
