"""Errors that name the argument, what came, what was expected and how to mend it."""

from __future__ import annotations


class FastbertError(Exception):
    """Base of every error fastbert raises on purpose.

    Args:
        argument: name of the argument, file or option that is wrong.
        got: what came.
        expected: what would have been right.
        mend: one sentence saying how to get there.
    """

    def __init__(self, argument: str, got: object, expected: str, mend: str = "") -> None:
        super().__init__(argument, got, expected, mend)
        self.argument = argument
        self.got = got
        self.expected = expected
        self.mend = mend

    def __str__(self) -> str:
        tail = f" {self.mend}" if self.mend else ""
        return f"{self.argument}: got {self.got}; expected {self.expected}.{tail}"


class ArgumentError(FastbertError, ValueError):
    """An argument has the wrong shape, dtype, device or value."""


class BackendError(FastbertError, RuntimeError):
    """The path that was asked for cannot serve this call."""


class CheckpointError(FastbertError, ValueError):
    """A checkpoint folder or file is missing, damaged or not understood."""


class MissingError(FastbertError, ImportError):
    """A package of another project is not installed, or can't be imported."""


class UntrainedWarning(UserWarning):
    """A part of a model was not in its checkpoint and begins untrained."""


def shown(value: object, most: int = 80) -> str:
    """The repr of a value for a message, cut after so many characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
