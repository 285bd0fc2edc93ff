"""The service in examples/serving: its queue, its models, and its endpoints as other people's clients call them."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import engines
import numpy as np
import numpy.typing as npt
import pytest
import tiny_bert
from batching import Batcher, OverloadedError

import fastbert
from fastbert.text.tokens import Tokens

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["the film was fine", "a dull plot with a very lovely scene", "ada met alan in oslo .", "music"]
HOW = "run `make test-serving`, which installs the service and its clients"
Rows = npt.NDArray[np.float32]


# The queue


def tokens_of(*lengths: int, first: int = 0) -> Tokens:
    """Texts of so many tokens; their ids count up."""
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return Tokens(np.arange(first, first + offsets[-1], dtype=np.int32), None, offsets)


def first_ids(tokens: Tokens) -> Rows:
    """A row of each text: the id of its first token."""
    return tokens.ids[tokens.offsets[:-1]].astype(np.float32)[:, None]


class Held:
    """A compute function that waits to be let go, and remembers the lengths of the texts of each batch."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.let_go = threading.Event()

    def __call__(self, tokens: Tokens) -> Rows:
        self.batches.append(tokens.lengths.tolist())
        assert self.let_go.wait(30)
        return first_ids(tokens)


def batcher_of(compute: Callable[[Tokens], Rows], **options: Any) -> Batcher:
    return Batcher(compute, 1, **{"batch_tokens": 10, "queue_tokens": 1000, "linger": 0.0} | options)


