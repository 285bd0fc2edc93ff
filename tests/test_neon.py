"""Kernels of ARM64, which an emulator runs: each test of test_cpu.py that takes a machine, on those of `arm`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from types import FunctionType
from typing import Any

import arm
import pytest
import test_cpu
import torch

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(arm.lacking()), reason=f"no {', '.join(arm.lacking())}: {arm.PACKAGES} run this"),
]

# What takes time says nothing under an emulator.
LEFT_OUT = {"test_the_time_of_a_window_grows_with_it_and_not_with_the_length"}

PLAIN = pytest.param(arm.PLAIN, torch.float32, id="plain")
DOTPROD = pytest.param(arm.DOTPROD, torch.float32, id="dotprod")
FULL = pytest.param(arm.FULL, torch.bfloat16, id="bfloat16 and i8mm")


@pytest.fixture(autouse=True, scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with arm.installed(tmp_path_factory.mktemp("arm")):
        yield


# Of these parameters fewer values are enough: vectors are narrow here, and each case takes a second or two.
FEWER: dict[str, list[Any]] = {
    "head_dim": [1, 13, 26, 64, 100],
    "lengths": [[150, 0, 3, 97]],
    "rows": [1, 9, 300],
    "width": [7, 17, 19, 100],
}


def names_of(mark: Any) -> set[str]:
    """What `pytest.mark.parametrize` gives."""
    names = mark.args[0]
    return {names} if isinstance(names, str) else set(names)


def fewer(mark: Any) -> Any:
    """The same parameters, those of `FEWER` with fewer values."""
    names, values = mark.args
    if names not in FEWER:
        return mark
    return pytest.mark.parametrize(names, [value for value in values if value in FEWER[names]]).mark


def on_arm(judge: Any) -> Callable[..., None]:
    """The same test, with machines of ARM64 in place of those that it names."""
    asked = signature(judge).parameters
    forms = [DOTPROD, FULL] if "int8" in judge.__name__ else [PLAIN, FULL]
    if "dtype" in asked:
        of_machines = pytest.mark.parametrize(("machine", "dtype"), forms)
    else:
        of_machines = pytest.mark.parametrize("machine", [pytest.param(form.values[0], id=form.id) for form in forms])
    test = FunctionType(judge.__code__, judge.__globals__, judge.__name__, judge.__defaults__)
    test.pytestmark = [fewer(mark) for mark in judge.pytestmark if not {"machine", "dtype"} & names_of(mark)]
    return of_machines(test)


for name, judge in vars(test_cpu).items():
    if name.startswith("test_") and name not in LEFT_OUT and "machine" in signature(judge).parameters:
        globals()[name] = on_arm(judge)
