"""The command line: a module for each group of commands.

Heavy imports are inside the commands, so that `fastbert --help` is quick and `main` comes before torch.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from tempfile import NamedTemporaryFile
from typing import Annotated, Any

import typer

from fastbert.cli.answers import classify, fill_mask, score, tag
from fastbert.cli.converting import convert
from fastbert.cli.embeddings import encode
from fastbert.cli.machine import info, version_of
from fastbert.cli.piping import READER_GONE, flush_stdout, occupy_standard_streams, say
from fastbert.cli.ranking import rerank, similar
from fastbert.cli.rivals import bench
from fastbert.cli.training import train
from fastbert.errors import ArgumentError, FastbertError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # brackets in help are brackets
    help="Packed, padding-free BERT encoders.",
)


def main() -> None:
    """The entry point. Exit codes: docs/command_line.md. What went wrong is one sentence on stderr."""
    occupy_standard_streams()
    warnings.showwarning = _show_warning
    try:
        try:
            app(prog_name="fastbert")
        finally:
            flush_stdout()
    except FastbertError as error:
        say(f"error: {error}")
        sys.exit(2 if isinstance(error, ArgumentError) else 1)
    except BrokenPipeError:
        sys.exit(READER_GONE)
    except OSError as error:
        say(f"error: {error}")
        sys.exit(1)
    except MemoryError as error:
        say(f"error: not enough memory: {error}")
        sys.exit(1)
    except SystemExit:
        raise
    except BaseException as error:  # noqa: BLE001 - the last net, for what no one foresaw; panics of Rust are no Exception
        with NamedTemporaryFile("w", prefix="fastbert-", suffix=".txt", delete=False) as file:
            traceback.print_exc(file=file)
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        say(f"error: {what}. This is a mistake in fastbert; please report it where you got it, with {file.name}")
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastbert {version_of('fastbert')}")
        raise typer.Exit


@app.callback()
def _of_all_commands(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    if context.invoked_subcommand != "bench":  # whose rivals are to be what they are in Python
        # Threads of torch that wait do so asleep: where another process wants the cores too, two that spin were up to
        # ten times as slow. OpenMP reads this when torch is loaded; what the user says, here or more exactly, is
        # stronger.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


for command in (encode, classify, tag, fill_mask, score, rerank, similar, train, convert, bench, info):
    app.command()(command)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {message}")
