"""Timing: interleaved rounds and medians, so that a machine's drift hits every contender alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

LEAST = 0.02  # seconds that a turn takes at least, so that the clock's grain and a single interruption don't show
SETTLE = 0.02  # seconds between turns on a CPU: OpenMP's threads of whoever ran before spin for about 5 ms

Timer = Callable[[Callable[[], Any], int], float]
Name = TypeVar("Name")


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


def interleaved(
    contenders: Mapping[Name, Callable[[], Any]],
    rounds: int | None = None,
    *,
    budget: float = 5.0,
    timer: Timer | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> dict[Name, list[float]]:
    """Seconds of a call of each contender, one sample a round: A B C, A B C, ... after a round that is not counted.

    A turn of a fast contender is several calls; its sample is their mean.

    Args:
        rounds: how many; by default as many as `budget` allows, 3 to 25.
        budget: seconds for all rounds together.
        timer: `cpu_seconds` by default.
        watch: called after each turn, with how many are done and how many there are.
    """
    timer = timer or cpu_seconds
    single = {name: _estimate(run, timer) for name, run in contenders.items()}
    calls = {name: max(1, round(LEAST / max(seconds, 1e-6))) for name, seconds in single.items()}
    if rounds is None:
        one_round = sum(single[name] * calls[name] + SETTLE for name in contenders)
        rounds = min(25, max(3, round(budget / one_round)))
    samples: dict[Name, list[float]] = {name: [] for name in contenders}
    turns = [name for _ in range(rounds) for name in contenders]
    for done, name in enumerate(turns, 1):
        samples[name].append(timer(contenders[name], calls[name]))
        if watch is not None:
            watch(done, len(turns))
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
