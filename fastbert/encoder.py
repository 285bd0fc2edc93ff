"""The encoder: a stack of post-LN Transformer layers over packed tokens, a drop-in for Hugging Face's `BertEncoder`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert import backend
from fastbert.checkpoints import mapping
from fastbert.config import Activation, EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.masks import read_mask
from fastbert.ops import repeats
from fastbert.ops.attention import attention, prepare_attention
from fastbert.ops.common import check_linear
from fastbert.ops.layer_norm import linear_layer_norm, prepare_linear_layer_norm
from fastbert.ops.linear import linear
from fastbert.ops.linear_gelu import linear_gelu, prepare_linear_gelu
from fastbert.outputs import EncoderOutput, append_hidden_states, collected_by_transformers
from fastbert.packing import Packing

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class EncoderLayer(nn.Module):
    """One layer: attention, then the feed-forward, each followed by residual + LayerNorm."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, eps=config.eps)
        self.intermediate = nn.Linear(hidden, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, hidden)
        self.output_norm = nn.LayerNorm(hidden, eps=config.eps)

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        bias: Tensor | None = None,
        seeds: Tensor | None = None,
        read: Tensor | None = None,
        unpack: bool = False,
    ) -> Tensor:
        """`[rows, hidden]` -> `[rows, hidden]`.

        Args:
            bias: added to the attention scores; see `ops.attention`.
            seeds: int64 `[3]`, one seed for each dropout; None when dropout is off.
            read: int64 `[reads]`, the rows of the output that are wanted; all by default. All rows are attended to, but
                only these go through what comes after attention. The hidden dropouts then draw for these rows alone.
            unpack: give the output in the padded layout; not together with `read`.

        Returns:
            `[rows, hidden]`, or `[reads, hidden]`: the rows that the whole output would have there; unpacked
            `[batch, seqlen, hidden]`.
        """
        config = self.config
        plain = bias is None and seeds is None and read is None and not unpack
        if plain and backend.decide(x.device).path == "triton":
            options = config.num_heads, config.activation, self.attention_norm.eps, self.output_norm.eps
            kind = EncoderLayer, *options, packing.tokens, packing.max_seqlen
            parameters = self._parameters_in_order()
            tensors = (x, packing.cu_seqlens, *parameters)
            run = repeats.prepared(kind, tensors, lambda: self._prepare(x, packing))
            if run is not None:
                return cast(Tensor, run(x, packing, *parameters))
        drop_weight = config.attention_dropout if seeds is not None else 0.0
        drop_hidden = config.hidden_dropout if seeds is not None else 0.0
        seed_weight, seed_context, seed_output = (None, None, None) if seeds is None else seeds.split(1)

        qkv = linear(x, self.qkv.weight, self.qkv.bias).view(-1, 3, config.num_heads, config.head_dim)
        context = attention(qkv, packing, bias=bias, dropout=drop_weight, seed=seed_weight).flatten(1)
        if read is not None:
            context, x = context.index_select(0, read), x.index_select(0, read)
        x = _project_add_norm(context, self.attention_output, x, self.attention_norm, drop_hidden, seed_context)
        layout = packing if unpack else None
        return _project_add_norm(self.activate(x), self.output, x, self.output_norm, drop_hidden, seed_output, layout)

    def _parameters_in_order(self) -> tuple[Tensor, ...]:
        """As what `_prepare` makes takes them. By name: `parameters()` leaves out the second of two that are shared."""
        qkv, attention_output, attention_norm = self.qkv, self.attention_output, self.attention_norm
        intermediate, output, output_norm = self.intermediate, self.output, self.output_norm
        return (
            qkv.weight, qkv.bias, attention_output.weight, attention_output.bias, attention_norm.weight,
            attention_norm.bias, intermediate.weight, intermediate.bias, output.weight, output.bias, output_norm.weight,
            output_norm.bias,
        )  # fmt: skip

    def _prepare(self, x: Tensor, packing: Packing) -> repeats.Run | None:
        """`forward` without options as a function of tensors of one kind; None where a kernel can't serve a part of it.

        It takes x, the packing and `_parameters_in_order()`.
        """
        heads, head_dim = self.config.num_heads, self.config.head_dim
        projection, norm = self.attention_output, self.attention_norm
        output, output_norm = self.output, self.output_norm
        check_linear(x, self.qkv.weight, self.qkv.bias)
        qkv = x.new_empty((len(x), len(self.qkv.weight))).view(-1, 3, heads, head_dim)
        attend = prepare_attention(qkv, packing)
        context = torch.empty_like(x)
        add_context = prepare_linear_layer_norm(
            context, projection.weight, projection.bias, x, norm.weight, norm.bias, eps=norm.eps
        )
        activate = prepare_linear_activation(x, self.intermediate, self.config.activation)
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

    def activate(self, x: Tensor) -> Tensor:
        """The first product of the feed-forward and its activation: `[rows, hidden]` -> `[rows, intermediate]`."""
        return linear_activation(x, self.intermediate, self.config.activation)


