"""Points of a sweep, and batches of prompts, on a Ray cluster. Ray schedules, retries, carries.

A point goes out as the notebook and its parameters, and comes back as the files of its
run; a batch goes out as text and comes back as answers. So the machines need llamalab, the same
as here, and the large models, but no shared disk.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

import llamalab
from llamalab import catalog
from llamalab.catalog import AFFORDABLE, locate, models_directory
from llamalab.checkpoints import Checkpoint
from llamalab.errors import Incompatible, LabError, NotEnoughRoom, NotFound, UsageError
from llamalab.files import write_whole
from llamalab.inference import (
    Answer,
    Batch,
    Model,
    Sampling,
    fitting_batch,
    loading,
    render_text,
)
from llamalab.surgery import Tokenizer, adapter_list
from llamalab.units import size_text

from . import run_directory
from .notebooks import Notebook
from .preflight import memory_to_set_aside, model_needs
from .run_directory import Job, Run, Status
from .worker import run_jobs

RETRIES = 5
"""How often Ray runs a point again whose machine was lost."""

CONNECTION_TRIES = 4
"""How often a cluster that is there is asked: the process it forks for us may hang at its start."""

_model = None  # of this Ray process: (what `load` was told, what it gave)


def run_points(
    sweep, todo: list[int], on: str, limits: dict, jobs: int | None = None
) -> Iterator[tuple[int, Run]]:
    """Run points of a sweep on a cluster; write each run's directory here, and yield the run.

    Args:
        on: "ray", which starts one on this machine, or the address of one, "ray://HOST:PORT".
        jobs: points at once at most; None leaves it to the cluster.

    Raises:
        NotFound: there is no such cluster.
        Incompatible: a machine of it lacks llamalab, or has another one, or lacks a large model.
        NotEnoughRoom: no machine of it has the memory for one point.
    """
    values = [sweep.notebook.in_effect(sweep.points[point]) for point in todo]
    ray = _connect(on)
    try:
        machines = _machines(ray)
        memory = max((memory_to_set_aside(v, limits["memory_limit"]) for v in values), default=0)
        gpu = _have_gpu(machines) and any(v.get("device") != "cpu" for v in values)
        _require_memory(machines, memory)
        _require_there(ray, machines, large_models=_large_models(values))
        task = _task(ray, run_point, gpu, memory)
        notebook, waiting, going = ray.put(sweep.notebook), list(todo), {}
        while waiting or going:
            while waiting and len(going) < (jobs or len(todo)):
                point = waiting.pop(0)
                going[task.remote(notebook, sweep.points[point], limits)] = point
            (done,), _ = ray.wait(list(going))
            point = going.pop(done)
            yield point, _take(ray, done, sweep.job(point))
    finally:
        ray.shutdown()


def run_point(notebook: Notebook, parameters: dict, limits: dict) -> dict[str, bytes]:
    """On a machine of the cluster: run one notebook; return the files of its run."""
    with tempfile.TemporaryDirectory() as folder:
        there = replace(notebook, path=Path(folder) / notebook.path.name)
        ((_, run),) = run_jobs([Job(there, parameters, Path(folder) / "run", **limits)])
        return {file.name: file.read_bytes() for file in run.directory.iterdir()}


@contextmanager
def answering(on: str, how: dict) -> Iterator[tuple[Model, Callable]]:
    """Connect to a cluster whose machines are to answer prompts.

    Args:
        on: as in `run_points`.
        how: the arguments of `loading.load`, by name.

    Yields:
        A model without weights, and what `predictions.predict` takes as `answer`.

    Raises:
        NotFound, Incompatible, NotEnoughRoom: as `run_points`.
    """

    def absolute(item) -> str:  # the working directories of the machines are others
        return str(locate(item, how["models_dir"]).resolve())

    own = how["tokenizer_path"]
    parts = {
        "base_model": absolute(how["base_model"]),
        "lora_model": [absolute(item) for item in adapter_list(how["lora_model"])],
        "tokenizer_path": own and str(Path(own).resolve()),
        "force": how["force"],
    }
    view = loading.view_of(**parts)
    ray = _connect(on)
    try:
        machines = _machines(ray)
        gpu = _have_gpu(machines) and how["device"] != "cpu"
        chosen = loading.pick_dtype(view, torch.device("cuda" if gpu else "cpu"), how["dtype"])
        memory = sum(loading.memory_needed(view, chosen, how["quantize"]).values())
        _require_memory(machines, memory)
        _require_there(ray, machines, parts=parts)
        # Ray gives each task on a GPU a process of its own, so that none keeps what it holds.
        task = _task(ray, answer_batch, gpu, memory)
        there = how | parts | {"dtype": str(chosen).removeprefix("torch.")}

        def answer(batches: list[Batch], sampling: Sampling) -> Iterator[list[Answer]]:
            waiting = [task.remote(there, *batch, sampling) for batch in batches]
            while waiting:
                try:
                    yield ray.get(waiting.pop(0))
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None  # without Ray's own report around it

        yield _without_weights(view, chosen), answer
    finally:
        ray.shutdown()


def _without_weights(view: Checkpoint, dtype: torch.dtype) -> Model:
    """Return a model that knows its tokenizer and its limits, and cannot answer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        network = LlamaForCausalLM(LlamaConfig.from_dict(view.config)).to(dtype)
    return Model(network, Tokenizer(view.tokenizer), view.made_of)


