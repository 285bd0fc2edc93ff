"""`make gpu`: its steps on fake commands, and what it says where there is no GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import profile_encode
import pytest
import smoke
import torch
from gpu import STEPS, Step, run_command, run_steps
from journal import Journal
from processes import PYTHON, heed_signals
from torch.autograd import DeviceType

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
    assert sum(step.minutes for step in gpu.chosen(None)) + gpu.SETUP_MINUTES < 25


def test_who_limits_itself_is_not_interrupted() -> None:
    limited = [step for step in STEPS if "--minutes" in step.command]
    assert [step.name for step in limited] == ["forms", "tune"]
    for step in limited:
        own_minutes = float(step.command[step.command.index("--minutes") + 1])
        assert own_minutes < step.minutes - gpu.GRACE / 60
    [sanitizer] = [step for step in STEPS if step.name == "sanitizer"]
    assert 60 * sanitizer.minutes - gpu.GRACE > smoke.ALONE_SECONDS


@pytest.mark.parametrize(("cores", "processes"), [(64, "8"), (4, "4"), (1, "1"), (None, "1")])
def test_as_many_processes_as_cores(cores: int | None, processes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    assert gpu.at_once(cores) == (*gpu.PYTEST, "-n", processes)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.at_once(cores) == (sys.executable, "benchmarks/shares.py", processes)


SHARED = """
import os, pathlib, time, pytest
@pytest.mark.parametrize("number", range(3))
def test_it(number):
    pathlib.Path(f"ran-{number}").write_text(str(os.getppid()))
    assert number != 1
def test_of_another_kind():
    pathlib.Path("ran-other").touch()
def test_for_long():
    pathlib.Path("begun").touch()
    time.sleep(600)
"""


def share(folder: Path, *options: str) -> subprocess.Popen[str]:
    (folder / "test_shared.py").write_text(SHARED)
    command = [*PYTHON, str(ROOT / "benchmarks" / "shares.py"), *options, "-p", "no:cacheprovider", "test_shared.py"]
    return subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True, preexec_fn=heed_signals,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize(("selected", "status", "passed"), [("test_it", 1, 2), ("test_it and not 1", 0, 2)])
def test_shares_are_all_the_tests(selected: str, status: int, passed: int, tmp_path: Path) -> None:
    """In one more process than there are tests for, each once."""
    process = share(tmp_path, "4", "-k", selected)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == status, said
    assert said.count("1 passed") == passed and said.count("1 failed") == status, said
    idle = said.partition(f"Share {3 + status} of 4")[2]
    assert idle and " passed" not in idle, "what is selected is shared, not what there is"
    assert not (tmp_path / "ran-other").exists()


def test_an_interruption_shows_what_shares_have_found(tmp_path: Path) -> None:
    process = share(tmp_path, "2", "-k", "it or long")
    end = time.monotonic() + 120
    while not (tmp_path / "begun").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(2)  # the other share fails the while
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=gpu.GRACE)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in said and "assert 1 != 1" in said, said


def test_the_first_hour() -> None:
    """Its steps are ours, in order, each under ten minutes; the docs have the same."""
    steps = gpu.chosen(gpu.FIRST_HOUR)
    assert [step.name for step in steps] == list(gpu.FIRST_HOUR)
    assert all(step.minutes < 10 for step in steps) and sum(step.minutes for step in steps) <= 60
    docs = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8").partition("## The first hour on a GPU")[2]
    told = re.findall(r"^\| `--only (\w+)` \|.*\| (\d+) \|$", docs.partition("\n## ")[0], re.MULTILINE)
    assert told == [(step.name, f"{step.minutes:g}") for step in steps]


def test_whole_models_are_measured_first() -> None:
    [step] = [step for step in STEPS if step.name == "benchmarks"]
    files = [word.removeprefix("benchmarks/") for word in step.command if word.endswith(".py")]
    assert files[:2] == ["bench_encoder.py", "bench_latency.py"]
    assert sorted(files) == sorted(path.name for path in (ROOT / "benchmarks").glob("bench_*.py"))


COLLECTED_ELSEWHERE = ("correctness", "models")  # by the test of bare machines, by the step "benchmarks"


@pytest.mark.long
@pytest.mark.parametrize(
    "step", [step for step in STEPS if step.name not in COLLECTED_ELSEWHERE], ids=lambda step: step.name
)
def test_a_step_s_options_are_those_of_its_command(step: Step, tmp_path: Path) -> None:
    collects = ["--collect-only", "-q", "-p", "no:cacheprovider"]
    command = [word.format(folder=tmp_path) for word in step.command]
    done = subprocess.run(
        [*command, *(collects if command[:3] == list(gpu.PYTEST) else ["--help"])],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    if "--help" in done.args:  # which ends a command before it refuses an option that it does not know
        assert all(word in done.stdout for word in command if word.startswith("--"))


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

    every = [step.name for step in STEPS if not step.asked]
    assert every == ["smoke", "correctness", "tune", "benchmarks", "report"]
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


def test_the_first_hour_runs_in_order_on_a_gpu_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ran: list[tuple[str, str]] = []

    def run(command: Sequence[str], log: Path, seconds: float) -> int:
        ran.append((log.stem, " ".join(command)))
        log.write_text("")
        return 1 if log.stem == "correctness" else 0

    FakeCuda(monkeypatch, tmp_path / "results", "abc")
    monkeypatch.setattr(gpu, "run_steps", partial(run_steps, run=run))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", *reversed(gpu.FIRST_HOUR)])
    assert gpu.main() == 1, "one has failed, and the others ran"
    assert [name for name, _ in ran] == list(gpu.FIRST_HOUR)
    folder = tmp_path / "results" / "nvidia-fake-80gb"
    by_name = dict(ran)
    assert by_name["sanitizer"].endswith("smoke.py --sanitize")
    assert by_name["forms"].endswith("--only attention_forward linear_gelu_forward linear_gelu")
    assert by_name["models"].endswith(f"--benchmark-json={folder}/models.json")
    assert by_name["profile"].endswith(f"profile_encode.py --out {folder}")


BARE = """
import importlib.util, subprocess, sys
sys.path.insert(0, {benchmarks!r})
assert importlib.util.find_spec("fastbert") is None
from bare import importable
with importable():
    import fastbert, fastbert.kernels.choices
    print(fastbert.__file__)
    ask = "import importlib.util, fastbert.kernels.choices; print(importlib.util.find_spec('kernels'))"
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


