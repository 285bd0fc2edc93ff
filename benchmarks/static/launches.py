"""Launches of one encoder layer and of one batch of `encode`, run on Triton's interpreter, which here only counts them.

Run by interpreted.py. A layer is the difference between a stack of two and one of one, a batch that between a call with
two and one with one. Launch choices are those of an H100.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

import fastbert
from fastbert.kernels import (
    attention,
    attention_backward,
    bias_gelu,
    choices,
    embedding,
    layer_norm,
    linear_gelu,
    linear_gelu_choices,
    pooling,
    target,
)
from fastbert.packing import Packing
from fastbert.run import parts
from fastbert.tasks import results
from fastbert.text.tokens import Tokens

# "short" fits the one-pass backward of attention, which needs at most 128 keys; "long" does not.
BATCHES = {"short": (5, 70, 33), "long": (7, 150, 40)}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear"}
# For which the host waits for a GPU.
WAITS = {"item", "is_nonzero", "_local_scalar_dense", "nonzero", "masked_select", "equal"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def is_computed(func: Any, out: Any) -> bool:
    """Whether a call of torch would launch a kernel on a GPU: all but views, allocations and empty results."""
    is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
    is_empty = isinstance(out, torch.Tensor) and out.numel() == 0
    return func.namespace == "aten" and not (is_view or is_empty or func.overloadpacket.__name__ in ALLOCATIONS)


class TorchCalls(TorchDispatchMode):
    """Counts the calls of torch that would launch a kernel on a GPU."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_computed(func, out):
            self.counts[func.overloadpacket.__name__] += 1
        return out


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count launches by name: our kernels, and torch's calls, those that our launchers make among them."""
    counts = Counter[str]()
    torch_calls = TorchCalls(counts)

    def seen(launcher: Callable[..., Any]) -> Callable[..., Any]:
        """A dispatch mode is off inside a custom op."""

        def run(*args: Any, **options: Any) -> Any:
            with torch_calls:
                return launcher(*args, **options)

        return run

    def count(executor: GridExecutor, *_: Any, **__: Any) -> None:
        counts[executor.fn.__name__] += 1

    with ExitStack() as patches:
        patches.enter_context(patch.object(GridExecutor, "__call__", count))
        for module in (attention, attention_backward, bias_gelu, embedding, layer_norm, linear_gelu, pooling):
            for name, launcher in vars(module).copy().items():
                if name.endswith(("_forward", "_backward")):
                    patches.enter_context(patch.object(module, name, seen(launcher)))
        # Else the product would copy the parameters of queries, keys and values together, as under any dispatch mode.
        patches.enter_context(patch.object(parts, "observed", lambda: False))
        with torch_calls:
            yield counts


def stack(layers: int, dropout: float, lengths: tuple[int, ...]) -> dict[str, Counter[str]]:
    """What a stack of `layers` launches in "inference", and in the "forward" and "backward" of training."""
    config = fastbert.EncoderConfig(
        num_layers=layers, hidden_size=128, num_heads=2, intermediate_size=256, hidden_dropout=dropout,
        attention_dropout=dropout,
    )  # fmt: skip
    encoder = fastbert.Encoder(config).half()
    packing = Packing.from_lengths(torch.tensor(lengths))
    x = torch.ones(packing.tokens, 128, dtype=torch.float16, requires_grad=True)
    with target.pretend(target.KNOWN["sm_90"]), fastbert.use_backend("triton"):
        with torch.no_grad(), counted() as inference:
            encoder.eval().run(x, packing)
        with counted() as forward:
            out = encoder.train().run(x, packing)[-1]
        with counted() as backward:
            out.backward(torch.ones_like(out))
    return {"inference": inference, "forward": forward, "backward": backward}


def layer(dropout: float, lengths: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Launches of one layer in each pass: ours, matrix products, the rest of torch's, and the names of all."""
    one, two = stack(1, dropout, lengths), stack(2, dropout, lengths)
    return {name: sorted_out(total - one[name]) for name, total in two.items()}


def call_of_encode(batches: int) -> Counter[str]:
    """What a call of `TextEncoder.encode` launches that makes so many batches of a model of one layer."""
    config = fastbert.EncoderConfig(num_layers=1, hidden_size=128, num_heads=2, intermediate_size=256)
    length = 70
    tokens = Tokens(np.zeros(batches * length, np.int32), None, np.arange(batches + 1, dtype=np.int64) * length)
    tokenizer: Any = SimpleNamespace(encode=lambda *_: tokens, max_length=None)
    encoder = fastbert.TextEncoder(fastbert.BertModel(config).half().eval(), tokenizer)
    copies, sent = Counter[str](), Packing.sent

    def seen(packing: Packing, device: torch.device, **tensors: torch.Tensor | None) -> Any:
        copies["copy to the GPU"] += 1
        return sent(packing, device, **tensors)

    with ExitStack() as patches:
        patches.enter_context(target.pretend(target.KNOWN["sm_90"]))
        patches.enter_context(fastbert.use_backend("triton"))
        patches.enter_context(patch.object(Packing, "sent", seen))
        # Nothing is computed, so what comes out may be NaN.
        patches.enter_context(patch.object(results, "_of_texts", lambda order, found, model: found))
        with counted() as counts:
            encoder.encode(["a text"], batch_tokens=length)
    return counts + copies


def batch_of_encode() -> dict[str, Any]:
    """A batch: copies to the GPU, waits for it, and launches as `layer` has them, of which one layer's are a part."""
    names = call_of_encode(2) - call_of_encode(1)
    copies, waits = names.pop("copy to the GPU", 0), sum(names.pop(wait, 0) for wait in WAITS)
    return {"copies": copies, "waits": waits, **sorted_out(names)}


def sorted_out(names: Counter[str]) -> dict[str, Any]:
    """Launches by what they are: ours, matrix products, the rest of torch's, and the names of all."""
    kernels = sum(number for called, number in names.items() if called.endswith("_kernel"))
    products = sum(names[product] for product in PRODUCTS)
    others = names.total() - kernels - products
    return {"kernels": kernels, "matrix_products": products, "others": others, "names": dict(names)}


def passes() -> dict[str, dict[str, Any]]:
    """Figures of each pass over each batch, without dropout and with it."""
    found = {"encode batch of one layer": batch_of_encode()}
    for dropout in (0.0, 0.1):
        for batch, lengths in BATCHES.items():
            for name, figures in layer(dropout, lengths).items():
                found[f"encoder layer {name} {batch}{' +dropout' if dropout else ''}"] = figures
    with patch.object(linear_gelu_choices, "linear_gelu", lambda *_, **__: choices.LinearGeluForm("epilogue")):
        for name, figures in layer(0.0, BATCHES["short"]).items():
            found[f"encoder layer {name} short +epilogue"] = figures
    return found
