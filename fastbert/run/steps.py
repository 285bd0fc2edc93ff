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
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastbert.config import Activation, Disentangled, EncoderConfig, Term

# Of each of `Attend.disentangled`'s terms the part that makes keys or queries of the table of positions.
PROJECTIONS: Mapping[Term, str] = {"c2p": "position_key", "p2c": "position_query"}
# What a layer calls the one of its own that does it where `Disentangled.shared`.
OWN: Mapping[Term, str] = {"c2p": "key", "p2c": "query"}


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
        drop: the outputs are dropped out in training though nothing is added, after the activation and the gate.
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
        rotary_scale: what their angles are multiplied by.
        relative: the part whose weight `[buckets, heads]` is added to the scores, by how far apart two tokens are; see
            `ops.relative`.
        disentangled: terms of the scores by relative positions, see `ops.disentangled`. The table is the weight of the
            part "relative", which "relative_norm" normalises, and the parts of `PROJECTIONS` go over its rows.
    """

    x: str
    into: str
    heads: int
    window: int | None = None
    alibi: tuple[float, ...] | None = None
    rotary: float | None = None
    rotary_scale: float = 1.0
    relative: str | None = None
    disentangled: Disentangled | None = None

    @property
    def plain(self) -> bool:
        """Whether every key is seen, by its content alone."""
        by_place = self.window, self.alibi, self.rotary, self.relative, self.disentangled
        return all(one is None for one in by_place)

    def split(self, qkv: Tensor) -> Tensor:
        """`[rows, 3 * heads * head_dim]` as `[rows, 3, heads, head_dim]`."""
        return qkv.view(len(qkv), 3, self.heads, qkv.shape[1] // (3 * self.heads))

    def scale(self, head_dim: int) -> float:
        """The factor on the scores."""
        terms = () if self.disentangled is None else self.disentangled.terms
        return float((head_dim * (1 + len(terms))) ** -0.5)

    def slopes(self, device: torch.device) -> Tensor | None:
        """`alibi` as attention takes it, float32 `[heads]`."""
        return None if self.alibi is None else torch.tensor(self.alibi, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Convolve:
    """`into = norm(add + activation(dropout(convolution(x))))`, over the columns of a sequence.

    Where a sequence has no token, past its ends and in columns that a mask hides from all others, its rows are 0.

    Attributes:
        x, into, add: registers.
        part: an nn.Conv1d, or what is in its place.
        activation: of what it makes.
        norm: the part of a LayerNorm.
    """

    x: str
    part: str
    into: str
    activation: Activation | Literal["tanh"]
    add: str
    norm: str


Step: TypeAlias = Product | Attend | Convolve


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of a layer. Layers alike share one object, which is compared as such, in no time.

    Attributes:
        carried: the registers that a layer reads of the one before.
        last_look: the number of the step after which no row looks at another.
        late: the registers that are read after it; after the last step "x".
        state: the register whose rows are the layer's hidden states.
        drops: how many dropouts they have in training.
    """

    of: tuple[Step, ...]
    carried: tuple[str, ...] = field(init=False)
    last_look: int = field(init=False)
    late: tuple[str, ...] = field(init=False)
    state: str = field(init=False)
    drops: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "carried", live(self.of, -1))
        look = [i for i, step in enumerate(self.of) if not isinstance(step, Product)]
        object.__setattr__(self, "last_look", look[-1])
        object.__setattr__(self, "late", live(self.of, look[-1]) or ("x",))
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
def layer_steps(config: EncoderConfig, i: int = 0, *, last_norm: bool = True) -> Steps:
    """Layer `i`: attention, then the feed-forward, each with a residual sum and a LayerNorm after it.

    With `config.norm_first` the residual is the sum as it was before the LayerNorm, which is that before the next half
    of a layer.

    With `config.convolution` the first layer ends with it, and keeps its input for that.

    Args:
        last_norm: whether a LayerNorm follows the layer; after the last one that normalises first there may be none.
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
        rotary_scale=config.rotary_scale,
        relative=None if config.relative_buckets is None else "relative",
        disentangled=config.disentangled,
    )
    kept = "sum" if config.norm_first else None
    residual = kept or "x"
    norm, total = ("output_norm", kept) if last_norm else (None, None)
    drop = "intermediate" in config.dropped
    convolution = config.convolution if i == 0 else None
    half, made = ("x", "x") if convolution is None else ("half", "made")
    steps: tuple[Step, ...] = (
        Product("x", "qkv", into="qkv"),
        attend,
        Product("context", "attention_output", into=half, add=residual, norm="attention_norm", sum=kept),
        Product(half, "intermediate", into="wide", activation=config.activation, gated=config.gated, drop=drop),
        Product("wide", "output", into=made, add=kept or half, norm=norm, sum=total),
    )
    if convolution is not None:
        activation, norm = convolution.activation, "convolution_norm"
        steps += (Convolve("x", "convolution", into="x", activation=activation, add=made, norm=norm),)
    return shared(steps)


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
    add = None if isinstance(step, Attend) else step.add
    return (step.x,) if add is None else (step.x, add)


def writes(step: Step) -> tuple[str, ...]:
    """The registers that a step writes."""
    kept = step.sum if isinstance(step, Product) else None
    return (step.into,) if kept is None else (step.into, kept)


def drops(step: Step) -> int:
    """How many dropouts a step has in training: attention that of its weights, then that of its relative positions."""
    if isinstance(step, Attend):
        return 1 if step.disentangled is None else 2
    return 1 if isinstance(step, Convolve) or step.add is not None or step.drop else 0
