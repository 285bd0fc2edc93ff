"""Texts in their order for a query: `rerank`, `similar`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastbert.cli.inputs import Texts
from fastbert.cli.options import (
    BatchTokens,
    Column,
    Device,
    DType,
    Input,
    InputAs,
    MaxLength,
    Output,
    OutputAs,
)
from fastbert.cli.outputs import output_format, writing
from fastbert.cli.piping import check_apart, check_output, end_on_signals, results
from fastbert.errors import ArgumentError

if TYPE_CHECKING:
    from fastbert.cli.outputs import Columns
    from fastbert.tasks.hits import Hit


def rerank(
    model: Annotated[Path, typer.Option(help="A checkpoint folder with a head of one output, as of a cross-encoder.")],
    input: Input = Path("-"),
    query: Annotated[
        str | None,
        typer.Option(help='What INPUT is ranked for. Without it INPUT holds JSON lines with "query" and "documents".'),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="How many of the best of each query; by default all.")] = None,
    output: Output = None,
    output_as: OutputAs = None,
    input_as: InputAs = None,
    column: Column = None,
    dtype: DType = None,
    device: Device = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Order documents for a query by a cross-encoder's scores.

    The best is the first. Each has its row in INPUT, or in its list, from 0, and its score.

    \b
    fastbert rerank passages.txt --query "who wrote Faust?" --model reranker --top-k 10
    fastbert rerank candidates.jsonl --model reranker --output ranked.jsonl
    """
    end_on_signals()
    output = check_output(output, input)
    how = output_format(output, output_as)

    from fastbert.tasks.score import TextScorer

    texts = Texts(input, input_as, column, "ranking" if query is None else "text")
    scorer = TextScorer.from_folder(model, dtype=dtype, device=device)
    with results(output) as file, writing(file, how, _example()) as write:

        def answer(query: str, documents: list[str]) -> None:
            found = scorer.rerank(
                query,
                documents,
                top_k=top_k,
                max_length=max_length,
                batch_tokens=batch_tokens,
                progress=sys.stderr.isatty(),
            )
            write(_columns([query], [found]))

        if query is not None:
            answer(query, texts.all(file))
        else:
            for part in texts.parts(file):
                for one, documents in part:
                    answer(one, documents)
    texts.report()


def similar(
    input: Annotated[
        Path, typer.Argument(metavar="INPUT", help="A file of texts: lines, .jsonl, .csv, .tsv or .parquet.")
    ],
    model: Annotated[Path, typer.Option(help="A checkpoint folder that makes embeddings.")],
    query: Annotated[
        list[str] | None, typer.Option(help="What to look for; may be given again. By default the lines of stdin.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many texts for each query.")] = 10,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="A file that keeps the embeddings: made if it is not there, else of this model and INPUT."),
    ] = None,
    library: Annotated[
        Literal["torch", "faiss", "usearch"] | None,
        typer.Option(help="What searches. By default torch up to a million texts, above that what is installed."),
    ] = None,
    output: Output = None,
    output_as: OutputAs = None,
    input_as: InputAs = None,
    column: Column = None,
    dtype: DType = None,
    device: Device = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Find the nearest texts to a query, by exact search.

    The nearest is the first. Each has its row in INPUT, from 0, and as its score how alike the embeddings are.

    \b
    fastbert similar texts.txt --model all-MiniLM-L6-v2 --query "a sleeping cat" --embeddings texts.safetensors
    cat queries.txt | fastbert similar texts.txt --model all-MiniLM-L6-v2 --top-k 3
    """
    end_on_signals()
    output = check_output(output, input)
    how = output_format(output, output_as)
    check_apart("--embeddings", embeddings, "INPUT", input)
    check_apart("--embeddings", embeddings, "--output", output)
    if str(input) == "-" and not query:
        raise ArgumentError("--query", "nothing, and stdin holds the texts", "a query", "Add --query TEXT.")

    from fastbert.tasks.encode import TextEncoder
    from fastbert.tasks.similar import TextIndex

    texts = Texts(input, input_as, column)
    queries = None if query else Texts(Path("-"), "text", None)
    encoder = TextEncoder.from_folder(model, dtype=dtype, device=device)
    with results(output) as file, writing(file, how, _example()) as write:
        index = TextIndex.of(
            texts.all(file),
            encoder,
            embeddings=embeddings,
            max_length=max_length,
            batch_tokens=batch_tokens,
            progress=sys.stderr.isatty(),
        )
        texts.report()
        for part in [query or []] if queries is None else queries.parts(file):
            write(_columns(part, index.search(part, top_k=top_k, library=library, batch_tokens=batch_tokens)))
    if queries is not None:
        queries.report()


def _example() -> dict[str, object]:
    import numpy as np

    return {"query": "", "row": 0, "score": np.float32(0), "text": ""}


def _columns(queries: Sequence[str], found: Sequence[Sequence[Hit]]) -> Columns:
    import numpy as np

    hits = [(query, hit) for query, of_query in zip(queries, found, strict=True) for hit in of_query]
    return {
        "query": [query for query, _ in hits],
        "row": [hit.row for _, hit in hits],
        "score": np.array([hit.score for _, hit in hits], np.float32),
        "text": [hit.text for _, hit in hits],
    }
