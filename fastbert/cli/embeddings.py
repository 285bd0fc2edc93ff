"""Texts to embeddings: `encode`."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

import typer

from fastbert.cli.corpora import check_no_cluster, on_cluster
from fastbert.cli.options import BatchTokens, Column, DType, Input, Keep, MaxLength, Ray, Workers
from fastbert.cli.piping import Lines, check_ending, check_output, end_on_signals, results
from fastbert.errors import ArgumentError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    # Texts, and their embeddings, float32 [texts, hidden].
    _Parts = Iterator[tuple[list[str], npt.NDArray[np.float32]]]


def encode(
    model: Annotated[Path, typer.Option(help="A Hugging Face checkpoint folder.")],
    input: Input = Path("-"),
    output: Annotated[Path | None, typer.Option(help="Write here instead of JSON lines on stdout.")] = None,
    file_format: Annotated[
        Literal["npy", "jsonl", "parquet", "csv"] | None,
        typer.Option(
            "--format",
            help="npy: float32 [lines, hidden]. By default the ending of --output tells. With --ray parquet, jsonl or "
            "csv, by default what the input is.",
        ),
    ] = None,
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
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
    ray: Ray = False,
    column: Column = None,
    keep: Keep = None,
    workers: Workers = None,
) -> None:
    """Embed texts, one a line: row i of the result is line i of the input.

    Lines end with \\n or \\r\\n. Empty lines are empty texts.
    """
    how: dict[str, Any] = {
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

        where = {"column": column, "keep": keep, "format": file_format, "workers": workers}
        on_cluster(run, input, output, model=model, dtype=dtype, **where, **how)
        return
    check_no_cluster(column=column, keep=keep, workers=workers)
    if file_format in ("parquet", "csv"):
        raise ArgumentError("--format", file_format, "npy or jsonl", "Parquet and CSV are for --ray.")
    output = check_output(output)
    if file_format is None:
        file_format = "npy" if output is not None and output.suffix.lower() == ".npy" else "jsonl"
        if file_format == "jsonl":
            check_ending(output, "Or say --format.")
    if output is None and file_format == "npy":
        raise ArgumentError("--output", "nothing", "a file to write .npy to", "Add --output FILE, or --format jsonl.")

    from fastbert.tasks.encode import TextEncoder

    end_on_signals()
    lines = Lines(input)
    encoder = TextEncoder.from_folder(model, dtype=dtype)
    with results(output) as file:
        if file_format == "npy" and not file.seekable():
            raise ArgumentError("--output", f"{output}, a pipe", "a file for .npy", "Add --format jsonl.")
        taken: deque[list[str]] = deque()

        def parts() -> Generator[list[str], None, None]:
            for part in lines.parts(file):
                if part:
                    taken.append(part)
                yield part

        arrays = encoder.encode_parts(parts(), **how, progress=sys.stderr.isatty())
        encoded = ((taken.popleft(), array) for array in arrays)
        if file_format == "npy":
            _write_npy(file, encoder.width(pooling, truncate_dim), encoded)
        else:
            _write_jsonl(file, encoded)
    lines.report()


def _write_npy(file: IO[bytes], hidden: int, parts: _Parts) -> None:
    """One array of all parts; numpy leaves room in its header for any number of rows, which are counted at the end."""
    import numpy as np

    def write_header(rows: int) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, hidden)}
        np.lib.format.write_array_header_1_0(file, header)

    write_header(rows := 0)
    for _, embeddings in parts:
        file.write(np.ascontiguousarray(embeddings, "<f4").data)
        rows += len(embeddings)
    file.seek(0)
    write_header(rows)


def _write_jsonl(file: IO[bytes], parts: _Parts) -> None:
    from fastbert.tasks.results import json_list

    for texts, embeddings in parts:
        for text, embedding in zip(texts, embeddings, strict=True):
            file.write(f'{{"text": {json.dumps(text)}, "embedding": {json_list(embedding.tolist())}}}\n'.encode())
        file.flush()
