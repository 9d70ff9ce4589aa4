"""Inference: transformers' own ids, unmerged equal to merged, seeds, stops and whole characters."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import llamalab
from llamalab.errors import Incompatible, NotFound, UsageError
from llamalab.inference import decoding
from llamalab.inference.decoding import FEWEST_HALVED, AnswerRow
from llamalab.inference.loading import load, pick_device
from llamalab.inference.model import answer_all
from llamalab.inference.sampling import Sampling
from llamalab.inference.templates import TEMPLATES, render_text
from llamalab.surgery.tokenizer import Tokenizer
from llamalab_course.family import scores, world


@pytest.fixture(scope="module")
def merged(family, tmp_path_factory):
    out = tmp_path_factory.mktemp("merged") / "m"
    llamalab.merge(family / "base", family / "llama-lora", out)
    return out


@pytest.fixture(scope="module")
def model(merged):
    return load(merged, device="cpu")


def test_plain_transformers_says_the_same(model, merged):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    for prompt in ("the cat sat", "苹果是植物吗", "索尼最新的耳机"):
        inputs = tokenizer(prompt, return_tensors="pt")
        wanted = network.generate(**inputs, max_new_tokens=24, do_sample=False)
        answer = model.generate(prompt, temperature=0, max_new_tokens=24)
        assert inputs.input_ids[0].tolist() == model.tokenizer.encode(prompt)
        new = wanted[0, inputs.input_ids.shape[1] :].tolist()
        assert answer.answer_ids == (new[:-1] if new[-1] == 2 else new)


def test_unmerged_gives_the_merged_models_ids(family, model):
    unmerged = load(family / "base", family / "llama-lora", device="cpu")
    for prompt in ("the dog ran", "今天天气很好"):
        wanted = model.generate(prompt, temperature=0, max_new_tokens=24)
        found = unmerged.generate(prompt, temperature=0, max_new_tokens=24)
        assert found.answer_ids == wanted.answer_ids
    ids = model.tokenizer.encode("the dog")
    assert torch.equal(model.logits(ids), unmerged.logits(ids))


def test_greedy_is_the_largest_logit_each_time(model):
    ids = model.tokenizer.encode("the cat")
    by_hand = []
    for _ in range(8):
        by_hand.append(model.logits([*ids, *by_hand])[-1].argmax().item())
    assert model.generate("the cat", temperature=0, max_new_tokens=8).answer_ids == by_hand


def test_a_seed_reproduces_and_others_differ(model):
    def ids(seed):
        return model.generate(
            "the", temperature=1.5, top_k=0, top_p=1, max_new_tokens=20, seed=seed
        )

    state = torch.get_rng_state()
    assert ids(3).answer_ids == ids(3).answer_ids
    assert len({tuple(ids(seed).answer_ids) for seed in range(4)}) > 1
    assert torch.equal(torch.get_rng_state(), state)
    drawn = model.generate("the", temperature=1.5, max_new_tokens=20)
    again = model.generate("the", temperature=1.5, max_new_tokens=20, seed=drawn.seed)
    assert drawn.answer_ids == again.answer_ids


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(model):
    whole = model.generate("the cat", temperature=0, max_new_tokens=30).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    given = []
    answer = model.generate(
        "the cat", temperature=0, max_new_tokens=30, stop=[stop, ""], on_text=given.append
    )
    assert answer.text == whole[: whole.find(stop)]
    assert "".join(given) == answer.text


def test_streamed_text_is_the_answer_in_whole_characters(family):
    """Byte pieces of one character come one by one; none is shown before it is whole."""
    tokenizer = Tokenizer(family / "base")  # Chinese is bytes for it
    prompt, text = tokenizer.encode("the"), " 苹果 cat 植物"
    ids = tokenizer.encode("the" + text)[len(prompt) :]
    given, settings = [], Sampling(max_new_tokens=50)
    model = SimpleNamespace(tokenizer=tokenizer, context_length=100)
    row = AnswerRow(model.tokenizer, model.context_length, "the", 0, settings, on_text=given.append)
    for end in range(1, len(ids) + 1):
        row.ends(ids[:end])
    row.take(ids, tokenizer.eos)
    row.finish()
    assert "".join(given) == row.text == text
    assert not any("\ufffd" in piece for piece in given)
    assert "苹" in given


def test_the_context_is_a_limit(model):
    model.context_length, kept = 12, model.context_length
    try:
        prompt = "the cat sat on the"
        length = len(model.tokenizer.encode(prompt))
        answer = model.generate(prompt, temperature=0, max_new_tokens=50)
        assert answer.prompt_tokens + answer.answer_tokens <= 12 and answer.prompt_tokens == length
        with pytest.raises(Incompatible, match="context holds 12"):
            model.generate("the cat sat on the mat and the dog ran to the red house")
    finally:
        model.context_length = kept


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 1e-45},
        {"seed": 2**80},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"template": "x"},
    ],
    ids=str,
)
def test_settings_out_of_range(model, setting):
    with pytest.raises(UsageError):
        model.generate("the", **setting)


def test_what_a_model_says_is_never_html(model):
    answer = model.generate("the", temperature=0, max_new_tokens=1)
    hostile = type(answer)("<script>alert(1)</script>", "p", 1, [5], 0, {}, 1.0)
    assert "<script>" not in hostile._repr_html_()
    assert answer.settings["repetition_penalty"] == 1.0


def test_half_a_surrogate_pair_is_a_question_mark(model):
    answer = model.generate("the \ud83d cat", temperature=0, max_new_tokens=2)
    assert answer.prompt == "the ? cat"


def test_devices():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="no device"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        assert pick_device("auto").type in ("cpu", "mps")
        with pytest.raises(NotFound, match="auto"):
            pick_device("cuda")


def test_half_precision_and_an_unknown_one(merged):
    assert load(merged, device="cpu", dtype="bfloat16").network.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="dtype"):
        load(merged, dtype="int3")


def test_twice_the_same_adapter_is_refused(merged, family):
    with pytest.raises(Incompatible, match="already contains"):
        load(merged, family / "llama-lora", device="cpu")
    load(merged, family / "llama-lora", device="cpu", force=True)


def test_a_tokenizer_that_does_not_fit_is_refused_before_loading(merged, family, tmp_path):
    import shutil

    shutil.copytree(merged, tmp_path / "m")
    shutil.copy(family / "base" / "tokenizer.model", tmp_path / "m")
    with pytest.raises(Incompatible, match="300 pieces"):
        load(tmp_path / "m", device="cpu")
    (tmp_path / "m" / "tokenizer.model").unlink()
    with pytest.raises(NotFound, match="No tokenizer.model"):
        load(tmp_path / "m", device="cpu")


def test_batched_answers_are_the_single_ones(lab):
    """Prompts of many lengths, so that each batch is padded; greedy in float32."""
    model = load(lab / "chinese-alpaca-lab", device="cpu")
    chosen = scores.sample(world.questions(world.load_world(), "zh"), 12)
    prompts = [TEMPLATES["alpaca"].render(q.text) for q in chosen] + ["苹果", "它是什么？" * 5]
    batched = answer_all(model, prompts, batch_size=5)
    for prompt, answer in zip(prompts, batched, strict=True):
        assert model.generate(prompt, temperature=0, max_new_tokens=48).text == answer


SAMPLED = {"temperature": 3.0, "top_p": 0.99, "top_k": 0, "max_new_tokens": 20}


def test_a_sampled_answer_does_not_depend_on_its_batch(lab):
    model = load(lab / "chinese-alpaca-lab", device="cpu")
    prompts = ["苹果是植物吗", "What is a dog?", "索尼最新的耳机", "苹果是植物吗"]
    batch = model.generate_batch(prompts, template="alpaca", seeds=[5, 6, 7, 8], **SAMPLED)
    for prompt, seed, answer in zip(prompts, (5, 6, 7, 8), batch, strict=True):
        single = model.generate(prompt, template="alpaca", seed=seed, **SAMPLED)
        assert single.answer_ids == answer.answer_ids and single.text == answer.text
        assert answer.seed == seed
    assert batch[0].answer_ids != batch[3].answer_ids  # equal prompts, other seeds


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.5}, {"stop": ["，", "s"]}])
def test_finished_rows_are_left_behind_and_the_others_go_on_as_before(lab, monkeypatch, how):
    model = load(lab / "chinese-alpaca-lab", device="cpu")
    chosen = scores.sample(world.questions(world.load_world(), "zh"), 28)
    prompts = [q.text for q in chosen] + ["What is a dog?", "苹果" * 90, "写一篇文章", "a"]
    settings = {"template": "alpaca", "top_p": 1, "max_new_tokens": 60, "temperature": 0} | how
    passes = []

    def batch():
        passes.clear()
        hook = model.network.register_forward_pre_hook(
            lambda _, args, kwargs: passes.append(len(kwargs.get("input_ids", [0] * 32))),
            with_kwargs=True,
        )
        answers = model.generate_batch(prompts, seeds=range(32), **settings)
        hook.remove()
        return answers

    found = batch()
    assert len(set(passes)) >= 3 and min(passes) < FEWEST_HALVED
    for prompt, seed, answer in zip(prompts, range(32), found, strict=True):
        single = model.generate(prompt, seed=seed, **settings)
        assert (answer.answer_ids, answer.text) == (single.answer_ids, single.text)
    monkeypatch.setattr(decoding, "FEWEST_HALVED", 1000)
    assert [a.answer_ids for a in batch()] == [a.answer_ids for a in found]


def test_draws_follow_the_distribution_of_plain_sampling(model):
    """The first token of many seeds, against the probabilities after transformers' warpers."""
    logits = model.logits(model.tokenizer.encode("the"))[-1] / 1.3
    kept = logits.topk(5)
    wanted = dict(zip(kept.indices.tolist(), kept.values.softmax(0).tolist(), strict=True))
    settings = {"temperature": 1.3, "top_k": 5, "top_p": 1, "repetition_penalty": 1.0}
    count = 2000
    answers = model.generate_batch(
        ["the"] * count, seeds=range(count), max_new_tokens=1, **settings
    )
    eos = model.tokenizer.eos
    drawn = Counter((answer.answer_ids or [eos])[0] for answer in answers)
    assert set(drawn) <= set(wanted)
    for token, share in wanted.items():
        spread = (share * (1 - share) / count) ** 0.5
        assert abs(drawn[token] / count - share) < 5 * spread + 1e-9


