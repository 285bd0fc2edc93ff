"""`make gpu`: its steps on fake commands, and what it says where there is no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu
import pytest
import smoke
import torch
from gpu import STEPS, Step, run_command, run_steps
from journal import Journal
from processes import PYTHON

from fastbert.backend import first_device
from fastbert.config import EncoderConfig
from fastbert.kernels.target import KNOWN, Target

ROOT = Path(__file__).resolve().parent.parent
FEW = (
    Step("first", ("first",), 1.0),
    Step("second", ("second", "{folder}/made.json"), 1.0, makes="made.json"),
    Step("third", ("third",), 1.0, needs="made.json"),
)


class Commands:
    """Fake commands: each has the exit status of a table, writes its log, and what it should make if all is well."""

    def __init__(self, folder: Path, **codes: int | type[BaseException] | None) -> None:
        self.folder = folder
        self.codes = codes
        self.ran: list[str] = []
        self.said: list[str] = []

    def __call__(self, command: Sequence[str], log: Path, seconds: float) -> int | None:
        name = command[0]
        assert seconds == 60
        log.write_text(f"line of {name}\n")
        code = self.codes.get(name, 0)
        if isinstance(code, type):
            raise code
        self.ran.append(name)
        if name == "second" and code != 3:
            Path(command[1]).write_text("{}")
        return code

    def run(self) -> bool:
        journal = Journal(self.folder / "steps.jsonl", {"device": "fake"})
        return run_steps(FEW, self.folder, journal, run=self, say=self.said.append)


@pytest.fixture
def commands(tmp_path: Path) -> Callable[..., Commands]:
    return lambda **codes: Commands(tmp_path, **codes)


def test_all_steps_pass(commands: Callable[..., Commands]) -> None:
    suite = commands()
    assert suite.run() and suite.ran == ["first", "second", "third"]


def test_a_failed_step_is_reported_and_the_others_run(commands: Callable[..., Commands]) -> None:
    suite = commands(first=1)
    assert not suite.run()
    assert suite.ran == ["first", "second", "third"]
    assert any(line.startswith("first: failed with status 1") for line in suite.said)
    assert "  | line of first\n" in suite.said


def test_a_step_is_left_out_where_what_it_needs_was_not_made(commands: Callable[..., Commands], tmp_path: Path) -> None:
    (tmp_path / "made.json").write_text("of an earlier run")
    suite = commands(second=3)
    assert not suite.run()
    assert suite.ran == ["first", "second"]
    assert "third: skipped, there is no made.json" in suite.said


def test_a_step_out_of_time_may_have_made_what_others_need(commands: Callable[..., Commands]) -> None:
    suite = commands(second=None)
    assert not suite.run()
    assert suite.ran == ["first", "second", "third"]
    assert any(line.startswith("second: out of time") for line in suite.said)


@pytest.mark.parametrize(("stopped", "left"), [("first", 3), ("second", 2), ("third", 1)])
def test_it_goes_on_after_an_interruption(stopped: str, left: int, commands: Callable[..., Commands]) -> None:
    with pytest.raises(KeyboardInterrupt):
        commands(**{stopped: KeyboardInterrupt}).run()
    again = commands()
    assert again.run() and again.ran == ["first", "second", "third"][-left:]


def test_what_follows_a_failure_is_done_again(commands: Callable[..., Commands]) -> None:
    """The step that failed may change what the later ones find, as tuning does."""
    commands(second=1).run()
    with pytest.raises(KeyboardInterrupt):
        commands(third=KeyboardInterrupt).run()
    again = commands()
    assert again.run() and again.ran == ["third"]
    nothing = commands()
    assert nothing.run() and nothing.ran == []


def test_a_corrupt_journal_is_refused(commands: Callable[..., Commands], tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"steps.jsonl, line 1: got {; expected a JSON object"):
        commands().run()


def test_it_ends_in_under_25_minutes() -> None:
    assert sum(step.minutes for step in STEPS) + gpu.SETUP_MINUTES < 25
    [tune] = [step for step in STEPS if step.name == "tune"]
    own_minutes = float(tune.command[tune.command.index("--minutes") + 1])
    assert own_minutes < tune.minutes - gpu.GRACE / 60, "it would be interrupted"


def test_steps_can_be_run() -> None:
    made: set[str] = set()
    for step in STEPS:
        assert not step.needs or step.needs in made
        made.add(step.makes)
        for word in step.command:
            assert not word.endswith(".py") or (ROOT / word).exists(), word
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_a_command_s_status_and_output(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run_command([sys.executable, "-c", "print('out'); raise SystemExit(3)"], log, 60) == 3
    assert log.read_text() == "out\n"


INTERRUPTED = """
import time
try:
    print("begun", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("what it has", flush=True)
    {then}
"""


@pytest.mark.parametrize("then", ["pass", "time.sleep(60)"])
def test_a_command_is_interrupted_and_then_killed(then: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    begin = time.monotonic()
    assert run_command([sys.executable, "-c", INTERRUPTED.format(then=then)], log, 4) is None
    assert time.monotonic() - begin < 10
    assert log.read_text() == "begun\nwhat it has\n"


def test_an_unknown_gpu_is_told_whose_choices_it_gets() -> None:
    said = gpu.describe("RTX 9090", Target("cuda", "sm_137", 32, 99 * 1024))
    assert "sm_137 is none of the targets" in said and "choices of sm_120;" in said and "gfx942" in said
    assert gpu.describe("H100", KNOWN["sm_90"]) == "H100: sm_90, launch choices of the family hopper"
    assert "choices of gfx942;" in gpu.describe("MI355X", Target("hip", "gfx950", 64, 64 * 1024))


class FakeCuda:
    """A GPU for `main`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, results: Path, commit: str) -> None:
        self.steps: list[str] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Fake 80GB")
        monkeypatch.setattr("fastbert.kernels.target.of", lambda device: KNOWN["sm_90"])
        monkeypatch.setattr("folders.RESULTS", results)
        monkeypatch.setattr("environment.environment", lambda: {"device": "NVIDIA Fake 80GB", "commit": commit})
        monkeypatch.setattr(gpu, "run_steps", self.run_steps)

    def run_steps(self, steps: Sequence[Step], folder: Path, journal: Journal, **options: Any) -> bool:
        status = {entry["step"]: entry["status"] for entry in journal.entries}
        self.steps = [step.name for step in steps if status.get(step.name) != "passed"]
        for name in self.steps:
            journal.write(step=name, status="passed")
        return True


