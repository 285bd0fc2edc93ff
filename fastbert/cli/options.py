"""Arguments and options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fastbert.cli.inputs import InputFormat
from fastbert.cli.outputs import OutputFormat

Input = Annotated[
    Path, typer.Argument(metavar="INPUT", help="A file of texts: lines, .jsonl, .csv, .tsv or .parquet; - for stdin.")
]
InputAs = Annotated[
    InputFormat | None,
    typer.Option("--input-format", help="What INPUT holds. By default its ending tells; else a text a line."),
]
Column = Annotated[
    list[str] | None,
    typer.Option(
        "--column", help='The column or key of a text, by default "text" or the only one. Of two texts give it twice.'
    ),
]
Pairs = Annotated[
    bool,
    typer.Option("--pairs", help='Each item is two texts: "text" and "text_pair", or a line with a tab between them.'),
]
Output = Annotated[
    Path | None, typer.Option(help="Write here instead of to stdout; JSON lines, or .parquet by its ending.")
]
ArrayOutput = Annotated[
    Path | None, typer.Option(help="Write here instead of to stdout; JSON lines, or .npy or .parquet by its ending.")
]
OutputAs = Annotated[
    OutputFormat | None, typer.Option("--format", help="What to write. By default the ending of --output tells.")
]
DType = Annotated[
    Literal["fp32", "bf16", "fp16", "int8"] | None,
    typer.Option(help="What the model computes in; int8 on a CPU. By default fp16 on a GPU, fp32 on a CPU."),
]
Device = Annotated[
    str | None, typer.Option(help="Where to compute: cpu, cuda, cuda:1. By default the first GPU, else the CPU.")
]
MaxLength = Annotated[
    int | None, typer.Option(help="Most tokens of a text, the rest is cut off; by default what the folder allows.")
]
BatchTokens = Annotated[int | None, typer.Option(help="Most tokens of a batch; by default what the last cache holds.")]

Ray = Annotated[
    bool,
    typer.Option(
        "--ray",
        help="On a Ray cluster: INPUT is Parquet, JSON lines or CSV, a file or a folder of many; --output is a folder.",
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(help="With --ray: a column of the input that the output has; to be repeated. By default all."),
]
Workers = Annotated[
    int | None, typer.Option(help="With --ray: how many processes; by default one a GPU, or one a machine without one.")
]
