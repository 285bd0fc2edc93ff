"""Arguments and options that commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Input = Annotated[Path, typer.Argument(metavar="INPUT", help="A file of texts, one a line; - for stdin.")]
Output = Annotated[Path | None, typer.Option(help="Write here instead of to stdout.")]
DType = Annotated[
    Literal["fp32", "bf16", "fp16", "int8"] | None,
    typer.Option(help="What the model computes in; int8 on a CPU. By default fp16 on a GPU, fp32 on a CPU."),
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
Column = Annotated[str | None, typer.Option(help="With --ray: the column of the texts; by default text.")]
Keep = Annotated[
    list[str] | None,
    typer.Option(help="With --ray: a column of the input that the output has; to be repeated. By default all."),
]
Workers = Annotated[
    int | None, typer.Option(help="With --ray: how many processes; by default one a GPU, or one a machine without one.")
]
