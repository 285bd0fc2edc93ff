"""Toy kernels, some wrong on purpose, through the offline compile harness; prints their violations as JSON.

test_static.py runs this file in a process of its own: Triton must not be in its interpreter.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton import knobs

from fastbert.kernels.dispatch import Prepared, dispatch
from fastbert.kernels.target import KNOWN

sys.path.append(str(Path(__file__).parent.parent / "benchmarks" / "static"))
from cases import Case
from machine_code import MATRIX
from offline import inspect, offline


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, stride, depth, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    inner = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        a = tl.load(a_ptr + rows * stride + start + inner[None, :])
        b = tl.load(b_ptr + (start + inner)[:, None] * stride + columns)
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + rows * stride + columns, acc.to(c_ptr.dtype.element_ty))


@triton.jit
def add_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + column, tl.load(x_ptr + column, mask=column < size) + 1.0, mask=column < size)


@triton.jit
def wrong_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), no_such_name)  # noqa: F821


def matmul(tile: tuple[int, int, int], num_warps: int, num_stages: int, stride: int = 1024) -> None:
    a = torch.empty(1024, stride, dtype=torch.float16)
    m, n, k = tile
    matmul_kernel[(1,)](
        a, a, a, stride, 1024, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, num_warps=num_warps, num_stages=num_stages
    )


def add(size: int, grid: tuple[int, ...] = (1,)) -> None:
    x = torch.empty(size, dtype=torch.float16)
    add_kernel[grid](x, x, size, BLOCK=256)


def toys(arch: str) -> list[Case]:
    """The toys; the one that spills has more than 512 accumulators a lane on AMD, 256 on NVIDIA."""
    warps = 1 if KNOWN[arch].backend == "hip" else 4
    matrix = (MATRIX[arch],)
    return [
        Case("good", partial(matmul, (64, 64, 32), 4, 2), matrix),
        Case("spills", partial(matmul, (256, 128, 32), warps, 1), matrix),
        Case("no dot", partial(add, 1000), matrix),
        Case("row-wise", partial(add, 1000)),
        Case("too much shared", partial(matmul, (128, 128, 128), 8, 5), matrix),
        Case("idle", int),
        Case("wrong", partial(wrong_kernel[(1,)], torch.empty(64), BLOCK=64)),
    ]


def launches(arch: str) -> list[dict[str, object]]:
    """What is recorded of launches that differ in what Triton specialises on, and of one that does not."""
    with offline(KNOWN[arch]) as recorded:
        matmul((64, 64, 32), 4, 2)
        matmul((64, 64, 32), 4, 2, stride=1001)
        add(1000, grid=(3, 2))
        add(1001, grid=(4,))
    return [
        {
            "kernel": launch.kernel,
            "key": launch.key,
            "grid": launch.grid,
            "constexprs": launch.constexprs,
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "shared": launch.shared,
            "stages": sorted(launch.assembly),
        }
        for launch in recorded
    ]


def dispatched(arch: str) -> dict[str, list[str]]:
    """The compiled code of launches that differ in what it may depend on: found by Triton, and by `dispatch` twice."""
    half, single = torch.empty(1024, dtype=torch.float16), torch.empty(1024)
    large = torch.empty(2**31, dtype=torch.float16)  # memory that nothing touches
    sizes = 1, 2, 16, 17, 2**31 + 16, 2**31 + 17
    arguments = [(x, x, size) for x in (half, half[1:], single, single[1:], large) for size in sizes]
    with offline(KNOWN[arch]) as recorded:
        for x, out, size in arguments:
            add_kernel[(1,)](x, out, size, BLOCK=256)
        for x, out, size in arguments * 2:
            dispatch(add_kernel, (1, 1, 1), x, out, size, BLOCK=256)
        dispatch(add_kernel, (1, 1, 1), *arguments[0], BLOCK=512)
    keys = [launch.key for launch in recorded]
    many = len(arguments)
    return {"triton": keys[:many], "first": keys[many : 2 * many], "again": keys[2 * many : -1], "other": keys[-1:]}


def watched(arch: str) -> list[str]:
    """The kernels that a profiler's hooks are told of, before and after the first launch of its kind and the second."""
    x, told = torch.empty(1024), list[str]()
    runtime = knobs.runtime
    with offline(KNOWN[arch]):
        start = Prepared(add_kernel, BLOCK=256)
        for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
            hook.add(note := lambda described: told.append(described.get()["name"]))
            for _ in range(2):
                start((1, 1, 1), x, x, 1000)
            hook.remove(note)
            start((1, 1, 1), x, x, 1000)
    return told


if __name__ == "__main__":
    violations = {
        arch: {case.name: next(iter(inspect(KNOWN[arch], [case]))).violations for case in toys(arch)}
        for arch in sys.argv[1:]
    }
    found = {arch: dispatched(arch) for arch in sys.argv[1:]}
    made = {"launches": launches(sys.argv[1]), "watched": watched(sys.argv[1])}
    print(json.dumps({"violations": violations, "dispatched": found, **made}))
