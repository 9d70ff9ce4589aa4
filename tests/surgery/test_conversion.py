"""Converting: right names, right rows, right numbers, every bit kept, and the way back."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import llamalab
import synthetic
from llamalab.checkpoints.checkpoint import digest_tensors
from llamalab.checkpoints.layouts import HFCheckpoint, MetaCheckpoint
from llamalab.errors import (
    DamagedFile,
    Incompatible,
    LabError,
    OutputExists,
    UsageError,
    WrongLayout,
)
from llamalab.surgery.conversion import as_hf, as_meta, hf_config, permute, unpermute


def meta_forward(tensors: dict, params: dict, ids: list[int]) -> torch.Tensor:
    """LLaMA's equations on Meta's weights, with neighbouring pairs rotated: [length, vocabulary].

    Independent of the package and of transformers. Touvron et al., arXiv:2302.13971; rotary
    embeddings: Su et al., arXiv:2104.09864.
    """
    w = {name: tensor.double() for name, tensor in tensors.items()}
    dim, heads = params["dim"], params["n_heads"]
    kv_heads, size = params.get("n_kv_heads", heads), params["dim"] // params["n_heads"]

    def norm(x, weight):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + params["norm_eps"]) * weight

    theta = params.get("rope_theta", 10000.0) ** (-torch.arange(0, size, 2).double() / size)
    angle = torch.arange(len(ids)).double()[:, None] * theta  # [length, size / 2]
    turn = torch.complex(angle.cos(), angle.sin())[:, None, :]

    def rotate(x):  # [length, heads, size]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], size // 2, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2)

    x = w["tok_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), float("-inf"), dtype=torch.double).triu(1)
    for i in range(params["n_layers"]):
        at = {n.split(".", 2)[2]: t for n, t in w.items() if n.startswith(f"layers.{i}.")}
        h = norm(x, at["attention_norm.weight"])
        q = rotate((h @ at["attention.wq.weight"].T).view(len(ids), heads, size))
        k = rotate((h @ at["attention.wk.weight"].T).view(len(ids), kv_heads, size))
        v = (h @ at["attention.wv.weight"].T).view(len(ids), kv_heads, size)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / size**0.5 + mask
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(len(ids), dim)
        x = x + mixed @ at["attention.wo.weight"].T
        h = norm(x, at["ffn_norm.weight"])
        gate = torch.nn.functional.silu(h @ at["feed_forward.w1.weight"].T)
        x = x + (gate * (h @ at["feed_forward.w3.weight"].T)) @ at["feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def hf_logits(directory, ids) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        return network(torch.tensor([ids])).logits[0].double()


SHAPES = {
    "plain": {},
    "grouped": {"kv_heads": 2},
    "wide": {"dim": 96, "heads": 3, "layers": 3, "ffn": 200},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_logits_equal_the_equations_on_metas_weights(tmp_path, shape, theta):
    tensors, params = synthetic.meta_tensors(**shape)
    params["rope_theta"] = theta
    synthetic.write_meta(tmp_path / "m" / "7B", tensors, params)
    synthetic.english_tokenizer(tmp_path / "m" / "tokenizer.model")
    llamalab.convert(tmp_path / "m", tmp_path / "hf")
    ids = torch.randint(0, 300, (24,), generator=torch.Generator().manual_seed(5)).tolist()
    wanted = meta_forward(tensors, params, ids)
    found = hf_logits(tmp_path / "hf", ids)
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() < 1e-5 * scale

    # Negative control: without the permutation the same files say something else.
    from llamalab.surgery import conversion

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "permute", lambda rows, head_dim: rows)
        llamalab.convert(tmp_path / "m", tmp_path / "wrong")
    assert (hf_logits(tmp_path / "wrong", ids) - wanted).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("shards, kv_heads", [(2, 8), (2, 2), (4, 8), (4, 4), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_convert_to_the_single_files_bytes(tmp_path, shards, kv_heads, dtype):
    """Shards whose tensors share one storage, which is how Meta saved 13B and larger."""
    tensors, params = synthetic.meta_tensors(
        heads=8, kv_heads=kv_heads, ffn=176, vocab=320, dtype=dtype
    )
    made = []
    for count in (1, shards):
        folder = tmp_path / f"in{count}"
        synthetic.write_meta(folder, tensors, params, shards=count, one_storage=count > 1)
        synthetic.english_tokenizer(folder / "tokenizer.model")
        llamalab.convert(folder, tmp_path / f"out{count}")
        made.append((tmp_path / f"out{count}" / "model.safetensors").read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize("shards", [1, 2])
def test_llama_3_is_refused_by_name(tmp_path, shards):
    tensors, params = synthetic.meta_tensors(dim=8, heads=2, layers=1, ffn=24, vocab=128_256)
    # Llama-3 cuts its embedding by rows, which a reader of LLaMA-1 and 2 does not expect.
    rows = tensors.pop("tok_embeddings.weight")
    synthetic.write_meta(tmp_path / "m", tensors, params, shards=shards)
    for number, piece in enumerate(rows.chunk(shards)):
        path = tmp_path / "m" / f"consolidated.{number:02d}.pth"
        held = torch.load(path, weights_only=True)
        torch.save({"tok_embeddings.weight": piece.clone()} | held, path)
    (tmp_path / "m" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(WrongLayout, match="Llama-3"):
        llamalab.convert(tmp_path / "m", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"n_kv_heads": 3},
        {"n_kv_heads": "4"},
        {"n_kv_heads": 4.0},
        {"norm_eps": "1e-5"},
        {"norm_eps": None},
        {"norm_eps": 0},
        {"rope_theta": "abc"},
        {"rope_theta": None},
        {"rope_theta": -1},
    ],
    ids=str,
)
def test_params_that_are_no_numbers_of_a_model_are_refused(copied, tmp_path, change):
    base = copied("base")
    params = base / "7B" / "params.json"
    params.write_text(json.dumps(json.loads(params.read_text()) | change))
    with pytest.raises(DamagedFile, match="heads|eps|theta"):
        llamalab.convert(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_bit_is_kept_and_the_way_back_is_exact(family):
    meta = MetaCheckpoint(family / "base")
    back = as_meta(HFCheckpoint(family / "base-hf"))
    assert back.tensors == meta.tensors
    for name in meta.tensors:
        assert torch.equal(back.read(name), meta.read(name)), name
    assert digest_tensors(back) == digest_tensors(meta)
    plain = HFCheckpoint(family / "base-hf").read("model.layers.1.mlp.up_proj.weight")
    assert torch.equal(plain, meta.read("layers.1.feed_forward.w3.weight"))


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 3), st.data())
def test_permutation_by_index(heads, half, columns, data):
    size = 2 * half
    rows = torch.arange(heads * size * columns).view(heads * size, columns)
    moved = permute(rows, size)
    for head in range(heads):
        for i in range(half):
            assert torch.equal(moved[head * size + i], rows[head * size + 2 * i])
            assert torch.equal(moved[head * size + half + i], rows[head * size + 2 * i + 1])
    assert torch.equal(unpermute(moved, size), rows)


@given(st.data())
def test_any_rows_of_a_view_equal_the_same_rows_of_the_whole(family_view, data):
    name = data.draw(st.sampled_from(list(family_view.tensors)))
    rows = family_view.tensors[name].rows
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    assert torch.equal(family_view.read(name, start, stop), family_view.read(name)[start:stop])


@pytest.fixture(scope="module")
def family_view(family):
    return as_hf(MetaCheckpoint(family / "base"))


def test_the_configuration_says_what_the_tensors_say(family, tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(family / "base-hf")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (64, 2, 300)
    assert config.max_position_embeddings == 2048
    assert config.rms_norm_eps == 1e-5
    base = MetaCheckpoint(family / "base")
    assert hf_config(base, 99)["max_position_embeddings"] == 99
    llamalab.convert(family / "base", tmp_path / "out", context_length=77)
    held = json.loads((tmp_path / "out" / "config.json").read_text())
    assert held["max_position_embeddings"] == 77


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_is_kept(tmp_path, dtype):
    tensors, params = synthetic.meta_tensors(dtype=dtype, layers=1)
    synthetic.write_meta(tmp_path / "m", tensors, params)
    synthetic.english_tokenizer(tmp_path / "m" / "tokenizer.model")
    llamalab.convert(tmp_path / "m", tmp_path / "out")
    made = HFCheckpoint(tmp_path / "out")
    assert {spec.dtype for spec in made.tensors.values()} == {dtype}
    assert torch.equal(made.read("lm_head.weight"), tensors["output.weight"])


def test_params_that_do_not_fit_the_tensors_are_refused(copied, tmp_path):
    base = copied("base")
    params = base / "7B" / "params.json"
    held = json.loads(params.read_text())
    params.write_text(json.dumps(held | {"n_layers": 3}))
    with pytest.raises(DamagedFile, match="layers.2"):
        llamalab.convert(base, tmp_path / "out")
    params.write_text(json.dumps(held | {"n_layers": 1}))
    with pytest.raises(DamagedFile, match="would be lost|does not have"):
        llamalab.convert(base, tmp_path / "out")
    params.write_text(json.dumps(held | {"dim": 128}))
    with pytest.raises(DamagedFile, match="shape"):
        llamalab.convert(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "files, words",
    [
        ({"notes.txt": "mine"}, "not a model"),
        ({"config.json": "{}"}, "not a model"),
        ({"config.json": '{"port": 80}', "src/app.py": "mine"}, "not a model"),
        ({"config.json": '{"model_type": "llama"}', "notes.txt": "mine"}, "notes.txt"),
        ({"config.json": '{"model_type": "llama"}', "src/app.json": "mine"}, "src"),
    ],
)
def test_an_output_of_something_else_is_left_alone(family, tmp_path, files, words):
    out = tmp_path / "out"
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    for overwrite, said in ((False, "not empty"), (True, words)):
        with pytest.raises(OutputExists, match=said):
            llamalab.convert(family / "base", out, overwrite=overwrite)
    for name, text in files.items():
        assert (out / name).read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_model_of_somebody_elses_is_replaced_on_request(family, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text('{"model_type": "llama"}')
    (out / "pytorch_model.bin").write_bytes(b"old")
    llamalab.convert(family / "base", out, overwrite=True)
    assert (out / "model.safetensors").exists() and not (out / "pytorch_model.bin").exists()


def test_a_base_of_links_is_not_written_over(family, tmp_path):
    """As the Hub's cache has it: the names are links to files elsewhere."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in (family / "base-hf").iterdir():
        (snapshot / path.name).symlink_to(path)
    before = sorted(path.name for path in snapshot.iterdir())
    with pytest.raises(UsageError, match="holds an input"):
        llamalab.merge(snapshot, family / "llama-lora", snapshot, overwrite=True)
    assert sorted(path.name for path in snapshot.iterdir()) == before


