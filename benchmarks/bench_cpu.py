"""What is promised of a CPU, each figure against the best rival of the same precision, in one run, in turns.

`pytest benchmarks/bench_cpu.py --full` checks, times and asserts it all in ten minutes at most on two cores, and prints
as it goes. `--benchmark-json=benchmarks/results/MACHINE/cpu.json` keeps it for `make report`. A rival that is not
installed is left out, and said. torch.compile is left out of BERT-base, because compiling takes minutes.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import bench_encoder
import bench_text
import bench_training
import pytest
import torch
import torch.nn.functional as F
from contest import Case, Contender, Standing, Turns, facts, hold, present, show
from measure import answer, answering, ask, pin_threads
from roofline import model_costs
from workloads import WORKLOADS

from fastbert.backend import first_device
from fastbert.cpu.int8 import Int8Matrix, Int8Rows
from fastbert.cpu.layout import in_blocks
from fastbert.cpu.machine import Machine, host
from fastbert.rivals.turns import cpu_seconds, interleaved
from fastbert.tasks.encode import TextEncoder

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(first_device().type != "cpu", reason="of CPUs"),
]

BEGUN = time.perf_counter()
MINUTES = 10.0

# At least so many times the speed of the best rival.
DENSE = {"fp32": 1.03, "bf16": 1.02, "int8": 1.25}
# ... of sentence-transformers' `encode` in float32.
TEXTS_OVER_SENTENCE_TRANSFORMERS = {"fp32": 2.2, "bf16": 4.0, "int8": 6.0}
# ... of our own float32, the texts in int8.
INT8_OVER_FP32 = 1.3
# At least so much of the rate of BERT-base's products by themselves.
SHARE = {"fp32": 0.94, "bf16": 0.94, "int8": 0.75}
# At most so much of the best rival's time for one sequence of 16 tokens.
LATENCY = 0.8
# int8's embeddings of the texts, beside float32's.
COSINES = {"worst": 0.985, "mean": 0.997}

# Rounds of who may be the best; the others have one.
TEXTS_ROUNDS, DENSE_ROUNDS, SHARE_ROUNDS, LATENCY_ROUNDS = 3, 5, 5, 5
TRAINING_ROUNDS, TRAINING_STEPS = 4, 2
FRONT = 1.3  # of the best rival's time in a precision: who took more in each round so far is not the best
CALLS = 100  # of a turn, on 16 tokens
PAUSE = 0.3  # seconds, because threads of the process before spin for a while

DTYPES = ("fp32", "bf16")  # of contests; those in fp32 have int8 too
DENSE_WORK, LATENCY_WORK = WORKLOADS["bert-base b8 s128 full"], WORKLOADS["minilm b1 s16 full"]
DENSE_PROVIDERS = [name for name in bench_encoder.PROVIDERS if name not in ("torch.compile", "fastbert graphed")]
LATENCY_PROVIDERS = ("fastbert", "onnxruntime", "OpenVINO", "CTranslate2", "transformers")
LATENCY_CASE = Case("latency", LATENCY_WORK, "forward", "fp32", "eager")

Held = dict[Case, dict[str, Standing]]


def texts_asked(machine: Machine | str) -> dict[str, float]:
    """Of the texts, by dtype, at least so many times the speed of the best rival; without what the CPU lacks."""
    asked = {"fp32": 1.25, "int8": 1.3}
    if isinstance(machine, Machine):
        if machine.vectors.lanes == 8:  # AVX2
            asked["fp32"] = 1.3
        if machine.bfloat16 is not None:
            asked["bf16"] = 1.4
        if {"+avx512vnni", "+avxvnni"} & set(machine.features.split(",")):
            asked["int8"] = 1.6
    return asked


def need(dtype: str) -> None:
    """Skip the test where the CPU has no instructions for products of this dtype."""
    if dtype not in texts_asked(host()):
        pytest.skip(f"this CPU has no instructions for {dtype}")


def in_front(seconds: Mapping[str, list[float]], dtypes: Mapping[str, str]) -> list[str]:
    """Who is worth another round: ours, who has had none, and the rivals that may be the best of their dtype."""
    rivals = {name: min(times) for name, times in seconds.items() if times and not name.startswith("fastbert")}
    best = {
        dtype: min((rivals[name] for name in rivals if dtypes[name] == dtype), default=0.0) for dtype in dtypes.values()
    }
    return [name for name in seconds if name not in rivals or rivals[name] <= FRONT * best[dtypes[name]]]


def rounds(case: Case, count: int, say: Callable[[str], None]) -> Turns:
    """What gives the contenders of a case so many turns of a call each, or one only, if they are slow."""

    def turns(contenders: Mapping[str, Contender]) -> dict[str, list[float]]:
        dtypes = {name: contender.dtype or case.dtype for name, contender in contenders.items()}
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(count):
            for name in in_front(seconds, dtypes):
                seconds[name].append(cpu_seconds(contenders[name].run, 1))
                speed = case.workload.tokens / seconds[name][-1]
                say(f"  round {number + 1}: {name}, {dtypes[name]}: {speed:,.0f} tokens/s")
        return seconds

    return turns


@pytest.fixture(scope="module")
def timed(pytestconfig: pytest.Config) -> None:
    """For tests of nothing but speed."""
    if pytestconfig.getoption("benchmark_disable"):
        pytest.skip("what is checked here is speed")


@pytest.fixture
def promise(timed: None, benchmark: Any, say: Callable[[str], None]) -> Callable[..., None]:
    """Keep, print and assert a figure; one with a rival's beside it is held by its ratio to that.

    Args of what it gives: the names of the table that reports read.
    """

    def keep(
        what: str, *, ours: float, unit: str, asked: float, seconds: list[float], at_most: bool = False,
        rival: str | None = None, theirs: float | None = None,
    ) -> None:  # fmt: skip
        held = ours if theirs is None else ours / theirs
        beside = "" if theirs is None else f", {rival} {theirs:,.4g}: {held:.3f}"
        line = f"{what}: {ours:,.4g} {unit}{beside}; asked: {'at most' if at_most else 'at least'} {asked:g}"
        kept = held <= asked if at_most else held >= asked
        say(f"PROMISED, {'kept' if kept else 'missed'}: {line}")
        found = {"promise": what, "ours": ours, "unit": unit, "asked": asked, "at_most": at_most}
        present(benchmark, "promised of a CPU", seconds, found | {"rival": rival, "theirs": theirs})
        assert kept, line

    return keep


def measured(held: Held, case: Case) -> dict[str, Standing]:
    """Who was timed in a contest. Its tests run before those of what is promised."""
    if case not in held:
        pytest.skip("its contest was not held: select the tests of the providers too")
    return {name: standing for name, standing in held[case].items() if standing.facts}


def speed(standing: Standing) -> float:
    """Real tokens/s."""
    assert standing.facts is not None and standing.seconds is not None
    return float(standing.facts["tokens_per_s"])


def against_the_best(
    promise: Callable[..., None], what: str, dtype: str, asked: float, of: dict[str, Standing]
) -> None:
    """Promise the speed of ours in a dtype, beside the best rival's in it."""
    mine = {name: one for name, one in of.items() if one.facts and one.facts["dtype"] == dtype}
    ours = mine.pop("fastbert int8" if dtype == "int8" else "fastbert")
    assert mine, "there is no rival to compare with: make bench installs them"
    rival = max(mine, key=lambda name: speed(mine[name]))
    promise(
        f"{what}, {dtype}", ours=speed(ours), unit="tokens/s", asked=asked, seconds=ours.seconds,
        rival=rival, theirs=speed(mine[rival]),
    )  # fmt: skip


