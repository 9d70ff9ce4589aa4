"""Shared fixtures: one tiny random model in every form the package reads or makes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import llamalab
import synthetic


@pytest.fixture(scope="session")
def family(tmp_path_factory) -> Path:
    """A directory with `base` (Meta layout), `base-hf`, `llama-lora`, `alpaca-lora`; read only."""
    root = tmp_path_factory.mktemp("family")
    tensors, params = synthetic.meta_tensors()
    synthetic.write_meta(root / "base" / "7B", tensors, params)
    synthetic.english_tokenizer(root / "base" / "tokenizer.model")
    llamalab.convert(root / "base", root / "base-hf")
    tokenizer = root / "base" / "tokenizer.model"
    synthetic.write_adapter(root / "llama-lora", root / "base-hf", tokenizer)
    synthetic.write_adapter(
        root / "alpaca-lora", root / "base-hf", tokenizer, control=("<pad>",), seed=2
    )
    return root


@pytest.fixture
def copied(family, tmp_path):
    """Return a function that copies one part of the family to `tmp_path`, to be damaged there."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(family / name, tmp_path / name))

    return copy


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Path:
    """A models directory with the shipped lab family downloaded, converted and merged; read only."""
    root = tmp_path_factory.mktemp("lab")
    llamalab.download("chinese-alpaca-plus-lab", root)
    llamalab.download("chinese-alpaca-lab", root)
    llamalab.convert(root / "llama-lab", root / "llama-lab-hf")
    for name, adapters in (
        ("chinese-llama-lab", ["chinese-llama-lora-lab"]),
        ("chinese-alpaca-lab", ["chinese-alpaca-lora-lab"]),
        ("chinese-alpaca-plus-lab", ["chinese-llama-lora-lab", "chinese-alpaca-plus-lora-lab"]),
    ):
        llamalab.merge(root / "llama-lab", [root / a for a in adapters], root / name)
    return root