def queued(batcher: Batcher, ask: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run `ask` beside the batcher."""

    async def both() -> None:
        working = asyncio.create_task(batcher.run())
        await asyncio.wait_for(ask(), 60)
        assert not working.done()
        working.cancel()

    asyncio.run(both())


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.001)


def shows(url: str, *lines: str) -> None:
    """Wait until /metrics has these lines."""
    end = time.monotonic() + 60
    while missing := set(lines) - set(call(f"{url}/metrics")[1].decode().splitlines()):
        assert time.monotonic() < end, f"/metrics never showed {missing}"
        time.sleep(0.01)


def test_each_request_gets_its_own_rows_in_order() -> None:
    sizes: list[int] = []
    batcher = batcher_of(first_ids, observe=lambda texts, tokens, seconds: sizes.append(tokens))

    async def ask() -> None:
        asked = [tokens_of(3, 4, 5, 20, 1, first=1000 * i) for i in range(7)]
        answers = await asyncio.gather(*map(batcher.answer, asked))
        for tokens, rows in zip(asked, answers, strict=True):
            assert np.array_equal(rows, first_ids(tokens))

    queued(batcher, ask)
    assert sum(sizes) == 7 * 33
    assert max(size for size in sizes if size != 20) <= 10  # the text of 20 is a batch of its own
    assert sizes.count(20) == 7 and len(sizes) < 35  # and others share theirs


def test_a_long_request_does_not_hold_up_those_behind_it() -> None:
    compute = Held()
    batcher = batcher_of(compute)

    async def ask() -> None:
        long = asyncio.create_task(batcher.answer(tokens_of(*[5] * 100)))
        await until(lambda: len(compute.batches) == 1)
        short = asyncio.create_task(batcher.answer(tokens_of(7)))
        await asyncio.sleep(0)
        compute.let_go.set()
        await short
        assert not long.done()
        await long

    queued(batcher, ask)
    assert 7 in [length for batch in compute.batches[:3] for length in batch]


def test_a_full_queue_says_when_to_come_back() -> None:
    compute = Held()
    batcher = batcher_of(compute, queue_tokens=20)

    async def ask() -> None:
        running = asyncio.create_task(batcher.answer(tokens_of(9)))
        await until(lambda: len(compute.batches) == 1)
        waiting = asyncio.create_task(batcher.answer(tokens_of(9, 9)))
        await asyncio.sleep(0)
        assert batcher.waiting == 18
        with pytest.raises(OverloadedError) as caught:
            await batcher.answer(tokens_of(3))
        assert caught.value.retry_after >= 1
        assert batcher.waiting == 18
        fits = asyncio.create_task(batcher.answer(tokens_of(2)))
        compute.let_go.set()
        await asyncio.gather(running, waiting, fits)
        assert batcher.waiting == 0

    queued(batcher, ask)


def test_what_nobody_waits_for_is_not_computed() -> None:
    compute = Held()
    batcher = batcher_of(compute)

    async def ask() -> None:
        running = asyncio.create_task(batcher.answer(tokens_of(9)))
        await until(lambda: len(compute.batches) == 1)
        left = asyncio.create_task(batcher.answer(tokens_of(8, 8)))
        kept = asyncio.create_task(batcher.answer(tokens_of(6)))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait([left])
        assert batcher.waiting == 6
        compute.let_go.set()
        await asyncio.gather(running, kept)

    queued(batcher, ask)
    assert compute.batches == [[9], [6]]


def test_a_batch_that_fails_fails_its_own_requests() -> None:
    def compute(tokens: Tokens) -> Rows:
        if 13 in tokens.lengths:
            raise MemoryError("13")
        return first_ids(tokens)

    batcher = batcher_of(compute)

    async def ask() -> None:
        with pytest.raises(MemoryError):
            await batcher.answer(tokens_of(2, 13, 3, 13))
        assert batcher.waiting == 0
        assert (await batcher.answer(tokens_of(4))).shape == (1, 1)

    queued(batcher, ask)


def test_a_batch_waits_for_requests_that_are_being_read() -> None:
    sizes: list[int] = []
    batcher = batcher_of(first_ids, linger=10.0, observe=lambda texts, tokens, seconds: sizes.append(tokens))

    async def ask() -> None:
        await batcher.answer(tokens_of(2))  # nothing is coming: not ten seconds
        batcher.coming = 1
        early = asyncio.create_task(batcher.answer(tokens_of(3)))
        await asyncio.sleep(0.05)
        assert not early.done()
        late = asyncio.create_task(batcher.answer(tokens_of(4)))
        await asyncio.sleep(0)
        batcher.coming = 0
        await asyncio.gather(early, late)

    queued(batcher, ask)
    assert sizes == [2, 7]


def test_texts_and_pairs_share_a_batch() -> None:
    pair = Tokens(np.array([1, 2, 3], np.int32), np.array([0, 1, 1], np.uint8), np.array([0, 3], np.int64))
    seen: list[Tokens] = []

    def compute(tokens: Tokens) -> Rows:
        seen.append(tokens)
        return first_ids(tokens)

    batcher = batcher_of(compute, linger=10.0)

    async def ask() -> None:
        batcher.coming = 1
        both = [asyncio.create_task(batcher.answer(one)) for one in (tokens_of(2), pair)]
        await asyncio.sleep(0)
        batcher.coming = 0
        await asyncio.gather(*both)

    queued(batcher, ask)
    assert seen[0].types is not None
    assert seen[0].types.tolist() == [0, 0, 0, 1, 1]


# The models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.make(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def engine(folder: Path) -> engines.Engine:
    return engines.load("fastbert", folder, "embed", "fp32", "cpu", None)


def rows_of(engine: engines.Engine, texts: list[Any]) -> Rows:
    return engine.compute(engine.tokenize(texts, engine.longest))


def unit(rows: Rows) -> Rows:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_an_engine_gives_the_embeddings_of_the_folder(dtype: Any, folder: Path) -> None:
    engine = engines.load("fastbert", folder, "embed", dtype, "cpu", 16)
    expected = fastbert.encode(TEXTS, fastbert.TextEncoder.from_folder(folder, dtype=dtype, device="cpu"))
    assert np.allclose(unit(rows_of(engine, TEXTS)), expected, atol=1e-6)
    assert engine.longest == 48


def test_an_engine_keeps_the_columns_and_prompts_of_the_folder(tmp_path: Path) -> None:
    folder = tiny_bert.with_prompts(tmp_path, query="the ")
    settings = folder / "config_sentence_transformers.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"truncate_dim": 8}))
    engine = engines.load("fastbert", folder, "embed", "fp32", "cpu", None)
    assert engine.width == 8 and engine.prompts["query"] == "the "
    assert np.allclose(rows_of(engine, TEXTS), fastbert.encode(TEXTS, folder, normalize=False), atol=1e-5)


@pytest.mark.long
def test_their_engine_gives_the_same(folder: Path) -> None:
    pytest.importorskip("sentence_transformers", reason=HOW)
    theirs = engines.load("sentence-transformers", folder, "embed", "fp32", "cpu", None)
    ours = engines.load("fastbert", folder, "embed", "fp32", "cpu", None)
    many = TEXTS * 20
    assert np.allclose(rows_of(theirs, many), rows_of(ours, many), atol=1e-5)


def test_token_ids_are_framed_once(engine: engines.Engine) -> None:
    text = engine.tokenize(["the film"], 48).ids.tolist()
    assert engine.framed(text[1:-1], None) == engine.framed(text, None) == text
    assert engine.framed(text, 3) == [text[0], text[1], text[-1]]
    assert engine.framed([], None) == [text[0], text[-1]]


def test_scores_and_labels_are_those_of_the_tasks(tmp_path: Path) -> None:
    pairs: list[Any] = [("the film", text) for text in TEXTS]
    one = tiny_bert.with_head(tmp_path / "one", 1)
    scorer = engines.load("fastbert", one, "rerank", None, "cpu", None)
    assert np.allclose(scorer.probabilities(rows_of(scorer, pairs))[:, 0], fastbert.score(pairs, one), atol=1e-6)
    several = tiny_bert.with_head(tmp_path / "several", 3)
    classifier = engines.load("fastbert", several, "predict", None, "cpu", None)
    for row, found in zip(
        classifier.probabilities(rows_of(classifier, TEXTS)), fastbert.classify(TEXTS, several), strict=True
    ):
        expected = [found.probabilities[label] for label in classifier.labels]
        assert np.allclose(row, expected, atol=1e-6)


# The endpoints


@contextmanager
def hosted(engine: engines.Engine, **limits: Any) -> Iterator[str]:
    """The URL of a service in a thread of this process."""
    for package in ("fastapi", "orjson", "prometheus_client", "uvicorn"):
        pytest.importorskip(package, reason=HOW)
    import uvicorn
    from service import Limits, Service

    usual: dict[str, Any] = {
        "linger": 0.002,
        "queue_tokens": 100_000,
        "requests": 512,
        "request_texts": 2048,
        "request_bytes": 1 << 20,
        "truncate": False,
        "token_ids": False,
    }
    app = Service(engine, "tiny", Limits(**usual | limits)).app()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 60
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(engine: engines.Engine) -> Iterator[str]:
    with hosted(engine) as url:
        yield url


def call(url: str, body: Any = None) -> tuple[int, Any, Any]:
    """The status, the JSON (bytes where it is none) and the headers of an answer."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=60) as response:
            status, content, headers = response.status, response.read(), response.headers
    except HTTPError as error:
        status, content, headers = error.code, error.read(), error.headers
    is_json = headers.get("Content-Type") == "application/json"
    return status, json.loads(content) if is_json else content, headers


def embeddings(url: str, body: Any) -> tuple[int, Any]:
    return call(f"{url}/v1/embeddings", body)[:2]


def test_openais_embeddings(url: str, folder: Path, engine: engines.Engine) -> None:
    expected = fastbert.encode(TEXTS, folder)
    status, found = embeddings(url, {"input": TEXTS, "model": "tiny", "user": "me"})
    assert status == 200
    assert [item["index"] for item in found["data"]] == [0, 1, 2, 3]
    assert {item["object"] for item in found["data"]} == {"embedding"} and found["object"] == "list"
    assert np.allclose([item["embedding"] for item in found["data"]], expected, atol=1e-6)
    count = len(engine.tokenize(TEXTS, 48).ids)
    assert found["usage"] == {"prompt_tokens": count, "total_tokens": count} and found["model"] == "tiny"

    _, coded = embeddings(url, {"input": TEXTS[1], "encoding_format": "base64"})
    row = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    assert np.allclose(row, expected[1], atol=1e-6)

    for columns in (1, 5, 32):
        _, short = embeddings(url, {"input": TEXTS[1], "dimensions": columns})
        assert np.allclose(short["data"][0]["embedding"], unit(expected[1:2, :columns])[0], atol=1e-6)


def test_embeddings_as_tei_spells_them(url: str, engine: engines.Engine) -> None:
    expected = rows_of(engine, TEXTS)
    assert np.allclose(call(f"{url}/embed", {"inputs": TEXTS})[1], unit(expected), atol=1e-6)
    assert np.allclose(call(f"{url}/embed", {"inputs": TEXTS[2], "normalize": False})[1], expected[2:3], atol=1e-5)
    for count in (200, 20_000):  # long enough for other servers to refuse it by its characters
        long = {"inputs": "film " * count, "truncate": True, "truncation_direction": "Right"}
        status, cut, _ = call(f"{url}/embed", long)
        assert status == 200
        assert np.allclose(cut, unit(rows_of(engine, ["film " * 200])), atol=1e-6)


LONG = "film " * 47


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"input": []}, 400, "empty"),
        ({"input": ""}, 400, "empty"),
        ({"input": ["film", ""]}, 400, "empty"),
        ({"input": 5}, 400, "input"),
        ({"input": ["film", 5]}, 400, "input"),
        ({"input": [True]}, 400, "input"),
        ({"input": [5, 6]}, 400, "check_embedding_ctx_length=False"),
        ({"input": [[5, 6]]}, 400, "--token-ids"),
        ({}, 400, "input: Field required"),
        ({"input": "film", "dimension": 5}, 400, "dimension: Extra"),
        ({"input": "film", "dimensions": 0}, 400, "dimensions"),
        ({"input": "film", "dimensions": 33}, 400, "expected 1 to 32"),
        ({"input": "film", "encoding_format": "int8"}, 400, "'float' or 'base64'"),
        ({"input": "film", "model": "text-embedding-3-small"}, 404, "expected 'tiny'"),
        ({"input": "film", "\ud800": 5}, 400, "unicode"),
        ({"input": ["film", LONG]}, 413, "input 1 has more than the 48 tokens"),
        ({"input": ["film"] * 2049}, 413, "2049 texts in a request; expected at most 2048"),
        (b"{", 400, "JSON"),
        (b"[" * 100_000, 400, ""),
        (b'"film"', 400, "the body"),
        (b'{"input": "' + b"x" * (1 << 20) + b'"}', 413, "1048576 bytes"),
    ],
)
def test_what_is_wrong_is_said_in_openais_shape(body: Any, status: int, message: str, url: str) -> None:
    got, found = embeddings(url, body)
    assert got == status
    assert found["error"].keys() == {"message", "type", "param", "code"}
    assert found["error"]["type"] == "invalid_request_error" and message in found["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "message"),
    [
        ("/embed", {"inputs": []}, 400, "Empty", "empty"),
        ("/embed", {"inputs": LONG}, 413, "Validation", "48 tokens"),
        ("/embed", {"inputs": "film", "prompt_name": "query"}, 422, "Validation", "prompt_name"),
        ("/embed", {"inputs": "film", "truncation_direction": "left"}, 422, "Validation", "truncation_direction"),
        ("/embed", b"{", 422, "Validation", "JSON"),
        ("/rerank", {"query": "film", "texts": ["a"]}, 424, "Backend", "--task embed"),
        ("/predict", {"inputs": "film"}, 424, "Backend", "--task embed"),
        ("/nothing", {}, 404, "Validation", "Not Found"),
        ("/embed/", {"inputs": "film"}, 404, "Validation", "Not Found"),
        ("/embed", None, 405, "Validation", "Method Not Allowed"),
    ],
)
def test_what_is_wrong_is_said_in_teis_shape(
    path: str, body: Any, status: int, kind: str, message: str, url: str
) -> None:
    got, found, _ = call(url + path, body)
    assert (got, found["error_type"]) == (status, kind)
    assert message in found["error"]


