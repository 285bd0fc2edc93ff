"""attention: each branch of the kernel and the torch path against float64, by the error rule."""

import math

import pytest
import torch

from fastbert import backend, reference
from fastbert.errors import ArgumentError, BackendError
from fastbert.kernels import attention_choices, choices, target
from fastbert.kernels.attention_choices import ATTENTION_BACKWARD_ONE_PASS
from fastbert.ops.attention import attention
from fastbert.ops.attention_triton import attention_forward
from fastbert.ops.tile_table import tile_table
from fastbert.packing import Packing
from fastbert.testing import assert_close, random_lengths

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATHS = ["triton", "torch"]


def random_qkv(rows, heads, head_dim, dtype, generator, scale=1.0):
    return (torch.randn(rows, 3, heads, head_dim, generator=generator) * scale).to(dtype)


def check(path, qkv, packing, *, what="", **options):
    """Run one path and hold it to the error rule; returns the output."""
    tokens = packing.tokens
    keep = None
    plain_options = {
        name: options[name] for name in ("scale", "bias", "relative", "alibi_slopes", "window") if name in options
    }
    if options.get("dropout"):
        keep = reference.attention_keep_mask(
            options["seed"], packing.batch, qkv.shape[2], packing.max_seqlen, options["dropout"]
        )
        plain_options |= {"keep": keep, "dropout": options["dropout"]}
    exact_options = {
        k: v.double() if k in ("bias", "relative") and v is not None else v for k, v in plain_options.items()
    }
    with backend.use_backend(path):
        out = attention(qkv, packing, **options)
    plain, _ = reference.attention(qkv[:tokens], packing, **plain_options)
    exact, _ = reference.attention(qkv[:tokens].double(), packing, **exact_options)
    assert_close(out[:tokens], plain, exact, what=what or path)
    return out


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 40, 48, 64, 72, 80, 96, 128, 200, 256])
def test_case_13_head_dims(head_dim, dtype, path, generator):
    packing = Packing.from_lengths([5, 70, 33])
    check(path, random_qkv(packing.tokens, 2, head_dim, dtype, generator), packing)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("length", [1, 2, 7, 15, 17, 33, 63, 64, 65, 97, 127, 128, 129, 257, 511, 513])
def test_case_14_odd_lengths(length, path, generator):
    packing = Packing.from_lengths([length])
    check(path, random_qkv(length, 1, 32, torch.float16, generator), packing)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lengths", [[64, 64], [128], [192, 192]], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64])
def test_aligned_batches_have_no_tail(head_dim, lengths, path, generator):
    packing = Packing.from_lengths(lengths)
    check(path, random_qkv(packing.tokens, 2, head_dim, torch.float16, generator), packing)


EXTRAS = {
    "bias": {"bias": (1, 2)},
    "bias_per_sequence": {"bias": (3, 2)},
    "bias_broadcast": {"bias": (1, 1)},
    "alibi": {"alibi_slopes": [0.5, 0.0, 0.03, -0.1]},
    "alibi_and_bias": {"alibi_slopes": [2.0, 0.0, 0.2, -0.1], "bias": (3, 2)},
    "window": {"window": 9},
    "window_0": {"window": 0},
    "dropout": {"dropout": 0.3},
    "all": {"bias": (3, 1), "alibi_slopes": [0.3, 0.0, 0.05, -0.1], "window": 20, "dropout": 0.1},
    "scale": {"scale": 0.7},
    "relative": {"relative": 66},
    "relative_window_dropout": {"relative": 71, "window": 9, "dropout": 0.3},
    "relative_and_all": {
        "relative": 67,
        "bias": (1, 2),
        "alibi_slopes": [0.3, 0.0, 0.05, -0.1],
        "window": 20,
        "dropout": 0.1,
    },
}


def random_relative(heads, places, dtype, generator):
    """A table as one that is looked up by distance stands: its heads are its columns."""
    return torch.randn(2 * places - 1, heads, generator=generator).to(dtype).T


def options_of(name, dtype, generator):
    """EXTRAS[name] with tensors for sequences of [37, 5, 66] and 2 heads.

    The slopes are every other of a tensor.
    """
    options = dict(EXTRAS[name])
    if "bias" in options:
        options["bias"] = torch.randn(*options["bias"], 66, 66, generator=generator).to(dtype)
    if "relative" in options:
        options["relative"] = random_relative(2, options["relative"], dtype, generator)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.tensor(options["alibi_slopes"])[::2]
    if "dropout" in options:
        options["seed"] = torch.tensor([2**40 + 12345])
    return options


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [24, 64])
@pytest.mark.parametrize("name", EXTRAS)
def test_options(name, head_dim, dtype, path, generator):
    packing = Packing.from_lengths([37, 5, 66])
    options = options_of(name, dtype, generator)
    check(path, random_qkv(packing.tokens, 2, head_dim, dtype, generator), packing, **options)


