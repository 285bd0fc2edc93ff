"""The kernels of a CPU against float64, and the encoder that is laid out for them."""

import copy
import math
import re
import time
from dataclasses import replace
from types import SimpleNamespace

import llvmlite.binding as llvm
import pytest
import torch
import torch.nn.functional as F
from emulated import WIDE
from tiny_bert import random_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert import backend, quantize, reference
from fastbert.cpu import attention as native_attention
from fastbert.cpu import attention_backward as native_attention_backward
from fastbert.cpu import embedding as native_embedding
from fastbert.cpu import layout as native_layout
from fastbert.cpu import linear as native_linear
from fastbert.cpu import linear_int8 as native_linear_int8
from fastbert.cpu import pooling as native_pooling
from fastbert.cpu import row_wise_backward as native_backward
from fastbert.cpu import weight_gradient as native_weight_gradient
from fastbert.cpu.instructions import AVX2, AVX2_INT8, AVX512, AVX512_INT8, AVX512_VNNI, AVX_VNNI, INT8
from fastbert.cpu.int8 import COLUMNS, PAIR, Int8Matrix, Int8Rows, pair_sums
from fastbert.cpu.machine import Machine, host
from fastbert.cpu.program import Program
from fastbert.cpu.row_wise import row_wise
from fastbert.errors import ArgumentError
from fastbert.kernels.dropout import drop_scale
from fastbert.ops import linear as ops_linear
from fastbert.ops.attention import attention
from fastbert.ops.attention_torch import WIDEST_HEAD
from fastbert.ops.bias_gelu import bias_gelu
from fastbert.ops.dropout import drop
from fastbert.ops.fastest import FEW
from fastbert.ops.int8 import linear_int8, quantize_rows_int8
from fastbert.ops.layer_norm import layer_norm
from fastbert.ops.rotary import angles_of_places
from fastbert.packing import Packing
from fastbert.reference import Dropout
from fastbert.run import cpu
from fastbert.testing import assert_close

pytestmark = pytest.mark.cpu

HOST = host()
if not isinstance(HOST, Machine):
    pytest.skip(f"{HOST}: Linux on x86-64 with AVX2 runs this", allow_module_level=True)

# Without AVX-512 the vectors are half as wide, and there are half as many.
NARROW = Machine("x86-64-v3", "", AVX2, int8=AVX2_INT8)
MACHINES = [pytest.param(HOST, id="host"), pytest.param(NARROW, id="AVX2")]
# A machine of each width of vectors, and the dtypes that it multiplies, emulated where this CPU doesn't.
EVERY_FORM = [
    pytest.param(HOST, torch.float32, id="host"),
    pytest.param(NARROW, torch.float32, id="AVX2"),
    pytest.param(WIDE, torch.float32, id="wide"),
    pytest.param(HOST if HOST.bfloat16 else WIDE, torch.bfloat16, id="bfloat16"),
]
DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    None: lambda x: x,
}


def served(machine, dtype):
    if dtype not in machine.dtypes:
        pytest.skip(f"no products of {dtype} here: a CPU with them runs this (AVX512-BF16; without FASTBERT_CPU)")


def quantized(machine, x):
    made = Int8Rows.empty(*x.shape)
    row_wise(machine, x, out_int8=made).run()
    return made


def attend(machine, qkv, packing, scale=None, **places):
    """Native attention, into memory full of NaN."""
    out = torch.full((len(qkv), *qkv.shape[2:]), torch.nan).to(qkv.dtype)
    scale = scale or qkv.shape[-1] ** -0.5
    native_attention.attention_forward(machine, qkv, packing.cu_seqlens, packing.max_seqlen, scale, out, **places).run()
    return out


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 8, 13, 16, 24, 26, 30, 32, 40, 64, 80, 100, 128, 256])
def test_attention(head_dim, dtype, machine, generator):
    """Lengths around the widths of vectors and of blocks of rows, one of them 0; slack is not written."""
    served(machine, dtype)
    packing = Packing.from_lengths([1, 2, 0, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65, 130])
    qkv = (torch.randn(packing.tokens + 3, 3, 2, head_dim, generator=generator) * 2).to(dtype)
    qkv[packing.tokens :] = torch.nan
    out = attend(machine, qkv, packing)
    assert out[packing.tokens :].isnan().all()
    qkv, out = qkv[: packing.tokens], out[: packing.tokens]
    exact, _ = reference.attention(qkv.double(), packing)
    assert_close(out, reference.attention(qkv, packing)[0], exact)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("head_dim", [1, 3, 16, 24, 32, 64, 100])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_backward(dropout, head_dim, machine, generator):
    """As `test_attention`."""
    packing = Packing.from_lengths([1, 2, 0, 7, 8, 9, 15, 16, 17, 31, 32, 33, 65, 130])
    qkv = torch.randn(packing.tokens + 3, 3, 2, head_dim, generator=generator) * 2
    dout = torch.randn(packing.tokens + 3, 2, head_dim, generator=generator)
    qkv[packing.tokens :] = dout[packing.tokens :] = torch.nan
    dqkv = torch.full_like(qkv, torch.nan)
    native_attention_backward.attention_backward(
        machine, qkv, packing.cu_seqlens, packing.max_seqlen, head_dim**-0.5, dout, dqkv,
        dropout=Dropout(SEED, dropout) if dropout else None,
    ).run()  # fmt: skip
    assert dqkv[packing.tokens :].isnan().all()
    keep = attention_keep_mask(packing, 2, dropout)

    def compute(to):
        x = qkv[: packing.tokens].to(to).requires_grad_()
        out, _ = reference.attention(x, packing, keep=keep, dropout=dropout)
        return torch.autograd.grad(out, x, dout[: packing.tokens].to(to))[0]

    assert_close(dqkv[: packing.tokens], compute(torch.float32), compute(torch.float64))


SEED = -(2**62) - 12345  # of which all bits count


def attention_keep_mask(packing, heads, dropout):
    seed = torch.tensor([SEED])
    return reference.attention_keep_mask(seed, packing.batch, heads, packing.max_seqlen, dropout) if dropout else None


@pytest.mark.parametrize(("machine", "dtype"), EVERY_FORM)
@pytest.mark.parametrize("dropout", [2**-16, 0.1, 0.9])
def test_attention_with_dropout(dropout, machine, dtype, generator):
    packing = Packing.from_lengths([1, 0, 17, 70])
    qkv = torch.randn(packing.tokens, 3, 3, 24, generator=generator).to(dtype)
    out = attend(machine, qkv, packing, dropout=Dropout(SEED, dropout))
    keep = attention_keep_mask(packing, 3, dropout)
    plain, exact = (
        reference.attention(qkv.to(to), packing, keep=keep, dropout=dropout)[0] for to in (dtype, torch.float64)
    )
    assert_close(out, plain, exact)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dropout", [2**-16, 0.1, 1 - 2**-16])
