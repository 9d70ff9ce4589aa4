"""Where things lie, from any working directory, and what a model option may be."""

from __future__ import annotations

import pytest

from llamalab.catalog.models_dir import locate, models_directory, project_directory
from llamalab.errors import NotFound, UsageError


def test_relative_directories_resolve_against_the_project(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMALAB_MODELS_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert models_directory() == project_directory() / "models"
    assert models_directory("here") == project_directory() / "here"
    assert models_directory(tmp_path) == tmp_path
    monkeypatch.setenv("LLAMALAB_MODELS_DIR", str(tmp_path / "elsewhere"))
    assert models_directory() == tmp_path / "elsewhere"


def test_a_directory_or_a_name_under_the_models_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert locate("models/mine").samefile(tmp_path / "models" / "mine")
    assert locate("mine", tmp_path / "models") == tmp_path / "models" / "mine"
    (tmp_path / "file.bin").touch()
    with pytest.raises(NotFound, match="is a file"):
        locate("file.bin")
    with pytest.raises(NotFound) as caught:
        locate("chinese-alpaca-7b", tmp_path)
    assert "llamalab download chinese-alpaca-7b" in caught.value.fix
    with pytest.raises(NotFound, match="nothing-of-the-kind"):
        locate("nothing-of-the-kind", tmp_path)


@pytest.mark.parametrize("name", ["hfl/chinese-alpaca-lora-7b", "a/b"])
def test_a_bare_repository_is_never_downloaded(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        locate(name)
    assert f"hf:{name}" in caught.value.fix


def test_the_hub_is_asked_where_it_is_said_and_its_failure_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub

    seen = []

    def snapshot(repository, revision=None):
        seen.append((repository, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert locate("hf:owner/repo@v2") == tmp_path
    assert seen == [("owner/repo", "v2")]

    def absent(repository, revision=None):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    with pytest.raises(NotFound, match="could not be fetched"):
        locate("hf:owner/repo")
