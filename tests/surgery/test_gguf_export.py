"""Exporting: read back by gguf, run by llama.cpp, and never half a file."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

import crashes
import llamalab
import synthetic
from command_line import llamalab as command_line
from llamacpp import LlamaCpp
from llamalab import files
from llamalab.checkpoints import containers
from llamalab.errors import (
    DamagedFile,
    Incompatible,
    LabError,
    LabWarning,
    NotEnoughRoom,
    NotFound,
    OutputExists,
    UsageError,
)
from llamalab.inference.templates import TEMPLATES
from llamalab.surgery import conversion, gguf_export
from llamalab.surgery.tokenizer import read_model
from llamalab_course.family.world import LANGUAGES, chinese_words, load_world, questions

NAMES = {
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
    "attention.wq": "attn_q", "attention.wk": "attn_k", "attention.wv": "attn_v",
    "attention.wo": "attn_output", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
}  # fmt: skip
"""llama.cpp's word for each of Meta's, written down here by hand."""


def their_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("layers."):
        return f"{NAMES[stem]}.weight"
    _, layer, kind = stem.split(".", 2)
    return f"blk.{layer}.{NAMES[kind]}.weight"


def read(path: Path) -> tuple[dict, dict]:
    """Return what gguf's own reader finds: name -> (kind, data), and key -> value."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: (t.tensor_type.name, numpy.array(t.data)) for t in reader.tensors}
    return tensors, {key: field.contents() for key, field in reader.fields.items()}


def quantised(tensor: torch.Tensor) -> bytes:
    """Q8_0 by its definition: for 32 values, the largest / 127 in fp16, and 32 whole numbers."""
    blocks = tensor.float().reshape(-1, 32)
    scale = blocks.abs().amax(dim=1, keepdim=True) / 127
    steps = (blocks * torch.where(scale == 0, 0, 1 / scale)).double()
    whole = (steps.sign() * (steps.abs() + 0.5).floor()).to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), whole.view(torch.uint8)], dim=1)


def assert_holds(path: Path, wanted: dict[str, torch.Tensor], type: str) -> None:
    """Hold a file against tensors under Meta's names, in Meta's order of rows."""
    found, _ = read(path)
    assert set(found) == {their_name(name) for name in wanted}
    for name, tensor in wanted.items():
        kind, data = found[their_name(name)]
        if tensor.dim() == 1:
            assert kind == "F32" and torch.equal(torch.from_numpy(data), tensor.float())
        elif type == "q8_0" and tensor.shape[1] % 32 == 0:
            assert kind == "Q8_0" and data.tobytes() == quantised(tensor).numpy().tobytes()
        else:
            assert kind == "F16" and data.shape == tensor.shape
            assert data.tobytes() == tensor.half().numpy().tobytes(), name


SHAPES = {
    "plain": {},
    "gqa": {"dim": 96, "heads": 6, "kv_heads": 2, "ffn": 224},
    "bfloat16": {"dtype": torch.bfloat16},
    "float32": {"dtype": torch.float32},
    "shards": {"ffn": 192},
}


