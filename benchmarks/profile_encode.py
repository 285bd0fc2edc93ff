"""Where the time of `fastbert.encode` goes: the kernels that take most, copies, and where the host waits for the GPU.

    python benchmarks/profile_encode.py [--texts 512] [--out FOLDER]

Texts of made-up words, as long as those of Rotten Tomatoes, through a model of MiniLM's shape with random weights. The
table is printed, and with `--out` written to FOLDER/profile.txt.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from smoke import MINILM
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastbert import BertModel, save
from fastbert.backend import first_device
from fastbert.config import EncoderConfig
from fastbert.tasks.encode import TextEncoder

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (3, 50)  # of a text
MOST = 20  # lines of a table


class Event(Protocol):
    """What is used of what torch.profiler sums up by name; times are in microseconds."""

    key: str
    count: int
    device_type: DeviceType
    self_cpu_time_total: float
    self_device_time_total: float


def texts_of(config: EncoderConfig, count: int) -> list[str]:
    """Of words that the tokenizer of `folder_of` keeps whole."""
    draw = random.Random(0)
    return [
        " ".join(f"word{draw.randrange(len(SPECIAL), config.vocab_size)}" for _ in range(draw.randint(*WORDS)))
        for _ in range(count)
    ]


def fill(folder: Path, config: EncoderConfig) -> None:
    """Put a checkpoint with random weights and its words there."""
    torch.manual_seed(0)
    save(BertModel(config, pooler=False), folder)
    words = [*SPECIAL, *(f"word{i}" for i in range(len(SPECIAL), config.vocab_size))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def record(config: EncoderConfig, count: int) -> tuple[list[Event], float]:
    """What happened in one `encode` of so many texts, and the seconds of one, after one that compiled what it needs."""
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), config)
        encoder = TextEncoder.from_folder(folder)
    texts = texts_of(config, count)
    encoder.encode(texts)
    begin = time.perf_counter()
    encoder.encode(texts)
    seconds = time.perf_counter() - begin  # the profiler takes time of its own
    on_gpu = [ProfilerActivity.CUDA] if first_device().type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as seen:
        encoder.encode(texts)
    return list(seen.key_averages()), seconds


def summary(events: Sequence[Event], count: int, seconds: float) -> str:
    """Tables of kernels, copies, waits and the host's own time."""
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    copies = [event for event in on_gpu if event.key.startswith(("Memcpy", "Memset"))]
    kernels = [event for event in on_gpu if event not in copies]
    waits = [event for event in events if event.key.endswith("Synchronize")]
    host = [event for event in events if event.device_type == DeviceType.CPU and event not in waits]
    busy = sum(event.self_device_time_total for event in on_gpu) / 1e6
    lines = [f"{count} texts in {1000 * seconds:.1f} ms; the GPU was busy for {1000 * busy:.1f} ms of a profiled call"]
    lines += table("kernels", kernels, "self_device_time_total")
    lines += table("copies", copies, "self_device_time_total")
    lines += table("waits of the host", waits, "self_cpu_time_total")
    lines += table("the host", host, "self_cpu_time_total")
    return "\n".join(lines) + "\n"


def table(title: str, events: Iterable[Event], figure: str) -> list[str]:
    """The events that took most by this figure, and the sum of all."""
    ordered = sorted(events, key=lambda event: (-getattr(event, figure), event.key))
    total, calls = sum(getattr(event, figure) for event in ordered), sum(event.count for event in ordered)
    lines = ["", f"{title}: {total / 1000:.3f} ms in {calls} calls", f"{'ms':>10} {'%':>6} {'calls':>7}  name"]
    for event in ordered[:MOST]:
        took = getattr(event, figure)
        lines.append(f"{took / 1000:10.3f} {100 * took / max(total, 1e-9):6.1f} {event.count:7}  {event.key[:90]}")
    return lines if ordered else [*lines[:2]]


def main(arguments: Sequence[str] | None = None, config: EncoderConfig = MINILM) -> int:
    """The command; its exit status is 1 if the profiler saw no kernel of a GPU that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    events, seconds = record(config, options.texts)
    said = summary(events, options.texts, seconds)
    print(said, end="")
    if options.out is not None:
        (options.out / "profile.txt").write_text(said, encoding="utf-8")
    if first_device().type == "cuda" and not any(event.device_type == DeviceType.CUDA for event in events):
        print("The profiler saw no kernel: it may not be allowed to trace this GPU.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
