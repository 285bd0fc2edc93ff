"""pieces: GELU, moments and the dropout mask, each alone in a small kernel."""

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from fastbert import reference
from fastbert.kernels import choices
from fastbert.kernels.dropout import drop_threshold
from fastbert.kernels.pieces import (
    gelu_erf,
    gelu_erf_and_gradient,
    gelu_erf_half,
    gelu_erf_half_and_gradient,
    gelu_tanh,
    gelu_tanh_and_gradient,
    keep_mask,
    moments,
    normalise,
    normalise_gradient,
)
from fastbert.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's: exp2 goes to infinity on purpose

HALF = [torch.float16, torch.bfloat16]


@triton.jit
def gelu_kernel(x_ptr, out_ptr, SIZE: tl.constexpr, FORM: tl.constexpr):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    z = tl.load(x_ptr + index).to(tl.float32)  # [SIZE]
    if FORM == "erf":
        out = gelu_erf(z)
    elif FORM == "erf_half":
        out = gelu_erf_half(z)
    elif FORM == "erf_gradient":
        _, out = gelu_erf_and_gradient(z)
    elif FORM == "erf_half_gradient":
        _, out = gelu_erf_half_and_gradient(z)
    elif FORM == "tanh_gradient":
        _, out = gelu_tanh_and_gradient(z)
    elif FORM == "erf_beside":
        out, _ = gelu_erf_and_gradient(z)
    elif FORM == "erf_half_beside":
        out, _ = gelu_erf_half_and_gradient(z)
    elif FORM == "tanh_beside":
        out, _ = gelu_tanh_and_gradient(z)
    else:
        out = gelu_tanh(z)
    tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty))  # [SIZE]


