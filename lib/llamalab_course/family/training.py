"""The lab family: trains the tiny LLaMA and its three adapters, and scores the shipped files.

    python -m llamalab_course.family.training train [--output-dir DIR] [--steps N] [--batch N] [--seed N]
                                      [--stages A,B]
    python -m llamalab_course.family.training score [--dir DIR] [--json]

Training runs in stages: tokenizer, base, llama, alpaca, plus. A finished stage is not repeated;
an interrupted one goes on from its last checkpoint. Each batch is drawn from the seed, the stage
and the step alone, so that a resumed run sees the same batches as an undisturbed one.
"""

import argparse
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy
import sentencepiece
import tokenizers
import torch
import torch.nn.functional as F

from llamalab import surgery
from llamalab.catalog import project_directory

from . import corpus, recipe
from .recipe import ALPACA, BASE, LLAMA, PLUS, Recipe, Stage
from .scores import score, score_table
from .world import chinese_words, load_world


def weighted_loss(network, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy, in nats, of each next token, by weight.

    What all rows begin with, the template's header say, is computed once, and logits only
    where a weight is not 0: together that halves the time.

    Args:
        ids, weights: `[batch, length]`.
    """
    same = (ids == ids[:1]).all(0).long().cumprod(0).sum().item()
    shared = min(same, ids.shape[1]) - 1  # the last of them predicts what differs
    decoder = network.get_base_model() if hasattr(network, "get_base_model") else network
    cache = None
    if shared > 8 and not weights[:, : shared + 1].any():
        cache = decoder.model(input_ids=ids[:1, :shared], use_cache=True).past_key_values
        cache.batch_repeat_interleave(len(ids))
        ids, weights = ids[:, shared:], weights[:, shared:]
    hidden = decoder.model(input_ids=ids, past_key_values=cache).last_hidden_state
    weights = weights[:, 1:]
    where = weights > 0
    logits = decoder.lm_head(hidden[:, :-1][where])
    each = F.cross_entropy(logits.float(), ids[:, 1:][where], reduction="none")
    return (each * weights[where]).sum() / weights.sum()


def rate_at(step: int, steps: int) -> float:
    """Return the share of the peak rate: linear warm-up, then half a cosine down to 2 %."""
    warm_up = min(100, max(1, steps // 10))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def train_network(
    stage: Stage, network, tokenizer: surgery.Tokenizer, draw_batch: corpus.DrawBatch
) -> None:
    """Train `network`'s trainable parameters in place; checkpoints and a loss curve go to `work`."""
    stage.work.mkdir(parents=True, exist_ok=True)
    texts, steps = corpus.Corpus(stage.world), stage.recipe.steps
    saved = stage.work / "checkpoint.pt"
    trainable = {n: p for n, p in network.named_parameters() if p.requires_grad}
    optimizer = _optimizer(trainable, stage.recipe)
    start, mean, began = _resume(saved, network, optimizer), None, time.monotonic()
    network.train()
    with open(stage.work / "loss.csv", "a", encoding="utf-8") as file:
        for step in range(start, steps):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_at(step, steps)
            draw = random.Random(f"{stage.seed} {step}")
            draw_text = draw_batch(texts, draw)
            ids, weights = corpus.batch_of(tokenizer, draw_text, draw, stage.recipe.batch)
            loss = weighted_loss(network, ids, weights)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)
            optimizer.step()
            mean = loss.item() if mean is None else 0.97 * mean + 0.03 * loss.item()
            done = step + 1
            if done % 50 == 0 or done == steps:
                print(f"{done},{mean:.4f}", file=file)
                left = (time.monotonic() - began) / (done - start) * (steps - done) / 60
                print(f"  step {done}/{steps}  loss {mean:.4f}  {left:.1f} min left", flush=True)
            if done % recipe.CHECKPOINT_EVERY == 0 and done < steps:
                file.flush()
                state = {n: p.detach() for n, p in trainable.items()}
                state = {"network": state, "optimizer": optimizer.state_dict(), "step": done}
                torch.save(state, saved.with_suffix(".new"))
                saved.with_suffix(".new").replace(saved)
    saved.unlink(missing_ok=True)
    network.eval()