def test_a_body_of_wrong_items_is_refused_as_soon_as_one_of_them(engine: engines.Engine) -> None:
    items = b",".join([b"[null]"] * 1_000_000)
    fields = b",".join(b'"%d":0' % i for i in range(1_000_000))
    with hosted(engine, request_bytes=16 << 20) as url:
        for path, body in (
            ("/v1/embeddings", b'{"input":[%b]}' % items),
            ("/embed", b'{"inputs":[%b]}' % items.replace(b"],[", b",")),
            ("/rerank", b'{"query":"film","texts":[%b]}' % items),
            ("/predict", b'{"inputs":[%b]}' % items),
            ("/embed", b'{"inputs":"film",%b}' % fields),
            ("/embed", b'{"inputs":"film","%b":0}' % (b"k" * 4_000_000)),
            ("/embed", b'{"inputs":"film","prompt_name":"%b"}' % (b"k" * 4_000_000)),
        ):
            tracemalloc.start()
            status, found, _ = call(url + path, body)
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert status in (400, 422) and len(json.dumps(found)) < 2000
            assert most < 500e6  # the objects of the JSON; it was some GB


def test_token_ids_are_those_of_the_model(engine: engines.Engine) -> None:
    ids = engine.tokenize(["the film was fine"], 48).ids.tolist()
    with hosted(engine, token_ids=True, truncate=True) as url:
        _, text = embeddings(url, {"input": "the film was fine"})
        for given in (ids, [ids], ids[1:-1], [ids[1:-1]]):
            assert embeddings(url, {"input": given}) == (200, text)
        _, both = embeddings(url, {"input": [ids, ids[1:3]]})
        assert both["usage"]["prompt_tokens"] == len(ids) + 4
        assert embeddings(url, {"input": [5] * 60})[1]["usage"]["prompt_tokens"] == 48
        status, found = embeddings(url, {"input": [[5, 100_257]]})
        assert status == 400 and f"0 to {len(tiny_bert.VOCABULARY) - 1}" in found["error"]["message"]
        assert embeddings(url, {"input": [-1]})[0] == embeddings(url, {"input": [[]]})[0] == 400


