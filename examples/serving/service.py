"""The endpoints, what they refuse, and what they count."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from api import (
    ANSWERS,
    EmbedBody,
    EmbeddingsBody,
    GoneError,
    Inputs,
    PredictBody,
    RefusedError,
    RerankBody,
    json,
    refusal,
)
from batching import Batcher, Rows
from engines import Engine, Task
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastbert.text.checks import SURROGATE, Text
from fastbert.text.tokens import Tokens

Result = TypeVar("Result")
Item = Text | list[int]  # a text, a pair of texts, or the token ids of a text

NO_TOKEN_IDS = (
    "got token ids. Most clients that send them made them with OpenAI's tokenizer, whose ids mean other words here. "
    "Send texts; langchain's OpenAIEmbeddings does with check_embedding_ctx_length=False. Ids of this model's own "
    "tokenizer are read where the server was started with --token-ids"
)


BODY_SECONDS = 60.0  # that a body may take to come: who sends none keeps a place from others


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Attributes:
        linger: seconds that a batch waits at most for requests that are being read.
        queue_tokens: most tokens that wait, and most of a request.
        requests: most that are open at once.
        request_texts: most of a request.
        request_bytes: most of a request's body.
        truncate: whether longer texts lose their end where a request doesn't say.
        token_ids: whether an input may be a list of token ids.
    """

    linger: float
    queue_tokens: int
    requests: int
    request_texts: int
    request_bytes: int
    truncate: bool
    token_ids: bool


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        ours: dict[str, Any] = {"namespace": "fastbert", "registry": self.registry}
        powers = [float(2**i) for i in range(4, 17)]
        self.requests = Counter("requests", "Requests.", ["path", "status"], **ours)
        self.seconds = Histogram("request_seconds", "From the header to the end of the answer.", ["path"], **ours)
        self.open = Gauge("open_requests", "Requests without an answer yet.", **ours)
        self.queued = Gauge("queue_tokens", "Tokens that wait for a batch.", **ours)
        self.texts = Counter("texts", "Texts computed.", **ours)
        self.tokens = Counter("tokens", "Tokens computed, special ones included.", **ours)
        self.batch_tokens = Histogram("batch_tokens", "Tokens of a batch.", buckets=powers, **ours)
        self.batch_seconds = Histogram("batch_seconds", "Time to compute a batch.", **ours)

    def batch(self, texts: int, tokens: int, seconds: float) -> None:
        """Count a batch."""
        self.texts.inc(texts)
        self.tokens.inc(tokens)
        self.batch_tokens.observe(tokens)
        self.batch_seconds.observe(seconds)


class Gate:
    """ASGI middleware: counts and times requests, and refuses what is too much before it reads on."""

    def __init__(self, app: ASGIApp, metrics: Metrics, limits: Limits, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.limits, self.paths = app, metrics, limits, paths
        self.open = 0
        metrics.open.set_function(lambda: self.open)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, read, whole = 500, 0, False
        begin = time.perf_counter()

        async def limited() -> Message:
            nonlocal read, whole
            try:
                left = None if whole else begin + BODY_SECONDS - time.perf_counter()
                message = await asyncio.wait_for(receive(), left)
            except asyncio.TimeoutError as error:
                raise HTTPException(408, f"the body did not come within {BODY_SECONDS:g} s") from error
            whole = not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > self.limits.request_bytes:
                raise HTTPException(413, f"the body has more than {self.limits.request_bytes} bytes")
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        asks = scope["method"] == "POST"
        path = scope["path"] if scope["path"] in self.paths else "other"
        self.open += asks
        try:
            if asks and self.open > self.limits.requests:
                refused = RefusedError("overloaded", f"{self.limits.requests} requests are open", 1)
                await refusal(scope["path"], refused)(scope, receive, noted)
            else:
                await self.app(scope, limited, noted)
        finally:
            self.open -= asks
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begin)


