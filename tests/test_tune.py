"""tune: the search on a fake device, its journal, and that each problem is one the kernels have."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measure
import pytest
import stand_in
import torch
import tune
from journal import Journal
from problems import FULL, SMALL, SPACES, Problem, Work, candidates, in_force, problems
from processes import PYTHON
from tune import Search

from fastbert.errors import ArgumentError
from fastbert.kernels import bias_gelu_choices, choices
from fastbert.kernels.choices import Block
from fastbert.kernels.target import KNOWN, of
from fastbert.testing import assert_close

ROOT = Path(__file__).resolve().parent.parent
H100 = KNOWN["sm_90"]
SHAPE = "width=3072,dtype=float16"
CURRENT, SLOW, FAST, FASTER, OTHER = (Block(rows, 1024, 4) for rows in (4, 1, 2, 8, 16))
SECONDS = {CURRENT: 1.0, SLOW: 2.0, FAST: 0.8, FASTER: 0.5, OTHER: 0.9}
ABOUT = {"device": "fake"}


def in_force_now() -> Block:
    return bias_gelu_choices.bias_gelu_forward(3072, torch.float16, H100)


def problem(
    wrong: tuple[Any, ...] = (), broken: tuple[Any, ...] = (), error: type[Exception] = RuntimeError
) -> Problem:
    """Its call gives the right answer but for these choices."""

    def run() -> list[torch.Tensor]:
        if in_force_now() in broken:
            raise error("PassManager::run failed")
        return [torch.tensor([2.0 if in_force_now() in wrong else 1.0])]

    def expected() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        return [torch.ones(1)], [torch.ones(1, dtype=torch.float64)]

    others = (SLOW, FAST, FASTER, OTHER)
    return Problem("bias_gelu_forward", SHAPE, CURRENT, others, False, lambda device: Work(run, expected))


class FakeDevice:
    """Takes the seconds of a table, and remembers what it timed."""

    name = "fake"
    target = H100
    torch_device = torch.device("cpu")

    def __init__(self, seconds: dict[Any, float] | None = None, stop_after: float = math.inf) -> None:
        self.seconds = SECONDS | (seconds or {})
        self.stop_after = stop_after
        self.timed: list[Any] = []

    def time(self, run: Callable[[], object]) -> float:
        run()
        if len(self.timed) == self.stop_after:
            raise KeyboardInterrupt
        self.timed.append(in_force_now())
        return self.seconds[in_force_now()]


@pytest.fixture(autouse=True)
def nothing_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "TUNED", {})


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    return path


def search(
    device: FakeDevice, tuned: Path, found: list[Problem], *, spills: tuple[Any, ...] = (), deadline: float = math.inf
) -> tuple[Search, bool, list[str]]:
    """A search whose compiler says that these spill; whether it came to its end, and what it said."""
    said: list[str] = []
    journal = Journal(tuned.with_name("tune.jsonl"), ABOUT)
    survey = lambda problem, choice: ["7 spills"] if choice in spills else []  # noqa: E731
    made = Search(device, survey, journal, tuned, deadline=deadline, say=said.append)
    return made, made.run(found), said


def winner(tuned: Path) -> Any:
    return choices.read_tuned(tuned).get(("sm_90", "bias_gelu_forward", SHAPE))


def test_the_fastest_wins(tuned: Path) -> None:
    _, done, said = search(FakeDevice(), tuned, [problem()])
    assert done and winner(tuned) == FASTER
    assert "2.00 times as fast" in said[0]
    assert choices.TUNED == {("sm_90", "bias_gelu_forward", SHAPE): FASTER}, "the winner, and no other on trial"


def test_a_wrong_one_is_never_timed_nor_chosen(tuned: Path) -> None:
    device = FakeDevice()
    search(device, tuned, [problem(wrong=(FASTER,))])
    assert winner(tuned) == FAST
    assert FASTER not in device.timed


def test_one_that_spills_is_never_timed_nor_chosen(tuned: Path) -> None:
    device = FakeDevice()
    search(device, tuned, [problem()], spills=(FASTER,))
    assert winner(tuned) == FAST
    assert FASTER not in device.timed


def test_one_that_does_not_run_is_passed_over(tuned: Path) -> None:
    search(FakeDevice(), tuned, [problem(broken=(FASTER, FAST))])
    assert winner(tuned) == OTHER


def test_a_lost_device_ends_the_search(tuned: Path) -> None:
    """After an illegal access every call fails; the candidates to come are not to blame."""
    with pytest.raises(torch.AcceleratorError):
        search(FakeDevice(), tuned, [problem(broken=(FAST,), error=torch.AcceleratorError)])
    device = FakeDevice()
    search(device, tuned, [problem()])
    assert device.timed[:3] == [FAST, FASTER, OTHER]


def test_the_choice_in_force_is_never_asked_of_the_compiler(tuned: Path) -> None:
    search(FakeDevice({FASTER: 3.0, FAST: 3.0, OTHER: 3.0}), tuned, [problem()], spills=(CURRENT,))
    assert winner(tuned) is None, "nothing is written where nothing is gained"


@pytest.mark.parametrize(("seconds", "wins"), [(0.98, False), (0.96, True)])
def test_a_gain_within_the_margin_is_none(seconds: float, wins: bool, tuned: Path) -> None:
    slow = dict.fromkeys((FAST, OTHER), 3.0)
    search(FakeDevice(slow | {FASTER: seconds}), tuned, [problem()])
    assert (winner(tuned) == FASTER) == wins


def test_a_lucky_measurement_does_not_win(tuned: Path) -> None:
    """The fastest in the search is no faster in two rounds of nine."""

    class Noisy(FakeDevice):
        def time(self, run: Callable[[], object]) -> float:
            seconds = super().time(run)
            unlucky = self.timed.count(FASTER) in (4, 7) and self.timed[-1] == FASTER
            return 1.1 if unlucky else seconds

    search(Noisy(), tuned, [problem()])
    assert winner(tuned) is None


def test_what_else_was_tuned_stays(tuned: Path) -> None:
    others = {
        "sm_80": {"bias_gelu_forward": {SHAPE: asdict(SLOW)}},
        "sm_90": {
            "bias_gelu_forward": {"width=4096,dtype=float16": asdict(OTHER), SHAPE: asdict(SLOW)},
            "layer_norm_forward": {"hidden=768,dtype=float16": {"ROWS": 2, "num_warps": 2}},
        },
    }
    tuned.write_text(json.dumps(others))
    before = choices.read_tuned(tuned)
    search(FakeDevice(), tuned, [problem()])
    assert choices.read_tuned(tuned) == before | {("sm_90", "bias_gelu_forward", SHAPE): FASTER}
    assert {path.name for path in tuned.parent.iterdir()} == {"tuned.json", "tune.jsonl"}


def test_a_malformed_file_of_winners_is_refused(tuned: Path) -> None:
    tuned.write_text('{"sm_90": 3}')
    with pytest.raises(ValueError, match="sm_90: got 3"):
        search(FakeDevice(), tuned, [problem()])
    assert tuned.read_text() == '{"sm_90": 3}'


@pytest.mark.parametrize("stop_after", range(5))
def test_an_interruption_loses_one_measurement(stop_after: int, tuned: Path) -> None:
    first, second = FakeDevice(stop_after=stop_after), FakeDevice()
    with pytest.raises(KeyboardInterrupt):
        search(first, tuned, [problem()])
    search(second, tuned, [problem()])
    measured = (first.timed + second.timed)[:5]
    assert measured == [CURRENT, SLOW, FAST, FASTER, OTHER], "measured twice, or not at all"
    assert len(second.timed) == 5 - stop_after + 2 * tune.ROUNDS
    assert winner(tuned) == FASTER


def test_what_is_settled_stays_so(tuned: Path) -> None:
    search(FakeDevice(), tuned, [problem()])
    again = FakeDevice()
    _, done, said = search(again, tuned, [problem()])
    assert done and again.timed == [] and said == []


def test_winners_of_an_earlier_run_are_written_again(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The journal outlives the checkout whose tuned.json it filled."""
    same = Problem("bias_gelu_forward", "width=1536,dtype=float16", FASTER, (), False, problem().prepare)
    search(FakeDevice(), tuned, [problem(), same])
    tuned.write_text("{}")
    monkeypatch.setattr(choices, "TUNED", {})
    again = FakeDevice()
    _, done, _ = search(again, tuned, [problem(), same])
    assert done and again.timed == []
    assert choices.read_tuned(tuned) == choices.TUNED == {("sm_90", "bias_gelu_forward", SHAPE): FASTER}


