"""The floors of the house: a module imports from below, never from above."""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Low to high; names are below `fastbert.`. Modules of one floor may import each other as long as that makes no circle.
FLOORS: list[list[str]] = [
    ["errors", "installed", "forks", "lock", "writing", "cache", "transfer"],
    ["packing", "config", "reference", "kernels", "kernels.*"],
    ["cpu", "cpu.*", "backend"],
    ["ops", "ops.*"],
    ["run", "run.*"],
    ["model", "model.*"],
    ["families", "families.*"],
    ["testing", "checkpoints", "checkpoints.*", "assets"],
    ["text", "text.*"],
    ["training", "training.*"],
    ["tasks", "tasks.*"],
    ["langchain", "llama_index", "ray", "ray.*", "sklearn", "rivals", "rivals.*"],
    ["__init__", "__main__", "cli", "cli.*"],
]


def modules() -> dict[str, Path]:
    """Every module of the package, by its name below `fastbert.`; a package goes by its folder's name."""
    found = {f"kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
    for path in (ROOT / "fastbert").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT / "fastbert").with_suffix("").parts)
        found[name if name == "__init__" else name.removesuffix(".__init__")] = path
    return found


def imported(tree: ast.AST) -> Iterator[str]:
    """Full dotted names of what a piece of code imports; `from a import b` counts as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(path: Path) -> list[str]:
    return list(imported(ast.parse(path.read_text(encoding="utf-8"))))


def module_of(name: str, known: Iterable[str]) -> str | None:
    """The module of ours that `import name` reads, the longest that fits; None for other people's."""
    first, *rest = name.split(".")
    if first != "fastbert":
        return None
    while rest and ".".join(rest) not in known:
        rest.pop()
    return ".".join(rest) or "__init__"


def floor(module: str) -> int:
    floors = [i for i, names in enumerate(FLOORS) if any(fnmatch.fnmatchcase(module, name) for name in names)]
    assert len(floors) == 1, f"{module} is on {len(floors)} floors: give it one in FLOORS"
    return floors[0]


def upward(graph: dict[str, set[str]]) -> list[str]:
    return [f"{a} imports {b}, from a higher floor" for a in graph for b in graph[a] if floor(b) > floor(a)]


def graph() -> dict[str, set[str]]:
    known = modules()
    found = {a: {module_of(name, known) for name in imports(path)} for a, path in known.items()}
    return {a: {b for b in targets if b is not None} for a, targets in found.items()}


def test_modules_import_from_lower_floors() -> None:
    assert "model.encoder" in graph()["model.body"]  # the graph is seen at all
    assert not upward(graph())


def test_no_circles() -> None:
    graphlib.TopologicalSorter(graph()).prepare()


def test_the_rules_bite() -> None:
    assert upward({"ops.pooling": {"errors"}, "errors": {"ops.pooling"}}) == [
        "errors imports ops.pooling, from a higher floor"
    ]
    known = ["__init__", "backend", "checkpoints", "checkpoints.load"]
    source = "def f():\n    from fastbert import backend, Encoder\nimport fastbert.checkpoints.load, torch.nn"
    names = [module_of(name, known) for name in imported(ast.parse(source))]
    assert sorted(map(str, names)) == ["None", "__init__", "backend", "checkpoints.load"]
    with pytest.raises(AssertionError, match="attic is on 0 floors"):
        floor("attic")
    with pytest.raises(AssertionError, match="relative"):
        list(imported(ast.parse("from . import errors")))


def test_kernels_import_only_torch_triton_and_siblings() -> None:
    for path in (ROOT / "kernels").glob("*.py"):
        for name in imports(path):
            first = name.split(".")[0]
            ours = name.startswith("fastbert.kernels.")
            assert ours or first in ("torch", "triton") or first in sys.stdlib_module_names, f"{path.name}: {name}"


def test_only_kernels_import_triton_when_loaded() -> None:
    for path in (ROOT / "fastbert").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                node.body = []  # runs later, if ever
        assert not [name for name in imported(tree) if name.split(".")[0] == "triton"], path


def test_nothing_imports_from_tests_or_shared() -> None:
    rooms = [ROOT / room for room in ("fastbert", "kernels", "examples", "benchmarks")]
    ours = [ROOT / "setup.py", *(path for room in rooms for path in room.rglob("*.py"))]
    from_tests = {"tests", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    for path in ours:
        assert not {name.split(".")[0] for name in imports(path)} & (from_tests - {"conftest"}), path
    for path in [*ours, *(ROOT / "tests").rglob("*.py")]:
        assert "shared" not in {name.split(".")[0] for name in imports(path)}, path


def test_setup_lists_every_package() -> None:
    call = next(node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call))
    listed = next(ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "packages")
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fastbert").rglob("*.py")}
    assert sorted(listed) == sorted({"fastbert.kernels", *(".".join(folder.parts) for folder in folders)})


def test_nothing_puts_kernels_in_the_way_of_the_package_of_that_name() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()