@pytest.mark.parametrize("path", PATHS)
def test_relative_beside_slack_empty_sequences_and_single_tokens(path, generator, nan_empty):
    packing = Packing.from_lengths([37, 0, 1, 66, 1, 5])
    qkv = random_qkv(packing.tokens + 2, 2, 20, torch.float16, generator)
    qkv[packing.tokens :] = torch.nan
    relative = random_relative(2, 80, torch.float32, generator)
    check(path, qkv, packing, relative=relative)
    check_gradients(path, qkv, packing, generator, relative=relative)


@pytest.mark.kernels
def test_no_token_gives_distances_no_gradient(generator):
    qkv, relative = random_qkv(2, 2, 16, torch.float32, generator), random_relative(2, 3, torch.float32, generator)
    *_, nothing = gradients("triton", qkv, Packing.from_lengths([0]), torch.ones(2, 2, 16), relative=relative)
    assert (nothing == 0).all()


@pytest.mark.parametrize(("path", "dtype"), [("triton", torch.float32), ("torch", torch.float64)], ids=str)
def test_relative_is_the_bias_of_its_definition(path, dtype, generator):
    packing = Packing.from_lengths([9, 1, 14])
    qkv = random_qkv(24, 2, 16, torch.float64, generator)
    table = random_relative(2, 15, torch.float64, generator)
    bias = torch.tensor([[[[table[h, 14 + j - i] for j in range(14)] for i in range(14)] for h in range(2)]])
    expected, _ = reference.attention(qkv, packing, bias=bias.double())
    torch.testing.assert_close(reference.attention(qkv, packing, relative=table)[0], expected, rtol=0, atol=1e-14)
    with backend.use_backend(path):
        out = attention(qkv.to(dtype), packing, relative=table)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_a_row_that_distances_hide_everything_from_is_zero(path, generator):
    """As the only token of a sequence, where distance 0 is hidden."""
    packing = Packing.from_lengths([20, 1])
    relative = torch.randn(2, 39, generator=generator)
    relative[:, 19] = -torch.inf
    qkv = random_qkv(21, 2, 16, torch.float32, generator)
    assert (check(path, qkv, packing, relative=relative)[20] == 0).all()
    check_gradients(path, qkv, packing, generator, relative=relative)


