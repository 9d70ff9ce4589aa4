"""Merging: PEFT's numbers bit for bit, the same bytes by every route, and nothing silent."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import llamalab
import synthetic
from llamalab.checkpoints.layouts import HFCheckpoint, MetaCheckpoint
from llamalab.errors import DamagedFile, Incompatible, LabError, UsageError, WrongLayout
from llamalab.surgery.adapter import Adapter
from llamalab.surgery.compatibility import contains
from llamalab.surgery.conversion import as_hf
from llamalab.surgery.merging import with_lora


def peft_merge(base_hf, *adapters) -> dict[str, torch.Tensor]:
    """The reference: PEFT's default merge, in the base's dtype."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(base_hf, dtype=HFCheckpoint(base_hf).dtype)
    for adapter in adapters:
        rows = Adapter(adapter).spec(Adapter(adapter).whole["lm_head"]).rows
        network.resize_token_embeddings(rows, mean_resizing=False)
        network = PeftModel.from_pretrained(network, adapter).merge_and_unload()
    return network.state_dict()


def differing(found: dict, wanted: dict) -> tuple[int, int]:
    """(elements that differ, all elements); asserts that none differs by more than one ulp."""
    assert found.keys() == wanted.keys()
    total = count = 0
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        bits = {2: torch.int16, 4: torch.int32}[tensor.itemsize]
        off = (found[name].view(bits).long() - tensor.view(bits).long()).abs()
        assert off.max() <= 1, name
        count += int((off > 0).sum())
        total += tensor.numel()
    return count, total


@pytest.mark.parametrize("adapter", ["llama-lora", "alpaca-lora"])
def test_merged_weights_are_pefts(family, tmp_path, adapter):
    llamalab.merge(family / "base", family / adapter, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    count, total = differing(found, peft_merge(family / "base-hf", family / adapter))
    print(f"{count} of {total} elements differ by one unit in the last place")
    assert count < total / 1000


def test_two_adapters_in_order_are_pefts(family, tmp_path):
    # The second is trained on the first's result: its vocabulary is one pad token larger.
    first, second = family / "llama-lora", family / "alpaca-lora"
    llamalab.merge(family / "base", [first, second], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    count, total = differing(found, peft_merge(family / "base-hf", first, second))
    assert count < total / 1000
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (
        second / "tokenizer.model"
    ).read_bytes()


def test_a_scale_other_than_alpha_over_r_is_seen(family, copied):
    """Negative control: a wrong factor gives other weights than PEFT's."""
    adapter = copied("llama-lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 17}))
    base = HFCheckpoint(family / "base-hf")
    name = "model.layers.0.self_attn.q_proj.weight"
    wanted = with_lora(base, Adapter(family / "llama-lora")).read(name)
    assert not torch.equal(with_lora(base, Adapter(adapter)).read(name), wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 7}},
        {"rank_pattern": {"v_proj": 2}, "rank": 6},
        {"targets": ("q_proj", "v_proj")},
        {"fan_in_fan_out": True},  # of no effect on LLaMA's layers, which PEFT warns about
    ],
    ids=lambda s: next(iter(s)),
)
def test_pefts_other_settings_give_pefts_weights(family, tmp_path, settings):
    tokenizer = family / "base" / "tokenizer.model"
    synthetic.write_adapter(tmp_path / "a", family / "base-hf", tokenizer, **settings)
    llamalab.merge(family / "base-hf", tmp_path / "a", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    count, total = differing(found, peft_merge(family / "base-hf", tmp_path / "a"))
    assert count < total / 1000


@pytest.mark.parametrize("in_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_base_and_adapter(family, copied, tmp_path, base_dtype, in_dtype):
    """The base's dtype is kept, whatever the adapter's is, and in either of its containers."""
    tensors, params = synthetic.meta_tensors(dtype=base_dtype)
    synthetic.write_meta(tmp_path / "b", tensors, params)
    shutil.copy(family / "base" / "tokenizer.model", tmp_path / "b")
    llamalab.convert(tmp_path / "b", tmp_path / "hf")
    adapter = copied("llama-lora")
    held = load_file(adapter / "adapter_model.safetensors")
    held = {name: tensor.to(in_dtype) for name, tensor in held.items()}
    save_file(held, adapter / "adapter_model.safetensors")
    wanted = peft_merge(tmp_path / "hf", adapter)
    made = llamalab.merge(tmp_path / "hf", adapter, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in found.values()} == {base_dtype}
    count, total = differing(found, wanted)
    assert count < total / 1000
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(held, adapter / "adapter_model.bin")
    again = llamalab.merge(tmp_path / "hf", adapter, tmp_path / "again")
    assert again.tensor_digest == made.tensor_digest


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_base_in_several_files(family, tmp_path, suffix):
    """HF layout as others write it: shards and an index, as safetensors or by `torch.save`."""
    whole, base = family / "base-hf", tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(whole / name, base)
    tensors = load_file(whole / "model.safetensors")
    stem, index = "model" if suffix == "safetensors" else "pytorch_model", {}
    for number in range(3):
        held = {name: tensors[name] for name in sorted(tensors)[number::3]}
        file = f"{stem}-{number + 1:05d}-of-00003.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)(held, base / file)
        index |= dict.fromkeys(held, file)
    (base / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
    digests = {
        llamalab.merge(given, family / "llama-lora", tmp_path / f"out{i}").tensor_digest
        for i, given in enumerate((whole, base))
    }
    assert len(digests) == 1


def test_every_route_gives_the_same_bytes(family, tmp_path):
    adapter = family / "llama-lora"
    fused = llamalab.merge(family / "base", adapter, tmp_path / "fused")
    steps = llamalab.merge(family / "base-hf", adapter, tmp_path / "steps")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "fused" / name).read_bytes() == (tmp_path / "steps" / name).read_bytes()
    pth = llamalab.merge(family / "base", adapter, tmp_path / "pth", output_type="pth")
    back = llamalab.convert(tmp_path / "pth", tmp_path / "back")
    assert fused.tensor_digest == steps.tensor_digest == back.tensor_digest != pth.tensor_digest
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "fused" / "model.safetensors"
    ).read_bytes()


def test_adapters_as_bin_and_with_the_published_files_foreign_keys(family, copied, tmp_path):
    adapter = copied("llama-lora")
    tensors = load_file(adapter / "adapter_model.safetensors")
    torch.save(tensors, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"enable_lora": None, "merge_weights": False}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    plain = llamalab.merge(family / "base", family / "llama-lora", tmp_path / "plain")
    assert (
        plain.tensor_digest
        == llamalab.merge(family / "base", adapter, tmp_path / "bin").tensor_digest
    )


def test_threads_and_requested_rows_do_not_change_bytes(family):
    view = with_lora(HFCheckpoint(family / "base-hf"), Adapter(family / "llama-lora"))
    name = "model.layers.1.mlp.gate_proj.weight"
    threads = torch.get_num_threads()
    whole = view.read(name)
    try:
        torch.set_num_threads(1)
        assert torch.equal(view.read(name), whole)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([view.read(name, i, i + 1) for i in range(len(whole))]), whole)


