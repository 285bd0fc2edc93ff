"""A process that answers for long keeps its memory and its answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_bert

from fastbert.tasks.encode import TextEncoder

STATUS = Path("/proc/self/statm")
PAGES = 5_000  # of 4 KiB: 20 MB, where a process with torch has 600


def resident_pages() -> int:
    return int(STATUS.read_text().split()[1])


@pytest.mark.heavy
@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc/self/statm, which Linux has")
def test_calls_and_streams_of_all_sizes_leave_memory_and_answers_as_they_were(tmp_path: Path) -> None:
    encoder = TextEncoder.from_folder(tiny_bert.make(tmp_path), device="cpu")
    draw = random.Random(0)

    def texts(count: int) -> Iterator[str]:
        for _ in range(count):
            yield " ".join(draw.choices(tiny_bert.PLAIN, k=draw.randrange(draw.choice([1, 5, 40]))))

    def work(calls: int) -> None:
        for _ in range(calls):
            encoder.encode(texts(draw.choice([0, 1, 2, 7, 30, 90])), max_length=draw.choice([8, 20, 48]))
        for _ in encoder.encode_stream(texts(40 * calls), texts_at_once=64, max_length=48):
            pass
        abandoned = encoder.encode_stream(texts(1000), texts_at_once=64, max_length=48)
        next(abandoned)

    expected = encoder.encode(["the film was great"])
    work(300)
    before = resident_pages()
    work(600)
    assert resident_pages() - before < PAGES
    np.testing.assert_array_equal(encoder.encode(["the film was great"]), expected)
