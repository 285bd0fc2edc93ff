"""LlamaIndex's embedding model: for its indexes and ingestion pipelines."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

from fastbert.installed import missing
from fastbert.model.sentence import Mode
from fastbert.tasks.encode import TextEncoder
from fastbert.tasks.loading import DTypeName

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
except ImportError as error:
    raise missing("fastbert.llama_index", "llama-index-core", "llama-index", error) from error


class FastbertEmbedding(BaseEmbedding):
    """Embeds nodes and queries with the model of a checkpoint folder.

    Each setting is a field, so that LlamaIndex's cache of a pipeline tells one from another. An unpickled one loads the
    folder anew, and takes the weights from the pickle where there is no folder. The asynchronous methods compute in a
    thread.

    Args:
        model_name: a checkpoint folder, as `TextEncoder.from_folder` takes it.
        dtype: what the model computes in, as there.
        device: where, as there.
        query_prompt: what is put before a query; by default the folder's prompt "query", if it has one.
        document_prompt: what is put before a text; by default the folder's prompt "document", if it has one.
        pooling, normalize, max_length, truncate_dim, batch_tokens: as `TextEncoder.encode` takes them.
        embed_batch_size: how many texts LlamaIndex hands over at once. By default as many as it allows, because they
            are put into batches of like length here.

    `BaseEmbedding` has more fields.

    Raises:
        ValidationError: pydantic's, for a field that is not of its type, or that there is not.
        ArgumentError: torch can't use `device` here.
        BackendError: the device has no int8.
        CheckpointError: the folder is not a checkpoint fastbert reads.
    """

    model_config = ConfigDict(extra="forbid")

    embed_batch_size: int = Field(default=2048, gt=0, le=2048)
    dtype: DTypeName | None = None
    device: str | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    pooling: Mode | None = None
    normalize: bool | None = None
    max_length: int | None = None
    truncate_dim: int | None = None
    batch_tokens: int | None = None
    _encoder: TextEncoder = PrivateAttr()

    def __init__(self, model_name: str | os.PathLike[str], **fields: Any) -> None:
        super().__init__(model_name=os.fspath(model_name), **fields)
        self._encoder = TextEncoder.from_folder(self.model_name, dtype=self.dtype, device=self.device)

    @classmethod
    def class_name(cls) -> str:
        """What LlamaIndex calls it in what it stores."""
        return "FastbertEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embeddings(self._encoder.encode_query, [query], self.query_prompt)[0]

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embeddings(self._encoder.encode_document, texts, self.document_prompt)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

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