def test_time_runs_out(tuned: Path) -> None:
    device = FakeDevice()
    _, done, said = search(device, tuned, [problem()], deadline=-math.inf)
    assert not done and device.timed == [] and winner(tuned) is None
    assert "0 of 1 problems are settled" in said[0]


def test_a_choice_in_force_that_fails_is_reported_and_the_others_go_on(tuned: Path) -> None:
    bad = problem(wrong=(CURRENT,))
    good = Problem("bias_gelu_forward", "width=1536,dtype=float16", CURRENT, (), False, problem().prepare)
    made, done, said = search(FakeDevice(), tuned, [bad, good])
    assert done and made.broken == [bad] and winner(tuned) is None
    assert "the choice in force fails: result: largest error" in said[0]


def test_a_corrupt_line_of_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "tune.jsonl"
    path.write_text(json.dumps(ABOUT) + '\n{"op": "bias_g\n{}\n')
    with pytest.raises(ArgumentError, match=r"tune.jsonl, line 2: got {\"op\": \"bias_g; expected a JSON object"):
        Journal(path, ABOUT)


def test_a_line_that_an_interruption_cut_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "tune.jsonl"
    Journal(path, ABOUT).write(op="a")
    with path.open("a") as file:
        file.write('{"op": "b", "se')
    journal = Journal(path, ABOUT)
    assert journal.entries == [{"op": "a"}]
    journal.write(op="c")
    assert Journal(path, ABOUT).entries == [{"op": "a"}, {"op": "c"}]


