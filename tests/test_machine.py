"""What a CPU has, and the lanes that take some of it away."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import PYTHON

from fastbert import backend, quantize
from fastbert.cpu import machine as native_machine
from fastbert.cpu.machine import LANES, Machine
from fastbert.errors import ArgumentError, BackendError

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).resolve().parents[1]

# What torch, oneDNN, our kernels and the code that LLVM makes of one have in a process.
FOUND = """
import sys
import torch
from fastbert import backend
from fastbert.cpu.machine import Machine, host

print("torch", torch.backends.cpu.get_cpu_capability())
print("oneDNN bfloat16", backend.onednn_multiplies_bfloat16())
layer = torch.ops.mkldnn._linear_pointwise(torch.ones(2, 64), torch.ones(64, 64), None, "none", [], "")
machine = host()
if isinstance(machine, Machine):
    from fastbert.cpu import instructions as sets
    int8 = [name for name, one in vars(sets).items() if machine.int8 is not None and one is machine.int8]
    print("kernels", machine.vectors.lanes, machine.bfloat16 is not None, *int8)
    import llvmlite.binding as llvm
    make, made = llvm.create_mcjit_compiler, []
    def kept(module, target):
        made.append(target.emit_assembly(module))
        return make(module, target)
    llvm.create_mcjit_compiler = kept
    from fastbert.cpu.layout import in_blocks
    from fastbert.cpu.linear import linear
    from fastbert.cpu.row_wise import row_wise
    x, out = torch.ones(20, 64), torch.empty(20, 64)
    row_wise(machine, x, activation="gelu", norm=(torch.ones(64), torch.ones(64), 1e-5), out=out).run()
    weight = in_blocks(x, machine.vectors.columns)
    linear(machine, x, weight, torch.ones(20), torch.empty(20, 20), activation="silu").run()
    assert len(made) >= 2
    names = "xmm", "ymm", "zmm", "k1", "ymm16"
    print("vectors", *(name for name in names if any(f"%{name}" in code for code in made)))
else:
    print("no kernels,", machine)
"""


def lane_of(cpu: str) -> dict[str, str]:
    """The environment of `make test CPU=...`; skips where this CPU has less."""
    said = subprocess.run(["make", "-n", "test", f"CPU={cpu}"], cwd=ROOT, capture_output=True, text=True, check=True)
    words = shlex.split(next(line for line in said.stdout.splitlines() if "pytest" in line))
    lane = dict(word.split("=", 1) for word in words if "=" in word and not word.startswith("-"))
    bare = {name: value for name, value in os.environ.items() if name not in lane and name != "FASTBERT_AMX"}
    done = subprocess.run(
        [*PYTHON, "-c", "from fastbert.cpu.machine import host; host()"],
        env=bare | {"FASTBERT_CPU": cpu},
        capture_output=True,
        text=True,
    )
    if "it lacks" in done.stderr:
        pytest.skip(
            f"CPU={cpu} takes away what this CPU has not: {done.stderr.splitlines()[-1]}; a CPU with it runs this"
        )
    return bare | lane | {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("avx512", ["torch AVX512", "isa:Intel AVX-512", "kernels 16 False AVX512_INT8", "zmm"]),
        (
            "avx2",
            ["torch AVX2", "oneDNN bfloat16 False", "isa:Intel AVX2", "kernels 8 False AVX2_INT8", "vectors xmm ymm\n"],
        ),
        (
            "none",
            ["torch DEFAULT", "oneDNN bfloat16 False", "isa:Intel SSE4.1", "no kernels, FASTBERT_CPU=none is set"],
        ),
    ],
)
def test_a_lane_is_what_every_library_has(cpu: str, expected: list[str]) -> None:
    done = subprocess.run(
        [*PYTHON, "-c", FOUND], env=lane_of(cpu) | {"ONEDNN_VERBOSE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for one in expected:
        assert one in done.stdout
    assert "VNNI" not in done.stdout and "bfloat16 support" not in done.stdout


def test_make_knows_its_lanes() -> None:
    done = subprocess.run(["make", "-n", "test", "CPU=sse9"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "CPU=sse9: expected avx512, avx2 or none" in done.stderr
    assert set(LANES) - {"neon"} == {"avx512", "avx2", "none"}  # an ARM64 has nothing that could be taken away


@pytest.fixture
def features(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Those of the CPU at hand, to be changed."""
    llvm = pytest.importorskip("llvmlite.binding", reason="it says what a CPU has: Linux on x86-64")
    if not isinstance(native_machine.host.__wrapped__(), Machine):
        pytest.skip(f"{native_machine.host()}: a CPU with kernels of ours runs this, or another lane")
    found = llvm.get_host_cpu_features()
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: found)
    monkeypatch.delenv("FASTBERT_CPU", raising=False)
    monkeypatch.delenv("FASTBERT_AMX", raising=False)
    return found  # type: ignore[no-any-return]