def _optimizer(trainable: dict[str, torch.nn.Parameter], rates: Recipe) -> torch.optim.AdamW:
    """Return AdamW with a rate of their own for the embeddings; a group's `peak` is its rate."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in trainable.items():
        whole = "embed_tokens" in name or "lm_head" in name
        groups.setdefault(rates.embedding_rate if whole else rates.rate, []).append(parameter)
    parts = [{"params": group, "lr": rate, "peak": rate} for rate, group in groups.items()]
    return torch.optim.AdamW(parts, betas=(0.9, 0.95), weight_decay=0.02)


def _resume(saved: Path, network, optimizer: torch.optim.Optimizer) -> int:
    """Bring back what an interrupted stage saved, if it did; return the step to go on from."""
    if not saved.exists():
        return 0
    state = torch.load(saved, weights_only=True)
    network.load_state_dict(state["network"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    print(f"  going on from step {state['step']}", flush=True)
    return state["step"]


def _seed_torch(stage: Stage) -> None:
    torch.manual_seed(int.from_bytes(hashlib.sha256(stage.seed.encode()).digest()[:4], "big"))


def train_pieces(out: Path, texts: Sequence[str], size: int, **settings) -> None:
    """Train a SentencePiece BPE model with LLaMA's settings."""
    with open(out, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            model_type="bpe",
            vocab_size=size,
            byte_fallback=True,
            character_coverage=1.0,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
            **settings,
        )


def make_tokenizers(stage: Stage) -> None:
    """Train the English pieces and the Chinese ones, and extend the first by the second.

    A piece on which SentencePiece and `tokenizer.json` part for a sentence of the world is left
    out, so that plain transformers encodes the world as the models were trained.
    """
    out, world = stage.out, stage.world
    for directory in (out / BASE, out / LLAMA, out / ALPACA, out / PLUS, stage.work):
        directory.mkdir(parents=True, exist_ok=True)
    base, chinese = out / BASE / "tokenizer.model", stage.work / "chinese.model"
    extended = out / LLAMA / "tokenizer.model"
    train_pieces(base, corpus.english_texts(world), recipe.PIECES["base"])
    train_pieces(chinese, chinese_words(world), recipe.PIECES["chinese"], add_dummy_prefix=False)
    sentences = sorted(set(corpus.world_texts(world)))
    surgery.extend(base, chinese, extended)
    while parting := _parting_pieces(extended, sentences):
        model = surgery.read_model(chinese)
        kept = [piece for piece in model.pieces if piece.piece not in parting]
        del model.pieces[:]
        model.pieces.extend(kept)
        chinese.write_bytes(model.SerializeToString())
        surgery.extend(base, chinese, extended)
    for alpaca in (ALPACA, PLUS):
        surgery.extend(base, chinese, out / alpaca / "tokenizer.model", control=["<pad>"])


def _parting_pieces(path: Path, sentences: Sequence[str]) -> set[str]:
    """Return, of each sentence with two encodings, the first piece that only SentencePiece takes."""
    ours = surgery.Tokenizer(path)
    theirs = tokenizers.Tokenizer.from_str(surgery.tokenizer_json(surgery.read_model(path)))
    parting = set()
    for text, encoding in zip(sentences, theirs.encode_batch(list(sentences)), strict=True):
        pieces = ours.pieces(ours.encode(text))
        if pieces != encoding.tokens:
            parting.add(next(p for p in pieces if len(p) > 1 and p not in encoding.tokens))
    return parting


