"""Texts grouped to batches of at most so many tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fastbert.errors import ArgumentError
from fastbert.text.checks import check_whole


def batches(lengths: Sequence[int] | npt.NDArray[np.int64], batch_tokens: int) -> list[list[int]]:
    """Rows of texts grouped so that a batch has at most `batch_tokens` tokens; a longer text is a batch of its own.

    Rows are sorted by length, longest first and stable, so that lengths in a batch are alike.

    Raises:
        ArgumentError: `batch_tokens` is not positive.
    """
    check_whole("batch_tokens", batch_tokens)
    if batch_tokens < 1:
        raise ArgumentError("batch_tokens", batch_tokens, "a positive number of tokens")
    lengths = np.asarray(lengths, dtype=np.int64)
    return cut(np.argsort(-lengths, kind="stable").tolist(), lengths, batch_tokens)


def cut(rows: list[int], lengths: npt.NDArray[np.int64], batch_tokens: int) -> list[list[int]]:
    """`rows` in their order, cut where a batch would exceed `batch_tokens`; a longer text is a batch of its own."""
    groups: list[list[int]] = []
    room = 0
    for row in rows:
        length = int(lengths[row])
        if not groups or length > room:
            groups.append([])
            room = batch_tokens
        groups[-1].append(row)
        room -= length
    return groups