@pytest.mark.parametrize("width", [1, 16, 37])
def test_dropout_of_rows(width, dropout, machine):
    """The mask of the reference, to the last element; a residual is not dropped."""
    x, residual, out = torch.ones(70, width), torch.full((70, width), 0.5), torch.empty(70, width)
    row_wise(machine, x, dropout=Dropout(SEED, dropout), residual=residual, out=out).run()
    keep = reference.hidden_keep_mask(torch.tensor([SEED]), 70, width, dropout)
    torch.testing.assert_close(out, keep * drop_scale(dropout) + 0.5, rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_attention_backward_keeps_nan_in_its_head_and_sequence(value, generator):
    packing = Packing.from_lengths([5, 40, 9])
    qkv = torch.randn(54, 3, 2, 16, generator=generator)
    dout = torch.randn(54, 2, 16, generator=generator)
    qkv[11, 1, 1] = value
    dqkv = torch.empty_like(qkv)
    native_attention_backward.attention_backward(
        HOST, qkv, packing.cu_seqlens, packing.max_seqlen, 0.25, dout, dqkv
    ).run()
    assert dqkv[5:45, :, 1].isnan().any(-1).all()
    assert dqkv[5:45, :, 0].isfinite().all()
    assert dqkv[:5].isfinite().all() and dqkv[45:].isfinite().all()


BASE = 500.0


def places_of(names, head_dim, longest, generator):
    """Options of attention of 2 heads by their names, "window 5" and the like; a table has 4 places too many, and one
    of positions, `[2, 2 * positions, head_dim]`, 64.
    """
    options = {}
    for name in names.split(", "):
        match name.split():
            case ["window", size]:
                options["window"] = int(size)
            case ["ALiBi"]:
                options["alibi_slopes"] = torch.tensor([0.3, -0.02])
            case ["relative"]:
                options["relative"] = torch.randn(2, 2 * (longest + 4) - 1, generator=generator) * 2
            case ["rotary"]:
                options["angles"] = angles_of_places(longest, head_dim, BASE)
            case [("position_key" | "position_query") as name]:
                positions = -(-longest // 64) * 64 + 64
                options[name] = torch.randn(2, 2 * positions, head_dim, generator=generator)
    return options


def laid_out(machine, options, dtype):
    """`places_of` as native attention takes them."""
    columns = 2 * machine.vectors.lanes
    made = {name: options[name].to(dtype).flatten(0, 1) for name in options if name.startswith("position")}
    return options | {name: native_layout.in_blocks(table, columns) for name, table in made.items()}


def plain_places(qkv, packing, to, *, angles=None, position_key=None, position_query=None, **options):
    """The same by the reference, computed in a dtype."""
    held, qkv = qkv.dtype, qkv.to(to)
    tables = [None if one is None else one.to(held).to(to).transpose(0, 1) for one in (position_key, position_query)]
    if position_key is not None:  # its rows are by column - row, and the reference has one order for both
        tables[0] = tables[0].flip(0).roll(-1, 0)
    known = [table for table in tables if table is not None]
    if known:
        place = torch.arange(packing.max_seqlen)
        index = len(known[0]) // 2 - 1 + place[:, None] - place
        wide = torch.promote_types(to, torch.float32)
        tables = [None if one is None else one.to(wide) for one in tables]
        scale = qkv.shape[3] ** -0.5
        options["bias"] = reference.disentangled_bias(qkv.to(wide), packing, *tables, index, scale)
    if angles is not None:
        wide = torch.promote_types(to, torch.float32)
        qkv = reference.rotary(qkv, reference.rotary_angles(packing, qkv.shape[3], BASE, wide))
    return reference.attention(qkv, packing, **options)[0]


@pytest.mark.parametrize(("machine", "dtype"), EVERY_FORM)
@pytest.mark.parametrize(
    ("names", "head_dim"),
    [
        ("window 0", 26),
        ("window 5", 26),
        ("window 33", 26),
        ("window 1000", 26),
        ("ALiBi", 40),
        ("relative", 26),
        ("rotary", 26),
        ("rotary", 32),
        ("window 20, ALiBi, relative, rotary", 40),
        ("position_key", 26),
        ("position_query", 26),
        ("position_key, position_query", 13),
        ("position_key, position_query", 64),
        ("window 20, ALiBi, relative, position_key, position_query", 40),
    ],
)
@pytest.mark.parametrize("lengths", [[*range(1, 71), 0], [150, 0, 3, 97]], ids=["1 to 70", "long"])
def test_attention_of_places(lengths, names, head_dim, machine, dtype, generator):
    packing = Packing.from_lengths(lengths)
    qkv = (torch.randn(packing.tokens + 3, 3, 2, head_dim, generator=generator) * 2).to(dtype)
    qkv[packing.tokens :] = torch.nan
    options = places_of(names, head_dim, packing.max_seqlen, generator)
    out = attend(machine, qkv, packing, **laid_out(machine, options, dtype))
    assert out[packing.tokens :].isnan().all()
    qkv, out = qkv[: packing.tokens], out[: packing.tokens]
    plain, exact = (plain_places(qkv, packing, to, **options) for to in (dtype, torch.float64))
    assert_close(out, plain, exact)


@pytest.mark.parametrize(("machine", "dtype"), EVERY_FORM)
@pytest.mark.parametrize("scale", [0.01, 500.0, 1e10])
def test_attention_of_places_of_large_and_small_scores(scale, machine, dtype, generator):
    packing = Packing.from_lengths([40, 5])
    qkv = torch.randn(45, 3, 2, 26, generator=generator).to(dtype)
    for names in ("window 5", "ALiBi"):
        options = places_of(names, 26, 40, generator)
        plain, exact = (
            reference.attention(qkv.to(to), packing, scale=scale, **options)[0] for to in (dtype, torch.float64)
        )
        assert_close(attend(machine, qkv, packing, scale, **options), plain, exact)


@pytest.mark.parametrize(("machine", "dtype"), EVERY_FORM)
def test_a_table_of_distances_hides_keys(machine, dtype, generator):
    """-inf: all later keys of one head; and every key of the other, whose rows are 0 then."""
    packing = Packing.from_lengths([40, 1, 9])
    qkv = torch.randn(50, 3, 2, 26, generator=generator).to(dtype)
    table = torch.randn(2, 79, generator=generator)
    table[0, 40:] = -math.inf
    table[1] = -math.inf
    out = attend(machine, qkv, packing, relative=table)
    assert (out[:, 1] == 0).all()
    plain, exact = (plain_places(qkv, packing, to, relative=table) for to in (dtype, torch.float64))
    assert_close(out, plain, exact)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("machine", "dtype"), EVERY_FORM)
def test_what_a_window_does_not_see_is_not_visited(machine, dtype, value, generator):
    """But for what lies in a vector with keys that are seen, by any of the queries made together."""
    packing, middle, window = Packing.from_lengths([300]), 150, 5
    qkv = torch.randn(300, 3, 2, 26, generator=generator).to(dtype)
    clean = attend(machine, qkv, packing, window=window)
    qkv[middle, 1:] = value
    out = attend(machine, qkv, packing, window=window)
    assert out[middle - window : middle + window + 1].isnan().all()
    near = window + machine.vectors.queries + 2 * machine.vectors.lanes
    for far in (slice(0, middle - near), slice(middle + near, 300)):
        assert torch.equal(out[far], clean[far])


@pytest.mark.parametrize(("machine", "dtype"), EVERY_FORM)
def test_what_is_hidden_weighs_nothing(machine, dtype, generator):
    """Not even 2^-126 of the largest number that there is."""
    packing, middle, window = Packing.from_lengths([60]), 30, 5
    qkv = torch.randn(60, 3, 2, 26, generator=generator).to(dtype)
    clean = attend(machine, qkv, packing, window=window)
    qkv[middle, 2] = torch.finfo(dtype).max
    out = attend(machine, qkv, packing, window=window)
    for hidden in (slice(0, middle - window), slice(middle + window + 1, 60)):
        assert torch.equal(out[hidden], clean[hidden])


@pytest.mark.parametrize("machine", MACHINES)
def test_the_time_of_a_window_grows_with_it_and_not_with_the_length(machine, generator):
    """By rounds in turns: 129 of 4,096 keys take a thirtieth, and all else that is done to each row some more."""
    packing, times = Packing.from_lengths([4096]), {64: [], None: []}
    qkv = torch.randn(4096, 3, 1, 64, generator=generator)
    for _ in range(5):
        for window, taken in times.items():
            start = time.perf_counter()
            attend(machine, qkv, packing, window=window)
            taken.append(time.perf_counter() - start)
    assert min(times[64]) < min(times[None]) / 4


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("scale", [0.01, 3.0, 500.0, 1e10])
def test_attention_of_large_and_small_scores(scale, machine, generator):
    packing = Packing.from_lengths([40, 5])
    qkv = torch.randn(45, 3, 3, 32, generator=generator)
    exact, _ = reference.attention(qkv.double(), packing, scale=scale)
    plain, _ = reference.attention(qkv, packing, scale=scale)
    assert_close(attend(machine, qkv, packing, scale), plain, exact)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("machine", MACHINES)
def test_attention_keeps_nan_in_its_head_and_sequence(machine, value, generator):
    packing = Packing.from_lengths([20, 30])
    qkv = torch.randn(50, 3, 2, 16, generator=generator)
    qkv[33, 1, 1, 3] = value
    with_nan = attend(machine, qkv, packing).isnan()
    assert torch.equal(with_nan, reference.attention(qkv, packing)[0].isnan())
    assert with_nan[20:, 1].any()
    assert not with_nan[:20].any() and not with_nan[:, 0].any()


def test_attention_as_an_op_takes_strides_and_is_watched_by_no_one(generator, monkeypatch):
    """Through `attention`: a view, a long sequence, and plain torch where it is asked for or something looks on."""
    calls = []
    kernel = native_attention.attention_forward
    monkeypatch.setattr(
        native_attention, "attention_forward", lambda *args, **on: calls.append(1) or kernel(*args, **on)
    )
    packing = Packing.from_lengths([700, 3])
    qkv = torch.randn(703, 3, 4, 48, generator=generator)[:, :, ::2]
    exact, _ = reference.attention(qkv.double(), packing)
    plain, _ = reference.attention(qkv, packing)
    assert_close(attention(qkv, packing), plain, exact)
    assert len(calls) == 1
    with backend.use_backend("torch"):
        attention(qkv, packing)
    torch.compile(lambda x: attention(x, packing), backend="eager")(qkv)
    attention(qkv.double(), packing)
    attention(torch.randn(703, 3, 1, WIDEST_HEAD + 1), packing)
    assert len(calls) == 1
    attention(qkv.clone().requires_grad_(), packing)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["window", "alibi_slopes", "relative"])