def test_a_journal_about_something_else_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tune.jsonl"
    assert not Journal(path, ABOUT).begun_anew
    Journal(path, ABOUT).write(op="a")
    other = Journal(path, {"device": "another"})
    assert other.begun_anew and other.entries == []
    assert Journal(path, ABOUT).entries == [{"op": "a"}], "nothing is lost before something is measured"
    other.write(op="b")
    assert Journal(path, {"device": "another"}).entries == [{"op": "b"}]


ARCHS = [arch for arch in KNOWN if arch != "interpreter"]


@pytest.mark.parametrize("arch", ARCHS)
def test_problems_of_every_target(arch: str) -> None:
    found = problems(KNOWN[arch])
    assert {problem.op for problem in found} == set(SPACES) == set(choices.MEASURABLE)
    assert len({(problem.op, problem.shape) for problem in found}) == len(found)
    for problem in found:
        assert problem.candidates and problem.current not in problem.candidates
        assert len(set(problem.candidates)) == len(problem.candidates)
        assert {type(choice) for choice in problem.candidates} == {type(problem.current)}
        assert all(choice.num_stages <= 2 for choice in problem.candidates if arch[:3] == "gfx" and problem.matrix)


def test_the_keys_are_those_that_a_launch_asks_for() -> None:
    keys = {(problem.op, problem.shape) for problem in problems(H100)}
    assert ("attention_forward", "head_dim=64,dtype=float16,regime=aligned") in keys
    assert ("attention_backward_key", "head_dim=32,dtype=bfloat16,regime=one_pass") in keys
    assert ("embedding_backward_table", "hidden=384,dtype=float16") in keys


def test_forms_of_linear_gelu() -> None:
    """cuBLASLt's epilogue is tanh, has no backward, and is NVIDIA's; the epilogue of ours comes after its tiles."""
    for arch in ("sm_90", "gfx942"):
        found = problems(KNOWN[arch])
        forms = [problem for problem in found if problem.op == "linear_gelu"]
        assert len(forms) == 3 * 2 * 3 * 3 and not any(problem.compiled for problem in forms)
        for problem in forms:
            offered = {choice.form for choice in problem.candidates}
            assert offered == {"epilogue"} | ({"cublaslt"} if arch == "sm_90" and "tanh" in problem.shape else set())
            tiles = problem.shape.rpartition(",regime=")[0]
            before = [(other.op, other.shape) for other in found[: found.index(problem)]]
            assert ("linear_gelu_forward", tiles) in before


