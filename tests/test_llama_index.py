"""`FastbertEmbedding`, as LlamaIndex's users use an embedding model."""

from __future__ import annotations

import asyncio
import copy
import pickle
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert

from fastbert.errors import ArgumentError, CheckpointError
from fastbert.tasks.encode import TextEncoder

pytest.importorskip("llama_index.core", reason="its indexes are meant; pip install llama-index-core runs this")

from llama_index.core import VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.schema import TextNode
from pydantic import ValidationError

from fastbert.llama_index import FastbertEmbedding

TEXTS = ["film was great", "a dull plot", "ada met alan in oslo ."]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bert.with_prompts(tmp_path / "model", query="the film ", document="a story ")


def rows(embeddings: Any) -> np.ndarray:
    return np.asarray(embeddings, np.float32)


def nodes() -> list[TextNode]:
    return [TextNode(text=text, id_=text) for text in TEXTS]


def test_queries_and_texts_have_their_prompts(folder: Path) -> None:
    encoder = TextEncoder.from_folder(folder)
    model = FastbertEmbedding(folder)
    documents, query = encoder.encode_document(TEXTS), encoder.encode_query(TEXTS[:1])[0]
    np.testing.assert_array_equal(rows(model.get_text_embedding_batch(TEXTS)), documents)
    np.testing.assert_allclose(model.get_text_embedding(TEXTS[0]), documents[0], atol=1e-6)
    np.testing.assert_array_equal(rows(model.get_query_embedding(TEXTS[0])), query)
    own = FastbertEmbedding(model_name=str(folder), query_prompt="very ", document_prompt="")
    np.testing.assert_array_equal(rows(own.get_text_embedding_batch(TEXTS)), encoder.encode(TEXTS, prompt=""))
    np.testing.assert_array_equal(rows(own.get_query_embedding(TEXTS[0])), encoder.encode(TEXTS[:1], prompt="very ")[0])
    assert model.get_text_embedding_batch([]) == []


@pytest.mark.filterwarnings("ignore:pooling=", "ignore:.*max_length")
def test_settings_are_those_of_encode(folder: Path) -> None:
    settings: dict[str, Any] = {"pooling": "max", "normalize": True, "max_length": 5, "truncate_dim": 8}
    model, encoder = FastbertEmbedding(folder, **settings), TextEncoder.from_folder(folder)
    wanted = encoder.encode_document(TEXTS, **settings)
    np.testing.assert_array_equal(rows(model.get_text_embedding_batch(TEXTS)), wanted)
    query = encoder.encode_query(TEXTS[:1], **settings)[0]
    np.testing.assert_array_equal(rows(model.get_query_embedding(TEXTS[0])), query)


def test_all_texts_are_handed_over_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LlamaIndex's own default is ten."""
    sizes = []
    encode = TextEncoder.encode_document
    monkeypatch.setattr(
        TextEncoder,
        "encode_document",
        lambda self, texts, **how: sizes.append(len(texts)) or encode(self, texts, **how),
    )
    FastbertEmbedding(folder).get_text_embedding_batch(TEXTS * 10)
    assert sizes == [30]


def test_an_index_finds_texts(folder: Path) -> None:
    index = VectorStoreIndex(nodes(), embed_model=FastbertEmbedding(folder, query_prompt="", document_prompt=""))
    retriever = index.as_retriever(similarity_top_k=1)
    assert [found.node.text for found in retriever.retrieve(TEXTS[1])] == [TEXTS[1]]
    assert [found.node.text for found in asyncio.run(retriever.aretrieve(TEXTS[2]))] == [TEXTS[2]]


def test_a_pipeline_s_cache_tells_settings_apart(folder: Path) -> None:
    pipeline = IngestionPipeline(transformations=[FastbertEmbedding(folder)], disable_cache=False)
    first = rows([node.embedding for node in pipeline.run(nodes=nodes())])
    pipeline.transformations = [FastbertEmbedding(folder, document_prompt="")]
    again = rows([node.embedding for node in pipeline.run(nodes=nodes())])
    np.testing.assert_array_equal(again, TextEncoder.from_folder(folder).encode(TEXTS, prompt=""))
    assert not np.array_equal(first, again)


def test_asynchronous_calls_leave_the_event_loop_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FastbertEmbedding(folder)
    synchronous = [model.get_text_embedding_batch(TEXTS), model.get_text_embedding("a"), model.get_query_embedding("a")]

    async def all_ways() -> Any:
        calls = (
            model.aget_text_embedding_batch(TEXTS),
            model.aget_text_embedding("a"),
            model.aget_query_embedding("a"),
        )
        return await asyncio.gather(*calls)

    assert asyncio.run(all_ways()) == synchronous
    answered = threading.Event()
    for name in ("encode_document", "encode_query"):
        monkeypatch.setattr(TextEncoder, name, lambda *_, **__: np.full((1, 2), answered.wait(20)))

    async def server() -> Any:
        calls = asyncio.gather(
            model.aget_text_embedding_batch(["a"]), model.aget_text_embedding("a"), model.aget_query_embedding("a")
        )
        await asyncio.sleep(0)
        answered.set()
        return await calls

    assert asyncio.run(server()) == [[[True, True]], [True, True], [True, True]]


@pytest.mark.parametrize("there", [True, False], ids=["folder there", "folder gone"])
def test_copies(there: bool, folder: Path) -> None:
    """llama_index #13497: 'HuggingFaceEmbedding' object has no attribute '_model', in another process."""
    model = FastbertEmbedding(folder, truncate_dim=8)
    wanted, pickled, written = model.get_text_embedding("a"), pickle.dumps(model), model.to_dict()
    if there:
        assert FastbertEmbedding.from_dict(written).get_text_embedding("a") == wanted
    else:
        shutil.rmtree(folder)
    assert pickle.loads(pickled).get_text_embedding("a") == wanted
    assert copy.deepcopy(model).get_text_embedding("a") == wanted


def test_what_is_wrong_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        FastbertEmbedding(tmp_path / "nowhere")
    for field, value in {"device": "gpu", "batch_tokens": 0, "truncate_dim": 99}.items():
        with pytest.raises(ArgumentError) as raised:
            FastbertEmbedding(folder, **{field: value}).get_text_embedding("film")
        assert raised.value.argument == field
    for field, value in (("dtype", "fp8"), ("pooling", "sum"), ("normalise", True)):
        with pytest.raises(ValidationError, match=field):
            FastbertEmbedding(folder, **{field: value})
