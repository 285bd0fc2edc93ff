"""The performance gate fails for the regressions it is there for, each by its own figure, and passes otherwise."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gate
import pytest
import triton
from processes import PYTHON

from fastbert.errors import ArgumentError

ROOT = Path(__file__).resolve().parent.parent
# One case for each regression that is planted below, and its traffic or launches.
ONLY = (
    r"layer_norm 768 float16 \+residual \+bias$|^layer_norm$|attention head_dim (64 aligned float16$|40)|"
    "encoder layer inference short$"
)

# (file, what stands there, what is planted)
EXTRA_LOAD = (
    "kernels/layer_norm.py",
    "    out, mean, rstd = normalise(x, mask_column",
    """    x += tl.load(out_ptr + row_offset * out_stride_row + column[None, :], mask=mask, other=0.0)
    out, mean, rstd = normalise(x, mask_column""",
)
MASKED_FULL_BLOCKS = (
    "kernels/attention_choices.py",
    '"aligned": AttentionTile(128, 64, 8, 3),',
    '"aligned": AttentionTile(128, 64, 8, 3, SPLIT_TAIL=False),',
)
NO_PROMISE_OF_ALIGNMENT = (
    "kernels/attention.py",
    "    if HEAD_DIM % 16 != 0:  # Triton only sees strides divisible by 16; `target.aligned` promises 16 bytes\n",
    "    if HEAD_DIM < 0:\n",
)
EXTRA_LAUNCH = (
    "kernels/bias_gelu.py",
    "    x = target.aligned(x)\n",
    "    x = target.aligned(x).clone()\n",
)
LAYER_NORM = "sm_90 layer_norm 768 float16 +residual +bias: layer_norm_forward"
ALIGNED = "sm_90 attention head_dim 64 aligned float16: attention_forward"
ODD = "sm_90 attention head_dim 40 ragged float16: attention_forward"


def run(tree: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script of a tree on that tree's kernels, where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [*PYTHON, str(tree / "benchmarks" / script), "--arch", "sm_90", "--only", ONLY, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


pinned = pytest.mark.skipif(
    triton.__version__ != json.loads(gate.BASELINE.read_text())["triton"], reason="the baseline is of another Triton"
)


@pinned
@pytest.mark.long
def test_an_unchanged_tree_gives_the_baseline_each_time(tmp_path: Path) -> None:
    for name in ("first", "second"):
        result = run(ROOT, "static/evidence.py", "--json", str(tmp_path / name))
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    found, before = (json.loads(path.read_text()) for path in (tmp_path / "first", gate.BASELINE))
    assert {f"sm_90 {name}" for name in found["kernels"]["sm_90"]} == {LAYER_NORM, ALIGNED, ODD}
    assert gate.compare(*(gate.flatten(each, ("sm_90",), ONLY) for each in (before, found))) == []


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The gate on a copy of the tree with four regressions, each in a kernel or pass of its own."""
    tree = tmp_path_factory.mktemp("planted")
    for room in ("fastbert", "kernels", "benchmarks"):
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name, sound, worse in (EXTRA_LOAD, MASKED_FULL_BLOCKS, NO_PROMISE_OF_ALIGNMENT, EXTRA_LAUNCH):
        text = (tree / name).read_text()
        assert sound in text, name
        (tree / name).write_text(text.replace(sound, worse, 1))
    return run(tree, "gate.py")


@pinned
@pytest.mark.parametrize(
    ("what", "figure"),
    [
        (LAYER_NORM, "global_bits.128"),
        ("traffic of layer_norm", "loaded"),
        ("traffic of layer_norm", "over_minimum"),
        (ALIGNED, "per_unit.non_tensor"),
        (ODD, "global_bits.16"),
        ("launches of encoder layer inference short", "others"),
    ],
)
def test_each_planted_regression_fails_the_gate_by_its_own_figure(
    planted: subprocess.CompletedProcess[str], what: str, figure: str
) -> None:
    assert planted.returncode == 1, planted.stdout + planted.stderr
    line = rf"^worse     {re.escape(what)} +{re.escape(figure)} +[\d.]+ -> [\d.]+"
    assert re.search(line, planted.stdout, re.MULTILINE), planted.stdout


@pinned
def test_a_masked_full_block_also_exceeds_an_absolute_limit(planted: subprocess.CompletedProcess[str]) -> None:
    exceeded = planted.stdout.partition("limits exceeded\n")[2].partition("\n\n")[0]
    assert f"{ALIGNED} " in exceeded and "per_unit.non_tensor" in exceeded


def kernel(**figures: Any) -> dict[str, Any]:
    sound = {"registers": 64, "spills": 0, "stack": 0, "programs_per_multiprocessor": 8, "unit": 768}
    return sound | {"per_unit": {"all": 13.0}, "predicted": {"bound": "fma", "picoseconds_per_unit": 1.0}} | figures


def evidence_of(**figures: Any) -> dict[str, Any]:
    """Evidence as evidence.py collects it, about one kernel."""
    return {
        "triton": triton.__version__,
        "kernels": {"sm_90": {"toy: toy": kernel(**figures)}, "sm_80": {}, "gfx942": {}},
        "tiles": {"sm_90": {}, "sm_80": {}, "gfx942": {}},
        "traffic": {"toy": {"loaded": 100, "past_tokens": 0}},
        "launches": {"toy": {"kernels": 4}},
    }


@pytest.fixture
def verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What the gate says of evidence after evidence before; both about the toy."""

    def judge(after: dict[str, Any], before: dict[str, Any] | None = None) -> list[str]:
        path = tmp_path / "static.json"
        path.write_text(json.dumps(before or evidence_of()))
        monkeypatch.setattr(gate.evidence, "collect", lambda archs, only: after)
        return gate.static(Namespace(update=False, arch=None, only="", baseline=path))

    return judge


def test_equal_evidence_passes(verdict: Callable[..., list[str]]) -> None:
    assert verdict(evidence_of()) == []


def test_what_is_predicted_is_not_gated(verdict: Callable[..., list[str]]) -> None:
    assert verdict(evidence_of(predicted={"bound": "issue", "picoseconds_per_unit": 9.0})) == []


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"registers": 65}, "worse: registers of sm_90 toy: toy"),
        ({"registers": 63}, "changed: registers of sm_90 toy: toy"),
        ({"programs_per_multiprocessor": 7}, "worse: programs_per_multiprocessor of sm_90 toy: toy"),
        ({"programs_per_multiprocessor": 9}, "changed: programs_per_multiprocessor of sm_90 toy: toy"),
        ({"unit": 1024}, "changed: unit of sm_90 toy: toy"),
        ({"global_bits": {"32": 4}}, "worse: global_bits.32 of sm_90 toy: toy"),
        ({"per_unit": {}}, "changed: per_unit.all of sm_90 toy: toy"),
    ],
)
def test_every_difference_fails_and_says_which_way(
    verdict: Callable[..., list[str]], figures: dict[str, Any], reason: str
) -> None:
    assert verdict(evidence_of(**figures)) == [reason]


def test_counts_for_a_trip_are_not_judged_where_the_tile_is_another(verdict: Callable[..., list[str]]) -> None:
    halved = evidence_of(instructions=100, unit=384)
    assert verdict(halved, before=evidence_of(instructions=200)) == [
        "changed: instructions of sm_90 toy: toy",
        "changed: unit of sm_90 toy: toy",
    ]
    assert verdict(evidence_of(instructions=200, unit=384), before=evidence_of(instructions=100))[0].startswith(
        "changed"
    )
    assert verdict(evidence_of(instructions=200), before=evidence_of(instructions=100))[0].startswith("worse")


def test_a_gain_asks_to_take_it_over(verdict: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    verdict(evidence_of(registers=48))
    said = capsys.readouterr().out
    assert "make gate UPDATE=1" in said
    assert re.search(r"better    sm_90 toy: toy +registers +64 -> 48 +-25.0%", said)


def test_a_kernel_that_comes_or_goes_fails(verdict: Callable[..., list[str]]) -> None:
    more = evidence_of()
    more["kernels"]["sm_80"]["new: new"] = kernel()
    assert verdict(more) == ["changed: everything of sm_80 new: new"]
    assert verdict(evidence_of(), before=more) == ["changed: everything of sm_80 new: new"]


def test_limits_hold_even_where_the_baseline_agrees(verdict: Callable[..., list[str]]) -> None:
    spilled = evidence_of(spills=3)
    assert len(verdict(spilled, before=spilled)) == 1
    past = evidence_of()
    past["traffic"]["toy"]["past_tokens"] = 2
    assert "past_tokens" in verdict(past, before=past)[0]


def test_every_limit_is_on_a_figure_of_the_baseline() -> None:
    figures = gate.flatten(json.loads(gate.BASELINE.read_text()), gate.MAIN_ARCHS, "")
    names = {name for name, _ in figures}
    absent_means_zero = ("global_bits.", "matrix.")
    for limits in (gate.LIMITS, gate.NOT_YET):
        for name, bounds in limits.items():
            assert name in names
            wrong = [each for each in bounds if (name, each) not in figures and not each.startswith(absent_means_zero)]
            assert wrong == [], name
    assert gate.beyond(gate.LIMITS, figures) == []
    assert len(gate.beyond(gate.NOT_YET, figures)) == sum(map(len, gate.NOT_YET.values())), "one is met: move it"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "what is not JSON"),
        ("[]", "a JSON without ['kernels', 'launches', 'tiles', 'traffic', 'triton']"),
        ('{"triton": "3.7.1"}', "a JSON without ['kernels'"),
        (json.dumps(evidence_of(registers="64")), "'64'; expected a number"),
        (json.dumps(evidence_of() | {"triton": "2.0.0"}), "figures of Triton 2.0.0; expected those of Triton "),
        (json.dumps(evidence_of() | {"kernels": [1]}), "expected figures by name"),
        (None, "No such file or directory"),
    ],
)
def test_a_baseline_that_is_no_use_is_named_with_the_mend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: str | None, said: str
) -> None:
    path = tmp_path / "static.json"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(gate.evidence, "collect", lambda archs, only: evidence_of())
    monkeypatch.setattr(sys, "argv", ["gate.py", "--baseline", str(path)])
    assert gate.main() == 2
    error = capsys.readouterr().err
    assert said in error and "make gate UPDATE=1" in error


@pytest.mark.parametrize("installed", [True, False])
def test_update_writes_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    path = tmp_path / "static.json"
    path.write_text("spoilt")
    theirs: dict[str, Any] = {"versions": {"liger-kernel": "1"}, "kernels": {}}
    monkeypatch.setattr(gate.evidence, "collect", lambda archs, only: evidence_of())
    monkeypatch.setattr(gate.evidence, "compared", lambda archs: theirs)
    monkeypatch.setattr(gate.evidence.rivals, "installed", lambda: installed)
    monkeypatch.setattr(gate, "CHECKS", (gate.static,))
    monkeypatch.setattr(sys, "argv", ["gate.py", "--update", "--baseline", str(path)])
    assert gate.main() == 0
    assert path.read_text() == gate.evidence.dump(evidence_of() | ({"rivals": theirs} if installed else {}))
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(sys, "argv", ["gate.py", "--baseline", str(path)])
    assert gate.main() == 0


def test_update_keeps_the_figures_of_rivals_that_are_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "static.json"
    theirs = {"rivals": {"versions": {"liger-kernel": "1"}, "kernels": {}}}
    path.write_text(json.dumps(evidence_of(registers=70) | theirs))
    monkeypatch.setattr(gate.evidence, "collect", lambda archs, only: evidence_of())
    monkeypatch.setattr(gate.evidence.rivals, "installed", lambda: False)
    monkeypatch.setattr(gate, "CHECKS", (gate.static,))
    monkeypatch.setattr(sys, "argv", ["gate.py", "--update", "--baseline", str(path)])
    assert gate.main() == 0
    assert json.loads(path.read_text()) == evidence_of() | theirs


def test_update_of_a_part_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gate.py", "--update", "--only", "layer_norm"])
    with pytest.raises(SystemExit) as exit_:
        gate.main()
    assert exit_.value.code == 2
    assert "writes the whole baseline" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("only", "status", "said"),
    [
        ("launches", 2, "gate: --only: got 'launches'; expected what matches the name of a case"),
        ("toy", 0, ""),
        (gate.HOST, 0, ""),
        ("encoder forward, minilm", 0, ""),
    ],
)
def test_a_name_of_nothing_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, only: str, status: int, said: str
) -> None:
    """It passed once, because nothing was worse."""
    path = tmp_path / "static.json"
    path.write_text(json.dumps(evidence_of()))
    monkeypatch.setattr(gate.evidence, "collect", lambda archs, only: evidence_of())
    monkeypatch.setattr(gate, "CHECKS", (gate.static,))
    monkeypatch.setattr(sys, "argv", ["gate.py", "--baseline", str(path), "--only", only])
    assert gate.main() == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("only", "said"), [("", "it is empty"), ("(", "'(' is no regular expression")])
def test_what_names_nothing_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, only: str, said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["gate.py", "--only", only])
    monkeypatch.setattr(gate, "CHECKS", ())
    with pytest.raises(SystemExit) as exit_:
        gate.main()
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_reading_a_baseline_raises_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError) as caught:
        gate.read_baseline(tmp_path / "none.json")
    assert caught.value.argument == str(tmp_path / "none.json")


@pytest.mark.parametrize(("status", "reasons"), [(0, 0), (1, 1)])
def test_too_much_host_time_fails(monkeypatch: pytest.MonkeyPatch, status: int, reasons: int) -> None:
    ran: list[Any] = []

    def ended(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        ran.append(command[-1])
        assert "TRITON_INTERPRET" not in env
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(gate.subprocess, "run", ended)
    assert len(gate.host(Namespace(only=""))) == reasons
    assert gate.host(Namespace(only="layer_norm")) == [] and [Path(script).name for script in ran] == ["host_time.py"]
