"""The explorer's view, headless: every control over its extremes, and no error hidden anywhere."""

from __future__ import annotations

import threading

import ipywidgets
import pytest

from llamalab_course.explorer.answer_history import AnswerHistory
from llamalab_course.explorer.requests import PromptRequest
from llamalab_course.explorer.session import Explorer
from llamalab_course.explorer.tabs import COMPARISONS, EXAMPLES
from llamalab_course.explorer.view import ExplorerView

ALPACA = "chinese-alpaca-lab"
SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>"


@pytest.fixture
def view(lab, tmp_path, monkeypatch):
    """A view on the lab family; an exception in any thread fails the test."""
    hidden = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: hidden.append(arguments))
    request = PromptRequest(ALPACA, "苹果是植物吗", template="alpaca", max_new_tokens=12)
    yield ExplorerView(Explorer(lab, "cpu", AnswerHistory(tmp_path / "history.json")), request)
    assert not hidden


def test_a_replaced_flight_is_not_heard(view):
    set_to(view, max_new_tokens=200, temperature=1.5, template="none")
    generate(view)
    set_to(view, seed=77)
    generate(view)
    assert finish(view).request.seed == 77 and not view.ask.columns[0].result.stopped


def press(button):
    button.click()


def generate(view):
    press(view.ask.buttons[0])


def set_to(view, **values):
    controls = view.ask.controls | view.ask.columns[0].controls
    for name, value in values.items():
        controls[name].value = value


def finish(view):
    assert view.explorer.wait(120)
    return view.ask.columns[0].result


def no_markup(widget_values):
    for value in widget_values:
        assert "<script" not in value and "<img" not in value


def nothing_hidden():
    """No widget there is holds an error: in captured output, or in what it shows."""
    for widget in list(ipywidgets.widgets.widget._instances.values()):
        state = widget.get_state()
        kinds = [output.get("output_type") for output in state.get("outputs", ())]
        assert "error" not in kinds, state["outputs"]
        assert "Traceback" not in str(state), state


def test_a_hidden_error_would_be_found(view):
    hidden = ipywidgets.Output()
    with pytest.raises(AssertionError):
        hidden.outputs = ({"output_type": "error", "ename": "E", "evalue": "", "traceback": []},)
        nothing_hidden()
    hidden.close()
    with pytest.raises(AssertionError):
        view.error.value = "Traceback (most recent call last)"
        nothing_hidden()
    view.error.value = ""  # widgets outlive their test


@pytest.mark.parametrize(
    "prompt", ["", "苹果" * 20, "\x00\x07\x1b[31m\x7f\r\n\t", SCRIPT, "\ud800", "&lt;b&gt; ```"]
)
@pytest.mark.parametrize("tokens", [1, 8])
def test_every_prompt(view, prompt, tokens, capfd):
    set_to(view, prompt=prompt, max_new_tokens=tokens)
    generate(view)
    assert finish(view) is not None and view.error.value == ""
    column = view.ask.columns[0]
    no_markup([column.answer.value, view.ask.seen.value])
    assert len(column.tokens.tokens) == len(column.result.ids) <= tokens
    assert capfd.readouterr().err == ""


def test_a_prompt_that_is_too_long_is_said_in_red(view, capfd):
    set_to(view, prompt="长" * 10_000)
    generate(view)
    assert finish(view) is None
    assert "llamalab-error" in view.error.value and "the context holds 256" in view.error.value
    set_to(view, prompt="短")
    generate(view)
    assert finish(view) and view.error.value == ""
    assert capfd.readouterr().err == ""


