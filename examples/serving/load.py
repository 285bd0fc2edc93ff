"""Measure the service under load: requests and tokens a second, and how long a request takes, by number of clients.

    python examples/serving/load.py FOLDER [--clients 1 8 64] [--engines fastbert sentence-transformers] [-- SERVER...]

For each engine it starts examples/serving/server.py on a free port of loopback, with the options after `--`, and stops
it with SIGTERM. Each client sends its next request when it has the answer to the one before, or after the Retry-After
of a refusal. Clients and server share the machine's cores. Ends with 1 if a request failed otherwise than by 429, or a
server did not end with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import aiohttp
import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from fastbert.rivals import SENTENCES

SERVER = Path(__file__).with_name("server.py")
START_SECONDS = 180
OVERLOADED = "429"

console = Console(highlight=False)


def main() -> int:
    """Measure all engines; the exit code."""
    arguments, server_options = sys.argv[1:], list[str]()
    if "--" in arguments:
        at = arguments.index("--")
        arguments, server_options = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint for embeddings")
    parser.add_argument("--engines", nargs="+", default=["fastbert", "sentence-transformers"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--words", nargs="+", type=int, default=[1, 150], help="least of a text: sentences are joined")
    parser.add_argument("--texts", type=int, default=1, help="of a request")
    parser.add_argument("--seconds", type=float, default=10, help="of a measurement, after a second that doesn't count")
    options = parser.parse_args(arguments)

    columns = ("engine", "words", "clients", "requests/s", "tokens/s", "p50 ms", "p99 ms", "errors")
    table = Table(*columns, title=f"{options.texts} text(s) a request, {options.seconds:g} s each", box=None)
    failed = False
    for engine in options.engines:
        with serving(options.folder, ["--engine", engine, *server_options]) as (url, _):
            for words, clients in itertools.product(options.words, options.clients):
                bodies = requests(words, options.texts)
                found = asyncio.run(measured(f"{url}/v1/embeddings", bodies, clients, options.seconds))
                table.add_row(engine, str(words), str(clients), *found.shown(options.seconds))
                failed = failed or bool(found.errors.keys() - {OVERLOADED})
    console.print(table)
    return 1 if failed else 0


@contextmanager
def serving(folder: Path, options: list[str]) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The URL and the process of a server that runs within the block.

    Raises:
        RuntimeError: it does not start, or does not end with 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, str(SERVER), str(folder), "--port", str(port), *options])
    try:
        end = time.monotonic() + START_SECONDS
        while not healthy(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no server at {url}")
            time.sleep(0.1)
        yield url, process
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait()
    if code != 0:
        raise RuntimeError(f"the server ended with {code}")


def healthy(url: str) -> bool:
    """Whether a server answers there."""
    try:
        with urlopen(f"{url}/health", timeout=5):
            return True
    except (URLError, TimeoutError, ConnectionError):
        return False


def requests(words: int, texts: int) -> list[bytes]:
    """Bodies of requests of so many texts, each of sentences joined to at least so many words."""
    joined: list[str] = [""]
    for sentence in SENTENCES.read_text(encoding="utf-8").splitlines():
        joined[-1] = f"{joined[-1]} {sentence}".strip()
        if len(joined[-1].split()) >= words:
            joined.append("")
    whole = itertools.cycle(joined[:-1])
    count = max(len(joined) - 1, texts)
    return [
        orjson.dumps({"input": list(itertools.islice(whole, texts)), "encoding_format": "base64"}) for _ in range(count)
    ]


@dataclass
class Found:
    """What the clients saw.

    Attributes:
        seconds: of each request that was answered.
        tokens: of these.
        errors: how many of each kind: an HTTP status, or the name of an exception.
    """

    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def shown(self, seconds: float) -> list[str]:
        """The cells of a row."""
        p50, p99 = np.percentile(self.seconds, [50, 99]) * 1000 if self.seconds else (np.nan, np.nan)
        errors = ", ".join(f"{count} x {kind}" for kind, count in self.errors.items())
        rates = [f"{len(self.seconds) / seconds:,.1f}", f"{self.tokens / seconds:,.0f}"]
        return [*rates, f"{p50:.1f}", f"{p99:.1f}", errors or "none"]


async def measured(url: str, bodies: list[bytes], clients: int, seconds: float) -> Found:
    """What so many clients saw in so many seconds."""
    found = Found()
    begin = time.perf_counter() + 1
    turns = itertools.cycle(bodies)
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers) as session:
        await asyncio.gather(*(client(session, url, turns, begin, begin + seconds, found) for _ in range(clients)))
    return found


async def client(
    session: aiohttp.ClientSession, url: str, bodies: Iterator[bytes], begin: float, end: float, found: Found
) -> None:
    """Send one request after the other; those that end between `begin` and `end` count."""
    while (sent := time.perf_counter()) < end:
        error, tokens, pause = None, 0, 0.0
        try:
            async with session.post(url, data=next(bodies)) as response:
                body = await response.read()
                if response.status == 200:
                    tokens = orjson.loads(body)["usage"]["prompt_tokens"]
                else:
                    error, pause = str(response.status), float(response.headers.get("Retry-After", 0))
        except (aiohttp.ClientError, ConnectionError) as problem:
            error = type(problem).__name__
        if begin <= (now := time.perf_counter()) <= end:
            if error is not None:
                found.errors[error] += 1
            else:
                found.seconds.append(now - sent)
                found.tokens += tokens
        await asyncio.sleep(min(pause, max(end - now, 0)))


if __name__ == "__main__":
    sys.exit(main())