def test_results_are_in_the_gpu_s_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    def main(commit: str, *options: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["gpu.py", *options])
        fake = FakeCuda(monkeypatch, tmp_path / "results", commit)
        assert gpu.main() == 0
        return fake.steps

    every = [step.name for step in STEPS]
    assert main("abc") == every
    folder = tmp_path / "results" / "nvidia-fake-80gb"
    assert json.loads((folder / "environment.json").read_text())["commit"] == "abc"
    assert main("abc+") == [], "the tune step changes a file that git follows"
    assert main("abc", "--anew") == every
    assert main("def") == every
    assert "another commit's" in capsys.readouterr().out
    assert main("def", "--only", "smoke", "report") == ["smoke", "report"], "though they have passed"
    assert main("def", "--out", str(tmp_path / "out")) == []
    assert (tmp_path / "out" / "tuned.json").read_bytes() == (ROOT / "kernels" / "tuned.json").read_bytes()
    assert (tmp_path / "out" / "environment.json").is_file()
    assert not list(folder.glob("*.tmp"))


BARE = """
import importlib.util, subprocess, sys
sys.path.insert(0, {benchmarks!r})
assert importlib.util.find_spec("fastbert") is None
from bare import importable
with importable():
    import fastbert, fastbert.kernels.launch
    print(fastbert.__file__)
    ask = "import importlib.util, fastbert.kernels.launch; print(importlib.util.find_spec('kernels'))"
    subprocess.run([sys.executable, "-S", "-c", ask], check=True)
assert importlib.util.find_spec("fastbert") is None or "fastbert" in sys.modules
"""


def without_fastbert(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python with all packages but the installed fastbert, whose finder a .pth file of site-packages brings."""
    packages = os.pathsep.join({str(Path(module.__file__).parent.parent) for module in (torch, pytest)})
    environment = {**os.environ, "PYTHONPATH": packages}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_a_checkout_that_nobody_installed(tmp_path: Path) -> None:
    """Nor is its root importable, whose `kernels/` transformers would take for PyPI's."""
    done = without_fastbert("-c", BARE.format(benchmarks=str(ROOT / "benchmarks")), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where, kernels = done.stdout.split("\n", 1)
    assert Path(where).parent.name == "fastbert" and not Path(where).exists(), "it is gone at the end"
    assert kernels.strip() == "None"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_bare_checkout_without_a_gpu_says_so(tmp_path: Path) -> None:
    done = without_fastbert(str(ROOT / "benchmarks" / "gpu.py"), "--only", "smoke", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("No GPU: torch "), done.stderr


def test_the_smoke_test_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter, on a small model."""
    small = EncoderConfig(
        vocab_size=40, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48, max_positions=40
    )
    monkeypatch.setattr(smoke, "LENGTHS", (7, 1, 33))
    device = first_device()
    smoke.forward(small, device)
    smoke.train(small, device)
    smoke.once(small, device)
    by_kernels = smoke.by_kernels
    monkeypatch.setattr(smoke, "by_kernels", lambda *given: 1.01 * by_kernels(*given))
    with pytest.raises(AssertionError, match="forward in"):
        smoke.forward(small, device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written() -> None:
    before = sorted((ROOT / "benchmarks").rglob("*.json*"))
    done = subprocess.run([*PYTHON, str(ROOT / "benchmarks" / "gpu.py")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("No GPU: torch ") and "make bench" in done.stderr
    assert sorted((ROOT / "benchmarks").rglob("*.json*")) == before