def test_attention_as_an_op_gives_the_kernel_what_depends_on_places(name, generator, monkeypatch):
    """Slopes and a table by strides, a table in bfloat16; where a gradient, a bias or dropout is asked for, torch."""
    calls = []
    kernel = native_attention.attention_forward
    monkeypatch.setattr(
        native_attention, "attention_forward", lambda *args, **on: calls.append(1) or kernel(*args, **on)
    )
    packing = Packing.from_lengths([70, 3])
    qkv = torch.randn(75, 3, 2, 48, generator=generator)
    given = {
        "window": 9,
        "alibi_slopes": torch.tensor([0.5, 0.0, 0.03, 0.0])[::2],
        "relative": torch.randn(2, 2 * 149, generator=generator).bfloat16()[:, :-1][:, ::2],
    }[name]
    exact, _ = reference.attention(qkv.double(), packing, **{name: given})
    plain, _ = reference.attention(qkv, packing, **{name: given})
    out = attention(qkv, packing, **{name: given})
    assert_close(out[:73], plain[:73], exact[:73])
    assert (out[73:] == 0).all()
    assert len(calls) == 1
    with torch.no_grad():
        attention(qkv.clone().requires_grad_(), packing, **{name: given})
    assert len(calls) == 2
    attention(qkv.clone().requires_grad_(), packing, **{name: given})
    attention(qkv, packing, bias=torch.zeros(1, 1, 70, 70), **{name: given})
    attention(qkv, packing, dropout=0.1, seed=torch.tensor([1]), **{name: given})
    attention(qkv.double(), packing, **{name: given})
    attention(torch.randn(73, 3, 2, WIDEST_HEAD + 1), packing, **{name: given})
    torch.compile(lambda x: attention(x, packing, **{name: given}), backend="eager")(qkv)
    if name == "relative":
        attention(qkv, packing, relative=given.float().requires_grad_())
    assert len(calls) == 2


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [7, 16, 100, 384])
def test_row_wise(width, activation, dtype, machine, generator):
    """Each step with and without LayerNorm; 37 rows are three tasks."""
    served(machine, dtype)
    x, residual = ((torch.randn(37, width, generator=generator) * 3).to(dtype) for _ in range(2))
    bias, weight, norm_bias = torch.randn(3, width, generator=generator)

    def compute(to, last):
        total = ACTIVATIONS[activation](x.to(to) + bias.to(to)) + residual.to(to)
        normed = F.layer_norm(total, (width,), weight.to(to), norm_bias.to(to), 1e-5)
        return (normed if last else total).to(torch.float64 if to == torch.float64 else dtype)

    for norm in (None, (weight, norm_bias, 1e-5)):
        out = torch.full_like(x, torch.nan)
        row_wise(machine, x, bias=bias, activation=activation, residual=residual, norm=norm, out=out).run()
        assert_close(out, compute(torch.float32, norm), compute(torch.float64, norm))


@pytest.mark.parametrize(("machine", "dtype"), EVERY_FORM)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("width", [7, 40])
def test_row_wise_of_a_gate(width, activation, machine, dtype, generator):
    """The activation of a half times the other, as floats and in int8; a residual and LayerNorm may follow."""
    x = (torch.randn(37, 2 * width, generator=generator) * 3).to(dtype)
    residual = torch.randn(37, width, generator=generator).to(dtype)
    bias, weight, norm_bias = (torch.randn(n, generator=generator) for n in (2 * width, width, width))

    def compute(to, whole):
        first, gate = (x.to(to) + (bias.to(to) if whole else 0.0)).chunk(2, 1)
        total = ACTIVATIONS[activation](first) * gate
        if whole:
            total = F.layer_norm(total + residual.to(to), (width,), weight.to(to), norm_bias.to(to), 1e-5)
        return total if to == torch.float64 else total.to(dtype)

    for whole in (False, True):
        steps = {"bias": bias, "residual": residual, "norm": (weight, norm_bias, 1e-5)} if whole else {}
        out, int8 = torch.full((37, width), torch.nan, dtype=dtype), Int8Rows.empty(37, width)
        row_wise(machine, x, activation=activation, gated=True, out=out, out_int8=int8, **steps).run()
        exact = compute(torch.float64, whole)
        assert_close(out, compute(torch.float32, whole), exact)
        assert ((int8.floats() - exact).abs() <= 0.51 * int8.scale[:, None] + 1e-5).all()


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", ["", "bias", "residual", "bias, residual"])
@pytest.mark.parametrize("width", [7, 16, 100])
def test_layer_norm_backward(width, steps, dtype, machine, generator):
    """137 rows are three tasks."""
    served(machine, dtype)
    x, residual, dout = ((torch.randn(137, width, generator=generator) * 3).to(dtype) for _ in range(3))
    bias, weight, norm_bias = torch.randn(3, width, generator=generator)
    given = {name: one for name, one in (("bias", bias), ("residual", residual)) if name in steps}
    dx, sums = native_backward.layer_norm_backward(machine, x, dout, weight, 1e-5, **given)

    def compute(to):
        leaves = [one.to(to).requires_grad_() for one in (x, weight, norm_bias, bias)]
        total = leaves[0] + (leaves[3] if "bias" in steps else 0.0) + (residual.to(to) if "residual" in steps else 0.0)
        out = F.layer_norm(total, (width,), *leaves[1:3], 1e-5)
        return torch.autograd.grad(out, leaves, dout.to(to), allow_unused=True)

    plain, exact = compute(torch.float32), compute(torch.float64)
    assert_close(dx, plain[0].to(dtype), exact[0])
    for made, one, other in zip(sums, plain[1:], exact[1:], strict=True):
        if other is not None:
            assert_close(made, one, other)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [7, 40])