def test_one_pass_keeps_the_block_that_holds_every_key() -> None:
    one_pass = choices.AttentionKeyTile(64, 128, 8, 1, ONE_PASS=True)
    found = candidates("attention_backward_key", one_pass, H100)
    assert found and all(choice.ONE_PASS and choice.BLOCK_N == 128 for choice in found)


@pytest.mark.parametrize("arch", ARCHS)
def test_a_key_of_calls_with_and_without_dropout_is_tuned_with_it(arch: str) -> None:
    """A choice that only fits the registers without dropout would spill in training."""
    for found in problems(KNOWN[arch]):
        if found.op == "attention_backward_query" or (found.op, found.shape[-7:]) == (
            "attention_backward_key",
            "default",
        ):
            has_its_own = "regime" in found.shape and (found.op, found.shape[:-7] + "extras") in {
                (other.op, other.shape) for other in problems(KNOWN[arch])
            }
            assert found.prepare.func.__self__.dropout != has_its_own


def test_small_calls_are_specialised_as_the_full_ones() -> None:
    """Triton specialises on multiples of 16: the machine code that was inspected is that which is timed."""
    for regime, lengths in FULL.lengths.items():
        assert (sum(lengths) % 16 == 0) == (sum(SMALL.lengths[regime]) % 16 == 0) == (regime == "aligned")
    assert (FULL.rows % 16, FULL.heads % 16) != (0, 0) and SMALL.rows % 16 and SMALL.heads % 16
    for arch in ARCHS:
        full, small = ([(p.op, p.shape, p.current) for p in problems(KNOWN[arch], size)] for size in (FULL, SMALL))
        assert full == small


def by_op() -> list[str]:
    """The first problem of each op on the interpreter's target."""
    first: dict[str, Problem] = {}
    for problem in problems(KNOWN["interpreter"], SMALL):
        first.setdefault(problem.op, problem)
    return list(first)


@pytest.mark.long
@pytest.mark.parametrize("op", by_op())
def test_calls_are_right_and_use_the_choice_on_trial(op: str, device: torch.device, monkeypatch: Any) -> None:
    here = of(device)
    found = next(problem for problem in problems(here, SMALL) if problem.op == op)
    work = found.prepare(device)
    plain, exact = work.expected()
    used: list[Any] = []
    tuned = choices.tuned
    monkeypatch.setattr(choices, "tuned", lambda *key: used.append(tuned(*key)) or used[-1])
    for choice in (found.current, found.candidates[-1]):
        used.clear()
        with in_force(here, found, choice):
            got = work.run()
        assert choice in used
        for ours, rough, wanted in zip(got, plain, exact, strict=True):
            assert_close(ours, rough, wanted, what=op)


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels do not run in Triton's interpreter")
@pytest.mark.parametrize("op", by_op())
def test_calls_wait_for_no_gpu(op: str) -> None:
    """They are timed in a CUDA graph, which could not hold what waits."""
    here = of(torch.device("cpu"))
    found = next(problem for problem in problems(here, SMALL) if problem.op == op)
    with stand_in.StandIn() as gpu:
        work = found.prepare(stand_in.GPU)
        gpu.waits.clear()
        work.run()
    assert not gpu.waits


