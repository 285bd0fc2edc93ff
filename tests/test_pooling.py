"""pool: both paths against float64, by the error rule."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from gradients import check_gradients, gradients

from fastbert import backend, reference
from fastbert.errors import ArgumentError, BackendError
from fastbert.ops.pooling import first_tokens, pool, pool_backward, pool_forward
from fastbert.packing import Packing
from fastbert.testing import assert_close

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATHS = ["triton", "torch"]
HOWS = ["cls", "mean", "max"]


def plainly(x, packing, how, normalise):
    """What a user of PyTorch writes, sequence by sequence, in float32."""
    by_name = {"cls": lambda rows: rows[0], "mean": lambda rows: rows.mean(0), "max": lambda rows: rows.amax(0)}
    sequences = x.float()[: packing.tokens].split(packing.lengths.tolist())
    pooled = [by_name[how](rows) if len(rows) else rows.sum(0) for rows in sequences]
    pooled = torch.stack(pooled) if pooled else x.float()[:0]
    return F.normalize(pooled) if normalise else pooled


def check(path, x, packing, how, normalise):
    """Run one path and hold it to the error rule; returns the output."""
    with backend.use_backend(path):
        out = pool(x, packing, how, normalise=normalise)
    assert out.dtype == torch.float32
    exact = reference.pool(x.double(), packing, how, normalise=normalise)
    assert_close(out, plainly(x, packing, how, normalise), exact, what=f"{path} {how}")
    return out


def states(packing, hidden, dtype, generator, device, slack=2):
    x = torch.randn(packing.tokens + slack, hidden, generator=generator).to(device, dtype)
    x[packing.tokens :] = torch.nan
    return x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 5, 0, 70, 1, 64, 0]], ids=str)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_each_branch(how, normalise, lengths, dtype, path, device, generator, nan_empty):
    """Hidden 70 is more than one block of columns and fills none; slack is NaN."""
    packing = Packing.from_lengths(lengths, device=device)
    check(path, states(packing, 70, dtype, generator, device), packing, how, normalise)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("hidden", [1, 7, 768, 1025])
def test_widths(hidden, how, normalise, path, device, generator, nan_empty):
    packing = Packing.from_lengths([3, 0, 18], device=device)
    check(path, states(packing, hidden, torch.float16, generator, device), packing, how, normalise)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("layout", ["odd base", "odd stride", "transposed", "expanded", "slice"])
def test_layouts(layout, path, device, generator):
    store = torch.randn(20, 96, generator=generator).to(device, torch.float16)
    x = {
        "odd base": store.flatten()[3 : 3 + 10 * 48].view(10, 48),
        "odd stride": store.flatten()[: 10 * 51].view(10, 51)[:, :48],
        "transposed": store.flatten()[: 10 * 48].view(48, 10).T,
        "expanded": store[:1, :48].expand(10, -1),
        "slice": store[::2, :48],
    }[layout]
    packing = Packing.from_lengths([4, 6], device=device)
    for how in HOWS:
        check(path, x, packing, how, normalise=False)
    check(path, x, packing, "mean", normalise=True)
    dout = torch.randn(2, 48, generator=generator).to(device)
    check_backward(path, x, packing, "max", True, dout)
    check_backward(path, x, packing, "mean", True, dout.T.contiguous().T)


@pytest.mark.parametrize("path", PATHS)
def test_long_sums_stay_exact_in_float32(path, device, generator):
    """1024 rows near 300 sum to more than float16 holds, and to more than bfloat16 resolves."""
    packing = Packing.from_lengths([1024, 3], device=device)
    for dtype in (torch.float16, torch.bfloat16):
        check(path, states(packing, 8, dtype, generator, device) + 300, packing, "mean", normalise=False)


@pytest.mark.parametrize("path", PATHS)
def test_maximum_of_negative_rows_is_negative(path, device):
    packing = Packing.from_lengths([2, 0], device=device)
    with backend.use_backend(path):
        assert pool(torch.tensor([[-3.0], [-2.0]], device=device), packing, "max").tolist() == [[-2.0], [0.0]]
        lowest = torch.full((2, 1), -torch.inf, device=device, requires_grad=True)
        out = pool(lowest, packing, "max")
        assert out.tolist() == [[-torch.inf], [0.0]]
        assert torch.autograd.grad(out[0, 0], lowest)[0].tolist() == [[0.5], [0.5]]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", HOWS)
def test_nan_stays_in_its_sequence_and_column(how, path, device, generator):
    packing = Packing.from_lengths([70, 70], device=device)
    x = torch.randn(140, 3, generator=generator).to(device)
    x[0, 1] = torch.nan
    with backend.use_backend(path):
        out = pool(x, packing, how)
        assert out.isnan().nonzero().tolist() == [[0, 1]]
        assert pool(x, packing, how, normalise=True).isnan().tolist() == [[True] * 3, [False] * 3]


def check_backward(path, x, packing, how, normalise, dout):
    def plain(x):
        return plainly(x.to(torch.promote_types(x.dtype, torch.float32)), packing, how, normalise)

    return check_gradients(
        path,
        lambda x: pool(x, packing, how, normalise=normalise),
        lambda y: plain(y.to(x.dtype)),
        lambda x: reference.pool(x, packing, how, normalise=normalise),
        {"x": x},
        dout,
    )["x"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(dtype, marks=pytest.mark.long) for dtype in DTYPES[1:])]
)
@pytest.mark.parametrize("lengths", [[], [0], [1], [0, 5, 0, 69, 1, 32, 0]], ids=str)
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_gradients(how, normalise, lengths, dtype, path, device, generator, nan_empty):
    packing = Packing.from_lengths(lengths, device=device)
    x = states(packing, 70, dtype, generator, device)
    dout = torch.randn(packing.batch, 70, generator=generator).to(device)
    dx = check_backward(path, x[: packing.tokens], packing, how, normalise, dout)
    with backend.use_backend(path):
        (with_slack,) = gradients(lambda x: pool(x, packing, how, normalise=normalise), [x], dout)
    assert torch.equal(with_slack[: packing.tokens], dx)
    assert not with_slack[packing.tokens :].any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("hidden", [1, 7, 769, pytest.param(2048, marks=pytest.mark.long)])
def test_gradients_of_widths(hidden, how, path, device, generator, nan_empty):
    packing = Packing.from_lengths([3, 0, 18], device=device)
    x = states(packing, hidden, torch.bfloat16, generator, device, slack=0)
    check_backward(path, x, packing, how, True, torch.randn(3, hidden, generator=generator).to(device))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("normalise", [False, True])
def test_rows_that_share_a_maximum_share_its_gradient(normalise, path, device, generator):
    """Few values on many rows: in most columns some lanes hold the maximum twice and others never."""
    packing = Packing.from_lengths([150, 3], device=device)
    x = torch.randint(-3, 4, (153, 5), generator=generator).to(device, torch.float32)
    x[:150, 0], x[7, 1], x[[140, 149], 1] = 0.0, 9.0, 9.0
    x[[3, 90], 4] = torch.nan
    dout = torch.randn(2, 5, generator=generator).to(device)
    with backend.use_backend(path):
        (dx,) = gradients(lambda x: pool(x, packing, "max"), [x], dout)
        (normal,) = gradients(lambda x: pool(x, packing, "max", normalise=normalise), [x[:, :4]], dout[:, :4])
    assert dx[[3, 90], 4].tolist() == [dout[0, 4].item() / 2] * 2
    assert int((dx[:150, 4] != 0).sum()) == 2
    torch.testing.assert_close(dx[:150, 0], dout[0, 0].expand(150) / 150)
    assert dx[:150, 1].nonzero().flatten().tolist() == [7, 140, 149]
    exact = x[:, :4].double().requires_grad_()
    out = reference.pool(exact, packing, "max", normalise=normalise)
    (wanted,) = torch.autograd.grad(out, exact, dout[:, :4].double())
    torch.testing.assert_close(normal, wanted.float())


@pytest.mark.parametrize("path", PATHS)
def test_a_zero_vector_stays_zero_and_its_gradient_is_that_of_torch(path, device, generator):
    packing = Packing.from_lengths([2, 2], device=device)
    x = torch.randn(4, 5, generator=generator).to(device)
    x[1] = -x[0]
    dout = torch.randn(2, 5, generator=generator).to(device)
    with backend.use_backend(path):
        assert not pool(x, packing, "mean", normalise=True)[0].any()
        (dx,) = gradients(lambda x: pool(x, packing, "mean", normalise=True), [x], dout)
    (wanted,) = gradients(lambda x: plainly(x, packing, "mean", True), [x], dout)
    torch.testing.assert_close(dx, wanted)


@pytest.mark.long
@pytest.mark.parametrize("how", HOWS)
def test_ten_runs_are_bit_equal(how, device, generator):
    packing = Packing.from_lengths([70, 5], device=device)
    x = states(packing, 70, torch.float32, generator, device, slack=0)
    dout = torch.randn(2, 70, generator=generator).to(device)
    with backend.use_backend("triton"):
        run = partial(pool, packing=packing, how=how, normalise=True)
        first, *others = ([run(x), *gradients(run, [x], dout)] for _ in range(10))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_float64(how, normalise, generator):
    packing = Packing.from_lengths([3, 0, 4])
    x = torch.randn(8, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    assert pool(x, packing, how).dtype == torch.float64
    with torch.no_grad():
        x[4:7] = x[4:7] * 3
    assert torch.autograd.gradcheck(lambda x: pool(x, packing, how)[[0, 2]], (x,))
    if normalise:  # of a zero vector the derivative is 1e12
        run = partial(pool, packing=packing, how=how, normalise=True)
        assert torch.autograd.gradcheck(lambda x: run(x)[[0, 2]], (x,))


@pytest.mark.parametrize("path", PATHS)
def test_first_tokens_keeps_the_dtype(path, device):
    packing = Packing.from_lengths([0, 2], device=device)
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float16, device=device)
    with backend.use_backend(path):
        assert first_tokens(x, packing).dtype == torch.float16
        assert first_tokens(x, packing).tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize(
    ("argument", "x", "how"),
    [
        ("how", torch.ones(2, 3), "median"),
        ("x", torch.ones(1, 3), "mean"),
        ("x", torch.ones(2), "cls"),
        ("x", torch.ones(2, 3, dtype=torch.int64), "max"),
        ("packing", torch.ones(2, 3, device="meta"), "max"),
    ],
)
def test_bad_input(argument, x, how):
    with pytest.raises(ArgumentError) as raised:
        pool(x, Packing.from_lengths([2]), how)
    assert raised.value.argument == argument


def test_too_wide_for_the_kernel(device):
    packing = Packing.from_lengths([1], device=device)
    with backend.use_backend("triton"), pytest.raises(BackendError, match="wider than 8192"):
        pool(torch.zeros(1, 8193, device=device), packing, "mean")


def test_the_op_without_the_norm_has_no_gradient(device, generator):
    packing = Packing.from_lengths([2], device=device)
    x = torch.randn(2, 8, generator=generator).to(device).requires_grad_()
    out = pool_forward(x, packing.cu_seqlens, "mean", True, False)[0]
    with pytest.raises(BackendError, match="store_norm=True"):
        out.backward(torch.ones_like(out))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("how", HOWS)
def test_a_step_compiles_to_one_graph(how, path, device, generator):
    packing = Packing.from_lengths([3, 0, 4], device=device)
    x = states(packing, 24, torch.float32, generator, device, slack=0)
    dout = torch.randn(3, 24, generator=generator).to(device)
    run = partial(pool, packing=packing, how=how, normalise=True)
    torch._dynamo.reset()
    with backend.use_backend(path):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(gradients(compiled, [x], dout), gradients(run, [x], dout))


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("normalise", [False, True])
def test_opcheck(how, normalise, device, generator):
    packing = Packing.from_lengths([3, 0, 4], device=device)
    x = states(packing, 24, torch.float32, generator, device, slack=0)
    torch.library.opcheck(pool_forward, (x, packing.cu_seqlens, how, normalise, False))
    out, norm = pool_forward(x, packing.cu_seqlens, how, normalise, True)
    dout = torch.randn(3, 24, generator=generator).to(device)
    saved = (out if normalise else None, norm, x if how == "max" else None, packing.cu_seqlens)
    torch.library.opcheck(pool_backward, (dout, *saved, 7, torch.float32, how, normalise))
    leaf = x.clone().requires_grad_()
    torch.library.opcheck(pool_forward, (leaf, packing.cu_seqlens, how, normalise, True))
