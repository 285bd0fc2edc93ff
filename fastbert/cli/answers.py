"""Texts to what is known of each: `classify`, `score`, `tag`, `fill-mask`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from fastbert.cli.corpora import check_absent, on_cluster
from fastbert.cli.inputs import InputFormat, Kind, Texts
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
    Output,
    OutputAs,
    Pairs,
    Ray,
    Workers,
)
from fastbert.cli.outputs import OutputFormat, output_format, writing
from fastbert.cli.piping import check_output, end_on_signals, results

if TYPE_CHECKING:
    from fastbert.cli.outputs import Columns

Model = TypeVar("Model")


def classify(
    model: Annotated[Path, typer.Option(help="A checkpoint folder with a classifier.")],
    input: Input = Path("-"),
    output: Output = None,
    output_as: OutputAs = None,
    input_as: InputAs = None,
    column: Column = None,
    pairs: Pairs = False,
    dtype: DType = None,
    device: Device = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
    ray: Ray = False,
    keep: Keep = None,
    workers: Workers = None,
) -> None:
    """Label texts, with the probability of every label.

    \b
    fastbert classify reviews.csv --model sentiment --output labels.jsonl
    echo "a lovely film" | fastbert classify --model sentiment
    """
    options: dict[str, Any] = {"max_length": max_length, "batch_tokens": batch_tokens}
    if ray:
        from fastbert.ray import classify as run

        check_absent("with --ray", input_format=input_as, device=device, pairs=pairs or None)
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

    from fastbert.tasks.classify import TextClassifier

    def example(classifier: TextClassifier) -> dict[str, Any]:
        labels = classifier.model.head_config.labels
        return {"text": ["", ""] if pairs else "", "label": "", "probabilities": dict.fromkeys(labels, 0.0)}

    def answers(classifier: TextClassifier, texts: list[Any]) -> Columns:
        found = classifier.classify(texts, **options, progress=sys.stderr.isatty())
        return {
            "text": texts,
            "label": [one.label for one in found],
            "probabilities": [one.probabilities for one in found],
        }

    answer(
        (input, input_as, column, "pair" if pairs else "text"),
        (output, output_as),
        lambda: TextClassifier.from_folder(model, dtype=dtype, device=device),
        example,
        answers,
    )


def score(
    model: Annotated[Path, typer.Option(help="A checkpoint folder with a head of one output, as of a cross-encoder.")],
    input: Input = Path("-"),
    output: ArrayOutput = None,
    output_as: OutputAs = None,
    input_as: InputAs = None,
    column: Column = None,
    pairs: Pairs = False,
    dtype: DType = None,
    device: Device = None,
    max_length: MaxLength = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Score texts or pairs of them: one number each.

    To order documents for a query, see rerank.

    \b
    fastbert score pairs.jsonl --pairs --model reranker --output scores.npy
    echo "a lovely film" | fastbert score --model stars
    """
    import numpy as np

    from fastbert.tasks.score import TextScorer

    def example(scorer: TextScorer) -> dict[str, Any]:
        return {"text": ["", ""] if pairs else "", "score": np.float32(0)}

    def answers(scorer: TextScorer, texts: list[Any]) -> Columns:
        found = scorer.score(texts, max_length=max_length, batch_tokens=batch_tokens, progress=sys.stderr.isatty())
        return {"text": texts, "score": found}

    answer(
        (input, input_as, column, "pair" if pairs else "text"),
        (output, output_as),
        lambda: TextScorer.from_folder(model, dtype=dtype, device=device),
        example,
        answers,
        npy=True,
    )


