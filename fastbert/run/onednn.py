"""Steps by oneDNN's fused linear layers on a CPU, for inference: weights are laid out for them once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from fastbert import backend
from fastbert.ops.fastest import fastest, onednn_serves
from fastbert.ops.layer_norm import layer_norm, norm_weights
from fastbert.ops.linear_activation import APPROXIMATE, activated
from fastbert.ops.products import by_onednn, onednn_rows, with_slack
from fastbert.packing import Packing
from fastbert.run.eager import attend
from fastbert.run.parts import is_plain, weights
from fastbert.run.steps import Attend, Convolve, Layers, Product


def unserved(layers: Layers, x: Tensor) -> str | None:
    """Why oneDNN does not serve these layers for inputs as `x`; None where it does."""
    if torch.is_grad_enabled() or not onednn_serves(x):  # first, for torch.compile, which can't read what follows
        return "a gradient, autocast, what looks on, or another device or dtype"
    if fastest(x.dtype, len(x), "laid out") != "onednn":
        return "products that another path makes faster"
    if backend.decide(x.device).path == "triton":
        return "the Triton path is forced"
    for steps, parts in layers:
        for step in steps.of:
            if isinstance(step, Convolve):
                return "a convolution"
            if isinstance(step, Product):
                if not is_plain(parts[step.part]) or (step.norm is not None and not is_plain(parts[step.norm])):
                    return f"{step.part} or {step.norm} on which something looks, or of another kind"
                if step.gated or (step.activation is not None and step.add is not None):
                    return "a gated product, or an activation before a sum"
                if cast("Tensor", next(parts[step.part].parameters())).dtype != x.dtype:
                    return f"{step.part} of another dtype than {x.dtype}"
    return None


class _Linear(NamedTuple):
    """A linear layer, its weight laid out for oneDNN."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, part: nn.Module) -> _Linear:
        """A plain part's."""
        weight, bias = weights(part)
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
        return cls(reordered, None if bias is None else bias.detach().contiguous())


class OneDnnProgram:
    """Layers whose weights lie as oneDNN takes them. It does not see them change."""

    name = "onednn"

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self.linears = [
            {step.part: _Linear.of(parts[step.part]) for step in steps.of if isinstance(step, Product)}
            for steps, parts in layers
        ]

    def run(self, registers: Mapping[str, Tensor], packing: Packing, read: Tensor | None = None) -> Tensor:
        """See `cpu.CpuProgram.run`."""
        rows = len(registers["x"])
        slack = onednn_rows(rows) - rows  # once for all products, which would each do it
        held = {name: with_slack(x, slack) if slack else x for name, x in registers.items()}
        for layer, (steps, parts) in enumerate(self.layers):
            for i, step in enumerate(steps.of):
                if isinstance(step, Attend):
                    held[step.into] = attend(step, parts, held[step.x], packing)
                else:
                    self._product(cast("Product", step), self.linears[layer][step.part], parts, held)
                if read is not None and layer + 1 == len(self.layers) and i == steps.last_look:
                    held |= {name: held[name].index_select(0, read) for name in steps.late}
        return held["x"] if read is not None or not slack else held["x"][:rows]

    def _product(self, step: Product, linear: _Linear, parts: Mapping[str, nn.Module], held: dict[str, Tensor]) -> None:
        residual = None if step.add is None else held[step.add]
        gelu = None if step.activation is None else APPROXIMATE.get(step.activation)
        total = by_onednn(held[step.x], *linear, gelu=gelu, residual=residual)
        total = total if gelu is not None else activated(total, step.activation)
        if step.sum is not None:
            held[step.sum] = total
        if step.norm is not None:
            norm = cast("nn.LayerNorm", parts[step.norm])
            total = layer_norm(total, *norm_weights(norm), eps=norm.eps)
        held[step.into] = total
