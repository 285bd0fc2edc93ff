"""CUDA graphs of a model's forward pass: for each size of batch its launches are recorded once, then replayed whole.

A graph is made for a bucket, sizes rounded up: tokens, longest sequence, sequences. A batch is copied into its bucket's
input tensors. Rows past its tokens are slack, and sequences past its own have length zero, so changing lengths need no
other graph. Between the launches of a replay the host does nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastbert import backend
from fastbert.errors import ArgumentError, BackendError
from fastbert.model.body import EncoderModel, Inputs
from fastbert.packing import Packing

Model = TypeVar("Model", bound=nn.Module)
Bucket = tuple[int, int, int]


class Graph(Protocol):
    """What is used of `torch.cuda.CUDAGraph`."""

    def replay(self) -> None:
        """Run what was captured."""

    def pool(self) -> Any:
        """The handle of the memory that its tensors lie in."""


def graphed(model: Model, *, most: int = 32) -> Model:
    """Make a model's inference replay CUDA graphs; it is then called as before.

    Embeddings and encoder are captured, on the first call of each bucket; reading the mask, pooler and heads are not.
    The model must be in eval mode, called under `torch.no_grad()` or `torch.inference_mode()`, without autocast, and on
    one stream, because graphs share their memory. Results are copies: a later call does not change them.

    Args:
        model: an EncoderModel, or a model with a head; changed in place. Weights may be changed in place; after they
            were moved or cast, graphs are captured again. Weights replaced one by one are not noticed.
        most: how many graphs are kept, at least 1; the least recently used is dropped.

    Returns:
        `model`.

    Raises:
        ArgumentError: there is no EncoderModel in `model`, or `most` is below 1. In a later call: training mode,
            gradient, autocast, hidden states asked for, or a mask that is more than padding.
        BackendError: in a later call, where it would not run the Triton kernels.
    """
    if most < 1:
        raise ArgumentError("most", most, "at least 1 graph")
    modules = model.modules() if isinstance(model, nn.Module) else ()
    trunks = [module for module in modules if isinstance(module, EncoderModel)]
    if not trunks:
        raise ArgumentError("model", f"a {type(model).__name__}", "an EncoderModel, or a model of fastbert with a head")
    for trunk in trunks:
        trunk.graphs = Graphs(most)
    return model


def bucket(tokens: int, max_seqlen: int, batch: int) -> Bucket:
    """The sizes a batch is given: tokens to multiples of 64, past 512 to quarters of a power of two.

    The others only bound the table of tiles and choose the kernel's tiles: the next power of two, 64 and 1 at least.
    """
    step = max(64, 1 << max(tokens - 1, 1).bit_length() >> 3)
    return -(-max(tokens, 1) // step) * step, _power(max(max_seqlen, 64)), _power(max(batch, 1))


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def capture(run: Callable[[], Tensor], stream: torch.cuda.Stream, pool: Any) -> tuple[Graph, Tensor]:
    """The CUDA graph of a call, after one on `stream` that compiles what it needs, and where replays leave it."""
    with torch.cuda.device(stream.device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            out = run()
    return graph, out


@dataclass(frozen=True, eq=False)
class _Captured:
    """A graph, its inputs (int64 `[tokens]` each, int32 `[batch + 1]`) and its output `[tokens, hidden]`."""

    graph: Graph
    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor
    out: Tensor


class Graphs:
    """The graphs of one EncoderModel, by bucket.

    All are captured on one stream: graphs that share their memory must be, and each stream has a workspace of cuBLAS,
    32 MiB on sm_90 (pytorch/docs/source/notes/cuda.rst).
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._captured: OrderedDict[Bucket, _Captured] = OrderedDict()
        self._weights: int | None = None
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __reduce__(self) -> tuple[type[Graphs], tuple[int]]:
        """To another process, or to a copy, goes no graph: they are captured anew there."""
        return Graphs, (self.most,)

    def run(self, model: EncoderModel, inputs: Inputs) -> Tensor:
        """The last hidden states of packed inputs, `[rows, hidden]`; those of slack rows are 0.

        Raises:
            ArgumentError, BackendError: see `graphed`.
        """
        _check(model, inputs)
        assert inputs.input_ids is not None
        rows, packing = len(inputs.input_ids), inputs.packing
        weights = model.embeddings.word.weight.data_ptr()
        if weights != self._weights:  # graphs know the weights by their addresses
            self._captured.clear()
            self._weights = weights
            if self._stream is not None and self._stream.device != inputs.input_ids.device:
                self._pool = self._stream = None
        key = bucket(rows, packing.max_seqlen, packing.batch)
        # Buffers made in inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            found = self._captured.pop(key, None) or self._capture(model, key, inputs.input_ids.device)
            self._captured[key] = found
            found.input_ids[:rows].copy_(inputs.input_ids)
            found.position_ids[:rows].copy_(inputs.position_ids)
            if inputs.token_type_ids is None:
                found.token_type_ids.zero_()
            else:
                found.token_type_ids[:rows].copy_(inputs.token_type_ids)
            found.cu_seqlens[: packing.batch + 1].copy_(packing.cu_seqlens)
            found.cu_seqlens[packing.batch + 1 :].copy_(packing.cu_seqlens[-1])
            found.graph.replay()
            out = found.out[:rows].clone()
            out[packing.tokens :] = 0
            return out

    def _capture(self, model: EncoderModel, key: Bucket, device: torch.device) -> _Captured:
        tokens, max_seqlen, batch = key
        while len(self._captured) >= self.most:
            self._captured.popitem(last=False)
        input_ids, position_ids, token_type_ids = (
            torch.zeros(tokens, dtype=torch.int64, device=device) for _ in range(3)
        )
        cu_seqlens = torch.zeros(batch + 1, dtype=torch.int32, device=device)
        indices = torch.arange(tokens, device=device)

        def run() -> Tensor:
            # A fresh packing each time: its table of tiles must be made inside the graph, from the lengths of a replay.
            packing = Packing.made_right(cu_seqlens, max_seqlen, indices, (batch, max_seqlen))
            types = None if model.embeddings.token_type is None else token_type_ids
            x = model.embeddings(input_ids, position_ids, types)
            return model.encoder.run(x, packing, every=False)[-1]

        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        graph, out = capture(run, self._stream, self._pool)
        self._pool = graph.pool()
        return _Captured(graph, input_ids, position_ids, token_type_ids, cu_seqlens, out)


def _check(model: EncoderModel, inputs: Inputs) -> None:
    device = inputs.position_ids.device
    if inputs.inputs_embeds is not None:
        raise ArgumentError("inputs_embeds", "embeddings for a graphed model", "input_ids")
    if model.training:
        raise ArgumentError("model", "in training mode", "model.eval()", "Graphs serve inference.")
    if torch.is_grad_enabled():
        raise ArgumentError("torch.is_grad_enabled()", True, "a call under torch.no_grad()", "Graphs keep no gradient.")
    if torch.is_autocast_enabled(device.type):
        raise ArgumentError("autocast", "on", "off", "Cast the model instead: model.half().")
    if inputs.bias is not None:
        raise ArgumentError("attention_mask", "more than padding", "a mask of padding for a graphed model")
    decision = backend.decide(device)
    if decision.path != "triton":
        raise BackendError("graphed", decision.reason, "a model on a GPU")
