"""Kernels with every option off beside copies of them that never had the options; prints how their code differs.

test_static.py runs this file in a process of its own: Triton must not be in its interpreter.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl

from fastbert.kernels import attention, bias_gelu, layer_norm
from fastbert.kernels.target import KNOWN, Target

sys.path.append(str(Path(__file__).parent.parent / "benchmarks" / "static"))
import cases
import machine_code
from offline import offline


@triton.jit
def costly_kernel(x_ptr, shift, HAS_SHIFT: tl.constexpr):
    """Wrong on purpose: its option costs an atomic when it is off."""
    x = tl.load(x_ptr)
    if HAS_SHIFT:
        x += shift
    shifted = tl.atomic_add(x_ptr + 1, x)  # noqa: F841
    tl.store(x_ptr, x)


def costly(x: torch.Tensor) -> None:
    costly_kernel[(1,)](x, 0.0, HAS_SHIFT=False)


KEPT = (ast.Import, ast.ImportFrom, ast.Assign)  # of a module, beside its kernels


class Without(ast.NodeTransformer):
    """Takes options out of a module's source: their arguments, what is assigned to their names, their branches.

    An expression of flags is decided where one of them is off; what is left may name no option any more.
    """

    def __init__(self, kernel: str, flags: Collection[str], names: Collection[str]) -> None:
        self.kernel = kernel
        self.flags = set(flags)
        self.gone = set(flags) | set(names)
        self.places: dict[str, list[int]] = {}  # of the arguments taken out, by function

    def visit_Module(self, node: ast.Module) -> ast.AST:
        for function in node.body:
            if isinstance(function, ast.FunctionDef):
                taken = [i for i, argument in enumerate(function.args.args) if argument.arg in self.gone]
                self.places[function.name] = taken
        node.body = [each for each in node.body if isinstance(each, KEPT) or self._is_used(each)]
        return self.generic_visit(node)

    def visit_arguments(self, node: ast.arguments) -> ast.AST:
        node.args = [argument for argument in node.args if argument.arg not in self.gone]
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id in self.places:
            taken = self.places[node.func.id]
            node.args = [argument for i, argument in enumerate(node.args) if i not in taken]
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        return None if self._is_gone(node.targets[0]) else self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST | None:
        return None if self._is_gone(node.target) else self.generic_visit(node)

    def visit_If(self, node: ast.If) -> Any:
        test = self._decided(node.test)
        if test is False:
            return [kept for each in node.orelse for kept in _listed(self.visit(each))]
        node.test = test
        return self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        test = self._decided(node.test)
        if test is False:
            return self.visit(node.orelse)
        node.test = test
        return self.generic_visit(node)

    def _is_used(self, node: ast.stmt) -> bool:
        """Whether it is the kernel or may be called by it."""
        if not isinstance(node, ast.FunctionDef) or "triton.jit" not in map(ast.unparse, node.decorator_list):
            return False
        return node.name == self.kernel or not node.name.endswith("_kernel")

    def _is_gone(self, target: ast.expr) -> bool:
        return isinstance(target, ast.Name) and target.id in self.gone

    def _decided(self, test: ast.expr) -> Any:
        """False, or what is left of the test."""
        if isinstance(test, ast.Name):
            return False if test.id in self.flags else test
        if isinstance(test, ast.BoolOp):
            values = [self._decided(value) for value in test.values]
            if isinstance(test.op, ast.And):
                return False if False in values else test
            left = [value for value in values if value is not False]
            return ast.BoolOp(test.op, left) if len(left) > 1 else left[0] if left else False
        return test


def _listed(kept: Any) -> list[ast.AST]:
    return kept if isinstance(kept, list) else [] if kept is None else [kept]


def without(source: str, kernel: str, flags: Collection[str], names: Collection[str]) -> str:
    """The kernel of a module without these options.

    Raises:
        ValueError: an option is still named.
    """
    transformer = Without(kernel, flags, names)
    tree = transformer.visit(ast.parse(source))
    left = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} & transformer.gone
    if left:
        raise ValueError(f"still named: {sorted(left)}")
    return ast.unparse(ast.fix_missing_locations(tree))


def imported(source: str, folder: Path) -> ModuleType:
    """A module of this source, in a file: Triton reads a kernel's source from there."""
    path = folder / f"without_{len(list(folder.iterdir()))}.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Fewer:
    """A kernel launched as one that has more arguments."""

    kernel: Any
    names: list[str]  # of those arguments

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            given = dict(zip(self.names, args, strict=False)) | options
            taken = set(self.names) - set(self.kernel.arg_names)
            self.kernel[grid](**{name: value for name, value in given.items() if name not in taken})

        return launch


