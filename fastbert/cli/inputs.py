"""What goes into a command: texts of plain lines, JSON lines, CSV or Parquet, as they arrive."""

from __future__ import annotations

import csv
import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import IO, Any, Literal

from fastbert.cli import piping
from fastbert.cli.piping import Lines, Noted, say
from fastbert.errors import ArgumentError, shown
from fastbert.installed import optional

InputFormat = Literal["text", "jsonl", "csv", "tsv", "parquet"]
# What one item is, and the columns that it is in where nobody says.
Kind = Literal["text", "pair", "words", "ranking"]
COLUMNS: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "pair": ("text", "text_pair"),
    "words": ("tokens",),
    "ranking": ("query", "documents"),
}
_ITEMS: dict[Kind, str] = {
    "text": 'a string, or an object with it, such as {"text": "..."}',
    "pair": 'a list of two strings, or an object with them, such as {"text": "...", "text_pair": "..."}',
    "words": 'a JSON list of words, such as ["Ada", "met"]',
    "ranking": 'an object such as {"query": "...", "documents": ["...", "..."]}',
}
_ROWS: dict[Kind, str] = {
    "text": "a string",
    "pair": "two strings",
    "words": "a list of words",
    "ranking": "a string and a list of strings",
}
_MENDS = {
    "[": "If the file is one JSON array, make JSON lines of it: jq -c '.[]'",
    "{": "If an object takes several lines, make one of them: jq -c .",
}
_ENDINGS: dict[str, InputFormat] = {
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


class Texts:
    """The texts of a file, or of stdin, or what else a command takes for one item: see `Kind`."""

    def __init__(
        self, path: Path, file_format: InputFormat | None, columns: Sequence[str] | None, kind: Kind = "text"
    ) -> None:
        """Open the file.

        Args:
            path: of the file; - for stdin.
            file_format: what it holds; by default what its ending says, and plain lines where that says nothing.
            columns: the names of the columns, or keys, that an item is in; those of `COLUMNS` by default, or else the
                only ones that there are.
            kind: what an item is.

        Raises:
            ArgumentError: it can't be read, or the columns are not as many as an item has, or plain lines have none.
            MissingError: Parquet is to be read, and pyarrow is not installed.
        """
        self._kind, self._format = kind, file_format or _ENDINGS.get(path.suffix.lower(), "text")
        self._columns, self._count, self._empty = tuple(columns or ()), 0, Noted()
        if self._columns:
            if self._format == "text":
                mend = "Say --input-format jsonl, csv or tsv if it is that."
                raise ArgumentError("--column", ", ".join(self._columns), "none: lines of text have no columns", mend)
            if len(self._columns) != len(COLUMNS[kind]):
                expected = f"{len(COLUMNS[kind])} of them, as for {', '.join(COLUMNS[kind])}"
                raise ArgumentError("--column", f"{len(self._columns)} columns", expected)
        self._parquet = _Parquet(path) if self._format == "parquet" else None
        self._lines = Lines(path) if self._parquet is None else None

    def parts(self, results: IO[bytes]) -> Generator[list[Any], None, None]:
        """The items in lists of at most LINES_AT_ONCE; an empty list where the next one may be long in coming.

        Raises:
            ArgumentError: an item is not as described; the message names its line.
            BrokenPipeError: the reader of `results` has gone.
        """
        if self._lines is not None:
            read = {"text": self._plain, "jsonl": self._json}.get(self._format, self._table)
            parts: Iterable[list[Any]] = read(self._lines.parts(results))
        else:
            assert self._parquet is not None
            parts = self._of_parquet(self._parquet)
        for part in parts:
            self._count += len(part)
            yield part

    def all(self, results: IO[bytes]) -> list[Any]:
        """All items at once."""
        return list(chain.from_iterable(self.parts(results)))

    def report(self) -> None:
        """Say what was odd about them, when all were read."""
        if self._lines is not None:
            self._lines.report()
        self._empty.report("empty lines, " + ("taken as empty texts" if self._format == "text" else "left out"))
        if not self._count:
            say("the input is empty: no results")

    def _plain(self, parts: Iterable[list[str]]) -> Iterator[list[Any]]:
        numbers = count(1)
        for part in parts:
            items = []
            for line, number in zip(part, numbers, strict=False):
                text = line.removesuffix("\r")
                if not text:
                    self._empty.add(number)
                items.append(text if self._kind == "text" else self._of_line(text, number))
            yield items

    def _of_line(self, line: str, number: int) -> Any:
        if self._kind != "pair":
            return self._of_json(line, number)
        first, tab, second = line.partition("\t")
        if not tab or "\t" in second:
            raise ArgumentError(_place(number), shown(line), "two texts with one tab between them")
        return first, second

    def _json(self, parts: Iterable[list[str]]) -> Iterator[list[Any]]:
        numbers = count(1)
        for part in parts:
            items = []
            for line, number in zip(part, numbers, strict=False):
                if line.strip():
                    items.append(self._of_json(line, number))
                else:
                    self._empty.add(number)
            yield items

    def _of_json(self, line: str, number: int) -> Any:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            mend = _MENDS.get(line.strip()[:1], "")
            raise ArgumentError(_place(number), f"{shown(line)}, which is no JSON", _ITEMS[self._kind], mend) from error
        if isinstance(value, dict):
            columns = self._chosen(tuple(value), number)
            return self._item([value[name] for name in columns], columns, number)
        if self._kind == "ranking" or self._columns or (self._kind == "text" and isinstance(value, list)):
            mend = _MENDS["["] if isinstance(value, list) else ""
            raise ArgumentError(_place(number), shown(value), _ITEMS[self._kind], mend)
        several = value if isinstance(value, list) and self._kind == "pair" else [value]
        return self._item(several, COLUMNS[self._kind], number)

    def _table(self, parts: Iterable[list[str]]) -> Iterator[list[Any]]:
        from fastbert.text.records import CSV_FIELD_CHARACTERS, DELIMITERS

        csv.field_size_limit(CSV_FIELD_CHARACTERS)
        delimiter = DELIMITERS[f".{self._format}"]
        header: list[str] | None = None
        places: list[int] = []
        rest: list[str] = []  # the beginning of a row whose end has not come
        before = 0  # lines, of those above it
        for part in chain(parts, [None]):
            if rest and part and not any('"' in line for line in part):  # no end of it in here
                rest += part
                continue
            rows, used = _rows(rest + (part or []), delimiter, before, last=part is None)
            rest, first = (rest + (part or []))[used:], before
            before += used
            items = []
            for at, row in rows:
                number = first + at
                if not row:
                    self._empty.add(number)
                elif header is None:
                    header = [name.strip() for name in row]
                    places = [header.index(name) for name in self._chosen(tuple(header), number)]
                elif len(row) != len(header):
                    mend = "Put texts with the delimiter in them in quotes."
                    raise ArgumentError(_place(number), f"{len(row)} fields", f"{len(header)}, as the header has", mend)
                else:
                    items.append(self._item([row[i] for i in places], [header[i] for i in places], number))
            if items or part is not None:
                yield items

    def _of_parquet(self, file: _Parquet) -> Iterator[list[Any]]:
        columns = self._chosen(file.names, 0)
        number = 0
        for rows in file.rows(columns):
            yield [self._item(list(row), columns, number + i) for i, row in enumerate(rows, start=1)]
            number += len(rows)

    def _chosen(self, names: tuple[str, ...], number: int) -> tuple[str, ...]:
        """Of these columns those that an item is in."""
        place = _place(number) if number else "INPUT"
        for name in set(names):
            if name and names.count(name) > 1:
                raise ArgumentError(place, f"two columns {name!r}", "columns of different names")
        wanted = self._columns or COLUMNS[self._kind]
        if all(name in names for name in wanted):
            return wanted
        if not self._columns and len(names) == len(wanted):
            if self._format == "csv" and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
                mend = f"If {other!r} parts its columns, save it with commas; if not, name the column by --column."
                raise ArgumentError(place, f"one column {names[0]!r}", "columns with commas between them", mend)
            return names
        got = f"the columns {', '.join(names) or '(none)'}"
        raise ArgumentError(place, got, ", ".join(wanted) + " among them", "Name others by --column.")

    def _item(self, values: Sequence[Any], columns: Sequence[str], number: int) -> Any:
        lists = {"words": (0,), "ranking": (1,)}.get(self._kind, ())
        good = len(values) == len(columns) and all(
            _are_strings(value) if i in lists else isinstance(value, str) for i, value in enumerate(values)
        )
        if not good or (self._kind == "words" and "" in values[0]):
            got = shown(values[0] if len(values) == 1 else values)
            if self._format == "parquet":
                expected = f"{_ROWS[self._kind]} in {', '.join(columns)}"
                raise ArgumentError(f"INPUT, row {number}", got, expected)
            raise ArgumentError(_place(number), got, _ITEMS[self._kind])
        return values[0] if len(values) == 1 else tuple(values)


class _Parquet:
    """A file of Parquet, read in parts."""

    def __init__(self, path: Path) -> None:
        arrow = optional("pyarrow", "parquet", "to read Parquet")
        parquet = optional("pyarrow.parquet", "parquet", "to read Parquet")
        self._name = str(path)
        if self._name == "-":
            raise ArgumentError("INPUT", "Parquet from stdin", "a file: its end is read first", "Name the file.")
        self._errors = (arrow.ArrowException, OSError)
        try:
            self._file = parquet.ParquetFile(path)
        except self._errors as error:
            raise self._error(error) from error
        self.names = tuple(self._file.schema_arrow.names)

    def rows(self, columns: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        """The rows of these columns, LINES_AT_ONCE in a list."""
        batches = self._file.iter_batches(piping.LINES_AT_ONCE, columns=list(columns))
        while True:
            try:
                batch = next(batches, None)
                if batch is None:
                    return
                found = [batch.column(name).to_pylist() for name in columns]
            except (*self._errors, UnicodeDecodeError) as error:
                raise self._error(error) from error
            yield list(zip(*found, strict=True))

    def _error(self, error: Exception) -> ArgumentError:
        return ArgumentError(
            "INPUT", f"{self._name}: {error}".splitlines()[0], "a whole Parquet file, its texts in UTF-8"
        )


def _rows(lines: list[str], delimiter: str, before: int, *, last: bool) -> tuple[list[tuple[int, list[str]]], int]:
    """The rows that are whole, each with the number of its first line, and how many lines they take."""
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    used = 0
    try:
        for row in reader:
            rows.append((used + 1, row))
            used = reader.line_num
    except csv.Error as error:
        if last or reader.line_num < len(lines) or str(error) != "unexpected end of data":
            raise ArgumentError(_place(before + used + 1), str(error), "a row of CSV, its quotes closed") from error
    return rows, used


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _place(number: int) -> str:
    return f"INPUT, line {number}"
