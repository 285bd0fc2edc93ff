"""Every kernel compiled for every target without a GPU, and that the harness which does it would notice a bad one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from processes import PYTHON

from fastbert.kernels import attention, attention_backward, attention_choices, choices
from fastbert.kernels.target import KNOWN, pretend

ROOT = Path(__file__).resolve().parent.parent
STATIC = ROOT / "benchmarks" / "static"
ARCHS = [arch for arch, target in KNOWN.items() if target.backend != "interpreter"]


def run(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own, where Triton compiles unless `environment` says otherwise."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [*PYTHON, str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=clean | {"OMP_NUM_THREADS": "1"} | environment)


@pytest.fixture(scope="module")
def toys() -> dict[str, Any]:
    """What offline_toys.py found for one target of each vendor."""
    result = run(ROOT / "tests" / "offline_toys.py", "sm_90", "gfx942")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("spills", " spills"),
        ("spills", " bytes of stack a lane"),
        ("no dot", " instruction"),
        ("too much shared", " bytes of shared memory of "),
        ("idle", "launches nothing"),
        ("wrong", "no_such_name is not defined"),
    ],
)
def test_each_defect_is_reported(toys: dict[str, Any], arch: str, case: str, said: str) -> None:
    assert any(said in violation for violation in toys["violations"][arch][case]), toys["violations"][arch]


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_dispatch_starts_what_triton_would(toys: dict[str, Any], arch: str) -> None:
    found = toys["dispatched"][arch]
    assert found["first"] == found["again"] == found["triton"]
    assert len(set(found["triton"])) == {"sm_90": 20, "gfx942": 25}[arch], "all that tells arguments apart was tried"
    assert found["other"][0] not in found["triton"], "another constexpr is other code"


def test_hooks_of_a_profiler_are_told_of_every_launch(toys: dict[str, Any]) -> None:
    assert toys["watched"] == ["add_kernel"] * 4


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_sound_kernels_are_not_reported(toys: dict[str, Any], arch: str) -> None:
    assert toys["violations"][arch]["good"] == []
    assert toys["violations"][arch]["row-wise"] == []


def test_launches_are_recorded_as_the_launcher_made_them(toys: dict[str, Any]) -> None:
    aligned, odd, first, second = toys["launches"]
    assert aligned["kernel"] == "matmul_kernel"
    assert aligned["constexprs"] == {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
    assert (aligned["num_warps"], aligned["num_stages"]) == (4, 2)
    assert aligned["shared"] >= 64 * 32 * 2 * 2
    assert {"ttir", "ptx", "cubin"} <= set(aligned["stages"])
    assert aligned["key"] != odd["key"]  # a stride of 1001 can't be specialised as one of 1024 is
    assert first["key"] == second["key"]  # neither size is a multiple of 16: one compilation
    assert (first["grid"], second["grid"]) == ([3, 2, 1], [4, 1, 1])


def test_the_interpreter_is_refused() -> None:
    result = run(STATIC / "offline.py", "--arch", "sm_90", TRITON_INTERPRET="1")
    assert result.returncode == 1
    assert "BackendError: TRITON_INTERPRET: got 1; expected a process without it" in result.stderr


def test_an_unknown_target_is_refused() -> None:
    result = run(STATIC / "offline.py", "--arch", "sm_12")
    assert result.returncode == 2
    assert "'sm_12'" in result.stderr and "gfx1100" in result.stderr


@pytest.mark.long
def test_an_option_that_is_off_leaves_no_trace_in_the_machine_code() -> None:
    result = run(ROOT / "tests" / "options_off.py", "sm_80", "sm_90")
    assert result.returncode == 0, result.stderr
    for arch, differences in json.loads(result.stdout).items():
        assert differences.pop("costly") != [], "the comparison sees nothing"
        assert len(differences) == 5
        assert all(lines == [] for lines in differences.values()), (arch, differences)


def load_cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("static_cases", STATIC / "cases.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


class Unlaunched:
    """In the place of a kernel. It keeps no argument alive, for cases have gigabytes that nothing touches."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: None


def test_the_exhaustive_cases_reach_every_tile_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    reached: set[int] = set()

    def remember(choose: Any) -> Any:
        def choice(*args: Any, **options: Any) -> Any:
            made = choose(*args, **options)
            reached.add(id(made))
            return made

        return choice

    monkeypatch.setattr(choices, "TUNED", {})
    backward_parts = [f"attention_backward_{part}" for part in ("query", "key", "bias", "relative")]
    for module, names in ((attention, ["attention_forward"]), (attention_backward, backward_parts)):
        for name in names:
            monkeypatch.setattr(attention_choices, name, remember(getattr(attention_choices, name)))
            monkeypatch.setattr(module, f"{name}_kernel", Unlaunched())
    for arch in ARCHS:
        with pretend(KNOWN[arch]):
            for case in load_cases().exhaustive(KNOWN[arch]):
                if case.name.startswith("attention"):
                    case.run()
    for key, regimes in attention_choices.ATTENTION_FORWARD.items():
        assert {name for name, choice in regimes.items() if id(choice) not in reached} == set(), key
    backward: list[dict[Any, Any]] = [
        attention_choices.ATTENTION_BACKWARD_QUERY,
        attention_choices.ATTENTION_BACKWARD_QUERY_EXTRAS,
        attention_choices.ATTENTION_BACKWARD_KEY,
        attention_choices.ATTENTION_BACKWARD_KEY_EXTRAS,
        attention_choices.ATTENTION_BACKWARD_ONE_PASS,
        attention_choices.ATTENTION_BACKWARD_BIAS,
    ]
    for table in backward:
        assert {key for key, choice in table.items() if choice is not None and id(choice) not in reached} == set()


def complaints(result: subprocess.CompletedProcess[str]) -> list[str]:
    """What offline.py said of kernels that are not sound, and what it said on stderr if it failed."""
    kernels = [line for line in result.stdout.splitlines() if " registers " in line]
    crash = result.stderr.splitlines() if result.returncode else []
    return [line for line in kernels if not line.endswith(" ok")] + crash


@pytest.mark.long
def test_the_main_shapes_compile_for_every_target_without_a_violation() -> None:
    result = run(STATIC / "offline.py")
    assert (result.returncode, complaints(result)) == (0, [])
    assert [arch for arch in ARCHS if f"\n{arch}: " in result.stdout] == ARCHS


@pytest.mark.static
def test_every_launch_choice_compiles_for_every_target_without_a_violation() -> None:
    result = run(STATIC / "offline.py", "--exhaustive")
    assert (result.returncode, complaints(result)) == (0, [])