def test_bias_gelu_backward(width, gated, approximate, dtype, machine, generator):
    """With and without a bias; 137 rows are three tasks."""
    served(machine, dtype)
    wide = 2 * width if gated else width
    x, dout = ((torch.randn(137, n, generator=generator) * 3).to(dtype) for n in (wide, width))
    bias = torch.randn(wide, generator=generator)

    def compute(to, biased):
        leaves = [x.to(to).requires_grad_(), bias.to(to).requires_grad_()]
        z = leaves[0] + leaves[1] if biased else leaves[0] + 0.0 * leaves[1]
        if gated:
            z, gate = z.chunk(2, 1)
        out = F.gelu(z, approximate=approximate) * (gate if gated else 1.0)
        return torch.autograd.grad(out, leaves, dout.to(to))

    for biased in (False, True):
        dx, dbias = native_backward.bias_gelu_backward(
            machine, x, dout, bias if biased else None, approximate, gated=gated
        )
        plain, exact = compute(torch.float32, biased), compute(torch.float64, biased)
        assert_close(dx, plain[0].to(dtype), exact[0])
        assert (dbias is not None) is biased
        if biased:
            assert_close(dbias, plain[1], exact[1])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_the_slope_of_gelu_far_out_and_of_nan(approximate, machine):
    x = torch.tensor([[torch.nan, 1e20, -1e20, 3e38, -3e38, 40.0, -40.0, 14.0, -14.0, 0.0, -0.0]])
    made, _ = native_backward.bias_gelu_backward(machine, x, torch.ones_like(x), None, approximate)
    torch.testing.assert_close(made, torch.tensor([[torch.nan, *[1.0, 0.0] * 4, 0.5, 0.5]]), equal_nan=True)


OPS_WITH_GRADIENTS = {
    "layer_norm": lambda x, residual, w, b, x_bias: layer_norm(x, w, b, residual=residual, x_bias=x_bias, eps=1e-5),
    "bias_gelu": lambda x, residual, w, b, x_bias: bias_gelu(x * residual, x_bias),
    "bias_gelu gated": lambda x, residual, w, b, x_bias: bias_gelu(torch.cat([x, residual], 1), None, gated=True),
    "attention": lambda x, residual, w, b, x_bias: attention(
        torch.stack([x, residual, x * w], 1).unflatten(2, (2, 8)), Packing.from_lengths([len(x) - 30, 30])
    ).flatten(1),
    "attention with dropout": lambda x, residual, w, b, x_bias: attention(
        torch.stack([x, residual, x * w], 1).unflatten(2, (2, 8)), Packing.from_lengths([len(x) - 30, 30]),
        dropout=0.2, seed=torch.tensor([SEED]),
    ).flatten(1),
    "row_wise: dropout": lambda x, residual, w, b, x_bias: drop(x * residual + w, torch.tensor([SEED]), 0.2),
}  # fmt: skip


@pytest.fixture
def kernels_run(monkeypatch):
    """The names of the kernels that ran, in their order."""
    seen, run = [], Program.run
    monkeypatch.setattr(Program, "run", lambda self: seen.extend(call.kernel.name for call in self.calls) or run(self))
    return seen


@pytest.mark.parametrize("name", OPS_WITH_GRADIENTS)
@pytest.mark.parametrize("same", [False, True])
def test_gradients_by_kernels(name, same, generator, kernels_run):
    """Of strides, dout negated and spread, and one tensor given twice; against float64, with and without kernels."""
    op, rows = OPS_WITH_GRADIENTS[name], FEW + 7
    x = torch.randn(16, rows, generator=generator).t()
    residual = x if same else torch.randn(rows, 32, generator=generator)[:, ::2]
    others = torch.randn(3, 16, generator=generator)
    dout = torch.randn(1, 16, generator=generator)

    def compute(to, path):
        one = x.detach().to(to).requires_grad_()
        leaves = [one, one if same else residual.to(to).requires_grad_(), *(w.to(to).requires_grad_() for w in others)]
        with backend.use_backend(path):
            out = op(*leaves)
            leaves = leaves[1:] if same else leaves
            lazy = (
                torch._neg_view(-dout.to(to).expand(rows, 16)) if to == torch.float32 else dout.to(to).expand(rows, 16)
            )
            found = torch.autograd.grad(out, leaves, lazy, allow_unused=True)
        return [out, *(gradient for gradient in found if gradient is not None)]

    plain, exact = compute(torch.float32, "torch"), compute(torch.float64, "torch")
    assert not kernels_run
    made = compute(torch.float32, "native")
    backwards = "row_wise" if "row_wise" in name else f"{name.split()[0]}_backward"
    assert kernels_run[-1] == backwards and len(kernels_run) > 1
    for ours, one, other in zip(made, plain, exact, strict=True):
        assert_close(ours, one, other)


@pytest.mark.parametrize("name", OPS_WITH_GRADIENTS)
def test_gradients_of_gradients_by_kernels(name, generator, kernels_run):
    op, rows = OPS_WITH_GRADIENTS[name], FEW + 7
    x, residual = (torch.randn(rows, 16, generator=generator, requires_grad=True) for _ in range(2))
    others = torch.randn(3, 16, generator=generator)
    factor = torch.randn(rows, 16, generator=generator)

    def penalty(path):
        with backend.use_backend(path):
            total = (op(x, residual, *others) * factor).square().sum()
            found = torch.autograd.grad(total, [x, residual], create_graph=True)
            return torch.autograd.grad(sum(one.square().sum() for one in found), [x, residual])

    ours = penalty("native")
    assert kernels_run
    with sdpa_kernel(SDPBackend.MATH):
        torch.testing.assert_close(ours, penalty("torch"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in OPS_WITH_GRADIENTS if "dropout" not in name])  # no torch.func there
