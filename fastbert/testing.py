"""The error rule, the exact meaning of steps, and random packed batches: for our tests, our benchmarks, and yours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from fastbert import reference
from fastbert.config import Disentangled
from fastbert.ops.disentangled import rows_of_pairs
from fastbert.ops.layer_norm import norm_weights
from fastbert.ops.linear_activation import activated
from fastbert.ops.relative import relative_table
from fastbert.packing import Packing
from fastbert.run.parts import weights
from fastbert.run.steps import PROJECTIONS, Attend, Convolve, Steps


def assert_close(
    actual: Tensor, plain: Tensor, exact: Tensor, *, factor: float = 2.0, ulps: float = 4.0, what: str = "result"
) -> None:
    """Assert that `actual` is about as near to the truth as plain PyTorch is.

    Args:
        actual: what is tested, any dtype.
        plain: the same computed by plain torch ops in the dtype of `actual`.
        exact: the same computed in float64 from the same (already rounded) inputs.
        factor: how many times plain torch's own error is allowed; 2 for an op, 3 for a whole model.
        ulps: units in the last place of the largest exact value that are allowed on top.

    The rule holds for the largest error and for the root mean square error. NaN never equals anything; an infinity
    equals itself only.

    Raises:
        AssertionError: the rule is broken; it says by how much and where.
    """
    assert actual.shape == exact.shape == plain.shape, f"{what}: shapes {actual.shape}, {plain.shape}, {exact.shape}"
    assert exact.dtype == torch.float64, f"{what}: the exact result is {exact.dtype}, not float64"
    assert actual.dtype == plain.dtype, f"{what}: dtypes {actual.dtype} and {plain.dtype}"
    if exact.numel() == 0:
        return
    infinite = exact.isinf()
    assert torch.equal(actual.double()[infinite], exact[infinite]), f"{what}: infinities differ"
    ours = _errors(actual, exact, infinite)
    theirs = _errors(plain, exact, infinite)
    assert ours.isfinite().all(), f"{what}: {int((~ours.isfinite()).sum())} values are not finite"
    largest = exact.masked_fill(infinite, 0).abs().max().item()
    slack = ulps * torch.finfo(actual.dtype).eps * largest + torch.finfo(actual.dtype).tiny
    for name, measure in (("largest", torch.Tensor.max), ("RMS", lambda e: e.square().mean().sqrt())):
        got, allowed = (
            measure(ours).item(),
            factor * measure(theirs).item() + (slack if name == "largest" else slack / 4),
        )
        at = tuple(int(i) for i in torch.unravel_index(ours.argmax(), ours.shape))
        assert got <= allowed, (
            f"{what}: {name} error {got:.3e} > {allowed:.3e} allowed (plain torch {measure(theirs).item():.3e}, "
            f"largest value {largest:.3e}), worst at {at}: {actual[at].item()!r}, exactly {exact[at].item()!r}"
        )


def _errors(x: Tensor, exact: Tensor, infinite: Tensor) -> Tensor:
    return (x.double() - exact).abs().masked_fill(infinite, 0)


def exactly(
    steps: Steps,
    parts: Mapping[str, nn.Module],
    registers: Mapping[str, Tensor],
    packing: Packing,
    bias: Tensor | None = None,
) -> dict[str, Tensor]:
    """What the registers hold after the steps of a layer, in the dtype of the registers: the judge, given float64.

    Args:
        parts: nn.Linear and nn.LayerNorm, or a SelfAttention, which are read in that dtype.
        bias: added to the attention scores.
    """
    held = dict(registers)
    dtype = held["x"].dtype
    for step in steps.of:
        if isinstance(step, Attend):
            qkv = step.split(held[step.x])
            if step.rotary is not None:
                angles = reference.rotary_angles(packing, qkv.shape[3], step.rotary, dtype, step.rotary_scale)
                qkv = reference.rotary(qkv, angles)
            slopes, relative, scale, terms = step.slopes(qkv.device), None, None, bias
            if step.disentangled is not None:
                scale = step.scale(qkv.shape[3])
                of_positions = _of_positions(step.disentangled, parts, qkv, packing, scale)
                terms = of_positions if bias is None else bias + of_positions
            if step.relative is not None:
                relative = relative_table(cast("nn.Embedding", parts[step.relative]).weight.to(dtype), packing)
            made, _ = reference.attention(
                qkv, packing, scale=scale, bias=terms, alibi_slopes=slopes, relative=relative, window=step.window
            )
            made = made.flatten(1)
        elif isinstance(step, Convolve):
            made = _convolved(cast("nn.Conv1d", parts[step.part]), held[step.x], packing)
            made = held[step.add] + (made.tanh() if step.activation == "tanh" else activated(made, step.activation))
            norm = cast("nn.LayerNorm", parts[step.norm])
            made = reference.layer_norm(made, *(x.to(dtype) for x in norm_weights(norm)), eps=norm.eps)
        else:
            weight, x_bias = (None if x is None else x.to(dtype) for x in weights(parts[step.part]))
            assert weight is not None
            made = held[step.x] @ weight.t()
            made = made if x_bias is None else made + x_bias
            made = activated(made, step.activation, gated=step.gated)
            made = made if step.add is None else held[step.add] + made
            if step.sum is not None:
                held[step.sum] = made
            if step.norm is not None:
                norm = cast("nn.LayerNorm", parts[step.norm])
                made = reference.layer_norm(made, *(x.to(dtype) for x in norm_weights(norm)), eps=norm.eps)
        held[step.into] = made
    return held


def _convolved(part: nn.Conv1d, x: Tensor, packing: Packing) -> Tensor:
    """A convolution over sequences without holes, as the sum of a product for each place of its kernel."""
    outputs, _, width = part.weight.shape
    made = x.new_zeros(len(x), outputs) if part.bias is None else part.bias.to(x.dtype).expand(len(x), outputs)
    sides = x.new_zeros(width // 2, x.shape[1])
    sequences = [torch.cat([sides, one, sides]) for one in x.split(packing.lengths.tolist())]
    for place in range(width):
        weight = torch.block_diag(*part.weight[:, :, place].to(x.dtype).split(outputs // part.groups))
        seen = torch.cat([one[place : place + len(one) - 2 * len(sides)] for one in sequences])
        made = made + seen @ weight.t()
    return made


def _of_positions(
    asked: Disentangled, parts: Mapping[str, nn.Module], qkv: Tensor, packing: Packing, scale: float
) -> Tensor:
    """The terms of relative positions, in the dtype of `qkv`."""
    rows = cast("nn.Embedding", parts["relative"]).weight.to(qkv.dtype)
    if asked.normalised:
        norm = cast("nn.LayerNorm", parts["relative_norm"])
        rows = reference.layer_norm(rows, *(x.to(qkv.dtype) for x in norm_weights(norm)), eps=norm.eps)
    made = {}
    for term in asked.terms:
        weight, bias = (None if x is None else x.to(qkv.dtype) for x in weights(parts[PROJECTIONS[term]]))
        assert weight is not None
        columns = rows @ weight.t() if bias is None else rows @ weight.t() + bias
        made[term] = columns.unflatten(1, qkv.shape[2:])
    index = rows_of_pairs(packing.max_seqlen, asked, qkv.device)
    return reference.disentangled_bias(qkv, packing, made.get("c2p"), made.get("p2c"), index, scale)


def random_lengths(batch: int, longest: int, generator: torch.Generator) -> list[int]:
    """`batch` lengths between 1 and `longest`, one of them `longest`, in random order."""
    lengths = torch.randint(1, longest + 1, (batch,), generator=generator, device=generator.device)
    if batch:
        lengths[torch.randint(batch, (1,), generator=generator, device=generator.device)] = longest
    return [int(length) for length in lengths]


def random_packing(batch: int, longest: int, generator: torch.Generator) -> Packing:
    """A ragged packing on the CPU; see `random_lengths`."""
    return Packing.from_lengths(random_lengths(batch, longest, generator))
