"""A layer as data: a few steps over registers, which executors read. What a layer computes is said here and only here.

A register is packed rows under a name, and a part is a module that holds weights under a name. The rows that a layer is
given are in "x", and so are those that it makes, so the steps of one layer follow those of the one before.

A LayerNorm belongs to the sum that it follows. So in a layer that normalises last (BERT's) the residual is "x", and in
one that normalises first it is the sum as it was before that; both are the same steps otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fastbert.config import Activation, EncoderConfig


@dataclass(frozen=True)
class Product:
    """`into = norm(sum)`, `sum = add + dropout(activation(x @ W^T + b))`; what is None is left out.

    Attributes:
        x, into: registers.
        part: what holds W, `[out, in]`, and b, if there is one.
        activation: of the outputs; where `gated`, of their first half, and it is multiplied by the second.
        add: the register of the residual. What is added to it is dropped out in training.
        norm: the part of a LayerNorm.
        sum: the register that keeps the sum as it was before the LayerNorm.
        drop: the outputs are dropped out in training though nothing is added.
    """

    x: str
    part: str
    into: str
    activation: Activation | None = None
    gated: bool = False
    add: str | None = None
    norm: str | None = None
    sum: str | None = None
    drop: bool = False


@dataclass(frozen=True)
class Attend:
    """`into` = attention of the queries, keys and values in `x`; its weights are dropped out in training.

    Attributes:
        x, into: registers, `[rows, 3 * heads * head_dim]` and `[rows, heads * head_dim]`.
        heads: how many.
        window: only keys at most this many places away are seen.
        alibi: of each head the slope that times `|row - column|` is taken off its scores.
        rotary: the base of rotary positions, which queries and keys are turned by first.
        relative: the part whose weight `[buckets, heads]` is added to the scores, by how far apart two tokens are; see
            `ops.relative`.
    """

    x: str
    into: str
    heads: int
    window: int | None = None
    alibi: tuple[float, ...] | None = None
    rotary: float | None = None
    relative: str | None = None

    @property
    def plain(self) -> bool:
        """Whether every key is seen, by its content alone."""
        return self.window is None and self.alibi is None and self.rotary is None and self.relative is None

    def split(self, qkv: Tensor) -> Tensor:
        """`[rows, 3 * heads * head_dim]` as `[rows, 3, heads, head_dim]`."""
        return qkv.view(len(qkv), 3, self.heads, qkv.shape[1] // (3 * self.heads))

    def slopes(self, device: torch.device) -> Tensor | None:
        """`alibi` as attention takes it, float32 `[heads]`."""
        return None if self.alibi is None else torch.tensor(self.alibi, dtype=torch.float32, device=device)


Step: TypeAlias = Product | Attend


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a layer. Layers alike share one object, which is compared as such, in no time.

    Attributes:
        carried: the registers that a layer reads of the one before.
        last_attend: the number of the step after which no row looks at another.
        late: the registers that are read after it.
        state: the register whose rows are the layer's hidden states.
        drops: how many of them have a dropout in training.
    """

    of: tuple[Step, ...]
    carried: tuple[str, ...] = field(init=False)
    last_attend: int = field(init=False)
    late: tuple[str, ...] = field(init=False)
    state: str = field(init=False)
    drops: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "carried", live(self.of, -1))
        attends = [i for i, step in enumerate(self.of) if isinstance(step, Attend)]
        object.__setattr__(self, "last_attend", attends[-1])
        object.__setattr__(self, "late", live(self.of, attends[-1]))
        kept = self.of[-1].sum if isinstance(self.of[-1], Product) else None
        object.__setattr__(self, "state", kept or "x")
        object.__setattr__(self, "drops", sum(map(drops, self.of)))

    def __reduce__(self) -> tuple[Callable[..., Steps], tuple[tuple[Step, ...]]]:
        """Copies of a layer, and those in another process, share one object too."""
        return shared, (self.of,)


@cache
def shared(of: tuple[Step, ...]) -> Steps:
    """The one object of these steps."""
    return Steps(of)


# The modules of a layer that hold weights, by their names in its steps.
Parts: TypeAlias = Mapping[str, nn.Module]
# The layers of an encoder: the steps of each, and its parts.
Layers: TypeAlias = Sequence[tuple[Steps, Parts]]


@cache
def layer_steps(config: EncoderConfig, i: int = 0, *, last_norm: bool = True, drop_wide: bool = False) -> Steps:
    """Layer `i`: attention, then the feed-forward, each with a residual sum and a LayerNorm after it.

    With `config.norm_first` the residual is the sum as it was before the LayerNorm, which is that before the next half
    of a layer.

    Args:
        last_norm: whether a LayerNorm follows the layer; after the last one that normalises first there may be none.
        drop_wide: whether the feed-forward has a dropout after its activation.
    """
    window = None if config.windows is None else config.windows[i]
    in_window = window is not None and config.rotary_in_windows is not None
    attend = Attend(
        "qkv",
        into="context",
        heads=config.num_heads,
        window=window,
        alibi=alibi_slopes(config.num_heads) if config.alibi else None,
        rotary=config.rotary_in_windows if in_window else config.rotary,
        relative=None if config.relative_buckets is None else "relative",
    )
    kept = "sum" if config.norm_first else None
    residual = kept or "x"
    norm, total = ("output_norm", kept) if last_norm else (None, None)
    return shared(
        (
            Product("x", "qkv", into="qkv"),
            attend,
            Product("context", "attention_output", into="x", add=residual, norm="attention_norm", sum=kept),
            Product("x", "intermediate", into="wide", activation=config.activation, gated=config.gated, drop=drop_wide),
            Product("wide", "output", into="x", add=residual, norm=norm, sum=total),
        )
    )


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Of each head, as Press et al. 2021 have them: 2^(-8/n), 2^(-16/n) and so on for n = a power of two of heads.

    Other numbers take those of the next lower power, and then every second one of the next higher.
    """
    lower = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / lower) for i in range(lower)]
    return (*slopes, *(2.0 ** (-4.0 * (i + 1) / lower) for i in range(0, 2 * (heads - lower), 2)))


def readers(steps: tuple[Step, ...], i: int) -> tuple[Step, ...]:
    """The steps that read what step `i` leaves in `into`; the next layer's, of the same steps, are among them."""
    found = []
    for step in (*steps[i + 1 :], *steps[: i + 1]):
        if steps[i].into in reads(step):
            found.append(step)
        if steps[i].into in writes(step):
            break
    return tuple(found)


def live(steps: tuple[Step, ...], i: int) -> tuple[str, ...]:
    """The registers that steps of this layer read after step `i` and before one writes them."""
    found, written = [], set[str]()
    for step in steps[i + 1 :]:
        found += [name for name in reads(step) if name not in written and name not in found]
        written |= set(writes(step))
    return tuple(found)


def reads(step: Step) -> tuple[str, ...]:
    """The registers that a step reads."""
    add = step.add if isinstance(step, Product) else None
    return (step.x,) if add is None else (step.x, add)


def writes(step: Step) -> tuple[str, ...]:
    """The registers that a step writes."""
    kept = step.sum if isinstance(step, Product) else None
    return (step.into,) if kept is None else (step.into, kept)


def drops(step: Step) -> bool:
    """Whether a step has a dropout in training."""
    return isinstance(step, Attend) or step.add is not None or step.drop
