"""The encoder: a stack of post-LN Transformer layers over packed tokens, a drop-in for Hugging Face's `BertEncoder`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from fastbert import backend
from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.model import mapping
from fastbert.model.layer import EncoderLayer, Layer
from fastbert.model.masks import read_mask
from fastbert.model.outputs import EncoderOutput, append_hidden_states, collected_by_transformers, refuse_what_asks
from fastbert.ops.common import multiplies_bare, native_machine, wants_gradient
from fastbert.ops.fastest import FEW, fastest, onednn_fuses
from fastbert.ops.products import onednn_rows, with_slack
from fastbert.ops.watch import hooks_of
from fastbert.packing import Packing
from fastbert.run import cpu, onednn, prepared
from fastbert.run.eager import Registers, normalised
from fastbert.run.eight_bits import EightBitLinear
from fastbert.run.frozen import FrozenLinear, changes, freeze, thaw
from fastbert.run.kept import Kept
from fastbert.run.parts import SelfAttention, is_hooked
from fastbert.run.steps import Parts, Steps

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Encoder(nn.Module):
    """A stack of encoder layers. Padding is dropped once at the door, so no layer spends work on it.

    Takes the place of a Hugging Face `BertEncoder`: `model.encoder = fastbert.Encoder.from_hf(model.encoder)`.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.kept = Kept()
        self.relative, self.relative_norm = _tables(config)
        shared = {name: part for name in ("relative", "relative_norm") if (part := getattr(self, name)) is not None}
        order = range(config.num_layers) if config.layer_order is None else config.layer_order
        made = {i: EncoderLayer(config, i, shared) for i in dict.fromkeys(order)}
        self.layer = nn.ModuleList(made[i] for i in order)
        initialise(self, config.initializer_range)

    @classmethod
    def from_hf(cls, module: nn.Module) -> Encoder:
        """An encoder of the very parameters of a transformers `BertEncoder`, under their names, in its mode.

        The modules that hold parameters are taken over as they are, with their hooks, adapters and quantized weights.

        Raises:
            ArgumentError: its config asks for something an encoder here does not do, or a module that ours stands for
                has hooks.
            CheckpointError: its modules or parameters are not those of a BertEncoder.
        """
        layers = getattr(module, "layer", None)
        config = getattr(module, "config", None)
        if not isinstance(layers, nn.ModuleList) or not hasattr(config, "to_dict"):
            expected = "a BertEncoder of transformers: a module with a ModuleList `layer` and a config"
            raise CheckpointError("module", type(module).__name__, expected)
        config = replace(EncoderConfig.from_hf(config), num_layers=len(layers))
        with torch.device("meta"):
            encoder = cls(config)
        _take_over(encoder, module, "encoder")
        for ours, theirs in zip(encoder.layer, layers, strict=True):
            if getattr(theirs, "gradient_checkpointing", False):
                ours.gradient_checkpointing = True  # type: ignore[assignment]
                ours._gradient_checkpointing_func = theirs._gradient_checkpointing_func
        encoder.join()
        encoder.training = module.training
        return encoder

    def join(self) -> None:
        """Let the parameters of queries, keys and values lie one after another; see `SelfAttention.join`."""
        for part in self.modules():
            if isinstance(part, SelfAttention):
                part.join()

    def to_hf_state_dict(self) -> dict[str, Tensor]:
        """`state_dict()`, whose names are those of a transformers `BertEncoder`.

        Raises:
            ArgumentError: it is quantized.
        """
        if self.in_eight_bits() is not None:
            raise ArgumentError("encoder", "a quantized one", "the encoder that it was made of")
        return self.state_dict()

    def in_eight_bits(self) -> EightBitLinear | None:
        """The first of its parts that multiplies in 8 bits; see `Layer.in_eight_bits`."""
        return cast("Layer", self.layer[0]).in_eight_bits() if len(self.layer) else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """State dicts of fastbert 0.1.0, with names of its own, are read too."""
        mapping.from_names_of_0_1(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | BlockMask | None = None,
        *,
        packing: Packing | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **hf: Any,
    ) -> EncoderOutput | tuple[Any, ...]:
        """Run the stack.

        Args:
            hidden_states: `[batch, seqlen, hidden]`; or packed `[rows, hidden]` together with `packing`.
            attention_mask: any form in `masks.read_mask`; not together with `packing`.
            packing: the layout of packed `hidden_states`; the output is then packed too.
            output_hidden_states: also return the input of the first layer and the output of every layer.
            return_dict: False gives a plain tuple of what is not None.
            hf: further arguments that Hugging Face passes to an encoder; accepted where they change nothing.

        Returns:
            The hidden states, 0 at padding (Hugging Face computes values there that nothing may rely on). So a pooler
            that reads column 0 reads 0 of a sequence that is padded on the left; a warning says so, once.

        Raises:
            ArgumentError: a wrong shape or mask, or a Hugging Face argument that asks for something else
                (cross-attention, a cache, attention weights).
        """
        refuse_what_asks(hf, "fastbert.Encoder")
        x, bias = hidden_states, None
        packed = packing is not None
        if packing is None:
            if x.dim() != 3:
                raise ArgumentError("hidden_states", f"shape {tuple(x.shape)}", "[batch, seqlen, hidden]")
            batch, seqlen = x.shape[:2]
            by_distance = self.config.by_distance
            packing, bias = read_mask(
                attention_mask, batch, seqlen, x.device, by_distance=by_distance, zeros_at_padding=True
            )
            x = packing.pack(x)
        elif attention_mask is not None:
            raise ArgumentError("attention_mask", "a mask beside a packing", "one of the two")
        out = self.answer(x, packing, bias, packed=packed, output_hidden_states=bool(output_hidden_states))
        return out.to_tuple() if return_dict is False else out

    def answer(
        self, x: Tensor, packing: Packing, bias: Tensor | None, *, packed: bool, output_hidden_states: bool
    ) -> EncoderOutput:
        """What `forward` gives of packed rows and what `masks.read_mask` made of a mask; padded unless `packed`.

        Raises:
            ArgumentError: rows of another width.
        """
        if x.dim() != 2 or x.shape[1] != self.config.hidden_size:
            expected = f"a last dimension of {self.config.hidden_size}"
            raise ArgumentError("hidden_states", f"rows of shape {tuple(x.shape)}", expected)
        collected = collected_by_transformers()
        every = output_hidden_states or "hidden_states" in collected
        states = self.run(x, packing, bias, every=every, unpack=not packed)
        append_hidden_states(collected, states)
        return EncoderOutput(states[-1], tuple(states) if output_hidden_states else None)

    def run(
        self,
        x: Tensor,
        packing: Packing,
        bias: Tensor | None = None,
        read: Tensor | None = None,
        *,
        every: bool = True,
        unpack: bool = False,
    ) -> list[Tensor]:
        """The packed input and the packed output of each layer, `num_layers + 1` tensors `[rows, hidden]`.

        Without `every` only the last of them is there, and no other is kept. With `read`, int64 `[reads]`, the last of
        them is `[reads, hidden]`: only these rows of it, and no work for the others. With `unpack` they are
        `[batch, seqlen, hidden]` in the dtype of `x`, which autocast would have changed, and each layer reads what the
        one before it gave, so that all of them have gradients. See `Layer.forward`.
        """
        if not every and bias is None and (program := self._program(x)) is not None:
            backend.take(program.name)
            with torch.no_grad():
                made = program.run(self.registers(x.contiguous(), packing), packing, read)
            return [packing.unpack(made) if unpack else made]
        layers = cast("list[Layer]", list(self.layer))
        if not layers:
            return [packing.unpack(x) if unpack else x if read is None else x.index_select(0, read)]
        sizes = len(layers), max(layer.steps.drops for layer in layers)
        seeds = torch.randint(2**63 - 1, sizes, device=x.device) if self.drops() else None
        rows, dtype = len(x), x.dtype
        first_state, x = self._shown(x, packing, every=every, unpack=unpack)
        states = [first_state]
        first = self.in_eight_bits()
        if first is not None:
            first.check(x)
        weight = next(self.parameters(), None)  # None in a replica of DataParallel, which has tensors in their place
        slack = onednn_rows(rows) - rows if weight is not None and first is None and onednn_fuses(x, weight) else 0
        if slack:  # once for all products, which would each do it
            x = with_slack(x, slack)
        last_unpacks = unpack and not slack and not is_hooked(layers[-1])
        floats = self.registers(x, packing)
        x = floats["x"]
        registers = Registers(floats, {} if first is None else {"x": first.quantize(x)})
        for i, layer in enumerate(layers):
            last = i + 1 == len(layers)
            seed = None if seeds is None else seeds[i, : layer.steps.drops]
            if is_hooked(layer):  # by one who knows transformers' padded layout
                if layer.steps.carried != ("x",):
                    mend = "Register them on the encoder, or on a linear layer or norm in it."
                    raise ArgumentError(f"layer {i}", "hooks on a layer that normalises first", "none", mend)
                x = packing.pack(layer(packing.unpack(x), packing, bias, seed), len(x))
                registers = Registers({"x": x})
                x = x.index_select(0, read) if last and read is not None else x
            else:
                x = layer(x, packing, bias, seed, read if last else None, last_unpacks and last, registers)
            state = x if last else registers.floats[layer.steps.state]
            state = state[:rows] if slack and not (last and read is not None) else state
            if every and unpack and not last:
                state, again = self._shown(state.to(dtype), packing, every=every, unpack=unpack)
                if state.requires_grad:
                    x = with_slack(again, slack) if slack else again
                    registers = Registers(self._read_again(layer, x, packing))
                    x = registers.floats["x"]
            states = [*states, state] if every else [state]
        if unpack:
            states[-1] = (states[-1] if last_unpacks else packing.unpack(states[-1])).to(dtype)
        return states

    @staticmethod
    def _shown(x: Tensor, packing: Packing, *, every: bool, unpack: bool) -> tuple[Tensor, Tensor]:
        """A state as it is given back, and the rows that go on: those of what is given back, if it has a gradient."""
        if not (every and unpack):
            return x, x
        shown = packing.unpack(x)
        return shown, packing.pack(shown) if shown.requires_grad else x

    @staticmethod
    def _read_again(layer: Layer, x: Tensor, packing: Packing) -> dict[str, Tensor]:
        """What the layer after `layer` reads, of the state between them."""
        if layer.steps.carried == ("x",):
            return {"x": x}
        return {"x": normalised(layer.parts()["output_norm"], x, packing), layer.steps.state: x}

    def registers(self, x: Tensor, packing: Packing) -> dict[str, Tensor]:
        """What the first layer reads, of the rows that come in; see `steps.layer_steps`."""
        return dict.fromkeys(cast("Layer", self.layer[0]).steps.carried, x)

    def _program(self, x: Tensor) -> cpu.CpuProgram | onednn.OneDnnProgram | None:
        """What was made of the layers for inputs as `x`, where that is faster than layer by layer."""
        if wants_gradient(x, *(self.parameters() if torch.is_grad_enabled() else ())):
            return None
        with torch.no_grad():
            return self._program_without_gradient(x)

    def _program_without_gradient(self, x: Tensor) -> cpu.CpuProgram | onednn.OneDnnProgram | None:
        if not multiplies_bare(x) or not len(x):
            return None
        path, mkldnn = backend.decide(x.device).path, torch.backends.mkldnn.enabled
        if path == "triton" or self.training:
            return None
        steps = tuple([layer.steps for layer in self.layer])
        purpose = steps, x.dtype, x.shape[1], path, fastest(x.dtype, len(x), "laid out"), mkldnn
        return self.kept.get([self.watched()], purpose, lambda: self._made(x))

    def watched(self) -> nn.Module:
        """The module whose weights and hooks tell whether what was made of them still holds."""
        return self

    def executors(self) -> dict[str, str | None]:
        """What may compute it in inference, in the order of choice, and what each does not serve; None: it serves all.

        For many rows in the dtype of its weights, where they are.
        """
        like = next(self.parameters())
        x, layers = like.new_zeros(FEW + 1, self.config.hidden_size), self.layers()
        with torch.no_grad():
            if backend.decide(x.device).path == "triton":
                reasons = (prepared.unserved(steps, parts) for steps, parts in layers)
                served = {"prepared": next(filter(None, reasons), None)}
            else:
                served = {"cpu": cpu.unserved(layers, x), "onednn": onednn.unserved(layers, x)}
        return {**served, "eager": None}

    def _made(self, x: Tensor) -> cpu.CpuProgram | onednn.OneDnnProgram | None:
        layers = self.layers()
        if self.drops() or any(map(is_hooked, self.layer)):
            return None
        if cpu.unserved(layers, x) is None:
            return cpu.lay_out(layers, x)
        return onednn.OneDnnProgram(layers) if onednn.unserved(layers, x) is None else None

    def train(self, mode: bool = True) -> Encoder:
        """Training mode, in which weights change: nothing that was made of them is kept."""
        self.check_mode(mode)
        if mode:
            self.kept.drop()
        return super().train(mode)

    def check_mode(self, mode: bool) -> None:
        """Raise ArgumentError where `train(mode)` would: frozen and quantized parts can't be trained."""
        for part in self.modules() if mode else ():
            if isinstance(part, FrozenLinear | EightBitLinear):
                part.train(mode)

    def freeze(self) -> bool:
        """Never train: where kernels of this CPU compute it, let its weights lie only as they read them.

        Then its weights take their memory once, and not twice once it ran. `state_dict` gives them as they were, a move
        or a cast of the encoder brings the modules back, and so does `copy.deepcopy`.

        Returns:
            Whether they lie so. Elsewhere nothing is done.
        """
        like = next(self.parameters(), None)
        if like is None or self.training or self.is_frozen() or self.in_eight_bits() is not None:
            return self.is_frozen()
        x = like.new_zeros((FEW + 1, self.config.hidden_size), dtype=like.dtype, device=like.device)
        with torch.no_grad():
            machine = native_machine(x) if cpu.unserved(self.layers(), x) is None else None
        if machine is None or self.config.hidden_size % machine.vectors.columns:
            return False
        self.kept.drop()
        freeze(self.layer, machine.vectors.columns)
        self.join()
        return True

    def is_frozen(self) -> bool:
        """Whether `freeze` moved its weights."""
        return any(isinstance(part, FrozenLinear) for part in self.modules())

    def _apply(self, fn: Any, recurse: bool = True) -> Encoder:
        """Nor of weights that are moved or cast."""
        self.kept.drop()
        if self.is_frozen() and changes(fn, next(self.parameters())):
            thaw(self.layer)
        return cast("Encoder", super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def layers(self) -> list[tuple[Steps, Parts]]:
        """The steps of each layer, and its parts."""
        return [(layer.steps, layer.parts()) for layer in cast("list[Layer]", list(self.layer))]

    def is_plain(self) -> bool:
        """Whether nothing but ops of ours computes it, without dropout; see `parts.is_plain`."""
        return not self.drops() and not any(
            is_hooked(layer) or not cast("Layer", layer).is_plain() for layer in self.layer
        )

    def drops(self) -> bool:
        """Whether a dropout module is on."""
        return any(any(cast("Layer", layer).dropouts()) for layer in self.layer)


def _tables(config: EncoderConfig) -> tuple[nn.Embedding | None, nn.LayerNorm | None]:
    """The table of distances that all layers share, and what normalises it."""
    disentangled = config.disentangled
    if disentangled is None:
        buckets = config.relative_buckets
        return None if buckets is None else nn.Embedding(buckets, config.num_heads), None
    norm = nn.LayerNorm(config.hidden_size, eps=config.eps) if disentangled.normalised else None
    return nn.Embedding(2 * disentangled.span, config.hidden_size), norm


def _take_over(ours: nn.Module, theirs: nn.Module, name: str) -> None:
    """Put the modules of `theirs` that hold parameters, and dropouts, in the places of those of `ours`."""
    own = [*theirs._parameters, *theirs._buffers]
    unknown = [child for child, part in theirs.named_children() if child not in ours._modules and part.state_dict()]
    if own or unknown:
        raise CheckpointError(name, f"{', '.join(own + unknown)} in it", "the parameters of a BertEncoder")
    if any(not (getattr(hook, "__module__", None) or "").startswith("transformers.") for hook in _hooks(theirs)):
        raise ArgumentError(name, "hooks on it", "none", "Register them on the new encoder, or on nn.Linear and norms.")
    for child, part in ours.named_children():
        taken = theirs._modules.get(child)
        if taken is None:
            raise CheckpointError(name, f"{type(theirs).__name__} without {child}", "the modules of a BertEncoder")
        part.training = taken.training
        if isinstance(part, nn.Linear | nn.LayerNorm | nn.Dropout):
            _check_like(part, taken, f"{name}.{child}")
            ours._modules[child] = taken
        else:
            _take_over(part, taken, f"{name}.{child}")


def _hooks(module: nn.Module) -> list[Any]:
    patched = [module.forward] if "forward" in module.__dict__ else []
    return [*patched, *(hook for hooks in hooks_of(module) for hook in hooks.values())]


def _check_like(ours: nn.Module, theirs: nn.Module, name: str) -> None:
    """Raise CheckpointError if `theirs` is of the kind of `ours` with parameters of another shape."""
    if type(theirs) is not type(ours):
        return
    for part, parameter in ours.named_parameters():
        given = getattr(theirs, part, None)
        if given is None or given.shape != parameter.shape:
            got = "nothing" if given is None else f"shape {tuple(given.shape)}"
            raise CheckpointError(f"{name}.{part}", got, f"shape {tuple(parameter.shape)}, as the config says")


def initialise(module: nn.Module, std: float) -> None:
    """BERT's initialisation (Devlin et al. 2018): normal weights of deviation `std`, zero biases, unit LayerNorm.

    The row of the padding token is zero, as in Hugging Face's.
    """
    if any(parameter.is_meta for parameter in module.parameters()):  # a checkpoint's come in their place
        return
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
