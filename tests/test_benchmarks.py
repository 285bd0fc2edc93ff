"""The harness of the benchmarks: what it runs on, that it refuses what is wrong, and that it shows what it measured."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import statistics
import subprocess
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_attention
import bench_cpu
import bench_encoder
import contest
import environment
import gpu as gpu_suite
import measure
import pytest
import roofline
import torch
import workloads
from contest import Case, Contender, Contest, Operands, Replay, UnservedError, WrongResultError, differentiate, on_rows
from processes import PYTHON, heed_signals
from roofline import Ceilings, Floor

from fastbert import reference
from fastbert.cpu.machine import Machine
from fastbert.errors import ArgumentError
from fastbert.kernels import cost, target
from fastbert.kernels.cost import Cost
from fastbert.packing import Packing
from fastbert.rivals import turns

ROOT = Path(__file__).resolve().parent.parent
CEILINGS = Ceilings(copy_gb_per_s=10.0, gemm_gflops={"fp32": 100.0, "bf16": 200.0})
GRIDS = ("TENSORRT", "BYTETRANSFORMER", "KERNL", "FLASH_ATTENTION", "MIXES", "LATENCY")


# Workloads


def test_every_workload_is_sound() -> None:
    for name, work in workloads.WORKLOADS.items():
        assert name == work.name
        assert work.hidden == work.heads * work.head_dim
        assert work.lengths and all(1 <= length <= work.max_seqlen for length in work.lengths)
        assert work.tokens == sum(work.lengths) <= work.padded_tokens == len(work.lengths) * max(work.lengths)
        assert name.startswith(f"{work.model} b{work.batch} s")
    assert {work.head_dim for work in workloads.FLASH_ATTENTION} == {64, 128}
    assert {work.tokens for work in workloads.FLASH_ATTENTION} == {16384}


def test_one_name_means_one_workload() -> None:
    every = list(itertools.chain.from_iterable(getattr(workloads, grid) for grid in GRIDS))
    assert all(workloads.WORKLOADS[work.name] == work for work in every)
    assert {work.name for work in every} == set(workloads.WORKLOADS)


def test_lengths_are_the_same_each_time() -> None:
    for mix in workloads.MIX.values():
        assert mix(16, 256) == mix(16, 256)
        assert max(mix(16, 256)) == 256


def test_bytetransformers_mean_is_06_of_the_longest() -> None:
    for work in workloads.BYTETRANSFORMER:
        longest = int(work.name.split()[2].removeprefix("s"))
        assert statistics.mean(work.lengths) == pytest.approx(0.6 * longest, abs=0.5)
        assert work.batch == 1 or work.max_seqlen == longest


def test_a_long_tail_is_mostly_short() -> None:
    lengths = workloads.long_tail(32, 512)
    assert statistics.median(lengths) < 512 / 6 < statistics.mean(lengths) < 512 / 3


def test_what_runs_by_default_is_there_and_small() -> None:
    default = [work for work in workloads.WORKLOADS.values() if not work.full]
    assert {work.name for work in default} == workloads.DEFAULT
    assert {work.model for work in default} >= {"minilm", "bert-base"}
    assert any(work.tokens < work.padded_tokens for work in default) and any(work.batch == 1 for work in default)
    assert all(work.padded_tokens <= 4096 for work in default)


# Roofline


def test_a_floor_is_the_longer_of_two() -> None:
    assert roofline.floor(Cost(flops=10**9, min_bytes=1), "fp32", CEILINGS) == Floor(0.01, "compute")
    assert roofline.floor(Cost(flops=10**9, min_bytes=10**9), "fp32", CEILINGS) == Floor(0.1, "memory")
    assert roofline.floor(Cost(flops=10**9, min_bytes=1), "bf16", CEILINGS) == Floor(0.005, "compute")


def test_a_dtype_without_a_ceiling_is_named() -> None:
    with pytest.raises(ArgumentError, match=r"'fp16'.*fp32, bf16"):
        roofline.floor(Cost(1, 1), "fp16", CEILINGS)


def test_floors_of_ops_add_up() -> None:
    costs = [Cost(10**9, 1), Cost(1, 10**8), Cost(1, 10**7)]
    total = roofline.floor_of_all(costs, "fp32", CEILINGS)
    assert total.seconds == pytest.approx(0.01 + 0.01 + 0.001)
    assert total.bound == "memory"


def test_a_models_products_are_two_flops_a_weight_and_token() -> None:
    work = workloads.WORKLOADS["bert-base b8 s128 full"]
    weights = work.layers * (4 * work.hidden**2 + 2 * work.hidden * work.intermediate)
    forward = roofline.model_costs(work, torch.float32, words=100, backward=False)
    both = roofline.model_costs(work, torch.float32, words=100, backward=True)
    products = 2 * weights * work.tokens
    attended = work.layers * cost.attention(work.lengths, work.heads, work.head_dim, torch.float32).flops
    flops, all_flops = sum(one.flops for one in forward), sum(one.flops for one in both)
    assert products + attended < flops < 1.02 * (products + attended)  # GELU and LayerNorm are the rest
    assert 2.95 * flops < all_flops < 3.1 * flops


def test_ceilings_of_a_device_that_is_not_there() -> None:
    with pytest.raises(ArgumentError, match="device: got meta; expected cpu"):
        roofline.ceilings(torch.device("meta"))
    if not torch.cuda.is_available():
        with pytest.raises(ArgumentError, match="this torch sees no GPU"):
            roofline.ceilings(torch.device("cuda"))


@pytest.mark.cpu
def test_ceilings_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**16)
    monkeypatch.setattr(roofline, "GEMMS", [(16, 16)])
    monkeypatch.setattr(roofline, "GEMM_ROWS", {"cpu": 32})
    monkeypatch.setattr(turns, "SETTLE", 0)
    roofline.ceilings.cache_clear()
    found = roofline.ceilings(torch.device("cpu"))
    assert found.copy_gb_per_s > 0 and {"fp32", "bf16"} <= set(found.gemm_gflops)
    assert roofline.ceilings(torch.device("cpu")) is found
    roofline.ceilings.cache_clear()  # these were of a toy


# Environment


def test_the_environment_is_names_and_versions() -> None:
    found = environment.environment()
    assert all(isinstance(value, str) and value for value in found.values())
    assert found["torch"] == torch.__version__
    assert found["threads"] == str(torch.get_num_threads())
    assert found["flash-attn"] == "not installed" or found["flash-attn"][0].isdigit()


def test_an_unknown_gpu_is_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "first_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Q1")
    with target.pretend(target.Target("cuda", "sm_75", 32, 64 * 1024)):
        found = environment.environment()
    assert found["device"] == "NVIDIA Q1"
    assert found["gpu target"].startswith("sm_75: not one") and "sm_90" in found["gpu target"]


# Timing


def test_busy_seconds_leave_out_what_a_call_waits_for() -> None:
    assert measure.busy_seconds(lambda: time.sleep(0.05), 1) < 0.03

    def busy() -> None:
        end = time.process_time() + 0.05
        while time.process_time() < end:
            pass

    assert measure.busy_seconds(busy, 2) >= 0.05


ANSWERS = "import sys, json; [print(json.dumps({'number': i}), flush=True) for i, _ in enumerate(sys.stdin)]"


def test_processes_answer_in_turns_and_end() -> None:
    commands = {name: [*PYTHON, "-c", ANSWERS] for name in ("a", "b")}
    with measure.answering(commands) as processes:
        assert [measure.ask(processes[name])["number"] for name in ("a", "b", "a", "b")] == [0, 0, 1, 1]
    assert all(process.poll() is not None for process in processes.values())


def test_a_process_that_ends_is_an_error() -> None:
    ended = pytest.raises(RuntimeError, match="ended without an answer")
    with measure.answering({"a": [*PYTHON, "-c", "pass"]}) as processes, ended:
        measure.answer(processes["a"])


class FakeGpu:
    """Enough of `torch.cuda`: a clock that each kernel moves, and a log of what happened."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, end: Any) -> float:
                assert gpu.log[-1] == "synchronize"
                return end.at - self.at

        class Graph:
            def __init__(self) -> None:
                self.milliseconds = 0.0

            def replay(self) -> None:
                gpu.launch("replay", self.milliseconds)

        class Recording:
            def __init__(self, graph: Graph) -> None:
                self.graph = graph

            def __enter__(self) -> None:
                gpu.log.append("capture")
                self.begin = gpu.now

            def __exit__(self, *_: Any) -> None:
                gpu.log.append("captured")
                self.graph.milliseconds, gpu.now = gpu.now - self.begin, self.begin  # nothing has run yet

        stream = SimpleNamespace(wait_stream=lambda other: None)
        self.cuda = SimpleNamespace(
            Event=Event,
            CUDAGraph=Graph,
            graph=Recording,
            Stream=lambda: stream,
            current_stream=lambda: stream,
            stream=lambda stream: nullcontext(),
            synchronize=lambda: self.log.append("synchronize"),
        )

    def launch(self, what: str, milliseconds: float) -> None:
        self.log.append(what)
        self.now += milliseconds


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(measure, "torch", SimpleNamespace(cuda=fake.cuda, empty=torch.empty, int8=torch.int8))
    monkeypatch.setattr(measure, "FLUSH", 1)
    return fake


