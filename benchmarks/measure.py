"""Timers for what `fastbert.rivals.turns` does not time: a single thread, and a GPU."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from environment import cores

FLUSH = 256 * 2**20  # bytes, twice the largest L2 there is or more
# On a GPU, where `turns.LEAST` would be thousands of calls, each with a flush that nobody counts: a turn's at most.
MOST = 50
# Seconds. A graph that replays less than this takes about as long to begin as to run, and so it holds many calls.
SHORT = 100e-6
REPEATS = 20  # calls in the graph of a short one


def pin_threads() -> int:
    """Give torch one thread a core that this process may run on, and say how many: rivals are to take as many."""
    torch.set_num_threads(cores())
    return torch.get_num_threads()


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
