"""Loading: what it takes is foretold, what cannot fit is refused, fewer bits say the same."""

from __future__ import annotations

import pytest
import torch

from llamalab.errors import NotEnoughRoom, NotFound, UsageError
from llamalab.inference import half_linear, loading
from llamalab.inference.loading import load, memory_needed
from llamalab.inference.model import Model
from llamalab.inference.templates import TEMPLATES
from llamalab.surgery.merging import compose


@pytest.fixture(scope="module")
def alpaca(lab):
    return lab / "chinese-alpaca-lab"


def test_the_weights_foretold_are_the_networks(alpaca):
    view = compose(alpaca)
    for dtype in (torch.float32, torch.bfloat16):
        network = load(alpaca, device="cpu", dtype=str(dtype)[6:]).network
        held = sum(p.numel() * p.element_size() for p in network.parameters())
        assert memory_needed(view, dtype)["weights"] == held
    cache = memory_needed(view, torch.float32)["KV cache"]
    assert cache == 2 * 4 * 192 * 256 * 4  # keys and values, layers, dim, context, fp32


def test_a_large_model_keeps_its_dtype_on_a_cpu(alpaca, monkeypatch):
    assert load(alpaca, device="cpu").network.dtype == torch.float32
    size = sum(p.numel() for p in load(alpaca, device="cpu").network.parameters())
    monkeypatch.setattr(loading, "FP32_BELOW", size + 1)
    assert load(alpaca, device="cpu").network.dtype == torch.float32
    monkeypatch.setattr(loading, "FP32_BELOW", size)
    assert load(alpaca, device="cpu").network.dtype == torch.float16


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (1, 8), (3, 50)])
@pytest.mark.parametrize(
    "out_features", [40, half_linear.BLOCK_ROWS, 2 * half_linear.BLOCK_ROWS + 3]
)
def test_a_layer_in_float16_gives_the_product_rounded_once(shape, out_features):
    chance = torch.Generator().manual_seed(out_features)
    layer = half_linear.HalfLinear(96, out_features, bias=False, dtype=torch.float16)
    layer.weight.data = torch.randn(layer.weight.shape, generator=chance).half()
    x = torch.randn(*shape, 96, generator=chance).half()
    with torch.inference_mode():
        found = layer(x)
    exact = x.double() @ layer.weight.double().T
    assert found.dtype == torch.float16 and found.shape == (*shape, out_features)
    # Half a step of float16, and what summing in float32 adds.
    allowed = exact.abs() * 2**-11 + 1e-5
    assert ((found.double() - exact).abs() <= allowed).all()
    rounded_twice = (x[..., :48] @ layer.weight[:, :48].T) + (x[..., 48:] @ layer.weight[:, 48:].T)
    assert ((rounded_twice.double() - exact).abs() > allowed).any()  # the bound is a tight one


def test_in_float16_a_prompt_is_read_and_answered_as_plain_transformers_does(alpaca):
    from transformers import AutoModelForCausalLM

    model = load(alpaca, device="cpu", dtype="float16")
    plain = AutoModelForCausalLM.from_pretrained(alpaca, dtype=torch.float16)
    assert not any(isinstance(m, half_linear.HalfLinear) for m in plain.modules())
    if not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        assert (
            sum(isinstance(m, half_linear.HalfLinear) for m in model.network.modules()) == 4 * 7 + 1
        )
    prompt = TEMPLATES["alpaca"].render("苹果是植物吗")
    ids = torch.tensor([model.tokenizer.encode(prompt)])
    theirs = plain.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist()
    answer = model.generate(prompt, temperature=0, max_new_tokens=12)
    assert answer.answer_ids == theirs[: len(answer.answer_ids)] and answer.answer_tokens > 5
    with torch.inference_mode():
        apart = (model.network(ids).logits - plain(ids).logits).abs().max().item()
    assert apart < 0.1


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_fewer_bits_answer_the_same_in_the_room_foretold(alpaca, quantize):
    model = load(alpaca, device="cpu", quantize=quantize)
    tensors = [*model.network.parameters(), *model.network.buffers()]
    linear = [m for m in model.network.modules() if "bit" in type(m).__name__]
    assert len(linear) == 4 * 7
    stored = sum(module.weight.numel() * module.weight.element_size() for module in linear)
    whole = 4 * (4 * 192 * 192 + 3 * 192 * 512)
    assert stored == whole * {"8bit": 1, "4bit": 0.5}[quantize]
    told = memory_needed(compose(alpaca), torch.float32, quantize)["weights"]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert told == pytest.approx(held, rel=0.05)
    for prompt, answer in (("苹果是植物吗", "是的，苹果是植物。"), ("What is a dog?", None)):
        said = model.generate(prompt, template="alpaca", temperature=0, max_new_tokens=40)
        assert answer in (None, said.text.strip()) and said.text.strip()
    plain = load(alpaca, device="cpu")
    ids = plain.tokenizer.encode(TEMPLATES["alpaca"].render("苹果是植物吗"))
    assert not torch.equal(model.logits(ids), plain.logits(ids))  # it was really quantised


def test_what_cannot_fit_is_refused_with_the_arithmetic_and_the_ways_out(alpaca, monkeypatch):
    view = compose(alpaca)
    needed = sum(memory_needed(view, torch.float32).values())
    monkeypatch.setattr(loading, "memory_free", lambda where: needed - 1)
    monkeypatch.setattr(loading, "read_network", None)  # no weight is read
    with pytest.raises(NotEnoughRoom) as caught:
        load(alpaca, device="cpu")
    text = str(caught.value)
    assert "In float32" in text and "weights 10.8 MB" in text and "KV cache 1.6 MB" in text
    assert "--dtype bfloat16 (" in text and "--quantize 4bit (" in text
    monkeypatch.setattr(loading, "memory_free", lambda where: 0)
    with pytest.raises(NotEnoughRoom, match="Use a smaller model"):
        load(alpaca, device="cpu")


@pytest.mark.parametrize("free", [None, 10**12])
def test_what_fits_is_loaded(alpaca, monkeypatch, free):
    monkeypatch.setattr(loading, "memory_free", lambda where: free)
    assert isinstance(load(alpaca, device="cpu"), Model)


def test_without_the_extra_it_is_named(alpaca, monkeypatch):
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotFound, match="bitsandbytes"):
        load(alpaca, device="cpu", quantize="8bit")
    with pytest.raises(UsageError, match="no quantisation"):
        load(alpaca, device="cpu", quantize="3bit")


def test_another_tokenizer_may_be_named(alpaca, lab, tmp_path):
    ours = (alpaca / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(ours)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        model = load(alpaca, device="cpu", tokenizer_path=path)
        assert model.tokenizer.path == tmp_path / "tokenizer.model"
    with pytest.raises(Exception, match="pieces"):
        load(alpaca, device="cpu", tokenizer_path=lab / "llama-lab")
