"""A checkpoint folder to another: `convert`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

from fastbert.cli.piping import end_on_signals


def convert(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The checkpoint folder to read.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, new or empty.")],
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16", "int8"] | None,
        typer.Option(help="Of the weights; by default what they have. int8 is for CPUs and stays int8."),
    ] = None,
    shard_size: Annotated[
        str | None, typer.Option(help="Most bytes of a file of weights, as 2GB; by default all are in one.")
    ] = None,
    to: Annotated[
        Literal["safetensors", "onnx"], typer.Option(help="onnx: model.onnx, compared with the model in onnxruntime.")
    ] = "safetensors",
) -> None:
    """Write a checkpoint folder in another dtype, in shards, in int8, or as ONNX.

    All that is not weights is copied.

    \b
    fastbert convert all-MiniLM-L6-v2 MiniLM-int8 --dtype int8
    fastbert convert bert-base-uncased bert-fp16 --dtype fp16 --shard-size 100MB
    fastbert convert all-MiniLM-L6-v2 MiniLM-onnx --to onnx
    """
    from fastbert.checkpoints.convert import convert as convert_folder

    end_on_signals()
    if to == "onnx":  # what torch's exporter says to its own developers
        warnings.filterwarnings("ignore", category=FutureWarning)
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    convert_folder(folder, out, dtype=dtype, shard_size=shard_size, to=to)
