"""The catalogue: its data hold together, and what it says of the shipped files is true."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

from llamalab import catalog
from llamalab.catalog import catalog as catalog_module
from llamalab.catalog.models_dir import project_directory
from llamalab.errors import NotFound, UsageError
from llamalab.surgery.tokenizer import Tokenizer

LAB = project_directory() / "data" / "lab"


def test_every_name_refers_to_something():
    parts = catalog.parts()
    for model in catalog.models().values():
        assert model.base.kind == "base"
        for before, adapter in zip((None, *model.adapters), model.adapters, strict=False):
            assert adapter.base == model.base.name
            assert adapter.after == (before.name if before else None)
    for part in parts.values():
        assert not part.after or parts[part.after].kind == "adapter"
        assert part.source in (None, "lab") or re.fullmatch(r"hf:[\w-]+/[\w.-]+", part.source)
        assert part.kind == "adapter" or part.name.endswith("-lab") or part.source is None
        for facts in part.files.values():
            assert not facts.md5 or re.fullmatch("[0-9a-f]{32}", facts.md5)
            assert not facts.sha256 or re.fullmatch("[0-9a-f]{64}", facts.sha256)


def test_published_vocabularies():
    for name, part in catalog.parts().items():
        if part.kind == "adapter" and not name.endswith("-lab"):
            assert part.vocab == {"llama": 49953, "alpaca": 49954}[part.family]
    plus = catalog.model("chinese-alpaca-plus-13b")
    assert [p.name for p in plus.parts] == [
        "llama-13b", "chinese-llama-plus-lora-13b", "chinese-alpaca-plus-lora-13b",
    ]  # fmt: skip
    assert (plus.family, plus.template) == ("alpaca", "alpaca")
    assert catalog.model("chinese-llama-7b").template == "none"
    assert catalog.model("llama-7b").adapters == ()


@pytest.mark.parametrize("name", [n for n, p in catalog.parts().items() if p.source == "lab"])
def test_the_shipped_files_are_the_catalogues(name):
    part = catalog.parts()[name]
    found = {
        p.relative_to(LAB / name).as_posix(): p for p in (LAB / name).rglob("*") if p.is_file()
    }
    assert set(found) == set(part.files)
    for path, facts in part.files.items():
        content = found[path].read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (facts.size, facts.sha256)
    assert len(Tokenizer(LAB / name)) == part.vocab
    if part.shape:
        params = json.loads((LAB / name / part.folder / "params.json").read_text())
        assert (params["dim"], params["n_layers"], params["n_heads"]) == (
            part.shape.dim, part.shape.layers, part.shape.heads,
        )  # fmt: skip


def test_the_lab_family_is_small():
    assert sum(p.stat().st_size for p in Path(LAB).rglob("*") if p.is_file()) < 16 * 2**20


def test_a_wrong_name_gets_the_nearest_ones():
    with pytest.raises(NotFound) as caught:
        catalog.model("chinese-lama-7b")
    assert "chinese-llama-7b" in caught.value.why
    with pytest.raises(NotFound):
        catalog.parts_of("nothing like it")


@pytest.fixture
def own_catalogue(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMALAB_CATALOG", str(tmp_path / "own.toml"))
    catalog_module._tables.cache_clear()
    yield tmp_path / "own.toml"
    catalog_module._tables.cache_clear()


def test_models_of_your_own_come_on_top(own_catalogue):
    own_catalogue.write_text(
        '[base.mine]\nvocab = 10\nfolder = "7B"\n[base.mine.files]\n'
        '"7B/params.json" = { size = 3 }\n'
        '[model.ours]\nbase = "mine"\nadapters = ["chinese-llama-lora-7b"]\n'
    )
    model = catalog.model("ours")
    assert model.base.files["7B/params.json"].size == 3 and model.family == "llama"
    assert catalog.model("chinese-alpaca-lab").parts  # what is shipped is still there


def test_a_catalogue_that_cannot_be_read_is_named(own_catalogue):
    with pytest.raises(UsageError, match="own.toml"):
        catalog.models()
    own_catalogue.write_text("[base")
    with pytest.raises(UsageError, match="own.toml"):
        catalog.models()
