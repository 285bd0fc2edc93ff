"""The best of many texts, by a score for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Hit:
    """A text that was found.

    Attributes:
        row: its place among the texts.
        score: more is better.
        text: itself.
    """

    row: int
    score: float
    text: str


def best_rows(scores: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """The rows of the `count` highest, at least 1, of float32 `[n]`, the highest first; of equal ones the first.

    Returns:
        int64 `[min(count, n)]`.
    """
    if count < len(scores):
        least = np.partition(scores, len(scores) - count)[len(scores) - count]
        rows = np.flatnonzero(scores >= least)
    else:
        rows = np.arange(len(scores))
    return rows[np.argsort(-scores[rows], kind="stable")[:count]]


def hits(rows: npt.NDArray[np.int64], scores: npt.NDArray[np.float32], texts: Sequence[str]) -> list[Hit]:
    """The hits of these rows, int64 `[k]` with scores float32 `[k]`."""
    return [Hit(row, score, texts[row]) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]
