"""The performance gate: static evidence against the baseline and limits, exactly; speed and host time on this CPU.

    python benchmarks/gate.py [--update] [--base COMMIT] [--arch sm_90 ...] [--only REGEX] [--baseline FILE]

Exit status 0: nothing changed and every limit holds. 1: something changed, for the worse or the better, or a limit is
exceeded; a table says what. 2: the baseline can't be used; the message says why. docs/static.md has the workflow.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from fastbert.errors import ArgumentError, FastbertError

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parent / "static"))
import evidence
import ratios
from evidence import ARCHS, MAIN_ARCHS, Evidence
from limits import EVERY_KERNEL, EVERY_TRAFFIC, LIMITS, NOT_YET, Limits

BASELINE = Path(__file__).resolve().parent / "baselines" / "static.json"

# Of these more is better, or they only describe the case; of all other figures less is better.
MORE_IS_BETTER = {"programs_per_multiprocessor"}
DESCRIBE = {"unit", "warps", "has_loop", "minimum", "tiles_needed", "padded_over_needed"}
# Counts for a trip of the main loop, which say nothing of another tile's.
PER_TRIP = ("instructions", "matrix.", "global_bits")

HOST = "host time of a layer"
ANEW = "Make the baseline anew with `make gate UPDATE=1`."

# (what was measured, figure) -> value
Figures = dict[tuple[str, str], float]


@dataclass(frozen=True)
class Change:
    """A figure that differs from the baseline's.

    Attributes:
        name, figure: what was measured, and which of its figures.
        before, after: None where one of the two does not know what was measured.
        retiled: whether a trip of the main loop now does another amount of work.
    """

    name: str
    figure: str
    before: float | None
    after: float | None
    retiled: bool = False

    @property
    def verdict(self) -> str:
        """ "worse", "better", or "different" where neither can be said."""
        if self.before is None or self.after is None or self.figure in DESCRIBE:
            return "different"
        if self.retiled and self.figure.startswith(PER_TRIP):
            return "different"
        return "better" if (self.after > self.before) == (self.figure in MORE_IS_BETTER) else "worse"

    def __str__(self) -> str:
        before, after = ("absent" if value is None else f"{value:g}" for value in (self.before, self.after))
        percent = f"{100 * (self.after - self.before) / self.before:+.1f}%" if self.before and self.after else ""
        return f"{self.verdict:9} {self.name:82} {self.figure:28} {before:>10} -> {after:<10} {percent}".rstrip()


def read_baseline(path: Path) -> Evidence:
    """The evidence that a baseline holds.

    Raises:
        ArgumentError: no such file, not JSON, not the JSON of evidence.py, or made with another Triton.
    """
    try:
        baseline = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArgumentError(str(path), error.strerror, "the baseline", ANEW) from error
    except ValueError as error:
        raise ArgumentError(str(path), f"what is not JSON ({error})", "the baseline", ANEW) from error
    missing = {"triton", "kernels", "traffic", "launches", "tiles"} - set(
        baseline if isinstance(baseline, dict) else {}
    )
    if missing:
        raise ArgumentError(str(path), f"a JSON without {sorted(missing)}", "what evidence.py writes", ANEW)
    installed = triton.__version__
    if baseline["triton"] != installed:
        raise ArgumentError(
            str(path), f"figures of Triton {baseline['triton']}", f"those of Triton {installed}, which is installed",
            f"Install that Triton, or make them anew with `make gate UPDATE=1 TRITON=triton=={installed}`.",
        )  # fmt: skip
    return baseline


def flatten(found: Evidence, archs: tuple[str, ...], only: str) -> Figures:
    """The figures of these targets whose names match `only`, without what is predicted from them.

    Raises:
        ArgumentError: a figure is no number, or stands where none belongs.
    """
    groups = {"traffic of ": found["traffic"], "launches of ": found["launches"]}
    for section, of in (("kernels", ""), ("tiles", "tiles of ")):
        by_arch = dict(_entries(section, found[section]))
        groups |= {f"{arch} {of}": by_arch.get(arch, {}) for arch in archs}
    return {
        (prefix + name, figure): value
        for prefix, by_name in groups.items()
        for name, figures in _entries(prefix, by_name)
        if re.search(only, name.partition(": ")[0])
        for figure, value in _leaves(prefix + name, figures)
    }


def _leaves(name: str, found: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    for figure, value in _entries(name, found):
        if isinstance(value, dict):
            if figure != "predicted":
                yield from _leaves(name, value, f"{prefix}{figure}.")
        elif isinstance(value, int | float):
            yield prefix + figure, value
        else:
            raise ArgumentError(f"{prefix}{figure} of {name}", repr(value), "a number", ANEW)


def _entries(name: str, found: Any) -> Iterable[tuple[str, Any]]:
    if not isinstance(found, dict):
        raise ArgumentError(name.strip(), repr(found), "figures by name", ANEW)
    return found.items()


def compare(before: Figures, after: Figures) -> list[Change]:
    """What differs, in order of the names. A figure that only one of two kernels has is 0 in the other."""
    names_before, names_after = {name for name, _ in before}, {name for name, _ in after}
    changes = []
    for key in sorted(before.keys() | after.keys()):
        name, figure = key
        if name in names_before and name in names_after and before.get(key, 0) != after.get(key, 0):
            retiled = before.get((name, "unit")) != after.get((name, "unit"))
            changes.append(Change(name, figure, before.get(key, 0), after.get(key, 0), retiled))
    gone = [Change(name, "everything", 1, None) for name in sorted(names_before - names_after)]
    new = [Change(name, "everything", None, 1) for name in sorted(names_after - names_before)]
    return changes + gone + new


def beyond(limits: Limits, figures: Figures) -> list[str]:
    """Lines on the figures that do not keep to their limits, and on limits of kernels that are no more."""
    lines = []
    for name, bounds in limits.items():
        for figure, bound in bounds.items():
            value = figures.get((name, figure), 0)
            least = figure in MORE_IS_BETTER
            if value < bound if least else value > bound:
                lines.append(f"{name:82} {figure:28} {value:>10g} {'at least' if least else 'at most'} {bound:g}")
    return lines


def static(arguments: argparse.Namespace) -> list[str]:
    """Compare the static evidence with the baseline; lines on why the gate fails, none where it passes."""
    before = None if arguments.update else read_baseline(arguments.baseline)
    archs = tuple(arguments.arch or MAIN_ARCHS)
    found = evidence.collect(archs, arguments.only)
    figures = flatten(found, archs, arguments.only)
    if before is None:
        found |= rivals_section(arguments.baseline, archs)
        evidence.write(arguments.baseline, evidence.dump(found))
        print(f"{arguments.baseline}: {len(figures)} figures written")
        changes = []
    else:
        figures_before = flatten(before, archs, arguments.only)
        refuse_what_matches_nothing(arguments.only, figures, figures_before)
        changes = compare(figures_before, figures)
        print(f"{len(figures)} figures, {len(changes)} of them changed")
    names = {name for name, _ in figures}
    here = {name: bounds for name, bounds in LIMITS.items() if name in names}
    exceeded = beyond(here, figures) + beyond(_everywhere(names), figures)
    report(
        "not yet within these limits",
        beyond({name: bounds for name, bounds in NOT_YET.items() if name in names}, figures),
    )
    report("limits exceeded", exceeded)
    report("changed against the baseline", [str(change) for change in changes])
    worse = [f"worse: {change.figure} of {change.name}" for change in changes if change.verdict == "worse"]
    if changes and not worse:
        print("Nothing is worse. To take the new figures over: make gate UPDATE=1")
    return (
        worse
        + [f"changed: {change.figure} of {change.name}" for change in changes if change.verdict != "worse"]
        + exceeded
    )


def refuse_what_matches_nothing(only: str, *figures: Figures) -> None:
    """Raise ArgumentError if `only` leaves nothing to hold: a gate that looks at nothing must not pass."""
    elsewhere = [*ratios.CASES, HOST]
    if not any(figures) and not any(re.search(only, name) for name in elsewhere):
        raise ArgumentError(
            "--only", repr(only), "what matches the name of a case",
            f"Names are those in the baseline, without target, 'traffic of' and the like, and {elsewhere}.",
        )  # fmt: skip


def rivals_section(baseline: Path, archs: tuple[str, ...]) -> Evidence:
    """What a new baseline shows of rivals, which are not gated: measured, or kept where they are not installed."""
    if evidence.rivals.installed():
        return {"rivals": evidence.compared(archs)}
    try:
        return {"rivals": read_baseline(baseline)["rivals"]}
    except (ArgumentError, KeyError):
        return {}


def _everywhere(names: set[str]) -> Limits:
    kernels = {name: EVERY_KERNEL for name in sorted(names) if ": " in name}
    return kernels | {name: EVERY_TRAFFIC for name in sorted(names) if name.startswith("traffic")}


def report(title: str, lines: list[str]) -> None:
    """Print a titled table, if there is one."""
    if lines:
        print("", title, *lines, sep="\n")


def speed(arguments: argparse.Namespace) -> list[str]:
    """Time fastbert beside a rival, and beside another commit if one is given; lines on why the gate fails."""
    print()
    reasons = ratios.against_rival(arguments.only)
    return reasons + (ratios.against(arguments.base, arguments.only) if arguments.base else [])


def host(arguments: argparse.Namespace) -> list[str]:
    """Measure the host time of a layer beside a rival's; a line on why the gate fails."""
    if not re.search(arguments.only, HOST):
        return []
    print(f"\n{HOST}", flush=True)
    script = Path(__file__).resolve().parent / "host_time.py"
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ended = subprocess.run([sys.executable, str(script)], env=compiling).returncode
    return [f"{HOST}: {script.name} ended with {ended}"] if ended else []


# Each prints its tables and returns a line for each reason to fail.
CHECKS: tuple[Callable[[argparse.Namespace], list[str]], ...] = (static, speed, host)


def pattern(text: str) -> str:
    """A regular expression, as argparse asks for a type."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    if not text:
        raise argparse.ArgumentTypeError("it is empty; leave --only out for everything")
    return text


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description="Hold static evidence against the baseline, and speed and host time on this CPU against a rival."
    )
    parser.add_argument("--update", action="store_true", help="write the baseline anew, whole")
    parser.add_argument("--base", metavar="COMMIT", help="also compare the speed on this CPU with that of a commit")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="a target, may be repeated; default: the main 3")
    parser.add_argument("--only", type=pattern, metavar="REGEX", help="what has such a name")
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.update and (arguments.arch or arguments.only):
        parser.error("--update writes the whole baseline: leave out --arch and --only")
    arguments.only = arguments.only or ""  # matches everything
    try:
        reasons = [reason for check in CHECKS for reason in check(arguments)]
    except FastbertError as error:
        print(f"gate: {error}", file=sys.stderr)
        return 2
    print(f"\ngate: {f'failed, for {len(reasons)} reasons' if reasons else 'passed'}")
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