def test_prompts_are_those_of_the_folder(engine: engines.Engine) -> None:
    prompted = replace(engine, prompts={"query": "the ", "none": ""}, prompt_name="query")
    with hosted(prompted, token_ids=True) as url:
        expected = unit(rows_of(engine, ["the film", "film"]))
        assert np.allclose(embeddings(url, {"input": "film"})[1]["data"][0]["embedding"], expected[0], atol=1e-6)
        assert np.allclose(call(f"{url}/embed", {"inputs": "film", "prompt_name": "none"})[1], expected[1:], atol=1e-6)
        assert "token ids" in embeddings(url, {"input": [5]})[1]["error"]["message"]


def test_rerank_as_tei_spells_it(tmp_path: Path) -> None:
    folder = tiny_bert.with_head(tmp_path, 1)
    scores = fastbert.score([("was it fine ?", text) for text in TEXTS], folder)
    order = np.argsort(-scores).tolist()
    with hosted(engines.load("fastbert", folder, "rerank", None, "cpu", None)) as url:
        status, ranks, _ = call(f"{url}/rerank", {"query": "was it fine ?", "texts": TEXTS, "return_text": True})
        assert status == 200
        assert [rank["index"] for rank in ranks] == order and [rank["text"] for rank in ranks] == [
            TEXTS[i] for i in order
        ]
        assert np.allclose([rank["score"] for rank in ranks], scores[order], atol=1e-6)
        raw = call(f"{url}/rerank", {"query": "was it fine ?", "texts": TEXTS, "raw_scores": True})[1]
        assert "text" not in raw[0]
        assert np.allclose([1 / (1 + np.exp(-rank["score"])) for rank in raw], scores[order], atol=1e-6)
        assert call(f"{url}/rerank", {"query": "film", "texts": []})[1]["error_type"] == "Empty"
        assert call(f"{url}/rerank", {"query": "film", "texts": [LONG]})[0] == 413
        assert call(f"{url}/rerank", {"query": "film", "texts": [LONG], "truncate": True})[0] == 200
        echoed = call(f"{url}/rerank", {"query": "film", "texts": ["\ud800"], "return_text": True})[1]
        assert echoed[0]["text"] == "\ufffd"
        one = call(f"{url}/predict", {"inputs": ["was it fine ?", TEXTS[0]]})[1]
        assert [label["label"] for label in one] == ["LABEL_0"]
        assert np.allclose(one[0]["score"], scores[0], atol=1e-6)


