"""`torch.nn.TransformerEncoder`, which models of any library may hold: layers that normalise last, or first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbert.config import Activation, EncoderConfig
from fastbert.errors import ArgumentError, BackendError
from fastbert.families.foreign import Borrowed, ForeignEncoder, ForeignLayer, Place
from fastbert.families.names import Names
from fastbert.model.masks import read_mask
from fastbert.packing import Packing
from fastbert.run.eight_bits import EightBitLinear

POST_NORM = Names(
    query="self_attn",
    key="self_attn",
    value="self_attn",
    attention_output="self_attn.out_proj",
    attention_norm="norm1",
    intermediate="linear1",
    output="linear2",
    output_norm="norm2",
    activation="activation",
    dropout_of_weights="self_attn.dropout",
    dropout_of_context="dropout1",
    dropout_of_output="dropout2",
    dropout_of_activation="dropout",
)
PRE_NORM = replace(POST_NORM, attention_norm="norm2", output_norm="norm1")

# Attributes of a MultiheadAttention that are read here, or by torch's layers.
_READ = ("embed_dim", "num_heads", "dropout", "batch_first", "bias_k", "add_zero_attn", "_qkv_same_embed_dim")


class EightBitAttention(nn.MultiheadAttention):
    """What stands in the place of a MultiheadAttention whose products are in 8 bits; torch's code can't compute it."""

    def __init__(self, theirs: nn.MultiheadAttention, in_proj: EightBitLinear, out_proj: EightBitLinear) -> None:
        nn.Module.__init__(self)
        for name in _READ:
            setattr(self, name, getattr(theirs, name))
        self.add_module("in_proj", in_proj)
        self.add_module("out_proj", out_proj)
        self.register_parameter("in_proj_bias", None)
        self.training = False

    @property
    def in_proj_weight(self) -> NoReturn:  # type: ignore[override]
        """What torch's code asks for first, be it that of the encoder, of a layer or of attention."""
        expected = "a call that fastbert serves"
        raise BackendError("TransformerEncoder", "torch's own code for a quantized encoder", expected)


_FUNCTIONS: dict[Any, Activation] = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
_ATTENTION = (nn.MultiheadAttention, EightBitAttention)
_LINEAR = (nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Linear)


