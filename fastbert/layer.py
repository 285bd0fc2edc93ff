"""One encoder layer over packed tokens. Its modules have Hugging Face's names, so that what is said by name holds.

State dicts, PEFT, freezing, optimizer groups and hooks name modules and parameters as in a transformers `BertLayer`.
Products and norms are computed by ops of ours, several modules at once, as long as these modules are plain: see
`is_plain`. Any other module is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import backend
from fastbert.config import Activation, EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.kernels import launch
from fastbert.masks import read_mask
from fastbert.ops import repeats
from fastbert.ops.attention import attention, prepare_attention
from fastbert.ops.common import check_linear
from fastbert.ops.dropout import drop
from fastbert.ops.layer_norm import linear_layer_norm, prepare_linear_layer_norm
from fastbert.ops.linear import linear
from fastbert.ops.linear_gelu import linear_gelu, prepare_linear_gelu
from fastbert.packing import Packing
from fastbert.projections import Group, SelfAttention, is_hooked, is_plain


class Output(Group):
    """The modules of a product that ends in a residual sum and a LayerNorm."""

    def __init__(self, inputs: int, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.dropout = nn.Dropout(config.hidden_dropout)


class Attention(Group):
    """The modules of attention."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config.hidden_size, config)


class Intermediate(Group):
    """The module of the first product of the feed-forward."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)


class Parts(NamedTuple):
    """The modules of a layer that have parameters."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    attention_output: nn.Module
    attention_norm: nn.Module
    intermediate: nn.Module
    output: nn.Module
    output_norm: nn.Module