@pytest.mark.parametrize("case", ["jvp", "vmap", "compiled", "batched gradients", "float64", "few rows"])
def test_where_torch_takes_gradients(name, case, generator, kernels_run):
    """Where something has to see torch's ops, and where kernels don't serve; results are right in any case."""
    op, rows = OPS_WITH_GRADIENTS[name], 40 if case == "few rows" else FEW + 7
    x, residual = (torch.randn(rows, 16, generator=generator) for _ in range(2))
    others = torch.randn(3, 16, generator=generator)
    if case == "float64":
        x, residual, others = (one.double() for one in (x, residual, others))
    run = lambda one: op(one, residual, *others)  # noqa: E731
    with backend.use_backend("torch"), sdpa_kernel(SDPBackend.MATH):
        _, pulled = torch.func.vjp(run, x)
        dout = torch.randn(3, rows, 16, generator=generator).to(x.dtype)
        wanted = [pulled(one)[0] for one in dout]
        pushed = torch.func.jvp(run, (x,), (dout[0],))
    kernels_run.clear()
    match case:
        case "jvp":
            with sdpa_kernel(SDPBackend.MATH):
                torch.testing.assert_close(torch.func.jvp(run, (x,), (dout[0],)), pushed)
        case "vmap":
            pulled = torch.func.vjp(run, x)[1]
            torch.testing.assert_close(torch.func.vmap(pulled)(dout)[0], torch.stack(wanted))
        case "batched gradients":
            leaf = x.clone().requires_grad_()
            with backend.use_backend("native"):
                found = torch.autograd.grad(run(leaf), leaf, dout, is_grads_batched=True)
            torch.testing.assert_close(found[0], torch.stack(wanted), rtol=1e-4, atol=1e-4)
            kernels_run[:] = [kernel for kernel in kernels_run if "backward" in kernel]
        case _:
            leaf = x.clone().requires_grad_()
            call = torch.compile(run, backend="eager") if case == "compiled" else run
            found = torch.autograd.grad(call(leaf), leaf, dout[0])
            torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-4)
    assert not kernels_run or (case == "few rows" and name == "attention")


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("types", [True, False])
@pytest.mark.parametrize("width", [7, 16, 100, 384])
def test_embedding(width, types, dtype, machine, generator):
    """37 rows are three tasks; the first and the last entry of each table are among them; one table is in float32."""
    served(machine, dtype)
    word, position = (torch.randn(entries, width, generator=generator).to(dtype) for entries in (31, 17))
    token_type = torch.randn(2, width, generator=generator)
    ids = [torch.arange(37) % entries for entries in (31, 17, 2)]
    weight, bias = torch.randn(2, width, generator=generator)
    out = torch.full((37, width), torch.nan).to(dtype)
    given = [*ids[:2], ids[2] if types else None]
    native_embedding.embedding(machine, *given, word, position, token_type, (weight, bias, 1e-12), out).run()

    def compute(to):
        total = word.to(to)[ids[0]] + position.to(to)[ids[1]] + token_type.to(to)[ids[2] if types else 0]
        return F.layer_norm(total, (width,), weight.to(to), bias.to(to), 1e-12)

    assert_close(out, compute(torch.float32).to(dtype), compute(torch.float64))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("how", ["cls", "mean", "max"])
@pytest.mark.parametrize("width", [7, 16, 100])
def test_pool(width, how, normalise, dtype, machine, generator):
    """Sequences of no rows at either end; a long one far from 0; one with NaN, and slack of NaN."""
    served(machine, dtype)
    packing = Packing.from_lengths([0, 5, 0, 70, 1, 1000, 9, 0])
    x = torch.randn(packing.tokens + 2, width, generator=generator)
    x[76:1076] += 300.0
    x[1080, 3] = torch.nan
    x = x.to(dtype)
    x[packing.tokens :] = torch.nan
    out = torch.full((packing.batch, width), torch.nan)
    native_pooling.pool_forward(machine, x, packing.cu_seqlens, out, how=how, normalise=normalise).run()
    exact = reference.pool(x.double(), packing, how, normalise=normalise)
    plain = reference.pool(x.float(), packing, how, normalise=normalise)
    assert torch.equal(out.isnan(), exact.isnan())
    assert exact.isnan().any() == (how != "cls")
    known = [0, 1, 2, 3, 4, 5, 7]
    assert_close(out[known], plain[known], exact[known])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name])
def test_activations_far_out_and_of_nan(activation, machine):
    x = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor([-1e30, -200.0, -90.0, 90.0, 200.0, 1e30])])[None]
    out = torch.empty_like(x)
    row_wise(machine, x, activation=activation, out=out).run()
    assert_close(out, ACTIVATIONS[activation](x), ACTIVATIONS[activation](x.double()))
    small, made = x[:, :1001], out[:, :1001]  # beside 1e30 nothing else would count
    assert_close(made, ACTIVATIONS[activation](small), ACTIVATIONS[activation](small.double()))
    x[0, 5] = torch.nan
    row_wise(machine, x, activation=activation, out=out).run()
    assert out[0, 5].isnan() and out.isnan().sum() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("depth", "width"), [(8, 32), (48, 33), (384, 100), (1000, 64)])
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 300])
def test_linear(rows, depth, width, machine, dtype, generator):
    served(machine, dtype)
    x = torch.randn(rows, depth, generator=generator).to(dtype)
    weight = (torch.randn(width, depth, generator=generator) / depth**0.5).to(dtype)
    bias = torch.randn(width, generator=generator).to(dtype)
    residual = torch.randn(rows, width, generator=generator).to(dtype)
    matrix = native_layout.in_blocks(weight, machine.vectors.columns)
    for activation, added in ((None, None), ("gelu", None), (None, residual), ("silu", residual)):

        def compute(to, activation=activation, added=added):
            total = ACTIVATIONS[activation](F.linear(x.to(to), weight.to(to), bias.to(to)))
            return total if added is None else total + added.to(to)

        out = torch.full((rows, width), torch.nan).to(dtype)
        native_linear.linear(machine, x, matrix, bias, out, activation=activation, residual=added).run()
        assert_close(out, compute(torch.float32).to(dtype), compute(torch.float64))


@pytest.mark.parametrize("machine", MACHINES)
def test_linear_over_several_groups_of_rows(machine, generator):
    """Each group has tasks of its own; the last one is short, and goes over rows of the one before it."""
    machine = replace(machine, vectors=replace(machine.vectors, group_bytes=64 * 4 * 16))
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((67, 64), (96, 64), (96,)))
    out = torch.full((67, 96), torch.nan)
    native_linear.linear(machine, x, native_layout.in_blocks(weight, machine.vectors.columns), bias, out).run()
    assert_close(out, F.linear(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(("inputs", "outputs"), [(7, 3), (32, 8), (100, 33), (128, 64), (300, 150)])
@pytest.mark.parametrize("rows", [1, 128, 300])
def test_weight_gradient(rows, inputs, outputs, machine, generator):
    """It is added; inputs and outputs around the sizes of a task."""
    x, dout = (torch.randn(rows, width, generator=generator) for width in (inputs, outputs))
    before = torch.randn(outputs, inputs, generator=generator)
    dweight = before.clone()
    native_weight_gradient.weight_gradient(machine, x, dout, dweight).run()
    assert_close(dweight, before + dout.t() @ x, before.double() + dout.t().double() @ x.double())


@pytest.fixture
def recorded(monkeypatch):
    """Grows by one item with each linear layer that is recorded by kernels, which here are meant for every CPU."""
    seen, kernel = [], ops_linear.by_kernel
    monkeypatch.setattr(ops_linear, "by_kernel", lambda *args: seen.append(1) or kernel(*args))
    with backend.use_backend("native"):
        yield seen


@pytest.mark.parametrize("wanted", ["all", "x", "weight", "no bias"])
def test_gradients_of_a_linear_layer(wanted, generator, recorded):
    """Of operands that are no neighbours in memory, against float64."""
    rows = FEW + 5
    x = torch.randn(40, rows, generator=generator).t().requires_grad_(wanted != "weight")
    weight = torch.randn(40, 70, generator=generator).t().requires_grad_(wanted != "x")
    bias = None if wanted == "no bias" else torch.randn(70, generator=generator).requires_grad_(wanted == "all")
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None and leaf.requires_grad]
    dout = torch.randn(70, rows, generator=generator).t()

    def compute(run, to):
        given = [
            None if leaf is None else leaf.detach().to(to).requires_grad_(leaf.requires_grad)
            for leaf in (x, weight, bias)
        ]
        out = run(*given)
        return [
            out,
            *torch.autograd.grad(out, [leaf for leaf in given if leaf is not None and leaf.requires_grad], dout.to(to)),
        ]

    exact, plain = (compute(F.linear, to) for to in (torch.float64, torch.float32))
    out = ops_linear.linear(x, weight, bias)
    assert recorded
    for made, one, reference_ in zip([out, *torch.autograd.grad(out, leaves, dout)], plain, exact, strict=True):
        assert_close(made, one, reference_)


def test_the_gradient_of_a_linear_layers_gradient(generator, recorded):
    x, weight = (torch.randn(n, 24, generator=generator, requires_grad=True) for n in (100, 16))

    def penalty(run):
        [dx] = torch.autograd.grad(run(x, weight, None).square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), weight)[0]

    torch.testing.assert_close(penalty(ops_linear.linear), penalty(F.linear))
    assert recorded


