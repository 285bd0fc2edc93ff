"""A contest: all providers of an op run one workload, each is checked, and those that are right are timed in turns.

A file `bench_OP.py` says what its op is: operands, providers, what the result should be, what it costs. `hold` does the
rest once for each case; what pytest-benchmark then shows of each provider was measured there.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from environment import device_name
from measure import REPEATS, SHORT, DeviceTimer, GraphTimer, captured
from roofline import DTYPES, ceilings, floor_of_all
from torch import Tensor
from workloads import Workload

from fastbert.backend import first_device
from fastbert.kernels.cost import Cost
from fastbert.rivals.runtimes import UnservedError
from fastbert.rivals.turns import Spread, Timer, interleaved
from fastbert.testing import assert_close

# In float32. torch.compile adds up a column of 2048 rows one after another, which loses 9 units in the last place.
RIVAL_ULPS = 16.0

Passes = Literal["forward", "forward+backward"]
Mode = Literal["eager", "graph"]


class WrongResultError(AssertionError):
    """A provider's result is not what it should be, so timing it would say nothing."""


@dataclass(frozen=True)
class Case:
    """What a contest is held on.

    Attributes:
        op: "attention", "encoder", ...
        workload: a batch of `workloads.WORKLOADS`.
        passes: forward, or forward and backward.
        dtype: a key of `roofline.DTYPES`.
        mode: on a GPU, whether launched call by call or as one CUDA graph; a graph of what is short holds many calls.
    """

    op: str
    workload: Workload
    passes: Passes
    dtype: str
    mode: Mode

    def __str__(self) -> str:
        graph = " graph" if self.mode == "graph" else ""
        return f"{self.op} {self.passes}, {self.workload.name}, {self.dtype}{graph}"

    @property
    def device(self) -> torch.device:
        """Where it runs: the first GPU, or the CPU where there is none."""
        return first_device()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of operands and results."""
        return DTYPES[self.dtype]

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return self.passes == "forward+backward"


def cases(
    op: str,
    workloads: Iterable[Workload],
    *,
    passes: Iterable[Passes] = ("forward",),
    dtypes: Iterable[str] = ("fp32",),
) -> list[Any]:
    """Parameters for a test: one case each; those beyond these workloads' default, `dtypes` and fp16 on a GPU are full.

    On a CPU there is no fp16 and no graph.
    """
    on_gpu = first_device().type == "cuda"
    by_default = {"fp16"} if on_gpu else set(dtypes)
    every = DTYPES if on_gpu else ("fp32", "bf16")
    modes: tuple[Mode, ...] = ("eager", "graph") if on_gpu else ("eager",)
    found = []
    for workload in workloads:
        for one_passes in passes:
            for dtype in every:
                for mode in modes:
                    marks = [pytest.mark.full] if workload.full or dtype not in by_default else []
                    case = Case(op, workload, one_passes, dtype, mode)
                    found.append(pytest.param(case, marks=marks, id=str(case)))
    return found


@dataclass(frozen=True)
class Contender:
    """A provider made ready for a case.

    Attributes:
        run: what is timed.
        results: what `run` returned, as tensors by name, in the layout of the reference; not timed.
        padded_tokens: how many tokens it computes on.
        dtype: what it computes in, where that is not the case's.
        least_cosine: for a provider that rounds more than its dtype does (int8), the least cosine of any row of its
            result with the exact one; the others are held to the error rule.
        trial: what is checked in place of `run`, where that takes seconds: the same on a part of the work, which is
            the part that `Contest.exact` computes.
        close: gives back what it holds.
    """

    run: Callable[[], Any]
    results: Callable[[Any], Mapping[str, Tensor]]
    padded_tokens: int
    dtype: str | None = None
    least_cosine: float | None = None
    trial: Callable[[], Any] | None = None
    close: Callable[[], None] = lambda: None


Provider = Callable[[Case, Any], Contender]


@dataclass(frozen=True)
class Contest:
    """An op, and who competes in it.

    Attributes:
        providers: by name; each makes a contender of a case and its operands, or raises UnservedError.
        operands: of a case.
        plain: the results by plain torch in the case's dtype, by name.
        exact: the same in float64.
        costs: of the ops it consists of; none where nobody counted them, and then no ceiling is given.
        factor: how many times plain torch's error is allowed; see `fastbert.testing.assert_close`. Rivals may have
            twice that: their rounding is not ours to mend, and we only need to know that they compute the same.
    """

    providers: Mapping[str, Provider]
    operands: Callable[[Case], Any]
    plain: Callable[[Case, Any], Mapping[str, Tensor]]
    exact: Callable[[Case, Any], Mapping[str, Tensor]]
    costs: Callable[[Case, Any], list[Cost]]
    factor: float = 2.0


@dataclass(frozen=True)
class Operands:
    """What an op is a function of.

    Attributes:
        leaves: by name; they have gradients where the case is backward.
        dout: the gradient of the result.
        fixed: what has no gradient: a packing, ids.
    """

    leaves: Mapping[str, Tensor]
    dout: Tensor
    fixed: Any = None

    @classmethod
    def random(
        cls, case: Case, leaves: Mapping[str, tuple[int, ...]], dout: tuple[int, ...], fixed: Any = None
    ) -> Operands:
        """Normal numbers in these shapes, in the case's dtype, on its device."""
        made = {name: torch.randn(shape, device=case.device).to(case.torch_dtype) for name, shape in leaves.items()}
        for leaf in made.values():
            leaf.requires_grad_(case.backward)
        return cls(made, torch.randn(dout, device=case.device).to(case.torch_dtype), fixed)

    def to(self, dtype: torch.dtype) -> Operands:
        """The same numbers in another dtype."""
        leaves = {
            name: leaf.detach().to(dtype).requires_grad_(leaf.requires_grad) for name, leaf in self.leaves.items()
        }
        return Operands(leaves, self.dout.to(dtype), self.fixed)


