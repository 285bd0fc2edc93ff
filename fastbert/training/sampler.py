"""Which examples are in which batch: a fixed number of real tokens each, alike in length, random over an epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastbert.errors import ArgumentError
from fastbert.text.batches import cut

WINDOW_BATCHES = 50  # lengths are sorted inside windows of this many batches: alike in a batch, random over an epoch


@dataclass(frozen=True, eq=False)
class Sampler:
    """Which examples are in which batch: a pure function of the seed and the epoch, so a position is two numbers.

    Each epoch is shuffled anew and cut into windows of `WINDOW_BATCHES` batches. A window is sorted by length, up and
    down in turn, so that neighbours across its border are alike too; then the whole row is cut into batches of at most
    `batch_tokens` tokens (a longer example is a batch of its own), and the batches are shuffled.

    Attributes:
        lengths: int64 `[examples]`, tokens of each.
        batch_tokens: most tokens of a batch.
        accumulate: batches of a step.
        seed: of the shuffles.

    Raises:
        ArgumentError: `batch_tokens` or `accumulate` is not positive.
    """

    lengths: npt.NDArray[np.int64]
    batch_tokens: int
    accumulate: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_tokens", "accumulate"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, getattr(self, name), "a positive number")

    def steps(self, epoch: int) -> list[list[list[int]]]:
        """The steps of an epoch: `accumulate` batches each (the last may have fewer), a batch being rows."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.lengths))
        mean = max(float(self.lengths.mean()), 1.0) if len(order) else 1.0
        window = max(1, round(WINDOW_BATCHES * self.batch_tokens / mean))
        rows: list[int] = []
        for i, start in enumerate(range(0, len(order), window)):
            part = order[start : start + window]
            part = part[np.argsort(self.lengths[part], kind="stable")]
            rows += (part if i % 2 == 0 else part[::-1]).tolist()
        batches = cut(rows, self.lengths, self.batch_tokens)
        shuffled = [batches[i] for i in random.permutation(len(batches)).tolist()]
        return [shuffled[i : i + self.accumulate] for i in range(0, len(shuffled), self.accumulate)]