def make_base(stage: Stage) -> None:
    """Train the base model on English alone, and write it in Meta layout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = surgery.Tokenizer(stage.out / BASE)
    _seed_torch(stage)
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **recipe.CONFIG))
    train_network(stage, network, tokenizer, corpus.base_batch)
    write_meta(stage.out / BASE / "lab", network.state_dict())


def write_meta(folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Write a network's weights as Meta publishes them: fp16, Meta's names and row order."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {}
    for meta, hf in surgery.names(recipe.PARAMS["n_layers"]).items():
        tensor = state[hf].half()
        if hf.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = surgery.unpermute(tensor, recipe.PARAMS["dim"] // recipe.PARAMS["n_heads"])
        weights[meta] = tensor.clone()
    torch.save(weights, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(recipe.PARAMS | {"vocab_size": -1}) + "\n")
    files = ("consolidated.00.pth", "params.json")
    sums = [f"{hashlib.md5((folder / f).read_bytes()).hexdigest()}  {f}\n" for f in files]
    (folder / "checklist.chk").write_text("".join(sums))


def make_adapter(
    stage: Stage, name: str, draw_batch: corpus.DrawBatch, before: Sequence[str] = ()
) -> None:
    """Train an adapter with new embeddings on the shipped files before it, and save it by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    out, tokenizer = stage.out, surgery.Tokenizer(stage.out / name)
    start = surgery.compose(out / BASE, [out / adapter for adapter in before])
    network = LlamaForCausalLM(LlamaConfig(**start.config))
    network.load_state_dict({name: start.read(name) for name in start.tensors})
    _seed_torch(stage)
    network.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    network = get_peft_model(network, LoraConfig(task_type="CAUSAL_LM", **recipe.LORA))
    train_network(stage, network, tokenizer, draw_batch)
    network.half().save_pretrained(out / name, save_embedding_layers=False)
    (out / name / "README.md").unlink(missing_ok=True)  # PEFT's empty form
    config_file = out / name / "adapter_config.json"
    settings = json.loads(config_file.read_text()) | {"base_model_name_or_path": BASE}
    settings["target_modules"].sort()  # a set before, in another order each time
    config_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


STAGES = {
    "tokenizer": make_tokenizers,
    "base": make_base,
    "llama": partial(make_adapter, name=LLAMA, draw_batch=corpus.llama_batch),
    "alpaca": partial(make_adapter, name=ALPACA, draw_batch=corpus.alpaca_batch),
    "plus": partial(make_adapter, name=PLUS, draw_batch=corpus.plus_batch, before=[LLAMA]),
}


def train(out: Path, stages: Sequence[str], seed: int, **shorter: int) -> None:
    """Run the stages that are not finished yet; `steps` and `batch` replace the recipes'."""
    world = load_world()
    for name in stages:
        work, began = out / "work" / name, time.monotonic()
        if (work / "finished").exists():
            print(f"{name}: finished before")
            continue
        print(f"{name}:", flush=True)
        steps_of = recipe.RECIPES.get(name)
        steps_of = replace(steps_of, **shorter) if steps_of else None
        STAGES[name](Stage(out, work, world, f"{seed} {name}", steps_of))
        seconds = time.monotonic() - began
        (work / "finished").write_text(f"{seconds:.0f} s\n")
        print(f"{name}: {seconds / 60:.1f} min", flush=True)
    draw_curves(out / "work", out / "loss.png")


def draw_curves(work: Path, out: Path) -> None:
    """Draw the loss of every stage that has one, from the tables that training has written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for stage in recipe.RECIPES:
        if (work / stage / "loss.csv").is_file():
            points = numpy.loadtxt(work / stage / "loss.csv", delimiter=",", ndmin=2)
            axes.plot(*points.T, label=stage)
    axes.set(xlabel="step", ylabel="loss, in nats a token (running mean)", yscale="log")
    axes.legend()
    figure.savefig(out, dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    added = commands.add_parser("train", help="train the family, in stages that can be resumed")
    added.add_argument("--output-dir", type=Path, default=project_directory() / "models/lab")
    added.add_argument("--stages", default=",".join(STAGES))
    added.add_argument("--steps", type=int, help="shorten every stage to so many steps")
    added.add_argument("--batch", type=int, help="texts a step, in place of the recipe's")
    added.add_argument("--seed", type=int, default=0)
    added = commands.add_parser("score", help="print the table for the shipped files")
    added.add_argument("--dir", type=Path, default=project_directory() / "data/lab")
    added.add_argument("--size", type=int, default=400, help="questions a line, at most")
    added.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if options.command == "train":
        chosen = options.stages.split(",")
        if unknown := [stage for stage in chosen if stage not in STAGES]:
            parser.error(f"there is no stage '{unknown[0]}'; there are {', '.join(STAGES)}")
        given = {"steps": options.steps, "batch": options.batch}
        shorter = {name: value for name, value in given.items() if value}
        train(options.output_dir, chosen, options.seed, **shorter)
        return 0
    scores = score(options.dir, options.size)
    print(json.dumps([asdict(s) for s in scores]) if options.json else score_table(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