def differentiate(case: Case, of: Operands, forward: Callable[..., Tensor]) -> dict[str, Tensor]:
    """`out = forward(**leaves)`, and where the case is backward each leaf's gradient, as "d" and its name."""
    out = forward(**of.leaves)
    if not case.backward:
        return {"out": out}
    gradients = torch.autograd.grad(out, list(of.leaves.values()), of.dout)
    return {"out": out} | {f"d{name}": gradient for name, gradient in zip(of.leaves, gradients, strict=True)}


def on_rows(case: Case, of: Operands, forward: Callable[..., Tensor]) -> Contender:
    """A contender of `differentiate` that computes on packed rows, padding not among them."""
    return Contender(partial(differentiate, case, of, forward), lambda results: results, case.workload.tokens)


@dataclass(frozen=True)
class Standing:
    """What became of a provider: it was timed, or it says why not.

    Attributes:
        seconds: a sample a round; None if it was not timed.
        facts: what pytest-benchmark keeps as `extra_info`.
        unserved: why it can't run here.
        broken: what is wrong with it.
    """

    seconds: list[float] | None = None
    facts: Mapping[str, Any] | None = None
    unserved: str | None = None
    broken: str | None = None

    @property
    def reason(self) -> str:
        """Why it was not timed, if it was not."""
        return self.unserved or self.broken or ""


Turns = Callable[[Mapping[str, Contender]], dict[str, list[float]]]


