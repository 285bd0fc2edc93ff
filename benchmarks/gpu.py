"""All that a machine with a GPU can tell: is it right, which launch choices are fastest, how fast is it beside rivals.

    make gpu                     # or python benchmarks/gpu.py [--anew] [--only STEP ...] [--out FOLDER]

It also runs from a checkout that nobody installed, with the packages that are there. The steps run one after the other,
each with a time limit, and leave a log each in benchmarks/results/<gpu>/. A step that fails does not stop the others.
After an interruption or a failure the same command goes on from the first step that has not passed, as long as commit
and GPU are the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.append(str(Path(__file__).parent))
from bare import ROOT, importable
from folders import folder_of

if TYPE_CHECKING:
    from journal import Journal

    from fastbert.kernels.target import Target

PYTHON = sys.executable
# Not `python -m pytest` as it is, which would find `kernels` at the root.
PYTEST = (PYTHON, "-c", "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main())")
# Most of a test is compiling, which keeps a core busy: more processes than cores only share them. Each also holds a
# context on the GPU, about half a GiB of its memory: eight at most.
MOST_AT_ONCE = 8


def at_once(cores: int | None) -> tuple[str, ...]:
    """pytest in as many processes as there are cores, `MOST_AT_ONCE` at most, with pytest-xdist or without."""
    processes = str(min(MOST_AT_ONCE, cores or 1))
    if importlib.util.find_spec("xdist"):  # goes on in another process where one crashes
        return (*PYTEST, "-n", processes)
    return PYTHON, "benchmarks/shares.py", processes


# Whole models first: what an interruption cuts off at the end is to be what matters least.
FIRST = ("bench_encoder.py", "bench_latency.py", "bench_attention.py")
OTHERS = tuple(sorted(path.name for path in Path(__file__).parent.glob("bench_*.py") if path.name not in FIRST))

# Of the 25 minutes that all of it may take, so many are for making .venv.
SETUP_MINUTES = 3.0
# Before its limit a step is interrupted, so that it can write what it has.
GRACE = 20.0


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: unique.
        command: "{folder}" stands for the folder of results.
        minutes: its time limit.
        makes: the file of results that it writes, if any; an older one is removed first.
        needs: a file that an earlier step makes, without which this one is left out.
        asked: whether it only runs where `--only` names it.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    makes: str = ""
    needs: str = ""
    asked: bool = False


def _benchmarks(files: Sequence[str], results: str) -> tuple[str, ...]:
    return (*PYTEST, *(f"benchmarks/{file}" for file in files), f"--benchmark-json={{folder}}/{results}")


FORMS = ("attention_forward", "linear_gelu_forward", "linear_gelu")  # the last chooses a form, the others tiles

STEPS = (
    Step("smoke", (PYTHON, "benchmarks/smoke.py"), 2.0),
    Step("correctness", (*at_once(os.cpu_count()), "tests", "-m", "kernels"), 6.0),
    Step("sanitizer", (PYTHON, "benchmarks/smoke.py", "--sanitize"), 8.0, asked=True),
    Step("forms", (PYTHON, "benchmarks/tune.py", "--minutes", "5.5", "--only", *FORMS), 6.0, asked=True),
    Step("tune", (PYTHON, "benchmarks/tune.py", "--minutes", "4.5"), 5.0),
    Step("models", _benchmarks(FIRST[:2], "models.json"), 8.0, makes="models.json", asked=True),
    Step(
        "fp8", (*PYTEST, "tests/test_quantize_rows.py", "tests/test_quantization.py", "-m", "kernels"), 4.0, asked=True
    ),
    Step(
        "profile", (PYTHON, "benchmarks/profile_encode.py", "--out", "{folder}"), 3.0, makes="profile.txt", asked=True
    ),
    Step("benchmarks", _benchmarks((*FIRST, *OTHERS), "results.json"), 7.5, makes="results.json"),
    Step("report", (PYTHON, "benchmarks/report.py"), 1.0, needs="results.json"),
)
# What an hour on a GPU is best spent on, in the order in which a failure is cheapest.
FIRST_HOUR = ("smoke", "correctness", "sanitizer", "forms", "tune", "models", "fp8", "profile")

# (command, log, seconds) -> exit status, or None where the time was up.
Run = Callable[[Sequence[str], Path, float], int | None]


def run_command(command: Sequence[str], log: Path, seconds: float) -> int | None:
    """Run a command and all that it starts for at most so long, its output in `log`."""
    # What nohup and a shell's & start ignores SIGINT, and so would all that it starts.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True, preexec_fn=heed
        )
    try:
        return process.wait(max(seconds - GRACE, seconds / 2))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(GRACE, seconds / 2))
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_steps(
    steps: Sequence[Step], folder: Path, journal: Journal, *, run: Run = run_command, say: Callable[[str], None] = print
) -> bool:
    """Run the steps from the first that has not passed; whether all have passed now."""
    status_of = {entry["step"]: entry["status"] for entry in journal.entries}
    left = list(steps)
    while left and status_of.get(left[0].name) == "passed":
        say(f"{left.pop(0).name}: has passed before")
    for step in left:  # all are to be done anew, because each may change what the later ones find
        journal.write(step=step.name, status="begun")
    failed = False
    for step in left:
        status, seconds = "skipped", 0.0
        log = folder / f"{step.name}.log"
        if not step.needs or (folder / step.needs).exists():
            say(f"{step.name}: at most {step.minutes:g} minutes, log in {log}")
            if step.makes:
                (folder / step.makes).unlink(missing_ok=True)
            begin = time.monotonic()
            code = run([word.format(folder=folder) for word in step.command], log, 60 * step.minutes)
            seconds = time.monotonic() - begin
            status = {0: "passed", None: "out of time"}.get(code, f"failed with status {code}")
        journal.write(step=step.name, status=status, seconds=round(seconds, 1))
        say(
            f"{step.name}: {status}"
            + (f", there is no {step.needs}" if status == "skipped" else f" after {seconds:.0f} s")
        )
        if status != "passed":
            failed = True
            if log.exists():
                say("".join(f"  | {line}\n" for line in log.read_text(errors="replace").splitlines()[-15:]))
    return not failed


def describe(name: str, target: Target) -> str:
    """The GPU in a line, and whose launch choices it gets."""
    from fastbert.kernels import choices
    from fastbert.kernels.target import KNOWN

    family = choices.family(target)
    if target.arch in KNOWN:
        return f"{name}: {target.arch}, launch choices of the family {family}"
    known = ", ".join(arch for arch in KNOWN if arch != "interpreter")
    return (
        f"{name}: {target.arch} is none of the targets that the kernels were compiled for ({known}). It gets the "
        f"launch choices of {target.kin}; they may spill or not fit."
    )


def main() -> int:
    """The command; its exit status is 0 if all steps have passed, 1 if one has not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anew", action="store_true", help="forget the steps that have passed and what was tuned")
    parser.add_argument(
        "--only", nargs="+", choices=[step.name for step in STEPS], metavar="STEP",
        help=f"these steps, in this order, whether they have passed or not: {', '.join(step.name for step in STEPS)}; "
        f"by default all but {', '.join(step.name for step in STEPS if step.asked)}",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="also put the results and tuned.json there")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(
            2,
            f"No GPU: torch {torch.__version__} sees none, and this command measures one. On a CPU there are `make "
            "bench` for speed and `make static` for the GPU kernels' machine code.\n",
        )
    with importable():
        return measure(options.anew, options.only, options.out)