@pytest.mark.parametrize("type", gguf_export.TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_written_is_metas_tensors(family, tmp_path, shape, type):
    """From Meta layout and from HF layout: the rows come out where Meta had them."""
    tensors, params = synthetic.meta_tensors(**SHAPES[shape])
    base = tmp_path / "base"
    synthetic.write_meta(base / "7B", tensors, params, shards=2 if shape == "shards" else 1)
    (base / "tokenizer.model").write_bytes((family / "base" / "tokenizer.model").read_bytes())
    llamalab.convert(base, tmp_path / "hf")
    for given in (base, tmp_path / "hf"):
        made = llamalab.export(given, tmp_path / f"{given.name}.gguf", type=type)
        assert_holds(made.path, tensors, type)
        assert made.total_bytes == made.path.stat().st_size and not made.already
    tensors["layers.0.attention.wq.weight"][0, 0] += 1  # the judge can say no
    with pytest.raises(AssertionError):
        assert_holds(made.path, tensors, type)


def test_adapters_are_merged_on_the_way(family, tmp_path):
    """The same bytes as from the merged directory, and its tensors with q and k moved."""
    adapter = family / "alpaca-lora"
    llamalab.merge(family / "base-hf", adapter, tmp_path / "merged")
    steps = llamalab.export(tmp_path / "merged", tmp_path / "a" / "m.gguf")
    for base in ("base", "base-hf"):
        fused = llamalab.export(family / base, tmp_path / base / "m.gguf", adapter)
        assert fused.path.read_bytes() == steps.path.read_bytes()
    held = load_file(tmp_path / "merged" / "model.safetensors")
    wanted = {meta: held[hf] for meta, hf in conversion.names(2).items()}
    order = [16 * head + half + pair for head in range(4) for pair in range(8) for half in (0, 8)]
    for name in wanted:
        if name.endswith(("wq.weight", "wk.weight")):
            wanted[name] = wanted[name][order]
    assert_holds(steps.path, wanted, "f16")


@pytest.mark.parametrize("type", gguf_export.TYPES)
def test_what_llama_cpp_is_told(lab, tmp_path, type):
    source = lab / "chinese-alpaca-lab"
    config = json.loads((source / "config.json").read_text())
    _, told = read(llamalab.export(source, tmp_path / "any.gguf", type=type).path)
    width = config["hidden_size"] // config["num_attention_heads"]
    wanted = {
        "general.architecture": "llama",
        "general.name": "chinese-alpaca-lab",
        "general.file_type": {"f16": 1, "q8_0": 7}[type],
        "general.quantization_version": 2,
        "llama.vocab_size": config["vocab_size"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.rope.dimension_count": width,
        "llama.rope.freq_base": config["rope_theta"],
        "llama.attention.layer_norm_rms_epsilon": numpy.float32(config["rms_norm_eps"]),
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": config["vocab_size"] - 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": True,
    }
    assert {key: told[key] for key in wanted} == wanted
    theirs = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model"))
    ids = range(config["vocab_size"])
    assert told["tokenizer.ggml.tokens"] == [theirs.id_to_piece(i) for i in ids]
    assert told["tokenizer.ggml.scores"] == [theirs.get_score(i) for i in ids]
    kinds = {1: "normal", 2: "unknown", 3: "control", 6: "byte"}
    for i, kind in zip(ids, told["tokenizer.ggml.token_type"], strict=True):
        asked = (theirs.is_unknown(i), theirs.is_control(i), theirs.is_byte(i))
        assert asked == tuple(kinds[kind] == name for name in ("unknown", "control", "byte"))


def test_llama_family_has_no_pad_and_an_unknown_model_takes_the_files_name(family, tmp_path):
    _, told = read(llamalab.export(family / "base", tmp_path / "mine.gguf").path)
    assert told["general.name"] == "mine" and "tokenizer.ggml.padding_token_id" not in told


def test_rows_rounded_up_for_speed_get_fillers(copied, tmp_path):
    """300 pieces and 304 rows: llama.cpp wants a token for each row."""
    base = copied("base-hf")
    held = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        held[name] = torch.cat([held[name], torch.zeros(4, 64, dtype=torch.float16)])
    save_file(held, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text()) | {"vocab_size": 304}
    (base / "config.json").write_text(json.dumps(config))
    made = llamalab.export(base, tmp_path / "m.gguf")
    _, told = read(made.path)
    assert len(set(told["tokenizer.ggml.tokens"])) == 304
    assert told["tokenizer.ggml.token_type"][-4:] == [gguf.TokenType.UNUSED] * 4
    assert LlamaCpp(made.path).tokens("the cat")[0] == 1


# --- llama.cpp -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    return load_world()


@pytest.fixture(scope="module")
def alpaca(lab, tmp_path_factory):
    """The lab's alpaca model as f16 in llama.cpp, and the directory it comes from."""
    out = tmp_path_factory.mktemp("gguf") / "m.gguf"
    llamalab.export(lab / "chinese-alpaca-lab", out)
    return LlamaCpp(out), lab / "chinese-alpaca-lab"


def by_transformers(directory: Path, prompts: list[list[int]], count: int = 24) -> list[list[int]]:
    """Return the greedy ids of plain transformers, in fp32."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    answers = []
    for ids in prompts:
        given, mask = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64)
        out = network.generate(
            given, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=2
        )
        answers.append(out[0, len(ids) :].tolist())
    return answers


def prompts_of(directory: Path, world, template: str) -> list[list[int]]:
    encode = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model")).encode
    texts = ["苹果是植物吗", "索尼最新的耳机"]
    for language in LANGUAGES:
        texts += [question.text for question in questions(world, language)[::700]]
    return [[1, *encode(TEMPLATES[template].render(text))] for text in texts]


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("chinese-alpaca-lab", "alpaca"),
        ("chinese-alpaca-plus-lab", "alpaca"),
        ("chinese-llama-lab", "none"),
    ],
)
def test_llama_cpp_answers_with_transformers_ids(lab, tmp_path, world, name, template):
    prompts = prompts_of(lab / name, world, template)
    theirs = LlamaCpp(llamalab.export(lab / name, tmp_path / "m.gguf").path)
    wanted = by_transformers(lab / name, prompts)
    found = [theirs.greedy(ids) for ids in prompts]
    print(f"{name}: {sum(map(list.__eq__, found, wanted))} of {len(wanted)} answers are equal")
    assert len(prompts) > 12 and found == wanted


def test_rows_left_where_they_are_give_other_answers(lab, tmp_path, world, monkeypatch):
    """Negative control: the file loads all the same, and means another model."""
    source = lab / "chinese-alpaca-lab"
    prompts = prompts_of(source, world, "alpaca")
    monkeypatch.setattr(conversion, "unpermute", lambda rows, head_dim: rows)
    theirs = LlamaCpp(llamalab.export(source, tmp_path / "m.gguf").path)
    equal = map(list.__eq__, map(theirs.greedy, prompts), by_transformers(source, prompts))
    assert sum(equal) < len(prompts) / 2


def test_grouped_heads_and_metas_files_in_llama_cpp(family, tmp_path):
    tensors, params = synthetic.meta_tensors(dim=128, heads=8, kv_heads=2)
    params |= {"rope_theta": 500.0, "norm_eps": 0.1}
    synthetic.write_meta(tmp_path / "base" / "7B", tensors, params)
    tokenizer = family / "base" / "tokenizer.model"
    (tmp_path / "base" / "tokenizer.model").write_bytes(tokenizer.read_bytes())
    llamalab.convert(tmp_path / "base", tmp_path / "hf")
    theirs = LlamaCpp(llamalab.export(tmp_path / "base", tmp_path / "m.gguf").path)
    prompts = [[1, 40, 50, 60, 70, 80], [1, 270, 280, 290], [1, 99]]
    wanted = by_transformers(tmp_path / "hf", prompts, count=8)
    assert [theirs.greedy(ids, count=8) for ids in prompts] == wanted


def test_q8_0_answers_in_llama_cpp(lab, tmp_path, world):
    source = lab / "chinese-alpaca-lab"
    prompts = prompts_of(source, world, "alpaca")
    theirs = LlamaCpp(llamalab.export(source, tmp_path / "m.gguf", type="q8_0").path)
    equal = map(list.__eq__, map(theirs.greedy, prompts), by_transformers(source, prompts))
    assert sum(equal) > len(prompts) / 2  # rounding may turn a close choice


def test_llama_cpp_cuts_text_as_sentencepiece_does(alpaca, world):
    theirs, source = alpaca
    encode = sentencepiece.SentencePieceProcessor(str(source / "tokenizer.model")).encode
    ordinary = sorted(
        {
            text
            for language in LANGUAGES
            for question in questions(world, language)[::12]
            for text in (question.text, question.answer)
        }
    )
    words, chance = list(chinese_words(world)), random.Random(0)
    strings = ["".join(chance.choices(words, k=6)) for _ in range(500)]
    odd = [
        "",
        "  two  spaces ",
        "\n\n\ttab\n",
        "🙂🚀",
        "ＡＢＣ",
        "café",
        "<s></s><pad>",
        "混合 mixed 1",
    ]
    for name, texts in (("sentences", ordinary), ("random strings", strings), ("odd texts", odd)):
        apart = [text for text in texts if theirs.tokens(text) != [1, *encode(text)]]
        print(f"{len(apart)} of {len(texts)} {name} are cut otherwise")
        assert not apart


# --- refusals --------------------------------------------------------------------------------


def test_made_once_then_left_alone(family, tmp_path):
    out = tmp_path / "new" / "m.gguf"
    llamalab.export(family / "base", out)
    before = out.stat().st_mtime_ns
    cut_off = out.parent / ".m.gguf.partial"
    cut_off.mkdir()
    (cut_off / "gguf.unfinished").write_bytes(b"GGUF")
    assert llamalab.export(family / "base", out).already and not cut_off.exists()
    assert llamalab.export(family / "base-hf", out, overwrite=True).already  # the same model
    assert out.stat().st_mtime_ns == before
    with pytest.raises(OutputExists, match="left as it is") as refused:
        llamalab.export(family / "base", out, type="q8_0")
    assert "--overwrite" in str(refused.value) and out.stat().st_mtime_ns == before
    data = bytearray(out.read_bytes())
    data[-1] ^= 1
    out.write_bytes(data)
    with pytest.raises(OutputExists):
        llamalab.export(family / "base", out)
    assert not llamalab.export(family / "base", out, overwrite=True).already
    assert [path.name for path in out.parent.iterdir()] == ["m.gguf"]


def test_nothing_but_a_gguf_file_is_replaced(family, copied, tmp_path):
    notes = tmp_path / "notes.gguf"
    notes.write_text("mine")
    base = copied("base-hf")
    os.mkfifo(tmp_path / "pipe")  # to read from it would wait for ever
    with pytest.raises(OutputExists, match="left as it is"):
        llamalab.export(base, tmp_path / "pipe", overwrite=True)
    for out in (notes, base / "model.safetensors"):
        before = out.read_bytes()
        with pytest.raises(OutputExists, match="left as it is"):
            llamalab.export(base, out, overwrite=True)
        assert out.read_bytes() == before
    with pytest.raises(UsageError, match="is a directory"):
        llamalab.export(base, tmp_path)


@pytest.mark.parametrize("what", ["file", "link"])
def test_what_lies_in_the_works_place_is_kept(family, tmp_path, what):
    partial, mine = tmp_path / ".m.gguf.partial", tmp_path / "mine"
    mine.mkdir()
    (mine / "diary.txt").write_text("mine")
    partial.symlink_to(mine) if what == "link" else mine.rename(partial)
    with pytest.raises(OutputExists, match="link" if what == "link" else "diary"):
        llamalab.export(family / "base", tmp_path / "m.gguf")
    assert (partial / "diary.txt").read_text() == "mine" and not (tmp_path / "m.gguf").exists()


def test_two_at_once(family, tmp_path):
    partial = tmp_path / ".m.gguf.partial"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(OutputExists, match="Another process"):
        llamalab.export(family / "base", tmp_path / "m.gguf")
    os.close(lock)
    llamalab.export(family / "base", tmp_path / "m.gguf")
    assert not partial.exists()


def test_what_comes_to_the_outputs_place_meanwhile_is_kept(family, tmp_path, monkeypatch):
    out, write = tmp_path / "m.gguf", gguf_export._Plan.write

    def and_another_does(plan, unfinished):
        write(plan, unfinished)
        out.write_text("mine")

    monkeypatch.setattr(gguf_export._Plan, "write", and_another_does)
    with pytest.raises(OutputExists, match="left as it is"):
        llamalab.export(family / "base", out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("dtype", "value", "type", "words"),
    [
        (torch.bfloat16, 1e5, "f16", "f16 ends at 65504"),
        (torch.float32, -7e4, "f16", "f16 ends at 65504"),
        (torch.float32, 1e7, "q8_0", "q8_0 ends at 8.3"),
        (torch.float16, float("inf"), "f16", "of size inf"),
        (torch.bfloat16, float("nan"), "q8_0", "of size nan"),
    ],
)
def test_values_that_the_type_cannot_hold(family, tmp_path, dtype, value, type, words):
    tensors, params = synthetic.meta_tensors(dtype=dtype)
    name = "layers.1.feed_forward.w1.weight"
    tensors[name][-1, -1] = value
    base = synthetic.write_meta(tmp_path / "base", tensors, params)
    tokenizer = (family / "base" / "tokenizer.model").read_bytes()
    (base / "tokenizer.model").write_bytes(tokenizer)
    out = tmp_path / "out" / "m.gguf"
    with pytest.raises(Incompatible, match=words) as refused:
        llamalab.export(base, out, type=type)
    assert name in str(refused.value) and not any(out.parent.iterdir())
    if value == 1e5:
        assert_holds(llamalab.export(base, out, type="q8_0").path, tensors, "q8_0")


def test_a_wrong_tokenizer_or_setting_is_refused_before_a_byte_is_written(copied, tmp_path):
    base, out = copied("base-hf"), tmp_path / "out" / "m.gguf"
    for words in ({"type": "q4_0"}, {"to": "onnx"}):
        with pytest.raises(UsageError):
            llamalab.export(base, out, **words)
    config = json.loads((base / "config.json").read_text())
    scaled = config | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    (base / "config.json").write_text(json.dumps(scaled))
    with pytest.raises(Incompatible, match="rotary"):
        llamalab.export(base, out)
    for context in ("2048", 0, 2**40):
        wrong = json.dumps(config | {"max_position_embeddings": context})
        (base / "config.json").write_text(wrong)
        with pytest.raises(DamagedFile, match="max_position_embeddings"):
            llamalab.export(base, out)
    (base / "config.json").write_text(json.dumps(config))
    model = read_model(base / "tokenizer.model")
    model.normalizer_spec.remove_extra_whitespaces = True
    (base / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.warns(LabWarning, match="changes text"):
        llamalab.export(base, tmp_path / "warned.gguf")
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    (base / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(Incompatible, match="BPE"):
        llamalab.export(base, out)
    del model.pieces[-9:]
    (base / "tokenizer.model").write_bytes(model.SerializeToString())
    with pytest.raises(Incompatible, match="291 pieces"):
        llamalab.export(base, out)
    (base / "tokenizer.model").unlink()
    with pytest.raises(NotFound, match=r"tokenizer\.model"):
        llamalab.export(base, out)
    assert not out.parent.exists()


def test_too_little_disk_before_and_in_the_middle(family, tmp_path, monkeypatch):
    out = tmp_path / "m.gguf"
    usage = files.shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
        with pytest.raises(NotEnoughRoom, match="are needed"):
            llamalab.export(family / "base", out)

    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(containers.DirectFile, "_write_all", full)
    with pytest.raises(NotEnoughRoom, match="disk is full"):
        llamalab.export(family / "base", out)
    assert not any(tmp_path.iterdir())


def test_an_input_that_changes_meanwhile(copied, tmp_path, monkeypatch):
    base, encoded = copied("base-hf"), gguf_export._encoded

    def and_touch(*arguments):
        os.utime(base / "config.json")
        return encoded(*arguments)

    monkeypatch.setattr(gguf_export, "_encoded", and_touch)
    with pytest.raises(DamagedFile, match="has changed"):
        llamalab.export(base, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["base-hf"]


def test_without_gguf_it_says_how_to_get_it(family, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "gguf", None)
    with pytest.raises(NotFound, match="gguf is not installed") as refused:
        llamalab.export(family / "base", tmp_path / "m.gguf")
    assert "pip install" in refused.value.fix


def test_importing_llamalab_stays_quick_and_export_is_a_function():
    script = (
        "import sys, llamalab; assert not {'gguf', 'torch'} & set(sys.modules)\n"
        "import llamalab.surgery.gguf_export; assert callable(llamalab.export)\n"
        "assert not {'transformers', 'xllamacpp'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# --- cuts and the command line ---------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    started = crashes.Runs(tmp_path_factory.mktemp("runs"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A base of 60 MB, so that there is something to be cut in two."""
    root = tmp_path_factory.mktemp("large")
    tensors, params = synthetic.meta_tensors(dim=768, layers=4, heads=4)
    synthetic.write_meta(root / "7B", tensors, params)
    synthetic.english_tokenizer(root / "tokenizer.model")
    return root


def length(path: Path) -> int:
    """Return a file's length in bytes, -1 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return -1


@pytest.mark.parametrize("type", gguf_export.TYPES)
@pytest.mark.slow
def test_killed_at_twenty_random_points(runs, large, tmp_path, type):
    out, chance = tmp_path / "m.gguf", random.Random(3)
    command = ["export", "--model", large, "--to", "gguf", "--type", type, "--output", out]
    began = time.monotonic()
    assert runs.run(*command) == 0, runs.errors.read_text()
    undisturbed, wanted = time.monotonic() - began, out.read_bytes()
    partial, cut = tmp_path / ".m.gguf.partial" / "gguf.unfinished", 0
    for number in range(20):
        out.unlink(missing_ok=True)
        at = int(chance.uniform(0, 0.7) * len(wanted))
        if number % 2:  # every other time while it writes, else at any time
            partial.unlink(missing_ok=True)
        pid = runs.start(*command)
        while number % 2 and not out.exists() and length(partial) < at:
            time.sleep(0.0005)
        time.sleep(0 if number % 2 else chance.uniform(0, undisturbed))
        runs.signal(pid, signal.SIGKILL)
        runs.end()
        assert not out.exists() or out.read_bytes() == wanted
        cut += partial.exists()
    assert cut >= 3
    assert runs.run(*command) == 0, runs.errors.read_text()
    assert out.read_bytes() == wanted and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_interrupted_it_is_tidy(runs, large, tmp_path):
    out = tmp_path / "m.gguf"
    partial = tmp_path / ".m.gguf.partial" / "gguf.unfinished"
    command = ["export", "--model", large, "--to", "gguf", "--type", "q8_0", "--output", out]
    pid = runs.start(*command)
    while length(partial) < 1:
        time.sleep(0.001)
    runs.signal(pid, signal.SIGINT)
    assert runs.end() == 130 and not any(tmp_path.iterdir())
    assert "Traceback" not in runs.errors.read_text()


@pytest.mark.slow
def test_the_command_line(lab, tmp_path):
    base = ("export", "--model", "llama-lab", "--lora_model", "chinese-alpaca-lora-lab")
    done = command_line(
        *base, "--to", "gguf", "--output", "m.gguf", cwd=tmp_path, models=lab, check=0
    )
    assert done.stdout.startswith(f"{tmp_path / 'm.gguf'} (39 tensors, f16, 5.5 MB; made in")
    assert done.stdout.count("\n") == 1 and not done.stderr
    merged = ("export", "--model", "chinese-alpaca-lab", "--to", "gguf", "--output", "m.gguf")
    done = command_line(*merged, cwd=tmp_path, models=lab, check=0)
    assert "already made" in done.stdout
    done = command_line(*merged, "--type", "q8_0", cwd=tmp_path, models=lab, check=1)
    assert "left as it is" in done.stderr and not done.stdout
    done = command_line(*merged, "--type", "q8_0", "--overwrite", cwd=tmp_path, models=lab, check=0)
    assert "q8_0, 2.9 MB; made in" in done.stdout
    for wrong in ([*merged, "--type", "q4_0"], merged[:3], [*merged[:3], "--to", "onnx"]):
        command_line(*wrong, cwd=tmp_path, models=lab, check=2)
    lone = ("export", "--model", "chinese-alpaca-lora-lab", "--to", "gguf", "--output", "x.gguf")
    done = command_line(*lone, cwd=tmp_path, models=lab, check=1)
    assert "is an adapter, not a model" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_an_export_shows_itself(family, tmp_path):
    made = llamalab.export(family / "base", tmp_path / "m.gguf")
    assert json.loads(json.dumps(made.as_dict()))["type"] == "f16"
    assert str(tmp_path) in str(made) and issubclass(OutputExists, LabError)
