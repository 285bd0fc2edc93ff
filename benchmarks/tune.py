"""Search the launch choices of every kernel on the GPU at hand, and write those that win to `kernels/tuned.json`.

    python benchmarks/tune.py [--minutes 6] [--anew] [--only OP ...]    # on a machine with a GPU
    python benchmarks/tune.py --plan --arch sm_90             # what would be searched, on any machine

For each problem (`problems.py`) every candidate is compiled offline in processes beside; one that spills, does not fit
shared memory or leaves the matrix units idle is never timed. The others are held to the error rule, then timed. The
fastest meets the choice in force in ROUNDS more rounds, A B A B; it wins only if it is faster by MARGIN in the median
and faster in WINS rounds of them, which chance gives 2 times in 100. What is measured is in a journal: run it
again after an interruption, and it goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import triton
from triton.errors import TritonError

from fastbert.errors import BackendError, FastbertError
from fastbert.kernels import choices
from fastbert.kernels.target import KNOWN, Target, of
from fastbert.testing import assert_close

sys.path.append(str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent / "static"))
from folders import folder_of
from journal import Journal
from measure import REPEATS, DeviceTimer, GraphTimer
from problems import SMALL, SPACES, Problem, Work, in_force, problems

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent / "kernels"
ROUNDS, WINS = 9, 8
MARGIN = 0.03
# A candidate's time is the median of so many replays of a graph; it takes about so many seconds, and holds REPEATS
# calls at most. There are thousands of candidates and a few minutes.
REPLAYS, REPLAY = 5, 0.005


class Device(Protocol):
    """Where candidates are timed."""

    name: str
    target: Target
    torch_device: torch.device

    def time(self, run: Callable[[], object]) -> float:
        """Median seconds of a call."""


@dataclass(frozen=True)
class Gpu:
    """The current GPU; calls are timed in a CUDA graph of several, each with a cold L2.

    Long ones too: of two candidates neither is to be timed in another way than the other, and many of our kernels take
    less time than their launch from Python.
    """

    name: str
    target: Target
    torch_device: torch.device

    @classmethod
    def current(cls) -> Gpu:
        """The current GPU.

        Raises:
            BackendError: there is none.
        """
        if not torch.cuda.is_available():
            raise BackendError("device", "no GPU", "a machine with one", "Without one there is --plan --arch sm_90.")
        device = torch.device("cuda", torch.cuda.current_device())
        return cls(torch.cuda.get_device_name(device), of(device), device)

    def time(self, run: Callable[[], object]) -> float:
        """Median seconds of a call."""
        estimate = self._events(run, 1)
        repeats = max(1, min(REPEATS, round(REPLAY / max(estimate, 1e-6))))
        replay = self._graphs.repeated(run, repeats)
        return statistics.median(self._graphs.once(replay, repeats) for _ in range(REPLAYS))

    @functools.cached_property
    def _events(self) -> DeviceTimer:
        return DeviceTimer(self.torch_device)

    @functools.cached_property
    def _graphs(self) -> GraphTimer:
        return GraphTimer(self.torch_device)


# (problem, choice) -> what is wrong with its machine code, each in words.
Survey = Callable[[Problem, Any], list[str]]


class Search:
    """The search on one device; see the top of this file.

    Args:
        device: where to time.
        survey: what the compiler makes of a candidate.
        journal: what is known already, and what is added to.
        tuned: the file of winners.
        deadline: when to stop, by `time.monotonic`.
        say: takes a line for the user.

    Attributes:
        broken: problems whose choice in force does not run or is wrong: the kernel's fault, for the tests to find.
    """

    def __init__(
        self,
        device: Device,
        survey: Survey,
        journal: Journal,
        tuned: Path,
        *,
        deadline: float,
        say: Callable[[str], None] = print,
    ) -> None:
        self.device = device
        self.survey = survey
        self.journal = journal
        self.tuned = tuned
        self.deadline = deadline
        self.say = say
        self.broken: list[Problem] = []

    def run(self, found: list[Problem]) -> bool:
        """Search them in order; False where time ran out before the last.

        What an earlier run settled is not searched again, and its winners are put into the file again: it may be that
        of a fresh checkout.
        """
        settled = {(one["op"], one["shape"]): one for one in self.journal.entries if one["outcome"] == "settled"}
        for i, problem in enumerate(found):
            if (entry := settled.get((problem.op, problem.shape))) is not None:
                if entry["gain"] is not None:
                    self._keep(problem, type(problem.current)(**entry["choice"]))
                continue
            if not self._search(problem):
                self.say(f"time is up: {i} of {len(found)} problems are settled; run it again to go on")
                return False
        return True

    def _search(self, problem: Problem) -> bool:
        work = problem.prepare(self.device.torch_device)
        expected = functools.cache(work.expected)
        known = self._known(problem)
        for choice in (problem.current, *problem.candidates):
            if _key(choice) in known:
                continue
            if time.monotonic() > self.deadline:
                return False
            wrong = [] if choice == problem.current else self.survey(problem, choice)
            entry = {"outcome": "unsound", "why": wrong} if wrong else self._measure(problem, choice, work, expected)
            self._note(problem, choice, **entry)
            known[_key(choice)] = entry
        seconds = {
            choice: known[_key(choice)]["seconds"]
            for choice in (problem.current, *problem.candidates)
            if known[_key(choice)]["outcome"] == "measured"
        }
        if problem.current not in seconds:
            self.broken.append(problem)
            self.say(
                f"{problem.op} {problem.shape}: the choice in force fails: {known[_key(problem.current)]['why'][0]}"
            )
            return True
        best = min(seconds, key=lambda choice: seconds[choice])
        gain = None if best == problem.current else self._duel(problem, best, work)
        if gain is not None:
            self._keep(problem, best)
        self._note(problem, best if gain else problem.current, outcome="settled", gain=gain)
        verdict = "stays" if gain is None else f"{gain:.2f} times as fast as before: {_key(best)}"
        self.say(f"{problem.op} {problem.shape}: {len(seconds)} of {len(known)} timed; {verdict}")
        return True

    def _keep(self, problem: Problem, winner: Any) -> None:
        write_tuned(self.tuned, self.device.target.arch, problem, winner)
        choices.TUNED[self.device.target.arch, problem.op, problem.shape] = winner  # for the problems to come

    def _known(self, problem: Problem) -> dict[str, dict[str, Any]]:
        mine = [e for e in self.journal.entries if (e["op"], e["shape"]) == (problem.op, problem.shape)]
        return {json.dumps(entry["choice"]): entry for entry in mine}

    def _note(self, problem: Problem, choice: Any, **entry: Any) -> None:
        self.journal.write(op=problem.op, shape=problem.shape, choice=asdict(choice), **entry)

    def _measure(self, problem: Problem, choice: Any, work: Work, expected: Callable[[], Any]) -> dict[str, Any]:
        """Check, then time."""
        with in_force(self.device.target, problem, choice):
            try:
                for got, plain, exact in zip(work.run(), *expected(), strict=True):
                    assert_close(got, plain, exact)
            except AssertionError as error:
                return {"outcome": "wrong", "why": [str(error)]}
            except torch.AcceleratorError:
                raise  # the device is lost to this process, whoever's fault it was
            except (TritonError, RuntimeError) as error:  # as in static/offline.py
                return {"outcome": "does not run", "why": [" ".join(str(error).split())]}
            return {"outcome": "measured", "seconds": self.device.time(work.run)}

    def _duel(self, problem: Problem, best: Any, work: Work) -> float | None:
        """How many times as fast as the choice in force, or None where that is not beyond doubt."""
        ratios = []
        for _ in range(ROUNDS):
            before, after = (self._time(problem, choice, work) for choice in (problem.current, best))
            ratios.append(before / after)
        gain = statistics.median(ratios)
        sure = gain >= 1 + MARGIN and sum(ratio > 1 for ratio in ratios) >= WINS
        return gain if sure else None

    def _time(self, problem: Problem, choice: Any, work: Work) -> float:
        with in_force(self.device.target, problem, choice):
            return self.device.time(work.run)


def _key(choice: Any) -> str:
    return json.dumps(asdict(choice))


def write_tuned(path: Path, arch: str, problem: Problem, choice: Any) -> None:
    """Put one winner into the file, atomically, beside what is there.

    Raises:
        ValueError: the file was not one that `choices.read_tuned` reads.
    """
    choices.read_tuned(path)
    by_arch = json.loads(path.read_text(encoding="utf-8"))
    by_arch.setdefault(arch, {}).setdefault(problem.op, {})[problem.shape] = asdict(choice)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(by_arch, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    choices.read_tuned(temporary)
    temporary.replace(path)


@functools.lru_cache(maxsize=1)
def _small(target: Target, op: str, shape: str) -> tuple[Problem, Work]:
    [problem] = [problem for problem in problems(target, SMALL) if (problem.op, problem.shape) == (op, shape)]
    return problem, problem.prepare(torch.device("cpu"))


def inspect_choice(target: Target, op: str, shape: str, choice: Any, cache: Path) -> list[str]:
    """What is wrong with the machine code that a choice gives, in a process where Triton compiles.

    Compiled kernels are left in `cache`, so that the process which times them need not compile them again.
    """
    from cases import Case
    from machine_code import MATRIX
    from offline import inspect

    problem, work = _small(target, op, shape)

    def run() -> None:
        triton.knobs.cache.dir = str(cache)  # `inspect` has set an empty one, and restores what was
        work.run()

    case = Case(shape, run, (MATRIX[target.arch],) if problem.matrix else ())
    with in_force(target, problem, choice):
        return [said for finding in inspect(target, [case]) for said in finding.violations]


class Compilers:
    """The survey of a real search: candidates are compiled ahead, in as many processes as there are cores to spare."""

    def __init__(self, target: Target, found: list[Problem], known: set[tuple[str, str, str]], cache: Path) -> None:
        workers = max(1, (os.cpu_count() or 1) - 2)  # two stay for the process that times
        self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
        self.futures: dict[tuple[str, str, str], Future[list[str]]] = {
            key: self.pool.submit(inspect_choice, target, problem.op, problem.shape, choice, cache)
            for problem in found
            if problem.compiled
            for choice in problem.candidates
            if (key := (problem.op, problem.shape, _key(choice))) not in known
        }

    def __call__(self, problem: Problem, choice: Any) -> list[str]:
        if not problem.compiled:
            return []
        return self.futures[problem.op, problem.shape, _key(choice)].result()

    def close(self) -> None:
        """Drop what was not begun."""
        self.pool.shutdown(wait=False, cancel_futures=True)


def code_version() -> str:
    """A hash of the kernels, the compiler and the search: measurements under another one say nothing."""
    sources = [*sorted(KERNELS.glob("*.py")), HERE / "problems.py"]
    digest = hashlib.sha256(triton.__version__.encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def plan(target: Target) -> None:
    """Print what would be searched."""
    found = problems(target)
    for problem in found:
        print(
            f"{problem.op:26} {problem.shape:44} {len(problem.candidates):4} candidates beside {_key(problem.current)}"
        )
    total = sum(len(problem.candidates) for problem in found)
    print(f"{target.arch}: {len(found)} problems, {total} candidates; nothing was compiled or timed")


def tune(device: Device, minutes: float, *, anew: bool, only: Sequence[str] | None = None) -> Search:
    """Search on this device, all ops or `only` some, and give what was searched."""
    deadline = time.monotonic() + 60 * minutes
    folder = folder_of(device.name)
    path = folder / "tune.jsonl"
    if anew:
        path.unlink(missing_ok=True)
    journal = Journal(path, {"device": device.name, "code": code_version()})
    if journal.begun_anew:
        print(f"{path} is of another version of the kernels: begun anew")
    found = [problem for problem in problems(device.target) if only is None or problem.op in only]
    tuned = KERNELS / "tuned.json"
    if device.target.arch not in KNOWN:
        print(f"{device.target.arch}: nobody reads its machine code here, so every candidate that runs is timed")
        search = Search(device, lambda problem, choice: [], journal, tuned, deadline=deadline)
        search.run(found)
        return search
    known = {(entry["op"], entry["shape"], json.dumps(entry["choice"])) for entry in journal.entries}
    compilers = Compilers(device.target, found, known, Path(triton.knobs.cache.dir))
    search = Search(device, compilers, journal, tuned, deadline=deadline)
    try:
        search.run(found)
    finally:
        compilers.close()
    return search


def main() -> int:
    """The command; its exit status is 1 if a choice in force fails. Running out of time is no failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=6.0, help="stop after so long; the journal keeps what is known"
    )
    parser.add_argument("--anew", action="store_true", help="forget what was measured")
    parser.add_argument("--plan", action="store_true", help="only print what would be searched")
    parser.add_argument("--arch", choices=[arch for arch in KNOWN if arch != "interpreter"], help="for --plan")
    parser.add_argument("--only", nargs="+", choices=list(SPACES), metavar="OP", help=f"of {', '.join(SPACES)}")
    options = parser.parse_args()
    try:
        if options.plan:
            plan(KNOWN[options.arch] if options.arch else Gpu.current().target)
            return 0
        return 1 if tune(Gpu.current(), options.minutes, anew=options.anew, only=options.only).broken else 0
    except FastbertError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    sys.exit(main())
