"""A model and texts of the user's, beside other libraries: `bench`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastbert.cli.inputs import Texts
from fastbert.cli.options import Column, Device, InputAs, MaxLength, Pairs
from fastbert.cli.piping import check_output, end_on_signals, results, say
from fastbert.errors import ArgumentError

WRONG = 1  # the exit code where an answer of fastbert's own is


def bench(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A checkpoint folder.")],
    input: Annotated[
        Path | None,
        typer.Argument(metavar="TEXTS", help="As INPUT of encode. By default sentences that come with fastbert."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write what was measured here, as JSON; - for stdout, in place of the table."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="All texts; else as many as make it about a minute.")] = False,
    input_as: InputAs = None,
    column: Column = None,
    pairs: Pairs = False,
    device: Device = None,
    max_length: MaxLength = None,
) -> None:
    """How fast your model is here, by fastbert and by transformers, sentence-transformers, onnxruntime and OpenVINO.

    \b
    fastbert bench all-MiniLM-L6-v2 texts.txt

    Those that are installed are timed in turns, in each precision, with tokenising; what gives other answers is not.
    """
    from rich.console import Console

    from fastbert.rivals.bench import bench

    end_on_signals()
    to_stdout = str(output) in ("-", "/dev/stdout")
    if output is not None and not to_stdout and output.suffix not in ("", ".json"):
        raise ArgumentError("--output", output, "a name that ends in .json")
    file = check_output(output, input)
    if input is None:
        for option, given in (("--input-format", input_as), ("--column", column), ("--pairs", pairs)):
            if given:
                raise ArgumentError(option, "no TEXTS", "a file of texts", "Name it after the model.")
        texts = None
    else:
        found = Texts(input, input_as, column, "pair" if pairs else "text")
        with results(None) as out:
            texts = found.all(out)
        found.report()
    report = bench(model, texts, full=full, device=device, max_length=max_length, progress=sys.stderr.isatty())
    if output is not None:
        with results(file) as out:
            out.write(json.dumps(report.as_dict(), indent=2).encode() + b"\n")
    Console(stderr=to_stdout, highlight=False).print(report, soft_wrap=True)
    if any(name.startswith("fastbert ") for name in report.wrong):
        say("fastbert's own answers are wrong here: please report it, with the table")
        raise typer.Exit(WRONG)