def test_a_query_counts_once_for_each_text(tmp_path: Path) -> None:
    folder = tiny_bert.with_head(tmp_path, 1)
    with hosted(engines.load("fastbert", folder, "rerank", None, "cpu", None), request_bytes=10_000) as url:
        for count, expected in ((50, 200), (51, 413)):
            body = {"query": "film " * 40, "texts": ["a"] * count, "truncate": True}
            status, found, _ = call(f"{url}/rerank", body)
            assert status == expected
        assert "200 characters for 51 texts; expected at most 10000" in found["error"]


def test_predict_as_tei_spells_it(tmp_path: Path) -> None:
    folder = tiny_bert.with_head(tmp_path, 3)
    with hosted(engines.load("fastbert", folder, "predict", None, "cpu", None)) as url:
        inputs: list[Any] = [TEXTS[0], [TEXTS[0], TEXTS[1]], [[TEXTS[0]], [TEXTS[1]]], [[TEXTS[0], "film"], ["a", "b"]]]
        texts: list[Any] = [[TEXTS[0]], [(TEXTS[0], TEXTS[1])], TEXTS[:2], [(TEXTS[0], "film"), ("a", "b")]]
        for given, meant in zip(inputs, texts, strict=True):
            status, found, _ = call(f"{url}/predict", {"inputs": given})
            assert status == 200
            expected = [list(one.probabilities.items()) for one in fastbert.classify(meant, folder)]
            batch = found if isinstance(found[0], list) else [found]
            assert (batch is found) == isinstance(given[0], list)
            for ours, theirs in zip(batch, expected, strict=True):
                assert [one["label"] for one in ours] == [label for label, _ in theirs]
                assert np.allclose([one["score"] for one in ours], [score for _, score in theirs], atol=1e-6)
        for wrong in ([["a"], ["a", "b"]], [["a", "b", "c"]], ["a", "b", "c"]):
            assert call(f"{url}/predict", {"inputs": wrong})[0] == 422
        assert call(f"{url}/rerank", {"query": "film", "texts": ["a"]})[0] == 424


def test_health_metrics_and_models(engine: engines.Engine) -> None:
    with hosted(engine) as url:
        assert call(f"{url}/health")[:2] == (200, b"")
        embeddings(url, {"input": TEXTS})
        embeddings(url, {"input": ""})
        _, metrics, headers = call(f"{url}/metrics")
        lines = metrics.decode().splitlines()
        assert headers["Content-Type"].startswith("text/plain")
        assert 'fastbert_requests_total{path="/v1/embeddings",status="200"} 1.0' in lines
        assert 'fastbert_requests_total{path="/v1/embeddings",status="400"} 1.0' in lines
        assert f"fastbert_tokens_total {len(engine.tokenize(TEXTS, 48).ids)}.0" in lines
        assert "fastbert_texts_total 4.0" in lines and "fastbert_queue_tokens 0.0" in lines
        assert "fastbert_open_requests 0.0" in lines  # of those that ask for something computed
        assert [model["id"] for model in call(f"{url}/v1/models")[1]["data"]] == ["tiny"]


