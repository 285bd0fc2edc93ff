"""What others set for a process or a thread changes nothing here: default dtype, default device, modes, threads."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*sorted((ROOT / "fastbert").rglob("*.py")), *sorted((ROOT / "kernels").glob("*.py"))]

# What makes a tensor of nothing but numbers: its device is the default one unless it is named, and its dtype too, but
# where that is int64 whatever is set.
INTEGERS = {"arange", "randint", "randperm"}
FACTORIES = INTEGERS | {
    "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal", "ones", "rand",
    "randn", "range", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def unnamed(tree: ast.AST) -> list[str]:
    """Calls of torch's factories that leave dtype or device to what is set, which only a module's parameters may."""
    found = []
    parameters = [
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "nn.Parameter"
        for inner in node.args
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node not in parameters and isinstance(node.func, ast.Attribute):
            called, module = node.func.attr, node.func.value
            if isinstance(module, ast.Name) and module.id == "torch" and called in FACTORIES:
                wanted = {"device"} if called in INTEGERS else {"device", "dtype"}
                if wanted - {keyword.arg for keyword in node.keywords}:
                    found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_is_made_with_dtype_and_device_named(path: Path) -> None:
    assert not unnamed(ast.parse(path.read_text()))


def test_an_unnamed_one_is_seen() -> None:
    source = "torch.empty(3); torch.zeros(2, device=d); torch.arange(2); torch.arange(2, device=d); x.new_empty(2)"
    assert len(unnamed(ast.parse(source))) == 3
