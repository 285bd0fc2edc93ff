"""Requests wait in a queue and are computed in batches of at most so many tokens, in one thread."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastbert.text.tokens import Tokens

Rows = npt.NDArray[np.float32]

POLL_SECONDS = 0.0005
LONGEST_RETRY = 60  # seconds; OpenAI's client heeds no longer ones


class OverloadedError(Exception):
    """The queue has no room.

    Attributes:
        retry_after: seconds after which it probably has.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(eq=False)
class _Request:
    """Texts that are answered together.

    Attributes:
        rows: float32 `[texts, width]`, filled batch by batch.
        done: set when all rows are there.
        next: the first text that no batch took yet.
        missing: texts whose row is not there yet.
    """

    tokens: Tokens
    rows: Rows
    done: asyncio.Future[None]
    next: int
    missing: int

    @property
    def waiting(self) -> int:
        """Tokens that no batch took yet."""
        return int(self.tokens.offsets[-1] - self.tokens.offsets[self.next])


_Parts = list[tuple[_Request, int, int]]  # of each request its texts from the first number to before the second


class Batcher:
    """The queue and the thread that computes; all methods are for one event loop.

    A batch takes texts from one request after the other. A request of which it takes only a part goes to the end of the
    queue, so that a long one doesn't hold up those behind it.

    Args:
        compute: rows float32 `[texts, width]` of tokens; called in a thread of its own.
        width: columns of a row.
        batch_tokens: most tokens of a batch; a longer text is a batch of its own.
        queue_tokens: most tokens that wait.
        linger: seconds that a batch waits at most, once the thread was idle, for requests that are being read.
        observe: called with the texts, tokens and seconds of each batch.

    Attributes:
        waiting: tokens that no batch took yet.
        coming: requests that are being read and will be in the queue soon; the caller counts them.
    """

    def __init__(
        self,
        compute: Callable[[Tokens], Rows],
        width: int,
        *,
        batch_tokens: int,
        queue_tokens: int,
        linger: float,
        observe: Callable[[int, int, float], None] = lambda texts, tokens, seconds: None,
    ) -> None:
        self.waiting = self.coming = 0
        self._compute, self._width, self._observe = compute, width, observe
        self._batch_tokens, self._queue_tokens, self._linger = batch_tokens, queue_tokens, linger
        self._queue: deque[_Request] = deque()
        self._filled = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "encoder")
        self._rate = 0.0  # tokens a second, the newer batches weighing more

    def check_room(self, tokens: int) -> None:
        """Raise OverloadedError where the queue has no room for so many."""
        over = self.waiting + tokens - self._queue_tokens
        if over > 0:
            seconds = math.ceil(over / self._rate) if self._rate else 1
            raise OverloadedError(min(seconds, LONGEST_RETRY))

    async def answer(self, tokens: Tokens) -> Rows:
        """The row of each text, float32 `[texts, width]`. If the caller is cancelled, what is left is dropped.

        Raises:
            OverloadedError: the queue has no room.
            Exception: whatever `compute` raised for a batch that held one of the texts.
        """
        self.check_room(len(tokens.ids))
        texts = len(tokens.lengths)
        done = asyncio.get_running_loop().create_future()
        request = _Request(tokens, np.empty((texts, self._width), np.float32), done, 0, texts)
        self._queue.append(request)
        self.waiting += request.waiting
        self._filled.set()
        try:
            await done
            return request.rows
        finally:
            self._drop(request)

    async def run(self) -> None:
        """Compute what comes, until this is cancelled."""
        try:
            while True:
                if not self._queue:
                    self._filled.clear()
                    await self._filled.wait()
                    await self._more()
                if parts := self._take():  # nothing where whoever asked has gone
                    await self._answer(parts)
        finally:
            self._thread.shutdown(wait=False)

    async def _answer(self, parts: _Parts) -> None:
        joined = _joined(parts)
        begin = time.perf_counter()
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._compute, joined)
        await asyncio.wait([work])
        seconds = time.perf_counter() - begin
        self._observe(len(joined.lengths), len(joined.ids), seconds)
        rate = len(joined.ids) / seconds
        self._rate = 0.8 * self._rate + 0.2 * rate if self._rate else rate
        _deliver(parts, work)

    async def _more(self) -> None:
        """Wait for requests that are being read, while there is room in the batch."""
        end = time.perf_counter() + self._linger
        while self.coming and self.waiting < self._batch_tokens and time.perf_counter() < end:
            await asyncio.sleep(POLL_SECONDS)

    def _take(self) -> _Parts:
        parts: _Parts = []
        room = self._batch_tokens
        while self._queue:
            request = self._queue[0]
            offsets = request.tokens.offsets
            end = int(np.searchsorted(offsets, offsets[request.next] + room, side="right")) - 1
            if end == request.next:  # its next text does not fit
                if parts:
                    break
                end += 1
            before = request.waiting
            parts.append((request, request.next, end))
            request.next = end
            taken = before - request.waiting
            room -= taken
            self.waiting -= taken
            self._queue.popleft()
            if end < len(request.tokens.lengths):
                self._queue.append(request)
                break
        return parts

    def _drop(self, request: _Request) -> None:
        if request in self._queue:
            self._queue.remove(request)
            self.waiting -= request.waiting


def _joined(parts: _Parts) -> Tokens:
    """The tokens of all parts."""
    ids, types, lengths = [], [], []
    for request, first, last in parts:
        tokens = request.tokens
        own = slice(tokens.offsets[first], tokens.offsets[last])
        ids.append(tokens.ids[own])
        types.append(np.zeros(len(ids[-1]), np.uint8) if tokens.types is None else tokens.types[own])
        lengths.append(tokens.lengths[first:last])
    typed = any(request.tokens.types is not None for request, _, _ in parts)
    offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
    return Tokens(np.concatenate(ids), np.concatenate(types) if typed else None, offsets)


def _deliver(parts: _Parts, work: asyncio.Future[Rows]) -> None:
    at = 0
    for request, first, last in parts:
        begin, at = at, at + last - first
        if request.done.done():  # whoever asked has gone, or an earlier part failed
            continue
        if (error := work.exception()) is not None:
            request.done.set_exception(error)
            continue
        request.rows[first:last] = work.result()[begin:at]
        request.missing -= last - first
        if not request.missing:
            request.done.set_result(None)
