"""Fields of other people's JSON files, each read as what it must be."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

from fastbert.errors import CheckpointError, shown


class Fields:
    """The fields of one JSON object. A field that is missing or null has the default that is asked for with it.

    Every method raises CheckpointError, which names the file and the field, where the value is of another kind or out
    of range. JSON's true and false are no numbers, and 3.0 is no whole number.

    Args:
        source: the file, as messages name it.
        values: the object.
    """

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source = source
        self.values = values

    def given(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def whole(self, name: str, default: int, *, least: int | None = None, most: int | None = None) -> int:
        """A whole number between `least` and `most`, both included."""
        value = self.values.get(name)
        if value is None:
            return default
        in_range = isinstance(value, int) and (least is None or value >= least) and (most is None or value <= most)
        if not in_range or isinstance(value, bool):
            raise self.error(name, f"a whole number{_range(least, most)}")
        return value

    def number(self, name: str, default: float, *, least: float | None = None, most: float | None = None) -> float:
        """A finite number between `least` and `most`, both included."""
        value = self.values.get(name)
        if value is None:
            return default
        lowest = -sys.float_info.max if least is None else least
        highest = sys.float_info.max if most is None else most
        if not isinstance(value, int | float) or isinstance(value, bool) or not lowest <= value <= highest:
            raise self.error(name, f"a finite number{_range(least, most)}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def text(self, name: str, default: str, choices: Collection[str] | None = None) -> str:
        """A string; one of `choices`, if there are any."""
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, str) or (choices is not None and value not in choices):
            raise self.error(name, "a string" if choices is None else f"one of {', '.join(choices)}")
        return value

    def texts(self, name: str) -> list[str]:
        """A list of strings; empty by default."""
        value = self.values.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, "a list of strings")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; empty by default."""
        value = self.values.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(name, "an object")
        return value

    def error(self, name: str, expected: str, mend: str = "") -> CheckpointError:
        """What to raise where the field has a value that is not `expected`."""
        return CheckpointError(f"{self.source}: {name}", shown(self.values.get(name)), expected, mend)


def _range(least: float | None, most: float | None) -> str:
    if least is not None and most is not None:
        return f" from {least} to {most}"
    if least is not None:
        return f" of {least} or more"
    return "" if most is None else f" of {most} or less"
