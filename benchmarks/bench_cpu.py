"""What is promised of a CPU, each figure against the best rival of the same precision, in one run, in turns.

`pytest benchmarks/bench_cpu.py --full -s` prints and asserts them all, in a quarter of an hour on two cores. A rival
that is not installed is left out, and said.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import bench_encoder
import bench_text
import pytest
import torch
import torch.nn.functional as F
from contest import Case, Contest, Standing, hold
from measure import pin_threads
from workloads import workload

from fastbert.backend import first_device
from fastbert.cpu.int8 import Int8Matrix, Int8Rows
from fastbert.cpu.layout import in_blocks
from fastbert.cpu.machine import Machine, host
from fastbert.rivals.turns import interleaved
from fastbert.tasks.encode import TextEncoder

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(first_device().type != "cpu", reason="of CPUs"),
]

# At least so many times the speed of the best rival.
TEXTS = {"fp32": 1.25, "bf16": 1.4, "int8": 1.6}
DENSE = {"fp32": 1.03, "bf16": 1.02, "int8": 1.25}
# ... of sentence-transformers' `encode` in float32.
TEXTS_OVER_SENTENCE_TRANSFORMERS = {"fp32": 2.2, "bf16": 4.0, "int8": 6.0}
# At least so much of the rate of BERT-base's products by themselves.
SHARE = {"fp32": 0.94, "bf16": 0.94, "int8": 0.75}
# At most so much of the best rival's time for one sequence of 16 tokens.
LATENCY = 0.8
LATENCY_RIVALS = ("onnxruntime", "OpenVINO", "CTranslate2", "transformers")
# int8's embeddings of the texts, beside float32's.
COSINES = {"worst": 0.985, "mean": 0.997}

BUDGET = 100.0  # seconds for the rounds of a contest
CALLS, TURNS = 200, 7
DENSE_SHAPE = ("bert-base", [128] * 8)


def standings(contest: Contest, case: Case) -> dict[str, Standing]:
    """Of all that can run here, in the case's precision and in int8."""
    found = hold(contest, case, [name for name in contest.providers if "call" not in name], budget=BUDGET)
    for standing in found.values():
        assert not standing.broken, standing.broken
        if standing.unserved:
            print(f"\nleft out: {standing.unserved}", end="")
    return {name: standing for name, standing in found.items() if standing.facts}


def ahead(what: str, dtype: str, of: Mapping[str, Standing], least: float) -> bool:
    """Whether fastbert is so many times as fast as the best rival among those in `dtype`."""
    speed = {name: one.facts["tokens_per_s"] for name, one in of.items() if one.facts and one.facts["dtype"] == dtype}
    ours = max(speed.pop(name) for name in list(speed) if name.startswith("fastbert"))
    best = max(speed, key=lambda name: speed[name])
    print(f"\n{what}, {dtype}: {ours:.0f} tokens/s, {best} {speed[best]:.0f}: {ours / speed[best]:.2f}", end="")
    return ours >= least * speed[best]


def test_texts() -> None:
    exact, half = (
        standings(bench_text.CONTEST, bench_text.case_of(bench_text.MANY, dtype)) for dtype in ("fp32", "bf16")
    )
    slowest, kept = exact.get("sentence-transformers"), []
    for dtype, of in (("fp32", exact), ("bf16", half), ("int8", exact)):
        kept.append(ahead("texts", dtype, of, TEXTS[dtype]))
        if slowest is not None and slowest.facts is not None:
            ours = of["fastbert int8" if dtype == "int8" else "fastbert"].facts
            assert ours is not None
            ratio = ours["tokens_per_s"] / slowest.facts["tokens_per_s"]
            print(f"; {ratio:.2f} times sentence-transformers in fp32", end="")
            kept.append(ratio >= TEXTS_OVER_SENTENCE_TRANSFORMERS[dtype])
    assert all(kept)


def test_int8_is_near_float32() -> None:
    corpus = bench_text.corpus(bench_text.MANY)
    encoders = (
        TextEncoder.from_folder(corpus.folder, dtype="fp32"),
        TextEncoder.from_folder(corpus.folder, dtype="int8"),
    )
    exact, ours = (torch.from_numpy(encoder.encode(corpus.texts)) for encoder in encoders)
    cosine = F.cosine_similarity(exact, ours)
    print(f"\nint8: cosine {cosine.min():.4f} at worst, {cosine.mean():.4f} in the mean", end="")
    assert cosine.min() >= COSINES["worst"] and cosine.mean() >= COSINES["mean"]


