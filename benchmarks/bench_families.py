"""A model of each shape on real lengths: loaded, and accelerated in transformers, beside transformers and its exports.

Weights are random, 6 layers of 384; batches are of 16 texts, sorted by length. Loaded, ours is to be at least as fast
as the best rival; accelerated, as transformers.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_text import corpus
from contest import Case, Contender, Contest, WrongResultError
from providers import fresh
from torch import Tensor, nn
from workloads import workload

import fastbert
from fastbert.backend import first_device, paths_taken
from fastbert.packing import Packing
from fastbert.rivals import runtimes
from fastbert.rivals.runtimes import Source, UnservedError

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


@dataclass(frozen=True, eq=False)
class Batches:
    """transformers' model, a folder for it, `(ids, mask)` of each batch, and `(ids, packing)` of the same."""

    model: nn.Module
    folder: tempfile.TemporaryDirectory[str]
    padded: list[tuple[Tensor, Tensor]]
    packed: list[tuple[Tensor, Packing]]

    @cached_property
    def exported(self) -> Path:
        """The model as ONNX.

        Raises:
            UnservedError: torch can't export it.
        """
        folder = Path(self.folder.name)
        try:
            return runtimes.exported(Source(folder), folder)
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # each is what an exporter trips over
            raise UnservedError(f"no export: {type(error).__name__}: {error}") from error


@cache
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


def case_of(shape: str) -> Case:
    lengths = [int(length) for _, mask in batches() for length in mask.sum(1)]
    return Case("family", workload(shape, "minilm", lengths), "forward", "fp32", "eager")


def operands(case: Case) -> Batches:
    kind, sizes = SHAPES[case.workload.name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{kind}Config")(**sizes)
        model = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases of 0 and norms of 1 would hide who forgets them
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder = tempfile.TemporaryDirectory()
    model.save_pretrained(folder.name)
    packed = [(ids[mask.bool()], Packing.from_mask(mask)) for ids, mask in batches()]
    return Batches(model, folder, batches(), packed)


def on_padded(of: Batches, call: Callable[[Tensor, Tensor], Any]) -> Contender:
    """A contender of what makes hidden states `[batch, seqlen, hidden]` of ids and mask."""

    @torch.inference_mode()
    def run() -> list[Any]:
        return [call(ids, mask) for ids, mask in of.padded]

    def results(made: list[Any]) -> dict[str, Tensor]:
        rows = [torch.as_tensor(hidden)[mask.bool()] for hidden, (_, mask) in zip(made, of.padded, strict=True)]
        return {"out": torch.cat(rows)}

    return Contender(run, results, sum(ids.numel() for ids, _ in of.padded))


def by_transformers(of: Batches, dtype: torch.dtype) -> dict[str, Tensor]:
    model = copy.deepcopy(of.model).to(dtype)
    contender = on_padded(of, lambda ids, mask: model(ids, attention_mask=mask).last_hidden_state)
    return dict(contender.results(contender.run()))


def whole(contender: Contender) -> Contender:
    """One of ours, which is wrong too if it does not compute all layers of a batch together."""

    def trial() -> Any:
        with paths_taken() as taken:
            made = contender.run()
        if sum(taken.values()) != BATCHES:
            raise WrongResultError(f"not one program a batch: {dict(taken)}")
        return made

    return replace(contender, trial=trial)


def fastbert_load(case: Case, of: Batches) -> Contender:
    model = fastbert.load(of.folder.name)

    @torch.inference_mode()
    def run() -> list[Tensor]:
        return [model(ids, packing=fresh(packing)).last_hidden_state for ids, packing in of.packed]

    return whole(Contender(run, lambda made: {"out": torch.cat(made)}, case.workload.tokens))


def fastbert_accelerate(case: Case, of: Batches) -> Contender:
    model = fastbert.accelerate(copy.deepcopy(of.model), strict=True)
    contender = whole(on_padded(of, lambda ids, mask: model(ids, attention_mask=mask).last_hidden_state))
    return replace(contender, padded_tokens=case.workload.tokens)


def of_transformers(case: Case, of: Batches) -> Contender:
    return on_padded(of, lambda ids, mask: of.model(ids, attention_mask=mask).last_hidden_state)


def onnxruntime(case: Case, of: Batches) -> Contender:
    return on_padded(of, runtimes.onnxruntime_model(of.exported))


def openvino(case: Case, of: Batches) -> Contender:
    run = runtimes.openvino_model(of.exported, torch.float32)
    return on_padded(of, lambda ids, mask: run(ids, mask).copy())  # the next call writes over what it gave


PROVIDERS = {
    "fastbert": fastbert_load,
    "fastbert accelerate": fastbert_accelerate,
    "transformers": of_transformers,
    "onnxruntime": onnxruntime,
    "OpenVINO": openvino,
}
CONTEST = Contest(
    PROVIDERS,
    operands,
    plain=lambda case, of: by_transformers(of, torch.float32),
    exact=lambda case, of: by_transformers(of, torch.float64),
    costs=lambda case, of: [],
    factor=3.0,
)


@pytest.mark.skipif(first_device().type != "cpu", reason="of CPUs")
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_at_least_as_fast(shape: str, provider: str, compete: Any) -> None:
    if not hasattr(transformers, f"{SHAPES[shape][0]}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {SHAPES[shape][0]}")
    standings = compete(CONTEST, case_of(shape), provider)
    speeds = {name: one.facts["tokens_per_s"] for name, one in standings.items() if one.facts}
    rivals = {name: speed for name, speed in speeds.items() if not name.startswith("fastbert")}
    if provider == "fastbert" and rivals:
        assert speeds[provider] >= max(rivals.values()), speeds
    if provider == "fastbert accelerate" and "transformers" in rivals:
        assert speeds[provider] >= rivals["transformers"], speeds
