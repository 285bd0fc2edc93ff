"""The pipes of a command: lines as they arrive, results that are whole or not there, signals."""

from __future__ import annotations

import codecs
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fastbert.errors import ArgumentError

# The exit code where the reader of the results has gone: what a shell says of a program that SIGPIPE ended.
READER_GONE = 128 + signal.SIGPIPE

LINES_AT_ONCE = 8192
BLOCK = 2**18  # bytes of a read
PATIENCE = 0.1  # seconds that lines wait for company

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def say(message: str) -> None:
    """A line on stderr."""
    print(f"fastbert: {message}", file=sys.stderr)


def occupy_standard_streams() -> None:
    """Open /dev/null where one is closed: the next file of ours would get its number, and what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free, this one
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - or `print` would write to stdout what is for stderr


def end_on_signals() -> None:
    """End as after an error, with temporary files removed, where a signal would end the process on the spot."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and a shell's background jobs
            signal.signal(number, _end)


def _end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


class Noted:
    """Lines that are odd: how many, and the number of the first."""

    def __init__(self) -> None:
        self.count, self.first = 0, 0

    def add(self, number: int) -> None:
        """Count the line of this number."""
        self.count, self.first = self.count + 1, self.first or number

    def report(self, what: str, so: str = "") -> None:
        """Say it on stderr, if there are any."""
        if self.count:
            say(f"{what}: {self.count} (first: line {self.first}){so}")


class Lines:
    """The lines of a file, or of stdin, told apart by \\n alone. U+2028, vertical tab and form feed are text.

    A \\r at the end of a line stays.
    """

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            ArgumentError: it can't be read.
        """
        self._count, self._damaged = 0, Noted()
        self._name = str(path)
        if self._name == "-":
            if sys.stdin is None:
                raise ArgumentError("INPUT", "a standard input that is closed", "texts, one a line", "Name a file.")
            if sys.stdin.isatty():
                say("reading texts from the terminal; end with Ctrl-D")
            self._file: IO[bytes] = sys.stdin.buffer
            return
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise ArgumentError("INPUT", f"{path}: {error.strerror}", "a file of texts, or - for stdin") from error

    def parts(self, results: IO[bytes]) -> Generator[list[str], None, None]:
        """The lines in lists of at most LINES_AT_ONCE; an empty list where the next one may be long in coming.

        A list ends early where nothing more is there to read PATIENCE after it began.

        Raises:
            ArgumentError: they are no UTF-8 at all.
            BrokenPipeError: the reader of `results` has gone. While we wait for input no write could tell us.
        """
        part: list[str] = []
        begun: list[bytes] = []  # pieces of a line without end
        since = time.monotonic()
        while True:
            if not self._arrived(results, max(0.0, since + PATIENCE - time.monotonic())):
                yield part
                yield []
                part = []
                self._arrived(results, None)
                since = time.monotonic()
            block = os.read(self._file.fileno(), BLOCK)
            end, *others = block.split(b"\n")
            begun.append(end)
            for beginning in others:
                part.append(self._text(b"".join(begun)))
                begun = [beginning]
                if len(part) == LINES_AT_ONCE:
                    yield part
                    part = []
                    since = time.monotonic()
            if not block:
                break
        last = b"".join(begun)
        if last and (self._count or last != _BYTE_ORDER_MARK):
            part.append(self._text(last))
        if part:
            yield part

    def _arrived(self, results: IO[bytes], seconds: float | None) -> bool:
        """Whether there is something to read, or the end, within so many seconds; None waits for it."""
        poll = select.poll()
        poll.register(self._file, select.POLLIN)
        poll.register(results, 0)  # for its errors, which come unasked
        found = dict(poll.poll(None if seconds is None else 1000 * seconds))
        if found.get(results.fileno(), 0) & (select.POLLERR | select.POLLHUP):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        return bool(found)

    def _text(self, line: bytes) -> str:
        if not self._count:
            line = line.removeprefix(_BYTE_ORDER_MARK)
            _check_utf8(self._name, line)
        self._count += 1
        try:
            return line.decode()
        except UnicodeDecodeError:
            self._damaged.add(self._count)
            return line.decode(errors="replace")

    def report(self) -> None:
        """Say what was odd about them, when all were read."""
        self._damaged.report("lines with bytes that are not UTF-8", "; U+FFFD stands for those bytes")


def check_output(output: Path | None, read: Path | None = None) -> Path | None:
    """Before any work, see whether `results` could be written there; None stands for stdout.

    Args:
        output: where to write.
        read: the file that the command reads, which results would take the place of.

    Raises:
        ArgumentError: stdout is closed, `output` is `read`, or see `writing.check_replaceable`.
    """
    from fastbert.writing import check_replaceable

    if str(output) in ("-", "/dev/stdout"):
        output = None
    if output is None:
        if sys.stdout is None:
            raise ArgumentError("--output", "nothing, and standard output is closed", "a file to write to")
    elif not _is_pipe_or_device(output):
        check_replaceable(output)
        check_apart("--output", output, "INPUT", read)
    return output


def check_apart(name: str, path: Path | None, other_name: str, other: Path | None) -> None:
    """Raise ArgumentError if these two are one file, of which only what is written last would be left."""
    if path is not None and other is not None and os.path.realpath(path) == os.path.realpath(other):
        raise ArgumentError(name, f"{path}, which is {other_name} too", "another file")


@contextmanager
def results(output: Path | None) -> Iterator[IO[bytes]]:
    """What to write results to: stdout, a pipe or a device, or else a file, which appears when it is whole.

    Raises:
        SystemExit: with READER_GONE, where a pipe's reader has gone.
    """
    from fastbert.writing import replacing

    try:
        if output is None:
            # a buffer of our own: that of sys.stdout may be none, and may write half
            with os.fdopen(sys.stdout.fileno(), "wb", closefd=False) as file:
                yield file
        elif _is_pipe_or_device(output):
            with output.open("wb") as file:
                yield file
        else:
            with replacing(output) as temporary, temporary.open("wb") as file:
                yield file
    except BrokenPipeError:
        raise SystemExit(READER_GONE) from None


def flush_stdout() -> None:
    """Write what `print` left to be written.

    Raises:
        OSError: it can't be; it is dropped, or Python would try again at the very end, and complain.
    """
    if sys.stdout is not None:
        try:
            sys.stdout.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise


def _is_pipe_or_device(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _check_utf8(name: str, first: bytes) -> None:
    """Raise ArgumentError if a file that begins with this line is no text in UTF-8, but nonsense when read as such."""
    zeros = 0 in first
    every_other = zeros and len(first) > 3 and any(first[::2]) != any(first[1::2])
    if every_other or first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        mend = "Convert it: iconv -f UTF-16 -t UTF-8"
        raise ArgumentError("INPUT", f"{name}, which is in UTF-16 or UTF-32", "texts in UTF-8", mend)
    if zeros and "\ufffd" in first.decode(errors="replace"):
        raise ArgumentError("INPUT", f"{name}, which is no text", "texts in UTF-8", "Unpack it, or export its texts.")
