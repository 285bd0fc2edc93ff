"""What tells one model from another whose embeddings must not be mixed with its own."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastbert.tasks.encode import TextEncoder


def fingerprint(encoder: TextEncoder) -> str:
    """64 hexadecimal digits of all that decides an embedding: weights in their dtype, shape, tokenizer and recipe.

    Another version of `tokenizers` that writes its rules down in other words gives others.
    """
    model = encoder.model
    return _digest([model.config, model.state_dict(), encoder.tokenizer.description(), encoder.recipe])


def fingerprint_of_texts(texts: Iterable[str]) -> str:
    """64 hexadecimal digits of texts in their order."""
    return _digest(texts)


def _digest(values: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """A value, with its kind and size before it, so that no two rows of values look alike."""
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif dataclasses.is_dataclass(value):
        _add(digest, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        _add(digest, sorted(value))
        for name in sorted(value):
            _add(digest, value[name])
    elif isinstance(value, tuple | list):
        digest.update(f"{len(value)} of ".encode())
        for item in value:
            _add(digest, item)
    else:
        text = value.__name__ if callable(value) else str(value)
        content = text.encode(errors="surrogatepass")
        digest.update(f"{type(value).__name__} {len(content)} ".encode() + content)