def linear_activation(x: Tensor, linear: nn.Linear, activation: Activation) -> Tensor:
    """`linear` and the activation after it: `[rows, in]` -> `[rows, out]`."""
    match activation:
        case "gelu":
            return linear_gelu(x, linear.weight, linear.bias)
        case "gelu_tanh":
            return linear_gelu(x, linear.weight, linear.bias, approximate="tanh")
        case "relu":
            return F.relu(linear(x))
        case "silu":
            return F.silu(linear(x))


def prepare_linear_activation(x: Tensor, linear: nn.Linear, activation: Activation) -> repeats.Run | None:
    """`linear_activation` in inference as a function of x, weight and bias of one kind; None: it can't be served."""
    match activation:
        case "gelu":
            return prepare_linear_gelu(x, linear.weight, linear.bias)
        case "gelu_tanh":
            return prepare_linear_gelu(x, linear.weight, linear.bias, approximate="tanh")
        case "relu":
            return lambda x, weight, bias: F.relu(F.linear(x, weight, bias))
        case "silu":
            return lambda x, weight, bias: F.silu(F.linear(x, weight, bias))


def _project_add_norm(
    x: Tensor,
    linear: nn.Linear,
    residual: Tensor,
    norm: nn.LayerNorm,
    dropout: float,
    seed: Tensor | None,
    unpack: Packing | None = None,
) -> Tensor:
    return linear_layer_norm(
        x,
        linear.weight,
        linear.bias,
        residual,
        norm.weight,
        norm.bias,
        dropout=dropout,
        seed=seed,
        eps=norm.eps,
        unpack=unpack,
    )


