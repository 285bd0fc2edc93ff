"""The dropout generator under statistical tests, its words and its masks, and weak generators that they must refuse.

Every test gives a p-value. The seeds are fixed, so a run is one sample: a true random source has a p-value below
BOUND in one of its N tests with probability N * BOUND, below 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastbert import reference
from fastbert.reference import FOLD_M, LOW

BOUND = 1e-10
Generator = Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]  # (seed, sequence, head, row, pair) -> words


def shipped(seed: int, sequence: Tensor, head: Tensor, row: Tensor, pair: Tensor) -> Tensor:
    """The words of `reference.keep_mask`, two draws in each."""
    x, key = reference.row_words(torch.tensor(seed), row, head, sequence)
    return reference._fold(x ^ pair, key)


def one_product(seed: int, sequence: Tensor, head: Tensor, row: Tensor, pair: Tensor) -> Tensor:
    """Weak: one product of two."""
    x, key = reference.row_words(torch.tensor(seed), row, head, sequence)
    product = (x ^ pair) * FOLD_M
    return ((product >> 32) ^ product) & LOW ^ key


def no_product(seed: int, sequence: Tensor, head: Tensor, row: Tensor, pair: Tensor) -> Tensor:
    """Weak: xor and shifts in place of the products, which is linear in bits."""
    x, key = reference.row_words(torch.tensor(seed), row, head, sequence)
    x = x ^ pair
    for step in (13, -17, 5):
        x = (x ^ (x << step if step > 0 else x >> -step)) & LOW
    return x ^ key


def line(seed: int, sequence: Tensor, head: Tensor, row: Tensor, pair: Tensor) -> Tensor:
    """Weak: a linear congruence of the column."""
    x, _ = reference.row_words(torch.tensor(seed), row, head, sequence)
    return (x + pair * 1664525) & LOW


def two_sided(z: float) -> float:
    """The p-value of a standard normal value."""
    return math.erfc(abs(z) / math.sqrt(2))


def chi_square(counts: Tensor, expected: Tensor | float) -> float:
    """Upper tail of chi-square with as many degrees as counts, of counts independent of each other (their sum free)."""
    statistic = ((counts.double() - expected) ** 2 / expected).sum()
    degrees = torch.tensor(float(counts.numel()))
    return float(torch.special.gammaincc(degrees.double() / 2, statistic / 2))


def grid(generate: Generator, seed: int, sequences: int, heads: int, rows: int, pairs: int) -> Tensor:
    """Words `[sequences, heads, rows, pairs]`, indices from 0."""
    return generate(
        seed,
        torch.arange(sequences)[:, None, None, None],
        torch.arange(heads)[:, None, None],
        torch.arange(rows)[:, None],
        torch.arange(pairs),
    )


def draws_of(words: Tensor) -> Tensor:
    """16-bit draws in the order of the columns."""
    return torch.stack([words & 0xFFFF, words >> 16], -1).flatten(-2)


def rates(dropped: Tensor, rate: float) -> Iterator[tuple[str, float]]:
    """Chi-square of what is dropped along each axis of `[seeds, sequences, heads, rows, columns]`."""
    for axis, name in enumerate(("seeds", "sequences", "heads", "rows", "columns")):
        others = [i for i in range(dropped.ndim) if i != axis]
        kept = dropped.double().sum(others)
        number = dropped.numel() // dropped.shape[axis]
        yield f"rate {rate} over {name}", chi_square(kept / (1 - rate), number * rate / (1 - rate))


def correlations(dropped: Tensor, rate: float) -> Iterator[tuple[str, float]]:
    """Of each element with that a lag away along each axis."""
    centred = dropped.double() - rate
    spread = rate * (1 - rate)
    for axis, name in enumerate(("seed", "sequence", "head", "row", "column")):
        for lag in (1, 2, 3, 4, 8, 16, 32, 64):
            if lag < dropped.shape[axis]:
                length = dropped.shape[axis] - lag
                product = centred.narrow(axis, 0, length) * centred.narrow(axis, lag, length)
                z = float(product.sum()) / (spread * math.sqrt(product.numel()))
                yield f"correlation {rate} {name} lag {lag}", two_sided(z)


def avalanche(generate: Generator) -> Iterator[tuple[str, float]]:
    """One bit of the seed or of an index flipped: how often each bit of the word flips, over 2^14 places."""
    source = torch.Generator().manual_seed(1)
    number = 2**14
    bits = {"sequence": 31, "head": 16, "row": 31, "pair": 30}
    places = [torch.randint(0, 2**n, (number,), generator=source) for n in bits.values()]
    word = generate(2**40 + 12345, *places)
    for bit in range(64):
        other = (2**40 + 12345) ^ (1 << bit)
        yield f"avalanche seed bit {bit}", _flips(word ^ generate(other - 2**64 * (other >> 63), *places))
    for i, (name, width) in enumerate(bits.items()):
        for bit in range(width):
            moved = [place ^ (1 << bit) if i == j else place for j, place in enumerate(places)]
            yield f"avalanche {name} bit {bit}", _flips(word ^ generate(2**40 + 12345, *moved))


def _flips(difference: Tensor) -> float:
    counts = torch.stack([(difference >> i & 1).sum() for i in range(32)]).double()
    half = difference.numel() / 2
    z = (counts - half) / math.sqrt(half / 2)
    return float(torch.special.gammaincc(torch.tensor(16.0).double(), (z**2).sum() / 2))


def stream(words: Tensor) -> Iterator[tuple[str, float]]:
    """Tests of one long stream of words."""
    words = words.flatten()
    bits = torch.stack([words >> i & 1 for i in range(32)], -1)
    number = bits.numel()
    yield "monobit", two_sided((float(bits.sum()) - number / 2) / math.sqrt(number / 4))
    blocks = bits.flatten()[: number // 128 * 128].view(-1, 128).sum(1).double()
    statistic = ((blocks - 64) ** 2 / 32).sum()
    yield "block frequency", two_sided(float((statistic - len(blocks)) / math.sqrt(2 * len(blocks))))
    flat = bits.flatten()
    runs = float((flat[1:] != flat[:-1]).sum())
    yield "runs", two_sided((runs - (number - 1) / 2) / math.sqrt((number - 1) / 4))
    draws = draws_of(words)
    yield "draws", chi_square(torch.bincount(draws >> 4, minlength=4096), len(draws) / 4096)
    pairs = (draws[0::2] >> 10 << 6) | (draws[1::2] >> 10)
    yield "pairs of draws", chi_square(torch.bincount(pairs, minlength=4096), len(pairs) / 4096)
    hits = (draws < 6554).nonzero().flatten()
    gaps = (hits[1:] - hits[:-1] - 1).clamp(max=64)
    rate = 6554 / 65536
    law = torch.tensor([rate * (1 - rate) ** k for k in range(64)] + [(1 - rate) ** 64]).double()
    yield "gaps", chi_square(torch.bincount(gaps, minlength=65), law * len(gaps))
    yield "rank", _ranks(words)
    yield "birthdays", _birthdays(words)


def _ranks(words: Tensor) -> float:
    """Ranks over GF(2) of 32 x 32 matrices; laws of Marsaglia's test."""
    rows = words[: len(words) // 32 * 32].view(-1, 32).clone()
    rank = torch.zeros(len(rows), dtype=torch.int64)
    used = torch.zeros(rows.shape, dtype=torch.bool)
    for bit in range(32):
        has = ((rows >> bit & 1) == 1) & ~used
        found = has.any(1)
        pivot = has.int().argmax(1)
        value = rows.gather(1, pivot[:, None])
        clear = ((rows >> bit & 1) == 1) & found[:, None]
        clear.scatter_(1, pivot[:, None], False)
        rows = torch.where(clear, rows ^ value, rows)
        used.scatter_(1, pivot[:, None], used.gather(1, pivot[:, None]) | found[:, None])
        rank += found
    counts = torch.bincount((32 - rank).clamp(max=2), minlength=3)
    law = torch.tensor([0.2887880952, 0.5775761902, 0.1336357146]).double()
    return chi_square(counts, law * len(rank))


def _birthdays(words: Tensor) -> float:
    """Marsaglia's spacings: 512 birthdays in 2^24 days, Poisson with mean 2."""
    days = (words >> 8)[: len(words) // 512 * 512].view(-1, 512).sort(1).values
    spacings = days.diff(dim=1).sort(1).values
    repeats = (spacings[:, 1:] == spacings[:, :-1]).sum().double()
    mean = 2.0 * len(days)
    return two_sided(float((repeats - mean) / math.sqrt(mean)))


def battery(generate: Generator, seqlen: int) -> dict[str, float]:
    """p-values by the names of the tests."""
    seeds = (0, 1, 2, 3, -(2**63), 2**40, 2**40 + 1, 2**62)
    words = torch.stack([grid(generate, seed, 4, 4, seqlen, seqlen // 2) for seed in seeds])
    found = dict(stream(words))
    found |= {f"down the rows: {name}": p for name, p in stream(words.transpose(-1, -2).contiguous())}
    draws = draws_of(words)
    for threshold in (6554, 32768, 655):
        dropped, rate = draws < threshold, threshold / 65536
        found |= dict(rates(dropped, rate)) | dict(correlations(dropped, rate))
    return found | dict(avalanche(generate))


def refused(found: dict[str, float]) -> list[str]:
    """The tests whose p-value is too small."""
    assert len(found) * BOUND < 1e-6
    return [name for name, p in found.items() if not p >= BOUND]


def test_the_generator_passes() -> None:
    assert refused(battery(shipped, 64)) == []


@pytest.mark.long
@pytest.mark.heavy
def test_the_generator_passes_at_length() -> None:
    assert refused(battery(shipped, 192)) == []


@pytest.mark.parametrize("weak", [one_product, no_product, line])
def test_weak_generators_are_refused(weak: Generator) -> None:
    assert refused(battery(weak, 64))