def gelu(x, form, dtype=None):
    out = torch.full_like(x, torch.nan, dtype=dtype or x.dtype)
    gelu_kernel[(len(x) // 1024,)](x, out, SIZE=1024, FORM=form)
    return out


def every(dtype, device):
    """All finite values of a 16-bit type, padded with zeros to a multiple of 1024."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=device).to(torch.int16)
    x = bits.view(dtype)
    return torch.where(x.isfinite(), x, 0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("form", "approximate"),
    [("erf_half", "none"), ("tanh", "tanh"), ("erf_half_beside", "none"), ("tanh_beside", "tanh")],
)
def test_gelu_of_every_half_value_by_the_error_rule(dtype, form, approximate, device):
    x = every(dtype, device)
    for low, high in ((-torch.inf, torch.inf), (-40.0, 40.0), (-torch.inf, -1.0), (-torch.inf, -4.0), (-40.0, -6.0)):
        some = x[(x >= low) & (x <= high)]
        some = F.pad(some, (0, -len(some) % 1024), value=some[0].item())
        exact = reference.bias_gelu(some.double(), None, approximate=approximate)
        plain = reference.bias_gelu(some, None, approximate=approximate)
        assert_close(gelu(some, form), plain, exact, what=f"{form} on [{low}, {high}]")


@pytest.mark.parametrize("dtype", HALF)
def test_erf_half_is_exact_to_the_rounding_of_its_type(dtype, device):
    """In float32 within 3.3e-7 of the truth for every half value, and after rounding within a step of it."""
    x = every(dtype, device)
    z = x.double()
    exact = z * 0.5 * torch.special.erfc(-z * 0.5**0.5)  # erfc: the reference's 1 + erf has no deep tail
    assert (gelu(x, "erf_half", torch.float32).double() - exact).abs().max() < 3.3e-7
    step = torch.finfo(dtype).eps * exact.abs()
    assert ((gelu(x, "erf_half").double() - exact).abs() <= step + 3.3e-7).all()


@pytest.mark.parametrize("dtype", HALF)
def test_erf_half_keeps_the_deep_negative_tail(dtype, device):
    """Relative error up to 3.2e-2 where erf in float32 has lost all digits, besides the rounding."""
    x = every(dtype, device)
    x = F.pad(x[(x < -5.0) & (x > -12.0)], (0, 8192))[:8192]
    z = x.double()
    exact = z * 0.5 * torch.special.erfc(-z * 0.5**0.5)
    rounding = torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert ((gelu(x, "erf_half").double() - exact).abs() <= 0.032 * exact.abs() + rounding).all()


@pytest.mark.parametrize("form", ["erf", "erf_half", "tanh", "erf_beside", "erf_half_beside", "tanh_beside"])
def test_gelu_far_out_keeps_infinity_and_nan(form, device):
    x = torch.zeros(1024, device=device)
    x[:4] = torch.tensor([torch.inf, torch.nan, 1e30, -1e30])
    out = gelu(x, form)
    assert out[0] == torch.inf
    assert out[1].isnan()
    assert out[2] == torch.tensor(1e30)
    assert out[3] == 0


@pytest.mark.parametrize(
    ("form", "approximate"), [("erf", "none"), ("tanh", "tanh"), ("erf_beside", "none"), ("tanh_beside", "tanh")]
)
def test_gelu_in_float32_by_the_error_rule(form, approximate, device, generator):
    for scale in (0.1, 1.0, 10.0):
        x = (torch.randn(4096, generator=generator) * scale).to(device)
        exact = reference.bias_gelu(x.double(), None, approximate=approximate)
        assert_close(gelu(x, form), reference.bias_gelu(x, None, approximate=approximate), exact, what=f"x{scale}")


def derivative(z, approximate):
    z = z.clone().requires_grad_()
    return torch.autograd.grad(reference.bias_gelu(z, None, approximate=approximate).sum(), z)[0]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("form", "approximate"), [("erf_half_gradient", "none"), ("tanh_gradient", "tanh")])
def test_gelu_gradient_of_every_half_value(dtype, form, approximate, device):
    """In float32 within 6e-7 of the truth, and after rounding within a step of it."""
    x = every(dtype, device)
    x = torch.where(x.abs() < 1e4, x, 0)  # beyond, the reference's cube overflows on its way to 0 or 1
    exact = derivative(x.double(), approximate)
    assert (gelu(x, form, torch.float32).double() - exact).abs().max() < 6e-7
    step = torch.finfo(dtype).eps * exact.abs()
    assert ((gelu(x, form).double() - exact).abs() <= step + 6e-7).all()


@pytest.mark.parametrize(("form", "approximate"), [("erf_gradient", "none"), ("tanh_gradient", "tanh")])
def test_gelu_gradient_in_float32_by_the_error_rule(form, approximate, device, generator):
    for scale in (0.1, 1.0, 10.0):
        x = (torch.randn(4096, generator=generator) * scale).to(device)
        exact = derivative(x.double(), approximate)
        assert_close(gelu(x, form), derivative(x, approximate), exact, what=f"x{scale}")


@pytest.mark.parametrize("form", ["erf_gradient", "erf_half_gradient", "tanh_gradient"])
def test_gelu_gradient_far_out_is_0_or_1_and_keeps_nan(form, device):
    x = torch.zeros(1024, device=device)
    x[:5] = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30, torch.nan])
    out = gelu(x, form)
    assert out[:4].tolist() == [1.0, 0.0, 1.0, 0.0]
    assert out[4].isnan()
    assert out[5] == 0.5


@triton.jit
def moments_kernel(
    x_ptr, mean_ptr, variance_ptr, centred_ptr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (column < WIDTH)[None, :]
    x = tl.load(x_ptr + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)  # [ROWS, BLOCK]
    mean, centred, variance = moments(x, mask, WIDTH)
    tl.store(mean_ptr + row, mean)  # [ROWS]
    tl.store(variance_ptr + row, variance)  # [ROWS]
    tl.store(centred_ptr + row[:, None] * BLOCK + column[None, :], centred)  # [ROWS, BLOCK]


@pytest.mark.parametrize("width", [1, 7, 8, 48, 769])
def test_moments(width, device, generator):
    x = (torch.randn(2, width, generator=generator) + 1000.0).to(device)
    block = choices.row_block(width)
    mean, variance = torch.full((2, 2), torch.nan, device=device)
    centred = torch.full((2, block), torch.nan, device=device)
    moments_kernel[(1,)](x, mean, variance, centred, WIDTH=width, ROWS=2, BLOCK=block)
    exact = x.double()
    assert_close(mean, x.mean(1), exact.mean(1), what="mean")
    # The mean is rounded in its last place, so a centred value may be off by that much, and the variance by its square.
    place = 1000.0 * torch.finfo(torch.float32).eps
    true_variance = exact.var(1, correction=0)
    assert (centred[:, :width].double() - (exact - exact.mean(1, keepdim=True))).abs().max() < 2 * place
    assert (variance.double() - true_variance).abs().max() < 1e-6 * true_variance.max() + (2 * place) ** 2
    assert not centred[:, width:].any()


@triton.jit
def keep_kernel(
    seed_ptr, out_ptr, first_row, first_column, head, sequence, drop_threshold, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = first_row + tl.arange(0, ROWS)
    keep = keep_mask(tl.load(seed_ptr), rows, first_column, head, sequence, drop_threshold, BLOCK)  # [ROWS, BLOCK]
    tile = tl.arange(0, ROWS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(out_ptr + tile, keep.to(tl.int8))


def drawn(seed, first_row, first_column, head, sequence, dropout, rows, block):
    out = torch.full((rows, block), 7, dtype=torch.int8, device=seed.device)
    threshold = drop_threshold(dropout)
    keep_kernel[(1,)](seed, out, first_row, first_column, head, sequence, threshold, ROWS=rows, BLOCK=block)
    return out


SEEDS = [0, 1, -1, 2**40 + 3, -(2**62) - 12345]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("first_row", "first_column", "head", "sequence", "dropout", "rows", "block"),
    [
        (0, 0, 0, 0, 0.5, 1, 8),
        (5, 0, 0, 0, 0.1, 1, 1024),
        (1, 8, 1, 1, 0.3, 2, 16),
        (2**31 - 100, 512, 11, 70000, 0.1, 32, 64),
        (128, 96, 3, 2, 2**-16, 64, 32),
        (7, 40, 0, 5, 0.9999, 16, 128),
    ],
)
def test_keep_mask_has_the_bits_of_the_reference(
    seed, first_row, first_column, head, sequence, dropout, rows, block, device
):
    seed = torch.tensor([seed], device=device)
    row = torch.arange(first_row, first_row + rows, device=device)[:, None]
    column = torch.arange(first_column, first_column + block, device=device)
    expected = reference.keep_mask(seed, row, column, dropout, head=head, sequence=sequence)
    keep = drawn(seed, first_row, first_column, head, sequence, dropout, rows, block)
    assert torch.equal(keep, expected.to(torch.int8))


@pytest.mark.parametrize("dropout", [0.0, 2**-16, 0.1, 0.5, 0.99999])
@pytest.mark.parametrize("width", [1, 7, 8, 29])
def test_masks_of_whole_rows_have_the_bits_of_keep_mask(width, dropout):
    seed = torch.tensor([-(2**62) + 12345])
    row, column = torch.arange(5)[:, None], torch.arange(width)
    assert torch.equal(
        reference.hidden_keep_mask(seed, 5, width, dropout), reference.keep_mask(seed, row, column, dropout)
    )
    sequence, head, place = torch.arange(3)[:, None], torch.arange(2)[:, None, None], torch.arange(width)[:, None]
    expected = reference.keep_mask(seed, place, column, dropout, head=head, sequence=sequence[..., None, None])
    assert torch.equal(reference.attention_keep_mask(seed, 3, 2, width, dropout), expected)


def test_keep_mask_does_not_depend_on_the_tile(device):
    seed = torch.tensor([42], device=device)
    whole = drawn(seed, 0, 0, 2, 3, 0.4, 32, 64)
    for rows, block in ((1, 8), (8, 32), (32, 16)):
        tiles = [
            torch.cat([drawn(seed, r, c, 2, 3, 0.4, rows, block) for c in range(0, 64, block)], 1)
            for r in range(0, 32, rows)
        ]
        assert torch.equal(torch.cat(tiles), whole)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_keep_rate_by_chi_square(dropout, device):
    """In all, for each of the eight draws of a call, and for pairs of neighbours, which must be independent."""
    keep = drawn(torch.tensor([2018], device=device), 0, 0, 0, 0, dropout, 512, 512).double().cpu()
    rate = 1 - drop_threshold(dropout) / 65536
    spread = rate * (1 - rate)
    for lane in range(8):
        kept = keep[:, lane::8]
        assert (kept.sum() - kept.numel() * rate) ** 2 / (kept.numel() * spread) < 15.1  # p = 1e-4, one degree
    for first, second in ((keep[:, :-1], keep[:, 1:]), (keep[:-1], keep[1:]), (keep[:, :-8], keep[:, 8:])):
        both = (first * second).sum()
        expected = first.numel() * rate**2
        assert (both - expected) ** 2 / (expected * (1 - rate**2)) < 30  # neighbours overlap, which widens the law


@triton.jit
def normalise_kernel(x_ptr, weight_ptr, bias_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    x = tl.load(x_ptr + column, mask=mask, other=0.0)[None, :]  # [1, BLOCK]
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0)  # [BLOCK]
    bias = tl.load(bias_ptr + column, mask=mask, other=0.0)  # [BLOCK]
    out, _, _ = normalise(x, mask[None, :], weight, bias, eps, WIDTH)
    tl.store(out_ptr + column[None, :], out, mask=mask[None, :])  # [1, BLOCK]


def test_normalise(device, generator):
    x, weight, bias = torch.randn(3, 48, generator=generator).to(device)
    out = torch.full((48,), torch.nan, device=device)
    normalise_kernel[(1,)](x, weight, bias, out, 1e-12, WIDTH=48, BLOCK=64)
    exact = reference.layer_norm(x.double(), weight.double(), bias.double(), eps=1e-12)
    assert_close(out, reference.layer_norm(x, weight, bias, eps=1e-12), exact)


@triton.jit
def normalise_gradient_kernel(
    dout_ptr, normal_ptr, weight_ptr, rstd_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.arange(0, 2)
    column = tl.arange(0, BLOCK)
    mask = column < WIDTH
    at = row[:, None] * WIDTH + column[None, :]
    dout = tl.load(dout_ptr + at, mask=mask[None, :], other=0.0)  # [2, BLOCK]
    normal = tl.load(normal_ptr + at, mask=mask[None, :], other=7.0)  # [2, BLOCK]
    weight = tl.load(weight_ptr + column, mask=mask, other=0.0)  # [BLOCK]
    out = normalise_gradient(dout, normal, mask[None, :], weight, tl.load(rstd_ptr + row), WIDTH)
    tl.store(out_ptr + at, out, mask=mask[None, :])  # [2, BLOCK]


def test_normalise_gradient(device, generator):
    """Columns beyond the width hold 7 in `normal`: whatever is there does not count."""
    x, dout = torch.randn(2, 2, 48, generator=generator).to(device)
    weight = torch.randn(48, generator=generator).to(device)
    centred = x.double() - x.double().mean(1, keepdim=True)
    rstd = (centred.square().mean(1) + 1e-5).rsqrt()
    normal = (centred * rstd[:, None]).float()
    out = torch.full_like(x, torch.nan)
    normalise_gradient_kernel[(1,)](dout, normal, weight, rstd.float(), out, WIDTH=48, BLOCK=64)

    def by_autograd(dtype):
        leaf = x.to(dtype).requires_grad_()
        normed = reference.layer_norm(leaf, weight.to(dtype), torch.zeros(48, dtype=dtype, device=device), eps=1e-5)
        return torch.autograd.grad(normed, leaf, dout.to(dtype))[0]

    assert_close(out, by_autograd(torch.float32), by_autograd(torch.float64))
