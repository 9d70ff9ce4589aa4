"""Small random checkpoints and adapters in the real file formats, for the tests."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import sentencepiece
import torch

from llamalab.surgery.tokenizer import extend
from llamalab_course.family.training import train_pieces

ENGLISH = "the cat sat on the mat and the dog ran to the red house on a hill near the sea".split()
CHINESE = (
    "苹果是植物吗 猫在家里睡觉 狗跑到红色的房子 大海在山的旁边 今天天气很好 我们一起学习".split()
)


def english_tokenizer(path: Path) -> Path:
    lines = [" ".join(ENGLISH[i:] + ENGLISH[:i]) for i in range(len(ENGLISH))]
    train_pieces(path, lines, 300)
    return path


def chinese_tokenizer(path: Path) -> Path:
    train_pieces(path, CHINESE, 330)
    return path


def zip_archive(content=b"x" * 5000) -> bytes:
    """Return a zip archive, as PyTorch's files are."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("consolidated/data/0", content)
    return buffer.getvalue()


def meta_tensors(
    *, dim=64, layers=2, heads=4, kv_heads=None, ffn=None, vocab=300, dtype=torch.float16, seed=0
) -> tuple[dict[str, torch.Tensor], dict]:
    """Return random tensors under Meta's names, and the params.json that belongs to them."""
    generator = torch.Generator().manual_seed(seed)
    kv_heads = kv_heads or heads
    ffn = ffn or 4 * -(-(8 * dim // 3) // 4)
    kv = dim // heads * kv_heads

    def matrix(rows, columns, scale=0.2):
        return (torch.randn(rows, columns, generator=generator) * scale).to(dtype)

    def norm():
        return (1 + 0.1 * torch.randn(dim, generator=generator)).to(dtype)

    tensors = {"tok_embeddings.weight": matrix(vocab, dim, 1.0)}
    for i in range(layers):
        tensors |= {
            f"layers.{i}.attention.wq.weight": matrix(dim, dim),
            f"layers.{i}.attention.wk.weight": matrix(kv, dim),
            f"layers.{i}.attention.wv.weight": matrix(kv, dim),
            f"layers.{i}.attention.wo.weight": matrix(dim, dim),
            f"layers.{i}.feed_forward.w1.weight": matrix(ffn, dim),
            f"layers.{i}.feed_forward.w2.weight": matrix(dim, ffn),
            f"layers.{i}.feed_forward.w3.weight": matrix(ffn, dim),
            f"layers.{i}.attention_norm.weight": norm(),
            f"layers.{i}.ffn_norm.weight": norm(),
        }
    tensors |= {"norm.weight": norm(), "output.weight": matrix(vocab, dim)}
    params = {"dim": dim, "n_layers": layers, "n_heads": heads, "norm_eps": 1e-5, "vocab_size": -1}
    params |= {"multiple_of": 4}
    if kv_heads != heads:
        params["n_kv_heads"] = kv_heads
    return tensors, params


def write_meta(
    folder: Path, tensors: dict, params: dict, shards: int = 1, one_storage: bool = False
) -> Path:
    """Write a checkpoint in Meta layout, cut into `shards` as Meta cuts it.

    With `one_storage` all tensors of a file are views of one storage, as in Meta's larger models.
    """
    folder.mkdir(parents=True)
    for shard in range(shards):
        held = {}
        for name, tensor in tensors.items():
            if tensor.dim() == 1:
                held[name] = tensor.clone()
                continue
            columns = name.endswith(("tok_embeddings.weight", "wo.weight", "w2.weight"))
            held[name] = tensor.chunk(shards, dim=1 if columns else 0)[shard].clone()
        if one_storage:
            storage = torch.cat([tensor.flatten() for tensor in held.values()])
            pieces = storage.split([tensor.numel() for tensor in held.values()])
            views = zip(held.items(), pieces, strict=True)
            held = {name: piece.view(tensor.shape) for (name, tensor), piece in views}
            assert len({t.untyped_storage().data_ptr() for t in held.values()}) == 1
        held["rope.freqs"] = torch.zeros(4, dtype=torch.float32)
        torch.save(held, folder / f"consolidated.{shard:02d}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def write_adapter(
    folder: Path,
    base_hf: Path,
    base_tokenizer: Path,
    *,
    control=(),
    rank=4,
    seed=1,
    targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    **settings,
) -> Path:
    """Write an adapter with an extended vocabulary, saved by PEFT itself, all values random."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True)
    other = chinese_tokenizer(folder / "chinese.model")
    extend(base_tokenizer, other, folder / "tokenizer.model", control=control)
    other.unlink()
    processor = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    model = AutoModelForCausalLM.from_pretrained(base_hf, dtype=torch.float32)
    torch.manual_seed(seed)
    model.resize_token_embeddings(processor.get_piece_size(), mean_resizing=False)
    config = LoraConfig(
        r=rank,
        lora_alpha=4 * rank,
        target_modules=list(targets),
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
        **settings,
    )
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.05)
        elif "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.half().save_pretrained(folder)
    return folder