@pytest.mark.parametrize("case", ["few rows", "bfloat16", "autocast", "torch", "no gradient", "compiled"])
def test_where_a_linear_layer_is_not_recorded_by_kernels(case, generator, recorded):
    x = torch.randn(8 if case == "few rows" else 100, 24, generator=generator)
    weight = torch.randn(16, 24, generator=generator, requires_grad=case != "no gradient")
    run = ops_linear.linear
    if case == "bfloat16":
        x, weight = x.bfloat16(), weight.bfloat16()
    if case == "compiled":
        run = torch.compile(run, backend="eager", fullgraph=True)
    with torch.autocast("cpu", enabled=case == "autocast"):
        out = forced(lambda: run(x, weight, None)) if case == "torch" else run(x, weight, None)
    torch.testing.assert_close(out.float(), F.linear(x.float(), weight.float()), atol=0.2, rtol=0.02)
    assert not recorded


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantized_rows_are_half_a_step_off_at_most(dtype, machine, generator):
    served(machine, dtype)
    x = torch.randn(40, 100, generator=generator).to(dtype)
    x[3] = 0.0
    x[4] = 5.0
    x[5] = -x[5].abs() * 1e-20
    x[6] = x[6].abs() + 3.0
    made = quantized(machine, x)
    steps = (made.floats() - x.float()).abs() / made.scale[:, None]
    assert steps.max() <= 0.501
    assert (made.floats()[3] == 0).all()
    assert ((made.zero >= 0) & (made.zero <= 255) & (made.zero == made.zero.round())).all()
    spread = (x.float().amax(1).clamp_min(0) - x.float().amin(1).clamp_max(0)) / 255
    live = spread > 1e-29
    torch.testing.assert_close(made.scale[live], spread[live])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_int8_can_not_hold_is_nan(value, generator):
    x = torch.randn(5, 64, generator=generator)
    x[2, 7] = value
    for path in (None, "torch"):
        made = quantize_rows_int8(x) if path is None else forced(lambda: quantize_rows_int8(x))
        nan = made.floats().isnan().any(1)
        assert nan.tolist() == [False, False, True, False, False]


def forced(run):
    with backend.use_backend("torch"):
        return run()


