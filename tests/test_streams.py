"""`encode_stream`: whose thread reads the texts, and what happens when they end early, fail, or are slow to come."""

from __future__ import annotations

import contextvars
import inspect
import sqlite3
import threading
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny_bert

from fastbert.errors import ArgumentError
from fastbert.tasks.encode import TextEncoder

TEXTS = [f"the {word} was very {other}" for word in tiny_bert.PLAIN for other in tiny_bert.GOOD]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder.from_folder(tiny_bert.make(tmp_path_factory.mktemp("tiny")), device="cpu")


def stream(encoder: TextEncoder, texts: Iterator[str], at_once: int = 4) -> Iterator[np.ndarray]:
    return encoder.encode_stream(texts, texts_at_once=at_once, max_length=48)


def tokenising_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


def test_user_case_33_streams_over_thread_bound_iterators(encoder: TextEncoder) -> None:
    """A cursor of sqlite raises in any thread but its own."""
    base = sqlite3.connect(":memory:")
    base.execute("create table t (x text)")
    base.executemany("insert into t values (?)", [(text,) for text in TEXTS])
    rows = (text for (text,) in base.execute("select x from t order by rowid"))
    found = np.concatenate(list(stream(encoder, rows)))
    np.testing.assert_allclose(found, encoder.encode(TEXTS, max_length=48), atol=1e-6)


def test_thread_locals_and_context_are_the_callers(encoder: TextEncoder) -> None:
    local = threading.local()
    local.words = ["film", "plot"]
    variable = contextvars.ContextVar[str]("variable")
    variable.set("music")

    def texts() -> Iterator[str]:
        for _ in range(9):
            yield f"{variable.get()} {local.words[0]}"

    assert [len(part) for part in stream(encoder, texts())] == [4, 4, 1]


def test_what_came_before_an_error_is_encoded_first(encoder: TextEncoder) -> None:
    class BrokenSourceError(Exception):
        pass

    def texts(good: int) -> Iterator[str]:
        yield from TEXTS[:good]
        raise BrokenSourceError("the disk is gone")

    for good in (0, 3, 4, 7, 8):
        parts = stream(encoder, texts(good))
        found: list[np.ndarray] = []
        with pytest.raises(BrokenSourceError, match="the disk is gone"):
            found.extend(parts)
        assert sum(map(len, found)) == good
        if good:
            expected = encoder.encode(TEXTS[:good], max_length=48)
            np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-6)
        assert not tokenising_threads()


def test_an_interrupt_while_reading_ends_at_once(encoder: TextEncoder) -> None:
    def texts() -> Iterator[str]:
        yield from TEXTS[:6]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(stream(encoder, texts()))
    assert not tokenising_threads()


def test_closing_early_ends_the_thread_and_closes_the_source(encoder: TextEncoder) -> None:
    closed: list[str] = []

    def texts() -> Generator[str, None, None]:
        try:
            yield from TEXTS
        finally:
            closed.append(threading.current_thread().name)

    source = texts()
    parts = stream(encoder, source)
    next(parts)
    assert tokenising_threads() and not closed
    parts.close()  # type: ignore[attr-defined]
    assert closed == [threading.current_thread().name] and not tokenising_threads()
    with pytest.raises(StopIteration):
        next(source)


def test_closing_early_leaves_what_is_no_generator_open(encoder: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    with (tmp_path / "texts").open() as file:
        parts = stream(encoder, file)
        next(parts)
        parts.close()  # type: ignore[attr-defined]
        assert not file.closed


def test_an_empty_part_holds_nothing_back(encoder: TextEncoder) -> None:
    """What came is answered before the source is asked for more, which may be long in coming."""
    told: list[str] = []

    def parts() -> Generator[list[str], None, None]:
        told.append("first")
        yield TEXTS[:3]
        told.append("nothing more yet")
        yield []
        told.append("second")
        yield TEXTS[3:5]

    arrays = encoder.encode_parts(parts(), max_length=48)
    assert len(next(arrays)) == 3
    assert told == ["first", "nothing more yet"]
    assert [len(array) for array in arrays] == [2]


def test_closing_early_closes_the_parts(encoder: TextEncoder) -> None:
    """Someone else holds them here, so that nothing but `close` ends them."""
    held = (TEXTS[i : i + 3] for i in range(0, 30, 3))
    arrays = encoder.encode_parts(held, max_length=48)
    next(arrays)
    arrays.close()  # type: ignore[attr-defined]
    assert inspect.getgeneratorstate(held) == inspect.GEN_CLOSED


def test_a_single_string_is_no_stream(encoder: TextEncoder) -> None:
    with pytest.raises(ArgumentError, match="Wrap it in a list"):
        encoder.encode_stream("the film")