def tag(
    model: Annotated[Path, typer.Option(help="A checkpoint folder with a tagger.")],
    input: Input = Path("-"),
    output: Output = None,
    output_as: OutputAs = None,
    input_as: InputAs = None,
    column: Column = None,
    words: Annotated[
        Literal["remembered", "whitespace", "json"],
        typer.Option(
            help='As the training file cut them, what spaces part, or JSON lists of words, "tokens" in an object.'
        ),
    ] = "remembered",
    dtype: DType = None,
    device: Device = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Most tokens of a window, longer texts are several; by default what the folder allows."),
    ] = None,
    batch_tokens: BatchTokens = None,
) -> None:
    """Find entities in texts.

    An entity has a type, start and end in characters, its text, and the mean probability of its tags as score. Of lists
    of words, start and end count words.

    \b
    fastbert tag letters.txt --model names --output entities.jsonl
    echo '["Ada", "met", "Alan"]' | fastbert tag --model names --words json
    """
    from fastbert.tasks.tag import TextTagger

    listed = words == "json"
    name = "words" if listed else "text"

    def example(tagger: TextTagger) -> dict[str, Any]:
        entity = {"type": "", "start": 0, "end": 0, "text": "", "score": 0.0}
        return {name: [""] if listed else "", "entities": [entity]}

    def answers(tagger: TextTagger, texts: list[Any]) -> Columns:
        found = tagger.tag(
            texts,
            words="whitespace" if words == "whitespace" else "remembered",
            max_length=max_length,
            batch_tokens=batch_tokens,
            progress=sys.stderr.isatty(),
        )
        entities = [
            [
                {"type": one.kind, "start": one.start, "end": one.end, "text": one.text, "score": one.score}
                for one in of_text
            ]
            for of_text in found
        ]
        return {name: texts, "entities": entities}

    answer(
        (input, input_as, column, "words" if listed else "text"),
        (output, output_as),
        lambda: TextTagger.from_folder(model, dtype=dtype, device=device),
        example,
        answers,
    )


def fill_mask(
    model: Annotated[Path, typer.Option(help="A checkpoint folder with a head for masked tokens.")],
    input: Input = Path("-"),
    top_k: Annotated[
        int | None, typer.Option(help="How many tokens for each mask; by default 5, or all of --target.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Ask about this word only; may be given again. One token each.")
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
    """Find the likeliest tokens for the masks in texts.

    A mask is spelled as the model spells it, [MASK] or <mask> say. Each has a list of tokens with their probabilities.

    \b
    echo "The capital of France is [MASK]." | fastbert fill-mask --model bert-base-uncased
    fastbert fill-mask texts.txt --model bert-base-uncased --target good --target bad
    """
    from fastbert.tasks.fill_mask import MaskFiller

    def example(filler: MaskFiller) -> dict[str, Any]:
        return {"text": "", "masks": [[{"token": "", "id": 0, "probability": 0.0}]]}

    def answers(filler: MaskFiller, texts: list[Any]) -> Columns:
        found = filler.fill(
            texts,
            top_k=top_k,
            targets=target or None,
            max_length=max_length,
            batch_tokens=batch_tokens,
            progress=sys.stderr.isatty(),
        )
        return {"text": texts, "masks": [[list(map(asdict, mask)) for mask in masks] for masks in found]}

    answer(
        (input, input_as, column, "text"),
        (output, output_as),
        lambda: MaskFiller.from_folder(model, dtype=dtype, device=device),
        example,
        answers,
    )


def answer(
    given: tuple[Path, InputFormat | None, list[str] | None, Kind],
    wanted: tuple[Path | None, OutputFormat | None],
    load: Callable[[], Model],
    example: Callable[[Model], dict[str, Any]],
    answers: Callable[[Model, list[Any]], Columns],
    *,
    npy: bool = False,
) -> None:
    """Write what a model answers to each part of the texts, as they come.

    Args:
        given: the arguments of `Texts`.
        wanted: where to write, and what.
        load: gives the model.
        example: a row of what it answers; see `outputs.writing`.
        answers: the rows of a part.
        npy: as for `output_format`.
    """
    end_on_signals()
    output = check_output(wanted[0], given[0])
    how = output_format(output, wanted[1], npy=npy)
    texts = Texts(*given)
    model = load()
    with results(output) as file, writing(file, how, example(model)) as write:
        for part in filter(None, texts.parts(file)):
            write(answers(model, part))
    texts.report()