def hold(
    contest: Contest,
    case: Case,
    names: Iterable[str] | None = None,
    *,
    budget: float = 5.0,
    timer: Timer | None = None,
    timed: bool = True,
    turns: Turns | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Standing]:
    """Check and time the providers of these names (all by default) on a case.

    Args:
        budget: seconds to spend on timing.
        timer: that of the case's device by default.
        timed: False only checks.
        turns: gives the seconds of each contender's rounds; by default `interleaved` does, with `budget` and `timer`.
        say: gets a line at the start, and one as each provider is checked.
    """
    say(f"{case}:")
    torch.manual_seed(0)
    operands = contest.operands(case)
    plain, exact = contest.plain(case, operands), contest.exact(case, operands)
    standings: dict[str, Standing] = {}
    contenders: dict[str, Contender] = {}
    runs: dict[str, Callable[[], Any]] = {}
    for name in contest.providers if names is None else names:
        begin = time.perf_counter()
        try:
            contender = contest.providers[name](case, operands)
            check(f"{name}, {case}", contender, plain, exact, contest.factor, rival=not name.startswith("fastbert"))
            runs[name] = captured(contender.run) if case.mode == "graph" else contender.run
            contenders[name] = contender
        except UnservedError as reason:
            standings[name] = Standing(unserved=f"{name}: {reason}")
        except torch.OutOfMemoryError:
            standings[name] = Standing(unserved=f"{name}: out of memory on {case}")
        except WrongResultError as wrong:
            standings[name] = Standing(broken=str(wrong))
        except RuntimeError as error:  # what C++ libraries throw; one that breaks is not to take the others with it
            standings[name] = Standing(broken=f"{name}, {case}: {error}")
        right = f"  {name}: right; made and checked in {time.perf_counter() - begin:.1f} s"
        say(right if name in contenders else f"  {standings[name].reason}")
    del plain, exact
    gc.collect()
    if timed and runs:
        if timer is None and case.device.type == "cuda":
            timer = DeviceTimer(case.device)
            if case.mode == "graph" and any(timer(run, REPEATS) < SHORT for run in runs.values()):
                timer, runs = repeated(case.device, contenders)  # of all, so that none is timed in another way
        seconds = turns(contenders) if turns else interleaved(runs, budget=budget, timer=timer)
        costs = contest.costs(case, operands)
    for name, contender in contenders.items():
        standings[name] = Standing()
        if timed:
            standings[name] = Standing(seconds[name], facts(name, case, contender, seconds[name], costs))
        contender.close()
    return standings


def repeated(device: torch.device, contenders: Mapping[str, Contender]) -> tuple[Timer, dict[str, Callable[[], float]]]:
    """A timer of short calls, and what it times of each contender."""
    timer = GraphTimer(device)
    return timer, {name: timer.repeated(contender.run, REPEATS) for name, contender in contenders.items()}


def check(
    what: str,
    contender: Contender,
    plain: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    factor: float,
    *,
    rival: bool,
) -> None:
    """Run a contender once, against plain and exact results; `factor` and `rival` as in `Contest`.

    Raises:
        WrongResultError: the result breaks the error rule, or a row is less alike than the contender says.
    """
    factor = 2 * factor if rival else factor
    results = contender.results((contender.trial or contender.run)())
    if results.keys() != exact.keys():
        raise WrongResultError(f"{what}: refusing to time it: it gives {list(results)}, and not {list(exact)}")
    for name, result in results.items():
        got = result.detach().to(plain[name].dtype)
        ulps = RIVAL_ULPS if rival and got.dtype == torch.float32 else 4.0
        try:
            if contender.least_cosine is None:
                assert_close(got, plain[name].detach(), exact[name].detach(), factor=factor, ulps=ulps, what=name)
            else:
                cosine = F.cosine_similarity(got.double(), exact[name].detach(), dim=-1).min().item()
                assert cosine >= contender.least_cosine, f"{name}: cosine {cosine:.4f} < {contender.least_cosine}"
        except AssertionError as error:
            raise WrongResultError(f"{what}: refusing to time a wrong result: {error}") from error