def code(target: Target, run: Callable[[], object]) -> list[str]:
    """The one launch of `run` for `target`: its registers, then its instructions.

    Where an argument is missing those behind it move up, so arguments are named by their order.
    """
    with offline(target) as launches:
        run()
    (launch,) = launches
    facts = machine_code.read(launch.assembly)
    lines = [f"{each.predicate} {each.name} {each.operands}" for each in facts.code]
    places = sorted({int(place, 16) for line in lines for place in re.findall(CONSTANT, line)})
    ranked = [re.sub(CONSTANT, lambda found: f"argument {places.index(int(found[1], 16))}", line) for line in lines]
    return [f"{facts.registers} registers", *ranked]


CONSTANT = r"c\[0x0\]\[(0x[0-9a-f]+)\]"

ATTENTION = (
    {"HAS_BIAS", "HAS_RELATIVE", "HAS_ALIBI", "HAS_WINDOW", "HAS_DROPOUT"},
    {"bias_ptr", "bias_stride_sequence", "bias_stride_head", "bias_stride_row", "bias_stride_column"}
    | {"bias_offsets", "bias_step", "slopes_ptr", "slope_log2e", "window", "seed_ptr", "seed"}
    | {"drop_threshold", "drop_scale", "relative_ptr", "relative_stride_head"},
)
LAYER_NORM = (
    {"HAS_RESIDUAL", "HAS_X_BIAS", "HAS_DROPOUT", "STORE_STATS"},
    {"residual_ptr", "residual_stride_row", "x_bias_ptr", "seed_ptr", "drop_threshold", "drop_scale"}
    | {"mean_ptr", "rstd_ptr"},
)


@dataclass(frozen=True)
class Case:
    """A launch with its options off, and what in the source of its kernel belongs to them."""

    name: str
    run: Callable[[], object]
    module: Any
    kernel: str
    flags: Collection[str]
    names: Collection[str]


def calls(target: Target) -> Iterator[Case]:
    """The costly toy, and each kernel with options in its usual sizes."""
    toy = sys.modules[__name__]
    yield Case("costly", lambda: costly(torch.empty(8)), toy, "costly_kernel", {"HAS_SHIFT"}, {"shift", "shifted"})
    for head_dim, lengths, lse in ((64, "aligned", False), (64, "ragged", True), (40, "short", False)):
        for case in cases.attention(head_dim, torch.float16, target, lengths, store_lse=lse):
            yield Case(case.name, case.run, attention, "attention_forward_kernel", *ATTENTION)
    norm, gelu = cases.layer_norm(768, torch.float16), cases.bias_gelu(3072, torch.float16, "none", bias=False)
    yield Case(norm.name, norm.run, layer_norm, "layer_norm_forward_kernel", *LAYER_NORM)
    yield Case(gelu.name, gelu.run, bias_gelu, "bias_gelu_forward_kernel", {"HAS_BIAS"}, {"bias_ptr"})


def differences(target: Target, case: Case, folder: Path) -> list[str]:
    """The lines that only one of the two codes has, in order; none where they are equal."""
    kernel = getattr(case.module, case.kernel)
    copy = imported(without(inspect.getsource(case.module), case.kernel, case.flags, case.names), folder)
    whole = code(target, case.run)
    with patch.object(case.module, case.kernel, Fewer(getattr(copy, case.kernel), kernel.arg_names)):
        bare = code(target, case.run)
    if len(whole) != len(bare):
        return [f"{len(whole)} lines of code, {len(bare)} without the options"]
    return [f"{mine}, without the options {theirs}" for mine, theirs in zip(whole, bare, strict=True) if mine != theirs]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(
            json.dumps(
                {
                    arch: {case.name: differences(KNOWN[arch], case, Path(name)) for case in calls(KNOWN[arch])}
                    for arch in sys.argv[1:]
                }
            )
        )
