"""A whole BERT, from ids to hidden states: what it takes to run a batch, and to make the gradients of all parameters.

Who packs gets packed ids and their layout, who pads gets padded ids and their mask; both are made before the clock
starts. What a model makes of them, a table of tiles or a mask of four dimensions, it makes in each timed call. Weights
are random, and the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contest import Case, Contender, Contest, UnservedError, cases
from providers import checkpoint, compiled, fresh, of_runtimes, random_ids
from roofline import model_costs
from torch import Tensor, nn
from workloads import BYTETRANSFORMER, KERNL, MIXES, TENSORRT

from fastbert import BertModel, graphed, load, quantize
from fastbert.kernels.cost import Cost
from fastbert.packing import Packing
from fastbert.rivals.runtimes import INT8_COSINE, Run, transformers_model


@dataclass(frozen=True)
class Batch:
    """A checkpoint folder; ids and dout, packed, and their layout; ids and mask, padded."""

    folder: Path
    ids: Tensor
    packing: Packing
    padded_ids: Tensor
    mask: Tensor
    dout: Tensor


def operands(case: Case) -> Batch:
    work = case.workload
    packing = Packing.from_lengths(work.lengths, device=case.device)
    ids = random_ids(work, case.device)
    dout = torch.randn(work.tokens, work.hidden, device=case.device).to(case.torch_dtype)
    folder = checkpoint(work.model, work.max_seqlen)
    return Batch(folder, ids, packing, packing.unpack(ids), packing.unpack(torch.ones_like(ids)), dout)


def differentiate(case: Case, model: nn.Module, forward: Callable[[], Tensor], dout: Tensor) -> list[Tensor]:
    """`forward()`, and where the case is backward the gradients of all parameters of `model`, in their order."""
    if not case.backward:
        with torch.inference_mode():
            return [forward()]
    out = forward()
    return [out, *torch.autograd.grad(out, list(model.parameters()), dout)]


def named(case: Case, model: nn.Module, results: list[Tensor], names: Mapping[str, list[str]]) -> dict[str, Tensor]:
    """The result, and of the gradients the first, the last and one between; `names` says what they are in `model`."""
    if not case.backward:
        return {"out": results[0]}
    gradients = dict(zip((name for name, _ in model.named_parameters()), results[1:], strict=True))
    return {"out": results[0]} | {f"d{what}": torch.cat([gradients[one] for one in of]) for what, of in names.items()}


def our_names(layers: int) -> dict[str, list[str]]:
    return _names("embeddings.word.weight", layers)


def their_names(layers: int) -> dict[str, list[str]]:
    return _names("embeddings.word_embeddings.weight", layers)


def _names(word: str, layers: int) -> dict[str, list[str]]:
    first = "encoder.layer.0.attention.self"
    return {
        "word": [word],
        "qkv": [f"{first}.{part}.weight" for part in ("query", "key", "value")],
        "output": [f"encoder.layer.{layers - 1}.output.dense.weight"],
    }


def in_torch(model: BertModel, ids: Tensor, packing: Packing) -> Tensor:
    """What BERT computes, packed, by plain torch: int64 `[tokens]` -> `[tokens, hidden]`."""
    config, tables = model.config, model.embeddings
    x = tables.norm(tables.word(ids) + tables.token_type.weight[0] + tables.position(packing.columns))
    for layer in (one.parts() for one in model.encoder.layer):
        qkv = torch.cat([part(x) for part in layer["qkv"].linears()], 1)
        qkv = qkv.view(-1, 3, config.num_heads, config.head_dim)
        contexts = [
            F.scaled_dot_product_attention(*sequence.permute(1, 2, 0, 3)).transpose(0, 1).flatten(1)
            for sequence in qkv.split(packing.lengths.tolist())
        ]
        x = layer["attention_norm"](x + layer["attention_output"](torch.cat(contexts)))
        x = layer["output_norm"](x + layer["output"](F.gelu(layer["intermediate"](x))))
    return x


def by_torch(case: Case, of: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    model = load(of.folder, dtype=case.torch_dtype, device=case.device).to(dtype)  # rounded as for all the others
    results = differentiate(case, model, lambda: in_torch(model, of.ids, of.packing), of.dout.to(dtype))
    return named(case, model, results, our_names(case.workload.layers))


def plain(case: Case, of: Batch) -> dict[str, Tensor]:
    return by_torch(case, of, case.torch_dtype)


def exact(case: Case, of: Batch) -> dict[str, Tensor]:
    return by_torch(case, of, torch.float64)


def costs(case: Case, of: Batch) -> list[Cost]:
    return model_costs(case.workload, case.torch_dtype, words=len(of.ids.unique()), backward=case.backward)


def fastbert_int8(case: Case, of: Batch) -> Contender:
    if case.backward or case.dtype != "fp32" or case.device.type != "cpu":
        raise UnservedError("int8 is for inference on the CPU, made of float32")
    model = quantize(load(of.folder, dtype=case.torch_dtype), dtype="int8")

    def run() -> list[Tensor]:
        with torch.inference_mode():
            return [model(of.ids, packing=fresh(of.packing)).last_hidden_state]

    contender = Contender(run, lambda results: {"out": results[0]}, case.workload.tokens)
    return replace(contender, dtype="int8", least_cosine=INT8_COSINE)


def fastbert_graphed(case: Case, of: Batch) -> Contender:
    """Its embeddings and layers in the CUDA graphs that it keeps itself, whose inputs it fills in each call."""
    if case.backward or case.mode == "graph" or case.device.type == "cpu":
        raise UnservedError("it is for inference on a GPU, and no graph can hold another")
    return ours(case, of, graphed(load(of.folder, dtype=case.torch_dtype, device=case.device)))


def fastbert(case: Case, of: Batch) -> Contender:
    return ours(case, of, load(of.folder, dtype=case.torch_dtype, device=case.device))


def ours(case: Case, of: Batch, model: BertModel) -> Contender:
    def forward() -> Tensor:
        return model(of.ids, packing=fresh(of.packing)).last_hidden_state

    def run() -> list[Tensor]:
        return differentiate(case, model, forward, of.dout)

    names = our_names(case.workload.layers)
    return Contender(run, lambda results: named(case, model, results, names), case.workload.tokens)


def of_transformers(case: Case, of: Batch, model: nn.Module, call: Callable[..., Any]) -> Contender:
    dout = of.packing.unpack(of.dout)
    # It would leave out a mask of ones by itself, but not inside a CUDA graph, and flash attention takes no mask.
    mask = None if of.packing.tokens == case.workload.padded_tokens else of.mask

    def forward() -> Tensor:
        return call(input_ids=of.padded_ids, attention_mask=mask).last_hidden_state

    def results(made: list[Tensor]) -> dict[str, Tensor]:
        return named(case, model, [of.packing.pack(made[0]), *made[1:]], their_names(case.workload.layers))

    return Contender(partial(differentiate, case, model, forward, dout), results, case.workload.padded_tokens)


def transformers(case: Case, of: Batch) -> Contender:
    model = transformers_model(of.folder, case.torch_dtype, case.device)
    return of_transformers(case, of, model, model)


def transformers_eager(case: Case, of: Batch) -> Contender:
    model = transformers_model(of.folder, case.torch_dtype, case.device, attention="eager")
    return of_transformers(case, of, model, model)


def torch_compile(case: Case, of: Batch) -> Contender:
    model = transformers_model(of.folder, case.torch_dtype, case.device)
    return of_transformers(case, of, model, compiled(model))


def runtime(case: Case, of: Batch, run: Run) -> Contender:
    def results(hidden: Any) -> dict[str, Tensor]:
        return {"out": of.packing.pack(torch.from_numpy(np.array(hidden)))}

    return Contender(lambda: run(of.padded_ids, of.mask), results, case.workload.padded_tokens)


PROVIDERS = {
    "fastbert": fastbert,
    "fastbert int8": fastbert_int8,
    "fastbert graphed": fastbert_graphed,
    "transformers": transformers,
    "transformers eager": transformers_eager,
    "torch.compile": torch_compile,
    **of_runtimes(runtime),
}
SLOW = {"transformers eager", "torch.compile", "CTranslate2"}  # to run, to compile, to convert
NAMES = [pytest.param(name, marks=[pytest.mark.full] if name in SLOW else []) for name in PROVIDERS]
CONTEST = Contest(PROVIDERS, operands, plain, exact, costs, factor=3.0)
WORKLOADS = {work.name: work for grid in (MIXES, TENSORRT, BYTETRANSFORMER, KERNL) for work in grid if work.batch > 1}

SMALL = [work for work in WORKLOADS.values() if work.model == "minilm"]
LARGE = [work for work in WORKLOADS.values() if work.model != "minilm"]
CASES = [
    *cases("encoder", WORKLOADS.values()),
    *cases("encoder", SMALL, passes=("forward+backward",)),
    *cases("encoder", LARGE, passes=("forward+backward",), dtypes=()),  # on a CPU under --full only
]


@pytest.mark.parametrize("provider", NAMES)
@pytest.mark.parametrize("case", CASES)
def test_encoder(case: Case, provider: str, compete: Any) -> None:
    compete(CONTEST, case, provider)