def test_branching_from_an_answers_own_ids_gives_it_again(model):
    for settings in ({"temperature": 0}, {"temperature": 1.5, "seed": 4}):
        whole = model.generate("the cat", max_new_tokens=16, **settings)
        given = []
        again = model.generate(
            "the cat",
            max_new_tokens=16,
            begin=whole.answer_ids[:6],
            on_text=given.append,
            **settings,
        )
        assert again.answer_ids == whole.answer_ids and "".join(given) == whole.text
    other = model.generate("the cat", temperature=0, max_new_tokens=16, begin=[50, 51])
    assert other.answer_ids[:2] == [50, 51] and other.answer_tokens <= 16


def test_alternatives_are_the_models_own_probabilities(model):
    answer = model.generate("the cat", temperature=0, max_new_tokens=6, alternatives=4)
    ids = model.tokenizer.encode("the cat")
    for place, step in enumerate(answer.steps):
        shares = model.logits([*ids, *answer.answer_ids[:place]])[-1].softmax(0)
        best = shares.topk(4)
        assert step.id == answer.answer_ids[place] == step.top[0][0]
        assert [token for token, _ in step.top] == best.indices.tolist()
        assert step.probability == pytest.approx(shares[step.id].item(), rel=1e-4)
        assert [share for _, share in step.top] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert len(answer.steps) == answer.answer_tokens == 6
    assert model.generate("the cat", temperature=0, max_new_tokens=6).steps == []


