"""`--ray`: the files of a corpus, on a cluster."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.cli.piping import end_on_signals
from fastbert.errors import ArgumentError

if TYPE_CHECKING:
    from fastbert.ray import Written


def check_absent(where: str, **given: Any) -> None:
    """Refuse options that mean nothing `where` this is."""
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(f"--{name.replace('_', '-')}", value, f"no such option {where}")


def on_cluster(
    task: Callable[..., Written], input: Path, output: Path | None, columns: list[str] | None, **options: Any
) -> None:
    """Run a task of `fastbert.ray`, and print what there is then as JSON.

    Args:
        columns: one, that of the texts.
        options: those that are None are left to the task.
    """
    if output is None:
        raise ArgumentError("--output", "nothing", "a folder to write to", "Add --output FOLDER.")
    if columns is not None and len(columns) != 1:
        raise ArgumentError("--column", ", ".join(columns), "one column with --ray")
    from fastbert.ray.run import connect

    connect()
    end_on_signals()  # only now: Ray has handlers of its own, which abort
    options["column"] = columns and columns[0]
    said = {name: value for name, value in options.items() if value is not None}
    print(json.dumps(asdict(task(input, output=output, progress=sys.stderr.isatty(), **said))))
