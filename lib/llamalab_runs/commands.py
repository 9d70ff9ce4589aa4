"""`llamalab run`: the command, its options, and what it prints."""

import sys
from pathlib import Path

from llamalab.cli import positive, size
from llamalab.errors import UsageError
from llamalab.reports import STATUSES, paint


def add(command) -> None:
    """Add `run` to the command line: `command(name, function, help)` gives its parser."""
    about = "Run the course, or some of its notebooks, without a reader."
    added = command("run", run_command, about)
    added.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="a path, or 04")
    added.add_argument("-p", action="append", default=[], metavar="NAME=VALUE", dest="parameters")
    added.add_argument("-f", metavar="FILE.yaml", dest="file", help="parameters from a file")
    added.add_argument("--output-dir", default="runs", metavar="DIR")
    added.add_argument("--help-notebook", metavar="N", help="list a notebook's parameters")
    added.add_argument("--prepare-only", action="store_true", help="say what would run, and stop")
    added.add_argument("--cell-timeout", type=positive, metavar="S", help="seconds for one cell")
    added.add_argument("--memory-limit", type=size, metavar="B", help="bytes a notebook, as in 4GB")
    added.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME=V1,V2",
        help="run one notebook at every point of a grid; values with commas: NAME=['a,b','c']",
    )
    added.add_argument(
        "--jobs", type=positive, metavar="N", help="points at once; 1, or the cluster's"
    )
    added.add_argument("--on", metavar="ray", help="ray, or ray://HOST:PORT: run a sweep there")
    added.add_argument("--keep", type=positive, metavar="N", help="keep a notebook's newest N runs")


def run_command(options) -> int:
    from .notebooks import find_notebook, read_notebook
    from .run_index import prune, write_index
    from .runner import plan, plan_text

    if options.help_notebook:
        print(read_notebook(find_notebook(options.help_notebook)).describe())
        return 0
    parameters = _read_parameters(options.file) if options.file else {}
    for item in options.parameters:
        name, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"'-p {item}' is not NAME=VALUE.")
        parameters[name] = value
    if options.sweep:
        runs = _sweep(options, parameters)
    elif options.on or options.jobs:
        raise UsageError("--on and --jobs are for a --sweep.", "Lessons go in order.")
    elif options.prepare_only:
        print(plan_text(plan(options.notebooks, parameters), options.memory_limit))
        return 0
    else:
        runs = _run_in_order(options, parameters)
    output_dir = Path(options.output_dir).absolute()
    if options.keep and not options.prepare_only:
        spared = {path for run in runs for path in (run.directory, *run.directory.parents)}
        for path in prune(output_dir, options.keep, spared):
            print(f"removed {path}", file=sys.stderr)
    if not options.prepare_only:
        write_index(output_dir)
    return 0 if all(result.status == "ok" for result in runs) else 1


def _run_in_order(options, parameters: dict) -> list:
    from .runner import run

    limits = {"cell_timeout": options.cell_timeout, "memory_limit": options.memory_limit}
    where = {"output_dir": options.output_dir, "on_end": _print_run}
    runs = run(options.notebooks, parameters, **where, **limits)
    for result in runs:
        for answer in result.results.get("answers", []):
            print()
            for key in ("question", "gloss", "base", "merged"):
                print(f"  {key:8}  {answer.get(key, '')}")
    print("\nreports:")
    for result in runs:
        print(f"  {result.report}")
    return runs


def _sweep(options, parameters: dict) -> list:
    """Run a sweep, or say what it would run; the summary's place goes to standard output."""
    from llamalab.progress import say

    from .sweep import fitting_jobs, prepare, run_sweep

    if len(options.notebooks) != 1:
        raise UsageError("--sweep takes exactly one notebook.")
    grid = {}
    for item in options.sweep:
        name, values = _swept(item)
        if name in grid:
            raise UsageError(f"--sweep {name} is given twice.", "", "Give all its values at once.")
        grid[name] = values
    limit = options.memory_limit
    where = {"output_dir": options.output_dir, "memory_limit": limit, "on": options.on}
    swept = prepare(options.notebooks[0], grid, parameters, **where)
    jobs = fitting_jobs(swept, options.jobs or 1, limit)
    if options.prepare_only:
        place = f"on {options.on}" if options.on else f"{jobs} at once"
        extent = f"{len(swept.points)} points, {place}, in {swept.directory}"
        print(f"{swept.notebook.path.name}, {extent}")
        for number, point in enumerate(swept.points):
            print(f"{number:4}  {swept.notebook.in_effect(point)}")
        return []
    if options.on:
        jobs = options.jobs
    elif options.jobs and jobs < options.jobs:
        print(f"{jobs} at once: cores and memory allow no more.", file=sys.stderr)

    def print_point(number: int, result) -> None:
        values = " ".join(f"{name}={swept.points[number][name]}" for name in swept.swept)
        status = _status(result, sys.stderr)
        text = f"{status} {number:4}  {values}  {result.seconds:.1f} s  {result.error}"
        say(text.rstrip())

    limits = {"cell_timeout": options.cell_timeout, "memory_limit": limit}
    runs = run_sweep(swept, jobs=jobs, **limits, on=options.on, on_end=print_point)
    ok = sum(result.status == "ok" for result in runs)
    print(f"{ok} of {len(runs)} points ended ok")
    print(swept.index)
    return runs


def _swept(item: str) -> tuple[str, list]:
    """Return name and values of NAME=V1,V2, or of NAME=[...], a YAML list."""
    import yaml

    name, equals, text = item.partition("=")
    if not equals or not text:
        raise UsageError(f"'--sweep {item}' is not NAME=V1,V2.")
    if not text.startswith("["):
        return name, text.split(",")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError:
        values = None
    if not isinstance(values, list):
        raise UsageError(f"'--sweep {item}' is not a list in brackets.")
    return name, values


def _status(result, stream) -> str:
    colour = STATUSES["OK" if result.status == "ok" else "FAIL"]
    return paint(f"{result.status:7}", colour, stream)


def _print_run(result) -> None:
    print(f"{_status(result, sys.stdout)} {result.notebook:32} {result.seconds:6.1f} s", flush=True)
    if result.error:
        print(f"        {result.error}", file=sys.stderr)


def _read_parameters(file: str) -> dict:
    import yaml

    try:
        parameters = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"{file} cannot be read: {str(error).splitlines()[0]}.") from None
    if not isinstance(parameters, dict):
        raise UsageError(f"{file} is not a table of NAME: VALUE.")
    return parameters