class EncoderLayer(nn.Module):
    """One layer: attention, then the feed-forward, each followed by residual + LayerNorm.

    Attributes:
        gradient_checkpointing: whether the forward pass is computed again in the backward pass, by
            `_gradient_checkpointing_func`; transformers' `gradient_checkpointing_enable()` sets both.
    """

    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Any] | None = None

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config.intermediate_size, config)

    def parts(self) -> Parts:
        """Its modules, without nn.Module's slow way to an attribute."""
        modules: dict[str, Any] = self._modules
        attention = modules["attention"]._modules
        heads, projected, output = attention["self"]._modules, attention["output"]._modules, modules["output"]._modules
        return Parts(
            heads["query"], heads["key"], heads["value"], projected["dense"], projected["LayerNorm"],
            modules["intermediate"]._modules["dense"], output["dense"], output["LayerNorm"],
        )  # fmt: skip

    def dropouts(self) -> tuple[float, float, float]:
        """Probabilities of attention's weights, of its output and of the feed-forward's, 0 where they are off.

        Raises:
            ArgumentError: a dropout module was replaced by another kind.
        """
        modules: dict[str, Any] = self._modules
        attention = modules["attention"]._modules
        of_weights, of_context, of_output = (
            _probability(one._modules["dropout"]) for one in (attention["self"], attention["output"], modules["output"])
        )
        return of_weights, of_context, of_output

    def forward(
        self,
        x: Tensor,
        attention_mask: Packing | Tensor | None,
        bias: Tensor | None = None,
        seeds: Tensor | None = None,
        read: Tensor | None = None,
        unpack: bool = False,
    ) -> Tensor:
        """`[rows, hidden]` -> `[rows, hidden]`; or `[batch, seqlen, hidden]`, as a transformers `BertLayer`'s.

        Args:
            attention_mask: the packing of packed rows; of padded ones it, or any form in `masks.read_mask`.
            bias: added to the attention scores; see `ops.attention`.
            seeds: int64 `[3]`, one seed for each dropout; None when dropout is off.
            read: int64 `[reads]`, the rows of the output that are wanted; all by default. All rows are attended to, but
                only these go through what comes after attention. The hidden dropouts then draw for these rows alone.
            unpack: give the output in the padded layout; not together with `read`.

        Returns:
            `[rows, hidden]`, or `[reads, hidden]`: the rows that the whole output would have there; unpacked
            `[batch, seqlen, hidden]`.
        """
        packing = attention_mask
        if x.dim() == 3:
            if not isinstance(packing, Packing):
                packing, bias = read_mask(packing, x.shape[0], x.shape[1], x.device)
            x, unpack = packing.pack(x), True
        if not isinstance(packing, Packing):
            raise ArgumentError("attention_mask", type(packing).__name__, "the Packing of these packed rows")
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return cast(Tensor, self._checkpoint()(self._run, x, packing, bias, seeds, read, unpack))
        return self._run(x, packing, bias, seeds, read, unpack)

    def _checkpoint(self) -> Callable[..., Any]:
        if self._gradient_checkpointing_func is not None:
            return self._gradient_checkpointing_func
        from functools import partial

        from torch.utils.checkpoint import checkpoint

        return partial(checkpoint, use_reentrant=False)

    def _run(
        self,
        x: Tensor,
        packing: Packing,
        bias: Tensor | None,
        seeds: Tensor | None,
        read: Tensor | None,
        unpack: bool,
    ) -> Tensor:
        config, parts = self.config, self.parts()
        if bias is None and seeds is None and read is None and not unpack and all(map(is_plain, parts)):
            prepared = self._run_prepared(x, packing, parts)
            if prepared is not None:
                return prepared
        drop_weight, *drop_hidden = (0.0, 0.0, 0.0) if seeds is None else self.dropouts()
        seed_weight, *seed_hidden = (None, None, None) if seeds is None else seeds.split(1)

        qkv = self._project(x, packing, parts).view(-1, 3, config.num_heads, config.head_dim)
        context = attention(qkv, packing, bias=bias, dropout=drop_weight, seed=seed_weight).flatten(1)
        late = read if any(map(is_hooked, parts)) else None  # hooks see every row
        if read is not None and late is None:
            context, x = context.index_select(0, read), x.index_select(0, read)
        dropout = drop_hidden[0], seed_hidden[0]
        x = _project_add_norm(context, parts.attention_output, x, parts.attention_norm, dropout, packing)
        wide = linear_activation(x, parts.intermediate, config.activation, packing)
        layout = packing if unpack else None
        x = _project_add_norm(
            wide, parts.output, x, parts.output_norm, (drop_hidden[1], seed_hidden[1]), packing, unpack=layout
        )
        return x if late is None else x.index_select(0, late)

    def _project(self, x: Tensor, packing: Packing, parts: Parts) -> Tensor:
        """Queries, keys and values, `[rows, 3 * hidden]`."""
        if is_plain(parts.query) and is_plain(parts.key) and is_plain(parts.value):
            return linear(x, *self.attention.self.joined())
        return torch.cat([call(part, x, packing) for part in parts[:3]], 1)

    def _run_prepared(self, x: Tensor, packing: Packing, parts: Parts) -> Tensor | None:
        """`forward` without options where the kernels serve all of it; else None."""
        if backend.decide(x.device).path != "triton":
            return None
        config = self.config
        norms = parts.attention_norm, parts.output_norm
        options = config.num_heads, config.activation, *(norm.eps for norm in norms)
        kind = EncoderLayer, *options, launch.row_bound(len(x)), *repeats.batch_kind(x, packing, config)
        parameters: list[Any] = [*self.attention.self.joined()]
        for part in parts[3:]:
            parameters += part._parameters["weight"], part._parameters["bias"]
        states = x, packing.cu_seqlens
        run = repeats.prepared(kind, states, tuple(parameters), lambda: self._prepare(x, packing))
        return None if run is None else cast(Tensor, run(x, packing, *parameters))

    def _prepare(self, x: Tensor, packing: Packing) -> repeats.Run | None:
        """`forward` without options as a function of tensors of one kind; None where a kernel can't serve a part of it.

        It takes x, the packing, and weights and biases in the order of `parts()`, those of attention joined.
        """
        heads, head_dim = self.config.num_heads, self.config.head_dim
        projection, norm, intermediate, output, output_norm = cast(Any, self.parts()[3:])
        weight, bias = self.attention.self.joined()
        check_linear(x, weight, bias)
        qkv = x.new_empty((len(x), len(weight))).view(-1, 3, heads, head_dim)
        attend = prepare_attention(qkv, packing)
        context = torch.empty_like(x)
        add_context = prepare_linear_layer_norm(
            context, projection.weight, projection.bias, x, norm.weight, norm.bias, eps=norm.eps
        )
        activate = prepare_linear_activation(x, intermediate, self.config.activation)
        wide = x.new_empty((len(x), self.config.intermediate_size))
        add_output = prepare_linear_layer_norm(
            wide, output.weight, output.bias, x, output_norm.weight, output_norm.bias, eps=output_norm.eps
        )
        if attend is None or add_context is None or activate is None or add_output is None:
            return None

        def run(
            x: Tensor, packing: Packing, wq: Tensor, bq: Tensor, wp: Tensor, bp: Tensor, norm_w: Tensor, norm_b: Tensor,
            wi: Tensor, bi: Tensor, wo: Tensor, bo: Tensor, output_norm_w: Tensor, output_norm_b: Tensor,
        ) -> Tensor:  # fmt: skip
            qkv = F.linear(x, wq, bq).view(-1, 3, heads, head_dim)
            context = attend(qkv, packing).view(x.shape)
            x = add_context(context, wp, bp, x, norm_w, norm_b)
            return add_output(activate(x, wi, bi), wo, bo, x, output_norm_w, output_norm_b)

        return run