@pytest.mark.parametrize(("seconds", "repeats"), [(1e-9, measure.REPEATS), (0.002, 2), (0.5, 1)])
def test_a_candidate_is_timed_in_a_graph_that_is_soon_replayed(
    seconds: float, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Events:
        def __init__(self, device: torch.device) -> None:
            pass

        def __call__(self, run: Callable[[], object], calls: int) -> float:
            assert calls == 1
            return seconds

    class Graphs(Events):
        def repeated(self, run: Callable[[], object], repeats: int) -> Any:
            return run, repeats

        def once(self, made: Any, repeats: int) -> float:
            assert made == (run, repeats)
            replays.append(repeats)
            return float(len(replays))

    def run() -> None:
        raise AssertionError("only the fakes time it")

    replays: list[int] = []
    monkeypatch.setattr(tune, "DeviceTimer", Events)
    monkeypatch.setattr(tune, "GraphTimer", Graphs)
    gpu = tune.Gpu("fake", H100, torch.device("cpu"))
    assert gpu.time(run) == 3.0, "the median"
    assert replays == [repeats] * 5


COMPILE = """
import json, sys
sys.path[:0] = ["benchmarks", "benchmarks/static"]
from pathlib import Path
from tune import inspect_choice
from fastbert.kernels.choices import LinearGeluTile, Rows
from fastbert.kernels.target import KNOWN

norm = ("layer_norm_forward", "hidden=768,dtype=float16")
product = ("linear_gelu_forward", "rows=512,width=3072,depth=768,dtype=float16")
choices = [(*norm, Rows(1, 1)), (*norm, Rows(8, 1))]
choices += [(*product, LinearGeluTile(64, 64, 32, 4, 2)), (*product, LinearGeluTile(32, 64, 32, 4, 2))]
print(json.dumps([inspect_choice(KNOWN["sm_90"], *choice, Path(sys.argv[1])) for choice in choices]))
"""


@pytest.mark.long
def test_the_compiler_tells_which_candidates_spill(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*PYTHON, "-c", COMPILE, str(tmp_path)], capture_output=True, text=True, env=clean, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    sound, spilling, product, too_few_rows = json.loads(done.stdout)
    assert sound == product == []
    assert any("spills" in said for said in spilling)
    assert too_few_rows == ["no HGMMA instruction"]
    assert list(tmp_path.rglob("*.cubin")), "compiled kernels are not left for the process that times them"


def test_a_gpu_whose_machine_code_nobody_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    class Unknown(FakeDevice):
        name = "A GPU of 2031"
        target = replace(H100, arch="sm_137")

        def time(self, run: Callable[[], object]) -> float:
            run()
            self.timed.append(bias_gelu_choices.bias_gelu_forward(3072, torch.float16, self.target))
            return self.seconds[self.timed[-1]]

    monkeypatch.setattr("folders.RESULTS", tmp_path / "results")
    monkeypatch.setattr(tune, "KERNELS", tmp_path)
    monkeypatch.setattr(tune, "problems", lambda target: [problem()])
    (tmp_path / "tuned.json").write_text("{}")
    device = Unknown()
    assert not tune.tune(device, 1.0, anew=False).broken
    assert set(device.timed) == set(SECONDS)
    assert "sm_137: nobody reads its machine code here" in capsys.readouterr().out
    assert choices.read_tuned(tmp_path / "tuned.json") == {("sm_137", "bias_gelu_forward", SHAPE): FASTER}
    assert (tmp_path / "results" / "a-gpu-of-2031" / "tune.jsonl").exists()


def test_only_some_ops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tuned.json").write_text("{}")
    other = Problem("linear_gelu", "rows=512", CURRENT, (), False, problem().prepare)
    monkeypatch.setattr("folders.RESULTS", tmp_path / "results")
    monkeypatch.setattr(tune, "KERNELS", tmp_path)
    monkeypatch.setattr(tune, "problems", lambda target: [problem(), other])
    monkeypatch.setattr(tune, "Compilers", lambda *args: SimpleNamespace(close=lambda: None))
    tune.tune(FakeDevice(), 1.0, anew=False, only=["linear_gelu"])
    journal = Journal(tmp_path / "results" / "fake" / "tune.jsonl", {"device": "fake", "code": tune.code_version()})
    assert {entry["op"] for entry in journal.entries} == {"linear_gelu"}


def tune_in_a_process(*options: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "benchmarks" / "tune.py")
    return subprocess.run([*PYTHON, script, *options], capture_output=True, text=True)


def test_a_plan_needs_no_gpu() -> None:
    done = tune_in_a_process("--plan", "--arch", "gfx942")
    assert done.returncode == 0, done.stderr
    assert "attention_forward          head_dim=64,dtype=float16,regime=default" in done.stdout
    assert "candidates; nothing was compiled or timed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = tune_in_a_process()
    assert done.returncode == 2
    assert "device: got no GPU; expected a machine with one" in done.stderr and "Traceback" not in done.stderr
