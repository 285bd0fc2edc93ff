"""The static evidence counts what it says: machine code, traffic, launches and wasted tiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from processes import PYTHON

import fastbert
from fastbert.kernels.target import KNOWN, interpreted

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks" / "static"))
import launches
import machine_code
import main_loop
import rivals
import tiles
import traffic
from recorder import recorded

STATIC = Path(tiles.__file__).parent
ROOT = STATIC.parent.parent

needs_interpreter = pytest.mark.skipif(not interpreted(), reason="kernels are compiled here, not interpreted")

# A loop that waits on a barrier, one over full blocks, one over the masked rest, padding. The encodings are left out.
SASS_LINES = """
 S2R R0, SR_CTAID.X
 SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2
 NANOSLEEP 0x20
 IADD3 R3, R3, 0x1, RZ
 IADD3 R3, R3, 0x1, RZ
 IADD3 R3, R3, 0x1, RZ
 @!P1 BRA 0x10
 LDG.E.128 R4, desc[UR6][R2.64]
 @!PT LDS RZ, [RZ]
 LDGSTS.E.BYPASS.128 [R9], desc[UR6][R2.64], P5
 LDG.E R8, desc[UR6][R2.64+0x10]
 LDG.E.U16 R8, desc[UR6][R2.64+0x20]
 HMMA.16816.F32 R4, R8, R10, RZ
 FFMA.FTZ R4, R4, R5, R6
 MUFU.EX2 R4, R4
 IMAD.MOV.U32 R7, RZ, RZ, R4
 UIADD3 UR4, UR4, 0x1, URZ
 @P0 BRA 0x70
 HMMA.16816.F32 R4, R8, R10, RZ
 FSEL R4, R4, -INF , P2
 FSEL R5, R5, -INF , P2
 FFMA.FTZ R4, R4, R5, R6
 FFMA.FTZ R4, R4, R5, R6
 FFMA.FTZ R4, R4, R5, R6
 FFMA.FTZ R4, R4, R5, R6
 FFMA.FTZ R4, R4, R5, R6
 FFMA.FTZ R4, R4, R5, R6
 FFMA.FTZ R4, R4, R5, R6
 FFMA.FTZ R4, R4, R5, R6
 FFMA.FTZ R4, R4, R5, R6
 FFMA.FTZ R4, R4, R5, R6
 @!P0 BRA 0x120
 STL [R1], R4
 STG.E.64 desc[UR6][R2.64], R4
 EXIT
 BRA 0x230
 NOP
"""
SASS = "  REG:40 STACK:8 SHARED:0\n" + "\n".join(
    f"        /*{16 * i:04x}*/       {line.strip()} ;       /* 0x000 */\n       /* 0x000 */"
    for i, line in enumerate(SASS_LINES.strip().splitlines())
)

AMDGCN = """
toy:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; %loop
\tbuffer_load_dwordx4 v[0:3], v9, s[0:3], 0 offen
\tbuffer_load_ushort v4, v9, s[0:3], 0 offen
\ts_waitcnt vmcnt(0)
\tv_mfma_f32_32x32x8_f16 v[0:15], v[16:17], v[18:19], 0
\tv_exp_f32_e32 v4, v4
\tv_pk_mul_f32 v[4:5], v[4:5], v[6:7]
\tds_read_b128 v[0:3], v9
\tds_bpermute_b32 v4, v5, v6
\tv_cvt_f16_f32_e32 v4, v4
\tv_mul_lo_u32 v4, v4, v5
\tv_fma_mix_f32 v4, v4, v5, v6
\tv_perm_b32 v4, v5, v6, v7
\ts_add_i32 s4, s4, 1
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 2
    .vgpr_count:     100
    .vgpr_spill_count: 0
