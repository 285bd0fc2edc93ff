"""Timing: interleaved rounds and medians, so that a machine's drift hits every contender alike."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from environment import cores

LEAST = 0.02  # seconds that a turn takes at least, so that the clock's grain and a single interruption don't show
SETTLE = 0.02  # seconds between turns on a CPU: OpenMP's threads of whoever ran before spin for about 5 ms
FLUSH = 256 * 2**20  # bytes, twice the largest L2 there is or more
# On a GPU, where LEAST would be thousands of calls, each with a flush of its own that nobody counts: a turn's at most.
MOST = 50
# Seconds. A graph that replays less than this takes about as long to begin as to run, and so it holds many calls.
SHORT = 100e-6
REPEATS = 20  # calls in the graph of a short one

Timer = Callable[[Callable[[], Any], int], float]


@dataclass(frozen=True)
class Spread:
    """Quantiles of samples, in seconds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Of one sample or more."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0])
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return cls(statistics.median(seconds), fifths[0], fifths[3])


def pin_threads() -> int:
    """Give torch one thread a core that this process may run on, and say how many: rivals are to take as many."""
    torch.set_num_threads(cores())
    return torch.get_num_threads()


def interleaved(
    contenders: Mapping[str, Callable[[], Any]],
    rounds: int | None = None,
    *,
    budget: float = 5.0,
    timer: Timer | None = None,
) -> dict[str, list[float]]:
    """Seconds of a call of each contender, one sample a round: A B C, A B C, ... after a round that is not counted.

    A turn of a fast contender is several calls; its sample is their mean.

    Args:
        rounds: how many; by default as many as `budget` allows, 3 to 25.
        budget: seconds for all rounds together.
        timer: `cpu_seconds` by default.
    """
    timer = timer or cpu_seconds
    single = {name: _estimate(run, timer) for name, run in contenders.items()}
    calls = {name: max(1, round(LEAST / max(seconds, 1e-6))) for name, seconds in single.items()}
    if rounds is None:
        one_round = sum(single[name] * calls[name] + SETTLE for name in contenders)
        rounds = min(25, max(3, round(budget / one_round)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            samples[name].append(timer(run, calls[name]))
    return samples


def _estimate(run: Callable[[], Any], timer: Timer) -> float:
    """Seconds of a call. The first may be slow, but not so slow that a long one is worth a second."""
    first = timer(run, 1)
    return first if first > 10 * LEAST else timer(run, 1)


def cpu_seconds(run: Callable[[], Any], calls: int) -> float:
    """Mean seconds of so many calls on a CPU."""
    time.sleep(SETTLE)
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


def busy_seconds(run: Callable[[], Any], calls: int) -> float:
    """Mean seconds of so many calls that a CPU spends on this process, which other processes hardly change.

    Only true of a single thread: those of OpenMP are busy where they wait for one another.
    """
    begin = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - begin) / calls


@contextmanager
def answering(commands: Mapping[str, Sequence[str]]) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Processes of these commands, by name, until the end. Who is not asked waits, so they can take turns."""
    processes: dict[str, subprocess.Popen[str]] = {}
    try:
        for name, command in commands.items():
            processes[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        yield processes
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def answer(process: subprocess.Popen[str]) -> Any:
    """The next line of JSON on its stdout.

    Raises:
        RuntimeError: it has ended.
    """
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"it ended without an answer, and said why on stderr: {process.args}")
    return json.loads(line)


def ask(process: subprocess.Popen[str]) -> Any:
    """What it answers to an empty line on its stdin.

    Raises:
        RuntimeError: it has ended.
    """
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return answer(process)


class DeviceTimer:
    """Mean seconds of so many calls on a GPU, between CUDA events, with nothing of ours in its L2 before each.

    Launches that take the host longer than the GPU takes to run them show; `captured` takes them away. What is then
    short is for `GraphTimer`.
    """

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(FLUSH, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], Any], calls: int) -> float:
        """Mean seconds of so many calls, `MOST` at most."""
        calls = min(calls, MOST)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for begin, end in events:
            self.flush.zero_()
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in events) / calls / 1000


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """What replays `run` as one CUDA graph.

    Raises:
        RuntimeError: `run` does what a graph can't hold, such as waiting for the GPU.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # allocations and lazy set-up, which a capture may not hold
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class GraphTimer:
    """Mean seconds of a call among many in one CUDA graph, with nothing of ours in the GPU's L2 before each.

    Between the launches of a graph the host does nothing, so the time of a single kernel is its own. A graph of flushes
    alone is timed too, and subtracted. Triton's `do_bench_cudagraph` has no flushes: a call finds in L2 what the one
    before it read and wrote, and may seem faster than memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(FLUSH, dtype=torch.int8, device=device)
        self._flushes = self.repeated(lambda: None, REPEATS)

    def repeated(self, run: Callable[[], Any], repeats: int) -> Callable[[], float]:
        """What replays so many calls as one graph, and gives the seconds of all of them and their flushes.

        Raises:
            RuntimeError: as `captured`.
        """

        def all_of_them() -> None:
            for _ in range(repeats):
                self.flush.zero_()
                run()

        replay = captured(all_of_them)

        def seconds() -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            replay()
            end.record()
            torch.cuda.synchronize()
            return begin.elapsed_time(end) / 1000

        return seconds

    def once(self, seconds: Callable[[], float], repeats: int) -> float:
        """Mean seconds of a call, by a replay of what `repeated` made of so many."""
        return seconds() / repeats - self._flushes() / REPEATS

    def __call__(self, seconds: Callable[[], float], calls: int) -> float:
        """As a `Timer`: of what `repeated` made of `REPEATS` calls, by as many replays as hold `calls` or `MOST`."""
        replays = -(-min(calls, MOST) // REPEATS)
        return sum(self.once(seconds, REPEATS) for _ in range(replays)) / replays
