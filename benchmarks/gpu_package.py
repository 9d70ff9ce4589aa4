"""The stages of `gpu.py` that run transformers' generate and llamalab itself."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch

from fused_decode import Decoder, fuse
from gpu_measure import SAMPLING, Setting, memory, network_of, prompt, wait


def peers(setting: Setting) -> None:
    """transformers' own ways at batch 1, and llamalab as it is."""
    network = network_of(setting, torch.bfloat16)
    moved = sum(w.nbytes for w in network.parameters()) - network.lm_head.weight.nbytes
    ids = torch.tensor([prompt(setting, 64)], device=setting.device)
    static = {"cache_implementation": "static", "max_cache_len": 512 if setting.gpu else 128}
    ways = {
        "transformers, eager, dynamic cache": {},
        "transformers, static cache, compiled": static,
        "llamalab today": None,
        "transformers, eager, static cache": static | {"disable_compile": True},
    }
    for name, how in ways.items():
        if how is None:
            setting.attempt(f"{name}, bf16", lambda: today(setting, network, moved))
            continue
        mask = {"attention_mask": torch.ones_like(ids), "do_sample": False}

        def answer(count: int, how=how, mask=mask) -> int:
            network._previous_max_cache_length = -1
            with torch.inference_mode():
                found = network.generate(ids, max_new_tokens=count, **mask, **how)
            return found.shape[1] - ids.shape[1] + 0 * found[0, -1].item()

        setting.attempt(
            f"{name}, bf16",
            lambda answer=answer, slow="eager" in name: answered(setting, answer, moved, slow),
        )


def answered(setting: Setting, answer, moved: int, slow: bool = False) -> dict:
    """Return the figures of `answer(tokens)`, by the difference of a long and a short answer."""
    tokens = min(setting.tokens, 64 if slow else 128)
    first = time.perf_counter()
    answer(tokens)
    first = time.perf_counter() - first
    answer(tokens)  # a graph is captured in the second call
    steps, wholes = [], []
    for _ in range(3):
        taken = {}
        for count in (tokens, 2):
            began = time.perf_counter()
            given = answer(count)
            taken[count] = given, time.perf_counter() - began
        (long, slow), (short, quick) = taken[tokens], taken[2]
        steps.append((slow - quick) / (long - short))
        wholes.append(slow)
    best = min(steps)
    figures = {"rate": 1 / best, "rate_median": 1 / statistics.median(steps)}
    figures |= {"ms_a_step": best * 1000, "gb_s": moved / best / 1e9, "first_s": first}
    return figures | {"whole_s": min(wholes), "tokens": tokens} | memory(setting, 64 + tokens)


def today(setting: Setting, network, moved: int) -> dict:
    """llamalab's `Model.generate` around the network, as `load` makes it."""
    from llamalab.inference import Model
    from llamalab.surgery import Tokenizer

    with tempfile.TemporaryDirectory() as directory:
        tokenizer = Tokenizer(made_up_tokenizer(setting, Path(directory)))
        model = Model(network, tokenizer)
        text = "made up"
        while len(tokenizer.encode(text)) < 64:
            text += " a"

        def answer(count: int) -> int:
            how = {"temperature": 0, "max_new_tokens": count, "seed": 0}
            return model.generate(text, **how).answer_tokens

        return answered(setting, answer, moved)


def made_up_tokenizer(setting: Setting, directory: Path) -> Path:
    """Return a directory with a tokenizer of as many pieces as the vocabulary has rows."""
    import made_up_weights

    if setting.size == "lab":
        return setting.data / "chinese-alpaca-lora-lab"
    tiny = made_up_weights.Shape(dim=64, layers=1, heads=2, kv_heads=2, ffn=256)
    made_up_weights.write_base(directory / "base", tiny)
    base = directory / "base" / "tokenizer.model"
    return made_up_weights.write_adapter(directory / "adapter", tiny, base, rank=1)


def lab(setting: Setting) -> None:
    """The lab model answers 64 questions on the device as on the CPU; so does our decoder."""
    import llamalab
    from llamalab_course.family import scores, world

    with tempfile.TemporaryDirectory() as directory:
        adapters = [setting.data / "chinese-alpaca-lora-lab"]
        merged = Path(directory) / "merged"
        llamalab.merge(setting.data / "llama-lab", adapters, merged)
        here = llamalab.load(merged, device="cpu", dtype="float32")
        there = llamalab.load(merged, device=setting.device, dtype="float32")
    found = scores.sample(world.questions(world.load_world(), "zh"), 64)
    asked = [question.text for question in found]
    for name, how in {"greedy": {"temperature": 0}, "sampled": SAMPLING}.items():
        how = {"template": "alpaca", "max_new_tokens": 48} | how
        answers = [
            [a.text for a in model.generate_batch(asked, seeds=range(64), **how)]
            for model in (here, there)
        ]
        pairs = list(zip(*answers, strict=True))
        parted = [pair for pair in pairs if pair[0] != pair[1]]
        same = len(pairs) - len(parted)
        setting.line(f"lab, {name}, llamalab", same=same, of=len(pairs), parted=parted[:2])
        setting.attempt(
            f"lab, {name}, ours", lambda how=how: lab_ours(setting, here, there, asked, how)
        )