def answer_batch(
    how: dict, prompts: list[str], seeds: list[int], sampling: Sampling
) -> list[Answer]:
    """On a machine of the cluster: answer prompts, as many at once as its memory holds."""
    global _model
    if _model is None or _model[0] != how:
        _model = (how, loading.load(**how))
    model = _model[1]
    texts = [render_text(prompt, sampling.template) for prompt in prompts]
    longest = max(len(model.tokenizer.encode(text)) for text in texts)
    size = fitting_batch(model, longest + sampling.max_new_tokens)
    answers = []
    for at in range(0, len(prompts), size):
        some = slice(at, at + size)
        answers += model.generate_batch(prompts[some], seeds=seeds[some], **sampling.as_dict())
    return answers


def _take(ray, done, job: Job) -> Run:
    """Write the directory of a point that has come back, or that Ray has given up."""
    try:
        files = ray.get(done)
    except ray.exceptions.RayError as error:
        last_line = str(error).strip().splitlines()[-1]
        return run_directory.write_unrun(job, Status.KILLED, f"The cluster lost it: {last_line}")
    partial = run_directory.partial_directory(job.directory)
    partial.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (partial / Path(name).name).write_bytes(content)
    os.replace(partial, job.directory)
    run = run_directory.read_run(job.directory)
    # The directory named in it was the machine's.
    write_whole(job.directory / run_directory.MANIFEST, run_directory.as_json(run))
    return run


def _connect(on: str):
    if on != "ray" and not on.startswith("ray://"):
        raise UsageError(f"--on {on} is neither 'ray' nor an address 'ray://HOST:PORT'.")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers
    try:
        import ray
    except ImportError:
        way_out = "Run: pip install 'llamalab[cluster]'"
        raise NotFound("Ray is not installed.", "", way_out) from None
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    for tries_left in reversed(range(CONNECTION_TRIES)):
        try:
            if on == "ray":
                ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
            else:
                ray.init(on, **quiet)
            break
        except (ConnectionError, RuntimeError, ImportError) as error:
            if tries_left and isinstance(error, ConnectionAbortedError):
                continue
            raise NotFound(
                f"There is no Ray cluster at '{on}'.",
                str(error).strip().splitlines()[-1],
                "On its first machine: ray start --head --ray-client-server-port 10001",
            ) from None
    return ray


def _task(ray, function: Callable, gpu: bool, memory: int):
    resources = {"num_cpus": 1, "num_gpus": int(gpu), "memory": memory}
    return ray.remote(function).options(**resources, max_retries=RETRIES)


def _machines(ray) -> list[dict]:
    return [node for node in ray.nodes() if node["Alive"]]


def _have_gpu(machines: list[dict]) -> bool:
    return any("GPU" in node["Resources"] for node in machines)


def _require_memory(machines: list[dict], memory: int) -> None:
    largest = max(node["Resources"].get("memory", 0) for node in machines)
    if memory > largest:
        raise NotEnoughRoom(
            f"One task needs {size_text(memory)} of memory.",
            f"The largest machine of the cluster offers {size_text(largest)}.",
            "Choose a smaller model, a machine with more memory, or a --memory-limit.",
        )


def _large_models(values: list[dict]) -> list[tuple[str, str]]:
    """Return (model, models directory) of those that no notebook makes unasked."""
    models = set()
    for value in values:
        need = model_needs(value)
        if need and need.disk > AFFORDABLE:
            models.add((need.model, str(models_directory(str(value.get("models_dir", ""))))))
    return sorted(models)


def _require_there(ray, machines: list[dict], **asked) -> None:
    """Ask every machine whether it has this llamalab, and what else is asked for (`missing`)."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def ask(asked):  # sent by value: it must run where llamalab is not
        try:
            from llamalab_runs import ray_cluster
        except ImportError as error:
            return [f"llamalab does not load ({error})"], ""
        return ray_cluster.missing(**asked), ray_cluster.code_digest()

    for node in machines:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = ray.remote(ask).options(scheduling_strategy=there, num_cpus=0)
        absent, digest = ray.get(task.remote(asked))
        if not absent and digest != code_digest():
            absent = ["llamalab is another one"]
        if absent:
            raise Incompatible(
                f"The machine {node['NodeManagerAddress']} cannot run this: {'; '.join(absent)}.",
                "Every machine needs the same llamalab, and large models at the same place.",
                "Install it there, bring the model with 'llamalab download', and try again.",
            )


def missing(large_models: Sequence[tuple[str, str]] = (), parts: dict | None = None) -> list[str]:
    """Return a sentence for each thing that this machine does not hold.

    Args:
        large_models: (catalogue name, models directory) of each.
        parts: the files of a model, as `loading.view_of` takes them.
    """
    absent = []
    for name, directory in large_models:
        needed = [Path(directory) / part.name for part in catalog.model(name).parts]
        if not (Path(directory) / name).is_dir() and not all(p.is_dir() for p in needed):
            absent.append(f"{name} is not in {directory}")
    if parts:
        try:
            loading.view_of(**parts)
        except LabError as error:
            absent.append(str(error).splitlines()[0])
    return absent


def code_digest() -> str:
    """Return one digest of everything that a machine of the cluster computes with."""
    packages = [Path(__file__).parent, Path(llamalab.__file__).parent]
    files = sorted(f for p in packages for kind in ("*.py", "*.toml") for f in p.rglob(kind))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