@pytest.mark.parametrize("path", PATHS)
def test_alibi_is_the_bias_of_flash_attention_s_convention(path, generator):
    """Against its definition written out: a bias of -slope * |row - column|."""
    packing = Packing.from_lengths([70, 5, 130])
    qkv = random_qkv(205, 2, 32, torch.float32, generator)
    slopes = torch.rand(2, generator=generator)
    bias = torch.tensor([[[[-float(m) * abs(i - j) for j in range(130)] for i in range(130)] for m in slopes]])
    with backend.use_backend(path):
        out = attention(qkv, packing, alibi_slopes=slopes)
        expected = attention(qkv, packing, bias=bias)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_case_25_bias_of_broadcast_rows_and_columns_and_odd_strides(path, generator):
    packing = Packing.from_lengths([37, 5])
    qkv = random_qkv(42, 2, 16, torch.float32, generator)
    by_row = torch.randn(1, 2, 37, 1, generator=generator)
    by_column = torch.randn(2, 1, 1, 37, generator=generator)
    transposed = torch.randn(1, 2, 37, 37, generator=generator).transpose(2, 3)
    for bias in (by_row, by_column, transposed):
        check(path, qkv, packing, bias=bias)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_case_01_fully_masked_row_gives_zero(dtype, path, generator):
    packing = Packing.from_lengths([20, 7])
    bias = torch.zeros(1, 2, 20, 20, dtype=dtype)
    bias[:, :, 3] = -torch.inf
    bias[:, 1, :, 2:] = -torch.inf
    out = check(path, random_qkv(27, 2, 16, dtype, generator), packing, bias=bias)
    assert (out[3] == 0).all()
    assert (out[23] == 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_case_05_a_broken_sequence_does_not_break_its_neighbours(bad, path, generator):
    lengths = [9, 20, 3, 20, 33]
    packing = Packing.from_lengths(lengths)
    qkv = random_qkv(packing.tokens, 2, 16, torch.float32, generator)
    with backend.use_backend(path):
        whole = attention(qkv, packing).split(lengths)
        qkv[29:32] = bad
        broken = attention(qkv, packing).split(lengths)
    for i in (0, 1, 3, 4):
        torch.testing.assert_close(broken[i], whole[i])
    assert broken[2].isnan().all()


def test_case_01_fully_masked_row_has_zero_finite_gradients(generator):
    packing = Packing.from_lengths([20, 7])
    qkv = random_qkv(27, 2, 16, torch.float32, generator).requires_grad_()
    bias = torch.zeros(1, 2, 20, 20)
    bias[:, :, 3] = -torch.inf
    bias.requires_grad_()
    out = attention(qkv, packing, bias=bias)
    out.backward(torch.randn(out.shape, generator=generator))
    assert qkv.grad.isfinite().all()
    assert bias.grad.isfinite().all()
    assert (qkv.grad[3, 0] == 0).all()
    assert (bias.grad[:, :, 3] == 0).all()


@pytest.mark.parametrize("path", PATHS)
def test_case_02_more_padding_changes_nothing(path, generator):
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    padded = random_qkv(8, 2, 32, torch.float32, generator).view(2, 4, 3, 2, 32)
    wide_mask = torch.nn.functional.pad(mask, (0, 29))
    wide = torch.full((2, 33, 3, 2, 32), torch.nan)
    wide[:, :4] = padded
    with backend.use_backend(path):
        few = Packing.from_mask(mask)
        many = Packing.from_mask(wide_mask)
        assert torch.equal(attention(few.pack(padded), few), attention(many.pack(wide), many))


@pytest.mark.parametrize("path", PATHS)
def test_case_05_alone_as_in_a_batch_in_any_order(path, generator):
    lengths = [33, 1, 70, 33]
    qkv = [random_qkv(n, 2, 32, torch.float16, generator) for n in lengths]
    with backend.use_backend(path):
        together, packing = Packing.from_ragged(qkv)
        batch = attention(together, packing).split(lengths)
        turned, packing = Packing.from_ragged(qkv[::-1])
        backwards = attention(turned, packing).split(lengths[::-1])
        for i, one in enumerate(qkv):
            alone = attention(one, Packing.from_lengths([len(one)]))
            assert torch.equal(alone, batch[i])
            assert torch.equal(alone, backwards[len(qkv) - 1 - i])


@pytest.mark.parametrize("path", PATHS)
def test_case_08_outlier_activations_stay_finite_in_half(path, generator):
    packing = Packing.from_lengths([33, 8])
    qkv = random_qkv(41, 2, 64, torch.float16, generator)
    qkv[:, :2] *= 80.0  # scores near 8e4 before scaling: more than float16 holds, so plain torch runs in float32 here
    with backend.use_backend(path):
        out = attention(qkv, packing)
    plain, _ = reference.attention(qkv.float(), packing)
    exact, _ = reference.attention(qkv.double(), packing)
    assert_close(out, plain.half(), exact)


def test_case_11_addresses_are_64_bit_where_a_row_times_its_stride_can_overflow():
    """The bases are 64-bit, and what stays 32-bit inside a tile is bounded by `target.aligned`."""
    narrow = torch.empty(2, 3, 2, 64, dtype=torch.float16)
    assert target.aligned(narrow) is narrow
    wide = torch.empty(1, dtype=torch.float16).expand(2, 3, 2, 1).as_strided((1, 3, 2, 1), (1 << 24, 0, 0, 1))
    assert target.aligned(wide).stride(0) < 1 << 22


@pytest.mark.kernels
@pytest.mark.parametrize("sequences", [40000])
def test_case_12_more_than_65535_programs(sequences, generator, monkeypatch):
    """batch x heads beyond 65535 goes on grid x, the only axis without that limit."""
    from fastbert.kernels import attention as kernel
    from fastbert.kernels import tile_table

    seen = []

    class Recorder:
        def __getitem__(self, grid):
            seen.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(kernel, "attention_forward_kernel", Recorder())
    monkeypatch.setattr(tile_table, "tile_table_kernel", Recorder())
    packing = Packing.from_lengths([1] * sequences)
    with backend.use_backend("triton"):
        attention(random_qkv(sequences, 2, 8, torch.float16, generator), packing)
    assert [grid[1:] for grid in seen] == [(1, 1), (1, 1)]
    assert min(seen)[0] > sequences
    assert max(seen)[0] >= 2 * sequences


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("lengths", [[], [0], [0, 3, 0, 0, 2, 0]], ids=str)
def test_case_15_zero_lengths_empty_batches_and_slack(lengths, path, generator, nan_empty):
    packing = Packing.from_lengths(lengths)
    qkv = random_qkv(packing.tokens + 6, 2, 16, torch.float32, generator)
    qkv[packing.tokens :] = torch.nan
    out = check(path, qkv, packing)
    assert out.shape == (packing.tokens + 6, 2, 16)
    if path == "triton":
        assert out[packing.tokens :].isnan().all(), "slack was written"


def test_case_15_slack_gets_no_gradient(generator):
    packing = Packing.from_lengths([4, 0, 3])
    qkv = random_qkv(10, 2, 16, torch.float32, generator)
    qkv[7:] = torch.nan
    qkv.requires_grad_()
    out = attention(qkv, packing)
    out.backward(torch.randn(out.shape, generator=generator))
    assert (qkv.grad[7:] == 0).all()
    assert qkv.grad.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_case_29_strided_transposed_and_expanded_inputs(path, generator):
    packing = Packing.from_lengths([9, 4])
    wide = random_qkv(26, 4, 48, torch.float32, generator)
    views = {
        "every other row": wide[::2],
        "some heads": wide[:13, :, 1:3],
        "an unaligned base": wide[:13, :, :, 3:35],
        "heads outside": random_qkv(13, 2, 32, torch.float32, generator)
        .permute(1, 2, 0, 3)
        .contiguous()
        .permute(2, 0, 1, 3),
        "dims outside": random_qkv(13, 2, 32, torch.float32, generator).transpose(2, 3).contiguous().transpose(2, 3),
        "one row, repeated": wide[:1].expand(13, -1, -1, -1),
        "key is value": random_qkv(13, 2, 32, torch.float32, generator)[:, :1].expand(-1, 3, -1, -1),
    }
    for name, view in views.items():
        check(path, view, packing, what=name)


@pytest.mark.kernels
def test_lse_is_the_log_of_the_sum_of_exponentials(generator):
    from fastbert.kernels.attention import attention_forward as launcher

    packing = Packing.from_lengths([33, 0, 70])
    qkv = random_qkv(103, 2, 32, torch.float32, generator)
    bias = torch.zeros(1, 1, 70, 70)
    bias[:, :, 5] = -torch.inf
    slopes = {"alibi_slopes": torch.tensor([0.5, 0.01])}
    for options in ({}, slopes, {"bias": bias}):
        choice = attention_choices.attention_forward(
            32,
            qkv.dtype,
            70,
            rows=103,
            batch=3,
            extras=bool(options),
            bias="bias" in options,
            target=target.of(qkv.device),
        )
        full = options | {name: x.expand(3, 2, 70, 70) for name, x in options.items() if name == "bias"}
        tiles = tile_table(packing, choice.BLOCK_M)
        _, lse = launcher(qkv, packing.cu_seqlens, tiles, 70, scale=0.25, store_lse=True, **full)
        _, plain = reference.attention(qkv, packing, scale=0.25, **options)
        doubles = {name: x.double() for name, x in options.items()}
        _, exact = reference.attention(qkv.double(), packing, scale=0.25, **doubles)
        assert_close(lse, plain, exact)
    assert (lse[:, 5] == math.inf).all()


@pytest.mark.kernels
@pytest.mark.parametrize("arch", [name for name in target.KNOWN if name != "interpreter"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have no room for the choice of another")
def test_the_choice_of_every_target_gives_the_right_answer(arch, generator):
    packing = Packing.from_lengths([70, 129])
    with target.pretend(target.KNOWN[arch]):
        for head_dim, dtype in ((64, torch.float16), (128, torch.float16), (32, torch.float32)):
            check("triton", random_qkv(199, 1, head_dim, dtype, generator), packing)


def test_reference_gradients_against_finite_differences(generator):
    packing = Packing.from_lengths([3, 0, 4])
    qkv = torch.randn(7, 3, 2, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    keep = reference.attention_keep_mask(torch.tensor([5]), 3, 2, 4, 0.2)

    def run(qkv, bias):
        return reference.attention(qkv, packing, bias=bias, window=2, keep=keep, dropout=0.2)[0]

    assert torch.autograd.gradcheck(run, (qkv, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_on_the_torch_path_with_slack_and_empty_sequences(dtype, generator):
    packing = Packing.from_lengths([9, 0, 9, 1, 23])
    qkv = random_qkv(48, 2, 16, dtype, generator)
    qkv[packing.tokens :] = math.nan
    options = {"dropout": 0.3, "seed": torch.tensor([11])}
    torch.full((48, 2, 16), math.nan, dtype=dtype)  # freed at once: memory that is not filled shows NaN
    out = check("torch", qkv, packing, **options)
    assert (out[packing.tokens :] == 0).all()
    check_gradients("torch", qkv, packing, generator, **options)


@pytest.mark.kernels
def test_random_ragged_batches(generator):
    for _ in range(5):
        packing = Packing.from_lengths(random_lengths(6, 90, generator))
        check("triton", random_qkv(packing.tokens, 2, 32, torch.float16, generator), packing)


def backward_blocks(head_dim, dtype, max_seqlen, extras):
    here = target.of(torch.get_default_device())
    query = attention_choices.attention_backward_query(head_dim, dtype, extras=extras, target=here)
    key = attention_choices.attention_backward_key(
        head_dim, dtype, max_seqlen, dbias=extras, extras=extras, target=here
    )
    return query.BLOCK_M, key.BLOCK_N


def gradients(path, qkv, packing, dout, bias=None, relative=None, **options):
    """Gradients of qkv, of the bias and of the one of distances (None without them) by one path."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (qkv, bias, relative)]
    with backend.use_backend(path):
        attention(leaves[0], packing, bias=leaves[1], relative=leaves[2], **options).backward(dout)
    return [None if x is None else x.grad for x in leaves]


def check_gradients(path, qkv, packing, generator, bias=None, relative=None, what="", **options):
    """Hold the gradients of one path to the error rule; slack must be NaN in `qkv` and gets gradient 0."""
    tokens = packing.tokens
    dout = torch.randn(len(qkv), *qkv.shape[2:], generator=generator).to(qkv.dtype)
    got, *got_biases = gradients(path, qkv, packing, dout, bias, relative, **options)
    keep = None
    if options.get("dropout"):
        keep = reference.attention_keep_mask(
            options["seed"], packing.batch, qkv.shape[2], packing.max_seqlen, options["dropout"]
        )

    def by_reference(dtype):
        x = qkv[:tokens].to(dtype, copy=True).requires_grad_()
        biases = [
            None if b is None else b.to(torch.promote_types(b.dtype, dtype), copy=True).requires_grad_()
            for b in (bias, relative)
        ]
        out, _ = reference.attention(
            x,
            packing,
            bias=biases[0],
            relative=biases[1],
            alibi_slopes=options.get("alibi_slopes"),
            window=options.get("window"),
            keep=keep,
            dropout=options.get("dropout", 0.0),
        )
        out.backward(dout[:tokens].to(dtype))
        return x.grad, *(None if b is None else b.grad for b in biases)

    plain, *plain_biases = by_reference(qkv.dtype)
    exact, *exact_biases = by_reference(torch.float64)
    assert_close(got[:tokens], plain, exact, what=f"{what} dqkv")
    assert (got[tokens:] == 0).all(), "slack has a gradient"
    for name, *three in zip(("dbias", "drelative"), got_biases, plain_biases, exact_biases, strict=True):
        if three[0] is not None:
            assert_close(*three, what=f"{what} {name}")


def edges(*blocks):
    """Lengths around one and two of each of these blocks, and a single token."""
    return sorted({1, *(times * block + more for block in blocks for times in (1, 2) for more in (-1, 0, 1))})


@pytest.mark.kernels
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("option", ["plain", "window"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have no room for the choice of another")
def test_case_14_gradients_around_the_edges_of_the_tiles(option, arch, generator):
    """Full blocks are not masked, the tail is: of no key, of one, of all but one; behind them there is NaN."""
    options = {"window": 40} if option == "window" else {}
    with target.pretend(target.KNOWN[arch]):
        here = target.of(torch.get_default_device())
        query = attention_choices.attention_backward_query(64, torch.float16, extras=bool(options), target=here)
        key = attention_choices.attention_backward_key(
            64, torch.float16, 512, dbias=False, extras=bool(options), target=here
        )
        packing = Packing.from_lengths(edges(query.BLOCK_M, query.BLOCK_N, key.BLOCK_M, key.BLOCK_N))
        qkv = random_qkv(packing.tokens + 5, 1, 64, torch.float16, generator)
        qkv[packing.tokens :] = math.nan
        check_gradients("triton", qkv, packing, generator, what=arch, **options)


def one_pass_cases():
    return [(arch, block_d) for arch in ("sm_80", "sm_90") for block_d in (32, 64, 128)
            if (choices.family(target.KNOWN[arch]), "half", block_d) in ATTENTION_BACKWARD_ONE_PASS]  # fmt: skip


@pytest.mark.kernels
@pytest.mark.parametrize(("arch", "head_dim"), one_pass_cases())
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have no room for the choice of another")
def test_case_14_gradients_around_the_edges_of_the_tiles_of_one_pass(arch, head_dim, generator):
    with target.pretend(target.KNOWN[arch]):
        here = target.of(torch.get_default_device())
        key = attention_choices.attention_backward_key(
            head_dim, torch.float16, 1, dbias=False, extras=False, target=here
        )
        assert key.ONE_PASS
        packing = Packing.from_lengths([n for n in edges(key.BLOCK_M, key.BLOCK_N) if n <= key.BLOCK_N])
        qkv = random_qkv(packing.tokens + 5, 1, head_dim, torch.float16, generator)
        qkv[packing.tokens :] = math.nan
        check_gradients("triton", qkv, packing, generator, what=arch)


@pytest.mark.kernels
@pytest.mark.parametrize("longest", [100, 200])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have no room for the choice of another")
def test_keys_beyond_the_end_leak_nowhere(arch, longest, generator):
    """All scores near -128: for a key that is not there, which scores 0, exp(0 - lse) is beyond float32."""
    packing = Packing.from_lengths([1, 37, longest])
    qkv = random_qkv(packing.tokens, 1, 64, torch.float16, generator, scale=0.1)
    qkv[:, 0] += 4.0
    qkv[:, 1] -= 4.0
    with target.pretend(target.KNOWN[arch]):
        check_gradients("triton", qkv, packing, generator, what=arch)


class Nothing(torch.autograd.Function):
    """A function without a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return None


@pytest.mark.kernels
def test_no_gradient_from_above_is_none_below(generator):
    qkv = random_qkv(8, 2, 16, torch.float32, generator).requires_grad_()
    with backend.use_backend("triton"):
        out = Nothing.apply(attention(qkv, Packing.from_lengths([5, 3])))
    out.backward(torch.randn(out.shape, generator=generator))
    assert qkv.grad is None


def op_arguments(generator, **changes):
    packing = Packing.from_lengths([5, 3])
    values = {
        "qkv": random_qkv(8, 2, 16, torch.float32, generator),
        "cu_seqlens": packing.cu_seqlens,
        "tiles": [tile_table(packing, block) for block in (16, *backward_blocks(16, torch.float32, 5, False))],
        "max_seqlen": 5,
        "tokens": 8,
        "scale": 0.25,
        "bias": None,
        "relative": None,
        "alibi_slopes": None,
        "window": None,
        "dropout": 0.0,
        "seed": None,
    }
    return tuple((values | changes).values())


@pytest.mark.kernels
@pytest.mark.parametrize("extras", [False, True])
def test_opcheck(extras, generator):
    options = {
        "bias": torch.zeros(2, 2, 5, 5),
        "relative": torch.zeros(2, 9),
        "alibi_slopes": torch.tensor([0.5, 0.25]),
        "dropout": 0.1,
        "seed": torch.tensor([3]),
    }
    extras = options if extras else {}
    torch.library.opcheck(attention_forward, op_arguments(generator, **extras))


@pytest.mark.kernels
def test_opcheck_with_gradients(generator):
    qkv = random_qkv(8, 2, 16, torch.float32, generator).requires_grad_()
    torch.library.opcheck(attention_forward, op_arguments(generator, qkv=qkv))
    bias = torch.zeros(1, 1, 5, 5, requires_grad=True)
    tiles = [tile_table(Packing.from_lengths([5, 3]), b) for b in (16, *backward_blocks(16, torch.float32, 5, True))]
    slopes, relative = torch.tensor([0.5, 0.25]), torch.zeros(2, 11, requires_grad=True)
    for options in ({"bias": bias, "alibi_slopes": slopes}, {"bias": bias, "relative": relative}):
        torch.library.opcheck(attention_forward, op_arguments(generator, qkv=qkv, tiles=tiles, **options))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 16, 24, 32, 40, 64, 80])
def test_gradients_of_head_dims(head_dim, dtype, path, generator):
    packing = Packing.from_lengths([5, 0, 70, 33])
    qkv = random_qkv(111, 2, head_dim, dtype, generator)
    qkv[108:] = torch.nan
    check_gradients(path, qkv, packing, generator)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("length", [1, 2, 15, 17, 63, 64, 65, 128, 129])
def test_case_14_gradients_of_odd_lengths(length, path, generator):
    """Up to 128 a tile may hold every key, and one pass makes all gradients."""
    check_gradients(
        path, random_qkv(length, 1, 32, torch.float16, generator), Packing.from_lengths([length]), generator
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in EXTRAS if name != "scale"])
def test_case_25_gradients_with_options(name, dtype, path, generator):
    packing = Packing.from_lengths([37, 5, 66])
    options = options_of(name, dtype, generator)
    check_gradients(path, random_qkv(108, 2, 24, dtype, generator), packing, generator, **options)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(1, 2, 1, 37), (2, 1, 1, 37)], ids=str)
def test_case_25_gradient_of_a_bias_is_summed_over_what_it_was_spread_over(shape, path, generator):
    bias = torch.randn(shape, generator=generator)
    qkv = random_qkv(42, 2, 16, torch.float32, generator)
    check_gradients(path, qkv, Packing.from_lengths([37, 5]), generator, bias=bias)


@pytest.mark.parametrize("path", PATHS)
def test_case_01_fully_masked_row_has_zero_gradient_by_either_path(path, generator):
    packing = Packing.from_lengths([20, 7])
    qkv = random_qkv(27, 2, 16, torch.float32, generator)
    bias = torch.zeros(1, 1, 20, 20)
    bias[:, :, 3] = -torch.inf
    dqkv, dbias, _ = gradients(path, qkv, packing, torch.randn(27, 2, 16, generator=generator), bias)
    assert dqkv.isfinite().all() and dbias.isfinite().all()
    assert (dqkv[3, 0] == 0).all() and (dbias[:, :, 3] == 0).all()


@pytest.mark.long
@pytest.mark.kernels
def test_case_16_ten_backward_runs_are_bit_equal(generator):
    packing = Packing.from_lengths([70, 5, 66])
    qkv = random_qkv(141, 2, 16, torch.float16, generator)
    bias = torch.randn(1, 1, 70, 70, generator=generator).half()
    dout = torch.randn(141, 2, 16, generator=generator).half()
    relative = random_relative(2, 75, torch.float32, generator)
    options = {"relative": relative, "dropout": 0.1, "seed": torch.tensor([9])}
    first = gradients("triton", qkv, packing, dout, bias, **options)
    for _ in range(9):
        for a, b in zip(first, gradients("triton", qkv, packing, dout, bias, **options), strict=True):
            assert torch.equal(a, b)


@pytest.mark.kernels
def test_case_17_both_paths_drop_the_same_weights_in_the_backward(generator):
    packing = Packing.from_lengths([37, 20])
    qkv = random_qkv(57, 2, 16, torch.float32, generator)
    dout = torch.randn(57, 2, 16, generator=generator)
    options = {"dropout": 0.5, "seed": torch.tensor([9])}
    kernel, *_ = gradients("triton", qkv, packing, dout, **options)
    plain, *_ = gradients("torch", qkv, packing, dout, **options)
    torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_case_27_autocast_casts_float32_inputs(dtype, path, generator):
    packing = Packing.from_lengths([9, 4])
    qkv = random_qkv(13, 2, 16, torch.float32, generator).requires_grad_()
    with backend.use_backend(path), torch.autocast(qkv.device.type, dtype):
        out = attention(qkv, packing)
    assert out.dtype == dtype
    out.backward(torch.randn(out.shape, generator=generator).to(dtype))
    assert qkv.grad.dtype == torch.float32 and qkv.grad.isfinite().all()


@pytest.mark.kernels
@pytest.mark.parametrize("arch", [name for name in target.KNOWN if name != "interpreter"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have no room for the choice of another")
def test_the_backward_choice_of_every_target_gives_the_right_answer(arch, generator):
    packing = Packing.from_lengths([70, 40])
    with target.pretend(target.KNOWN[arch]):
        for head_dim, dtype in ((64, torch.float16), (32, torch.float32)):
            check_gradients("triton", random_qkv(110, 1, head_dim, dtype, generator), packing, generator, what=arch)


@pytest.mark.kernels
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_case_23_a_training_step_compiles_without_graph_breaks(compiler, generator):
    packing = Packing.from_lengths([5, 0, 9])
    qkv = random_qkv(14, 2, 16, torch.float32, generator).requires_grad_()

    def loss(qkv, packing):
        return attention(qkv * 2, packing).square().mean()

    with backend.use_backend("triton"):
        compiled = torch.compile(loss, fullgraph=True, backend=compiler)
        (got,) = torch.autograd.grad(compiled(qkv, packing), qkv)
        (expected,) = torch.autograd.grad(loss(qkv, packing), qkv)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_case_23_compiles_without_graph_breaks(compiler, path, generator):
    def run(qkv, packing, bias):
        return attention(qkv * 2, packing, bias=bias) + 1

    packing = Packing.from_lengths([5, 0, 9])
    qkv = random_qkv(14, 2, 16, torch.float32, generator)
    with backend.use_backend(path):
        compiled = torch.compile(run, fullgraph=True, backend=compiler)
        for bias in (None, torch.randn(1, 2, 9, 9, generator=generator)):
            torch.testing.assert_close(compiled(qkv, packing, bias), run(qkv, packing, bias))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_case_23_relative_compiles_without_graph_breaks(compiler, path, generator):
    def run(qkv, packing, relative):
        return attention(qkv * 2, packing, relative=relative * 2).square().mean()

    packing = Packing.from_lengths([5, 0, 9])
    qkv = random_qkv(14, 2, 16, torch.float32, generator)
    relative = random_relative(2, 9, torch.float32, generator).requires_grad_()
    with backend.use_backend(path):
        compiled = torch.compile(run, fullgraph=True, backend=compiler)
        (got,) = torch.autograd.grad(compiled(qkv, packing, relative), relative)
        (expected,) = torch.autograd.grad(run(qkv, packing, relative), relative)
    torch.testing.assert_close(got, expected)


QKV = torch.zeros(8, 3, 2, 16)
PACKING = Packing.from_lengths([5, 3])


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("qkv", lambda: attention(torch.zeros(8, 2, 2, 16), PACKING)),
        ("qkv", lambda: attention(torch.zeros(8, 96), PACKING)),
        ("qkv", lambda: attention(QKV.long(), PACKING)),
        ("qkv", lambda: attention(QKV[:7], PACKING)),
        ("packing", lambda: attention(QKV.to("meta"), PACKING)),
        ("scale", lambda: attention(QKV, PACKING, scale=0.0)),
        ("scale", lambda: attention(QKV, PACKING, scale=math.nan)),
        ("bias", lambda: attention(QKV, PACKING, bias=torch.zeros(5, 5))),
        ("bias", lambda: attention(QKV, PACKING, bias=torch.zeros(1, 1, 4, 4))),
        ("bias", lambda: attention(QKV, PACKING, bias=torch.zeros(1, 1, 5, 5, dtype=torch.bool))),
        ("relative", lambda: attention(QKV, PACKING, relative=torch.zeros(2, 7))),
        ("relative", lambda: attention(QKV, PACKING, relative=torch.zeros(2, 10))),
        ("relative", lambda: attention(QKV, PACKING, relative=torch.zeros(1, 9))),
        ("relative", lambda: attention(QKV, PACKING, relative=torch.zeros(1, 2, 9))),
        ("relative", lambda: attention(QKV, PACKING, relative=torch.zeros(2, 9, dtype=torch.int64))),
        ("relative", lambda: attention(QKV, PACKING, relative=torch.zeros(2, 9, device="meta"))),
        ("alibi_slopes", lambda: attention(QKV, PACKING, alibi_slopes=torch.zeros(3))),
        ("alibi_slopes", lambda: attention(QKV, PACKING, alibi_slopes=torch.zeros(1, 2))),
        ("alibi_slopes", lambda: attention(QKV, PACKING, alibi_slopes=torch.zeros(2, dtype=torch.float16))),
        ("alibi_slopes", lambda: attention(QKV, PACKING, alibi_slopes=torch.zeros(2, device="meta"))),
        ("alibi_slopes", lambda: attention(QKV, PACKING, alibi_slopes=torch.zeros(2, requires_grad=True))),
        ("window", lambda: attention(QKV, PACKING, window=-1)),
        ("dropout", lambda: attention(QKV, PACKING, dropout=1.0)),
        ("seed", lambda: attention(QKV, PACKING, dropout=0.1)),
        ("seed", lambda: attention(QKV, PACKING, dropout=0.1, seed=torch.tensor([1, 2]))),
        ("seed", lambda: attention(QKV, PACKING, dropout=0.1, seed=torch.tensor([1.0]))),
    ],
)
def test_bad_input_names_the_argument(argument, call):
    with pytest.raises(ArgumentError) as error:
        call()
    assert error.value.argument == argument


@pytest.mark.kernels
def test_the_triton_path_refuses_what_it_cannot_serve(generator):
    packing = Packing.from_lengths([5, 3])
    with backend.use_backend("triton"):
        with pytest.raises(BackendError, match="head_dim 264"):
            attention(torch.zeros(8, 3, 2, 264), packing)
        with pytest.raises(BackendError, match="float64"):
            attention(torch.zeros(8, 3, 2, 16, dtype=torch.float64), packing)
    assert attention(torch.zeros(8, 3, 2, 264), packing).shape == (8, 2, 264)


@pytest.mark.parametrize("length", [95, 96, 97, 190, 256])
@pytest.mark.parametrize("heads", [3, 12])
def test_long_sequences_without_gradient_on_a_cpu(heads, length, generator, nan_empty):
    """Several of one length, and others around them."""
    lengths = [5, length, length, 40, length + 1, 300]
    qkv = torch.randn(sum(lengths) + 3, 3, heads, 32, generator=generator)
    out = check("torch", qkv, Packing.from_lengths(lengths))
    assert (out[-3:] == 0).all()
