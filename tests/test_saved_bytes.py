"""What autograd keeps between forward and backward, in bytes for a token and layer: less than transformers keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastbert import backend
from fastbert.model.encoder import Encoder
from fastbert.packing import Packing

transformers = pytest.importorskip("transformers", reason="the rival")

HIDDEN, HEADS, INTERMEDIATE, LAYERS = 64, 4, 256, 2


def saved(run: Any, parameters: Any) -> int:
    """Bytes of the different storages that autograd keeps in `run`, those of parameters left out."""
    mine = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}
    alive = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in mine:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # so that no address is used twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    assert out.requires_grad
    return sum(kept.values())


def hf_encoder() -> Any:
    config = transformers.BertConfig(
        hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=INTERMEDIATE,
        attn_implementation="sdpa",
    )  # fmt: skip
    return transformers.BertModel(config).train().encoder


def ours(encoder: Any, lengths: list[int], path: Any) -> float:
    packing = Packing.from_lengths(lengths)
    x = torch.randn(packing.tokens, HIDDEN, requires_grad=True)
    with backend.use_backend(path):
        total = saved(lambda: encoder(x, packing=packing).last_hidden_state, encoder.parameters())
    return total / packing.tokens / LAYERS


def theirs(encoder: Any, lengths: list[int]) -> float:
    batch, width = len(lengths), max(lengths)
    x = torch.randn(batch, width, HIDDEN, requires_grad=True)
    mask = None
    if min(lengths) < width:
        kept = torch.arange(width) < torch.tensor(lengths)[:, None]
        mask = torch.where(kept, 0.0, torch.finfo(x.dtype).min)[:, None, None].expand(batch, 1, width, width)
    total = saved(lambda: encoder(x, attention_mask=mask).last_hidden_state, encoder.parameters())
    return total / sum(lengths) / LAYERS


@pytest.mark.parametrize("lengths", [[16] * 2, [32, 5, 10, 1]], ids=["full", "ragged"])
@pytest.mark.kernels
def test_less_is_kept_than_by_transformers(lengths: list[int]) -> None:
    encoder = hf_encoder()
    plain = theirs(encoder, lengths)
    packed = Encoder.from_hf(encoder)
    assert packed.training
    for path in ("torch", "triton"):
        kept = ours(packed, lengths, path)
        print(f"{path}: {kept:.0f} bytes a token and layer, transformers {plain:.0f}")
        assert kept < plain


@pytest.mark.kernels
def test_the_kernels_keep_what_docs_say() -> None:
    """In float32: see docs/training.md, "Memory"."""
    encoder = Encoder.from_hf(hf_encoder())
    row = 4 * HIDDEN
    intermediate = 4 * INTERMEDIATE
    lse_and_statistics = 4 * (HEADS + 2 * 2)
    expected = 3 * row + row + 2 * row + 2 * row + 2 * intermediate + lse_and_statistics
    kept = ours(encoder, [16] * 2, "triton")
    print(kept, expected)
    assert kept == pytest.approx(expected, rel=0.1)