"""


def test_the_main_loop_is_the_one_over_full_blocks() -> None:
    code = machine_code.read_sass(SASS).code
    assert [(code[loop[0]].name, len(loop)) for loop in main_loop.loops(code)] == [
        ("LDG.E.128", 11),  # not the wait on the barrier, and not the padding that branches to itself
        ("HMMA.16816.F32", 14),
    ]
    assert main_loop.main_loop(code) == range(7, 18)  # of two with equal matrix work the one that masks nothing


def test_a_kernel_without_a_loop_counts_whole() -> None:
    code = machine_code.read_sass(SASS.replace("BRA", "BRX")).code
    assert main_loop.main_loop(code) == range(len(code))


def test_figures_of_sass() -> None:
    facts = machine_code.read_sass(SASS)
    found = main_loop.figures(facts, KNOWN["sm_80"], warps=4, shared=0, unit=64)
    assert (found["registers"], found["spills"], found["stack"]) == (40, 1, 8)
    assert found["instructions"] == 10  # one of 11 is switched off
    per_lane = 32 * 4 / 64
    assert found["per_unit"] == {
        "global": 4 * per_lane,
        "tensor": per_lane,
        "fp32": per_lane,
        "mufu": per_lane,
        "imad": per_lane,
        "uniform": per_lane,
        "control": per_lane,
        "all": 10 * per_lane,
        "math": 2 * per_lane,
        "non_tensor": 9 * per_lane,
        "matrix_flops": 16 * 8 * 16 * 2 * 4 / 64,
    }
    assert found["matrix"] == {"HMMA": 1}
    assert found["global_bits"] == {"128": 2, "32": 1, "16": 1}
    assert found["global_bits_everywhere"] == {"128": 2, "32": 1, "16": 1, "64": 1}
    # Memory instructions bound it: (4 + 4 + 1 + 1) words, 4 cycles each, of 108 multiprocessors at 1.41 GHz.
    expected = 40 / 64 / (108 * 1.41) * 1000
    assert found["predicted"] == {"bound": "memory", "picoseconds_per_unit": pytest.approx(expected, abs=1e-4)}


def test_figures_of_amdgcn() -> None:
    facts = machine_code.read_amdgcn(AMDGCN)
    found = main_loop.figures(facts, KNOWN["gfx942"], warps=1, shared=1024, unit=64)
    pipes = {name: count for name, count in found["per_unit"].items() if name not in ("all", "math", "non_tensor")}
    assert pipes == {
        "global": 2, "sync": 1, "tensor": 1, "mufu": 1, "fp32": 1, "shared": 1, "shfl": 1, "cvt": 1, "imad": 1,
        "fp16": 1, "alu": 1, "uniform": 1, "control": 1, "matrix_flops": 32 * 32 * 8 * 2 / 64,
    }  # fmt: skip
    assert (found["per_unit"]["all"], found["per_unit"]["math"], found["per_unit"]["non_tensor"]) == (14, 5, 13)
    assert (found["registers"], found["scalar_spills"], found["has_loop"]) == (100, 2, 1)
    assert found["global_bits"] == {"128": 1, "16": 1}
    assert found["programs_per_multiprocessor"] == 4 * 4  # 512 // 104 waves on each of 4 SIMDs
    assert "predicted" not in found


@pytest.mark.parametrize(
    ("arch", "registers", "warps", "shared", "programs"),
    [
        ("sm_80", 32, 4, 0, 16),  # 64 warps
        ("sm_80", 128, 8, 0, 2),
        ("sm_80", 166, 8, 0, 1),  # 3 warps on each scheduler
        ("sm_80", 32, 4, 80 * 1024, 2),  # 164 KiB, one of them for each program
        ("sm_90", 32, 4, 80 * 1024, 2),
        ("sm_90", 216, 1, 0, 8),  # 2 warps on each scheduler, where registers of the whole would hold 9
        ("sm_90", 24, 1, 0, 32),
        ("sm_86", 32, 8, 0, 6),
        ("gfx942", 164, 4, 16384, 3),
        ("gfx942", 56, 1, 0, 32),
        ("gfx1100", 96, 8, 0, 4),
    ],
)
def test_programs_on_a_multiprocessor(arch: str, registers: int, warps: int, shared: int, programs: int) -> None:
    facts = machine_code.Facts(registers, 0, 0, 0, ())
    assert main_loop.programs_per_multiprocessor(facts, warps, shared, KNOWN[arch]) == programs


@triton.jit
def touch_kernel(x_ptr, out_ptr, size, shift, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index + shift, mask=index < size, other=0.0)
    again = tl.load(x_ptr + index + shift, mask=index < size, other=0.0)
    tl.store(out_ptr + index, x + again, mask=index < size)


def touched(size: int, shift: int, x: torch.Tensor) -> traffic.Case:
    run = partial(touch_kernel[(1,)], x, torch.empty(20, dtype=torch.float16), size, shift, BLOCK=32)
    return traffic.Case("toy", run, tokens=20, rows=29, minimum=80)


@needs_interpreter
def test_traffic_counts_active_lanes_and_each_address_once() -> None:
    found = traffic.figures(touched(20, 0, torch.zeros(29, dtype=torch.float16)))
    assert found == {
        "loaded": 80,
        "loaded_once": 40,
        "stored": 40,
        "stored_once": 40,
        "launches": 1,
        "minimum": 80,
        "sums": 0,
        "over_minimum": 1.0,
        "past_tokens": 0,
    }


@pytest.mark.long
@needs_interpreter
def test_layer_norm_and_gelu_move_the_least_bytes_and_their_sums() -> None:
    for case in traffic.calls():
        if case.name.startswith(("layer_norm", "bias_gelu")):
            found = traffic.figures(case)
            assert found["loaded_once"] + found["stored_once"] - found["sums"] == found["minimum"], case.name


@needs_interpreter
@pytest.mark.parametrize("rows", [29, 20])
def test_what_lies_past_the_tokens_is_seen(rows: int) -> None:
    x = torch.zeros(40, dtype=torch.float16)[:rows]  # slack inside of the tensor, and memory behind it
    assert traffic.figures(touched(20, 3, x))["past_tokens"] == 2 * 3 * 2  # two loads of 3 halves


@needs_interpreter
def test_slack_is_told_by_rows_wherever_they_stand() -> None:
    x = torch.zeros(2, 29)
    first = x.data_ptr()
    launch = traffic.Launch("toy", [x])
    launch.loads.append((first + 4 * torch.tensor([0, 19, 20, 28, 29, 48, 49, 57, 58]).numpy(), 4))
    assert traffic.past_tokens(launch, tokens=20, rows=29) == 4 * (2 + 2 + 1)


@needs_interpreter
def test_no_op_touches_what_lies_past_the_tokens() -> None:
    for case in traffic.calls():
        if case.name in ("attention short", "attention backward short", "bias_gelu", "linear_gelu +product"):
            assert traffic.figures(case)["past_tokens"] == 0, case.name


@needs_interpreter
def test_recording_ends_with_its_block() -> None:
    with recorded() as seen:
        touched(20, 0, torch.zeros(29, dtype=torch.float16)).run()
    touched(20, 0, torch.zeros(29, dtype=torch.float16)).run()
    assert [launch.kernel for launch in seen] == ["touch_kernel"]


@needs_interpreter
def test_launches_of_a_layer() -> None:
    found = launches.layer(0.0, (5, 7))
    assert found["inference"] == {
        "kernels": 4,
        "matrix_products": 4,
        "others": 0,
        "names": {
            "addmm": 1,
            "mm": 3,
            "attention_forward_kernel": 1,
            "bias_gelu_forward_kernel": 1,
            "layer_norm_forward_kernel": 2,
        },
    }
    assert (found["backward"]["kernels"], found["backward"]["matrix_products"]) == (4, 8)
    assert found["backward"]["names"]["sum"] == 4  # three of them in our launchers, inside of custom ops
    assert launches.layer(0.0, (5, 200))["backward"]["kernels"] == 5  # keys and queries apart


@needs_interpreter
def test_a_batch_of_encode_is_one_copy_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launches.batch_of_encode()
    assert (found["copies"], found["waits"]) == (1, 0)
    assert (found["kernels"], found["matrix_products"], found["others"]) == (7, 4, 2), found["names"]
    figures = [found[name] for name in ("copies", "waits", "kernels", "matrix_products", "others")]
    row = " | ".join(["| of a batch, with one layer", *map(str, figures)])
    assert row in (ROOT / "docs/graphs.md").read_text(encoding="utf-8")

    forward = fastbert.BertModel.forward

    def waiting(model: fastbert.BertModel, input_ids: torch.Tensor, **options: Any) -> Any:
        assert input_ids.max().item() == 0
        return forward(model, input_ids, **options)

    monkeypatch.setattr(fastbert.BertModel, "forward", waiting)
    assert launches.batch_of_encode()["waits"] == 1


@needs_interpreter
def test_torchs_own_launches_count_where_they_compute() -> None:
    x = torch.ones(4, 4)
    with launches.counted() as counts:
        y = x.view(2, 8).t()
        y = torch.empty_like(y).copy_(y)
        y[2:2].zero_()
        y @ y.t()
    assert counts == {"copy_": 1, "mm": 1}


def test_wasted_scores_are_those_of_the_tiles() -> None:
    lengths = (100, 0, 5, 64)
    found = tiles.figures(lengths, own=64, other=32)
    computed = (2 * 64) * (4 * 32) + 64 * 32 + 64 * 64
    needed = 100**2 + 5**2 + 64**2
    assert found == {
        "tiles_run": computed // (64 * 32),
        "tiles_needed": -(-needed // (64 * 32)),
        "scores_over_needed": round(computed / needed, 4),
        "padded_over_needed": round(4 * 100**2 / needed, 4),
        "spare_programs": 169 // 64 + 4 - 4,
    }


def test_equal_full_lengths_waste_nothing() -> None:
    assert tiles.figures((128, 128), own=64, other=32)["scores_over_needed"] == 1.0


def in_a_process(script: str) -> Any:
    """What a script prints as JSON, where Triton compiles; `rivals` is imported."""
    clean: dict[str, Any] = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = f"import sys; sys.path.append({str(STATIC)!r}); import json, unittest.mock, rivals\n{script}"
    done = subprocess.run([*PYTHON, "-c", script], capture_output=True, text=True, check=True, env=clean)
    return json.loads(done.stdout)


@pytest.mark.long
def test_rivals_that_are_not_installed_are_left_out() -> None:
    versions, names, rows = in_a_process("""
