"""Inference: transformers' own ids, unmerged equal to merged, seeds, stops and whole characters."""

from __future__ import annotations

import pytest
import torch

import llamalab
from llamalab import labmodel, labworld
from llamalab.errors import Incompatible, NotFound, UsageError
from llamalab.inference import _Emitter, answer_all, load, pick_device
from llamalab.templates import TEMPLATES
from llamalab.tokenizer import Tokenizer


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
    given, emitter = [], None
    emitter = _Emitter(tokenizer, prompt, [], given.append)
    for end in range(1, len(ids) + 1):
        emitter(torch.tensor([[*prompt, *ids[:end]]]))
    emitter.finish()
    assert "".join(given) == emitter.text == text
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
    chosen = labmodel.sample(labworld.questions(labworld.load(), "zh"), 12)
    prompts = [TEMPLATES["alpaca"].render(q.text) for q in chosen] + ["苹果", "它是什么？" * 5]
    batched = answer_all(model, prompts, batch_size=5)
    for prompt, answer in zip(prompts, batched, strict=True):
        ids = model.tokenizer.encode(prompt)
        single = model._sample(
            ids, {"temperature": 0}, 48, 0, _Emitter(model.tokenizer, ids, (), None)
        )
        assert model.tokenizer.continuation(ids, single) == answer