def test_an_answer_can_be_stopped_after_any_token(model):
    whole = model.generate("the cat", temperature=0, max_new_tokens=20)
    asked = []

    def enough():
        asked.append(1)
        return len(asked) == 5

    part = model.generate("the cat", temperature=0, max_new_tokens=20, stop_when=enough)
    assert part.answer_ids == whole.answer_ids[:5] and whole.text.startswith(part.text)


def test_a_batch_stops_each_row_at_its_own_stop_text(lab):
    model = load(lab / "chinese-alpaca-lab", device="cpu")
    prompts = ["苹果是植物吗", "索尼最新的耳机"]
    how = {"template": "alpaca", "temperature": 0, "max_new_tokens": 40, "stop": ["，"]}
    batch = model.generate_batch(prompts, seeds=[0, 0], **how)
    for prompt, answer in zip(prompts, batch, strict=True):
        single = model.generate(prompt, **how)
        assert answer.text == single.text and answer.answer_ids == single.answer_ids


def test_a_history_is_cut_by_tokens_from_its_oldest_turn(model):
    turns = [("the cat sat", "on the mat"), ("the dog ran", "to the house"), ("the", "red")]
    full = len(model.tokenizer.encode(render_text("cat", "alpaca", turns)))
    model.context_length, kept = full + 10, model.context_length
    try:
        assert model.fitting_history("cat", "alpaca", turns, room=10) == turns
        assert model.fitting_history("cat", "alpaca", turns, room=11) == turns[1:]
        assert model.fitting_history("cat", "alpaca", turns, room=10**6) == []
    finally:
        model.context_length = kept