def test_the_sanitizer_by_itself(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[float] = []
    monkeypatch.setattr(smoke, "sanitize", lambda seconds: asked.append(seconds) or "found nothing")
    monkeypatch.setattr(sys, "argv", ["smoke.py", "--sanitize"])
    assert smoke.main() == 0
    assert asked == [smoke.ALONE_SECONDS] and capsys.readouterr().out == "found nothing\n"


LACKING = """
import importlib.machinery
lacking = {"hypothesis", "llvmlite", "matplotlib", "openvino", "onnx", "onnxruntime", "ctranslate2", "accelerate",
           "sentence_transformers", "pytest_benchmark", "xdist", "build"}
found = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda finder, name, *rest: None if name.partition(".")[0] in lacking else found(name, *rest)
)
import sys, pytest
sys.path.remove("")
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_tests_of_kernels_need_no_package_that_a_bare_machine_may_lack() -> None:
    """Where a test file can't be imported pytest runs no test at all."""
    done = subprocess.run(
        [sys.executable, "-c", LACKING, "tests", "-m", "kernels", "--collect-only", "-q", "-p", "no:cacheprovider"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d{4}/\d+ tests collected", done.stdout)


SMALL = EncoderConfig(vocab_size=40, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48, max_positions=64)


def test_a_profile_of_encode(tmp_path: Path, capsys: Any) -> None:
    """On the machine at hand, with a toy."""
    assert profile_encode.main(["--texts", "5", "--out", str(tmp_path)], SMALL) == 0
    said = (tmp_path / "profile.txt").read_text()
    assert said == capsys.readouterr().out and said.startswith("5 texts in ") and "\nthe host: " in said


def test_a_profile_tells_kernels_copies_and_waits_apart() -> None:
    gpu_, cpu = DeviceType.CUDA, DeviceType.CPU
    events: list[Any] = [
        SimpleNamespace(key=key, count=count, device_type=where, self_cpu_time_total=host, self_device_time_total=took)
        for key, count, where, host, took in (
            ("layer_norm_forward_kernel", 12, gpu_, 0.0, 1500.0),
            ("attention_forward_kernel", 6, gpu_, 0.0, 4500.0),
            ("Memcpy HtoD (Pageable -> Device)", 3, gpu_, 0.0, 250.0),
            ("cudaStreamSynchronize", 2, cpu, 700.0, 0.0),
            ("cudaLaunchKernel", 18, cpu, 90.0, 0.0),
        )
    ]
    said = profile_encode.summary(events, 7, 0.0125)
    assert said.startswith("7 texts in 12.5 ms; the GPU was busy for 6.2 ms of a profiled call\n")
    tables = dict(re.findall(r"\n\n(.+): ([\d.]+ ms in \d+ calls)\n", said))
    assert tables == {
        "kernels": "6.000 ms in 18 calls",
        "copies": "0.250 ms in 3 calls",
        "waits of the host": "0.700 ms in 2 calls",
        "the host": "0.090 ms in 18 calls",
    }
    assert re.search(r"4.500 +75.0 +6  attention_forward_kernel\n +1.500 +25.0 +12  layer_norm_forward_kernel\n", said)


def test_a_profile_without_kernels_fails(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Where the driver forbids it, torch.profiler only warns."""
    monkeypatch.setattr(profile_encode, "record", lambda config, count: ([], 1.0))
    monkeypatch.setattr(profile_encode, "first_device", lambda: torch.device("cuda"))
    assert profile_encode.main([]) == 1
    assert "saw no kernel" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written() -> None:
    before = sorted((ROOT / "benchmarks").rglob("*.json*"))
    done = subprocess.run([*PYTHON, str(ROOT / "benchmarks" / "gpu.py")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("No GPU: torch ") and "make bench" in done.stderr
    assert sorted((ROOT / "benchmarks").rglob("*.json*")) == before