def test_inputs_are_never_written_over(copied):
    base = copied("base")
    before = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    for out in (base, base / "7B", base.parent):
        with pytest.raises(UsageError, match="holds an input"):
            llamalab.convert(base, out, overwrite=True)
    assert {p: p.read_bytes() for p in base.parent.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "change, words",
    [
        ({"vocab_size": 301}, "shape"),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_attention_heads": 64}, "heads"),
        ({"tie_word_embeddings": True}, "ties"),
    ],
    ids=str,
)
def test_a_borrowed_config_json_is_refused(copied, change, words):
    """It must not come to answers from weights that were never loaded."""
    made = copied("base-hf")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(LabError, match=words):
        as_hf(HFCheckpoint(made))
    with pytest.raises(LabError, match=words):
        llamalab.load(made, device="cpu")


def test_the_context_length_can_be_set_on_hf_input_too(family):
    held = HFCheckpoint(family / "base-hf")
    assert as_hf(held).config["max_position_embeddings"] == 2048
    assert as_hf(held, 4096).config["max_position_embeddings"] == 4096


def test_positions_that_metas_layout_cannot_say(family):
    held = HFCheckpoint(family / "base-hf")
    held.config["rope_parameters"] = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
    with pytest.raises(Incompatible, match="rotary"):
        as_meta(as_hf(held))


def test_shards_that_do_not_belong_together(tmp_path):
    tensors, params = synthetic.meta_tensors()
    synthetic.write_meta(tmp_path / "m", tensors, params, shards=2)
    synthetic.english_tokenizer(tmp_path / "m" / "tokenizer.model")
    path = tmp_path / "m" / "consolidated.01.pth"
    whole = torch.load(path, weights_only=True)
    torch.save(whole | {"norm.weight": whole["norm.weight"] + 1}, path)
    with pytest.raises(DamagedFile, match="norm.weight differs"):
        MetaCheckpoint(tmp_path / "m")
    torch.save(whole | {"extra.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(DamagedFile, match="extra.weight"):
        MetaCheckpoint(tmp_path / "m")


def test_the_working_directory_itself_can_be_the_input(family, tmp_path, monkeypatch):
    monkeypatch.chdir(family / "base" / "7B")
    llamalab.convert(".", tmp_path / "out")
