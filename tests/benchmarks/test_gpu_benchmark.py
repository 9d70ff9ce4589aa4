"""The GPU benchmark, rehearsed at lab size on a CPU; its step against transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from llamalab.catalog import project_directory

HERE = project_directory() / "benchmarks"
sys.path.append(str(HERE))

import fused_decode  # noqa: E402

SHAPES = {"multi-head": 4, "grouped-query": 2}
VOCAB = 203
PROMPT = [1, 5, 99, 30, 17, 4]

BLOCKED = (
    "papermill ipywidgets anywidget nbclient nbformat nbconvert jupyter jupyter_client IPython"
)
BLOCKED += " ipykernel gguf xllamacpp"

WITHOUT_NOTEBOOKS = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(name + " is not there")
sys.meta_path.insert(0, Blocker())
import runpy
sys.argv = {words}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(autouse=True)
def one_thread():
    """The networks here are too small to be shared between threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rehearsed(tmp_path, *words: str) -> tuple[dict, str]:
    """Run the benchmark where the notebook half cannot be imported; return figures and output."""
    command = [str(HERE / "gpu.py"), "--size", "lab", "--device", "cpu", "--backend", "eager"]
    command += ["--json", str(tmp_path / "figures.json"), *words]
    code = WITHOUT_NOTEBOOKS.format(blocked=set(BLOCKED.split()), words=command)
    path = os.pathsep.join([str(project_directory() / "lib"), str(HERE)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    figures = tmp_path / "figures.json"
    assert figures.exists(), done.stdout + done.stderr
    return json.loads(figures.read_text()), done.stdout


@pytest.mark.slow
def test_the_benchmark_runs_without_the_notebook_half(tmp_path):
    held, output = rehearsed(tmp_path, "--stages", "card,ours=eager/sdpa")
    names = [line["name"] for line in held["lines"]]
    assert names.count("stage") == 2 and "ours eager/sdpa, bf16" in names
    assert not [line for line in held["lines"] if {"failed", "stopped"} & set(line)], output
    ours = held["lines"][names.index("ours eager/sdpa, bf16")]
    assert 8 * ours["host_reads"] <= ours["tokens"] and ours["error"] < 0.05
    assert "of a copy (goal" in held["goals"][0]


@pytest.mark.heavy
def test_every_stage_gives_its_lines_without_the_notebook_half(tmp_path):
    stages = "card equal ours lean lab peers more batches quantized course".split()
    held, output = rehearsed(tmp_path, "--stages", ",".join(stages))
    ends = {line["stage"]: line for line in held["lines"] if line["name"] == "stage"}
    assert list(ends) == stages
    assert sum("same" in line for line in held["lines"]) == 8
    for name, end in ends.items():
        own = [one for one in held["lines"] if one["stage"] == name and one is not end]
        assert own and "failed" not in end and "stopped" not in end, (name, output)
    assert not [line for line in held["lines"] if "failed" in line]
    for line in held["lines"]:
        assert f"| {line['stage']} | {line['name']} |" in output
        if line["stage"] == "lab" or line["name"].endswith("fp32"):
            assert line.get("same") == line.get("of"), line
        if "host_reads" in line:
            assert 8 * line["host_reads"] <= line["tokens"] and line["recompiled"] == 0
    assert any("of a copy (goal" in text for text in held["goals"])


def test_a_stage_that_hangs_or_fails_costs_only_itself(tmp_path, monkeypatch):
    import gpu
    import gpu_stages

    def hangs(setting):
        import time

        setting.line("before")
        time.sleep(600)

    monkeypatch.setattr(gpu_stages, "card", hangs)
    monkeypatch.setattr(gpu_stages, "equal", lambda setting: 1 / 0)
    monkeypatch.setattr(gpu_stages, "ours", lambda setting: setting.line("after"))
    monkeypatch.setitem(gpu.STAGES, "card", (1, ()))
    figures = tmp_path / "figures.json"
    words = ["--size", "lab", "--device", "cpu", "--stages", "card,equal,ours"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--json", str(figures)])
    assert gpu.main() == 1
    lines = json.loads(figures.read_text())["lines"]
    assert [line["name"] for line in lines] == ["before", "stage", "stage", "after", "stage"]
    assert "stopped" in lines[1] and "ZeroDivisionError" in lines[2]["failed"]
    assert len(lines[4]) == 3


def network_and_weights(kv_heads: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    from llamalab.catalog import Shape

    torch.manual_seed(0)
    shape = Shape(dim=64, layers=2, heads=4, kv_heads=kv_heads, ffn=96)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=VOCAB,
        rms_norm_eps=1e-6,
    )
    network = LlamaForCausalLM(config).eval()
    for weight in network.parameters():
        if weight.dim() == 2:
            weight.data.normal_(std=0.15)
    network.generation_config.eos_token_id = None
    weights = fused_decode.fuse({name: w.data for name, w in network.state_dict().items()})
    return network, weights, shape


def greedy(network, ids: list[int], count: int) -> list[int]:
    given = torch.tensor([ids])
    settings = {"attention_mask": torch.ones_like(given), "do_sample": False, "pad_token_id": 0}
    return network.generate(given, max_new_tokens=count, **settings)[0, len(ids) :].tolist()


@pytest.mark.parametrize("attention", list(fused_decode.ATTENTIONS))
@pytest.mark.parametrize("kv_heads", SHAPES.values(), ids=SHAPES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_greedy_tokens_are_those_of_transformers(kv_heads, attention):
    network, weights, shape = network_and_weights(kv_heads)
    assert len(weights.head) == 256 and len(weights.layers[0].qkv) == 64 + 2 * 16 * kv_heads
    told = {"length": 128, "how": "eager", "attention": attention}
    decoder = fused_decode.Decoder(weights, shape, VOCAB, **told)
    decoder.prepare()
    count = 3 if attention == "flex" else 16  # which takes long where it is not compiled
    for ids in (PROMPT, PROMPT * 4):
        assert decoder.answer([ids], count) == [greedy(network, ids, count)]
    damaged = weights._replace(head=weights.head.flip(0))
    other = fused_decode.Decoder(damaged, shape, VOCAB, **told)
    assert other.answer([PROMPT], count) != [greedy(network, PROMPT, count)]


class ReadingsOfTheHost:
    """Counts, while its context lasts, how often Python takes values out of tensors."""

    NAMES = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self, monkeypatch):
        self.count = 0
        for name in self.NAMES:
            monkeypatch.setattr(torch.Tensor, name, self._counting(getattr(torch.Tensor, name)))

    def _counting(self, method):
        def counted(*given, **told):
            self.count += 1
            return method(*given, **told)

        return counted


@pytest.mark.parametrize("sampling", [None, {"temperature": 0.7, "top_k": 40, "top_p": 0.9}])
def test_the_host_looks_only_now_and_then(monkeypatch, sampling):
    _, weights, shape = network_and_weights(4)
    sampling = sampling and sampling | {"repetition_penalty": 1.1}
    counts = {}
    for look in (1, 8, 16):
        told = {"length": 128, "how": "eager", "sampling": sampling, "look": look}
        decoder = fused_decode.Decoder(weights, shape, VOCAB, **told)
        with monkeypatch.context() as patch:
            readings = ReadingsOfTheHost(patch)
            decoder.answer([PROMPT], 33)
        counts[look] = readings.count
        assert readings.count == decoder.reads
    assert counts == {1: 32, 8: 4, 16: 2}  # the first is the control: it looks at each token


def test_what_comes_after_eos_is_cut_off():
    network, weights, shape = network_and_weights(4)
    decoder = fused_decode.Decoder(weights, shape, VOCAB, length=128, how="eager", look=8)
    whole = greedy(network, PROMPT, 40)
    eos = whole[10]
    assert decoder.answer([PROMPT], 40, eos) == [whole[: whole.index(eos)]]
    assert decoder.reads <= 2
    with pytest.raises(ValueError, match="do not fit"):
        decoder.answer([PROMPT], 123)


TRITON = """
import sys
sys.path.insert(0, {tests!r})
import test_benchmark_gpu as own, fused_decode, gpu_stages, gpu_tune, lean_kernels
from pathlib import Path
from types import SimpleNamespace
for name in gpu_tune.ORDER:
    one = lean_kernels.Tiles(16, 64, 4)
    other = lean_kernels.Tiles(32, 32, 4)
    if name == "attend":
        one, other = lean_kernels.Parts(1, 4, 4), lean_kernels.Parts(4, 4, 4)
    lean_kernels.FIRST[name], lean_kernels.CONFIGS[name] = one, [other]
told = {{"out": Path({out!r}), "line": lambda name, **figures: print(name)}}
setting = SimpleNamespace(gpu=False, device="cpu", **told)
for kv_heads, how in ((4, "lean"), (2, "lean"), (2, "lean-norm"), (2, "triton")):
    fused_decode.HOWS.setdefault(how)
    network, weights, shape = own.network_and_weights(kv_heads)
    decoder = fused_decode.Decoder(weights, shape, own.VOCAB, length=32, how=how)
    wanted = own.greedy(network, own.PROMPT, 6)
    assert decoder.answer([own.PROMPT], 6) == [wanted], how
    if how == "lean":
        gpu_tune.tune(setting, decoder)
        assert decoder.answer([own.PROMPT], 6) == [wanted], "tuned"
    assert gpu_stages.of_a_step(decoder, own.PROMPT, 1) < 1e-5
"""


@pytest.mark.heavy
def test_the_kernels_answer_as_transformers_does(tmp_path):
    pytest.importorskip("triton", reason="comes with PyTorch for GPUs")
    path = [str(project_directory() / "lib"), str(HERE), *sys.path]
    environment = {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path)}
    code = TRITON.format(tests=os.path.dirname(__file__), out=str(tmp_path))
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | environment)


def test_weights_in_int8_give_nearly_the_same_logits():
    _, weights, shape = network_and_weights(4)

    def quantized(weight):
        scale = weight.abs().amax(1) / 127
        return (weight / scale[:, None]).round().to(torch.int8), scale

    layers = [
        layer._replace(**{n: quantized(getattr(layer, n)) for n in ("qkv", "o", "gate_up", "down")})
        for layer in weights.layers
    ]
    found = []
    for each in (weights, weights._replace(layers=layers)):
        decoder = fused_decode.Decoder(each, shape, VOCAB, length=64, how="eager")
        decoder.read([PROMPT])
        found.append(decoder.logits)
    assert 0 < (found[0] - found[1]).abs().max() < 0.1 * found[0].abs().max()