def test_every_control_at_its_extremes(view, capfd):
    ask, column = view.ask, view.ask.columns[0]
    bounded = {**ask.controls, "temperature": column.controls["temperature"]}
    del bounded["prompt"]
    for control in bounded.values():
        before = control.value
        for value in (control.min, control.max):
            control.value = value
            generate(view)
            assert finish(view) and view.error.value == "", control.description
        control.value = before
    for control in (ask.example, column.controls["model"], column.controls["template"]):
        for _, value in control._options_full:
            control.value = value
            generate(view)
            assert finish(view) and view.error.value == "", (control.description, value)
    nothing_hidden()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_every_comparison(view, comparison):
    view.ask.compare.value = comparison
    generate(view)
    assert finish(view) and view.error.value == ""
    assert all(column.result for column in view.ask.columns)
    assert len({column.result.request.seed for column in view.ask.columns}) == 1
    assert ("Differences" in view.ask.differences.value) == (len(view.ask.columns) > 1)


def test_again_repeats_and_roll_changes_the_seed(view):
    set_to(view, temperature=1.5)
    generate(view)
    first = finish(view)
    press(view.ask.buttons[2])
    assert finish(view).ids == first.ids
    press(view.ask.buttons[3])
    assert finish(view).request.seed != first.request.seed


def test_a_click_on_an_alternative_branches(view):
    generate(view)
    first = finish(view)
    other = first.steps[1][2][1][0]
    view.ask.columns[0].tokens._handle_custom_msg({"place": 1, "id": other}, [])
    assert finish(view).ids[:2] == [first.ids[0], other]


def test_keys(view):
    view.press("generate")
    assert finish(view)
    set_to(view, max_new_tokens=200, temperature=1.5)
    view.press("generate")
    view.press("stop")
    finish(view)
    assert len(view.ask.columns[0].text) < 400 and view.error.value == ""


def test_the_history_of_another_kernel(view, lab):
    generate(view)
    first = finish(view)
    anew = ExplorerView(
        Explorer(lab, "cpu", AnswerHistory(view.explorer.history.path)), PromptRequest(ALPACA, "x")
    )
    anew.history.runs.value = [first.id]
    anew.history.run_again()
    assert finish(anew).ids == first.ids
    anew.history.runs.value = [r.id for r in anew.explorer.history.read()]
    anew.history.compare()
    assert anew.history.shown.value.count("<td") == 2
    for form in ("json", "markdown", "yaml"):
        anew.history.form.value = form
        anew.history.export()
    assert len(list(view.explorer.history.path.parent.glob("answer-*"))) == 6
    buttons = anew.history.box.children[1].children
    press(buttons[2])
    assert anew.history.runs.options[0][0].startswith("★")
    press(buttons[3])
    assert anew.history.runs.options == ()
    for button in buttons[:4]:
        press(button)
        assert "choose a run" in anew.error.value


def test_a_damaged_history_is_said_and_answers_still_come(view):
    view.explorer.history.path.write_text("[")
    generate(view)
    assert finish(view) and "is not a history" in view.error.value
    assert view.explorer.history.path.read_text() == "["


def test_a_conversation(view):
    view.tabs.selected_index = 1
    for question in ("苹果是植物吗", SCRIPT):
        view.chat.message.value = question
        view.press("generate")
        finish(view)
    assert [q for q, _ in view.chat.turns] == ["苹果是植物吗", SCRIPT]
    last = view.explorer.history.read()[-1]
    assert last.request.turns == (view.chat.turns[0],)
    no_markup([view.chat.transcript.value])
    for _ in range(6):  # longer than the context: the oldest turns go
        view.chat.message.value = "它是什么？" * 5
        view.chat.say()
        finish(view)
    assert view.error.value == "" and len(view.chat.turns) == 8
    view.chat.forget()
    assert view.chat.turns == [] and view.chat.transcript.value == ""
    view.guarded(view.chat.say)()
    assert "write a message" in view.error.value


def test_a_failing_callback_shows_in_the_tool(view, monkeypatch):
    monkeypatch.setattr(view.explorer, "start", lambda *_: 1 / 0)
    generate(view)
    assert "ZeroDivisionError" in view.error.value and "role='alert'" in view.error.value


def test_the_examples_say_what_to_look_for():
    assert all("ook for" in note for note in EXAMPLES.values()) and len(EXAMPLES) >= 4
