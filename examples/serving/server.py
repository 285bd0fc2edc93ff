"""A service of embeddings, scores or labels over HTTP, with the APIs of OpenAI and text-embeddings-inference.

    python examples/serving/server.py FOLDER          (with fastbert installed, and `pip install '.[serving]'`)

docs/serving.md says what it answers. It ends on SIGTERM when what it took on is answered, with 0.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from pathlib import Path
from typing import get_args

from fastbert.errors import FastbertError


def main() -> int:
    """Serve until a signal comes; the exit code."""
    # Between two batches the threads of a product leave the cores to those that read and write; before torch is there.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import uvicorn
    from engines import EngineName, Task, load
    from service import Limits, Service

    from fastbert.tasks.loading import DTYPES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, help="a checkpoint of Hugging Face or of sentence-transformers")
    parser.add_argument("--task", choices=get_args(Task), default="embed")
    parser.add_argument("--engine", choices=get_args(EngineName), default="fastbert", help="which library computes")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--device", help="default: the first GPU, or the CPU")
    parser.add_argument("--name", help="the model's name for OpenAI's clients; default: that of the folder")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--batch-tokens", type=positive, help="most of a batch; default: by model and machine")
    parser.add_argument("--batch-linger", type=float, default=5, help="ms that a batch waits for more at most")
    parser.add_argument("--queue-tokens", type=positive, default=300_000, help="most that wait, and most of a request")
    parser.add_argument("--requests", type=positive, default=512, help="most that are open at once")
    parser.add_argument("--request-texts", type=positive, default=2048, help="most of a request")
    parser.add_argument("--request-bytes", type=positive, default=16 << 20, help="most of a request's body")
    parser.add_argument("--auto-truncate", action="store_true", help="cut longer texts where a request doesn't say")
    parser.add_argument("--token-ids", action="store_true", help="inputs may be ids of the model's own tokenizer")
    parser.add_argument("--grace", type=positive, default=30, help="seconds after SIGTERM to answer what is there")
    options = parser.parse_args()

    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    folder: Path = options.folder
    try:
        engine = load(options.engine, folder, options.task, options.dtype, options.device, options.batch_tokens)
    except FastbertError as error:
        print(error, file=sys.stderr)
        return 1
    for texts in (1, engine.batch_tokens // 8):  # the first calls choose and lay out what the others use
        engine.compute(engine.tokenize(["warm up before anybody waits"] * texts, engine.longest))
    limits = Limits(
        linger=options.batch_linger / 1000,
        queue_tokens=options.queue_tokens,
        requests=options.requests,
        request_texts=options.request_texts,
        request_bytes=options.request_bytes,
        truncate=options.auto_truncate,
        token_ids=options.token_ids,
    )
    service = Service(engine, options.name or Path(os.path.abspath(folder)).name, limits)  # noqa: PTH100 - a link's own name
    # uvicorn answers what it has and then raises the signal again, for whoever was there before it.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    uvicorn.run(
        service.app(),
        host=options.host,
        port=options.port,
        access_log=False,
        timeout_keep_alive=75,  # more than clients keep a connection, so that it is theirs to close
        timeout_graceful_shutdown=options.grace,
    )
    return 0


def positive(word: str) -> int:
    """A positive whole number, for argparse."""
    number = int(word)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
