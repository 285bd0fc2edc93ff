"""The mends of Triton's interpreter are right, and still needed."""

import interpreter
import pytest
import torch
import triton
import triton.language as tl

from fastbert.kernels import target

pytestmark = pytest.mark.skipif(not target.interpreted(), reason="kernels are compiled here, not interpreted")


@triton.jit
def cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(x_ptr + index)  # [SIZE]
    tl.store(out_ptr + index, x.to(out_ptr.dtype.element_ty))  # [SIZE]


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile))  # [SIZE, SIZE]
    tl.store(out_ptr + tile, product)


def narrowed(x):
    out = torch.empty(len(x), dtype=torch.bfloat16)
    cast_kernel[(1,)](x, out, SIZE=len(x))
    return out


def multiplied(generator):
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, SIZE=16)
    return out, (a.double() @ b.double()).float()


def hard_values(generator):
    """Random bits, so every exponent; values half way between two bfloat16; the largest; infinities and NaN."""
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator, dtype=torch.int64).to(torch.int32)
    halfway = (bits[:2048] & ~0xFFFF) | 0x8000
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45]).repeat(256)
    return torch.cat([bits[:2048].view(torch.float32), halfway.view(torch.float32), special, special.neg()])


def test_float32_to_bfloat16_rounds_to_nearest_even(generator):
    x = hard_values(generator)
    assert torch.equal(torch.nan_to_num(narrowed(x)), torch.nan_to_num(x.bfloat16()))
    assert torch.equal(narrowed(x).isnan(), x.isnan())


def test_every_bfloat16_widens_to_its_own_value():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    out = torch.empty(len(x))
    cast_kernel[(1,)](x, out, SIZE=len(x))
    assert torch.equal(torch.nan_to_num(out), torch.nan_to_num(x.float()))
    assert torch.equal(out.isnan(), x.isnan())


def test_bfloat16_dot(generator):
    actual, expected = multiplied(generator)
    torch.testing.assert_close(actual, expected)


def test_the_mend_of_casts_is_needed(generator):
    x = hard_values(generator)
    with interpreter.without("cast_impl"):
        wrong = not torch.equal(torch.nan_to_num(narrowed(x)), torch.nan_to_num(x.bfloat16()))
    assert wrong, "Triton's interpreter rounds to bfloat16 by itself now: remove cast_impl from tests/interpreter.py"


def test_the_mend_of_dots_is_needed(generator):
    with interpreter.without("create_dot"):
        actual, expected = multiplied(generator)
    wrong = not torch.allclose(actual, expected, atol=1e-2)
    assert wrong, "Triton's interpreter multiplies bfloat16 by itself now: remove create_dot from tests/interpreter.py"


def in_e4m3(x):
    out = torch.empty(len(x), dtype=torch.float8_e4m3fn)
    cast_kernel[(1,)](x, out, SIZE=len(x))
    return out.float()


def test_the_mend_of_float8_is_right_and_needed(generator):
    """Up to 448; beyond, hardware saturates and torch gives NaN, and no kernel goes there."""
    x = (torch.randn(4096, generator=generator) * torch.logspace(-4, 2, 4096)).clamp(-448, 448)
    assert torch.equal(in_e4m3(x), x.to(torch.float8_e4m3fn).float())
    with interpreter.without("create_fp_to_fp"):
        wrong = not torch.equal(in_e4m3(x), x.to(torch.float8_e4m3fn).float())
    assert wrong, (
        "Triton's interpreter rounds to float8 by itself now: remove create_fp_to_fp from tests/interpreter.py"
    )


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x, y, z = tl.load(x_ptr + index), tl.load(y_ptr + index), tl.load(z_ptr + index)  # [SIZE]
    tl.store(out_ptr + index, tl.fma(x, y, z))  # [SIZE]


@triton.jit
def difference_kernel(x_ptr, y_ptr, z_ptr, out_ptr, SIZE: tl.constexpr, PRODUCT_FIRST: tl.constexpr):
    """x * y - z or z - x * y, of which x * y stands in a column."""
    index = tl.arange(0, SIZE)
    column = (tl.load(x_ptr + index) * tl.load(y_ptr + index))[:, None]  # [SIZE, 1]
    z = tl.load(z_ptr + index)[:, None]  # [SIZE, 1]
    out = column - z if PRODUCT_FIRST else z - column
    tl.store(out_ptr + index[:, None], out)  # [SIZE, 1]


def rounding_of_a_product(generator):
    """x, y, their product as it is rounded, and what that rounding took off: what a fused `x * y - z` gives."""
    x, y = torch.randn(2, 256, generator=generator)
    rest = (x.double() * y.double() - (x * y).double()).float()
    assert rest.any()
    return x, y, x * y, rest


def test_the_mend_of_fma_is_right_and_needed(generator):
    x, y, z, rest = rounding_of_a_product(generator)
    out = torch.empty_like(x)
    fma_kernel[(1,)](x, y, -z, out, SIZE=256)
    assert torch.equal(out, rest)
    with interpreter.without("create_fma"):
        fma_kernel[(1,)](x, y, -z, out, SIZE=256)
    assert not out.any(), "Triton's interpreter fuses tl.fma by itself now: remove create_fma from tests/interpreter.py"


def test_products_are_contracted_when_asked(generator):
    x, y, z, rest = rounding_of_a_product(generator)
    out = torch.empty_like(x)
    for product_first, wanted in ((True, rest), (False, -rest)):
        difference_kernel[(1,)](x, y, z, out, SIZE=256, PRODUCT_FIRST=product_first)
        assert not out.any()
        with interpreter.contracting():
            difference_kernel[(1,)](x, y, z, out, SIZE=256, PRODUCT_FIRST=product_first)
        assert torch.equal(out, wanted)
