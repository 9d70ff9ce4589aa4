"""Diagnosis: silent on every sound model, and what it says agrees with an independent look."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import llamalab
import synthetic
from llamalab import diagnosis, surgery
from llamalab.catalog.models_dir import project_directory
from llamalab.checkpoints.layouts import HFCheckpoint
from llamalab.diagnosis import PAGES, answer_loss, diagnose
from llamalab.errors import LabError, LabWarning, NotFound, UsageError, findings
from llamalab.inference.loading import load
from llamalab.reports import Row
from llamalab.surgery import adapter
from llamalab.surgery.adapter import Adapter
from llamalab.surgery.tokenizer import Tokenizer
from llamalab_course.family import world

LAB_MODELS = {
    "llama-lab": False,
    "llama-lab-hf": False,
    "chinese-llama-lab": False,
    "chinese-alpaca-lab": True,
    "chinese-alpaca-plus-lab": True,
}
"""The sound models that lie on the disk, and whether they are to be asked in the template."""


@pytest.mark.parametrize("name", LAB_MODELS)
@pytest.mark.parametrize("said", [True, False])
def test_sound_lab_models_have_no_finding(lab, name, said):
    found = diagnose(lab / name, with_prompt=LAB_MODELS[name] if said else None, device="cpu")
    assert found.ok, str(found)
    assert {"layout", "tokenizer", "values", "order of q and k"} <= set(found.looked_at)
    assert "adapters" not in found.looked_at


@pytest.mark.parametrize(
    "adapters",
    [
        ["chinese-llama-lora-lab"],
        ["chinese-alpaca-lora-lab"],
        ["chinese-llama-lora-lab", "chinese-alpaca-plus-lora-lab"],
    ],
    ids=len,
)
@pytest.mark.parametrize("base", ["llama-lab", "llama-lab-hf"])
def test_sound_models_that_are_not_merged_have_no_finding(lab, base, adapters):
    found = diagnose(lab / base, [lab / name for name in adapters], device="cpu")
    assert found.ok, str(found)


def test_the_second_adapter_on_the_first_ones_merged_model(lab):
    found = diagnose(lab / "chinese-llama-lab", lab / "chinese-alpaca-plus-lora-lab", device="cpu")
    assert found.ok, str(found)


@pytest.mark.parametrize(
    "shape",
    [
        {"dim": 48, "heads": 3, "vocab": 300},
        {"dim": 64, "heads": 8, "kv_heads": 2, "ffn": 100, "layers": 3},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float32, "dim": 32, "heads": 2},
    ],
    ids=str,
)
def test_sound_random_models_of_odd_shapes_have_no_finding(tmp_path, shape):
    tensors, params = synthetic.meta_tensors(**shape)
    synthetic.write_meta(tmp_path / "base" / "7B", tensors, params, shards=1)
    tokenizer = synthetic.english_tokenizer(tmp_path / "base" / "tokenizer.model")
    llamalab.convert(tmp_path / "base", tmp_path / "hf")
    synthetic.write_adapter(tmp_path / "lora", tmp_path / "hf", tokenizer)
    llamalab.merge(tmp_path / "hf", tmp_path / "lora", tmp_path / "merged")
    llamalab.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "pth", output_type="pth")
    for name in ("base", "hf", "merged", "pth"):
        found = diagnose(tmp_path / name, device="cpu")
        assert found.ok, f"{name}\n{found}"
    assert diagnose(tmp_path / "hf", tmp_path / "lora", device="cpu").ok


def padded_copy(model, out, multiple):
    """Write `model` with both embeddings rounded up to `multiple` rows, as some trainers do."""
    shutil.copytree(model, out)
    (out / "llamalab.json").unlink()
    tensors = load_file(out / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows, width = tensors[name].shape
        more = torch.zeros(-rows % multiple, width, dtype=tensors[name].dtype)
        tensors[name] = torch.cat([tensors[name], more])
    save_file(tensors, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    config["vocab_size"] = len(tensors["lm_head.weight"])
    (out / "config.json").write_text(json.dumps(config))
    return config["vocab_size"]


def test_rows_added_for_speed_are_no_finding_and_are_never_answered(lab, tmp_path):
    rows = padded_copy(lab / "chinese-alpaca-lab", tmp_path / "m", 64)
    assert rows > len(Tokenizer(tmp_path / "m"))
    assert diagnose(tmp_path / "m", with_prompt=True, device="cpu").ok
    assert diagnose(tmp_path / "m", with_prompt=False, quick=True).names == ["no-template"]
    plain, padded = (load(d, device="cpu") for d in (lab / "chinese-alpaca-lab", tmp_path / "m"))
    assert padded.family == "alpaca"
    with torch.no_grad():  # the worst case: the added rows would win every time
        padded.network.lm_head.weight[len(padded.tokenizer) :] = 0.0
        padded.network.lm_head.bias = torch.nn.Parameter(torch.zeros(rows))
        padded.network.lm_head.bias[len(padded.tokenizer) :] = 1e4
    wanted = plain.generate("苹果是植物吗", template="alpaca", temperature=0, max_new_tokens=20)
    found = padded.generate("苹果是植物吗", template="alpaca", temperature=0, max_new_tokens=20)
    assert found.answer_ids == wanted.answer_ids


def cast_copy(model, out, dtype):
    shutil.copytree(model, out)
    (out / "llamalab.json").unlink()
    tensors = load_file(out / "model.safetensors")
    save_file({name: t.to(dtype) for name, t in tensors.items()}, out / "model.safetensors")
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_model_saved_in_another_dtype_is_sound_and_still_contains_its_adapter(
    lab, tmp_path, dtype
):
    """The adapter's embeddings have more bits than the merge kept, and the cast changed again."""
    fine = tmp_path / "fine"
    shutil.copytree(lab / "chinese-llama-lora-lab", fine)
    tensors = load_file(fine / "adapter_model.safetensors")
    tensors = {name: tensor.float() * (1 + 1e-5) for name, tensor in tensors.items()}
    save_file(tensors, fine / "adapter_model.safetensors")
    llamalab.merge(lab / "llama-lab", fine, tmp_path / "merged")
    cast = cast_copy(tmp_path / "merged", tmp_path / "cast", dtype)
    assert diagnose(cast, with_prompt=False, device="cpu").ok
    assert diagnose(cast, fine, quick=True).names == ["applied-twice"]
    with pytest.raises(LabError, match="already contains"):
        load(cast, fine, device="cpu")
    # Controls: the adapter's embeddings with one value changed; the base that it is meant for.
    tensors["base_model.model.model.embed_tokens.weight"][-1, -1] += 0.1
    save_file(tensors, fine / "adapter_model.safetensors")
    assert diagnose(cast, fine, device="cpu").ok
    assert diagnose(lab / "llama-lab", fine, device="cpu").ok


