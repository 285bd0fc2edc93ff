"""Texts and numbers that a caller gives, checked."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Generator, Iterable, Mapping
from typing import Any

import numpy as np

from fastbert.errors import ArgumentError

Text = str | tuple[str, str]

SURROGATE = re.compile("[\ud800-\udfff]")


def strings_of(texts: Iterable[Any], name: str) -> list[str]:
    """The items of such an argument.

    Raises:
        ArgumentError: see `check_texts`; or `name[i]` is no string.
    """
    found = list(items_of(texts, name))
    for i, text in enumerate(found):
        check_string(f"{name}[{i}]", text)
    return found


def check_string(name: str, value: object) -> None:
    """Raise ArgumentError for what is no string."""
    if not isinstance(value, str):
        raise _no_string(name, value, "a string")


def items_of(texts: Iterable[Any], name: str = "texts") -> Generator[Any, None, None]:
    """What a list, an array, a column of a table or a generator holds, one after the other; Arrow's values as Python's.

    Closing it closes a generator.

    Raises:
        ArgumentError: see `check_texts`.
    """
    check_texts(texts, name)
    return _items_of(iter(texts))


def _items_of(texts: Any) -> Generator[Any, None, None]:
    try:
        for item in texts:
            yield item.as_py() if hasattr(item, "as_py") else item
    finally:
        if isinstance(texts, Generator):
            texts.close()


def check_texts(texts: object, name: str = "texts") -> None:
    """Raise ArgumentError for one text that is not in a list, for what can't be gone through, and for tables.

    To go through a dict or a data frame gives the names of its columns, which would be embedded in place of the texts,
    and a table of another library gives columns or rows.
    """
    if isinstance(texts, str | bytes):
        got = "a single string" if isinstance(texts, str) else "bytes"
        raise ArgumentError(name, got, "a list of strings", "Wrap it in a list.")
    got = f"a {type(texts).__name__}"
    if isinstance(texts, Mapping) or not any(hasattr(texts, method) for method in ("__iter__", "__getitem__")):
        raise ArgumentError(name, got, "a list of strings")
    if (axes := getattr(texts, "ndim", 1)) != 1:
        raise ArgumentError(name, f"{got} of {axes} dimensions", "a list of strings", "Pass one column of it.")
    if hasattr(texts, "columns") or hasattr(texts, "column_names"):  # polars, pyarrow, datasets
        raise ArgumentError(name, f"{got} of columns", "a list of strings", "Pass one column of it.")


def checked_texts(texts: list[Any], pairs: bool) -> list[Any]:
    """Strings, or pairs of strings, as they were given; lone surrogates become U+FFFD, and one warning counts them.

    Raises:
        ArgumentError: an item is something else.
    """
    first = "a string, or a pair of strings" if pairs else "a string"
    others = "a pair of strings, as texts[0]" if pairs else "a string, as texts[0]"
    replaced = 0
    checked: list[Any] = []
    for i, text in enumerate(texts):
        strings = text if pairs else (text,)
        expected = others if i else first
        if not isinstance(strings, (tuple, list)) or len(strings) != 1 + pairs:
            raise ArgumentError(f"texts[{i}]", f"a {type(text).__name__}", expected)
        for string in strings:
            if not isinstance(string, str):
                raise _no_string(f"texts[{i}]", string, expected)
        if not all(string.isascii() for string in strings):
            mended = [SURROGATE.subn("\ufffd", string) for string in strings]
            replaced += sum(count for _, count in mended)
            strings = tuple(string for string, _ in mended)
        checked.append(tuple(strings) if pairs else strings[0])
    if replaced:
        warnings.warn(f"{replaced} lone surrogates in the texts were replaced by U+FFFD", stacklevel=3)
    return checked


def _no_string(name: str, value: object, expected: str) -> ArgumentError:
    nan = isinstance(value, float) and math.isnan(value)
    if value is None or nan or type(value).__name__ == "NAType":  # these stand for it in a column; the last is pandas'
        return ArgumentError(name, f"{value}, which is missing", expected, "Fill it in, or leave it out.")
    return ArgumentError(name, f"a {type(value).__name__}", expected)


def check_count(name: str, number: Any, most: int | None = None) -> None:
    """Raise ArgumentError for what is no whole number from 1 to `most`."""
    check_whole(name, number)
    if number < 1 or (most is not None and number > most):
        raise ArgumentError(name, number, "1 or more" if most is None else f"1 to {most}")


def check_whole(name: str, number: object) -> None:
    """Raise ArgumentError for what is no whole number, of Python or of numpy."""
    if not isinstance(number, int | np.integer) or isinstance(number, bool):
        raise ArgumentError(name, repr(number), "a whole number")
