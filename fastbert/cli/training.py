"""Examples to a model: `train`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastbert.cli.options import Device
from fastbert.cli.piping import end_on_signals, say


def train(
    task: Annotated[
        Literal["classify", "tag", "mlm", "pretrain"],
        typer.Argument(
            metavar="TASK",
            help="classify texts, tag words, mlm: predict masked tokens, pretrain: that and the next sentence.",
        ),
    ],
    model: Annotated[Path, typer.Option(help="The Hugging Face checkpoint folder to start from.")],
    train: Annotated[Path, typer.Option(help="Examples to learn from; see docs/training.md for the formats.")],
    out: Annotated[Path, typer.Option(help="The folder to write; new or empty, or that of the run to resume.")],
    valid: Annotated[Path | None, typer.Option(help="Examples to measure by after each epoch.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stopped.")] = False,
    epochs: Annotated[int, typer.Option(help="How often each example is seen.")] = 3,
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 5e-5,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens of a batch.")] = 1024,
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Most tokens of an example.")] = 256,
    dtype: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="What to compute in; the weights are fp32 in both.")
    ] = "fp32",
    warmup: Annotated[float, typer.Option(help="Share of the steps over which the learning rate rises.")] = 0.1,
    schedule: Annotated[Literal["linear", "cosine"], typer.Option(help="How it falls after that.")] = "linear",
    weight_decay: Annotated[float, typer.Option(help="AdamW's, on matrices only.")] = 0.01,
    clip: Annotated[float, typer.Option(help="Most norm of the gradient.")] = 1.0,
    eval_every: Annotated[int | None, typer.Option(help="Steps between measurements within an epoch.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many epochs that were not the best.")] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints, beside one an epoch.")] = 500,
    seed: Annotated[int, typer.Option(help="Of the new head, the order, dropout and masks.")] = 0,
    device: Device = None,
    parallel: Annotated[
        Literal["ddp", "fsdp"], typer.Option(help="Under torchrun: a whole model a process, or one sharded over all.")
    ] = "ddp",
) -> None:
    """Train a model.

    The last metrics go to stdout and to metrics.json in the out folder. A run that was interrupted goes on with
    --resume, bit for bit as if it never stopped.

    \b
    fastbert train classify --model bert-base-uncased --train reviews.csv --valid held_out.csv --out sentiment
    """
    from fastbert import training
    from fastbert.training.parallel import is_first, is_one_of_several, leave

    if not is_one_of_several():  # which torchrun ends, and which may hear no signal while they wait for each other
        end_on_signals()
    settings = training.Settings(
        task=task,
        model=str(model),
        train=str(train),
        valid=None if valid is None else str(valid),
        out=str(out),
        epochs=epochs,
        lr=lr,
        batch_tokens=batch_tokens,
        accumulate=accumulate,
        max_length=max_length,
        dtype=dtype,
        warmup=warmup,
        schedule=schedule,
        weight_decay=weight_decay,
        clip=clip,
        eval_every=eval_every,
        patience=patience,
        checkpoint_every=checkpoint_every,
        seed=seed,
        parallel=parallel,
    )
    metrics = training.train(settings, resume=resume, device=device, progress=sys.stderr.isatty(), say=say)
    if is_first():
        print(json.dumps(metrics))
    leave()
