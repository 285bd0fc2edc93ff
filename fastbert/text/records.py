"""Files of data, as every task reads them: what an ending means, text in UTF-8, tables and JSON as records."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fastbert.errors import ArgumentError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON = (".json", ".jsonl", ".ndjson")
CSV_FIELD_CHARACTERS = 2**31 - 1  # csv's own limit is 131072, and documents are longer

# The marks that files of other encodings begin with; that of UTF-16-LE begins that of UTF-32-LE.
MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
OBJECTS = "a JSON object a line, or an array of objects"
NUL_SHARE = 0.2  # of the first bytes: text in UTF-16 has a NUL beside each Latin letter

_Numbered = Iterator[tuple[int, dict[str, str | None]]]


def ending(path: Path) -> str:
    """What a file's name ends with, in lower case; the one before it where that is .gz."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix == ".gz" else name.suffix


def has_records(path: Path) -> bool:
    """Whether `read_records` reads the file."""
    return ending(path) in (*DELIMITERS, *JSON)


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`(place, record)` of a .csv or .tsv with a header, or of JSON: lines of objects or an array of them.

    A place names the file and the line or item, for errors. Spaces around the names of columns are no part of them.

    Raises:
        ArgumentError: the file is missing, not UTF-8 or damaged, has none of these endings, two columns of one name, or
            a row longer than the header.
    """
    kind = ending(path)
    if kind in DELIMITERS:
        yield from _read_table(path, DELIMITERS[kind])
    elif kind in JSON:
        yield from _read_json(path)
    else:
        raise ArgumentError(str(path), f"the ending {path.suffix!r}", ".tsv, .csv or .jsonl")


def read_lines(path: Path) -> list[str]:
    """Told apart by \\n alone, as the command line does: U+2028 and form feed are text.

    Raises:
        ArgumentError: the file is missing or not UTF-8.
    """
    return [line.removesuffix("\r") for line in _content(path).split("\n")]


def _read_table(path: Path, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    _, rows = table(path, io.StringIO(_content(path), newline=""), delimiter)
    for number, row in rows:
        yield f"{path}, line {number}", row


def table(path: Path, lines: Iterable[str], delimiter: str) -> tuple[list[str], _Numbered]:
    """The names of the columns, and `(number, row)` of each row: the number is that of its last line.

    A row that is shorter than the header has None at its end.

    Args:
        path: for errors.

    Raises:
        ArgumentError: the lines are damaged, two columns have one name, or, when it is read, a row is longer than the
            header.
    """
    csv.field_size_limit(CSV_FIELD_CHARACTERS)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header = [name.strip() for name in _next(path, rows) or []]
    for name, count in Counter(header).items():
        if name and count > 1:
            raise ArgumentError(f"{path}, line 1", f"two columns {name!r}", "columns of different names")
    return header, _rows(path, header, rows)


def _rows(path: Path, header: list[str], rows: Any) -> _Numbered:
    while (row := _next(path, rows)) is not None:
        if len(row) > len(header):
            place, got = f"{path}, line {rows.line_num}", f"{len(row)} fields"
            raise ArgumentError(place, got, f"{len(header)}, as the header has", "Put texts with commas in quotes.")
        if row:
            yield rows.line_num, dict(zip(header, [*row, *[None] * (len(header) - len(row))], strict=True))


def _next(path: Path, rows: Any) -> list[str] | None:
    read = rows.line_num
    try:
        return next(rows, None)
    except csv.Error as error:
        place = f"{path}, after line {read}"
        raise ArgumentError(place, str(error), f"a {ending(path)} file with a header") from error


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    content = _content(path)
    if content.lstrip().startswith("["):
        for number, item in enumerate(_json(str(path), content), start=1):
            yield f"{path}, item {number}", _object(f"{path}, item {number}", item)
    else:
        for number, line in enumerate(content.split("\n"), start=1):
            if line.strip():
                place = f"{path}, line {number}"
                yield place, json_object(place, line)


def json_object(place: str, line: str) -> dict[str, Any]:
    """The object in a line of JSON.

    Args:
        place: names the line in an error.

    Raises:
        ArgumentError: it holds something else.
    """
    return _object(place, _json(place, line))


def _json(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError(place, str(error), OBJECTS) from error


def _object(place: str, item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise ArgumentError(place, f"{item!r:.80}", OBJECTS)
    return item


def _content(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix.lower() == ".gz":
            raw = gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ArgumentError(str(path), str(error), "a whole gzip file") from error
    except OSError as error:
        raise ArgumentError(str(path), str(error.strerror), "a file of training data") from error
    for mark, name in MARKS.items():
        if raw.startswith(mark):
            raise _not_utf8(path, f"the mark that text in {name} begins with", name)
    if raw[:1000].count(0) > NUL_SHARE * len(raw[:1000]):
        name = "UTF-16LE" if raw[0] else "UTF-16BE"
        raise _not_utf8(path, f"a NUL beside each letter, as text in {name} has", name)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        got = f"the byte 0x{raw[error.start]:02x} in line {line}, which has no place there in UTF-8"
        raise _not_utf8(path, got, "latin1") from error


def _not_utf8(path: Path, got: str, name: str) -> ArgumentError:
    mend = f"Convert it, if it is text in {name}: iconv -f {name} -t UTF-8 OLD > NEW"
    return ArgumentError(str(path), got, "text in UTF-8", mend)