def test_requests_that_come_together_keep_their_own_rows_and_numbers(url: str, folder: Path) -> None:
    texts = [" ".join(tiny_bert.PLAIN[: 1 + i % 12]) + " film" * (i % 5) for i in range(40)]
    expected = fastbert.encode(texts, folder)

    def ask(first: int) -> None:
        own = slice(first, first + 1 + first % 7)
        status, found = embeddings(url, {"input": texts[own]})
        assert status == 200
        assert [item["index"] for item in found["data"]] == list(range(len(texts[own])))
        assert np.allclose([item["embedding"] for item in found["data"]], expected[own], atol=1e-6)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(ask, [i % 33 for i in range(150)]))


def test_a_large_request_leaves_the_next_one_as_it_was(url: str) -> None:
    before = embeddings(url, {"input": "the film"})
    assert embeddings(url, {"input": ["film " * 46] * 1000})[1]["usage"]["total_tokens"] == 48_000
    assert embeddings(url, {"input": "the film"}) == before


def test_health_is_answered_while_requests_wait(engine: engines.Engine) -> None:
    held = threading.Event()

    def compute(tokens: Tokens) -> Rows:
        assert held.wait(60)
        return engine.compute(tokens)

    with hosted(replace(engine, compute=compute)) as url, ThreadPoolExecutor(5) as threads:
        asked = [threads.submit(embeddings, url, {"input": ["film " * 46] * 300}) for _ in range(5)]
        shows(url, "fastbert_open_requests 5.0")
        assert call(f"{url}/health")[0] == 200
        held.set()
        assert [one.result()[0] for one in asked] == [200] * 5


def test_a_text_that_breaks_the_model_breaks_no_other(engine: engines.Engine) -> None:
    bad = int(engine.tokenize(["awful"], 48).ids[1])

    def compute(tokens: Tokens) -> Rows:
        rows = engine.compute(tokens)
        for i, (begin, end) in enumerate(zip(tokens.offsets, tokens.offsets[1:], strict=False)):
            if bad in tokens.ids[begin:end]:
                rows[i] = np.nan
        return rows

    with hosted(replace(engine, compute=compute), linger=0.05) as url, ThreadPoolExecutor(8) as threads:
        asked = ["film"] * 6 + ["awful"] + ["plot"]
        answers = list(threads.map(lambda text: embeddings(url, {"input": text}), asked))
        assert [status for status, _ in answers] == [200] * 6 + [424, 200]
        assert "NaN" in answers[6][1]["error"]["message"]


def test_what_nobody_foresaw_is_a_500_and_the_server_goes_on(engine: engines.Engine) -> None:
    def compute(tokens: Tokens) -> Rows:
        if len(tokens.ids) == 3:
            raise RuntimeError("secret")
        return engine.compute(tokens)

    with hosted(replace(engine, compute=compute)) as url:
        status, found = embeddings(url, {"input": "film"})
        assert status == 500 and "RuntimeError" in found["error"]["message"] and "secret" not in str(found)
        assert embeddings(url, {"input": "the film"})[0] == 200
        assert b'status="500"} 1.0' in call(f"{url}/metrics")[1]


def test_a_full_queue_and_too_many_requests_are_429(engine: engines.Engine) -> None:
    held, started = threading.Event(), threading.Event()

    def compute(tokens: Tokens) -> Rows:
        started.set()
        assert held.wait(60)
        return engine.compute(tokens)

    def tokenize(texts: Any, most: int) -> Tokens:
        tokenized.append(len(texts))
        return engine.tokenize(texts, most)

    tokenized: list[int] = []
    slow = replace(engine, tokenize=tokenize, compute=compute, batch_tokens=8)
    with hosted(slow, queue_tokens=12, requests=3) as url, ThreadPoolExecutor(2) as threads:
        first = threads.submit(embeddings, url, {"input": "film"})
        assert started.wait(60)
        second = threads.submit(embeddings, url, {"input": ["film"] * 3})
        shows(url, "fastbert_queue_tokens 9.0")
        status, found, headers = call(f"{url}/v1/embeddings", {"input": "the film"})
        assert status == 429 and int(headers["Retry-After"]) >= 1
        assert found["error"]["type"] == "rate_limit_error"
        status, found, headers = call(f"{url}/embed", {"inputs": "the film"})
        assert (status, found["error_type"]) == (429, "Overloaded") and int(headers["Retry-After"]) >= 1
        # what can't fit is not even tokenised
        assert embeddings(url, {"input": ["film"] * 4})[0] == 429
        assert tokenized == [1, 3, 1, 1]
        # more than the queue ever holds is no matter of waiting
        assert embeddings(url, {"input": ["film"] * 13})[0] == 413
        held.set()
        assert first.result()[0] == second.result()[0] == 200
        assert embeddings(url, {"input": ["film"] * 5})[0] == 413


