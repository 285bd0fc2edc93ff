"""FASTBERT_CHECK=1: a write outside of our memory is seen and named, and what nothing was written to is NaN."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastbert.cpu import guards, memory
from fastbert.cpu.machine import Machine, host
from fastbert.cpu.memory import FLOAT32, PerWorker
from fastbert.cpu.program import Kernel, compiled
from fastbert.cpu.row_wise import PARAMETERS, row_wise
from fastbert.errors import BackendError

pytestmark = pytest.mark.cpu

HOST = host()
if not isinstance(HOST, Machine):
    pytest.skip(f"{HOST}: Linux on x86-64 with AVX2 runs this", allow_module_level=True)


@pytest.fixture(autouse=True)
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "ON", True)


@pytest.mark.parametrize("width", [1, 17, 100])
def test_a_kernel_that_writes_past_its_memory_is_named(width: int) -> None:
    """It is told of one row more than there are."""
    x, out = (memory.room((rows, width), torch.float32) for rows in (4, 3))
    x.fill_(1.0)
    call = row_wise(HOST, x[:3], out=out)
    call.run()
    call.fields[3 + PARAMETERS.index("rows")] += 1
    with pytest.raises(BackendError, match=rf"row_wise: out.*{4 * width} bytes written past its memory"):
        call.run()


def test_a_kernel_that_writes_before_its_memory_is_named() -> None:
    out = memory.room((3, 16), torch.float32)
    call = row_wise(HOST, torch.ones(3, 16, dtype=torch.float32), out=out)
    call.fields[3 + PARAMETERS.index("out")] -= out.itemsize
    with pytest.raises(BackendError, match=r"row_wise: out.*4 bytes written before its memory"):
        call.run()


@pytest.fixture(scope="module")
def writer() -> Kernel:
    """Of a task: 1.0 to an offset of bytes from an address."""
    return compiled(
        HOST,
        "writer",
        ("memory", "offset"),
        lambda code: code.store(code.number(1), code["memory"] + code["offset"]),
    )


@pytest.mark.parametrize("offset", [0, 24, 32, 2**16, -8])
def test_scratch_of_a_worker_is_watched(offset: int, writer: Kernel) -> None:
    call = writer(1, memory=PerWorker(32), offset=offset)
    if 0 <= offset < 32:
        call.run()
    else:
        with pytest.raises(BackendError, match=r"scratch.*8 bytes written"):
            call.run()


@pytest.mark.parametrize("named", [{}, {"memory": 0}, {"memory": 0, "offset": 0, "rows": 1}], ids=str)
def test_arguments_go_by_the_names_of_parameters(named: dict[str, int], writer: Kernel) -> None:
    with pytest.raises(TypeError, match=r"writer: got .*; expected memory, offset"):
        writer(1, **named)


def test_memory_that_is_not_ours_is_not_looked_at(writer: Kernel) -> None:
    """That of a caller, who may have something beside it."""
    whole = torch.zeros(8, dtype=torch.float32)
    writer(1, memory=(whole[:2], FLOAT32, 2), offset=8).run()
    assert whole[2:4].view(torch.int64) == 1


def test_memory_given_back_is_not_looked_at() -> None:
    memory.room((1,), torch.float32)  # forgets what earlier tests gave back
    before = len(guards._sizes)
    for _ in range(50):
        x = memory.room((1000,), torch.float32)
        row_wise(HOST, x[None], out=x[None]).run()
    assert len(guards._sizes) - before < 25


def test_threads_make_memory_at_once() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            made = list(pool.map(lambda rows: memory.room((rows % 7, 3), torch.float32), range(600)))
            list(pool.map(lambda rows: memory.room((rows % 7, 3), torch.float32).sum(), range(600)))
    finally:
        sys.setswitchinterval(before)
    assert all(x.untyped_storage().data_ptr() in guards._sizes for x in made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 5)], ids=str)
def test_what_nothing_was_written_to_shows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = memory.room(shape, dtype)
    assert x.shape == shape and x.dtype == dtype and x.is_contiguous()
    assert (x.isnan() if dtype.is_floating_point else x == (255 if dtype == torch.uint8 else -1)).all()


@pytest.mark.parametrize(("value", "on"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_the_environment_turns_it_on(value: str | None, on: bool) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "FASTBERT_CHECK"}
    environment |= {} if value is None else {"FASTBERT_CHECK": value}
    asked = [sys.executable, "-c", "from fastbert.cpu import guards; print(guards.ON)"]
    assert subprocess.check_output(asked, env=environment, text=True).strip() == str(on)
