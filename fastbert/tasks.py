"""What a user wants done, in one call: texts in, answers out in the caller's order."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from fastbert.checkpoints.load import load
from fastbert.errors import ArgumentError
from fastbert.models import BertModel
from fastbert.ops.linear import hold_weights
from fastbert.packing import Packing
from fastbert.pooling import pool
from fastbert.reference import Pooling
from fastbert.text import Text, Tokenizer, batches

DTypeName = Literal["fp32", "bf16"]

DTYPES: dict[DTypeName, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

BATCH_TOKENS = 4096  # the fastest of 512 to 16384 with MiniLM on a 2-core CPU: fills the cores, stays near the caches
LONG_WORK = 16  # batches; less is done before a progress bar could be read


def encode(
    texts: Iterable[Text],
    model: str | os.PathLike[str] | TextEncoder,
    *,
    dtype: DTypeName | None = None,
    pooling: Pooling = "mean",
    normalize: bool = True,
    max_length: int = 256,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> npt.NDArray[np.float32]:
    """Embeddings of texts, float32 `[texts, hidden]`, in the order of `texts`.

    Args:
        texts: strings, or pairs of strings.
        model: a Hugging Face checkpoint folder, loaded anew by each call; or a `TextEncoder`, loaded once.
        dtype: what the model computes in, "fp32" (default for a folder) or "bf16"; a `TextEncoder` has its own already.

    See `TextEncoder.encode` for the other arguments.

    Raises:
        ArgumentError: an argument is not as described; `texts[i]` names the item.
        CheckpointError: the folder is not a checkpoint fastbert reads.
    """
    if not isinstance(model, TextEncoder):
        model = TextEncoder.from_folder(model, dtype=dtype or "fp32")
    elif dtype is not None and DTYPES.get(dtype) != model.dtype:
        raise ArgumentError("dtype", repr(dtype), f"that of the TextEncoder, {model.dtype}", "Leave dtype out.")
    return model.encode(
        texts,
        pooling=pooling,
        normalize=normalize,
        max_length=max_length,
        batch_tokens=batch_tokens,
        progress=progress,
    )


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A model and its tokenizer, loaded once to encode often.

    Attributes:
        model: in eval mode.
        tokenizer: of the same checkpoint.
    """

    model: BertModel
    tokenizer: Tokenizer

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: DTypeName = "fp32",
        device: torch.device | str | None = None,
    ) -> TextEncoder:
        """Load a Hugging Face checkpoint folder.

        Args:
            folder: holds config.json, weights, and tokenizer.json or vocab.txt.
            dtype: "fp32" or "bf16".
            device: where to compute; the first GPU, or the CPU where there is none.

        Raises:
            ArgumentError: `dtype` is neither.
            CheckpointError: the folder is not a checkpoint fastbert reads.
        """
        if dtype not in DTYPES:
            raise ArgumentError("dtype", repr(dtype), f"one of {', '.join(DTYPES)}")
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(load(folder, dtype=DTYPES[dtype], device=device), Tokenizer.from_folder(folder))

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return next(self.model.parameters()).dtype

    def encode(
        self,
        texts: Iterable[Text],
        *,
        pooling: Pooling = "mean",
        normalize: bool = True,
        max_length: int = 256,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Embeddings of texts, float32 `[texts, hidden]`, in the order of `texts`.

        Args:
            texts: strings, or pairs of strings.
            pooling: how the rows of a text become one: their mean, their maximum, or the first one ("cls").
            normalize: scale each embedding to length 1 (a zero embedding stays zero).
            max_length: most tokens of a text, special ones included; the rest is cut off.
            batch_tokens: most tokens of a batch (a longer text is a batch of its own); 4096 by default.
            progress: show a bar on stderr, if the work is long.

        Raises:
            ArgumentError: an argument is not as described; `texts[i]` names the item.
        """
        if pooling not in get_args(Pooling):  # before the work, not at the end of the first batch
            raise ArgumentError("pooling", repr(pooling), f"one of {', '.join(get_args(Pooling))}")
        config = self.model.config
        if max_length > config.max_positions:
            raise ArgumentError("max_length", max_length, f"at most the model's {config.max_positions} positions")
        tokens = self.tokenizer.encode(texts, max_length)
        lengths = tokens.lengths
        groups = batches(lengths, BATCH_TOKENS if batch_tokens is None else batch_tokens)
        device = next(self.model.parameters()).device
        embeddings = torch.empty(len(lengths), config.hidden_size, dtype=torch.float32, device=device)
        with torch.inference_mode(), hold_weights():
            for rows in _shown(groups) if progress and len(groups) > LONG_WORK else groups:
                ids, types = tokens.packed(rows)
                packing = Packing.from_lengths(lengths[rows].tolist(), device=device)
                hidden = self.model(
                    ids.to(device), token_type_ids=None if types is None else types.to(device), packing=packing
                ).last_hidden_state
                pooled = pool(hidden, packing, pooling)
                embeddings[rows] = F.normalize(pooled) if normalize else pooled
        return embeddings.cpu().numpy()


def _shown(groups: list[list[int]]) -> Iterable[list[int]]:
    from rich.console import Console
    from rich.progress import track

    return track(groups, description="encoding", console=Console(stderr=True), transient=True)