@pytest.mark.parametrize("machine", [pytest.param(HOST, id="host"), pytest.param(WIDE, id="wide")])
@pytest.mark.parametrize("step", ["plain", "gelu", "norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "depth", "width"), [(1, 8, 24), (13, 64, 40), (50, 100, 33), (131, 384, 96)])
def test_linear_int8(rows, depth, width, dtype, step, machine, generator):
    """The kernels give what torch computes from the same integers."""
    if not machine.int8:
        pytest.skip("no products of int8 here: a CPU with them runs this")
    served(machine, dtype)
    weight = Int8Matrix.of(torch.randn(width, depth, generator=generator) / depth**0.5)
    bias, norm_weight, norm_bias = torch.randn(3, width, generator=generator)
    residual = torch.randn(rows, width, generator=generator).to(dtype)
    x = quantized(machine, torch.randn(rows, depth, generator=generator))
    options = {"plain": {}, "gelu": {"activation": "gelu"}, "norm": {"norm": (norm_weight, norm_bias, 1e-5)}}[step]
    if step == "norm":
        options["residual"] = residual
    total = x.floats().double() @ weight.plain()[:depth].double() * weight.scale.double() + bias.double()
    if step == "gelu":
        total = F.gelu(total)
    if step == "norm":
        total = F.layer_norm(total + residual.double(), (width,), norm_weight.double(), norm_bias.double(), 1e-5)
    plain, plain_int8 = forced(lambda: linear_int8(x, weight, bias, dtype, int8=True, **options))

    def run(out, int8):
        Program(native_linear_int8.linear_int8(machine, x, weight, bias, out=out, out_int8=int8, **options)).run()

    out, int8 = torch.full((rows, width), torch.nan, dtype=dtype), Int8Rows.empty(rows, width)
    run(out, int8)
    assert_close(out, plain, total)
    assert (int8.floats() - plain_int8.floats()).abs().max() <= 1.001 * plain_int8.scale.max()
    assert (int8.floats() - total).abs().max() <= 0.51 * plain_int8.scale.max()
    only = Int8Rows.empty(rows, width)
    run(None, only)
    assert torch.equal(only.values, int8.values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_int8_as_an_op(dtype, generator):
    """It runs the kernels of the CPU at hand, and gives the floats that are asked for, the int8, or both."""
    if not HOST.int8:
        pytest.skip("no products of int8 here: a CPU with them runs this (AVX512-VNNI; without FASTBERT_CPU)")
    served(HOST, dtype)
    weight, bias = Int8Matrix.of(torch.randn(33, 100, generator=generator) / 10), torch.randn(33, generator=generator)
    x = quantize_rows_int8(torch.randn(50, 100, generator=generator))
    expected, expected_int8 = torch.full((50, 33), torch.nan, dtype=dtype), Int8Rows.empty(50, 33)
    Program(native_linear_int8.linear_int8(HOST, x, weight, bias, out=expected, out_int8=expected_int8)).run()
    for int8 in (True, False):
        out, made = linear_int8(x, weight, bias, dtype, int8=int8)
        assert torch.equal(out, expected)
        assert torch.equal(made.values, expected_int8.values) if int8 else made is None
    nothing, only = linear_int8(x, weight, bias, dtype, out=False, int8=True)
    assert nothing is None and torch.equal(only.values, expected_int8.values)


def int8_machines():
    """The host, and each way to multiply int8 that it can be held to; vpdpbusd of 256 bits is AVX512-VNNI's here."""
    if HOST.int8:
        yield pytest.param(HOST, id="host")
    yield pytest.param(NARROW, id="AVX2")
    yield pytest.param(WIDE, id="wide")
    if HOST.vectors is AVX512:
        yield pytest.param(replace(HOST, int8=AVX512_INT8), id="AVX-512")
    if "+avxvnni" in HOST.features or HOST.int8 is AVX512_VNNI:
        yield pytest.param(replace(HOST, vectors=AVX2, int8=AVX_VNNI, bfloat16=None), id="VNNI of 256 bits")


# Neighbours whose sum is the most that a weight may have, or that cancel.
EXTREMES = [(64, 64), (-64, -64), (127, 1), (1, 127), (-127, -1), (-128, 0), (0, -128), (127, -127), (-128, 127)]


@pytest.mark.parametrize("machine", [*int8_machines()])
@pytest.mark.parametrize("depth", [4, 12, 1004, 4096])
@pytest.mark.parametrize("many", [False, True])
def test_sums_of_int8_are_exact(many, depth, machine, generator):
    """To the bit, with activations at their ends and weights at theirs, in both kernels and at each end of a block."""
    rows = native_linear_int8.FEW_ROWS * torch.get_num_threads() + 5 if many else 7
    pairs = torch.tensor(EXTREMES, dtype=torch.int8)
    alike = pairs.repeat(1, depth // 2)
    mixed = pairs[torch.randint(len(pairs), (73 - len(pairs), depth // 2), generator=generator)].flatten(1)
    weight = torch.cat([alike, mixed])
    assert pair_sums(weight).max() == PAIR
    x = Int8Rows(torch.full((rows, depth), 255, dtype=torch.uint8), torch.ones(rows), torch.zeros(rows))
    x.values[1] = 0
    x.values[2:] = 255 * torch.randint(2, (rows - 2, depth), generator=generator)
    matrix = Int8Matrix(native_layout.in_blocks(weight, COLUMNS), torch.ones(73), torch.zeros(73))
    out = torch.full((rows, 73), torch.nan)
    Program(native_linear_int8.linear_int8(machine, x, matrix, torch.zeros(73), out=out)).run()
    exact = x.values.to(torch.int32) @ weight.to(torch.int32).t()
    assert torch.equal(out, exact.float())


@pytest.mark.parametrize(
    "weight",
    [
        torch.ones(3, 7),
        -torch.ones(3, 8),
        torch.tensor([[1.0, 1.0, 0.0], [0.5, -1e30, 1e-30], [63.5, 63.5, 1.0]]),
        torch.zeros(2, 4),
        torch.linspace(-1, 3, 200 * 500).view(200, 500),
    ],
)
def test_a_weight_in_int8_leaves_room_for_sums_of_two(weight):
    """By rounding to nearest, and no more coarsely than that asks for."""
    for dtype in DTYPES:
        matrix = Int8Matrix.of(weight.to(dtype))
        most = pair_sums(matrix.plain().t()).amax(1)
        assert most.max() <= PAIR
        assert (most[weight.any(1)] >= PAIR - 2).all()
        near = (matrix.plain()[: weight.shape[1]].float() * matrix.scale).t()
        assert ((near - weight.to(dtype).float()).abs() <= 0.5001 * matrix.scale[:, None]).all()


@pytest.mark.parametrize(
    ("int8", "vectors", "features", "instruction"),
    [
        (AVX512_VNNI, AVX512, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni", r"vpdpbusd\s.*zmm"),
        (AVX512_INT8, AVX512, "avx512f,avx512bw,avx512dq,avx512vl", r"vpmaddubsw\s.*zmm"),
        (AVX_VNNI, AVX2, "avxvnni", r"\{vex\}\s+vpdpbusd\s.*ymm"),
        (AVX2_INT8, AVX2, "fma", r"vpmaddubsw\s.*ymm"),
    ],
    ids=["AVX512-VNNI", "AVX-512", "AVX-VNNI", "AVX2"],
)
def test_the_instruction_that_multiplies_int8(int8, vectors, features, instruction, monkeypatch):
    """Which this CPU may not have: the code is made and looked at, not run. What is not asked for is not in it."""
    make, made = llvm.create_mcjit_compiler, []

    def kept(module, target):
        made.append(target.emit_assembly(module))
        return make(module, target)

    monkeypatch.setattr(llvm, "create_mcjit_compiler", kept)
    flags = ",".join(f"+{name}" for name in features.split(",")) + vectors.flags
    machine = Machine("x86-64-v3", flags, vectors, int8=int8)
    rows, weight = Int8Rows.empty(20, 36), Int8Matrix.of(torch.ones(40, 36))
    native_linear_int8.linear_int8(machine, rows, weight, torch.zeros(40), out=torch.empty(20, 40))
    product = next(code for code in made if "linear_int8" in code)
    assert re.search(instruction, product)
    assert ("vpdpbusd" in product) == ("vnni" in features) and ("zmm" in product) == (vectors is AVX512)


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 42, 63, 64, 65, 129, 700])
@pytest.mark.parametrize(("words", "word_bytes"), [(384, 128), (1536, 128), (96, 64), (33, 32), (1, 128)])
def test_all_blocks_of_rows_together_fetch_the_weights_that_come_next(words, word_bytes, blocks):
    fetched: set[int] = set()
    code = SimpleNamespace(prefetch=lambda address: fetched.add(address // native_linear.LINE))
    begin = 3 * native_linear.LINE
    for block in range(blocks):
        fetch = native_linear.Ahead(begin, words, word_bytes, blocks).beside(code, block)
        before = len(fetched)
        for k in range(words):
            fetch(k)
        share = words * word_bytes / blocks / native_linear.LINE
        assert (
            len(fetched) - before <= share + words / native_linear.LINE + 3
        )  # no block fetches much more than its share
    end = begin + words * word_bytes
    assert fetched >= set(range(begin // native_linear.LINE, -(-end // native_linear.LINE)))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("width", [17, 18, 19, 31, 33])
def test_nothing_is_written_past_a_row(width, machine, generator):
    """Rows are neighbours and of different tasks: the end of one must not reach into the next."""
    x = torch.randn(64, width, generator=generator)
    made = quantized(machine, x)
    for row in range(63, -1, -1):  # from the last one up, so that each is written after the one below it
        alone = quantized(machine, x[row : row + 1])
        assert torch.equal(alone.values[0], made.values[row])
    values = torch.full((2, width), 77, dtype=torch.uint8)
    row_wise(machine, x[:1], out_int8=Int8Rows(values, torch.empty(1), torch.empty(1))).run()
    assert torch.equal(values[0], made.values[0]) and (values[1] == 77).all()


def test_int8_of_no_rows():
    weight, bias = Int8Matrix.of(torch.ones(8, 8)), torch.zeros(8)
    out, _ = linear_int8(quantize_rows_int8(torch.empty(0, 8)), weight, bias, torch.float32)
    assert out.shape == (0, 8)


def test_int8_says_what_it_takes():
    with pytest.raises(ArgumentError, match="x"):
        quantize_rows_int8(torch.ones(2, 3, 4))


def test_an_int8_weight_is_laid_out_and_back(generator):
    """A width and a depth that fill no block; zeros beyond, and rows of zeros."""
    weight = torch.randn(33, 10, generator=generator)
    weight[4] = 0.0
    matrix = Int8Matrix.of(weight)
    near = (matrix.plain()[:10].float() * matrix.scale).t()
    assert ((near - weight).abs() <= 0.501 * matrix.scale[:, None]).all()
    assert (matrix.plain()[10:] == 0).all()
    torch.testing.assert_close(matrix.sum, near.sum(1), atol=1e-6, rtol=1e-6)


@pytest.fixture
def runs(monkeypatch):
    """Grows by one item with each run of an encoder that is laid out, which here is meant for every CPU."""
    seen = []
    run = cpu.CpuProgram.run
    monkeypatch.setattr(cpu.CpuProgram, "run", lambda self, *args: seen.append(self) or run(self, *args))
    with backend.use_backend("native"):
        yield seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("lengths", [[1], [16, 0, 3], [250, 3, 96]], ids=str)
def test_laid_out_encoder(lengths, activation, dtype, generator, runs, nan_empty):
    served(HOST, dtype)
    model = random_model(generator, activation=activation).to(dtype)
    packing = Packing.from_lengths(lengths)
    ids = torch.randint(50, (packing.tokens,), generator=generator)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(ids, packing=packing).last_hidden_state
        plain = forced(lambda: model(ids, packing=packing).last_hidden_state)
        for _ in range(2):
            assert_close(model(ids, packing=packing).last_hidden_state, plain, exact, factor=3.0)
        read = torch.tensor([packing.tokens - 1, 0])
        inputs = model.read(ids, None, None, None, None, packing)
        torch.testing.assert_close(model.run(inputs, read, every=False)[-1], plain[read], atol=0.1, rtol=0.1)
        torch.testing.assert_close(model.run(inputs, read, every=False)[-1], model.run(inputs, every=False)[-1][read])
        assert model.run(inputs, read[:0], every=False)[-1].shape == (0, 48)
    assert len(runs) == 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [[1], [16, 0, 3], [250, 3, 96, 300]], ids=str)
def test_laid_out_int8_encoder(lengths, dtype, generator, runs, nan_empty):
    """It computes what the quantized layers do one by one; the rows of a batch of few are shared out otherwise."""
    served(HOST, dtype)
    if not HOST.int8:
        pytest.skip("no products of int8 here: a CPU with them runs this")
    model = quantize(random_model(generator).to(dtype), dtype="int8")
    packing = Packing.from_lengths(lengths)
    ids = torch.randint(50, (packing.tokens,), generator=generator)
    inputs, read = model.read(ids, None, None, None, None, packing), torch.tensor([packing.tokens - 1, 0])
    with torch.no_grad():
        expected = model(ids, packing=packing, output_hidden_states=True).last_hidden_state  # layer by layer
        assert not runs
        for _ in range(2):
            made = model(ids, packing=packing).last_hidden_state
            torch.testing.assert_close(made, expected, atol=2e-2, rtol=2e-2)
        some = model.run(inputs, read, every=False)[-1]
        assert model.run(inputs, read[:0], every=False)[-1].shape == (0, 48)
        torch.testing.assert_close(some, expected[read], atol=2e-2, rtol=2e-2)
    assert len(runs) == 4


def test_what_is_laid_out_in_inference_mode_serves_outside_of_it(generator, runs):
    encoder = random_model(generator).encoder
    packing = Packing.from_lengths([5, 9])
    x = torch.randn(20, 48, generator=generator)
    with torch.inference_mode():
        made = cpu.lay_out(encoder.layers(), x)
        inside = [made.run({"x": x}, packing)[:14].clone(), made.run({"x": x[:14]}, packing)]
    with torch.no_grad():
        assert torch.equal(made.run({"x": x}, packing)[:14], inside[0])
        assert torch.equal(made.run({"x": x[:14]}, packing), inside[1])


def test_runs_of_many_sizes(generator, runs, monkeypatch):
    """Those of sizes not used for long are made anew; the memory of a larger one takes the place of a smaller one's."""
    monkeypatch.setattr(cpu, "KEPT_RUNS", 2)
    encoder = random_model(generator).encoder
    x = torch.randn(40, 48, generator=generator)
    with torch.no_grad():
        made = cpu.lay_out(encoder.layers(), x)
        for length in (3, 40, 3, 17, 8, 40, 3):
            packing = Packing.from_lengths([length])
            expected = encoder.run(x[:length], packing)[-1]
            torch.testing.assert_close(made.run({"x": x[:length]}, packing), expected, atol=1e-4, rtol=1e-4)
        assert len(made.runs._of_sizes) == 2


def test_a_run_that_is_kept_reads_and_writes_anew(generator, runs):
    """Of the same sizes and another input; what it gave before is the caller's."""
    encoder, packing = random_model(generator).encoder, Packing.from_lengths([5, 9])
    inputs = torch.randn(2, 14, 48, generator=generator)
    with torch.no_grad():
        made = cpu.lay_out(encoder.layers(), inputs[0])
        results = [made.run({"x": x}, packing) for x in inputs]
        for x, result in zip(inputs, results, strict=True):
            torch.testing.assert_close(result, encoder.run(x, packing)[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("rows", "at_once"), [(1, 1), (3, 2), (4, 4), (13, 8), (16, 8), (24, 12), (60, 12)])
def test_rows_at_once(rows, at_once):
    assert AVX512_VNNI.rows_at_once(rows) == at_once
    assert all(int8.rows_at_once(rows) <= min(rows, int8.rows) for int8 in INT8)


@pytest.mark.parametrize("int8", INT8)
def test_rows_at_once_fit_the_registers_of_their_set(int8):
    """And a task is whole tiles of the most."""
    assert all(1 <= int8.rows_at_once(rows) <= min(rows, int8.rows) for rows in range(1, 100))
    assert native_linear_int8.TASK_ROWS % int8.rows == 0


def test_slack_of_a_laid_out_run_is_not_read(generator, runs):
    encoder = random_model(generator).encoder
    packing = Packing.from_lengths([5, 9])
    x = torch.randn(20, 48, generator=generator)
    with torch.no_grad():
        made = cpu.lay_out(encoder.layers(), x)
        whole = made.run({"x": x.clone()}, packing)
        x[14:] = 7.0
        assert torch.equal(made.run({"x": x}, packing)[:14], whole[:14])
    assert whole.isfinite().all()


@pytest.mark.parametrize("case", ["gradient", "training", "hidden states", "bias", "autocast", "torch"])
def test_where_the_laid_out_encoder_does_not_run(case, generator, runs):
    model = random_model(generator, hidden_dropout=0.0, attention_dropout=0.0).train(case == "training")
    ids = torch.randint(50, (2, 6), generator=generator)
    options = {"output_hidden_states": True} if case == "hidden states" else {}
    if case == "bias":
        options["attention_mask"] = torch.randn(2, 1, 6, 6, generator=generator)
    with torch.set_grad_enabled(case == "gradient"), torch.autocast("cpu", enabled=case == "autocast"):
        if case == "torch":
            forced(lambda: model(ids))
        else:
            model(ids, **options)
    assert not runs


@pytest.mark.parametrize("change", ["in place", "data", "assigned", "norm", "dtype"])
def test_layouts_are_kept_until_a_weight_changes(change, generator, runs):
    served(HOST, torch.bfloat16 if change == "dtype" else torch.float32)
    model = random_model(generator)
    ids, packing = torch.randint(50, (9,), generator=generator), Packing.from_lengths([4, 5])

    def run():
        with torch.no_grad():
            return model(ids, packing=packing).last_hidden_state

    run()
    run()
    assert runs[0] is runs[1]
    output = model.encoder.layer[1].output
    with torch.no_grad():
        match change:
            case "in place":
                output.dense.weight.mul_(1.5)
            case "data":
                output.dense.weight.data.mul_(1.5)
            case "assigned":
                output.dense.weight = torch.nn.Parameter(output.dense.weight * 1.5)
            case "norm":
                output.LayerNorm.bias.add_(1.0)
            case "dtype":
                model.bfloat16()
        changed = run()
        assert runs[2] is not runs[1]
        torch.testing.assert_close(
            changed, forced(lambda: model(ids, packing=packing).last_hidden_state), atol=3e-2, rtol=3e-2
        )


def test_what_a_machine_has_decides(monkeypatch):
    assert replace(HOST, bfloat16=None).dtypes == (torch.float32,)
    monkeypatch.setattr(backend, "host", lambda: "a CPU of sand")
    backend._decide.cache_clear()
    try:
        decision = backend.decide(torch.device("cpu"))
        assert decision.path == "torch" and "a CPU of sand" in decision.reason
    finally:
        backend._decide.cache_clear()


def test_one_task_more_than_rows_of_a_task(generator):
    """Rows that end inside a task, in a kernel whose tasks share out rows evenly."""
    if not HOST.int8:
        pytest.skip("no products of int8 here: a CPU with them runs this")
    for rows in (HOST.int8.rows, HOST.int8.rows + 1, 2 * native_linear_int8.TASK_ROWS + 1):
        x = torch.randn(rows, 16, generator=generator)
        product = quantize_rows_int8(x), Int8Matrix.of(torch.randn(16, 16, generator=generator)), torch.zeros(16)
        out, _ = linear_int8(*product, torch.float32)
        with backend.use_backend("torch"):
            plain, _ = linear_int8(*product, torch.float32)
        torch.testing.assert_close(out, plain)