def missing(package):
    raise rivals.importlib.metadata.PackageNotFoundError(package)
rivals.FLASH_ATTN = "nowhere"
with unittest.mock.patch("importlib.metadata.version", missing):
    found = rivals.compare("sm_90", lambda launch: 64)
    print(json.dumps([rivals.versions(), sorted(found["kernels"]), sorted(found["rows"])]))
""")
    assert versions == {}
    assert names and all(name.startswith("fastbert: ") for name in names)
    assert rows == sorted(rivals.minimums())


@pytest.mark.skipif(not torch.__version__.startswith(rivals.INDUCTOR_TORCH), reason="another PyTorch's inductor")
def test_what_inductor_writes_is_counted() -> None:
    kernels, bytes_, figures = in_a_process("""
from inductor import Compiled
from fastbert.kernels.target import KNOWN
def activated(x, bias):
    return rivals.F.gelu(x + bias)
compiled = Compiled(activated, [(100, 256), (256,)], KNOWN["sm_90"])
found = []
with rivals.offline(KNOWN["sm_90"]) as launches:
    compiled.forward()
    found.append(sorted({launch.kernel for launch in launches}))
    found.append(compiled.bytes)
    one = launches[0]
    found.append(rivals.main_loop.of_launch(one, KNOWN["sm_90"], one.constexprs["XBLOCK"]))
    compiled.backward()
