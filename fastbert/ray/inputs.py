"""The files of a corpus, cut into shards, and the rows of a shard in parts."""

from __future__ import annotations

import gzip
import os
import socket
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Literal, cast

from fastbert.errors import ArgumentError
from fastbert.text.records import DELIMITERS, JSON, ending, json_object, table

Format = Literal["parquet", "jsonl", "csv"]
Dataset = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

ENDINGS: dict[Format, tuple[str, ...]] = {"parquet": (".parquet",), "jsonl": JSON, "csv": tuple(DELIMITERS)}
ROWS_AT_ONCE = 8192
SAMPLE = 1000  # rows of JSON that say which columns there are
WHOLE = -1  # the end of a shard that is a whole file of lines


@dataclass(frozen=True)
class Shard:
    """What a worker reads and writes at once.

    Attributes:
        input: the path of the file to read.
        size, changed: of that file, in bytes and in nanoseconds.
        begin, end: the row groups of Parquet; else the lines that begin at these bytes, up to the last one at WHOLE.
        output: the file to write, a path below the output folder, without the ending.
    """

    input: str
    size: int
    changed: int
    begin: int
    end: int
    output: str

    @property
    def name(self) -> str:
        """Of the file to read, a path below the folder of all."""
        return self.output.rpartition("-")[0]

    def check_unchanged(self) -> None:
        """Raise ArgumentError if the file is no longer the one that was cut into shards."""
        with _opened(Path(self.input)) as file:
            state = os.fstat(file.fileno())
        if (state.st_size, state.st_mtime_ns) != (self.size, self.changed):
            got = "a file that was changed while it was read"
            raise ArgumentError(self.input, got, "files that stay as they are during a run", "Start the run again.")


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of a shard.

    Attributes:
        rows: a pyarrow Table of Parquet; a list of dicts of the other formats.
        texts: one a row.
        place: of a row, by its number in this part, a name for errors.
    """

    rows: Any
    texts: list[Any]
    place: Callable[[int], str]


def paths_of(dataset: Dataset) -> list[Path]:
    """What was given, as absolute paths.

    Raises:
        ArgumentError: one is of no file system, or nothing is there.
    """
    given = [os.fspath(path) for path in ([dataset] if isinstance(dataset, str | os.PathLike) else dataset)]
    for name in given:
        if "://" in name:
            mend = "Mount the store, or copy the files."
            raise ArgumentError("dataset", name, "paths of a file system that all machines share", mend)
        if not Path(name).exists():
            raise ArgumentError("dataset", f"{name}, where nothing is", "files, or folders of files")
    return [Path(name).absolute() for name in given]


def files_of(paths: Sequence[Path]) -> tuple[Path, Format, list[Path]]:
    """The folder that all files are in, their format, and the files, sorted.

    A folder stands for the files in it and in its folders, but for names that begin with "." or "_", which Ray and
    Spark pass over too.

    Raises:
        ArgumentError: one is given twice or of no format that is read; they are of several, or there is none.
    """
    files = [file for path in paths for file in (_files_in(path) if path.is_dir() else [path])]
    if not files:
        raise ArgumentError("dataset", ", ".join(map(str, paths)) or "nothing", "files, or folders of files")
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice:
        raise ArgumentError("dataset", f"{twice[0]} twice", "each file once")
    formats = {_format_of(file): file for file in files}
    if len(formats) > 1:
        raise ArgumentError("dataset", " and ".join(map(str, formats.values())), "files of one format")
    one_folder = len(paths) == 1 and paths[0].is_dir()
    root = paths[0] if one_folder else Path(os.path.commonpath([file.parent for file in files]))
    return root, next(iter(formats)), sorted(files)


def _files_in(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise ArgumentError("dataset", f"{error.filename}: {error.strerror}", "folders that may be read") from error

    for at, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        yield from (Path(at) / name for name in names if not name.startswith((".", "_")))


def _format_of(file: Path) -> Format:
    for name, endings in ENDINGS.items():
        if ending(file) in endings and (name != "parquet" or not _zipped(file)):
            return name
    known = ", ".join(chain.from_iterable(ENDINGS.values()))
    raise ArgumentError("dataset", file, f"files that end with one of {known}", "Name those to read.")


def _zipped(file: Path) -> bool:
    return file.suffix.lower() == ".gz"


def shards_of(root: Path, files: Sequence[Path], shard_bytes: int) -> list[Shard]:
    """The files cut into shards: Parquet between row groups, JSON lines between lines, unless they are compressed.

    A shard is named after its file and its number in it, so no two have one name.

    Raises:
        ArgumentError: a Parquet file is damaged.
    """

    def pieces(file: Path) -> list[Shard]:
        name, state = file.relative_to(root), file.stat()
        known = str(file), state.st_size, state.st_mtime_ns
        return [Shard(*known, *piece, f"{name}-{i:05d}") for i, piece in enumerate(_pieces(file, shard_bytes))]

    with ThreadPoolExecutor(16) as threads:  # they wait for the file system
        return list(chain.from_iterable(threads.map(pieces, files)))


def _pieces(file: Path, shard_bytes: int) -> list[tuple[int, int]]:
    if _format_of(file) == "csv" or _zipped(file):  # of a table a line may end inside of quotes
        return [(0, WHOLE)]
    if _format_of(file) == "jsonl":
        size = file.stat().st_size
        return [(begin, min(begin + shard_bytes, size)) for begin in range(0, size, shard_bytes)] or [(0, 0)]
    with _parquet(file) as opened:
        groups = [opened.metadata.row_group(i).total_byte_size for i in range(opened.num_row_groups)]
    pieces, begin = [], 0
    for end in range(1, len(groups) + 1):
        if sum(groups[begin:end]) >= shard_bytes or end == len(groups):
            pieces.append((begin, end))
            begin = end
    return pieces or [(0, 0)]


def columns_of(files: Sequence[Path]) -> dict[str, Any]:
    """Of each column its Arrow type in Parquet, else the type of its values, or None where they are of no single one.

    The first file says it, and of JSON the first rows.

    Raises:
        ArgumentError: a file is damaged, two columns have one name, or JSON has no row.
    """
    file = files[0]
    kind = _format_of(file)
    if kind == "parquet":
        with _parquet(file) as opened:
            columns = [(field.name, field.type) for field in opened.schema_arrow]
    elif kind == "csv":
        with _lines(file) as lines:
            columns = [(name, str) for name in table(file, _decoded(file, lines), DELIMITERS[ending(file)])[0]]
    else:
        found: dict[str, set[type]] = {}
        rows = chain.from_iterable(_json_rows(Shard(str(file), 0, 0, 0, WHOLE, "")) for file in files)
        for _, row in islice(rows, SAMPLE):
            for name, value in row.items():
                found.setdefault(name, set()).update(() if value is None else (type(value),))
        if not found:
            raise ArgumentError("dataset", "no row", "rows of JSON")
        columns = [(name, _type_of(types)) for name, types in found.items()]
    twice = [name for name, count in Counter(name for name, _ in columns).items() if count > 1]
    if twice:
        raise ArgumentError(str(file), f"two columns {twice[0]!r}", "columns of different names")
    return dict(columns)


def _type_of(types: set[type]) -> type | None:
    if types == {int, float}:
        return float
    return next(iter(types)) if len(types) == 1 and types <= {bool, int, float, str} else None


def read(shard: Shard, column: str, keep: Sequence[str] | None) -> Iterator[Part]:
    """The rows of a shard in their order, ROWS_AT_ONCE at a time.

    Args:
        column: the one of the texts.
        keep: the columns that `Part.rows` has, None for all. Of JSON a row may lack some.

    Raises:
        ArgumentError: the file can't be read or is damaged, or something in `column` is no text; it names the row.
    """
    for part in _read_parquet(shard, column, keep) if _is_parquet(shard) else _read_lines(shard, column, keep):
        for i, text in enumerate(part.texts):
            if not isinstance(text, str):
                raise ArgumentError(part.place(i), f"{text!r:.80} as {column!r}", "a text")
        yield part


def _is_parquet(shard: Shard) -> bool:
    return _format_of(Path(shard.input)) == "parquet"


def _read_parquet(shard: Shard, column: str, keep: Sequence[str] | None) -> Iterator[Part]:
    import pyarrow

    wanted = None if keep is None else list(dict.fromkeys([*keep, column]))
    with _parquet(Path(shard.input)) as opened:
        for name in wanted or [column]:
            if name not in opened.schema_arrow.names:
                raise ArgumentError(shard.input, f"no column {name!r}", "the columns of the first file")
        groups = range(shard.begin, shard.end)
        row = 1 + sum(opened.metadata.row_group(i).num_rows for i in range(shard.begin))
        for batch in opened.iter_batches(batch_size=ROWS_AT_ONCE, row_groups=list(groups), columns=wanted):
            rows = pyarrow.Table.from_batches([batch])
            place = _row_named(shard.input, row)
            texts = [_as_python(text, i, place) for i, text in enumerate(rows.column(column))]
            yield Part(rows if keep is None else rows.select(keep), texts, place)
            row += len(texts)


def _row_named(name: str, first: int) -> Callable[[int], str]:
    return lambda i: f"{name}, row {first + i}"


def _as_python(value: Any, i: int, place: Callable[[int], str]) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise _not_utf8(place(i), error) from error


def _read_lines(shard: Shard, column: str, keep: Sequence[str] | None) -> Iterator[Part]:
    rows = _json_rows(shard) if _format_of(Path(shard.input)) == "jsonl" else _table_rows(shard, column)
    while part := list(islice(rows, ROWS_AT_ONCE)):
        kept = [row if keep is None else {name: row[name] for name in keep if name in row} for _, row in part]
        yield Part(kept, [row.get(column) for _, row in part], _line_named(shard, [line for line, _ in part]))


def _line_named(shard: Shard, lines: list[int]) -> Callable[[int], str]:
    return lambda i: _line(shard, lines[i])


def _line(shard: Shard, number: int) -> str:
    """A name of a line by its number in the shard; those before the shard are counted only now."""
    before, left = 0, shard.begin
    with _lines(Path(shard.input)) as file:
        while left and (block := file.read(min(left, 2**20))):
            before += block.count(b"\n")
            left -= len(block)
    return f"{shard.input}, line {before + number}"


def _table_rows(shard: Shard, column: str) -> Iterator[tuple[int, dict[str, Any]]]:
    path = Path(shard.input)
    with _lines(path) as lines:
        header, rows = table(path, _decoded(path, lines), DELIMITERS[ending(path)])
        if column not in header:
            raise ArgumentError(shard.input, f"no column {column!r}", "the columns of the first file")
        yield from rows


def _decoded(path: Path, lines: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{path}, line {number}", error) from error


def _json_rows(shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
    """`(number, row)` of the lines that begin within the shard."""
    with _lines(Path(shard.input)) as lines:
        at = shard.begin
        if at:
            lines.seek(at - 1)
            at += len(lines.readline()) - 1  # the rest of the line that the shard before has; or the end of its last
        number = 0 if at == shard.begin else 1
        while shard.end == WHOLE or at < shard.end:
            line = lines.readline()
            if not line:
                break
            number += 1
            at += len(line)
            if not line.isspace():
                yield number, _json_row(shard, number, line)


def _json_row(shard: Shard, number: int, line: bytes) -> dict[str, Any]:
    try:
        text = line.decode("utf-8-sig" if shard.begin == 0 and number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(_line(shard, number), error) from error
    try:
        return json_object("", text)
    except ArgumentError as error:
        raise ArgumentError(_line(shard, number), error.got, "a JSON object a line") from error


def _not_utf8(place: str, error: UnicodeDecodeError) -> ArgumentError:
    got = f"the byte 0x{error.object[error.start]:02x}, which has no place there in UTF-8"
    return ArgumentError(place, got, "text in UTF-8", "Convert the file.")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        got = f"{error.strerror} on {socket.gethostname()}"
        raise ArgumentError(str(path), got, "a file that every machine of the cluster can read") from error


@contextmanager
def _lines(path: Path) -> Iterator[IO[bytes]]:
    """A file of lines to read, unpacked if it is compressed.

    Raises:
        ArgumentError: it can't be read or is damaged, now or while it is open.
    """
    with _opened(path) as file:
        if not _zipped(path):
            yield file
            return
        try:
            with gzip.open(file) as unpacked:
                yield cast("IO[bytes]", unpacked)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ArgumentError(str(path), str(error), "a whole gzip file") from error


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """A ParquetFile.

    Raises:
        ArgumentError: it can't be read or is damaged, now or while it is open.
    """
    import pyarrow
    from pyarrow.parquet import ParquetFile

    with _opened(path) as file:
        try:
            with ParquetFile(file) as opened:
                yield opened
        except (pyarrow.ArrowException, OSError) as error:  # it calls damage an OSError too
            raise ArgumentError(str(path), f"{error}".splitlines()[0], "a whole Parquet file") from error