def test_dense() -> None:
    work = workload("dense", *DENSE_SHAPE)
    exact, half = (
        standings(bench_encoder.CONTEST, Case("encoder", work, "forward", dtype, "eager")) for dtype in ("fp32", "bf16")
    )
    held = (("fp32", exact), ("bf16", half), ("int8", exact))
    kept = [ahead("BERT-base 8 x 128", dtype, of, DENSE[dtype]) for dtype, of in held]
    assert all(kept)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_share_of_the_rate_of_products(dtype: str) -> None:
    """Floating-point operations a second of a whole forward pass, beside those of its linear layers alone."""
    machine = host()
    if not isinstance(machine, Machine) or (dtype == "int8" and not machine.int8):
        pytest.skip("no kernels for this CPU")
    work = workload("dense", *DENSE_SHAPE)
    case = Case("encoder", work, "forward", "fp32" if dtype == "int8" else dtype, "eager")
    of = bench_encoder.CONTEST.operands(case)
    ours = bench_encoder.PROVIDERS["fastbert int8" if dtype == "int8" else "fastbert"](case, of)
    hidden, wide = work.hidden, 4 * work.hidden
    shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, wide), (wide, hidden)] * work.layers
    linear = 2 * work.tokens * sum(depth * width for depth, width in shapes)
    attention = 4 * hidden * work.layers * sum(length * length for length in work.lengths)
    seconds = interleaved({"forward": ours.run, "products": products(machine, dtype, work.tokens, shapes)}, 11)
    rate = {
        "forward": (linear + attention) / statistics.median(seconds["forward"]),
        "products": linear / statistics.median(seconds["products"]),
    }
    share = rate["forward"] / rate["products"]
    forward, alone = (round(one / 1e9) for one in rate.values())
    print(f"\nBERT-base 8 x 128, {dtype}: {forward} GFLOP/s, products {alone}: {share:.3f}", end="")
    ours.close()
    assert share >= SHARE[dtype]


def products(machine: Machine, dtype: str, rows: int, shapes: list[tuple[int, int]]) -> Callable[[], Any]:
    """Linear layers of these shapes by the same kernels, with a bias and nothing else."""
    from fastbert.cpu.linear import linear
    from fastbert.cpu.linear_int8 import linear_int8
    from fastbert.cpu.program import Call, Program
    from fastbert.cpu.row_wise import row_wise

    calls: list[Call] = []
    for depth, width in shapes:
        x, weight, bias = torch.randn(rows, depth), torch.randn(width, depth) / depth**0.5, torch.randn(width)
        if dtype == "int8":
            quantized = Int8Rows.empty(rows, depth)
            row_wise(machine, x, out_int8=quantized).run()
            calls += linear_int8(machine, quantized, Int8Matrix.of(weight), bias, out=torch.empty(rows, width))
        else:
            to = torch.bfloat16 if dtype == "bf16" else torch.float32
            out = torch.empty(rows, width, dtype=to)
            calls.append(linear(machine, x.to(to), in_blocks(weight.to(to), machine.vectors.columns), bias.to(to), out))
    return Program(calls).run


def test_latency() -> None:
    """Each alone in a process, because the threads of others go on spinning for a while; in turns, twice."""
    milliseconds: dict[str, list[float]] = {}
    for _ in range(2):
        for name in ("fastbert", *LATENCY_RIVALS):
            done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True)
            if done.returncode:
                print(f"\nleft out: {name}: {done.stderr.strip().splitlines()[-1:]}", end="")
            else:
                milliseconds.setdefault(name, []).append(float(done.stdout.split()[-1]))
    best = {name: min(times) for name, times in milliseconds.items()}
    ours = best.pop("fastbert")
    rival = min(best, key=lambda name: best[name])
    print(f"\n16 tokens, fp32: {ours:.3f} ms, {rival} {best[rival]:.3f}: {ours / best[rival]:.2f} of its time", end="")
    assert ours <= LATENCY * best[rival]


def latency(name: str) -> float:
    """Milliseconds of a call on 16 tokens: the median of turns."""
    pin_threads()
    case = Case("latency", workload("16 tokens", "minilm", [16]), "forward", "fp32", "eager")
    contest = replace(bench_encoder.CONTEST, providers={name: bench_encoder.PROVIDERS[name]})
    [standing] = hold(contest, case, timed=False).values()
    assert not (standing.broken or standing.unserved), standing
    run = contest.providers[name](case, contest.operands(case)).run
    turns = []
    for _ in range(TURNS):
        for _ in range(CALLS // 10):
            run()
        begin = time.perf_counter()
        for _ in range(CALLS):
            run()
        turns.append(1000 * (time.perf_counter() - begin) / CALLS)
    return statistics.median(turns)


if __name__ == "__main__":
    print(latency(sys.argv[1]))