print(json.dumps(found))
""")
    assert kernels == ["triton_poi_fused_add_gelu_0"]
    assert bytes_ == (2 * 100 * 256 + 256) * 2  # x, bias and the result, once each
    assert figures["per_unit"]["all"] > 28  # the library's erf alone


def test_a_verdict_names_what_is_lower_and_gives_a_reason_for_the_rest() -> None:
    row, other = "layer_norm backward 768", "bias_gelu 3072"
    rows: dict[str, Any] = {
        row: {"fastbert": {"instructions": 10.0}, "liger-kernel": {"instructions": 20.0, "bytes": 200}},
        other: {"fastbert": {"instructions": 10.0}, "anyone": {"instructions": 10.0, "bytes": 6}},
    }
    found = rivals.table_of(rows, {row: 300, other: 5})
    assert found[row]["liger-kernel"]["lower"] == "instructions"
    assert found[row]["liger-kernel"]["reason"] == rivals.REASONS[row, "liger-kernel"]
    assert found[other]["anyone"]["lower"] == "bytes", "equal is not lower"
    assert found[other]["anyone"]["reason"] == "not explained"
    assert found[other]["fastbert"] == {"bytes": 5, "minimum": rivals.minimums()[other], "instructions": 10.0}
    found = rivals.table_of({row: rows[row]}, {row: 100})
    assert "reason" not in found[row]["liger-kernel"]


def test_every_row_of_the_baseline_is_lower_or_says_why_not() -> None:
    baseline = json.loads((STATIC.parent / "baselines" / "static.json").read_text())
    for arch, by_row in baseline["rivals"].get("rows", {}).items():
        for row, by_whose in by_row.items():
            for whose, figures in by_whose.items():
                assert figures.get("reason") != "not explained", (arch, row, whose)


@needs_interpreter
def test_bytes_of_a_call_are_its_kernels_and_torchs_own() -> None:
    x = torch.zeros(29, dtype=torch.float16)
    with recorded() as seen, rivals.TorchBytes() as others:
        touched(20, 0, x).run()
        x.view(1, 29).sum(0)
    assert others.bytes == 2 * 29 * 2, "torch reads 29 halves and writes 29; allocations and views are free"
    assert sum(traffic.bytes_once(launch.loads) for launch in seen) == 40
