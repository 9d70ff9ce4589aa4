"""The house's own rules: how large a room may be, and that one public name has one meaning.

    python tests/house.py        prints what is broken, and the sizes

Code lines leave out blanks, comments and docstrings.
"""

from __future__ import annotations

import ast
import importlib
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT / "lib"
CORE = (
    "__init__", "errors", "files", "units", "progress",
    "catalog/*", "checkpoints/*", "surgery/*", "inference/*",
)  # fmt: skip
BESIDE_THE_CORE = {"surgery/gguf_export", "inference/predictions", "inference/chat"}
LIMITS = {"core": 3000, "lib": 8650, "module": 350, "function": 45, "class": 200}
SEVERAL = {"main", "add"}  # what entry points call; every program has one
SKIPPED = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENCODING, tokenize.ENDMARKER,
}  # fmt: skip
Defined = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def modules() -> list[Path]:
    return sorted(path for path in LIB.rglob("*.py") if ".egg-info" not in str(path))


def core() -> set[Path]:
    package = LIB / "llamalab"
    found = {path for pattern in CORE for path in package.glob(f"{pattern}.py")}
    return found - {package / f"{name}.py" for name in BESIDE_THE_CORE}


def code_lines(text: str) -> set[int]:
    """Return the numbers of the lines that hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SKIPPED:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):  # a docstring
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return lines


def public(tree: ast.Module) -> Iterator[Defined]:
    for node in tree.body:
        if isinstance(node, Defined) and not node.name.startswith("_"):
            yield node


def too_large() -> Iterator[str]:
    """Yield a sentence for each module, function and class above its limit, and for the whole."""
    totals = {"core": 0, "lib": 0}
    for path in modules():
        text, name = path.read_text(encoding="utf-8"), path.relative_to(LIB)
        lines = code_lines(text)
        totals["lib"] += len(lines)
        totals["core"] += len(lines) if path in core() else 0
        if len(lines) > LIMITS["module"]:
            yield f"{name} has {len(lines)} code lines, of {LIMITS['module']}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, Defined):
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                size = len(lines & set(range(node.lineno, node.end_lineno + 1)))
                if size > LIMITS[kind]:
                    yield f"{name}: {kind} {node.name} has {size} code lines, of {LIMITS[kind]}"
    for name, total in totals.items():
        if total > LIMITS[name]:
            yield f"{name} has {total:,} code lines, of {LIMITS[name]:,}"


def ambiguous() -> Iterator[str]:
    """Yield a sentence for each public class or function whose name is defined in two modules."""
    homes = defaultdict(list)
    for path in modules():
        for node in public(ast.parse(path.read_text(encoding="utf-8"))):
            homes[node.name].append(str(path.relative_to(LIB)))
    for name, places in sorted(homes.items()):
        if len(places) > 1 and name not in SEVERAL:
            yield f"{name} is defined in {' and '.join(places)}"


def faceless() -> Iterator[str]:
    """Yield a sentence for each folder without docstring or `__all__`, or that promises too much."""
    for path in modules():
        if path.name != "__init__.py":
            continue
        name = ".".join(path.parent.relative_to(LIB).parts)
        package = importlib.import_module(name)
        if not package.__doc__ or not hasattr(package, "__all__"):
            yield f"{name} has no docstring or no __all__"
        for item in package.__all__:
            if not hasattr(package, item):
                yield f"{name} lists {item}, which it does not have"


def through_the_wall() -> Iterator[str]:
    """Yield a sentence for each import from inside another folder, past that folder's face."""
    folders = {path.parent for path in modules() if path.name == "__init__.py"}
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            base = path.parents[node.level - 1] if node.level else LIB
            target = base.joinpath(*node.module.split("."))
            home = target.parent
            inside = home in folders and home not in path.parents and home.parent != LIB
            if target.with_suffix(".py").is_file() and inside:
                yield f"{path.relative_to(LIB)} imports from {target.relative_to(LIB)}"


def undrawn() -> Iterator[str]:
    """Yield a sentence for each file that README's tree leaves out, or draws though it is gone."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"^lib/\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    drawn, folders = set(), [LIB]
    for line in (tree[1] if tree else "").splitlines():
        match = re.match(r"( *)([\w./-]+)", line)
        if match and match[2]:
            depth = len(match[1]) // 4
            path = folders[depth - 1] / match[2].rstrip("/")
            folders[depth:] = [path]
            drawn |= set() if match[2].endswith("/") else {path}
    kinds = ("*.py", "*.toml", "*.js", "*.css")
    there = {path for kind in kinds for path in LIB.rglob(kind) if ".egg-info" not in str(path)}
    there -= {path for path in there if path.name in ("__init__.py", "__main__.py")}
    for path in sorted(there ^ drawn):
        yield f"{path.relative_to(LIB)} is {'not in' if path in there else 'only in'} README's tree"


RULES = (too_large, ambiguous, faceless, through_the_wall, undrawn)


def main() -> int:
    broken = [sentence for rule in RULES for sentence in rule()]
    print("\n".join(broken) or "The house is in order.")
    sizes = {p: len(code_lines(p.read_text(encoding="utf-8"))) for p in modules()}
    for package in sorted({p.relative_to(LIB).parts[0] for p in sizes}):
        print(f"{sum(n for p, n in sizes.items() if package in p.parts):6,} {package}")
    print(f"{sum(sizes[p] for p in core()):6,} the core\n{sum(sizes.values()):6,} lib")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