def facts(name: str, case: Case, contender: Contender, seconds: list[float], costs: list[Cost]) -> dict[str, Any]:
    """What is kept beside pytest-benchmark's own statistics: the names of this table are those that reports read."""
    spread = Spread.of(seconds)
    dtype = contender.dtype or case.dtype
    least = floor_of_all(costs, dtype, ceilings(case.device)) if costs else None
    return {
        "op": case.op,
        "passes": case.passes,
        "workload": case.workload.name,
        "provider": name,
        "mode": case.mode,
        "dtype": dtype,
        "device": device_name(case.device),
        "tokens": case.workload.tokens,
        "padded_tokens": contender.padded_tokens,
        "tokens_per_s": case.workload.tokens / spread.median,
        "padded_tokens_per_s": contender.padded_tokens / spread.median,
        "median_ms": 1000 * spread.median,
        "p20_ms": 1000 * spread.p20,
        "p80_ms": 1000 * spread.p80,
        "floor_ms": least and 1000 * least.seconds,
        "bound": least and least.bound,
        "percent_of_ceiling": least and 100 * least.seconds / spread.median,
    }


class Replay:
    """A clock that reads what was measured before, so that pytest-benchmark shows it as if it had measured it itself.

    pytest-benchmark times one test after another. Contenders have to take turns, so they are all timed at once, before
    the first of their tests; then each test calls nothing, with this as its timer. pytest-benchmark reads a timer twice
    a round, before and after the call: 0, and the seconds of that round.
    """

    __name__ = "replay"  # what the table's head calls its timer

    def __init__(self) -> None:
        self.readings: Iterator[float] = iter(())

    def load(self, seconds: Iterable[float]) -> None:
        """What the next rounds took."""
        self.readings = chain.from_iterable((0.0, one) for one in seconds)

    def __call__(self) -> float:
        """The next reading."""
        return next(self.readings)


REPLAY = Replay()

# What was measured in this process: the facts of each benchmark that was shown.
PRESENTED: list[Mapping[str, Any]] = []


def compared(measured: Iterable[Mapping[str, Any]]) -> list[str]:
    """How many rows of facts have ours and a rival, and a line for each of them in which a rival is faster.

    Of transformers' rows first, and the slowest first.
    """
    rows: dict[tuple[str, ...], dict[str, float]] = {}
    for one in measured:
        if "provider" in one:
            row = tuple(one[key] for key in ("op", "passes", "workload", "dtype", "mode"))
            rows.setdefault(row, {})[one["provider"]] = one["median_ms"]
    count, slower = 0, []
    for (op, passes, workload, dtype, mode), times in rows.items():
        ours = [median for name, median in times.items() if name.startswith("fastbert")]
        rivals = {name: median for name, median in times.items() if not name.startswith("fastbert")}
        if ours and rivals:
            count += 1
            best = min(rivals, key=lambda name: rivals[name])
            rival = "transformers" if rivals.get("transformers", math.inf) < min(ours) else best
            if (ratio := rivals[rival] / min(ours)) < 1:
                what = f"{op} {passes}, {workload}, {dtype}{' graph' if mode == 'graph' else ''}"
                slower.append((rival != "transformers", ratio, f"{ratio:.2f} of the speed of {rival}: {what}"))
    if not count:
        return []
    return [f"fastbert is slower in {len(slower)} of {count} rows", *(line for _, _, line in sorted(slower))]


def show(benchmark: Any, case: Case, standing: Standing) -> None:
    """Skip or fail the test of a provider that was not timed, with the reason; else `present` what was measured."""
    if standing.unserved:
        pytest.skip(standing.unserved)
    if standing.broken:
        pytest.fail(standing.broken, pytrace=False)
    present(benchmark, str(case), standing.seconds or [], standing.facts or {})


def present(benchmark: Any, group: str, seconds: list[float], facts: Mapping[str, Any]) -> None:
    """Give pytest-benchmark's fixture, whose timer is `REPLAY`, what was measured; nothing if it is disabled."""
    if facts:
        PRESENTED.append(facts)
    benchmark.group = group
    benchmark.extra_info.update(facts)
    REPLAY.load(seconds)
    benchmark.pedantic(_nothing, rounds=max(1, len(seconds)), iterations=1)


def _nothing() -> None:
    pass
