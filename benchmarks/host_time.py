"""Host time of an encoder layer: what Python, dispatch, checks and the packing of arguments take, ours against theirs.

    python benchmarks/host_time.py

No GPU is needed. Our kernels are compiled for an H100 by Triton, and its launch is replaced by a call that does nothing
(`offline.OfflineDriver`); all before it runs as on a GPU. What torch itself runs, our matrix products and all of
transformers' layer, takes CPU tensors of one token and 16 columns, so that its kernels' own time is next to nothing and
what is left is dispatch. A `meta` device would not do: much of it is Python that no GPU runs.

Neither side pays for the driver's launch, of which transformers has 12 a layer and we have 8; ours are also spared
`torch.cuda.device`, about a microsecond a kernel. Times are those of this thread on the CPU, in turns, so that other
work on the machine moves both alike. The ratio is the figure to read.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.runtime.driver import driver

import fastbert
from fastbert import backend
from fastbert.kernels.target import KNOWN, Target, pretend
from fastbert.model.layer import EncoderLayer
from fastbert.packing import Packing

sys.path.append(str(Path(__file__).parent / "static"))
from offline import OfflineDriver

ARCH = "sm_90"
HIDDEN, HEADS, INTERMEDIATE, TOKENS = 16, 2, 64, 1
LIMIT = 0.5  # of transformers' host time


class NullDriver(OfflineDriver):
    """A driver whose launches do nothing at all."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        # As real ones, handles that are not None: Triton would load a kernel anew at each launch.
        self.utils.load_binary = lambda *_: (1, 1, 0, 0, 1024)

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        """What Triton calls once for a compiled kernel to get the function that launches it."""
        return lambda *_: None


@contextmanager
def null_launches() -> Iterator[None]:
    """Make the Triton path serve CPU tensors, with kernels compiled for an H100 and launches that do nothing."""
    knobs = triton.knobs
    decision = backend.Decision("triton", "a null launcher")
    with tempfile.TemporaryDirectory() as cache, pretend(KNOWN[ARCH]), knobs.cache.scope():
        knobs.cache.dir = cache
        driver.set_active(NullDriver(KNOWN[ARCH]))
        try:
            with patch.object(backend, "decide", lambda device: decision):
                yield
        finally:
            driver.set_active(None)


def our_layer() -> Callable[[], Any]:
    """One layer of ours on packed rows; tables of tiles are made by the first layer of a batch."""
    config = fastbert.EncoderConfig(hidden_size=HIDDEN, num_heads=HEADS, intermediate_size=INTERMEDIATE)
    layer, packing = EncoderLayer(config).eval(), Packing.from_lengths([TOKENS])
    x = torch.ones(TOKENS, HIDDEN)
    return lambda: layer(x, packing)


def their_layer() -> Callable[[], Any]:
    """One layer of transformers with its fastest attention, SDPA, without a mask."""
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    config = BertConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, intermediate_size=INTERMEDIATE, attn_implementation="sdpa"
    )
    layer, x = BertLayer(config).eval(), torch.ones(1, TOKENS, HIDDEN)
    return lambda: layer(x)


def in_turns(calls: Mapping[str, Callable[[], Any]], *, rounds: int, each: int) -> dict[str, list[float]]:
    """Seconds of this thread's CPU time a call, `rounds` figures of `each` calls for every name, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.thread_time()
            for _ in range(each):
                call()
            seconds[name].append((time.thread_time() - begin) / each)
    return seconds


def ratio(seconds: Mapping[str, list[float]], ours: str, theirs: str) -> float:
    """The median over the rounds of ours / theirs in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True))


def measure(rounds: int = 60, each: int = 50) -> dict[str, list[float]]:
    """The host time of "ours" and of "transformers", as `in_turns`."""
    with null_launches(), torch.no_grad():
        calls = {"ours": our_layer(), "transformers": their_layer()}
        in_turns(calls, rounds=3, each=each)  # compiled, imported, and what is kept is kept
        return in_turns(calls, rounds=rounds, each=each)


def main() -> int:
    """The command; its exit status is 1 where ours take more than LIMIT of theirs."""
    torch.set_num_threads(1)
    seconds = measure()
    for name, figures in seconds.items():
        print(f"{name:13} {statistics.median(figures) * 1e6:6.0f} us a layer")
    share = ratio(seconds, "ours", "transformers")
    print(f"ratio         {share:6.2f}, at most {LIMIT}")
    return 0 if share <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
