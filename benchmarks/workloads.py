"""The batches that benchmarks run on, in one registry: `WORKLOADS`, by name.

A name says all there is: model, batch, longest sequence and mix of lengths, as in "minilm b32 s128 uniform". The grids
are those that others publish on, so that figures can be laid beside theirs:

- TENSORRT: demo/BERT of NVIDIA's TensorRT, every sequence of full length.
- BYTETRANSFORMER: the README of ByteTransformer, mean length 0.6 of the longest.
- KERNL: the benchmarks of kernl, every sequence of full length.
- FLASH_ATTENTION: benchmark_flash_attention.py, 16k tokens and 2048 columns in any case; attention only.
- MIXES: BERT-base, BERT-large and MiniLM with lengths that are full, uniform, or have a long tail as texts do.
- ROWS: those of them that are full, for ops on rows, to which only the number of tokens matters.
- LATENCY: one sequence.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import NormalDist

VOCABULARY = 30522  # of all three models
POSITIONS = 512  # and more where a workload needs them


@dataclass(frozen=True)
class Model:
    """A shape."""

    hidden: int
    heads: int
    intermediate: int
    layers: int


MODELS = {
    "minilm": Model(384, 12, 1536, 6),
    "bert-base": Model(768, 12, 3072, 12),
    "bert-large": Model(1024, 16, 4096, 24),
    "flash hd64": Model(2048, 32, 8192, 1),
    "flash hd128": Model(2048, 16, 8192, 1),
}


@dataclass(frozen=True)
class Workload:
    """A batch for a model of some shape.

    Attributes:
        name: unique.
        model: a key of `MODELS`, whose sizes follow.
        lengths: tokens of each sequence, none of them 0.
        full: whether it runs under `--full` only.
    """

    name: str
    model: str
    hidden: int
    heads: int
    head_dim: int
    intermediate: int
    layers: int
    lengths: tuple[int, ...]
    full: bool

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences together."""
        return sum(self.lengths)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    @property
    def padded_tokens(self) -> int:
        """Places of the grid that padding makes of the batch."""
        return self.batch * self.max_seqlen


def full(batch: int, longest: int) -> tuple[int, ...]:
    """Every sequence is as long as the longest."""
    return (longest,) * batch


def uniform(batch: int, longest: int) -> tuple[int, ...]:
    """Any length is as likely as any other."""
    return _shuffled([1 + i * (longest - 1) // max(batch - 1, 1) for i in range(batch)])


def mean_06(batch: int, longest: int) -> tuple[int, ...]:
    """ByteTransformer's: the mean is 0.6 of the longest; evenly spread from 0.2 to 1. One sequence is all mean."""
    if batch == 1:
        return (round(0.6 * longest),)
    return _shuffled([round(longest * (0.2 + 0.8 * i / (batch - 1))) for i in range(batch)])


def long_tail(batch: int, longest: int) -> tuple[int, ...]:
    """As texts are: most are short and a few are as long as is allowed.

    Quantiles of a log-normal law of median an eighth of `longest` and deviation 1, cut off at both ends.
    """
    lengths = []
    for i in range(batch):
        drawn = longest / 8 * math.exp(NormalDist().inv_cdf((i + 0.5) / batch))
        lengths.append(min(longest, max(2, round(drawn))))
    return _shuffled([*lengths[:-1], longest])


def _shuffled(lengths: list[int]) -> tuple[int, ...]:
    random.Random(0).shuffle(lengths)
    return tuple(lengths)


MIX: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "full": full,
    "uniform": uniform,
    "mean 0.6": mean_06,
    "long tail": long_tail,
}

# What runs without `--full`: under 10 minutes on two cores, all benchmarks together.
DEFAULT = {
    "minilm b16 s128 full",
    "minilm b32 s128 long tail",
    "minilm b1 s16 full",
    "minilm b1 s128 full",
    "bert-base b8 s128 full",
}


def workload(name: str, model: str, lengths: Iterable[int], *, full: bool = False) -> Workload:
    """A workload with the sizes of a model of `MODELS`."""
    shape = MODELS[model]
    head_dim = shape.hidden // shape.heads
    sizes = shape.hidden, shape.heads, head_dim, shape.intermediate, shape.layers
    return Workload(name, model, *sizes, tuple(lengths), full)


def _workload(model: str, batch: int, longest: int, mix: str) -> Workload:
    name = f"{model} b{batch} s{longest} {mix}"
    return workload(name, model, MIX[mix](batch, longest), full=name not in DEFAULT)


TENSORRT = [
    _workload(model, batch, longest, "full")
    for model in ("bert-base", "bert-large")
    for longest in (128, 384)
    for batch in (1, 2, 4, 8, 16, 32, 64, 128)
]
BYTETRANSFORMER = [
    _workload("bert-base", batch, longest, "mean 0.6") for batch in (1, 16) for longest in range(64, 1025, 64)
]
KERNL = [
    _workload("bert-base", batch, longest, "full")
    for batch in (1, 8, 32)
    for longest in (16, 32, 64, 128, 256, 384, 512)
]
FLASH_ATTENTION = [
    _workload(model, 16384 // longest, longest, "full")
    for model in ("flash hd64", "flash hd128")
    for longest in (512, 1024, 2048, 4096, 8192, 16384)
]
MIXES = [
    _workload(model, batch, longest, mix)
    for model in ("minilm", "bert-base", "bert-large")
    for batch, longest in ((8, 128), (16, 128), (32, 128), (32, 512))
    for mix in ("full", "uniform", "long tail")
]
ROWS = [work for work in MIXES if work.tokens == work.padded_tokens]
LATENCY = [
    _workload(model, 1, longest, "full")
    for model in ("minilm", "bert-base", "bert-large")
    for longest in (16, 64, 128, 512)
]

WORKLOADS: dict[str, Workload] = {
    work.name: work for work in (*LATENCY, *MIXES, *TENSORRT, *BYTETRANSFORMER, *KERNL, *FLASH_ATTENTION)
}