class Encoder(nn.Module):
    """A stack of encoder layers. Padding is dropped once at the door, so no layer spends work on it.

    Takes the place of a Hugging Face `BertEncoder`: `model.encoder = fastbert.Encoder.from_hf(model.encoder)`.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        initialise(self, config.initializer_range)

    @classmethod
    def from_hf(cls, module: nn.Module) -> Encoder:
        """An encoder with the weights, dtype, device and mode of a transformers `BertEncoder`.

        Raises:
            ArgumentError: its config asks for something an encoder here does not do.
            CheckpointError: its parameters are not those of a BertEncoder.
        """
        config = EncoderConfig.from_hf(module.config)
        with torch.device("meta"):
            encoder = cls(config)
        state = mapping.to_ours(module.state_dict(), mapping.encoder_rules(config.num_layers))
        encoder.load_state_dict(state, assign=True)
        return encoder.train(module.training)

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """The parameters under the names of a transformers `BertEncoder`, bit for bit."""
        return mapping.to_theirs(self.state_dict(), mapping.encoder_rules(self.config.num_layers))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | BlockMask | None = None,
        *,
        packing: Packing | None = None,
        output_hidden_states: bool = False,
        return_dict: bool = True,
        **hf: Any,
    ) -> EncoderOutput | tuple[Any, ...]:
        """Run the stack.

        Args:
            hidden_states: `[batch, seqlen, hidden]`; or packed `[rows, hidden]` together with `packing`.
            attention_mask: any form in `masks.read_mask`; not together with `packing`.
            packing: the layout of packed `hidden_states`; the output is then packed too.
            output_hidden_states: also return the input of the first layer and the output of every layer.
            return_dict: False gives a plain tuple.
            hf: further arguments that Hugging Face passes to an encoder; accepted where they change nothing.

        Returns:
            The hidden states, 0 at padding (Hugging Face computes values there that nothing may rely on).

        Raises:
            ArgumentError: a wrong shape or mask, or a Hugging Face argument that asks for something else
                (cross-attention, a cache, attention weights).
        """
        for name, value in hf.items():
            if name not in _HARMLESS and not _asks_nothing(value):
                raise ArgumentError(name, _describe(value), "None", "fastbert.Encoder has no such thing.")
        x, bias = hidden_states, None
        packed = packing is not None
        if packing is None:
            if x.dim() != 3:
                raise ArgumentError("hidden_states", f"shape {tuple(x.shape)}", "[batch, seqlen, hidden]")
            packing, bias = read_mask(attention_mask, x.shape[0], x.shape[1], x.device)
            x = packing.pack(x)
        elif attention_mask is not None:
            raise ArgumentError("attention_mask", "a mask beside a packing", "one of the two")
        if x.dim() != 2 or x.shape[1] != self.config.hidden_size:
            raise ArgumentError(
                "hidden_states", f"shape {tuple(hidden_states.shape)}", f"a last dimension of {self.config.hidden_size}"
            )
        states = self.run(x, packing, bias, unpack=not packed)

        def layout(state: Tensor) -> Tensor:
            return state if packed or state is states[-1] else packing.unpack(state)

        append_hidden_states(collected_by_transformers(), states, layout)
        every = tuple(layout(state) for state in states) if output_hidden_states else None
        out = EncoderOutput(states[-1], every)
        return out if return_dict else out.to_tuple()

    def run(
        self,
        x: Tensor,
        packing: Packing,
        bias: Tensor | None = None,
        read: Tensor | None = None,
        *,
        unpack: bool = False,
    ) -> list[Tensor]:
        """The packed input and the packed output of each layer, `num_layers + 1` tensors `[rows, hidden]`.

        With `read`, int64 `[reads]`, the last of them is `[reads, hidden]`: only these rows of it, and no work for the
        others. With `unpack` the last of them is `[batch, seqlen, hidden]`. See `EncoderLayer.forward`.
        """
        seeds = None
        if self.training and (self.config.hidden_dropout or self.config.attention_dropout):
            seeds = torch.randint(2**63 - 1, (len(self.layers), 3), device=x.device)
        if not self.layers:
            return [packing.unpack(x) if unpack else x if read is None else x.index_select(0, read)]
        states = [x]
        for i, layer in enumerate(self.layers):
            last = i + 1 == len(self.layers)
            seed = None if seeds is None else seeds[i]
            states.append(layer(states[-1], packing, bias, seed, read if last else None, unpack and last))
        return states


_HARMLESS = {"position_ids", "cache_position", "num_items_in_batch"}


def _asks_nothing(value: Any) -> bool:
    """Whether an argument is None, False or a list of None (what transformers 4 passes as `head_mask`)."""
    return value is None or value is False or (isinstance(value, list) and all(v is None for v in value))


def _describe(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def initialise(module: nn.Module, std: float) -> None:
    """BERT's initialisation (Devlin et al. 2018): normal weights of deviation `std`, zero biases, unit LayerNorm.

    The row of the padding token is zero, as in Hugging Face's.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name == "bias":
                nn.init.zeros_(parameter)
            elif isinstance(part, nn.LayerNorm):
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=std)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            nn.init.zeros_(part.weight[part.padding_idx])