_ACTIVATE: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def linear_activation(x: Tensor, dense: nn.Module, activation: Activation, packing: Packing | None = None) -> Tensor:
    """A linear layer and the activation after it: `[rows, in]` -> `[rows, out]`; `packing` as in `call`."""
    if not is_plain(dense):
        return _ACTIVATE[activation](call(dense, x, packing))
    weight, bias = cast(nn.Linear, dense).weight, cast(nn.Linear, dense).bias
    match activation:
        case "gelu":
            return linear_gelu(x, weight, bias)
        case "gelu_tanh":
            return linear_gelu(x, weight, bias, approximate="tanh")
        case "relu" | "silu":
            return _ACTIVATE[activation](dense(x))


def prepare_linear_activation(x: Tensor, linear: nn.Linear, activation: Activation) -> repeats.Run | None:
    """`linear_activation` in inference as a function of x, weight and bias of one kind; None: it can't be served."""
    match activation:
        case "gelu":
            return prepare_linear_gelu(x, linear.weight, linear.bias)
        case "gelu_tanh":
            return prepare_linear_gelu(x, linear.weight, linear.bias, approximate="tanh")
        case "relu" | "silu":
            return lambda x, weight, bias: _ACTIVATE[activation](F.linear(x, weight, bias))


def _project_add_norm(
    x: Tensor,
    dense: nn.Module,
    residual: Tensor,
    norm: nn.Module,
    dropout: tuple[float, Tensor | None],
    packing: Packing,
    unpack: Packing | None = None,
) -> Tensor:
    """norm(residual + dropout(dense(x))), `dropout` a probability and its seed."""
    probability, seed = dropout
    if is_plain(dense) and is_plain(norm):
        linear, plain_norm = cast(nn.Linear, dense), cast(nn.LayerNorm, norm)
        return linear_layer_norm(
            x,
            linear.weight,
            linear.bias,
            residual,
            plain_norm.weight,
            plain_norm.bias,
            dropout=probability,
            seed=seed,
            eps=plain_norm.eps,
            unpack=unpack,
        )
    x = call(dense, x, packing)
    if probability > 0.0:
        assert seed is not None
        x = drop(x, seed, probability)
    x = call(norm, residual + x, packing)
    return x if unpack is None else unpack.unpack(x)


def call(module: nn.Module, x: Tensor, packing: Packing | None) -> Tensor:
    """`module(x)`; in the padded layout where hooks look on, as they would in transformers."""
    if packing is None or not is_hooked(module):
        return cast(Tensor, module(x))
    return packing.pack(module(packing.unpack(x)), len(x))


def _probability(dropout: nn.Module | None) -> float:
    if type(dropout) is nn.Dropout:
        return dropout.p if dropout.training else 0.0
    if isinstance(dropout, nn.Identity):
        return 0.0
    raise ArgumentError("dropout", type(dropout).__name__, "nn.Dropout, or nn.Identity for none")
