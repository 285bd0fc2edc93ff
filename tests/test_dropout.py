"""Dropout of plain torch; that of the kernels is tested with each kernel."""

from __future__ import annotations

import pytest
import torch

from fastbert import reference
from fastbert.kernels.dropout import drop_scale, drop_threshold
from fastbert.ops import dropout
from fastbert.ops.dropout import drop, keep_lines

SEEDS = [0, 1, 2**63 - 1, -(2**63), 0x9E3779B97F4A7C15 - 2**64]


@pytest.mark.parametrize("at_once", [1, 24, 2**16])
@pytest.mark.parametrize("columns", [1, 8, 19, 64])
def test_lines_are_those_of_the_reference(columns, at_once, monkeypatch):
    monkeypatch.setattr(dropout, "PAIRS_AT_ONCE", at_once)
    row = torch.tensor([0, 1, 7, 2**31, 2**32 - 1, 5, 5])
    head = torch.tensor([0, 3, 2**32 - 1, 1, 0, 5, 5])
    sequence = torch.tensor([0, 0, 2, 70_000, 2**32 - 1, 5, 6])
    for seed in SEEDS:
        expected = reference.keep_mask(
            torch.tensor([seed]),
            row[:, None],
            torch.arange(columns),
            0.3,
            head=head[:, None],
            sequence=sequence[:, None],
        )
        actual = keep_lines(torch.tensor([seed]), row, head, sequence, columns, 0.3)
        assert actual.dtype == torch.int8 and torch.equal(actual.bool(), expected)


def test_no_lines():
    none = torch.arange(0)
    assert keep_lines(torch.tensor([1]), none, none, none, 9, 0.5).shape == (0, 9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_drop_and_its_gradient(dtype, generator):
    x = torch.randn(33, 70, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(33, 70, generator=generator).to(dtype)
    seed = torch.tensor([9])
    out = drop(x, seed, 0.25)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    keep = reference.hidden_keep_mask(seed, 33, 70, 0.25)
    assert 0.1 < (~keep).double().mean() < 0.4
    for actual, given in ((out, x.detach()), (gradient, upstream)):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, (given.double() * keep * drop_scale(0.25)).to(dtype))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_keep_rate_by_chi_square(rate):
    """Over seeds, over lines and over columns, 64 of each: within five deviations of what honest draws give."""
    zero, row = torch.tensor(0), torch.arange(64)
    kept = torch.stack([keep_lines(torch.tensor([seed]), row, zero, zero, 64, rate) for seed in range(64)]).double()
    for over in ((0, 1), (0, 2), (1, 2)):
        expected = 64 * 64 * (1 - rate)
        statistic = ((kept.sum(over) - expected) ** 2 / (expected * rate)).sum().item()
        assert abs(statistic - 64) < 5 * (2 * 64) ** 0.5


@pytest.mark.parametrize(
    ("dropout", "threshold"), [(0.0, 0), (2**-17, 0), (2**-16, 1), (0.1, 6554), (0.5, 32768), (0.9999999, 65535)]
)
def test_drop_threshold_and_scale(dropout, threshold):
    assert drop_threshold(dropout) == threshold
    assert drop_scale(dropout) == pytest.approx(1 / (1 - threshold / 65536), rel=1e-12)
