"""The file of a shard: the rows of its input, and beside each what was found."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, Protocol

from fastbert.errors import ArgumentError, shown
from fastbert.ray.inputs import Format, Part
from fastbert.text.checks import SURROGATE

INT64 = range(-(2**63), 2**63)


class Json(str):
    """A value that is JSON already."""


class Findings(Protocol):
    """What is found of texts, as columns.

    Attributes:
        names: of the columns.
    """

    names: tuple[str, ...]

    def types(self) -> list[Any]:
        """Of each column its Arrow type."""

    def arrays(self, found: Any) -> list[Any]:
        """Of what was found of the texts of a part: of each column an Arrow array, a row a text."""

    def values(self, found: Any) -> Iterator[list[Any]]:
        """Of what was found of the texts of a part: of each text a value of JSON for each column."""


Write = Callable[[Part, Any], None]


@contextmanager
def writing(form: Format, file: IO[bytes], columns: Mapping[str, Any], findings: Findings) -> Iterator[Write]:
    """What to call with each part of a shard and what was found of it; the file is whole when the block ends.

    Args:
        columns: those of the input that are kept, as `inputs.columns_of` gives them. JSON lines may have others.

    Raises:
        ArgumentError: a row has a column that is not among `columns`, or is also found; or a value that the format or
            its column can't hold.
    """
    writers = {"parquet": _parquet, "jsonl": _json_lines, "csv": _table}
    with writers[form](file, columns, findings) as write:
        yield write


@contextmanager
def _parquet(file: IO[bytes], columns: Mapping[str, Any], findings: Findings) -> Iterator[Write]:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    of_python = {bool: pyarrow.bool_(), int: pyarrow.int64(), float: pyarrow.float64()}
    types = {
        name: kind if isinstance(kind, pyarrow.DataType) else of_python.get(kind, pyarrow.string())
        for name, kind in columns.items()
    }
    schema = pyarrow.schema([*types.items(), *zip(findings.names, findings.types(), strict=True)])

    def kept(part: Part) -> list[Any]:
        if isinstance(part.rows, list):
            rows = list(_rows(part, columns, findings))
            return [
                pyarrow.array([_typed(name, row.get(name), columns[name], part, i) for i, row in enumerate(rows)], kind)
                for name, kind in types.items()
            ]
        own = {field.name: field.type for field in part.rows.schema}
        for name in types | own:
            if types.get(name) != own.get(name):
                got, expected = f"{name!r} of type {own.get(name)}", f"{types.get(name)}, as in the first file"
                raise ArgumentError(part.place(0), got, expected, _mend("JSON lines"))
        return [part.rows.column(name) for name in types]

    with ParquetWriter(file, schema) as writer:

        def write(part: Part, found: Any) -> None:
            writer.write_table(pyarrow.table([*kept(part), *findings.arrays(found)], schema=schema))

        yield write


@contextmanager
def _json_lines(file: IO[bytes], columns: Mapping[str, Any], findings: Findings) -> Iterator[Write]:
    def write(part: Part, found: Any) -> None:
        for i, (row, values) in enumerate(zip(_rows(part, None, findings), findings.values(found), strict=True)):
            fields = row | dict(zip(findings.names, values, strict=True))
            inside = ", ".join([f"{json.dumps(name)}: {_json(name, value, part, i)}" for name, value in fields.items()])
            file.write(f"{{{inside}}}\n".encode())

    yield write


@contextmanager
def _table(file: IO[bytes], columns: Mapping[str, Any], findings: Findings) -> Iterator[Write]:
    lines = io.TextIOWrapper(file, encoding="utf-8", newline="")
    table = csv.writer(lines)  # its lines end with \r\n: else a \r in a text would be without quotes
    names = [*columns, *findings.names]
    table.writerow(names)

    def write(part: Part, found: Any) -> None:
        for i, (row, values) in enumerate(zip(_rows(part, columns, findings), findings.values(found), strict=True)):
            cells = zip(names, [*(row.get(name) for name in columns), *values], strict=True)
            table.writerow([_cell(name, value, part, i) for name, value in cells])

    yield write
    lines.detach()  # written, and `file` stays open


def _rows(part: Part, columns: Mapping[str, Any] | None, findings: Findings) -> Iterator[dict[str, Any]]:
    """The rows as dicts, checked for names that may not be there."""
    for i, row in enumerate(part.rows if isinstance(part.rows, list) else part.rows.to_pylist()):
        for name in row:
            if name in findings.names:
                got = f"a column {name!r}"
                raise ArgumentError(part.place(i), got, "other columns than what is found", "Leave it out with keep.")
            if columns is not None and name not in columns:
                got, expected = f"a column {name!r}", f"those of the first rows: {', '.join(columns)}"
                raise ArgumentError(part.place(i), got, expected, _mend("JSON lines"))
        yield row


def _typed(name: str, value: Any, kind: type | None, part: Part, i: int) -> Any:
    """A value of JSON as its column in Parquet holds it."""
    if value is None:
        return None
    if kind is None:
        return _json(name, value, part, i)
    if kind is float and type(value) is int and abs(value) <= 2**53:
        return float(value)
    if (
        type(value) is not kind
        or (kind is int and value not in INT64)
        or (isinstance(value, str) and SURROGATE.search(value))
    ):
        expected = f"a value of type {kind.__name__}, as the first rows have"
        raise ArgumentError(part.place(i), f"{shown(value)} as {name!r}", expected, _mend("JSON lines"))
    return value


def _cell(name: str, value: Any, part: Part, i: int) -> str:
    """A value as a table holds it: a text as it is, all else as JSON."""
    if value is None:
        return ""
    if isinstance(value, str) and SURROGATE.search(value):
        raise ArgumentError(part.place(i), f"{shown(value)} as {name!r}", "text that UTF-8 has", _mend("JSON lines"))
    return value if isinstance(value, str) else _json(name, value, part, i)


def _json(name: str, value: Any, part: Part, i: int) -> str:
    if isinstance(value, Json):
        return value
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        got = f"{shown(value)} as {name!r}"
        raise ArgumentError(part.place(i), got, "a value that JSON has", _mend("Parquet")) from error


def _mend(form: str) -> str:
    return f"Leave the column out with keep, or write {form}."