class TorchLayer(ForeignLayer):
    """A `TransformerEncoderLayer`, whose attention reads its parameters without calling a module for each product."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if isinstance(attention := self.attention(), EightBitAttention):
            self.places |= {"qkv": Place(attention, "in_proj"), "attention_output": Place(attention, "out_proj")}
            return
        for part, weight, bias in (("qkv", "in_proj_weight", "in_proj_bias"), ("attention_output", "weight", "bias")):
            place = self.places[part]
            assert isinstance(place, Place)
            self.places[part] = Borrowed(place, weight, bias)

    def quantized(self, make: Callable[[nn.Module], EightBitLinear]) -> Iterator[tuple[nn.Module, nn.Module]]:
        """See Layer."""
        parts, made = self.parts(), dict(super().quantized(make))
        attention = cast("nn.MultiheadAttention", self.attention())
        products = (cast("EightBitLinear", made.pop(parts[name])) for name in ("qkv", "attention_output"))
        yield attention, EightBitAttention(attention, *products)
        yield from made.items()


class TorchEncoder(ForeignEncoder):
    """A `TransformerEncoder`. Its `norm`, if it has one, is called as it is.

    Raises:
        ArgumentError: its layers are of other classes than torch's, not alike, or ask for what we lack.
    """

    layer_type = TorchLayer

    def __init__(self, theirs: nn.Module) -> None:
        layers = list(theirs.get_submodule("layers"))  # type: ignore[call-overload]
        config = read_config(layers)
        names = PRE_NORM if config.norm_first else POST_NORM
        self._read(theirs, config, layers, names, shared={}, last_norm=None)
        self.batch_first = bool(layers[0].self_attn.batch_first)

    def called(self) -> list[nn.Module]:
        """What is called, or computed, outside the layers."""
        norm = self.theirs[0]._modules.get("norm")
        return [] if norm is None else [norm]

    def layout(self, x: Tensor) -> Tensor:
        """Their layout as `[batch, seqlen, hidden]`, and back."""
        return x if self.batch_first else x.transpose(0, 1)

    def unserved(self, src: Tensor, mask: Any, padding: Any, is_causal: bool | None) -> str | None:
        """Why their code has to serve these arguments; None where ours does."""
        if src.is_nested:
            return "a nested tensor"
        if src.dim() != 3 or not src.numel():
            return "hidden states that are not [batch, seqlen, hidden], or none"
        if is_causal:
            return "is_causal"
        if src.shape[2] != self.config.hidden_size:
            return f"hidden states {src.shape[2]} wide"
        batch, seqlen = self.layout(src).shape[:2]
        shapes: dict[str, tuple[tuple[int, ...], ...]] = {
            "mask": ((seqlen, seqlen), (batch * self.config.num_heads, seqlen, seqlen))
        }
        shapes["src_key_padding_mask"] = ((batch, seqlen),)
        for name, given in (("mask", mask), ("src_key_padding_mask", padding)):
            if given is None:
                continue
            if not isinstance(given, Tensor) or given.shape not in shapes[name]:
                return f"{name} of another shape"
            if given.device != src.device or not (given.dtype == torch.bool or given.is_floating_point()):
                return f"{name}: {given.dtype} on {given.device}"
        return None

    def encode(self, src: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        """What the encoder makes of arguments that are served.

        Without `mask` padding is dropped, and the output there is what `norm` makes of 0; 0 where there is no `norm`.
        """
        x = self.layout(src)
        batch, seqlen = x.shape[:2]
        if mask is None:
            kept = padding if padding is None else ~padding if padding.dtype == torch.bool else padding[:, None, None]
            packing, bias = read_mask(kept, batch, seqlen, x.device, zeros_at_padding=True)
        else:
            packing = Packing.from_lengths([seqlen] * batch, seqlen=seqlen, device=x.device)
            bias = _added(mask, x.dtype)
            bias = bias[None, None] if mask.dim() == 2 else bias.unflatten(0, (batch, -1))
            bias = bias if padding is None else bias + _added(padding, x.dtype)[:, None, None]
        out = self.layout(self.run(packing.pack(x), packing, bias, every=False, unpack=True)[-1])
        norm = self.theirs[0]._modules.get("norm")
        return out if norm is None else norm(out)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers that are added to scores: of bool, -inf where it is True."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)


def read_config(layers: list[Any]) -> EncoderConfig:
    """What steps depend on, of torch's layers, which have to be alike.

    Raises:
        ArgumentError: see TorchEncoder.
    """
    found = list(dict.fromkeys(map(_of_layer, layers)))
    if len(found) != 1:
        raise ArgumentError("layers", f"{len(found)} kinds of them" if found else "none", "one or more, all alike")
    ((width, heads, activation, norm_first, _),) = found
    return EncoderConfig(
        hidden_size=width,
        num_layers=len(layers),
        num_heads=heads,
        activation=activation,
        norm_first=norm_first,
        dropped=("attention_output", "intermediate", "output"),
    )


def _of_layer(layer: Any) -> tuple[int, int, Activation, bool, bool]:
    """Width, heads, activation, `norm_first` and `batch_first`."""
    attention: Any = getattr(layer, "self_attn", None)
    if type(layer) is not nn.TransformerEncoderLayer or type(attention) not in _ATTENTION:
        got = f"{type(layer).__name__} with a {type(attention).__name__}"
        raise ArgumentError("layers", got, "TransformerEncoderLayer with a MultiheadAttention, of torch.nn")
    if type(attention.out_proj) not in _LINEAR and type(attention) is not EightBitAttention:
        raise ArgumentError("out_proj", type(attention.out_proj).__name__, "torch's own")
    if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
        raise ArgumentError("self_attn", "keys or values of their own kind", "those of a TransformerEncoderLayer")
    orders = bool(layer.norm_first), bool(attention.batch_first)
    return attention.embed_dim, attention.num_heads, _activation(layer.activation), *orders


def _activation(given: Any) -> Activation:
    if type(given) is nn.GELU:
        return "gelu_tanh" if given.approximate == "tanh" else "gelu"
    if type(given) in (nn.ReLU, nn.SiLU):
        return "relu" if type(given) is nn.ReLU else "silu"
    found = _FUNCTIONS.get(given) if callable(given) else None
    if found is None:
        raise ArgumentError(
            "activation", repr(given), "relu, gelu or silu, as torch.nn or torch.nn.functional has them"
        )
    return found
