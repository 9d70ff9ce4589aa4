"""Rehearsal: made-up weights are read, converted and merged as real ones are."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import llamalab
import made_up_weights
from llamalab import catalog
from llamalab.catalog import sizes
from llamalab.checkpoints.layouts import MetaCheckpoint
from made_up_weights import SIZES


def test_the_shapes_are_the_catalogues():
    for size, name in (("lab", "llama-lab"), ("7b", "llama-7b"), ("13b", "llama-13b")):
        assert SIZES[size] == catalog.parts()[name].shape


@pytest.mark.parametrize("size", SIZES)
def test_params_give_the_width_by_metas_formula(tmp_path, size, monkeypatch):
    monkeypatch.setattr(made_up_weights, "_write_archive", lambda *_: None)  # only the small files
    folder = made_up_weights.write_base(tmp_path, SIZES[size])
    params = json.loads((folder / "params.json").read_text())
    multiple = params["multiple_of"]
    width = int(params.get("ffn_dim_multiplier", 1) * int(8 * params["dim"] / 3))
    assert -(-width // multiple) * multiple == SIZES[size].ffn


def test_one_file_or_several_convert_and_merge_alike(tmp_path):
    digests = set()
    for shards in (1, 2):
        base = tmp_path / f"base{shards}"
        folder = made_up_weights.write_base(base, SIZES["lab"], shards=shards)
        assert len(list(folder.glob("*.pth"))) == shards
        meta = MetaCheckpoint(base)
        assert meta.total_bytes == sizes.checkpoint_bytes(SIZES["lab"], made_up_weights.VOCABULARY)
        adapter = tmp_path / f"lora{shards}"
        made_up_weights.write_adapter(adapter, SIZES["lab"], base / "tokenizer.model")
        made = llamalab.merge(base, adapter, tmp_path / f"merged{shards}")
        digests.add(made.tensor_digest)
    assert len(digests) == 1
    held = load_file(tmp_path / "merged1" / "model.safetensors")
    assert len(held["lm_head.weight"]) == made_up_weights.EXTENDED
    rows = held["model.layers.1.mlp.up_proj.weight"]
    assert torch.isfinite(rows).all() and len(torch.unique(rows[:100, 0])) > 50