# Texts through MiniLM


def texts(dtype: str) -> Case:
    """The case whose contest has this dtype."""
    return bench_text.case_of(bench_text.MANY, "bf16" if dtype == "bf16" else "fp32")


@pytest.mark.parametrize("provider", bench_text.PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_texts(dtype: str, provider: str, compete: Any, say: Callable[[str], None]) -> None:
    need(dtype)
    case = texts(dtype)
    compete(bench_text.CONTEST, case, provider, turns=rounds(case, TEXTS_ROUNDS, say), say=say)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_texts_against_the_best(dtype: str, promise: Any, held: Held) -> None:
    need(dtype)
    against_the_best(promise, "texts", dtype, texts_asked(host())[dtype], measured(held, texts(dtype)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_texts_against_sentence_transformers(dtype: str, promise: Any, held: Held) -> None:
    need(dtype)
    theirs = measured(held, texts("fp32")).get("sentence-transformers")
    if theirs is None:
        pytest.skip("sentence-transformers is not installed")
    ours = measured(held, texts(dtype))["fastbert int8" if dtype == "int8" else "fastbert"]
    promise(
        f"texts, {dtype}, over sentence-transformers in fp32", ours=speed(ours), unit="tokens/s",
        asked=TEXTS_OVER_SENTENCE_TRANSFORMERS[dtype], seconds=ours.seconds,
        rival="sentence-transformers", theirs=speed(theirs),
    )  # fmt: skip


def test_texts_in_int8_against_our_fp32(promise: Any, held: Held) -> None:
    of = measured(held, texts("int8"))
    ours, exact = of["fastbert int8"], of["fastbert"]
    promise(
        "texts, int8, over our fp32", ours=speed(ours), unit="tokens/s", asked=INT8_OVER_FP32, seconds=ours.seconds,
        rival="fastbert in fp32", theirs=speed(exact),
    )  # fmt: skip


@pytest.fixture(scope="module")
def cosines() -> tuple[list[float], dict[str, float]]:
    """Of int8's embeddings of all texts with those in float32, which the contest has held to float64; and seconds."""
    corpus = bench_text.corpus(bench_text.MANY)
    begin = time.perf_counter()
    exact, ours = (
        torch.from_numpy(TextEncoder.from_folder(corpus.folder, dtype=dtype).encode(corpus.texts))
        for dtype in ("fp32", "int8")
    )
    found = F.cosine_similarity(exact.double(), ours.double())
    return [time.perf_counter() - begin], {"worst": found.min().item(), "mean": found.mean().item()}


@pytest.mark.parametrize("which", COSINES)
def test_int8_is_near_float32(which: str, promise: Any, cosines: Any) -> None:
    seconds, found = cosines
    promise(
        f"cosine of int8's texts to fp32's, {which}", ours=found[which], unit="", asked=COSINES[which], seconds=seconds
    )


# BERT-base


def dense(dtype: str) -> Case:
    """The case whose contest has this dtype."""
    return Case("encoder", DENSE_WORK, "forward", "bf16" if dtype == "bf16" else "fp32", "eager")


@pytest.mark.parametrize("provider", DENSE_PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense(dtype: str, provider: str, compete: Any, say: Callable[[str], None]) -> None:
    need(dtype)
    case = dense(dtype)
    compete(bench_encoder.CONTEST, case, provider, turns=rounds(case, DENSE_ROUNDS, say), say=say)


@pytest.mark.parametrize("dtype", DENSE)
def test_dense_against_the_best(dtype: str, promise: Any, held: Held) -> None:
    need(dtype)
    against_the_best(promise, "BERT-base 8 x 128", dtype, DENSE[dtype], measured(held, dense(dtype)))


@pytest.mark.parametrize("dtype", SHARE)
def test_share_of_the_rate_of_products(dtype: str, promise: Any) -> None:
    """Floating-point operations a second of a whole forward pass, beside those of its linear layers alone."""
    machine = host()
    if not isinstance(machine, Machine) or (dtype == "int8" and not machine.int8):
        pytest.skip("no kernels for this CPU")
    need(dtype)
    case, work = dense(dtype), DENSE_WORK
    of = bench_encoder.CONTEST.operands(case)
    ours = bench_encoder.PROVIDERS["fastbert int8" if dtype == "int8" else "fastbert"](case, of)
    hidden, wide = work.hidden, 4 * work.hidden
    shapes = [(hidden, 3 * hidden), (hidden, hidden), (hidden, wide), (wide, hidden)] * work.layers
    linear = 2 * work.tokens * sum(depth * width for depth, width in shapes)
    attention = 4 * hidden * work.layers * sum(length * length for length in work.lengths)
    alone = products(machine, dtype, work.tokens, shapes)
    seconds = interleaved({"forward": ours.run, "products": alone}, SHARE_ROUNDS)
    ours.close()
    rates = {
        "forward": (linear + attention) / statistics.median(seconds["forward"]) / 1e9,
        "products": linear / statistics.median(seconds["products"]) / 1e9,
    }
    promise(
        f"BERT-base 8 x 128, {dtype}, over its linear layers alone", ours=rates["forward"], unit="GFLOP/s",
        asked=SHARE[dtype], seconds=seconds["forward"], rival="linear layers", theirs=rates["products"],
    )  # fmt: skip


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


# One sequence


@pytest.fixture(scope="module")
def latencies(request: pytest.FixtureRequest, say: Callable[[str], None]) -> dict[str, Standing]:
    """Each provider in a process, because the threads of others go on spinning for a while; they take turns."""
    found: dict[str, Standing] = {}
    seconds: dict[str, list[float]] = {}
    commands = {name: [sys.executable, __file__, name] for name in LATENCY_PROVIDERS}
    say(f"{LATENCY_CASE}, each in a process:")
    with answering(commands) as processes:
        for name, process in processes.items():
            found[name] = Standing(**answer(process))
            say(f"  {name}: {found[name].reason or 'right'}")
        ready = {name: process for name, process in processes.items() if not found[name].reason}
        for _ in range(0 if request.config.getoption("benchmark_disable") else LATENCY_ROUNDS):
            for name, process in ready.items():
                time.sleep(PAUSE)
                seconds.setdefault(name, []).append(ask(process))
                say(f"  {name}: {1000 * seconds[name][-1]:.3f} ms")
    contender = Contender(lambda: None, lambda nothing: nothing, LATENCY_WORK.tokens)
    costs = model_costs(LATENCY_WORK, torch.float32, words=LATENCY_WORK.tokens, backward=False)
    for name, times in seconds.items():
        found[name] = Standing(times, facts(name, LATENCY_CASE, contender, times, costs))
    return found


@pytest.mark.parametrize("provider", LATENCY_PROVIDERS)
def test_latency(provider: str, latencies: dict[str, Standing], benchmark: Any) -> None:
    show(benchmark, LATENCY_CASE, latencies[provider])


def test_latency_against_the_best(latencies: dict[str, Standing], promise: Any) -> None:
    times = {name: one.seconds for name, one in latencies.items() if one.seconds}
    median = {name: 1000 * statistics.median(seconds) for name, seconds in times.items()}
    ours = median.pop("fastbert")
    assert median, "there is no rival to compare with: make bench installs them"
    rival = min(median, key=lambda name: median[name])
    promise(
        "one sequence of 16 tokens, fp32, each alone in a process", ours=ours, unit="ms", asked=LATENCY, at_most=True,
        seconds=times["fastbert"], rival=rival, theirs=median[rival],
    )  # fmt: skip


def serve(name: str) -> None:
    """Say on stdout whether a provider is right, and then answer each line on stdin by the mean seconds of a call."""
    pin_threads()
    contest = replace(bench_encoder.CONTEST, providers={name: bench_encoder.PROVIDERS[name]})
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # where converters may print what they like
        [standing] = hold(contest, LATENCY_CASE, timed=False).values()
        run = None if standing.reason else contest.providers[name](LATENCY_CASE, contest.operands(LATENCY_CASE)).run
    print(json.dumps({"unserved": standing.unserved, "broken": standing.broken}), file=out, flush=True)
    for _ in sys.stdin if run else ():
        cpu_seconds(run, CALLS // 10)
        print(cpu_seconds(run, CALLS), file=out, flush=True)


# Training


@pytest.fixture(scope="module")
def training(timed: None, tmp_path_factory: pytest.TempPathFactory, say: Callable[[str], None]) -> dict[str, Any]:
    """Samples and facts of each framework, on batches by length."""
    pytest.importorskip("transformers", reason="the rival is not installed")
    folder = bench_training.prepared(tmp_path_factory.mktemp("training"))
    say("training, batches by length, fp32; the first turn of each is not counted:")
    race = bench_training.race("bucketed", "fp32", TRAINING_ROUNDS, TRAINING_STEPS, folder, say)
    return {name: bench_training.measured("bucketed", "fp32", name, race) for name in bench_training.FRAMEWORKS}


@pytest.mark.parametrize("framework", bench_training.FRAMEWORKS)
def test_training(framework: str, training: dict[str, Any], benchmark: Any) -> None:
    seconds, found = training[framework]
    present(benchmark, "training, bucketed reviews, fp32", seconds, found)


def test_training_against_transformers(training: dict[str, Any], promise: Any) -> None:
    (seconds, ours), (_, theirs) = (training[name] for name in bench_training.FRAMEWORKS)
    promise(
        "training, fp32, batches by length", ours=ours["tokens_per_s"], unit="tokens/s",
        asked=bench_training.LEAST["bucketed"], seconds=seconds, rival="transformers", theirs=theirs["tokens_per_s"],
    )  # fmt: skip


# All of it


def test_ten_minutes_are_enough(promise: Any, request: pytest.FixtureRequest) -> None:
    if request.config.getoption("keyword"):
        pytest.skip("only a part of it ran")
    seconds = time.perf_counter() - BEGUN
    promise("all of bench_cpu.py", ours=seconds / 60, unit="minutes", asked=MINUTES, at_most=True, seconds=[seconds])


if __name__ == "__main__":
    serve(sys.argv[1])
