"""The explorer's controller: equal to generate, one flight, branches, stops, replays."""

from __future__ import annotations

import threading
import time

import pytest
import yaml

from llamalab.errors import Incompatible, NotFound, UsageError
from llamalab_course.explorer.answer_history import AnswerHistory
from llamalab_course.explorer.requests import PromptRequest, as_text
from llamalab_course.explorer.session import Explorer, Listener

ALPACA = "chinese-alpaca-lab"
HOSTILE = "`\"'\\ ```` </pre><script>alert(1)</script>\x00\x1b\r\n\ud800 是吗 😀 {prompt}: #"


@pytest.fixture(scope="module")
def explorer(lab):
    return Explorer(lab, device="cpu")


@pytest.fixture
def kept(lab, tmp_path):
    return Explorer(lab, "cpu", AnswerHistory(tmp_path / "kept" / "history.json"))


def asked(prompt="苹果是植物吗", **more):
    return PromptRequest(ALPACA, prompt, template="alpaca", **{"max_new_tokens": 20, **more})


def test_the_models_are_those_on_disk(explorer, tmp_path):
    assert explorer.names() == [
        "llama-lab", "chinese-llama-lab", ALPACA, "chinese-alpaca-plus-lab",
    ]  # fmt: skip
    assert Explorer(tmp_path).names() == []
    with pytest.raises(NotFound, match=ALPACA):
        Explorer(tmp_path).answer(asked())


def test_an_answer_is_generates(explorer):
    request = asked(temperature=1.0, seed=5)
    result = explorer.answer(request)
    model = explorer.model(ALPACA)
    wanted = model.generate(
        request.prompt, template="alpaca", temperature=1.0, seed=5, max_new_tokens=20
    )
    assert (result.text, result.ids) == (wanted.text, wanted.answer_ids)
    assert [step[0] for step in result.steps] == result.ids
    for _, _, top in result.steps:
        shares = [share for *_, share in top]
        assert len(top) == 5 and shares == sorted(shares, reverse=True)


def test_tokens_show_bos_spaces_and_bytes(explorer):
    text = "is \U0001f98a"  # no vocabulary here has a fox
    found = explorer.tokens(PromptRequest("llama-lab", text))
    assert (found[0].piece, found[0].kind) == ("<s>", "control")
    assert found[1].piece.startswith("\u2581")
    data = bytes(int(t.piece[3:5], 16) for t in found if t.kind == "byte")
    assert data.decode() == "\U0001f98a"
    typed = explorer.tokens(PromptRequest("llama-lab", "<s> <0x41>"))
    assert [t.kind for t in typed].count("control") == 1  # what is typed is text, never BOS


def test_a_branch_starts_with_what_was_chosen(explorer):
    result = explorer.answer(asked(temperature=0))
    other = result.steps[2][2][1][0]
    branched = explorer.answer(result.branch(2, other))
    assert branched.ids[:3] == [*result.ids[:2], other]
    assert explorer.answer(result.branch(2, result.ids[2])).ids == result.ids


def test_one_flight_a_second_start_replaces_the_first(explorer):
    inside, most, lock, ended = 0, 0, threading.Lock(), []

    def watch(_):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.005)
        with lock:
            inside -= 1

    results = []
    for number in range(4):
        request = PromptRequest("llama-lab", "The", temperature=1, max_new_tokens=150, seed=number)
        flight = [(request, Listener(watch, results.append))] * 2
        explorer.start(flight, lambda n=number: ended.append(n))
    assert explorer.wait(60) and ended == [0, 1, 2, 3] and most == 1
    whole = [r for r in results if not r.stopped]
    assert len(whole) == 2 and {r.request.seed for r in whole} == {3}


def test_stop_ends_within_a_token_and_replays_to_the_same_text(explorer):
    seen = threading.Event()
    results = []
    request = PromptRequest("llama-lab", "The", temperature=1, max_new_tokens=200)
    listener = Listener(lambda text: (seen.set(), time.sleep(0.02)), results.append)
    explorer.start([(request, listener), (request, listener)])
    assert seen.wait(30)
    explorer.stop()
    assert explorer.wait(10) and len(results) == 1  # the second was not begun
    result = results[0]
    assert result.stopped and 0 < len(result.ids) < 200
    assert explorer.answer(result.again()).ids == result.ids


def test_an_error_is_told_and_the_next_request_is_answered(explorer):
    errors, results, ended = [], [], []
    listener = Listener(on_result=results.append, on_error=errors.append)
    requests = [asked("长" * 10_000), asked(top_p=0), asked()]
    explorer.start([(request, listener) for request in requests], lambda: ended.append(True))
    assert explorer.wait(60) and ended and [r.request for r in results] == [requests[2]]
    assert [type(error) for error in errors] == [Incompatible, UsageError]


@pytest.mark.parametrize("prompt", ["", " ", HOSTILE, "a" * 100, "\n" * 50])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_every_prompt_is_answered_and_comes_back_from_its_yaml(explorer, prompt, temperature):
    result = explorer.answer(asked(prompt, temperature=temperature, max_new_tokens=8))
    parameters = yaml.safe_load(as_text(result, "yaml"))
    request = PromptRequest.from_parameters(**parameters)
    assert explorer.answer(request).ids == result.ids


def test_results_are_kept_and_answered_again(kept):
    kept.start([(asked(seed=1), Listener()), (asked(HOSTILE, seed=2), Listener())])
    assert kept.wait(60)
    first, second = AnswerHistory(kept.history.path).read()
    assert (first.request.seed, second.request.prompt) == (1, HOSTILE)
    assert kept.answer(second.again()).ids == second.ids