def test_a_model_with_rows_added_for_speed_still_contains_its_adapter(lab, tmp_path):
    padded_copy(lab / "chinese-llama-lab", tmp_path / "m", 64)
    found = diagnose(tmp_path / "m", lab / "chinese-llama-lora-lab", quick=True)
    assert found.names == ["applied-twice"]


def test_a_model_that_peft_merged_and_its_adapter_in_a_bin_file(lab, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = lab / "chinese-llama-lora-lab"
    network = AutoModelForCausalLM.from_pretrained(lab / "llama-lab-hf")
    network.resize_token_embeddings(len(Tokenizer(adapter)), mean_resizing=False)
    PeftModel.from_pretrained(network, adapter).merge_and_unload().save_pretrained(tmp_path / "m")
    for file in ("tokenizer.model", "tokenizer.json"):
        shutil.copy(lab / "chinese-llama-lab" / file, tmp_path / "m")
    assert diagnose(tmp_path / "m", with_prompt=False, device="cpu").ok
    shutil.copytree(adapter, tmp_path / "bin")
    weights = tmp_path / "bin" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert diagnose(tmp_path / "m", tmp_path / "bin", quick=True).names == ["applied-twice"]
    assert diagnose(lab / "llama-lab", tmp_path / "bin", device="cpu").ok


def test_embeddings_that_peft_only_saved_along_are_no_sign_of_a_merge(lab, tmp_path):
    """An adapter trained on the merged model, whose embeddings stayed as they were."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    merged = lab / "chinese-llama-lab"
    network = AutoModelForCausalLM.from_pretrained(merged)
    network = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj"]))
    network.save_pretrained(tmp_path, save_embedding_layers=True)
    shutil.copy(merged / "tokenizer.model", tmp_path)
    assert set(adapter.Adapter(tmp_path).whole) == {"model.embed_tokens", "lm_head"}
    assert diagnose(merged, tmp_path, device="cpu").ok


def test_an_extended_tokenizer_without_embeddings(lab, tmp_path):
    """The configuration promises none, and so it takes the tokenizer to notice."""
    shutil.copytree(lab / "chinese-llama-lora-lab", tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    tensors = {name: tensor for name, tensor in tensors.items() if "lora_" in name}
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": None}))
    found = diagnose(lab / "llama-lab", tmp_path / "a", quick=True)
    assert found.names == ["adapter-without-embeddings"] and "2,435" in str(found)
    # Control: on a model that has the rows, such an adapter is sound.
    assert diagnose(lab / "chinese-llama-lab", tmp_path / "a", device="cpu").ok


def test_the_order_of_findings_and_what_was_not_looked_at(lab, tmp_path):
    shutil.copytree(lab / "chinese-llama-lab", tmp_path / "a b")
    model = tmp_path / "a b"
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    tensors["model.embed_tokens.weight"][1000:] = 0
    save_file(tensors, model / "model.safetensors")
    found = diagnose(model, prompt="苹果" * 300, with_prompt=True, device="cpu")
    order = list(findings())
    assert found.names == sorted(found.names, key=order.index) and len(found.names) == 5
    assert not found.notes
    command = next(f.command for f in found.findings if f.name == "unsound-values")
    assert shlex.split(command) == ["llamalab", "verify", str(model)]
    shutil.copy(lab / "llama-lab" / "tokenizer.model", model)
    found = diagnose(model, device="cpu")
    assert found.names == ["base-tokenizer"] and "Not looked at" in found.notes[-1]


def test_a_prompt_that_is_no_text_is_read_as_generate_reads_it(lab):
    assert diagnose(lab / "chinese-llama-lab", prompt="the \ud83d cat", quick=True).ok


def test_the_command_says_where_a_missing_tokenizer_belongs(lab, tmp_path):
    adapter = tmp_path / "a"
    shutil.copytree(lab / "chinese-alpaca-plus-lora-lab", adapter)
    (adapter / "tokenizer.model").unlink()
    found = diagnose(lab / "llama-lab", [lab / "chinese-llama-lora-lab", adapter], quick=True)
    assert found.names == ["no-tokenizer"]
    assert found.findings[0].command == f"cp ADAPTER/tokenizer.model {adapter}/"


def test_metas_layout_is_sound_and_said_not_to_be_what_transformers_reads(lab):
    found = diagnose(lab / "llama-lab", quick=True)
    assert found.ok and any("file named config.json" in note for note in found.notes)
    assert not any("config.json" in note for note in diagnose(lab / "llama-lab-hf").notes)


def test_a_model_that_transformers_saved(lab, tmp_path):
    """It brings its own tokenizer files and no tokenizer.model: that is the one finding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = lab / "chinese-llama-lab"
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    assert diagnose(tmp_path, device="cpu").names == ["no-tokenizer"]
    shutil.copy(source / "tokenizer.model", tmp_path)
    assert diagnose(tmp_path, device="cpu").ok


@pytest.mark.parametrize("mean_resizing", [True, False, "zeros"])
def test_rows_as_transformers_leaves_them_when_it_resizes(lab, tmp_path, mean_resizing):
    from transformers import AutoModelForCausalLM

    tokenizer = lab / "chinese-llama-lora-lab" / "tokenizer.model"
    network = AutoModelForCausalLM.from_pretrained(lab / "llama-lab-hf")
    rows, old = len(Tokenizer(tokenizer)), len(network.lm_head.weight)
    network.resize_token_embeddings(rows, mean_resizing=mean_resizing is True)
    if mean_resizing == "zeros":
        network.model.embed_tokens.weight.data[old:] = 0
    network.save_pretrained(tmp_path)
    for file in (tokenizer, lab / "chinese-llama-lab" / "tokenizer.json"):
        shutil.copy(file, tmp_path)
    found = diagnose(tmp_path, quick=True)
    assert found.names == ["untrained-rows"], str(found)
    assert f"{rows - old:,} appended rows" in found.findings[0].found


def test_the_write_ups_command_has_both_findings(lab):
    """The merged llama model, its adapter given again, inside the English template."""
    found = diagnose(
        lab / "chinese-llama-lab", lab / "chinese-llama-lora-lab", with_prompt=True, device="cpu"
    )
    assert found.names == ["applied-twice", "template-on-llama"]
    both = [lab / "chinese-llama-lora-lab", lab / "chinese-alpaca-plus-lora-lab"]
    found = diagnose(lab / "chinese-alpaca-plus-lab", both, with_prompt=True, device="cpu")
    assert found.names == ["applied-twice"]  # and not that the first adapter has fewer rows


def test_quick_reads_no_weight_but_the_embeddings(lab, monkeypatch):
    read, plain = set(), HFCheckpoint.read

    def counted(self, name, *rows):
        read.add(name)
        return plain(self, name, *rows)

    monkeypatch.setattr(HFCheckpoint, "read", counted)
    found = diagnose(lab / "chinese-llama-lab", quick=True)
    assert found.ok and any("--quick" in note for note in found.notes)
    assert read == {"model.embed_tokens.weight", "lm_head.weight"}
    diagnose(lab / "chinese-llama-lab", device="cpu")
    assert len(read) == len(HFCheckpoint(lab / "chinese-llama-lab").tensors)


def test_bos_is_judged_as_plain_transformers_behaves(lab, tmp_path):
    """Every combination of tokenizer files, held against what AutoTokenizer then encodes."""
    from transformers import AutoTokenizer

    for fast in ("with BOS", "without BOS", False):
        for said in (True, False, None, "no file"):
            model = tmp_path / f"{fast}-{said}"
            shutil.copytree(lab / "llama-lab-hf", model)
            config = model / "tokenizer_config.json"
            held = json.loads(config.read_text())
            del held["add_bos_token"]
            held |= {} if said is None else {"add_bos_token": said}
            config.write_text(json.dumps(held))
            if said == "no file":
                config.unlink()
            if fast == "without BOS":
                held = json.loads((model / "tokenizer.json").read_text())
                (model / "tokenizer.json").write_text(json.dumps(held | {"post_processor": None}))
            elif not fast:
                (model / "tokenizer.json").unlink()
            begins = AutoTokenizer.from_pretrained(model).encode("An apple")[0] == 1
            names = diagnose(model, quick=True).names
            assert names == ([] if begins else ["no-bos"]), (fast, said, begins)


def test_the_loss_of_answers_is_cross_entropy_by_hand(lab):
    model = load(lab / "llama-lab-hf", device="cpu")
    page = PAGES[0]
    lines = page.splitlines(keepends=True)
    before, total, count = lines[0], 0.0, 0
    for line in lines[1:]:
        question = before + line[: line.index("?") + 1]
        known, ids = model.tokenizer.encode(question), model.tokenizer.encode(before + line)
        assert ids[: len(known)] == known
        rows = model.logits(ids)[len(known) - 1 : -1].double()
        total -= sum(rows.log_softmax(-1)[i, t].item() for i, t in enumerate(ids[len(known) :]))
        count += len(ids) - len(known)
        before += line
    assert answer_loss(model, [page]) == pytest.approx(total / count, rel=1e-4, abs=1e-5)
    known = {(q.text, q.answer) for q in world.questions(world.load_world(), "en")}
    for text in "".join(PAGES).splitlines():
        question, _, answer = text.partition("? ")
        assert (question + "?", answer) in known  # easy for the lab family, too


def test_versions_that_break_this_path(lab, monkeypatch):
    adapter = lab / "chinese-llama-lora-lab"
    assert diagnose(lab / "llama-lab", adapter, quick=True).ok
    for package, number, foreign, expected in (
        ("peft", "0.2.0", False, ["versions"]),
        ("peft", "0.10.0", True, ["versions"]),
        ("peft", "0.10.0", False, []),
        ("peft", "0.14.0", True, []),
        ("transformers", "4.27.4", False, ["versions"]),
    ):
        monkeypatch.setattr(
            diagnosis, "version", lambda p, package=package, n=number: n if p == package else "99"
        )
        keys = {"enable_lora": None, "merge_weights": False} if foreign else {}
        plain = Adapter(adapter)
        plain.config = plain.config | keys
        monkeypatch.setattr(surgery, "Adapter", lambda path, a=plain: a)
        assert diagnose(lab / "llama-lab", adapter, quick=True).names == expected, number


def test_names_that_are_not_there_are_errors_and_no_findings(tmp_path):
    with pytest.raises(NotFound):
        diagnose(tmp_path / "nothing")
    with pytest.raises(UsageError, match="hf:some/model"):
        diagnose("some/model")
    with pytest.raises(UsageError, match="no device"):
        diagnose(tmp_path, device="gpu")


def test_every_name_in_the_code_is_in_the_table():
    named = set()
    for path in (project_directory() / "lib" / "llamalab").rglob("*.py"):
        text = path.read_text("utf-8")
        named |= set(re.findall(r'finding="([a-z-]+)"', text))
        named |= set(re.findall(r'(?:finding, why|finding|name) = "([a-z]+-[a-z-]+)"', text))
        named |= set(re.findall(r'_found\(\s*"([a-z-]+)"', text))
    assert named <= findings().keys()
    assert findings().keys() - named <= {"another-base", "missing-predecessor", "no-template",
                                       "template-on-llama"}  # fmt: skip
    with pytest.raises(LabError) as error:
        load(project_directory() / "data" / "lab" / "chinese-llama-lora-lab")
    assert error.value.finding == "adapter-as-model"


def cli(*arguments):
    command = [sys.executable, "-m", "llamalab", "diagnose", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_line(lab):
    merged, adapter = lab / "chinese-alpaca-lab", lab / "chinese-alpaca-lora-lab"
    done = cli("--base_model", merged, "--with_prompt", "--quick", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 0 and said["ok"] is True
    assert {row["status"] for row in said["rows"]} == {"INFO", "OK"}
    done = cli("--base-model", merged, "--lora-model", adapter, "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 1 and said["ok"] is False
    finding = next(row for row in said["rows"] if row["status"] == "FOUND")
    assert finding["name"] == "applied-twice"
    assert finding["found"] and finding["cause"] and finding["fix"]
    assert finding["command"] == f"llamalab generate --base-model {merged}"
    done = cli("--base-model", lab / "absent", "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["error"] == "NotFound"
    assert cli("--base-model", merged, "--with-prompt", "--without-prompt").returncode == 2


def test_markup_in_a_model_is_shown_as_text(lab):
    shown = diagnosis.Diagnosis((Row("INFO", "model", "<script>alert(1)</script>"),))._repr_html_()
    assert "<script>" not in shown and "&lt;script&gt;" in shown


def test_load_and_generate_warn_of_what_means_nothing(lab, tmp_path):
    model = load(lab / "chinese-llama-lab", device="cpu")
    with pytest.warns(LabWarning, match="continues text"):
        model.generate("苹果是植物吗", template="alpaca", temperature=0, max_new_tokens=2)
    alpaca = load(lab / "chinese-alpaca-lab", device="cpu")
    with pytest.warns(LabWarning, match="inside its template"):
        alpaca.generate("苹果是植物吗", temperature=0, max_new_tokens=2)
    shutil.copytree(lab / "chinese-llama-lab", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"].zero_()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.warns(LabWarning, match="up_proj.weight are all zero"):
        load(tmp_path / "m", device="cpu")
    with pytest.raises(LabError) as error:
        load(lab / "chinese-llama-lab", lab / "chinese-llama-lora-lab", device="cpu")
    assert error.value.finding == "applied-twice"


@pytest.mark.filterwarnings("error")
def test_sound_use_brings_no_warning(lab):
    model = load(lab / "chinese-alpaca-lab", device="cpu")
    model.generate("苹果是植物吗", template="alpaca", temperature=0, max_new_tokens=2)
    model = load(lab / "llama-lab", lab / "chinese-llama-lora-lab", device="cpu")
    model.generate("苹果是植物吗", temperature=0, max_new_tokens=2)
