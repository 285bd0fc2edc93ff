"""Texts to embeddings: `encode`."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Generator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fastbert.cli.corpora import check_absent, on_cluster
from fastbert.cli.inputs import Texts
from fastbert.cli.options import (
    ArrayOutput,
    BatchTokens,
    Column,
    Device,
    DType,
    Input,
    InputAs,
    Keep,
    MaxLength,
    OutputAs,
    Ray,
    Workers,
)
from fastbert.cli.outputs import output_format, writing
from fastbert.cli.piping import check_output, end_on_signals, results


def encode(
    model: Annotated[Path, typer.Option(help="A Hugging Face checkpoint folder.")],
    input: Input = Path("-"),
    output: ArrayOutput = None,
    output_as: OutputAs = None,
    input_as: InputAs = None,
    column: Column = None,
    pooling: Annotated[
        Literal["mean", "cls", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"] | None,
        typer.Option(
            help="How the tokens of a text become one embedding; by default as the folder says, or their mean."
        ),
    ] = None,
    normalize: Annotated[
        bool | None, typer.Option(help="Scale embeddings to length 1; by default as the folder says, or so.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to put before each text.")] = None,
    prompt_name: Annotated[
        str | None, typer.Option(help="Which of the folder's prompts to put before each text.")
    ] = None,
    truncate_dim: Annotated[
        int | None,
        typer.Option(help="How many columns of an embedding to keep; by default as the folder says, or all."),
    ] = None,
    dtype: DType = None,
    device: Device = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
    ray: Ray = False,
    keep: Keep = None,
    workers: Workers = None,
) -> None:
    """Embed texts: row i of the result is text i of the input.

    Plain lines end with \\n or \\r\\n, and empty ones are empty texts.

    \b
    fastbert encode texts.txt --model all-MiniLM-L6-v2 --output embeddings.npy
    fastbert encode reviews.csv --column review --model all-MiniLM-L6-v2 --output embeddings.parquet
    """
    options: dict[str, Any] = {
        "pooling": pooling,
        "normalize": normalize,
        "max_length": max_length,
        "prompt": prompt,
        "prompt_name": prompt_name,
        "truncate_dim": truncate_dim,
        "batch_tokens": batch_tokens,
    }
    if ray:
        from fastbert.ray import encode as run

        check_absent("with --ray", input_format=input_as, device=device)
        on_cluster(
            run,
            input,
            output,
            column,
            model=model,
            keep=keep,
            format=output_as,
            workers=workers,
            dtype=dtype,
            **options,
        )
        return
    check_absent("without --ray", keep=keep, workers=workers)
    output = check_output(output, input)
    how = output_format(output, output_as, npy=True)

    import numpy as np

    from fastbert.tasks.encode import TextEncoder

    end_on_signals()
    texts = Texts(input, input_as, column)
    encoder = TextEncoder.from_folder(model, dtype=dtype, device=device)
    width = encoder.width(pooling, truncate_dim)
    example = {"text": "", "embedding": np.zeros(width, np.float32)}
    with results(output) as file, writing(file, how, example) as write:
        taken: deque[list[str]] = deque()

        def parts() -> Generator[list[str], None, None]:
            for part in texts.parts(file):
                if part:
                    taken.append(part)
                yield part

        for array in encoder.encode_parts(parts(), **options, progress=sys.stderr.isatty()):
            write({"text": taken.popleft(), "embedding": array})
    texts.report()
