"""Reading: both layouts, every wrong thing in their place, and no code from a pickle."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamalab.checkpoints.checkpoint import BLOCK_BYTES, TensorSpec
from llamalab.checkpoints.layouts import HFCheckpoint, MetaCheckpoint, open_checkpoint
from llamalab.errors import DamagedFile, LabError, NotFound, WrongLayout


@given(
    st.sampled_from([torch.float16, torch.float32]), st.integers(1, 10**6), st.integers(1, 10**5)
)
def test_blocks_cover_the_rows_in_order(dtype, rows, columns):
    spec = TensorSpec(dtype, (rows, columns))
    if spec.nbytes > 10**11:
        return
    cut = list(spec.blocks())
    assert cut[0][0] == 0 and cut[-1][1] == rows
    assert all(a[1] == b[0] for a, b in zip(cut, cut[1:], strict=False))
    row = columns * dtype.itemsize
    assert all((b - a) * row <= max(BLOCK_BYTES, row) for a, b in cut)


def test_both_layouts_open_as_what_they_are(family):
    assert open_checkpoint(family / "base").layout == "meta"
    assert open_checkpoint(family / "base" / "7B").layout == "meta"
    made = open_checkpoint(family / "base-hf")
    assert (made.layout, made.vocab_size, made.dtype) == ("hf", 300, torch.float16)
    assert made.total_bytes == sum(made.read(name).nbytes for name in made.tensors)


def test_tokenizer_beside_or_above(family, tmp_path):
    shutil.copytree(family / "base" / "7B", tmp_path / "flat")
    with pytest.raises(NotFound, match="tokenizer.model"):
        MetaCheckpoint(tmp_path / "flat")
    shutil.copy(family / "base" / "tokenizer.model", tmp_path / "flat")
    assert MetaCheckpoint(tmp_path / "flat").tokenizer == tmp_path / "flat" / "tokenizer.model"


def test_several_sizes_need_a_choice(family, copied):
    base = copied("base")
    shutil.copytree(base / "7B", base / "13B")
    with pytest.raises(WrongLayout, match="13B, 7B"):
        MetaCheckpoint(base)
    assert MetaCheckpoint(base, "13B").directory == base / "13B"
    with pytest.raises(WrongLayout, match="not 30B"):
        MetaCheckpoint(base, "30B")


def test_the_other_layout_is_named(family, tmp_path):
    with pytest.raises(WrongLayout, match="HF layout already"):
        MetaCheckpoint(family / "base-hf")
    with pytest.raises(WrongLayout, match="does not appear to have a file named config.json"):
        HFCheckpoint(family / "base")
    with pytest.raises(WrongLayout, match="adapter, not a model"):
        open_checkpoint(family / "llama-lora")
    with pytest.raises(WrongLayout, match="config.json, nor params.json"):
        open_checkpoint(tmp_path)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(copied, tmp_path, zipped):
    base, mark = copied("base"), tmp_path / "pwned"
    path = base / "7B" / "consolidated.00.pth"
    if zipped:
        torch.save({"tok_embeddings.weight": Attack(mark)}, path)
    else:
        path.write_bytes(pickle.dumps(Attack(mark)))
    with pytest.raises(DamagedFile, match="refused|cannot be read"):
        MetaCheckpoint(base)
    assert not mark.exists()
    # Negative control: read carelessly, the same object does run its code.
    pickle.loads(pickle.dumps(Attack(mark)))
    assert mark.exists()


@pytest.mark.parametrize(
    "content, cause",
    [
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
        (b"", "empty"),
        (b"PK\x03\x04" + b"\0" * 500, "cut off"),
        (b"\x80\x02}q\x00.", "bare pickle|1.6"),
        (os.urandom(3000), "Not a PyTorch file|cannot be read"),
    ],
    ids=["html", "lfs", "empty", "truncated", "old", "noise"],
)
def test_what_lies_in_the_weights_place_is_named(copied, content, cause):
    base = copied("base")
    (base / "7B" / "consolidated.00.pth").write_bytes(content)
    with pytest.raises(DamagedFile, match=cause):
        MetaCheckpoint(base)


def test_damaged_safetensors_and_json(copied):
    made = copied("base-hf")
    weights = made / "model.safetensors"
    content = weights.read_bytes()
    for damaged in (content[:100], b"<html></html>", content[:-10], b"\xff" * 50):
        weights.write_bytes(damaged)
        with pytest.raises(DamagedFile, match="cannot be read"):
            HFCheckpoint(made)
    weights.write_bytes(content)
    for text in ("", "[]", "{", "<html>"):
        (made / "config.json").write_text(text)
        with pytest.raises(DamagedFile, match="config.json"):
            HFCheckpoint(made)
    (made / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(WrongLayout, match="gpt2"):
        HFCheckpoint(made)


def test_a_missing_shard_is_named(family, tmp_path):
    import llamalab

    llamalab.convert(family / "base", tmp_path / "m", max_shard_size="60KB")
    gone = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(NotFound, match=gone.name):
        HFCheckpoint(tmp_path / "m")
    for file in (tmp_path / "m").glob("model*"):
        file.unlink()
    with pytest.raises(NotFound, match="no weights"):
        HFCheckpoint(tmp_path / "m")


def test_bin_files_are_read_as_safetensors_are(family, tmp_path):
    from safetensors.torch import load_file

    shutil.copytree(family / "base-hf", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "model.safetensors").unlink()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    torch.save(tensors, tmp_path / "m" / "pytorch_model.bin")
    found, wanted = HFCheckpoint(tmp_path / "m"), HFCheckpoint(family / "base-hf")
    assert set(found.tensors) == set(wanted.tensors)
    assert all(torch.equal(found.read(name), wanted.read(name)) for name in wanted.tensors)


def test_quantised_weights_are_refused(copied):
    base = copied("base")
    path = base / "7B" / "consolidated.00.pth"
    tensors = torch.load(path, weights_only=True)
    tensors["norm.weight"] = torch.zeros(64, dtype=torch.int8)
    torch.save(tensors, path)
    with pytest.raises(DamagedFile, match="int8"):
        MetaCheckpoint(base)


@given(st.binary(max_size=400))
def test_no_bytes_at_all_give_anything_but_a_clear_error(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("noise")
    for name in ("consolidated.00.pth", "params.json", "tokenizer.model"):
        (folder / name).write_bytes(content)
    with pytest.raises(LabError):
        MetaCheckpoint(folder)
