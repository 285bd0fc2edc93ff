"""The gate's speed on this CPU, always as a ratio inside one run: against transformers, and against another commit.

Speed here is that of one thread, by the time that a CPU spends on it: whatever else runs on a machine of CI hardly
changes that. And a ratio fails only where noise can't be the reason: its median is below what is asked, and so are four
rounds in five.
As a script this file is what `against` runs on each of two trees.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))
import bench_encoder
import torch
from contest import Case, hold
from measure import busy_seconds

from fastbert.backend import first_device
from fastbert.errors import ArgumentError

ROOT = Path(__file__).resolve().parent.parent
RIVAL = "transformers"
BASELINE = ROOT / "benchmarks" / "baselines" / "ratios.json"
WORKLOAD = bench_encoder.WORKLOADS["minilm b16 s128 long tail"]
CASES = {
    str(case): case
    for case in (Case("encoder", WORKLOAD, passes, "fp32", "eager") for passes in ("forward", "forward+backward"))
}
BUDGET = 20.0  # seconds of timing a case
ROUNDS = 15  # against another commit
SLOWER = 0.95  # of the other commit's speed: less is a regression


def below(ratios: Sequence[float], least: float) -> bool:
    """Whether speeds relative to another, one a round, are below `least` by more than noise."""
    short = sum(ratio < least for ratio in ratios)
    return statistics.median(ratios) < least and short >= 0.8 * len(ratios)


def read_least(path: Path) -> dict[str, float]:
    """What is asked of each case: how many times as fast as the rival.

    Raises:
        ArgumentError: the file is not there, or does not hold a positive number for each case.
    """
    try:
        least = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(str(path), str(error), f"a JSON with a ratio for each of {list(CASES)}") from error
    numbers = least.values() if isinstance(least, dict) else ()
    if not isinstance(least, dict) or least.keys() != CASES.keys() or not all(_positive(number) for number in numbers):
        raise ArgumentError(str(path), repr(least), f"a positive number for each of {list(CASES)}")
    return least


def _positive(number: Any) -> bool:
    return isinstance(number, int | float) and number > 0


def against_rival(only: str = "", baseline: Path = BASELINE) -> list[str]:
    """Time the cases whose names match `only` beside transformers; a line for each that is too slow, or wrong.

    Raises:
        ArgumentError: as `read_least`.
    """
    least = read_least(baseline)
    reasons = []
    torch.set_num_threads(1)
    for name in _selected(only):
        standings = hold(bench_encoder.CONTEST, CASES[name], ["fastbert", RIVAL], budget=BUDGET, timer=busy_seconds)
        reasons += [standing.broken for standing in standings.values() if standing.broken]
        ours, theirs = (standings[provider] for provider in ("fastbert", RIVAL))
        if theirs.unserved:
            print(f"ratios: {name}: not compared: {theirs.unserved}")
        elif ours.seconds and theirs.seconds:
            ratios = [rival / own for own, rival in zip(ours.seconds, theirs.seconds, strict=True)]
            print(f"ratios: {name}: {_words(ratios)} times {RIVAL}'s speed; asked for {least[name]:g}")
            if below(ratios, least[name]):
                reasons.append(f"slower: {name}: {statistics.median(ratios):.2f} times {RIVAL}'s speed")
    return reasons


def against(commit: str, only: str = "") -> list[str]:
    """Time the cases in this tree and in a worktree of `commit`, in turns; a line for each that is slower here.

    Raises:
        ArgumentError: git knows no such commit.
    """
    names = _selected(only)
    samples: dict[str, dict[str, list[float]]] = {tree: {name: [] for name in names} for tree in ("base", "head")}
    if names:
        with _worktree(commit) as base, ExitStack() as stack:
            servers = {name: stack.enter_context(_server(tree)) for name, tree in (("base", base), ("head", ROOT))}
            for name in names:
                for counted in [False] + [True] * ROUNDS:
                    for tree, server in servers.items():
                        seconds = _ask(server, name)
                        samples[tree][name] += [seconds] if counted else []
    return slower(commit, samples["base"], samples["head"])


def slower(commit: str, base: Mapping[str, list[float]], head: Mapping[str, list[float]]) -> list[str]:
    """Print each case's speed relative to `commit`; a line for each that is slower, from seconds a round."""
    reasons = []
    for name, seconds in head.items():
        ratios = [before / after for before, after in zip(base[name], seconds, strict=True)]
        print(f"ratios: {name}: {_words(ratios)} times the speed of {commit}; asked for {SLOWER:g}")
        if below(ratios, SLOWER):
            reasons.append(f"slower: {name}: {statistics.median(ratios):.3f} times the speed of {commit}")
    return reasons


def _selected(only: str) -> list[str]:
    if first_device().type != "cpu":
        print("ratios: not measured: they are a CPU's, and this torch runs on a GPU")
        return []
    return [name for name in CASES if re.search(only, name)]


def _words(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds)"


@contextmanager
def _worktree(commit: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        done = subprocess.run(
            ["git", "worktree", "add", "--detach", str(tree), commit], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise ArgumentError("BASE", repr(commit), "a commit of this repository", done.stderr.strip())
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)


@contextmanager
def _server(tree: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that times the cases on the fastbert of a tree, by this tree's benchmarks."""
    command, environment = [sys.executable, str(Path(__file__).resolve())], os.environ | {"PYTHONPATH": str(tree)}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _ask(server: subprocess.Popen[str], name: str) -> float:
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(name + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        raise ArgumentError("BASE", f"a tree whose fastbert ends on {name}", "one that this tree's benchmarks can run")
    return float(answer)


def serve() -> None:
    """Answer each case's name on stdin by the seconds of a call."""
    torch.set_num_threads(1)
    runs: dict[str, Any] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in runs:
            case = CASES[name]
            runs[name] = bench_encoder.fastbert(case, bench_encoder.operands(case)).run
        print(busy_seconds(runs[name], 3), flush=True)


if __name__ == "__main__":
    serve()