def test_a_lane_takes_away_and_never_adds(features: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in features:
        if name.startswith("avx512"):
            features[name] = False
    monkeypatch.setenv("FASTBERT_CPU", "avx512")
    with pytest.raises(
        BackendError, match=r"FASTBERT_CPU: got avx512; expected what this CPU has: it lacks avx512bw, "
    ):
        native_machine.host.__wrapped__()
    monkeypatch.setenv("FASTBERT_CPU", "avx2")
    machine = native_machine.host.__wrapped__()
    assert machine.vectors.lanes == 8 and "+avx512" not in machine.features and "+avx2" in machine.features
    monkeypatch.setenv("FASTBERT_CPU", "fast")
    with pytest.raises(ArgumentError, match="FASTBERT_CPU: got 'fast'; expected avx512, avx2, neon, none"):
        native_machine.host.__wrapped__()


def test_neon_is_no_part_of_this_cpu(features: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBERT_CPU", "neon")
    with pytest.raises(BackendError, match=r"FASTBERT_CPU: got neon; expected what this CPU has: it lacks neon"):
        native_machine.host.__wrapped__()


@pytest.fixture(params=[("Linux", "aarch64"), ("Darwin", "arm64")], ids=" ".join)
def arm64(
    request: pytest.FixtureRequest, features: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> dict[str, bool]:
    """What a CPU of ARM64 has, to be changed; the process takes this one for such a CPU."""
    system, name = request.param
    library = native_machine.openmp()
    monkeypatch.setattr(native_machine, "openmp", lambda: library)
    monkeypatch.setattr(native_machine.platform, "system", lambda: system)
    monkeypatch.setattr(native_machine.platform, "machine", lambda: name)
    has = dict.fromkeys(native_machine.ARM64, True)
    monkeypatch.setattr(native_machine, "arm64_features", lambda: has)
    features.clear()
    return has


def test_arm64_takes_torch_until_it_is_asked_for(arm64: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """And then what it has, the best of each kind."""
    sets = pytest.importorskip("fastbert.cpu.instructions", reason="llvmlite, which compiles kernels")
    reason = native_machine.host.__wrapped__()
    assert "never on such a CPU; FASTBERT_CPU=neon takes them" in reason
    monkeypatch.setenv("FASTBERT_CPU", "neon")
    for lost, expected in (
        (set(), (sets.NEON, sets.NEON_BF16, sets.NEON_I8MM)),
        ({"i8mm", "bf16"}, (sets.NEON, None, sets.NEON_DOTPROD)),
        ({"i8mm", "bf16", "dotprod"}, (sets.NEON, None, None)),
    ):
        arm64.update({name: name not in lost for name in arm64})
        machine = native_machine.host.__wrapped__()
        assert (machine.vectors, machine.bfloat16, machine.int8) == expected
        assert all(f"-{name}" in machine.features for name in lost | {"sve"})
    monkeypatch.setenv("FASTBERT_CPU", "avx2")
    with pytest.raises(BackendError, match=r"FASTBERT_CPU: got avx2; .* it lacks avx, avx2"):
        native_machine.host.__wrapped__()


def test_a_system_without_kernels_says_so(features: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_machine.platform, "system", lambda: "Windows")
    assert native_machine.host.__wrapped__().startswith("Windows on ")


def test_kernels_are_compiled_for_a_cpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_neon.py, which is long, runs them."""
    sets = pytest.importorskip("fastbert.cpu.instructions", reason="llvmlite, which compiles kernels")
    from fastbert.cpu import program
    from fastbert.cpu.int8 import Int8Matrix, Int8Rows
    from fastbert.cpu.layout import in_blocks
    from fastbert.cpu.linear import linear
    from fastbert.cpu.linear_int8 import linear_int8

    objects = []

    def loaded(machine: Machine, *kernel: Any) -> tuple[int, None]:
        objects.append(program.object_code(machine, "aarch64-linux-gnu", *kernel))
        return 0, None

    monkeypatch.setattr(program, "_loaded", loaded)
    machine = Machine("generic", "+bf16,+i8mm", sets.NEON, sets.NEON_BF16, sets.NEON_I8MM)
    x = torch.ones(20, 64, dtype=torch.bfloat16)
    linear(machine, x, in_blocks(x, machine.vectors.columns), torch.ones(20).bfloat16(), torch.empty(20, 20).bfloat16())
    linear_int8(machine, Int8Rows.empty(20, 64), Int8Matrix.of(x), torch.ones(20), out=torch.empty(20, 20))
    assert len(objects) == 3  # the product of few rows and what follows it are two
    elf_of_arm64 = 183
    assert all(one[:4] == b"\x7fELF" and one[18] == elf_of_arm64 for one in objects)


def test_sums_of_a_tile_fit_the_registers() -> None:
    """Beside them are two vectors of weights and a number of x in each lane of a third."""
    sets = pytest.importorskip("fastbert.cpu.instructions", reason="llvmlite, which compiles kernels")
    for vectors in sets.VECTORS:
        columns = vectors.columns // vectors.lanes
        assert vectors.rows * columns + columns + 1 <= vectors.registers
    linear_int8 = importlib.import_module("fastbert.cpu.linear_int8")
    for int8 in sets.INT8:
        vectors = next(vectors for vectors in sets.VECTORS if vectors.needs <= int8.needs)
        assert 2 * int8.rows + 2 + 1 <= vectors.registers
        assert linear_int8.TASK_ROWS % int8.rows == 0


def test_each_cpu_multiplies_int8_in_the_best_way_it_has(
    features: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = pytest.importorskip("fastbert.cpu.instructions", reason="llvmlite, which compiles kernels")
    avx512 = ("avx512f", "avx512bw", "avx512dq", "avx512vl")
    for named, vectors, int8 in (
        ((*avx512, "avx512vnni", "avxvnni"), sets.AVX512, sets.AVX512_VNNI),
        (avx512, sets.AVX512, sets.AVX512_INT8),
        (("avxvnni",), sets.AVX2, sets.AVX_VNNI),
        ((), sets.AVX2, sets.AVX2_INT8),
    ):
        features.update({name: name in named for name in features if name.startswith("avx512")})
        features.update({"avxvnni": "avxvnni" in named, "avx2": True, "fma": True})
        machine = native_machine.host.__wrapped__()
        assert machine.vectors is vectors and machine.int8 is int8
    features["avxvnni"] = True
    monkeypatch.setenv("FASTBERT_CPU", "avx2")
    assert native_machine.host.__wrapped__().int8 is sets.AVX2_INT8


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_what_no_instruction_serves_is_said(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels and without; a GPU is another matter."""
    sets = pytest.importorskip("fastbert.cpu.instructions", reason="llvmlite, which compiles kernels")
    asked = backend.bfloat16_unserved if dtype == "bf16" else backend.int8_unserved
    cpu = torch.device("cpu")
    for served in (True, False):
        machine = Machine("a 486", "", sets.AVX2, *((sets.AVX512_BF16, sets.AVX512_VNNI) if served else ()))
        monkeypatch.setattr(backend, "host", lambda machine=machine: machine)
        said = asked(cpu)
        assert (said is None) == served and (served or "a 486 has no instructions for" in said)
        monkeypatch.setattr(backend, "host", lambda: "a CPU of sand")
        monkeypatch.setattr(backend, "onednn_multiplies_bfloat16", lambda served=served: served)
        assert (asked(cpu) is None) == (served and dtype == "bf16")
    assert asked(torch.device("cuda")) is None


def test_int8_that_is_slower_than_float32_warns(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    from tiny_bert import random_model

    model = random_model(generator)
    sets = pytest.importorskip("fastbert.cpu.instructions", reason="llvmlite, which compiles kernels")
    machine = Machine("a 486", "", sets.AVX2)
    monkeypatch.setattr(backend, "host", lambda: machine)
    with pytest.warns(UserWarning, match=r"int8 is slower than float32 here: a 486 has no instructions for int8"):
        quantize(model, dtype="int8")
    machine = replace(machine, int8=sets.AVX2_INT8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(model, dtype="int8")