def test_a_gpu_is_timed_between_events_with_its_cache_flushed(gpu: FakeGpu) -> None:
    timer = measure.DeviceTimer(torch.device("cpu"))
    timer.flush = SimpleNamespace(zero_=lambda: gpu.launch("flush", 100.0))  # type: ignore[assignment]
    assert timer(lambda: gpu.launch("kernel", 3.0), 2) == pytest.approx(0.003)
    assert gpu.log == ["flush", "kernel", "flush", "kernel", "synchronize"]


def test_a_graph_is_captured_once_after_a_rehearsal(gpu: FakeGpu) -> None:
    replay = measure.captured(lambda: gpu.launch("kernel", 3.0))
    assert gpu.log == ["kernel"] * 3 + ["capture", "kernel", "captured"]
    replay()
    replay()
    assert gpu.log[-2:] == ["replay", "replay"]


def test_a_turn_on_a_gpu_is_a_few_dozen_calls(gpu: FakeGpu) -> None:
    """Each is flushed for, which takes ten times as long as a short kernel, and is in nobody's budget."""
    timer = measure.DeviceTimer(torch.device("cpu"))
    timer(lambda: gpu.launch("kernel", 0.001), 20_000)
    assert gpu.log.count("kernel") == measure.MOST


@pytest.fixture
def graph_timer(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> measure.GraphTimer:
    """Its flushes take 100 ms."""
    flush = SimpleNamespace(zero_=lambda: gpu.launch("flush", 100.0))
    monkeypatch.setattr(measure.torch, "empty", lambda *shape, **options: flush)
    return measure.GraphTimer(torch.device("cpu"))


def test_a_short_call_is_one_of_many_in_a_graph(gpu: FakeGpu, graph_timer: measure.GraphTimer) -> None:
    gpu.log.clear()
    seconds = graph_timer.repeated(lambda: gpu.launch("kernel", 3.0), measure.REPEATS)
    captured = gpu.log[gpu.log.index("capture") + 1 : gpu.log.index("captured")]
    assert captured == ["flush", "kernel"] * measure.REPEATS, "L2 is cold before each"
    gpu.log.clear()
    assert graph_timer(seconds, 2 * measure.REPEATS) == pytest.approx(0.003)
    assert gpu.log == ["replay", "synchronize"] * 4, "the host launches graphs alone, of calls and of flushes in turns"
    gpu.log.clear()
    assert graph_timer(seconds, 1) == pytest.approx(0.003) and gpu.log.count("replay") == 2
    graph_timer(seconds, 20_000)
    assert gpu.log.count("replay") <= 2 + 2 * measure.MOST / measure.REPEATS + 2


# Contests

WORK = workloads.Workload("toy b2 s5", "toy", 16, 2, 8, 32, 1, (5, 3), False)
CASE = Case("bias_gelu", WORK, "forward+backward", "fp32", "eager")


def operands(case: Case) -> Operands:
    return Operands.random(case, {"x": (8, 32), "bias": (32,)}, (8, 32))


def right(case: Case, of: Operands) -> Contender:
    return on_rows(case, of, reference.bias_gelu)


def delayed(case: Case, of: Operands) -> Contender:
    contender = right(case, of)

    def run() -> Any:
        time.sleep(0.05)
        return contender.run()

    return replace(contender, run=run)


def wrong(case: Case, of: Operands) -> Contender:
    return on_rows(case, of, lambda x, bias: reference.bias_gelu(x, bias, approximate="tanh"))


def wrong_gradient(case: Case, of: Operands) -> Contender:
    return on_rows(case, of, lambda x, bias: reference.bias_gelu(x, bias) * 1.0 + (x - x.detach()) * 0.01)


def absent(case: Case, of: Operands) -> Contender:
    raise UnservedError("it is not installed")


def crashing(case: Case, of: Operands) -> Contender:
    raise RuntimeError("mat1 and mat2 must have the same dtype")


def make(**providers: Any) -> Contest:
    return Contest(
        providers,
        operands,
        lambda case, of: differentiate(case, of, reference.bias_gelu),
        lambda case, of: differentiate(case, of.to(torch.float64), reference.bias_gelu),
        lambda case, of: [cost.bias_gelu(8, 32, torch.float32)],
    )


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No real timing; the list of who was timed."""
    timed: list[str] = []

    def interleaved(runs: Any, **options: Any) -> dict[str, list[float]]:
        timed.extend(runs)
        return {name: [0.002, 0.001, 0.003] for name in runs}

    monkeypatch.setattr(contest, "interleaved", interleaved)
    monkeypatch.setattr(contest, "ceilings", lambda device: CEILINGS)
    return timed


@pytest.mark.parametrize(("kernel", "said"), [(wrong, "out: largest error"), (wrong_gradient, "dx: largest error")])
def test_a_wrong_kernel_is_not_timed(quick: list[str], kernel: Any, said: str) -> None:
    standings = contest.hold(make(fastbert=kernel, rival=right), CASE)
    assert quick == ["rival"]
    assert standings["fastbert"].seconds is None and standings["fastbert"].facts is None
    broken = standings["fastbert"].broken
    assert broken is not None and broken.startswith("fastbert, bias_gelu forward+backward, toy b2 s5, fp32: refusing")
    assert said in broken
    assert standings["rival"].seconds == [0.002, 0.001, 0.003]


def test_a_result_that_is_missing_or_not_finite_is_refused() -> None:
    exact = {"out": torch.ones(2, 2, dtype=torch.float64)}
    plain = {"out": torch.ones(2, 2)}
    lacking = Contender(dict, lambda results: results, 2)
    with pytest.raises(WrongResultError, match=r"it gives \[\], and not \['out'\]"):
        contest.check("it", lacking, plain, exact, 2.0, rival=True)
    nan = Contender(lambda: {"out": torch.full((2, 2), torch.nan)}, lambda results: results, 2)
    for allowed in (None, 0.5):
        with pytest.raises(WrongResultError):
            contest.check("it", replace(nan, least_cosine=allowed), plain, exact, 2.0, rival=True)


def test_int8_is_held_to_a_cosine() -> None:
    exact = {"out": torch.eye(2, dtype=torch.float64)}
    plain = {"out": torch.eye(2)}
    rough = Contender(lambda: {"out": torch.tensor([[1.0, 0.5], [0.0, 1.0]])}, lambda results: results, 2, "int8", 0.85)
    contest.check("it", rough, plain, exact, 2.0, rival=True)
    with pytest.raises(WrongResultError, match=r"out: cosine 0\.8944 < 0\.9"):
        contest.check("it", replace(rough, least_cosine=0.9), plain, exact, 2.0, rival=True)


def test_who_is_absent_or_breaks_says_why_and_the_others_go_on(quick: list[str]) -> None:
    standings = contest.hold(make(fastbert=right, rival=absent, other=crashing), CASE)
    assert quick == ["fastbert"]
    assert standings["rival"].unserved == "rival: it is not installed"
    assert standings["other"].broken == f"other, {CASE}: mat1 and mat2 must have the same dtype"


def test_a_trial_is_checked_in_place_of_the_whole(quick: list[str]) -> None:
    """Where the whole takes seconds; what is timed is the whole."""
    ran: list[str] = []

    def parted(case: Case, of: Operands) -> Contender:
        contender = right(case, of)

        def trial() -> Any:
            ran.append("trial")
            return contender.run()

        return replace(contender, run=lambda: ran.append("whole"), trial=trial)

    assert contest.hold(make(fastbert=parted), CASE)["fastbert"].seconds is not None
    assert ran == ["trial"] and quick == ["fastbert"]
    none = make(fastbert=lambda case, of: replace(right(case, of), trial=dict))
    assert "refusing to time it" in contest.hold(none, CASE)["fastbert"].reason


def test_each_check_is_said_at_once(quick: list[str]) -> None:
    lines: list[str] = []

    def last(case: Case, of: Operands) -> Contender:
        assert len(lines) == 4
        return right(case, of)

    contest.hold(make(fastbert=right, rival=absent, other=wrong, last=last), CASE, say=lines.append)
    assert lines[0] == f"{CASE}:" and lines[1].startswith("  fastbert: right; made and checked in ")
    assert lines[2] == "  rival: it is not installed"
    assert lines[3].startswith("  other, bias_gelu forward+backward") and "refusing to time a wrong result" in lines[3]


def test_other_turns_may_be_given(quick: list[str]) -> None:
    def turns(contenders: Any) -> dict[str, list[float]]:
        return {name: [0.5] for name in contenders}

    standings = contest.hold(make(fastbert=right), CASE, turns=turns)
    assert standings["fastbert"].seconds == [0.5] and quick == []


def test_costs_that_nobody_counted_give_no_ceiling(quick: list[str]) -> None:
    uncounted = replace(make(fastbert=right), costs=lambda case, of: [])
    facts = contest.hold(uncounted, CASE)["fastbert"].facts
    assert facts is not None and facts["median_ms"] == 2.0
    assert [facts[name] for name in ("floor_ms", "bound", "percent_of_ceiling")] == [None] * 3


def row(provider: str, median_ms: float, **changes: str) -> dict[str, Any]:
    facts = {"op": "encoder", "passes": "forward", "workload": "b1", "dtype": "fp32", "mode": "eager"}
    return facts | {"provider": provider, "median_ms": median_ms} | changes


def test_rows_in_which_a_rival_is_faster_are_told() -> None:
    measured = [
        row("fastbert", 8.0), row("fastbert other", 2.0), row("transformers", 3.0), row("OpenVINO", 1.0),
        row("fastbert", 2.0, op="latency"), row("transformers", 1.0, op="latency"), row("OpenVINO", 0.5, op="latency"),
        row("fastbert", 1.0, dtype="bf16"), row("transformers", 1.0, dtype="bf16"),
        row("fastbert", 9.0, op="alone"),
        {"promise": "texts"},
    ]  # fmt: skip
    assert contest.compared(measured) == [
        "fastbert is slower in 2 of 3 rows",
        "0.50 of the speed of transformers: latency forward, b1, fp32",
        "0.50 of the speed of OpenVINO: encoder forward, b1, fp32",
    ]
    assert contest.compared([row("fastbert", 1.0)]) == []


# What is promised of a CPU


def test_who_may_be_the_best_has_more_rounds() -> None:
    dtypes = {"fastbert": "fp32", "fastbert int8": "int8", "A": "fp32", "B": "fp32", "C": "fp32", "D": "int8"}
    seconds: dict[str, list[float]] = {name: [] for name in dtypes}
    assert bench_cpu.in_front(seconds, dtypes) == list(dtypes)
    seconds = {"fastbert": [9.0], "fastbert int8": [9.0], "A": [1.0, 3.0], "B": [1.29], "C": [1.31], "D": [5.0]}
    assert bench_cpu.in_front(seconds, dtypes) == ["fastbert", "fastbert int8", "A", "B", "D"]


def test_rounds_go_in_turns_and_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"fastbert": 1.0, "slow": 8.0, "best": 2.0}
    monkeypatch.setattr(bench_cpu, "cpu_seconds", lambda run, calls: clock[run()] * calls)
    lines: list[str] = []
    contenders = {name: Contender(lambda name=name: name, dict, 8) for name in clock}
    seconds = bench_cpu.rounds(CASE, 3, lines.append)(contenders)
    assert seconds == {"fastbert": [1.0] * 3, "slow": [8.0], "best": [2.0] * 3}
    assert lines[1:4] == ["  round 1: slow, fp32: 1 tokens/s", "  round 1: best, fp32: 4 tokens/s",
                          "  round 2: fastbert, fp32: 8 tokens/s"]  # fmt: skip


@pytest.mark.parametrize(
    ("lanes", "bfloat16", "features", "asked"),
    [
        (8, None, "+avx2,-avxvnni", {"fp32": 1.3, "int8": 1.3}),
        (8, None, "+avx2,+avxvnni", {"fp32": 1.3, "int8": 1.6}),
        (16, None, "+avx512f,-avx512vnni", {"fp32": 1.25, "int8": 1.3}),
        (16, object(), "+avx512f,+avx512vnni", {"fp32": 1.25, "int8": 1.6, "bf16": 1.4}),
    ],
)
def test_what_is_asked_depends_on_the_cpu(lanes: int, bfloat16: Any, features: str, asked: dict[str, float]) -> None:
    machine: Any = Machine("a", features, SimpleNamespace(lanes=lanes), bfloat16)
    assert bench_cpu.texts_asked(machine) == asked
    assert bench_cpu.texts_asked("no kernels") == {"fp32": 1.25, "int8": 1.3}


def test_only_who_is_asked_for_competes(quick: list[str]) -> None:
    assert list(contest.hold(make(fastbert=right, rival=absent), CASE, ["fastbert"])) == ["fastbert"]


def test_facts(quick: list[str]) -> None:
    facts = contest.hold(make(fastbert=right), CASE)["fastbert"].facts
    least = cost.bias_gelu(8, 32, torch.float32).min_bytes / 10e9
    assert facts == {
        "op": "bias_gelu",
        "passes": "forward+backward",
        "workload": "toy b2 s5",
        "provider": "fastbert",
        "mode": "eager",
        "dtype": "fp32",
        "device": "cpu" if CASE.device.type == "cpu" else torch.cuda.get_device_name(),
        "tokens": 8,
        "padded_tokens": 8,
        "tokens_per_s": 8 / 0.002,
        "padded_tokens_per_s": 8 / 0.002,
        "median_ms": 2.0,
        "p20_ms": pytest.approx(1.4),
        "p80_ms": pytest.approx(2.6),
        "floor_ms": pytest.approx(1000 * least),
        "bound": "memory",
        "percent_of_ceiling": pytest.approx(100 * least / 0.002),
    }


@pytest.mark.parametrize(
    ("mode", "microseconds", "many"), [("graph", 90, True), ("graph", 110, False), ("eager", 90, False)]
)
def test_graphs_of_short_calls_hold_many_whoever_is_short(
    mode: Any, microseconds: float, many: bool, quick: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that is not there: who is timed how, and all in the same way."""
    made, told = operands(CASE), []
    took = {"fastbert": 1e-6 * microseconds, "rival": 0.5}

    class OneByOne:
        def __init__(self, device: torch.device) -> None:
            assert device.type == "cuda"

        def __call__(self, run: Any, calls: int) -> float:
            return took[run[1]]

    class Many(OneByOne):
        def repeated(self, run: Any, repeats: int) -> Any:
            return "many", run.name

    class Named:
        """The call of a contender, known by its name."""

        def __init__(self, name: str, run: Any) -> None:
            self.name, self.run = name, run

        def __call__(self) -> Any:
            return self.run()

        def __getitem__(self, _: int) -> str:
            return self.name

    def named(name: str) -> Any:
        def provider(case: Case, of: Operands) -> Contender:
            contender = right(case, of)
            return replace(contender, run=Named(name, contender.run))

        return provider

    def interleaved(runs: Any, *, timer: Any, **options: Any) -> dict[str, list[float]]:
        told.append((type(timer), dict(runs)))
        return {name: [0.001] for name in runs}

    monkeypatch.setattr(contest, "first_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(contest, "device_name", lambda device: "fake")
    monkeypatch.setattr(contest, "captured", lambda run: ("one", run.name))
    monkeypatch.setattr(contest, "DeviceTimer", OneByOne)
    monkeypatch.setattr(contest, "GraphTimer", Many)
    monkeypatch.setattr(contest, "interleaved", interleaved)
    of_toys = replace(make(fastbert=named("fastbert"), rival=named("rival")), operands=lambda case: made)
    standings = contest.hold(of_toys, replace(CASE, mode=mode))
    assert all(one.seconds == [0.001] for one in standings.values()), standings
    [(timer, runs)] = told
    assert timer is (Many if many else OneByOne)
    if mode == "graph":
        assert runs == {name: ("many" if many else "one", name) for name in took}
    else:
        assert [run.name for run in runs.values()] == list(took)


def test_replay_reads_what_was_measured() -> None:
    clock = Replay()
    clock.load([0.25, 0.5])
    begin, end, begin_again, end_again = clock(), clock(), clock(), clock()
    assert (end - begin, end_again - begin_again) == (0.25, 0.5)


def test_cases_beyond_the_default_are_marked_full() -> None:
    small, large = WORK, replace(WORK, name="toy large", full=True)
    found = contest.cases("bias_gelu", [small, large], dtypes=("fp32",))
    default = {parameter.values[0].dtype for parameter in found if not parameter.marks}
    assert default == ({"fp16"} if torch.cuda.is_available() else {"fp32"})
    assert all(parameter.marks for parameter in found if parameter.values[0].workload is large)


# What a timed call of fastbert and of a rival holds


class FakeModel:
    """Notes the layouts and masks that it is called with, and keeps a table in a layout as a layer does."""

    def __init__(self) -> None:
        self.layouts: list[Packing] = []
        self.masks: list[Any] = []

    def __call__(self, ids: Any = None, packing: Any = None, input_ids: Any = None, attention_mask: Any = None) -> Any:
        if packing is not None:
            self.layouts.append(packing)
            packing.kept("tiles", lambda: torch.zeros(1))
        self.masks.append(attention_mask)
        return SimpleNamespace(last_hidden_state=torch.zeros(1))


def batch(work: workloads.Workload) -> Any:
    packing = Packing.from_lengths(work.lengths)
    packing.kept("tiles", lambda: torch.ones(1))
    ids = torch.arange(work.tokens)
    dout = torch.zeros(work.tokens, 1)
    return SimpleNamespace(
        folder=None, ids=ids, packing=packing, padded_ids=packing.unpack(ids),
        mask=packing.unpack(torch.ones_like(ids)), dout=dout,
    )  # fmt: skip


FORWARD = replace(CASE, op="encoder", passes="forward")


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    """Whatever a provider loads."""
    fake = FakeModel()
    monkeypatch.setattr(bench_encoder, "load", lambda *args, **options: fake)
    monkeypatch.setattr(bench_encoder, "quantize", lambda model, dtype: model)
    monkeypatch.setattr(bench_encoder, "graphed", lambda model: model)
    return fake


OURS = [name for name in bench_encoder.PROVIDERS if name.startswith("fastbert")]


@pytest.mark.parametrize("provider", OURS)
def test_each_timed_call_gets_a_layout_that_nothing_was_kept_in(
    provider: str, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's next batch has another; a table of tiles of the last call would be a gift."""
    device = "cuda" if provider == "fastbert graphed" else "cpu"
    monkeypatch.setattr(contest, "first_device", lambda: torch.device(device))
    of = batch(WORK)
    contender = bench_encoder.PROVIDERS[provider](FORWARD, of)
    contender.run()
    contender.run()
    contender.close()
    first, second = model.layouts
    assert first is not second
    for layout in model.layouts:
        assert layout.kept("tiles", lambda: torch.ones(1)).item() == 0, "it was made in the call"
        assert layout.lengths.tolist() == list(WORK.lengths) and layout.indices is of.packing.indices


def test_attention_by_itself_includes_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeModel()

    def attention(qkv: torch.Tensor, packing: Packing) -> torch.Tensor:
        fake(packing=packing)
        return qkv[:, 0]

    monkeypatch.setattr(bench_attention, "attention", attention)
    case = replace(FORWARD, op="attention")
    of = bench_attention.operands(case)
    contender = bench_attention.fastbert(case, of)
    contender.run()
    contender.run()
    assert len({id(layout) for layout in [of.fixed, *fake.layouts]}) == 3


@pytest.mark.parametrize(("lengths", "masked"), [((5, 3), True), ((5, 5), False)])
def test_who_pads_gets_a_mask_where_something_is_padded(lengths: tuple[int, ...], masked: bool) -> None:
    """Under a CUDA graph transformers can't see that a mask hides nothing, and flash attention takes none."""
    case, fake = replace(FORWARD, workload=replace(WORK, lengths=lengths)), FakeModel()
    of = batch(case.workload)
    bench_encoder.of_transformers(case, of, torch.nn.Identity(), fake).run()
    assert fake.masks == ([of.mask] if masked else [None])


@pytest.mark.parametrize(
    ("device", "mode", "passes"),
    [("cpu", "eager", "forward"), ("cuda", "graph", "forward"), ("cuda", "eager", "forward+backward")],
)
def test_a_graphed_model_is_for_inference_on_a_gpu(
    device: str, mode: Any, passes: Any, model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contest, "first_device", lambda: torch.device(device))
    with pytest.raises(UnservedError, match="inference on a GPU"):
        bench_encoder.PROVIDERS["fastbert graphed"](replace(FORWARD, mode=mode, passes=passes), batch(WORK))


# The whole of it, in pytest and pytest-benchmark

TOY = """
import contest, pytest
from roofline import Ceilings
from test_benchmarks import absent, make, right, wrong, WORK

contest.ceilings = lambda device: Ceilings(10.0, {"fp32": 100.0, "fp16": 100.0})
PROVIDERS = {"fastbert": right, "wrong": wrong, "absent": absent}
CONTEST = make(**PROVIDERS)

@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", contest.cases("toy", [WORK], dtypes=("fp32",)))
def test_toy(case, provider, compete):
    compete(CONTEST, case, provider)
"""


def run_toy(folder: Path, *options: str, text: str = TOY) -> subprocess.CompletedProcess[str]:
    # pytest-benchmark does nothing in a process that looks like one of pytest-xdist's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    (folder / "bench_toy.py").write_text(text)
    shutil.copy(ROOT / "benchmarks" / "conftest.py", folder)
    command = [*PYTHON, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, str(folder / "bench_toy.py"), *options],
        capture_output=True, text=True, cwd=folder, env=environment | {"COLUMNS": "200"},
    )  # fmt: skip


def test_pytest_shows_who_was_right(tmp_path: Path) -> None:
    done = run_toy(tmp_path, "--benchmark-json=results.json")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 1 passed, 1 skipped" in done.stdout
    assert "absent: it is not installed" in done.stdout
    assert "wrong, toy forward, toy b2 s5" in done.stdout and "refusing to time a wrong result" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(environment.environment()) <= set(results["machine_info"])
    [one] = results["benchmarks"]
    assert one["extra_info"]["provider"] == "fastbert"
    assert "beside rivals" not in done.stdout
    assert one["group"].startswith("toy forward, toy b2 s5, fp")
    assert one["stats"]["median"] == pytest.approx(one["extra_info"]["median_ms"] / 1000)
    assert one["stats"]["rounds"] >= 3 and one["stats"]["max"] > 0


def test_pytest_ends_with_the_rows_in_which_a_rival_is_faster(tmp_path: Path) -> None:
    slow = TOY.replace('"wrong": wrong', '"rival": right').replace('"fastbert": right', '"fastbert": delayed')
    slow = slow.replace("import absent", "import absent, delayed")
    done = run_toy(tmp_path, text=slow)
    assert done.returncode == 0, done.stdout + done.stderr
    tables, _, end = done.stdout.partition("beside rivals")
    assert "benchmark 'toy forward" in tables and "benchmark '" not in end
    assert "fastbert is slower in 1 of 1 rows\n" in end
    assert "of the speed of rival: toy forward, toy b2 s5, fp" in end


def test_pytest_can_check_without_timing(tmp_path: Path) -> None:
    done = run_toy(tmp_path, "--benchmark-disable", "-k", "not wrong")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 1 skipped" in done.stdout


INTERRUPTED = """
import contest, time
from dataclasses import replace
from pathlib import Path
import pytest
from roofline import Ceilings
from test_benchmarks import WORK, make, right

contest.ceilings = lambda device: Ceilings(10.0, {"fp32": 100.0, "fp16": 100.0})
SLOW = replace(WORK, name="slow")

def provider(case, of):
    if case.workload == SLOW:
        Path("begun").touch()
        time.sleep(600)
    return right(case, of)

CONTEST = make(fastbert=provider)
CASES = [contest.Case("toy", work, "forward", "fp32", "eager") for work in (WORK, SLOW, replace(WORK, name="late"))]

@pytest.mark.parametrize("provider", ["fastbert"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_toy(case, provider, compete):
    compete(CONTEST, case, provider)
"""


def test_an_interruption_leaves_the_contests_that_had_ended(tmp_path: Path) -> None:
    """As that of `make gpu`, at the end of a step's time."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    (tmp_path / "bench_toy.py").write_text(INTERRUPTED)
    shutil.copy(ROOT / "benchmarks" / "conftest.py", tmp_path)
    command = [*PYTHON, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "bench_toy.py"]
    process = subprocess.Popen(
        [*command, "--benchmark-json=results.json"], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=heed_signals,
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not (tmp_path / "begun").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=gpu_suite.GRACE)
    finally:
        process.kill()
    assert process.returncode == pytest.ExitCode.INTERRUPTED, said
    [one] = json.loads((tmp_path / "results.json").read_text())["benchmarks"]
    assert one["extra_info"]["workload"] == WORK.name and one["stats"]["median"] > 0


def test_full_adds_what_is_left_out(tmp_path: Path) -> None:
    few, all_of_them = (run_toy(tmp_path, "--collect-only", "-q", *options) for options in ((), ("--full",)))
    assert "deselected" in few.stdout and "deselected" not in all_of_them.stdout
    assert few.stdout.count("::test_toy") < all_of_them.stdout.count("::test_toy")