def test_requests_beyond_the_most_are_429_before_they_are_read(engine: engines.Engine) -> None:
    held = threading.Event()

    def compute(tokens: Tokens) -> Rows:
        assert held.wait(60)
        return engine.compute(tokens)

    with hosted(replace(engine, compute=compute), requests=1) as url, ThreadPoolExecutor(1) as threads:
        first = threads.submit(embeddings, url, {"input": "film"})
        shows(url, "fastbert_open_requests 1.0")
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        large = b'{"input": "' + b"x" * 900_000 + b'"}'
        for _ in range(3):  # the connection stays usable, whatever of the body was read
            connection.request("POST", "/v1/embeddings", large, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            assert response.status == 429 and response.headers["Retry-After"] == "1"
        assert call(f"{url}/health")[0] == 200
        held.set()
        assert first.result()[0] == 200
        connection.close()


def test_a_body_that_does_not_come_keeps_no_place(engine: engines.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason=HOW)
    monkeypatch.setattr("service.BODY_SECONDS", 1.0)
    with hosted(engine, requests=2) as url:
        place = urlsplit(url)
        slow = [socket.create_connection((place.hostname, place.port)) for _ in range(2)]
        for one in slow:
            one.sendall(
                b"POST /embed HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
            )
        for one in slow:
            one.settimeout(20)
            assert one.recv(1000).startswith(b"HTTP/1.1 408")
            one.close()
        assert call(f"{url}/embed", {"inputs": "film"})[0] == 200


def test_a_client_that_goes_is_not_served(engine: engines.Engine) -> None:
    held, started = threading.Event(), threading.Event()
    computed: list[int] = []

    def compute(tokens: Tokens) -> Rows:
        started.set()
        assert held.wait(60)
        computed.append(len(tokens.lengths))
        return engine.compute(tokens)

    with hosted(replace(engine, compute=compute), queue_tokens=1000) as url, ThreadPoolExecutor(1) as threads:
        first = threads.submit(embeddings, url, {"input": "film"})
        assert started.wait(60)
        body = json.dumps({"input": ["film"] * 7}).encode()
        connection = socket.create_connection(urlsplit(url).netloc.split(":"), timeout=60)
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        shows(url, "fastbert_queue_tokens 21.0")
        connection.close()
        shows(url, "fastbert_queue_tokens 0.0")
        held.set()
        assert first.result()[0] == 200
        assert b'status="499"} 1.0' in call(f"{url}/metrics")[1]
    assert computed == [1]


# Other people's clients


@pytest.mark.long
def test_openais_client(url: str, folder: Path) -> None:
    openai = pytest.importorskip("openai", reason=HOW)
    expected = fastbert.encode(TEXTS, folder)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for how in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):  # it asks for base64 by itself
        found = client.embeddings.create(model="tiny", input=TEXTS, **how)
        rows = [item.embedding for item in found.data]
        if how == {"encoding_format": "base64"}:
            rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
        assert np.allclose(rows, expected, atol=1e-6)
    assert len(client.embeddings.create(model="tiny", input="film", dimensions=7).data[0].embedding) == 7
    assert [model.id for model in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError, match="expected 'tiny'"):
        client.embeddings.create(model="text-embedding-3-small", input="film")
    with pytest.raises(openai.BadRequestError, match="empty"):
        client.embeddings.create(model="tiny", input="")
    with pytest.raises(openai.APIStatusError) as caught:
        client.embeddings.create(model="tiny", input=LONG)
    assert caught.value.status_code == 413 and caught.value.code == "context_length_exceeded"


@pytest.mark.long
def test_openais_client_comes_back_after_429(engine: engines.Engine, folder: Path) -> None:
    openai = pytest.importorskip("openai", reason=HOW)

    def compute(tokens: Tokens) -> Rows:
        time.sleep(0.3)
        return engine.compute(tokens)

    with hosted(replace(engine, compute=compute, batch_tokens=4), queue_tokens=8) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=20)
        with ThreadPoolExecutor(6) as threads:
            found = list(threads.map(lambda _: client.embeddings.create(model="tiny", input="film"), range(6)))
        assert len(found) == 6
        assert b'status="429"' in call(f"{url}/metrics")[1]