class Service:
    """The endpoints of one engine.

    Args:
        name: of the model, as OpenAI's clients give it.
    """

    def __init__(self, engine: Engine, name: str, limits: Limits) -> None:
        self.engine, self.name, self.limits = engine, name, limits
        self.metrics = Metrics()
        self.batcher = Batcher(
            engine.compute,
            engine.width,
            batch_tokens=engine.batch_tokens,
            queue_tokens=limits.queue_tokens,
            linger=limits.linger,
            observe=self.metrics.batch,
        )
        self.metrics.queued.set_function(lambda: self.batcher.waiting)
        self.tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self.working: asyncio.Task[None] | None = None

    def app(self) -> FastAPI:
        """The ASGI application."""
        app = FastAPI(title="fastbert", lifespan=self.lifespan, redirect_slashes=False)
        endpoints: dict[str, tuple[str, Callable[..., Any]]] = {
            "/v1/embeddings": ("POST", self.embeddings),
            "/embed": ("POST", self.embed),
            "/rerank": ("POST", self.rerank),
            "/predict": ("POST", self.predict),
            "/v1/models": ("GET", self.models),
            "/health": ("GET", self.health),
            "/metrics": ("GET", self.show_metrics),
        }
        for path, (method, endpoint) in endpoints.items():
            app.add_api_route(path, endpoint, methods=[method])
        for error, answer in ANSWERS.items():
            app.add_exception_handler(error, answer)
        app.add_middleware(Gate, metrics=self.metrics, limits=self.limits, paths=frozenset(endpoints))
        return app

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Compute batches while the server runs."""
        self.working = asyncio.create_task(self.batcher.run())
        yield
        self.working.cancel()
        self.tokenizing.shutdown(wait=False)

    async def embeddings(self, body: EmbeddingsBody, request: Request) -> Response:
        """OpenAI's embeddings, each of length 1."""
        self.check_task("embed")
        if body.model not in (None, self.name):
            raise RefusedError("no model", f"`model`: got {body.model!r}; expected {self.name!r}")
        columns = self.columns(body.dimensions)
        tokens, rows = await self.answer(request, _items(body.input))
        made: Any = finished(rows, columns, normalize=True)
        if body.encoding_format == "base64":
            made = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in made]
        data = [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(made)]
        usage = {"prompt_tokens": len(tokens.ids), "total_tokens": len(tokens.ids)}
        return json({"object": "list", "data": data, "model": self.name, "usage": usage})

    async def embed(self, body: EmbedBody, request: Request) -> Response:
        """text-embeddings-inference's embeddings."""
        self.check_task("embed")
        columns = self.columns(body.dimensions)
        _, rows = await self.answer(request, _items(body.inputs), body.truncate, body.prompt_name)
        return json(finished(rows, columns, body.normalize))

    async def rerank(self, body: RerankBody, request: Request) -> Response:
        """The texts by how well they answer the query, the best first."""
        self.check_task("rerank")
        if len(body.query) * len(body.texts) > (most := self.limits.request_bytes):  # it is read with each text
            got = f"a `query` of {len(body.query)} characters for {len(body.texts)} texts"
            raise RefusedError("too long", f"got {got}; expected at most {most} characters, once for each text")
        _, rows = await self.answer(request, [(body.query, text) for text in body.texts], body.truncate)
        scores = (rows if body.raw_scores else self.engine.probabilities(rows))[:, 0]
        ranks = []
        for index in np.argsort(-scores, kind="stable").tolist():
            text = {"text": SURROGATE.sub("\ufffd", body.texts[index])} if body.return_text else {}
            ranks.append({"index": index, **text, "score": scores[index]})
        return json(ranks)

    async def predict(self, body: PredictBody, request: Request) -> Response:
        """The labels of each text or pair, the likeliest first."""
        self.check_task("predict", "rerank")
        one = isinstance(body.inputs, str) or all(isinstance(text, str) for text in body.inputs)
        batch = cast("list[str | list[str]]", [body.inputs] if one else body.inputs)
        _, rows = await self.answer(request, [_text_or_pair(text) for text in batch], body.truncate)
        found = []
        for row in rows if body.raw_scores else self.engine.probabilities(rows):
            order = np.argsort(-row, kind="stable").tolist()
            found.append([{"score": row[i], "label": self.engine.labels[i]} for i in order])
        return json(found[0] if one else found)

    async def models(self) -> Response:
        """OpenAI's list of models: the one that is here."""
        model = {"id": self.name, "object": "model", "created": 0, "owned_by": "fastbert"}
        return json({"object": "list", "data": [model]})

    async def health(self) -> Response:
        """200 while batches are computed."""
        if self.working is None or self.working.done():
            raise RefusedError("unhealthy", "no batches are computed any more")
        return Response()

    async def show_metrics(self) -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    def check_task(self, *tasks: Task) -> None:
        """Raise RefusedError where the model was loaded for another task."""
        if self.engine.task not in tasks:
            raise RefusedError("backend", f"the model is served with --task {self.engine.task}, not {tasks[0]}")

    def columns(self, asked: int | None) -> int:
        """How many columns of an embedding are kept."""
        width = self.engine.width
        if asked is not None and asked > width:
            raise RefusedError("invalid", f"`dimensions`: got {asked}; expected 1 to {width}")
        return asked or width

    async def answer(
        self, request: Request, items: Sequence[Item], truncate: bool | None = None, prompt_name: str | None = None
    ) -> tuple[Tokens, Rows]:
        """The tokens of a request's texts, and a row of each `[texts, width]`; given up when the client goes."""
        self.check_items(items)
        if len(items) > (most := min(self.limits.request_texts, self.limits.queue_tokens)):
            raise RefusedError("too long", f"got {len(items)} texts in a request; expected at most {most}")
        prompt = self.prompt(items, prompt_name)
        self.batcher.check_room(len(items))  # before they are read, because they have as many tokens at least
        self.batcher.coming += 1
        try:
            tokens = await asyncio.get_running_loop().run_in_executor(
                self.tokenizing, self.read, items, self.limits.truncate if truncate is None else truncate, prompt
            )
        finally:
            self.batcher.coming -= 1
        if len(tokens.ids) > (most := self.limits.queue_tokens):
            raise RefusedError("too long", f"got {len(tokens.ids)} tokens in a request; expected at most {most}")
        rows = await while_connected(request, self.batcher.answer(tokens))
        if not np.isfinite(rows).all():
            raise RefusedError("backend", "the model gave NaN or infinity for a text")
        return tokens, rows

    def check_items(self, items: Sequence[Item]) -> None:
        """Raise RefusedError for what is no input."""
        if not items or not all(any(item) if isinstance(item, tuple) else item for item in items):
            raise RefusedError("empty", "the input is empty, or one of its texts is")
        if len({type(item) for item in items}) > 1:
            raise RefusedError("invalid", "got texts and pairs of texts; expected all of one kind")
        if isinstance(items[0], list):
            if not self.limits.token_ids:
                raise RefusedError("invalid", NO_TOKEN_IDS)
            highest = self.engine.vocabulary - 1
            if not all(0 <= token <= highest for ids in items for token in cast("list[int]", ids)):
                raise RefusedError("invalid", f"expected token ids from 0 to {highest}, of this model's own tokenizer")

    def prompt(self, items: Sequence[Item], name: str | None) -> str:
        """What is put before the texts."""
        name = self.engine.prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self.engine.prompts:
            known = ", ".join(self.engine.prompts) or "(it has none)"
            raise RefusedError("invalid", f"`prompt_name`: got {name!r}; expected one of the folder's prompts: {known}")
        if isinstance(items[0], list) and self.engine.prompts[name]:
            raise RefusedError("invalid", f"the prompt {name!r} can't be put before token ids; send texts")
        return self.engine.prompts[name]

    def read(self, items: Sequence[Item], truncate: bool, prompt: str) -> Tokens:
        """The tokens of texts; a text of more than the model reads loses its end, or is refused."""
        longest = self.engine.longest
        if isinstance(items[0], list):
            ids = [self.engine.framed(one, longest if truncate else None) for one in cast("list[list[int]]", items)]
            offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
            tokens = Tokens(np.array([token for one in ids for token in one], np.int32), None, offsets)
        else:
            texts = [prompt + item for item in cast("list[str]", items)] if prompt else cast("list[Text]", items)
            tokens = self.engine.tokenize(texts, longest if truncate else longest + 1)
        long = np.flatnonzero(tokens.lengths > longest)
        if len(long):
            message = f"input {long[0]} has more than the {longest} tokens that the model reads"
            raise RefusedError("too long", f"{message}; shorten it, or ask for its beginning with `truncate`")
        return tokens


def _items(inputs: Inputs) -> list[Item]:
    """A single text or list of token ids is a list of one."""
    single = isinstance(inputs, str) or isinstance(next(iter(inputs), None), int)
    return cast("list[Item]", [inputs] if single else inputs)


def _text_or_pair(text: str | list[str]) -> Text:
    parts = [text] if isinstance(text, str) else text
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return parts[0], parts[1]
    raise RefusedError("invalid", f"`inputs`: got a list of {len(parts)} strings; expected a text or a pair of texts")


def finished(rows: Rows, columns: int, normalize: bool) -> Rows:
    """The first columns of each row, of length 1 if asked for; zeros stay zeros."""
    rows = rows[:, :columns]
    if normalize:
        rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-12))
    return np.ascontiguousarray(rows)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` gives; cancelled when the client closes the connection.

    Raises:
        GoneError: it did.
    """
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(request.receive())  # the body is read, so what comes is a disconnect
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise GoneError
        return working.result()
    finally:
        working.cancel()
        gone.cancel()