def test_no_layer_is_added(family):
    base = HFCheckpoint(family / "base-hf")
    merged = with_lora(base, Adapter(family / "llama-lora"))
    assert list(merged.tensors) == list(base.tensors)
    grown = {n for n in base.tensors if merged.tensors[n] != base.tensors[n]}
    assert grown == {"model.embed_tokens.weight", "lm_head.weight"}
    assert merged.config["vocab_size"] == merged.vocab_size > base.vocab_size


def edited(adapter, change) -> Adapter:
    """Return `adapter` after `change(tensors)` on the tensors in its file."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return Adapter(adapter)


def test_adapter_of_another_size_is_refused(family, tmp_path):
    tensors, params = synthetic.meta_tensors(dim=96, heads=3)
    synthetic.write_meta(tmp_path / "big", tensors, params)
    synthetic.english_tokenizer(tmp_path / "big" / "tokenizer.model")
    with pytest.raises(Incompatible, match="another size"):
        llamalab.merge(tmp_path / "big", family / "llama-lora", tmp_path / "out")
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "out").exists()


def test_adapter_with_more_layers_is_refused_by_the_modules_name(family, tmp_path):
    tensors, params = synthetic.meta_tensors(layers=1)
    synthetic.write_meta(tmp_path / "small", tensors, params)
    synthetic.english_tokenizer(tmp_path / "small" / "tokenizer.model")
    with pytest.raises(Incompatible, match=r"'model\.layers\.1\."):
        llamalab.merge(tmp_path / "small", family / "llama-lora", tmp_path / "out")


def test_unknown_half_and_missing_tensors_are_named(family, copied):
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"

    def rename(tensors):
        tensors["base_model.model.model.layers.0.self_attn.q_proj.magnitude"] = torch.zeros(3)

    with pytest.raises(Incompatible, match="magnitude"):
        edited(copied("llama-lora"), rename)
    with pytest.raises(DamagedFile, match="lora_B is missing"):
        edited(copied("alpaca-lora"), lambda tensors: tensors.pop(f"{key}B.weight"))


def test_an_adapter_saved_without_its_embeddings_is_refused(copied):
    def forget(tensors):
        for name in [name for name in tensors if "embed_tokens" in name]:
            del tensors[name]

    with pytest.raises(DamagedFile, match="without its embeddings"):
        edited(copied("llama-lora"), forget)


def test_vocabulary_rules(family, copied):
    base = HFCheckpoint(family / "base-hf")
    merged = with_lora(base, Adapter(family / "alpaca-lora"))
    with pytest.raises(Incompatible, match="fewer than the base"):
        with_lora(merged, Adapter(family / "llama-lora"))
    adapter = copied("llama-lora")
    (adapter / "tokenizer.model").write_bytes((family / "alpaca-lora/tokenizer.model").read_bytes())
    with pytest.raises(Incompatible, match="pieces"):
        with_lora(base, Adapter(adapter))
    (adapter / "tokenizer.model").unlink()
    with pytest.raises(Incompatible, match="no tokenizer.model"):
        with_lora(base, Adapter(adapter))


def test_an_adapter_is_not_merged_twice_unless_forced(family, tmp_path):
    adapter = Adapter(family / "llama-lora")
    once = with_lora(HFCheckpoint(family / "base-hf"), adapter)
    assert contains(once, adapter) and not contains(HFCheckpoint(family / "base-hf"), adapter)
    with pytest.raises(Incompatible, match="already contains"):
        with_lora(once, adapter)
    twice = with_lora(once, adapter, force=True)
    name = "model.layers.0.mlp.down_proj.weight"
    base = as_hf(MetaCheckpoint(family / "base")).read(name).float()
    change = once.read(name).float() - base
    assert torch.allclose(twice.read(name).float() - base, 2 * change, atol=2e-3)
    assert torch.equal(twice.read("lm_head.weight"), once.read("lm_head.weight"))


@pytest.mark.parametrize("setting", ["use_dora", "lora_bias"])
def test_unsupported_settings_are_refused_by_name(copied, setting):
    adapter = copied("llama-lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {setting: True}))
    with pytest.raises(Incompatible, match=setting):
        Adapter(adapter)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"kasa_config": {}}, "kasa_config"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias"),
    ],
    ids=str,
)
def test_settings_that_mean_other_weights_are_refused(copied, change, words):
    adapter = copied("llama-lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(LabError, match=words):
        Adapter(adapter)


def test_only_one_of_two_embeddings_is_refused(family, copied):
    adapter = copied("llama-lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["modules_to_save"] = ["embed_tokens"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    def forget(tensors):
        for name in [name for name in tensors if "lm_head" in name]:
            del tensors[name]

    with pytest.raises(Incompatible, match="different numbers of rows"):
        with_lora(HFCheckpoint(family / "base-hf"), edited(adapter, forget))


def test_the_lab_familys_order_is_known_by_digest(lab):
    """plus without llama first; llama on alpaca: refused, whatever the directories are called."""
    base = HFCheckpoint(lab / "llama-lab-hf")
    assert base.made_of == ("llama-lab",)
    plus = Adapter(lab / "chinese-alpaca-plus-lora-lab")
    with pytest.raises(Incompatible, match="chinese-llama-lora-lab,chinese-alpaca-plus-lora-lab"):
        with_lora(base, plus)
    merged = HFCheckpoint(lab / "chinese-llama-lab")
    assert with_lora(merged, plus).made_of == (
        "llama-lab", "chinese-llama-lora-lab", "chinese-alpaca-plus-lora-lab",
    )  # fmt: skip
    with pytest.raises(Incompatible):
        with_lora(merged, Adapter(lab / "chinese-alpaca-lora-lab"))


def test_values_out_of_range_stop_the_merge_and_leave_nothing(family, copied, tmp_path):
    adapter = copied("llama-lora")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

    def overflow(tensors):
        tensors[key] = tensors[key] * torch.inf

    edited(adapter, overflow)
    with pytest.raises(DamagedFile, match="q_proj.*not finite"):
        llamalab.merge(family / "base", adapter, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["llama-lora"]  # no work directory either


def test_wrong_things_in_the_adapters_place(family, tmp_path):
    with pytest.raises(WrongLayout, match="not an adapter"):
        llamalab.merge(family / "base", family / "base-hf", tmp_path / "out")
    with pytest.raises(UsageError, match="no adapter"):
        llamalab.merge(family / "base", " , ", tmp_path / "out")
    with pytest.raises(WrongLayout, match="is an adapter, not a model"):
        llamalab.merge(family / "llama-lora", family / "llama-lora", tmp_path / "out")
    with pytest.raises(LabError):
        llamalab.merge(family / "base", family / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parts_of_the_catalogue_only_in_their_order(family, monkeypatch):
    from llamalab import catalog

    parts = catalog.parts()
    names = ("llama-7b", "chinese-alpaca-plus-lora-7b")
    known = {name: parts[name] for name in (*names, "chinese-llama-plus-lora-7b")}
    monkeypatch.setattr(catalog, "parts", lambda: known)
    base, adapter = HFCheckpoint(family / "base-hf"), Adapter(family / "alpaca-lora")
    base.made_of = ("llama-7b",)
    adapter.__dict__["name"] = "chinese-alpaca-plus-lora-7b"
    with pytest.raises(
        Incompatible, match="chinese-llama-plus-lora-7b,chinese-alpaca-plus-lora-7b"
    ):
        with_lora(base, adapter)
    base.made_of = ("llama-7b", "chinese-llama-plus-lora-7b")
    assert with_lora(base, adapter).made_of == (*base.made_of, "chinese-alpaca-plus-lora-7b")


def changed_adapter(copied, change_tensors=None, **settings):
    """A copy of the llama adapter with other tensors or settings."""
    adapter = copied("llama-lora")
    if change_tensors:
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file(change_tensors(tensors), adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text()) | settings
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return adapter


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: {n: v for n, v in t.items() if "layers.1." not in n}, "no matrices for"),
        (lambda t: {n: v for n, v in t.items() if "v_proj" not in n}, "v_proj"),
        (lambda t: {n: v for n, v in t.items() if "lora_" not in n}, "no matrices for"),
        (lambda t: t | {FIRST.removeprefix("base_model.model."): t[FIRST] + 1}, "too"),
        (lambda t: t | {FIRST.replace("A.w", "A.default.w"): t[FIRST] + 1}, "too"),
        (lambda t: t | {FIRST: t[FIRST][0]}, "matrices"),
        (lambda t: t | {FIRST: t[FIRST][:0]}, "matrices"),
        (lambda t: t | {FIRST: t[FIRST][None]}, "matrices"),
    ],
)
def test_an_adapter_with_too_little_or_too_much_is_refused(family, copied, change, words):
    with pytest.raises(LabError, match=words):
        with_lora(HFCheckpoint(family / "base-hf"), Adapter(changed_adapter(copied, change)))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"r": 16}, "rank 16"),
        ({"rank_pattern": {"q_proj": 99}}, "rank 99 for .*q_proj"),
        ({"alpha_pattern": {"(": 3}}, "cannot be understood"),
        ({"alpha_pattern": {"q_proj": "3"}}, "cannot be understood"),
        ({"alpha_pattern": {"q_proj": None}}, "cannot be understood"),
        ({"alpha_pattern": ["q_proj"]}, "cannot be understood"),
        ({"modules_to_save": 3}, "cannot be understood"),
        ({"modules_to_save": [1]}, "cannot be understood"),
        ({"modules_to_save": "lm_head"}, "cannot be understood"),
    ],
    ids=str,
)
def test_settings_that_are_not_of_these_matrices_are_refused(copied, settings, words):
    with pytest.raises(DamagedFile, match=words):
        Adapter(changed_adapter(copied, **settings))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_whole_embedding_that_is_not_finite_stops_the_merge(family, copied, tmp_path, value):
    def spoil(tensors):
        name, *more = (name for name in tensors if "lm_head" in name)
        tensors[name][7, 3] = value
        return {name: tensor for name, tensor in tensors.items() if name not in more}

    with pytest.raises(DamagedFile, match=r"lm_head\.weight gives values that are not finite"):
        llamalab.merge(family / "base", changed_adapter(copied, spoil), tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
