"""Sweeps on a Ray cluster: a machine is lost, and every point is in the summary, once."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
import time

import pytest
import torch

from books import notebook
from llamalab.errors import Incompatible, NotEnoughRoom, NotFound, UsageError
from llamalab.inference import Sampling
from llamalab_course.family import scores, world
from llamalab_runs import preflight, ray_cluster, sweep

pytestmark = pytest.mark.heavy
ray = pytest.importorskip("ray")


@pytest.fixture
def machines(monkeypatch):
    """Two machines of one core each, on this one; yields (the cluster, its address, the second)."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "ray_client_server_port": 23711, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    second = made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made, "ray://127.0.0.1:23711", second
    made.shutdown()


def read(directory) -> list[dict]:
    with open(directory / "summary.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_lost_machine_loses_no_point(tmp_path, machines):
    made, address, second = machines
    path = notebook(
        tmp_path / "n.ipynb",
        f"open({str(tmp_path / 'log')!r}, 'a').write(f'{{seed}}\\n')\nimport time; time.sleep(1)",
        "if seed == 5: raise ValueError('bad point')",
        "from IPython.display import display\n"
        "display({'application/vnd.llamalab.results+json': {'square': seed ** 2}}, raw=True)",
    )
    grid = {"seed": list(range(12))}
    swept = sweep.prepare(path, grid, {}, tmp_path / "runs", on=address)
    ended = []

    def lose_one(point, run):
        ended.append(point)
        if len(ended) == 3:
            threading.Thread(target=made.remove_node, args=(second, False)).start()

    runs = sweep.run_sweep(swept, on=address, on_end=lose_one)
    assert len([node for node in made.list_all_nodes()]) == 1
    assert sorted(ended) == list(range(12))
    assert [run.status for run in runs] == ["failed" if i == 5 else "ok" for i in range(12)]
    rows = read(swept.directory)
    assert [int(row["point"]) for row in rows] == list(range(12))
    assert [row["result.square"] for row in rows] == [
        str(i**2) if i != 5 else "" for i in range(12)
    ]
    begun = (tmp_path / "log").read_text().split()
    assert set(begun) == {str(i) for i in range(12)} and len(begun) >= 12
    # The summary and the runs are those of a local run.
    local = sweep.prepare(path, grid, {}, tmp_path / "local")
    sweep.run_sweep(local, jobs=2)
    measured = ("seconds", "peak_rss_bytes")
    for mine, theirs in zip(read(local.directory), rows, strict=True):
        assert {k: v for k, v in mine.items() if k not in measured} == {
            k: v for k, v in theirs.items() if k not in measured
        }
    for point in range(12):
        names = [{p.name for p in s.place(point).iterdir()} for s in (swept, local)]
        assert names[0] == names[1]
        manifest = json.loads((swept.place(point) / "manifest.json").read_text())
        assert manifest["directory"] == str(swept.place(point))


def test_what_a_machine_lacks_is_said_first(tmp_path, machines, monkeypatch):
    _, address, _ = machines
    text = 'model: str = "chinese-alpaca-7b"\nmodels_dir: str = ""\nseed: int = 1'
    path = notebook(tmp_path / "n.ipynb", "1", parameters=text)
    values = {"models_dir": str(tmp_path)}
    swept = sweep.prepare(path, {"seed": [1]}, values, tmp_path / "runs", on=address)
    monkeypatch.setattr(ray_cluster, "memory_to_set_aside", lambda *_: 1)
    with pytest.raises(Incompatible, match="chinese-alpaca-7b is not in"):
        sweep.run_sweep(swept, on=address)
    monkeypatch.setattr(ray_cluster, "code_digest", lambda: "another")
    swept = sweep.prepare(
        path, {"seed": [1]}, {"model": "chinese-alpaca-lab"}, tmp_path, on=address
    )
    with pytest.raises(Incompatible, match="another one"):
        sweep.run_sweep(swept, on=address)
    monkeypatch.setattr(ray_cluster, "memory_to_set_aside", lambda *_: 10**15)
    with pytest.raises(NotEnoughRoom, match="1,000,000.0 GB"):
        sweep.run_sweep(swept, on=address)
    assert not list(tmp_path.glob("*/points/*")) and preflight


def test_a_cluster_of_this_machine_alone_by_the_command(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "print(seed)")
    command = [sys.executable, "-W", "ignore", "-m", "llamalab", "run", str(path)]
    command += ["--sweep", "seed=1,2", "--on", "ray", "--output-dir", str(tmp_path / "runs")]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 points ended ok" in done.stdout and time.monotonic() - began < 240


def test_prompts_are_answered_once_each_though_a_machine_is_lost(lab, tmp_path, machines):
    made, address, second = machines
    data, here, there = (tmp_path / name for name in ("p.txt", "here.jsonl", "there.jsonl"))
    questions = scores.sample(world.questions(world.load_world(), "zh"), 60)
    data.write_text("\n".join(q.text for q in questions), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "llamalab", "generate", "--with-prompt"]
    command += ["--base-model", "chinese-alpaca-lab", "--models-dir", str(lab), "--only-cpu"]
    command += ["--data-file", str(data), "--batch-size", "2", "--seed", "5"]
    command += ["--temperature", "1.5", "--max-new-tokens", "24", "--predictions-file"]
    subprocess.run([*command, str(here)], check=True, capture_output=True, timeout=240)
    size = here.stat().st_size

    def lose_one():
        while not there.exists() or there.stat().st_size < size // 5:
            time.sleep(0.01)
        made.remove_node(second, allow_graceful=False)

    losing = threading.Thread(target=lose_one, daemon=True)
    losing.start()
    done = subprocess.run(
        [*command, str(there), "--on", address], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert not losing.is_alive() and len(made.list_all_nodes()) == 1
    assert "60 answers" in done.stderr
    lines = [json.loads(line) for line in there.read_text(encoding="utf-8").splitlines()]
    assert [line["index"] for line in lines] == list(range(60))
    assert there.read_bytes() == here.read_bytes()


def test_prompts_need_the_model_on_every_machine(lab, tmp_path, machines, monkeypatch):
    _, address, _ = machines
    how = {"base_model": str(lab / "chinese-alpaca-lab"), "lora_model": None, "models_dir": ""}
    how |= {"device": "cpu", "dtype": "auto", "quantize": None, "force": False}
    how["tokenizer_path"] = None
    with ray_cluster.answering(address, how) as (model, answer):
        assert model.network.dtype == torch.float32 and model.device.type == "meta"
        wrong = Sampling(template="alpaca")
        object.__setattr__(wrong, "temperature", -1)
        with pytest.raises(UsageError, match="temperature"):  # an error there is the error here
            next(answer([(["苹果是植物吗"], [0])], wrong))
    real = ray_cluster._require_there
    elsewhere = {"parts": {"base_model": str(tmp_path / "absent")}}
    monkeypatch.setattr(ray_cluster, "_require_there", lambda r, m, parts: real(r, m, **elsewhere))
    with pytest.raises(Incompatible, match="absent"), ray_cluster.answering(address, how):
        pass


@pytest.mark.parametrize("refusals", [1, ray_cluster.CONNECTION_TRIES])
def test_a_cluster_that_gives_up_a_connection_is_asked_again(machines, monkeypatch, refusals):
    from ray.util.client.worker import Worker

    begin, begun = Worker._server_init, []

    def refuse(self, *arguments):
        begun.append(arguments)
        if len(begun) <= refusals:
            raise ConnectionAbortedError("Initialization failure from server:\nit hung")
        return begin(self, *arguments)

    monkeypatch.setattr(Worker, "_server_init", refuse)
    if refusals < ray_cluster.CONNECTION_TRIES:
        assert len(ray_cluster._machines(ray_cluster._connect(machines[1]))) == 2
        ray.shutdown()
    else:
        with pytest.raises(NotFound, match="it hung"):
            ray_cluster._connect(machines[1])
    # Under load the real one gives up now and then as well.
    assert (
        min(refusals + 1, ray_cluster.CONNECTION_TRIES)
        <= len(begun)
        <= ray_cluster.CONNECTION_TRIES
    )


def test_addresses_that_lead_nowhere(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "1")
    swept = sweep.prepare(path, {"seed": [1]}, {}, tmp_path / "runs")
    with pytest.raises(UsageError, match="neither 'ray'"):
        sweep.run_sweep(swept, on="slurm")
    with pytest.raises(NotFound, match="no Ray cluster"):
        sweep.run_sweep(swept, on="ray://127.0.0.1:9")
