"""A model of each shape on real lengths: loaded, and accelerated in transformers, beside transformers and its exports.

`pytest benchmarks/bench_families.py -s` prints tokens/s of each, all in turns. Weights are random, 6 layers of 384;
batches are of 16 texts, sorted by length. Ours is to be at least as fast as each of the others.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_text import corpus
from measure import pin_threads
from torch import Tensor

import fastbert
from fastbert.backend import first_device, paths_taken
from fastbert.packing import Packing
from fastbert.rivals import runtimes
from fastbert.rivals.runtimes import Run, Source, UnservedError
from fastbert.rivals.turns import interleaved

transformers = pytest.importorskip("transformers", reason="the rival")

BATCHES, BATCH, LONGEST = 2, 16, 256
SIZES = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "max_position_embeddings": 514,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "post-norm (BERT)": ("Bert", SIZES),
    "relative bias (MPNet)": ("MPNet", SIZES),
    "pre-norm, rotary, windows, gates (ModernBERT)": (
        "ModernBert",
        {
            **SIZES,
            "intermediate_size": 576,
            **{f"{name}_token_id": i for i, name in enumerate(("pad", "cls", "sep", "bos", "eos"))},
        },
    ),
    "rotary, gates (NomicBERT)": ("NomicBert", {**SIZES, "intermediate_size": 1024, "pad_token_id": 0}),
    "disentangled (DeBERTa-v3)": (
        "DebertaV2",
        {
            **SIZES,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 256,
            "max_relative_positions": -1,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
}
TOLERANCE = 1e-3  # of outputs of about 1; the tests hold the error rule


def batches() -> list[tuple[Tensor, Tensor]]:
    """`(ids, mask)`, int64 `[16, longest]` each: evenly taken of 1,000 texts that are sorted by length."""
    of = corpus(1000)
    rows = [int(row) for row in np.argsort(of.tokens.lengths) if of.tokens.lengths[row] <= LONGEST]
    step = len(rows) // BATCHES
    found = []
    for i in range(BATCHES):
        ids = [of.tokens.packed([row])[0] for row in rows[(i + 1) * step - BATCH : (i + 1) * step]]
        ids = [one.clamp(min=5) for one in ids]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        found.append((padded, torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)))
    return found


def onnx_rivals(folder: Path) -> dict[str, Run]:
    """onnxruntime and OpenVINO on the model's export; those that are not installed, or can't be made, are told."""
    found: dict[str, Run] = {}
    try:
        graph = runtimes.exported(Source(folder), folder)
        found["onnxruntime"] = runtimes.onnxruntime_model(graph)
        found["OpenVINO"] = runtimes.openvino_model(graph, torch.float32)
    except (UnservedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        print(f"\n  no further export: {type(error).__name__}: {str(error).splitlines()[0]:.100}", end="")
    return found


@pytest.mark.skipif(first_device().type != "cpu", reason="of CPUs")
@pytest.mark.parametrize("shape", SHAPES)
def test_at_least_as_fast(shape: str) -> None:
    pin_threads()
    kind, sizes = SHAPES[shape]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{kind}Config")(**sizes)
        theirs = transformers.AutoModel.from_config(config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    accelerated = fastbert.accelerate(copy.deepcopy(theirs), strict=True)
    of = batches()
    tokens = sum(int(mask.sum()) for _, mask in of)
    packed = [(ids[mask.bool()], Packing.from_mask(mask)) for ids, mask in of]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        theirs.save_pretrained(folder)
        ours = fastbert.load(folder)
        models: dict[str, Callable[[Tensor, Tensor], Any]] = {
            "transformers": lambda ids, mask: theirs(ids, attention_mask=mask).last_hidden_state,
            "fastbert.accelerate": lambda ids, mask: accelerated(ids, attention_mask=mask).last_hidden_state,
            **onnx_rivals(Path(folder)),
        }
        wanted = [models["transformers"](ids, mask)[mask.bool()] for ids, mask in of]
        contenders: dict[str, Callable[[], Any]] = {
            name: lambda model=model: [model(ids, mask) for ids, mask in of] for name, model in models.items()
        }
        contenders["fastbert.load, packed"] = lambda: [
            ours(ids, packing=packing).last_hidden_state for ids, packing in packed
        ]
        for name in list(contenders):
            with paths_taken() as taken:
                made = contenders[name]()
            for (_, mask), got, want in zip(of, made, wanted, strict=True):
                rows = torch.as_tensor(got)
                rows = rows[mask.bool()] if rows.dim() == 3 else rows
                if (rows - want).abs().max() > TOLERANCE:
                    print(f"\n  {name} is wrong by {float((rows - want).abs().max()):.1e}: not timed", end="")
                    assert "fastbert" not in name, name
                    del contenders[name]
                    break
            if "fastbert" in name:
                assert sum(taken.values()) == BATCHES, taken
        seconds = interleaved(contenders, 3)
    print(f"\n{shape}, {tokens:,} tokens:")
    best = max(tokens / statistics.median(times) for name, times in seconds.items() if "fastbert" not in name)
    speeds = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    for name, speed in speeds.items():
        print(f"  {name:24} {speed:10,.0f} tokens/s, {speed / best:.2f} of the best rival", end="\n")
    assert speeds["fastbert.load, packed"] >= best and speeds["fastbert.accelerate"] >= speeds["transformers"]