def chosen(only: Sequence[str] | None) -> list[Step]:
    """The steps of these names, or all that nobody needs to ask for, in their order."""
    return [step for step in STEPS if (not step.asked if only is None else step.name in only)]


def measure(anew: bool, only: Sequence[str] | None, out: Path | None) -> int:
    """All steps, or these, on the GPU that is there; the exit status."""
    from environment import environment
    from journal import Journal

    from fastbert.kernels.target import of

    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)
    print(describe(name, of(device)))
    folder = folder_of(name)
    folder.mkdir(parents=True, exist_ok=True)
    if anew:
        for file in ("steps.jsonl", "tune.jsonl"):
            (folder / file).unlink(missing_ok=True)
    stamp = environment()
    temporary = folder / "environment.tmp"
    temporary.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / "environment.json")
    commit = stamp["commit"].removesuffix("+")  # "+" for changes: the tune step makes one, in tuned.json
    journal = Journal(folder / "steps.jsonl", {"device": name, "commit": commit})
    if journal.begun_anew:
        print("The steps that had passed were another commit's: begun anew")
    for step in only or ():
        journal.write(step=step, status="asked for")
    passed = run_steps(chosen(only), folder, journal)
    if out is not None:
        shutil.copytree(folder, out, dirs_exist_ok=True)
        shutil.copy2(ROOT / "kernels/tuned.json", out)
        print(f"Results and tuned.json are in {out} too")
    if not passed:
        print("Not all steps have passed. The same command tries again.")
        return 1
    print(
        f"All steps have passed. To be committed: {folder}, kernels/tuned.json, docs/performance.md and its pictures."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
