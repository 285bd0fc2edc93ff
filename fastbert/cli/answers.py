"""Texts to what is known of each: `classify`, `score`, `tag`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from fastbert.cli.corpora import check_no_cluster, on_cluster
from fastbert.cli.options import BatchTokens, Column, DType, Input, Keep, MaxLength, Output, Ray, Workers
from fastbert.cli.piping import Lines, check_ending, check_output, end_on_signals, results
from fastbert.errors import ArgumentError

_Records = Iterator[dict[str, Any]]
Model = TypeVar("Model")


def classify(
    model: Annotated[Path, typer.Option(help="A checkpoint folder with a classifier.")],
    input: Input = Path("-"),
    output: Output = None,
    dtype: DType = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
    ray: Ray = False,
    column: Column = None,
    keep: Keep = None,
    file_format: Annotated[
        Literal["parquet", "jsonl", "csv"] | None,
        typer.Option("--format", help="With --ray: what to write, by default what the input is."),
    ] = None,
    workers: Workers = None,
) -> None:
    """Label texts, one a line; JSON lines with text, label and the probability of every label."""
    if ray:
        from fastbert.ray import classify as run

        where = {"column": column, "keep": keep, "format": file_format, "workers": workers}
        on_cluster(
            run, input, output, model=model, dtype=dtype, max_length=max_length, batch_tokens=batch_tokens, **where
        )
        return
    check_no_cluster(column=column, keep=keep, format=file_format, workers=workers)
    from fastbert.tasks.classify import TextClassifier

    def records(classifier: TextClassifier, texts: list[str]) -> _Records:
        found = classifier.classify(
            texts, max_length=max_length, batch_tokens=batch_tokens, progress=sys.stderr.isatty()
        )
        for text, one in zip(texts, found, strict=True):
            yield {"text": text, "label": one.label, "probabilities": one.probabilities}

    _answer(input, output, lambda: TextClassifier.from_folder(model, dtype=dtype), records)


def score(
    model: Annotated[Path, typer.Option(help="A checkpoint folder with a head of one output, as of a cross-encoder.")],
    input: Input = Path("-"),
    output: Output = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="A line is two texts with a tab between them.")] = False,
    dtype: DType = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Score texts or pairs of them, one a line; JSON lines with text and score."""
    from fastbert.tasks.score import TextScorer

    def records(scorer: TextScorer, texts: list[str]) -> _Records:
        given = _pairs(texts) if pairs else texts
        found = scorer.score(given, max_length=max_length, batch_tokens=batch_tokens, progress=sys.stderr.isatty())
        for text, one in zip(given, found.tolist(), strict=True):
            yield {"text": text, "score": one}

    _answer(input, output, lambda: TextScorer.from_folder(model, dtype=dtype), records)


def tag(
    model: Annotated[Path, typer.Option(help="A checkpoint folder with a tagger.")],
    input: Input = Path("-"),
    output: Output = None,
    words: Annotated[
        Literal["remembered", "whitespace", "json"],
        typer.Option(help="As the training file cut them, what spaces part, or each line a JSON list of words."),
    ] = "remembered",
    dtype: DType = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Most tokens of a window, longer texts are several; by default what the folder allows."),
    ] = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Find entities in texts, one a line; JSON lines with text and its entities.

    An entity has a type, start and end in characters, its text, and the mean probability of its tags as score. Of lists
    of words, start and end count words.
    """
    from fastbert.tasks.tag import TextTagger

    def records(tagger: TextTagger, texts: list[str]) -> _Records:
        given = _word_lists(texts) if words == "json" else texts
        found = tagger.tag(
            given,
            words="whitespace" if words == "whitespace" else "remembered",
            max_length=max_length,
            batch_tokens=batch_tokens,
            progress=sys.stderr.isatty(),
        )
        for text, entities in zip(given, found, strict=True):
            yield {
                "words" if words == "json" else "text": text,
                "entities": [
                    {"type": one.kind, "start": one.start, "end": one.end, "text": one.text, "score": one.score}
                    for one in entities
                ],
            }

    _answer(input, output, lambda: TextTagger.from_folder(model, dtype=dtype), records)


def _answer(
    input: Path, output: Path | None, load: Callable[[], Model], records: Callable[[Model, list[str]], _Records]
) -> None:
    """Write a JSON line for each text, as they come."""
    end_on_signals()
    output = check_output(output)
    check_ending(output)
    lines = Lines(input)
    model = load()
    with results(output) as file:
        for texts in filter(None, lines.parts(file)):
            file.write("".join(json.dumps(record) + "\n" for record in records(model, texts)).encode())
            file.flush()
    lines.report()


def _pairs(lines: list[str]) -> list[tuple[str, str]]:
    found = []
    for line in lines:
        first, tab, second = line.partition("\t")
        if not tab or "\t" in second:
            raise ArgumentError("INPUT", f"the line {line!r:.80}", "two texts with one tab between them")
        found.append((first, second))
    return found


def _word_lists(lines: list[str]) -> list[list[str]]:
    found = []
    for line in lines:
        try:
            words = json.loads(line)
        except (ValueError, RecursionError):
            words = None
        if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
            raise ArgumentError("INPUT", f"the line {line!r:.80}", 'a JSON list of words, such as ["Ada", "met"]')
        found.append(words)
    return found