def lab_ours(setting: Setting, here, there, asked: list[str], how: dict) -> dict:
    """Our decoder's answers, seed for seed, beside llamalab's on the CPU."""
    from made_up_weights import SIZES

    weights = fuse({name: w.data for name, w in there.network.state_dict().items()})
    names = ("temperature", "top_k", "top_p", "repetition_penalty")
    sampling = {name: how[name] for name in names} if how["temperature"] else None
    way = "graph" if setting.gpu else "eager"
    shape, rows = SIZES["lab"], there.network.config.vocab_size
    vocab = min(len(there.tokenizer), rows)
    decoder = Decoder(weights, shape, vocab, length=256, how=way, sampling=sampling)
    decoder.prepare()
    same, asked = 0, asked[:16]
    for seed, text in enumerate(asked):
        wanted = here.generate(text, seed=seed, **how)
        ids = there.tokenizer.encode(wanted.prompt)
        found = decoder.answer([ids], 48, there.tokenizer.eos, seeds=[seed])[0]
        same += found == wanted.answer_ids
    return {"same": same, "of": len(asked)}


def quantized(setting: Setting) -> None:
    """Peak memory with 8 and 4 bits, loaded by llamalab's own way, beside the estimate."""
    if not find_spec("bitsandbytes"):
        setting.line("8 and 4 bits", skipped="bitsandbytes is not installed")
        return
    view = _View(setting)
    for bits in ("8bit", "4bit"):
        setting.attempt(f"llamalab, {bits}", lambda bits=bits: of_bits(setting, view, bits))


class _View:
    """A checkpoint that is nowhere: what `read_network` reads of one, made when asked for."""

    def __init__(self, setting: Setting):
        from llamalab.checkpoints import TensorSpec

        network = network_of(setting, torch.bfloat16, device="meta")
        self._device, self.config = setting.device, network.config.to_dict()
        shapes = {name: tuple(weight.shape) for name, weight in network.state_dict().items()}
        self.tensors = {n: TensorSpec(torch.bfloat16, shape) for n, shape in shapes.items()}
        most = max(weight.numel() for weight in network.parameters())
        self._place = torch.empty(most, dtype=torch.bfloat16, pin_memory=setting.gpu)

    def blocks(self, name: str):
        shape = self.tensors[name].shape
        made = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        made = made.normal_(std=0.02) if len(shape) > 1 else made.fill_(1)
        block = self._place[: made.numel()].view(shape)
        yield block.copy_(made)


def of_bits(setting: Setting, view: _View, bits: str, tokens: int = 32) -> dict:
    """Load, then read a prompt once; a line tells of the load as soon as it is done."""
    from llamalab.inference import loading

    where = torch.device(setting.device)
    began = time.perf_counter()
    network = loading.read_network(view, where, torch.bfloat16, bits)
    wait(setting.device)
    told = {"load_s": time.perf_counter() - began}
    if setting.gpu:
        told["loaded_gb"] = torch.cuda.max_memory_allocated() / 1e9
    setting.line(f"llamalab, {bits}, loaded", **told)
    began = time.perf_counter()
    with torch.inference_mode():
        network(torch.tensor([prompt(setting, tokens)], device=where))
    wait(setting.device)
    told["first_s"] = time.perf_counter() - began
    few = SimpleNamespace(
        config=view.config | {"max_position_embeddings": tokens}, tensors=view.tensors
    )
    parts = loading.memory_needed(few, torch.bfloat16, bits)
    told["foretold_gb"] = (sum(parts.values()) - parts["runtime"]) / 1e9
    if setting.gpu:
        told["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        told["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return told


def course(setting: Setting) -> None:
    """Convert, merge and load once, from made-up files of Meta's form; each file goes at once."""
    import llamalab
    import made_up_weights

    with tempfile.TemporaryDirectory(prefix="llamalab-gpu-", dir=setting.out) as directory:
        work, shape = Path(directory), setting.shape

        def step(name: str, action) -> None:
            with Anonymous() as held:
                began = time.perf_counter()
                action()
                wait(setting.device)
                taken = time.perf_counter() - began
            size = sum(path.stat().st_size for path in work.rglob("*") if path.is_file())
            setting.line(name, seconds=taken, host_gb=held.most / 1e9, on_disk_gb=size / 1e9)

        step("make the base", lambda: made_up_weights.write_base(work / "base", shape))
        tokenizer = work / "base" / "tokenizer.model"
        step(
            "make the adapter",
            lambda: made_up_weights.write_adapter(work / "lora", shape, tokenizer),
        )
        step("convert", lambda: llamalab.convert(work / "base", work / "hf"))
        shutil.rmtree(work / "hf")
        step("merge", lambda: llamalab.merge(work / "base", [work / "lora"], work / "merged"))
        shutil.rmtree(work / "base")
        models = []
        step("load", lambda: models.append(llamalab.load(work / "merged", device=setting.device)))
        how = {"temperature": 0, "max_new_tokens": 8, "seed": 0}
        step("answer of 8 tokens", lambda: models[0].generate("made up", **how))


class Anonymous:
    """Watches the memory that this process holds of its own; `most` in bytes."""

    def __enter__(self) -> Anonymous:
        self.most, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.05):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    self.most = max(self.most, int(line.split()[1]) * 1024)
