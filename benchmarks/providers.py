"""What the rivals of several ops share: whether they can run here, and the runtimes that run a whole BERT."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from contest import Case, Contender, Provider, UnservedError
from torch import Tensor
from workloads import MODELS, POSITIONS, VOCABULARY, Workload

from fastbert import BertModel, EncoderConfig, save
from fastbert.packing import Packing
from fastbert.rivals import runtimes
from fastbert.rivals.runtimes import INT8_COSINE, Run, Source

F = TypeVar("F", bound=Callable[..., Any])


_made = tempfile.TemporaryDirectory(prefix="fastbert-bench-")  # removed when the process ends


def on_gpu(case: Case) -> None:
    """Raise UnservedError unless the case runs on a GPU."""
    if case.device.type != "cuda":
        raise UnservedError("it needs a GPU")


def compiled(function: F, *, dynamic: bool = False) -> F:
    """`torch.compile(function)` for one set of shapes, or for any of them.

    Raises:
        UnservedError: there is no C++ compiler, which its CPU code needs.
    """
    if not torch.cuda.is_available() and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        raise UnservedError("torch.compile needs a C++ compiler, and there is none on PATH")
    torch.compiler.reset()  # what it compiled for other cases counts against its limit of recompilations
    return torch.compile(function, dynamic=dynamic)


def fresh(packing: Packing) -> Packing:
    """The layout as a user's next batch brings it: without the table of tiles and all else that a call leaves in it."""
    return Packing.made_right(packing.cu_seqlens, packing.max_seqlen, packing.indices, packing.padded_shape)


def random_ids(workload: Workload, device: torch.device) -> Tensor:
    """Words of a batch, int64 `[tokens]`, a few of them far more often than others, as in text."""
    drawn = torch.rand(workload.tokens, device=device)
    return 1000 + (drawn**4 * (VOCABULARY - 1000)).long()


def checkpoint(model: str, seqlen: int) -> Path:
    """A checkpoint folder of a model of `workloads.MODELS` with random weights, for sequences as long as `seqlen`."""
    return _checkpoint(model, max(seqlen, POSITIONS))


@cache
def _checkpoint(model: str, positions: int) -> Path:
    shape = MODELS[model]
    config = EncoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        num_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_positions=positions,
    )
    torch.manual_seed(0)
    bert = BertModel(config, pooler=False)
    with torch.no_grad():
        for parameter in bert.parameters():  # biases of 0 and norms of 1 would hide who forgets them
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    folder = Path(_made.name) / f"{model}-{positions}"
    save(bert, folder)
    return folder


@cache
def _scratch(folder: Path) -> Path:
    """A folder for what is made of a checkpoint."""
    return Path(tempfile.mkdtemp(dir=_made.name, prefix=f"{folder.name}-"))


def of_runtimes(contend: Callable[[Case, Any, Run], Contender]) -> dict[str, Provider]:
    """The runtimes as providers by name, for forward passes on a CPU.

    Args:
        contend: makes a contender of a case, its operands, which have the checkpoint's `folder`, and a function.
    """

    def onnxruntime(case: Case, of: Any) -> Contender:
        on_cpu_forward(case, "fp32")
        graph = runtimes.optimised(Source(of.folder), _scratch(of.folder))
        return contend(case, of, runtimes.onnxruntime_model(graph))

    def onnxruntime_int8(case: Case, of: Any) -> Contender:
        on_cpu_forward(case, "fp32")
        graph = runtimes.quantised(runtimes.optimised(Source(of.folder), _scratch(of.folder)))
        return in_int8(contend(case, of, runtimes.onnxruntime_model(graph)))

    def openvino(case: Case, of: Any) -> Contender:
        on_cpu_forward(case, "fp32", "bf16")
        graph = runtimes.exported(Source(of.folder), _scratch(of.folder))
        return contend(case, of, runtimes.openvino_model(graph, case.torch_dtype))

    def ctranslate2(case: Case, of: Any) -> Contender:
        on_cpu_forward(case, "fp32")
        converted = runtimes.converted(of.folder, _scratch(of.folder))
        contender = contend(case, of, runtimes.ctranslate2_model(converted))
        return replace(contender, padded_tokens=case.workload.tokens)  # it takes padding out for its linear layers

    return {
        "onnxruntime": onnxruntime,
        "onnxruntime int8": onnxruntime_int8,
        "OpenVINO": openvino,
        "CTranslate2": ctranslate2,
    }


def torchao_model(folder: Path) -> Run:
    """transformers' model by torch.compile, whose linear layers TorchAO has quantized: int8 weights, and activations
    rounded to int8 row by row before each product.

    Raises:
        UnservedError: TorchAO or transformers is not installed, or there is no C++ compiler.
    """
    with runtimes.quietly():  # it tells of kernels for GPUs that it can't load
        quantization: Any = runtimes.installed("torchao.quantization")
        utilities: Any = runtimes.installed("torchao.utils")
    model = runtimes.transformers_model(folder, torch.float32, torch.device("cpu"))
    reduced = utilities.should_reduce_range(torch.device("cpu"))  # without VNNI sums of the whole range overflow
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig(reduce_range=reduced))
    run = compiled(model, dynamic=True)
    return lambda ids, mask: run(input_ids=ids, attention_mask=mask).last_hidden_state


def in_int8(contender: Contender) -> Contender:
    """A contender that computes in int8, and is held to no more than that."""
    return replace(contender, dtype="int8", least_cosine=INT8_COSINE)


def on_cpu_forward(case: Case, *dtypes: str) -> None:
    """Raise UnservedError unless the case is a forward pass on a CPU in one of these dtypes."""
    if case.backward:
        raise UnservedError("it has no gradients")
    if case.device.type != "cpu":
        raise UnservedError("it is compared on CPUs only")
    if case.dtype not in dtypes:
        raise UnservedError(f"it has no {case.dtype} on a CPU")
