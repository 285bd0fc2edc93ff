"""LangChain's embeddings: for its vector stores and retrievers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch

from fastbert.installed import missing
from fastbert.model.sentence import Mode
from fastbert.tasks.encode import TextEncoder
from fastbert.tasks.loading import DTypeName

try:
    from langchain_core.embeddings import Embeddings
except ImportError as error:
    raise missing("fastbert.langchain", "langchain-core", "langchain", error) from error


@dataclass(eq=False)
class FastbertEmbeddings(Embeddings):
    """Embeds documents and queries with the model of a checkpoint folder.

    LangChain's `aembed_documents` and `aembed_query` do so in a thread.

    Args:
        model: a checkpoint folder, as `TextEncoder.from_folder` takes it.
        dtype: what the model computes in, as there.
        device: where, as there.
        query_prompt: what is put before a query; by default the folder's prompt "query", if it has one.
        document_prompt: what is put before a document; by default the folder's prompt "document", if it has one.
        pooling, normalize, max_length, truncate_dim, batch_tokens: as `TextEncoder.encode` takes them.

    Attributes:
        encoder: the `TextEncoder` of the folder.

    Raises:
        ArgumentError: `dtype` or `device` is not as described.
        BackendError: the device has no int8.
        CheckpointError: the folder is not a checkpoint fastbert reads.
    """

    model: str | os.PathLike[str]
    _: KW_ONLY
    dtype: DTypeName | None = None
    device: torch.device | str | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    pooling: Mode | None = None
    normalize: bool | None = None
    max_length: int | None = None
    truncate_dim: int | None = None
    batch_tokens: int | None = None
    encoder: TextEncoder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.encoder = TextEncoder.from_folder(self.model, dtype=self.dtype, device=self.device)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embeddings of what is searched in, by `TextEncoder.encode_document`, in the order of `texts`.

        Raises:
            ArgumentError: a text or a setting is not as described; `texts[i]` names the text.
            BackendError: a result is NaN or infinite; `texts[i]` names the text.
        """
        return self._embeddings(self.encoder.encode_document, texts, self.document_prompt)

    def embed_query(self, text: str) -> list[float]:
        """The embedding of what is searched for, by `TextEncoder.encode_query`.

        Raises:
            ArgumentError: the text, which is called `texts[0]`, or a setting is not as described.
            BackendError: a result is NaN or infinite.
        """
        return self._embeddings(self.encoder.encode_query, [text], self.query_prompt)[0]

    def _embeddings(self, encode: Callable[..., Any], texts: list[str], prompt: str | None) -> list[list[float]]:
        rows: list[list[float]] = encode(
            texts,
            prompt=prompt,
            pooling=self.pooling,
            normalize=self.normalize,
            max_length=self.max_length,
            truncate_dim=self.truncate_dim,
            batch_tokens=self.batch_tokens,
        ).tolist()
        return rows
