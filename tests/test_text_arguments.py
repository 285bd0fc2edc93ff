"""Arguments of the calls that take texts: what is none of the kind asked for is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tiny_bert

from fastbert.errors import ArgumentError
from fastbert.tasks.encode import TextEncoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder.from_folder(tiny_bert.make(tmp_path_factory.mktemp("texts") / "model"), device="cpu")


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", None, True, 10**30, float("inf"), float("nan")], ids=repr)
def test_texts_at_once_is_a_number_of_texts(encoder: TextEncoder, value: Any) -> None:
    with pytest.raises(ArgumentError, match="texts_at_once"):
        encoder.encode_stream(["a"], texts_at_once=value)


@pytest.mark.parametrize("texts", [5, None, Ellipsis, "a film", b"a film", True, 2.5], ids=repr)
def test_texts_are_many(encoder: TextEncoder, texts: Any) -> None:
    for call in (encoder.encode, encoder.encode_stream, lambda texts: encoder.encode(texts, prompt="query: ")):
        with pytest.raises(ArgumentError, match=r"texts: .* expected a list of strings"):
            call(texts)


@pytest.mark.parametrize("argument", ["prompt", "prompt_name"])
@pytest.mark.parametrize("value", [5, ["query"], b"query", True, {}], ids=repr)
def test_a_prompt_is_a_string(encoder: TextEncoder, argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{argument}: .* expected a string, or None"):
        encoder.encode(["a"], **{argument: value})


TEXTS = ["the film", "a plot", "", "ada met alan"]


def _arrow(texts: list[str | None], of: str) -> Any:
    arrow = pytest.importorskip("pyarrow", reason="its arrays are given as texts")
    if of == "chunks":
        return arrow.chunked_array([texts[:1], texts[1:]])
    return arrow.array(texts).dictionary_encode() if of == "dictionary" else arrow.array(texts)


def _of(library: str, kind: str, *arguments: Any, **options: Any) -> Any:
    return getattr(pytest.importorskip(library, reason="its columns are given as texts"), kind)(*arguments, **options)


def _dataset(columns: dict[str, Any]) -> Any:
    return pytest.importorskip("datasets", reason="its columns are given as texts").Dataset.from_dict(columns)


COLUMNS: dict[str, Callable[[list[Any]], Any]] = {
    "generator": lambda texts: (text for text in texts),
    "values of a dict": lambda texts: dict(enumerate(texts)).values(),
    "numpy strings": np.array,
    "numpy objects": lambda texts: np.array(texts, object),
    "pandas": lambda texts: _of("pandas", "Series", texts, index=[3, 1, 2, 2]),
    "pandas, categories": lambda texts: _of("pandas", "Series", texts, dtype="category"),
    "polars": lambda texts: _of("polars", "Series", texts),
    "pyarrow": lambda texts: _arrow(texts, "array"),
    "pyarrow, chunks": lambda texts: _arrow(texts, "chunks"),
    "pyarrow, dictionary": lambda texts: _arrow(texts, "dictionary"),
    "datasets": lambda texts: _dataset({"text": texts})["text"],
    "datasets, arrow": lambda texts: _dataset({"text": texts}).with_format("arrow")["text"],
}


@pytest.mark.parametrize("make", COLUMNS.values(), ids=COLUMNS)
def test_columns_are_taken_as_they_are(make: Callable[[list[Any]], Any], encoder: TextEncoder) -> None:
    expected = encoder.encode(TEXTS)
    np.testing.assert_allclose(encoder.encode(make(TEXTS)), expected, atol=1e-6)
    np.testing.assert_allclose(np.concatenate(list(encoder.encode_stream(make(TEXTS)))), expected, atol=1e-6)
    prompted = encoder.encode(make(TEXTS), prompt="very ")
    np.testing.assert_allclose(prompted, encoder.encode([f"very {text}" for text in TEXTS]), atol=1e-6)


@pytest.mark.parametrize("make", [list, *(COLUMNS[name] for name in COLUMNS if name != "numpy strings")])
def test_a_missing_text_is_named(make: Callable[[list[Any]], Any], encoder: TextEncoder) -> None:
    with pytest.raises(ArgumentError, match=r"texts\[2\]: got (None|nan), which is missing; .* Fill it in"):
        encoder.encode(make(["a", "b", None, "c"]))


def test_pandas_na_is_missing(encoder: TextEncoder) -> None:
    column = _of("pandas", "Series", ["a", None], dtype="string")
    with pytest.raises(ArgumentError, match=r"texts\[1\]: got <NA>, which is missing; .* Fill it in"):
        encoder.encode(column)


@pytest.mark.parametrize(
    "make",
    [
        lambda columns: _of("pandas", "DataFrame", columns),
        lambda columns: _of("polars", "DataFrame", columns),
        lambda columns: _of("pyarrow", "table", columns),
        _dataset,
    ],
    ids=["pandas", "polars", "pyarrow", "datasets"],
)
def test_a_table_is_no_column(make: Callable[[dict[str, Any]], Any], encoder: TextEncoder) -> None:
    for call in (encoder.encode, encoder.encode_stream):
        with pytest.raises(ArgumentError, match=r"texts: got a .*; expected a list of strings\. Pass one column of it"):
            call(make({"text": TEXTS}))


def test_a_generator_is_closed_with_its_stream(encoder: TextEncoder) -> None:
    closed = []

    def texts() -> Iterator[str]:
        try:
            while True:
                yield "a"
        finally:
            closed.append(True)

    stream = encoder.encode_stream(texts(), texts_at_once=2)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert closed
