"""What comes out of a command: JSON lines, .npy or Parquet, written part by part."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

from fastbert.cli import piping
from fastbert.errors import ArgumentError
from fastbert.installed import optional

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    # By their names: lists of what JSON has, or one array float32 [rows] or [rows, width].
    Columns: TypeAlias = Mapping[str, Sequence[Any] | npt.NDArray[np.float32]]
    Write: TypeAlias = Callable[[Columns], None]

OutputFormat = Literal["jsonl", "npy", "parquet"]

_ENDINGS: dict[str, OutputFormat] = {".npy": "npy", ".parquet": "parquet"}
# Those that promise another format than JSON lines.
_OTHERS = re.compile(r"\.(arrow|bz2|csv|feather|gz|h5|npz|onnx|pkl|pt|safetensors|tsv|xlsx|xz|zip|zst)")


def output_format(output: Path | None, given: OutputFormat | None, *, npy: bool = False) -> OutputFormat:
    """What to write: as `given`, or as the ending of the file says, and JSON lines where that says nothing.

    Args:
        output: the file; None for stdout.
        npy: whether there is an array to write.

    Raises:
        ArgumentError: the file's ending promises what is not written.
        MissingError: Parquet is asked for, and pyarrow is not installed.
    """
    ending = "" if output is None else output.suffix.lower()
    asked = given or _ENDINGS.get(ending, "jsonl")
    if asked == "npy" and not npy:
        name = "--format" if given else "--output"
        raise ArgumentError(name, given or output, "jsonl or parquet: .npy holds an array, and this is none")
    if asked == "npy" and output is None:
        raise ArgumentError("--output", "nothing", "a file to write .npy to", "Add --output FILE, or --format jsonl.")
    if asked == "parquet":
        optional("pyarrow.parquet", "parquet", "to write Parquet")
    if given is None and asked == "jsonl" and _OTHERS.fullmatch(ending):
        expected = "another ending, such as .jsonl, for JSON lines"
        raise ArgumentError("--output", output, expected, "Or say --format.")
    return asked


def writing(file: IO[bytes], how: OutputFormat, example: Mapping[str, Any]) -> AbstractContextManager[Write]:
    """A function that writes columns, one part after the other; what it wrote is complete when the block ends.

    Args:
        file: open, at its beginning.
        how: the format. Of .npy it is the column that is an array, float32.
        example: a row as the columns have them, by which types are known before there is a row; float32 of numpy, a
            number or `[width]`, for the column that is an array.

    Raises:
        ArgumentError: .npy is to be written to a pipe.
    """
    return {"jsonl": _jsonl, "npy": _npy, "parquet": _parquet}[how](file, example)


@contextmanager
def _jsonl(file: IO[bytes], example: Mapping[str, Any]) -> Iterator[Write]:
    def write(columns: Columns) -> None:
        rows = zip(*map(_in_json, columns.values()), strict=True)
        names = [json.dumps(name) for name in columns]
        for row in rows:
            fields = ", ".join([f"{name}: {value}" for name, value in zip(names, row, strict=True)])
            file.write(f"{{{fields}}}\n".encode())
        file.flush()

    yield write


def _in_json(column: Any) -> Iterator[str]:
    if isinstance(column, list):
        yield from map(json.dumps, column)
        return
    from fastbert.tasks.results import as_json

    yield from map(as_json, column.tolist())


@contextmanager
def _npy(file: IO[bytes], example: Mapping[str, Any]) -> Iterator[Write]:
    """One array of all parts; numpy leaves room in its header for any number of rows, which are counted at the end."""
    import numpy as np

    if not file.seekable():
        raise ArgumentError("--output", f"{file.name}, a pipe", "a file for .npy", "Add --format jsonl.")
    [name] = [name for name, value in example.items() if isinstance(value, np.ndarray | np.generic)]
    rows = 0

    def write_header() -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, *np.shape(example[name]))}
        np.lib.format.write_array_header_1_0(file, header)

    def write(columns: Columns) -> None:
        nonlocal rows
        file.write(np.ascontiguousarray(columns[name], "<f4").data)
        rows += len(columns[name])

    write_header()
    yield write
    file.seek(0)
    write_header()


@contextmanager
def _parquet(file: IO[bytes], example: Mapping[str, Any]) -> Iterator[Write]:
    arrow: Any = optional("pyarrow", "parquet", "to write Parquet")
    parquet: Any = optional("pyarrow.parquet", "parquet", "to write Parquet")
    import numpy as np

    def type_of(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return arrow.list_(arrow.float32(), len(value))
        return arrow.float32() if isinstance(value, np.generic) else arrow.infer_type([value])

    schema = arrow.schema([(name, type_of(value)) for name, value in example.items()])
    waiting: list[Any] = []

    def table(columns: Columns) -> Any:
        arrays = []
        for kind, column in zip(schema.types, columns.values(), strict=True):
            if isinstance(column, np.ndarray) and column.ndim == 2:
                arrays.append(arrow.FixedSizeListArray.from_arrays(arrow.array(column.ravel()), type=kind))
            else:
                arrays.append(arrow.array(column if isinstance(column, np.ndarray) else _with_utf8(column), kind))
        return arrow.Table.from_arrays(arrays, schema=schema)

    def flush() -> None:
        if waiting:  # in row groups of a useful size, however slowly rows come
            writer.write_table(arrow.concat_tables(waiting))
            waiting.clear()

    def write(columns: Columns) -> None:
        waiting.append(table(columns))
        if sum(map(len, waiting)) >= piping.LINES_AT_ONCE:
            flush()

    with parquet.ParquetWriter(file, schema) as writer:
        yield write
        flush()


def _with_utf8(value: Any) -> Any:
    """What JSON has, its lone surrogates replaced by U+FFFD, as the tokenizer did: they have no UTF-8."""
    from fastbert.text.checks import SURROGATE

    if isinstance(value, str):
        return value if value.isascii() else SURROGATE.sub("\ufffd", value)
    if isinstance(value, list | tuple):
        return [_with_utf8(item) for item in value]
    if isinstance(value, dict):
        return {name: _with_utf8(item) for name, item in value.items()}
    return value
