"""`FastbertEmbeddings`, as LangChain's users use embeddings."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert

from fastbert.errors import ArgumentError, CheckpointError
from fastbert.tasks.encode import TextEncoder

pytest.importorskip("langchain_core", reason="its vector stores are meant; pip install langchain-core runs this")

from langchain_core.vectorstores import InMemoryVectorStore

from fastbert.langchain import FastbertEmbeddings

TEXTS = ["film was great", "a dull plot", "ada met alan in oslo ."]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bert.with_prompts(tmp_path / "model", query="the film ", document="a story ")


def rows(embeddings: Any) -> np.ndarray:
    return np.asarray(embeddings, np.float32)


def test_queries_and_documents_have_their_prompts(folder: Path) -> None:
    """langchain #27857: documents were embedded with the prompt of queries."""
    encoder = TextEncoder.from_folder(folder)
    embeddings = FastbertEmbeddings(folder)
    np.testing.assert_array_equal(rows(embeddings.embed_documents(TEXTS)), encoder.encode_document(TEXTS))
    np.testing.assert_array_equal(rows(embeddings.embed_query(TEXTS[0])), encoder.encode_query(TEXTS[:1])[0])
    own = FastbertEmbeddings(folder, query_prompt="very ", document_prompt="")
    np.testing.assert_array_equal(rows(own.embed_documents(TEXTS)), encoder.encode(TEXTS, prompt=""))
    np.testing.assert_array_equal(rows(own.embed_query(TEXTS[0])), encoder.encode(TEXTS[:1], prompt="very ")[0])


@pytest.mark.filterwarnings("ignore:pooling=", "ignore:.*max_length")
def test_settings_are_those_of_encode(folder: Path) -> None:
    settings: dict[str, Any] = {"pooling": "max", "normalize": True, "max_length": 5, "truncate_dim": 8}
    embeddings, encoder = FastbertEmbeddings(folder, **settings), TextEncoder.from_folder(folder)
    np.testing.assert_array_equal(rows(embeddings.embed_documents(TEXTS)), encoder.encode_document(TEXTS, **settings))
    query = encoder.encode_query(TEXTS[:1], **settings)[0]
    np.testing.assert_array_equal(rows(embeddings.embed_query(TEXTS[0])), query)


def test_a_vector_store_finds_texts(folder: Path) -> None:
    """mem0 #1752: embeddings that were no lists of floats were refused by a store."""
    embeddings = FastbertEmbeddings(folder, query_prompt="", document_prompt="")
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
    ((found, score),) = store.similarity_search_with_score(TEXTS[1], k=1)
    assert found.page_content == TEXTS[1] and score == pytest.approx(1)
    json.dumps(embeddings.embed_documents(TEXTS))
    (found,) = asyncio.run(store.asimilarity_search(TEXTS[2], k=1))
    assert found.page_content == TEXTS[2]


def test_no_documents(folder: Path) -> None:
    """chatdocs #99: an IndexError."""
    assert FastbertEmbeddings(folder).embed_documents([]) == []


def test_the_event_loop_goes_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ogx #3332: embedding blocked all else that a server did."""
    embeddings, answered = FastbertEmbeddings(folder), threading.Event()
    monkeypatch.setattr(TextEncoder, "encode_document", lambda *_, **__: np.full((1, 2), answered.wait(20)))

    async def other() -> None:
        answered.set()

    async def server() -> Any:
        return await asyncio.gather(embeddings.aembed_documents(TEXTS), other())

    assert asyncio.run(server()) == [[[True, True]], None]


def test_it_is_pickled_and_shown(folder: Path) -> None:
    embeddings = FastbertEmbeddings(folder, truncate_dim=8)
    copied = pickle.loads(pickle.dumps(embeddings))
    assert copied.embed_documents(TEXTS) == embeddings.embed_documents(TEXTS)
    assert "truncate_dim=8" in repr(embeddings) and "Tensor" not in repr(embeddings)


def test_what_is_wrong_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        FastbertEmbeddings(tmp_path / "nowhere")
    for argument, value in {"dtype": "fp8", "device": "gpu", "pooling": "sum", "batch_tokens": 0}.items():
        with pytest.raises(ArgumentError) as raised:
            FastbertEmbeddings(folder, **{argument: value}).embed_query("film")
        assert raised.value.argument == argument
    with pytest.raises(ArgumentError, match="Wrap it in a list"):
        FastbertEmbeddings(folder).embed_documents("film")
    with pytest.raises(ArgumentError, match=r"texts\[0\]"):
        FastbertEmbeddings(folder).embed_query(None)
