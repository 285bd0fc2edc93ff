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


def check_no_cluster(**given: Any) -> None:
    """Refuse options that only `--ray` has."""
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(f"--{name}", value, "no such option without --ray")


def on_cluster(task: Callable[..., Written], input: Path, output: Path | None, **options: Any) -> None:
    """Run a task of `fastbert.ray`, and print what there is then as JSON.

    Args:
        options: those that are None are left to the task.
    """
    if output is None:
        raise ArgumentError("--output", "nothing", "a folder to write to", "Add --output FOLDER.")
    from fastbert.ray.run import connect

    connect()
    end_on_signals()  # only now: Ray has handlers of its own, which abort
    said = {name: value for name, value in options.items() if value is not None}
    written = task(input, output=output, progress=sys.stderr.isatty(), **said)
    print(json.dumps(asdict(written)))
