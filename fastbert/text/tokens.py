"""The tokens of many texts, and those of a batch of them as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastbert.config import EncoderConfig
from fastbert.errors import CheckpointError
from fastbert.packing import Packing


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of many texts, one text after the other.

    Attributes:
        ids: int32 `[tokens]`.
        types: uint8 `[tokens]`, 0 for the first text of a pair and 1 for the second; None when all are 0.
        offsets: int64 `[texts + 1]`; text `i` is `ids[offsets[i]:offsets[i + 1]]`.
    """

    ids: npt.NDArray[np.int32]
    types: npt.NDArray[np.uint8] | None
    offsets: npt.NDArray[np.int64]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 `[texts]`: tokens of each text, special ones included."""
        return np.diff(self.offsets)

    def full(self, max_length: int) -> int:
        """How many texts have `max_length` tokens, and so may have lost their end."""
        return int((self.lengths == max_length).sum())

    def check_fit(self, config: EncoderConfig) -> None:
        """Raise CheckpointError where a token has no row in a model's tables: of words, or of types."""
        types = self.types if config.type_vocab_size else None  # which are not read otherwise
        for kind, values, rows in (("id", self.ids, config.vocab_size), ("type", types, config.type_vocab_size)):
            if values is not None and len(values) and (highest := int(values.max())) >= rows:
                got, expected = f"a token of {kind} {highest}", f"{kind}s below {rows}, the rows of the model's table"
                mend = "The tokenizer is another model's, or has tokens that the model's tables were not resized for."
                raise CheckpointError("tokenizer", got, expected, mend)

    def take(self, values: npt.NDArray[np.int64], rows: Sequence[int]) -> npt.NDArray[np.int64]:
        """Of values `[tokens]`, those of the tokens of these texts, in this order."""
        return np.concatenate([values[self.offsets[row] : self.offsets[row + 1]] for row in rows])

    def packed(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """`(ids, types)` of these texts in this order: int64 `[tokens]` on the CPU, types None when all are 0."""
        slices = [slice(self.offsets[row], self.offsets[row + 1]) for row in rows]
        types = None if self.types is None else _gather(self.types, slices)
        return _gather(self.ids, slices), types

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None, Packing]:
        """`packed` and the packing of these texts, on `device`; see `Packing.sent`."""
        ids, types = self.packed(rows)
        packing = Packing.from_lengths(self.lengths[rows].tolist(), device="cpu")
        packing, there = packing.sent(device, ids=ids, types=types)
        return cast("Tensor", there["ids"]), there["types"], packing


@dataclass(frozen=True, eq=False)
class WordTokens:
    """The tokens of sentences that came as words; a sentence too long for one row is several, which overlap.

    Attributes:
        tokens: one row for each window of a sentence.
        words: int64 `[tokens]`: for the first piece of a word, the word's index among the words of all sentences; -1
            elsewhere. A word in two windows is read where it has more company, so each index occurs exactly once.
    """

    tokens: Tokens
    words: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SentenceTokens:
    """The tokens of documents that came as sentences.

    Attributes:
        tokens: rows `[CLS] sentences [SEP] [SEP]` of two sentences or more of one document; the first separator is room
            for one between any two of them.
        starts: int64 `[sentences]`, ascending: the place of each sentence's first token in `tokens.ids`.
        documents: int64 `[sentences]`, ascending: the document of each.
    """

    tokens: Tokens
    starts: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]


def _gather(values: npt.NDArray[Any], slices: list[slice]) -> Tensor:
    return torch.from_numpy(np.concatenate([values[part] for part in slices], dtype=np.int64))
