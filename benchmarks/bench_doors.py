"""One model behind each door, on one padded batch: none may be slower than `TextEncoder`'s own way by more than 5%.

`pytest benchmarks/bench_doors.py -s` prints them beside transformers, all in turns: MiniLM, 32 ragged texts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bench_text import corpus
from measure import pin_threads
from torch import Tensor

from fastbert import Encoder, TextEncoder, load
from fastbert.backend import first_device, paths_taken
from fastbert.packing import Packing
from fastbert.rivals.turns import interleaved

transformers = pytest.importorskip("transformers", reason="the rival")

BATCH, LONGEST = 32, 128
MOST = 1.05  # of the time of TextEncoder's way


@pytest.mark.skipif(first_device().type != "cpu", reason="of CPUs")
def test_every_door_takes_the_same_path() -> None:
    pin_threads()
    of = corpus(1000)
    rows = [row for row in np.argsort(of.tokens.lengths)[::-1] if of.tokens.lengths[row] <= LONGEST][:: 900 // BATCH]
    ids = [of.tokens.packed([int(row)])[0] for row in rows[:BATCH]]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    encoder = TextEncoder.from_folder(of.folder, dtype="fp32", device="cpu")
    plain, dropped_in = (transformers.BertModel.from_pretrained(of.folder).eval() for _ in range(2))
    dropped_in.encoder = Encoder.from_hf(dropped_in.encoder)
    model, packing = load(of.folder), Packing.from_mask(mask)
    packed = torch.cat(ids)

    doors: dict[str, Callable[[], Any]] = {
        "TextEncoder": lambda: packing.unpack(encoder.model(packed, packing=packing).last_hidden_state),
        "load(folder)(...)": lambda: model(padded, mask).last_hidden_state,
        "Encoder.from_hf in transformers": lambda: dropped_in(padded, attention_mask=mask).last_hidden_state,
        "transformers": lambda: plain(padded, attention_mask=mask).last_hidden_state,
    }
    with torch.inference_mode():
        wanted, taken = doors["transformers"](), {}
        for name, door in doors.items():
            with paths_taken() as taken[name]:
                got: Tensor = door()
            torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=1e-4)
        seconds = interleaved(doors, 9)
    of_ours = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in of_ours.items():
        ratios = [time / base for time, base in zip(seconds[name], seconds["TextEncoder"], strict=True)]
        ratio = statistics.median(ratios)
        print(f"\n{name:32} {1000 * median:7.1f} ms, {ratio:.3f} of TextEncoder's time, by {dict(taken[name])}", end="")
        if name != "transformers":
            assert ratio <= MOST, name
