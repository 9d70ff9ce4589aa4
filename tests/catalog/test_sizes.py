"""The arithmetic of sizes, against published numbers and against models that torch builds."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from llamalab import catalog, units
from llamalab.catalog import sizes
from llamalab.catalog.catalog import Part, Shape
from llamalab.catalog.sizes import adapter_bytes

PARTS = catalog.parts()
SHAPE_7B = PARTS["llama-7b"].shape
ADAPTERS = [p for p in PARTS.values() if p.kind == "adapter" and p.base != "llama-lab"]


@pytest.mark.parametrize(
    "name, count",
    [("llama-7b", 6_738_415_616), ("llama-13b", 13_015_864_320), ("llama-33b", 32_528_943_616)],
)
def test_parameters_are_the_published_ones(name, count):
    assert sizes.parameters(PARTS[name].shape, PARTS[name].vocab) == count


def test_the_published_7b_file_is_the_weights_and_a_thin_container():
    predicted = sizes.checkpoint_bytes(SHAPE_7B, 32_000)
    published = PARTS["llama-7b"].files["7B/consolidated.00.pth"].size
    assert published == 13_476_939_516
    assert 0 < published - predicted < 200_000


small_shapes = st.builds(
    lambda groups, kv_heads, half_head, layers, ffn: Shape(
        2 * half_head * groups * kv_heads, layers, groups * kv_heads, kv_heads, ffn
    ),
    *(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 3)),
    st.integers(1, 40),
)


def llama(shape: Shape, vocab: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=shape.dim,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.ffn,
        vocab_size=vocab,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


@settings(max_examples=25, deadline=None)
@given(small_shapes, st.integers(2, 50), st.integers(1, 20), st.integers(1, 3))
def test_sizes_are_those_of_the_model_that_transformers_builds(shape, vocab, tokens, batch):
    model = llama(shape, vocab)
    values = sum(tensor.numel() for tensor in model.state_dict().values())
    assert sizes.parameters(shape, vocab) == values
    with torch.no_grad():
        ids = torch.zeros(batch, tokens, dtype=torch.long)
        cache = model(ids, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert sizes.kv_cache_bytes(shape, tokens, batch, bytes_per_value=4) == held


@pytest.mark.parametrize("targets", [4, 7])
def test_lora_counts_are_those_of_the_model_that_peft_builds(targets):
    from peft import LoraConfig, get_peft_model

    shape, names = Shape(32, 2, 4, 2, 48), "q k v o gate up down".split()
    part = Part("a", "adapter", {}, 11, rank=3, targets=targets)
    adapted = [name + "_proj" for name in names[:targets]]
    config = LoraConfig(r=3, target_modules=adapted, modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(llama(shape, 11), config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.adapter_bytes(part, shape, 1) == trained


def test_the_7b_lora_is_98_percent_embeddings():
    part = PARTS["chinese-llama-lora-7b"]
    lora = 2 * sizes.lora_parameters(part, SHAPE_7B)
    assert 1 - lora / sizes.adapter_bytes(part, SHAPE_7B) == pytest.approx(0.98, abs=0.0005)


def test_adapters_are_as_large_as_published():
    sizes = [adapter_bytes(part, PARTS[part.base].shape) / 1e9 for part in ADAPTERS]
    assert min(sizes) == pytest.approx(0.8, abs=0.05)
    part = PARTS["chinese-alpaca-lora-33b"]  # the largest one published, in fp32
    assert adapter_bytes(part, PARTS[part.base].shape, 4) / 1e9 == pytest.approx(2.8, 0.04)


def test_kv_cache_of_7b_at_full_context_is_one_gibibyte():
    assert sizes.kv_cache_bytes(SHAPE_7B, 2048) == 2**30


@pytest.mark.parametrize("name", [*catalog.models(), "llama-7b"])
def test_needs_add_up(name):
    model = catalog.model(name)
    needs = sizes.needs(model)
    parts = [sizes.adapter_bytes(part, model.base.shape) for part in model.adapters]
    assert needs.download == needs.converted + sum(parts)
    assert needs.disk == needs.download + needs.converted + needs.merged
    assert needs.merged == (2 * needs.parameters if parts else 0)
    assert needs.inference_memory > 2 * needs.parameters
    on_cpu = 4 if needs.parameters < sizes.FP32_BELOW else 2
    cpu = sizes.inference_bytes(model.base.shape, model.parts[-1].vocab, model.base.context, on_cpu)
    assert needs.cpu_memory == cpu > on_cpu * needs.parameters
    assert ("on a CPU" in str(needs)) == (on_cpu == 4)


def test_the_arithmetic_can_be_redone_by_the_reader():
    text = str(sizes.needs(catalog.model("chinese-alpaca-7b"))).replace(",", "")
    layers, layer, product = map(int, re.search(r"(\d+) layers x (\d+) = (\d+)", text).groups())
    assert layers * layer == product
    vocab, dim, rows = map(int, re.search(r"2 x (\d+) tokens x (\d+) = (\d+)", text).groups())
    assert 2 * vocab * dim == rows
    total = int(re.search(r"parameters .* = (\d+)", text).group(1))
    assert product + rows + dim == total == sizes.parameters(SHAPE_7B, 49_954)
    alone = str(sizes.needs(catalog.model("llama-7b")))
    assert "adapter" not in alone and "merged" not in alone and "= 13.5 GB" in alone


@pytest.mark.parametrize(
    "size, text",
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (999_949, "999.9 kB")]
    + [(999_950, "1.0 MB"), (13_476_939_516, "13.5 GB"), (2e12, "2,000.0 GB")],
)
def test_sizes_read_well(size, text):
    assert units.size_text(size) == text