@pytest.mark.long
def test_langchains_embeddings(url: str, folder: Path) -> None:
    langchain = pytest.importorskip("langchain_openai", reason=HOW)
    expected = fastbert.encode(TEXTS, folder)
    made = langchain.OpenAIEmbeddings(
        base_url=f"{url}/v1", api_key="none", model="tiny", check_embedding_ctx_length=False
    )
    assert np.allclose(made.embed_documents(TEXTS), expected, atol=1e-6)
    assert np.allclose(made.embed_query(TEXTS[0]), expected[0], atol=1e-6)


@pytest.mark.long
def test_llama_indexs_embeddings(url: str, folder: Path) -> None:
    llama = pytest.importorskip("llama_index.embeddings.openai", reason=HOW)
    tei = pytest.importorskip("llama_index.embeddings.text_embeddings_inference", reason=HOW)
    expected = fastbert.encode(TEXTS, folder)
    for made in (
        llama.OpenAIEmbedding(api_base=f"{url}/v1", api_key="none", model_name="tiny"),
        tei.TextEmbeddingsInference(model_name="tiny", base_url=url),
    ):
        assert np.allclose(made.get_text_embedding_batch(TEXTS), expected, atol=1e-6)
        assert np.allclose(made.get_query_embedding(TEXTS[0]), expected[0], atol=1e-6)
        assert np.allclose(asyncio.run(made.aget_text_embedding_batch(TEXTS)), expected, atol=1e-6)


@pytest.mark.long
def test_hugging_faces_client(url: str, folder: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason=HOW)
    client = hub.InferenceClient(model=f"{url}/embed")
    found = client.feature_extraction("the film was fine", normalize=True, truncate=True)
    assert np.allclose(found, fastbert.encode(["the film was fine"], folder), atol=1e-6)


# The whole program


def started(folder: Path, *options: str) -> Any:
    load = pytest.importorskip("load", reason=HOW)
    return load.serving(folder, list(options))


@pytest.mark.long
def test_under_overload_clients_see_429_and_nothing_else(folder: Path) -> None:
    load = pytest.importorskip("load", reason=HOW)
    bodies = [json.dumps({"input": ["film was a"] * n + ["plot " * n]}).encode() for n in range(1, 40)]
    options = ("--queue-tokens", "600", "--batch-tokens", "64", "--requests", "100")
    with started(folder, *options) as (url, _):  # which ends with 0, or is an error
        found = asyncio.run(load.measured(f"{url}/v1/embeddings", bodies, 200, 10))
        assert found.errors.keys() == {"429"}
        assert len(found.seconds) > 100
        assert embeddings(url, {"input": "film"})[0] == 200
        assert b"fastbert_queue_tokens 0.0" in call(f"{url}/metrics")[1]


def for_a_minute(call: Callable[[], Any]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        call()


@pytest.mark.long
def test_sigterm_answers_what_was_taken_on(folder: Path) -> None:
    body = {"input": ["film was a very dull plot"] * 2000}
    options = ("--batch-tokens", "16", "--grace", "300")
    with ThreadPoolExecutor(8) as threads, started(folder, *options) as (url, process):
        answers = [threads.submit(embeddings, url, body) for _ in range(8)]
        shows(url, "fastbert_open_requests 8.0")
        process.send_signal(signal.SIGTERM)
        with pytest.raises(OSError, match=r"refused|reset"):  # reset: it waited to be accepted when the socket closed
            for_a_minute(lambda: call(f"{url}/health"))
        assert not all(answer.done() for answer in answers)
        assert [answer.result()[0] for answer in answers] == [200] * 8
        assert process.wait(60) == 0


@pytest.mark.long
def test_an_idle_connection_is_kept_longer_than_clients_keep_it(folder: Path) -> None:
    with started(folder) as (url, _):
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        connection.connect()
        own = connection.sock
        for pause in (0, 16):  # aiohttp's clients keep one for 15 s, httpx' for 5 s, as uvicorn does by itself
            time.sleep(pause)
            connection.request("GET", "/health")
            connection.getresponse().read()
            assert connection.sock is own
        connection.close()


@pytest.mark.long
def test_the_program_says_what_is_wrong(folder: Path) -> None:
    pytest.importorskip("fastapi", reason=HOW)
    program = [sys.executable, str(ROOT / "examples" / "serving" / "server.py")]
    for options, message in (
        ([str(folder / "no")], "no"),
        ([str(folder), "--task", "rerank"], "checkpoint with its head"),
        ([str(folder), "--engine", "sentence-transformers", "--dtype", "int8"], "--dtype: got int8"),
    ):
        done = subprocess.run([*program, *options], capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert message in done.stderr and "Traceback" not in done.stderr
