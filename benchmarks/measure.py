"""Timing: interleaved rounds and medians, so that a machine's drift hits every contender alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleaved(contenders: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender: run A B C, A B C, ... after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for counted in [False] + [True] * rounds:
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            if counted:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}
