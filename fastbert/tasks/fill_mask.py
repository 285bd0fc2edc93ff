"""Texts with masks to the tokens that fit there."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbert.errors import ArgumentError
from fastbert.model.heads import EncoderForMaskedLM
from fastbert.packing import Packing
from fastbert.tasks.loading import DTypeName, with_trained_head
from fastbert.tasks.max_length import tokens_at_most, warn_of_cuts
from fastbert.tasks.results import not_finite, results
from fastbert.text.checks import Text, check_count, items_of
from fastbert.text.tokenizer import Tokenizer

LOGITS_AT_ONCE = 2**26  # numbers; a vocabulary of 250,000 tokens would fill gigabytes for a batch of masks


@dataclass(frozen=True)
class Filling:
    """A token for a mask.

    Attributes:
        token: what it stands for in a text; one that continues a word, and one behind a space, show it as their
            tokenizer does ("##s", " film").
        id: its number in the vocabulary.
        probability: by softmax, over the whole vocabulary.
    """

    token: str
    id: int
    probability: float


def fill_mask(
    texts: Iterable[Text],
    model: str | os.PathLike[str] | MaskFiller,
    *,
    top_k: int = 5,
    targets: Sequence[str] | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> list[list[list[Filling]]]:
    """The likeliest tokens of each mask of each text: `found[text][mask][rank]`.

    Args:
        texts: strings, or pairs of strings, with masks as the model spells them, [MASK] or <mask> say.
        model: a checkpoint folder with a head for masked tokens, loaded anew by each call; or a `MaskFiller`, loaded
            once.

    See `MaskFiller.fill` for the other arguments and for the errors.
    """
    if not isinstance(model, MaskFiller):
        model = MaskFiller.from_folder(model)
    return model.fill(
        texts, top_k=top_k, targets=targets, max_length=max_length, batch_tokens=batch_tokens, progress=progress
    )


@dataclass(frozen=True, eq=False)
class MaskFiller:
    """A model of masked tokens and its tokenizer, loaded once to be used often.

    Attributes:
        model: in eval mode.
        tokenizer: of the same checkpoint; `tokenizer.mask_token` is how a mask is spelled.
    """

    model: EncoderForMaskedLM
    tokenizer: Tokenizer

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: DTypeName | None = None,
        device: torch.device | str | None = None,
    ) -> MaskFiller:
        """Load a checkpoint folder; arguments as `TextEncoder.from_folder`.

        Raises:
            ArgumentError: `dtype` is none of these, or torch can't use `device` here.
            CheckpointError: the folder is not a checkpoint fastbert reads, has no head for masked tokens, or its
                vocabulary has no mask.
        """
        model = with_trained_head(EncoderForMaskedLM, folder, dtype, device)
        tokenizer = Tokenizer.from_folder(folder)
        _ = tokenizer.mask_id  # which it must have
        return cls(model, tokenizer)

    def fill(
        self,
        texts: Iterable[Text],
        *,
        top_k: int = 5,
        targets: Sequence[str] | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> list[list[list[Filling]]]:
        """The likeliest tokens of each mask of each text, the likeliest first: `found[text][mask][rank]`.

        Each mask is filled by itself; the other masks of its text stay masks.

        Args:
            texts: strings, or pairs of strings, each with a mask or several.
            top_k: how many tokens of each mask.
            targets: the only words that are asked about, each of them one token; probabilities stay those among the
                whole vocabulary.
            max_length: most tokens of a text, special ones included; the rest is cut off, and a warning counts the
                texts that were this long. A mask that is cut off is an error.
            batch_tokens: most tokens of a batch (a longer text is a batch of its own); by default as many as the last
                cache of a CPU holds the activations of.
            progress: show a bar on stderr, if the work is long.

        Raises:
            ArgumentError: an argument is not as described; `texts[i]` names a text without a mask.
            BackendError: a result is NaN or infinite; `texts[i]` names the text.
        """
        vocabulary = self.model.config.vocab_size
        check_count("top_k", top_k, vocabulary)
        wanted = None if targets is None else self._ids(targets)
        count = min(top_k, vocabulary if wanted is None else len(wanted))
        max_length = tokens_at_most(max_length, self.tokenizer, self.model.config)
        texts = list(items_of(texts))
        tokens = self.tokenizer.encode(texts, max_length)
        before = np.concatenate([[0], np.cumsum(tokens.ids == self.tokenizer.mask_id, dtype=np.int64)])
        masks = np.diff(before[tokens.offsets])
        self._check_masks(texts, masks.tolist(), max_length)
        warn_of_cuts(tokens.full(max_length), max_length)
        only = None if wanted is None else torch.tensor(wanted, dtype=torch.int64, device=self._device)

        def compute(ids: Tensor, types: Tensor | None, packing: Packing) -> Tensor:
            return self._likeliest(count, only, ids, types, packing)

        shape, doing = (int(masks.sum()), 2 * count), "filling masks" if progress else None
        order, rows = results(self.model, tokens, compute, shape, batch_tokens, doing)
        found: list[list[list[Filling]]] = [[] for _ in texts]
        ends = np.cumsum(masks[order])
        for text, end in zip(order, ends.tolist(), strict=True):
            for row in rows[end - masks[text] : end]:
                probabilities, numbers = row[:count], row[count:].astype(np.int64)
                if not np.isfinite(probabilities).all():
                    raise not_finite(text, self.model)
                pairs = zip(numbers.tolist(), probabilities.tolist(), strict=True)
                found[text].append([Filling(self.tokenizer.text_of(number), number, p) for number, p in pairs])
        return found

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _likeliest(
        self, count: int, only: Tensor | None, ids: Tensor, types: Tensor | None, packing: Packing
    ) -> Tensor:
        """Of each mask the probabilities of its likeliest tokens, then their ids, float32 `[masks, 2 * count]`."""
        rows = (ids == self.tokenizer.mask_id).nonzero().squeeze(1)
        found = [torch.empty((0, 2 * count), dtype=torch.float32, device=ids.device)]
        at_once = max(LOGITS_AT_ONCE // self.model.config.vocab_size, 1)
        for logits in self.model.logits_at(rows, ids, types, packing, at_once=at_once):
            probabilities = logits.float().softmax(1)
            best, at = (probabilities if only is None else probabilities[:, only]).topk(count)
            found.append(torch.cat([best, (at if only is None else only[at]).float()], dim=1))
        return torch.cat(found)

    def _ids(self, targets: Sequence[str]) -> list[int]:
        """The ids of the targets, each once."""
        if isinstance(targets, str) or not isinstance(targets, Sequence) or not targets:
            raise ArgumentError("targets", repr(targets), "a list of words")
        found: dict[int, Any] = {}
        for i, target in enumerate(targets):
            if not isinstance(target, str) or (number := self.tokenizer.id_of_token(target)) is None:
                spaced = isinstance(target, str) and self.tokenizer.id_of_token(f" {target}") is not None
                mend = f"{' ' + target!r}, with the space before it, is one." if spaced else ""
                raise ArgumentError(f"targets[{i}]", repr(target), "a word that is one token of the vocabulary", mend)
            found[number] = None
        return list(found)

    def _check_masks(self, texts: Sequence[Text], masks: Sequence[int], max_length: int) -> None:
        spelling = self.tokenizer.mask_token
        for i, (text, found) in enumerate(zip(texts, masks, strict=True)):
            spelled = sum(one.count(spelling) for one in ([text] if isinstance(text, str) else text))
            if not spelled:
                raise ArgumentError(f"texts[{i}]", f"no {spelling} in it", f"a text with at least one {spelling}")
            if found < spelled:
                got = f"{spelled} masks, of which the tokenizer finds {found} within max_length={max_length} tokens"
                raise ArgumentError(f"texts[{i}]", got, "all of them", "Shorten the text.")
