"""An encoder of someone else's modules, which stay where they are: nothing is copied, moved or renamed.

A layer looks its modules up in their own parents each time it runs, so that one that is put in another's place (an
adapter, say) is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import Parameter

from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.families.names import Family, Names
from fastbert.model.encoder import Encoder
from fastbert.model.layer import Layer, probability
from fastbert.ops.common import observed
from fastbert.packing import Packing
from fastbert.run.eager import normalised
from fastbert.run.kept import Kept
from fastbert.run.parts import Group, SelfAttention
from fastbert.run.steps import OWN, PROJECTIONS, layer_steps


class Place(NamedTuple):
    """A module by its parent and its name there."""

    parent: nn.Module
    name: str

    @classmethod
    def of(cls, top: nn.Module, path: str) -> Place:
        """By a dotted name below `top`."""
        *above, name = path.split(".")
        return cls(top.get_submodule(".".join(above)), name)

    def get(self) -> nn.Module:
        """The module that is there now.

        Raises:
            AttributeError: there is none.
        """
        found = self.parent._modules.get(self.name)
        if found is None:
            raise AttributeError(f"{type(self.parent).__name__} has no {self.name}")
        return found


class Borrowed:
    """A linear layer of parameters that the module at a place holds under these names; it is read, and never called."""

    def __init__(self, place: Place, weight: str, bias: str) -> None:
        self.place, self.names = place, {"weight": weight, "bias": bias}
        self.linear = nn.Linear(1, 1, device="meta")

    def get(self) -> nn.Linear:
        """Of the parameters that are there now.

        Raises:
            AttributeError: there is none under one of the names.
        """
        module, own = self.place.get(), self.linear._parameters
        for name, theirs in self.names.items():
            if theirs not in module._parameters:
                raise AttributeError(f"{type(module).__name__} has no parameter {theirs}")
            if own[name] is not module._parameters[theirs]:
                own[name] = module._parameters[theirs]
        return self.linear


class ForeignLinears(SelfAttention):
    """The linear layers at these places as one product: queries, keys and values, or a gate; see `SelfAttention`."""

    def __init__(self, places: Sequence[Place]) -> None:
        Group.__init__(self)
        self.places = tuple(places)
        self._forget()
        self.join()

    def linears(self) -> list[nn.Module]:
        """See SelfAttention."""
        return [place.get() for place in self.places]

    def _lie_as_joined(self, tensors: list[Tensor]) -> bool:
        """What was moved or cast since is moved together again; see SelfAttention."""
        if observed():
            return False
        if not super()._lie_as_joined(tensors):
            self.join()
        return self._joined is not None

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Those of them all."""
        for linear in self.linears():
            yield from linear.parameters(recurse)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Nothing is joined yet: in the middle of a deep copy the places are not whole."""
        nn.Module.__setstate__(self, state)


class ForeignLayer(Layer):
    """Layer `i` of someone else's; see `Names`.

    Args:
        theirs: their layer.
        shared: what all layers read, by its name in the steps.
        following: where the LayerNorm after the layer is; None where there is none.
    """

    def __init__(
        self,
        theirs: nn.Module,
        i: int,
        names: Names,
        config: EncoderConfig,
        shared: dict[str, Place],
        following: Place | None,
    ) -> None:
        super().__init__(layer_steps(config, i, last_norm=following is not None))
        self.theirs = (theirs,)  # in a tuple, for a module would become a child
        self.places: dict[str, Place | Borrowed] = {
            part: Place.of(theirs, getattr(names, part)) for part in ("attention_output", "attention_norm", "output")
        }
        if following is not None:
            self.places["output_norm"] = following
        self.places |= shared
        asked = config.disentangled
        self.dropout_of_positions: Place | None = None
        if asked is not None:
            self.dropout_of_positions = Place.of(theirs, names.dropout_of_positions)
            for term in asked.terms:
                path = getattr(names, OWN[term] if asked.shared else PROJECTIONS[term])
                self.places[PROJECTIONS[term]] = Place.of(theirs, path)
        self.joined: tuple[tuple[str, ForeignLinears], ...] = ()
        several = names.intermediate if isinstance(names.intermediate, tuple) else (names.intermediate,)
        for part, paths in (("qkv", (names.query, names.key, names.value)), ("intermediate", several)):
            places = [Place.of(theirs, path) for path in dict.fromkeys(paths)]
            if len(places) == 1:
                self.places[part] = places[0]
            else:
                self.joined += ((part, ForeignLinears(places)),)
        self.dropout_of_weights = names.dropout_of_weights
        of_activation = [names.dropout_of_activation] if "intermediate" in config.dropped else []
        self.other_dropouts = [
            None if path is None else Place.of(theirs, path)
            for path in (names.dropout_of_context, *of_activation, names.dropout_of_output)
        ]

    def add_convolution(self, theirs: nn.Module) -> None:
        """What follows it; see `Family.convolution`."""
        self.places |= {"convolution": Place(theirs, "conv"), "convolution_norm": Place(theirs, "LayerNorm")}
        self.other_dropouts.append(Place(theirs, "dropout"))

    def parts(self) -> dict[str, nn.Module]:
        """See Layer."""
        return {**dict(self.joined), **{part: place.get() for part, place in self.places.items()}}

    def dropouts(self) -> tuple[float, ...]:
        """See Layer."""
        others = (0.0 if place is None else probability(place.get()) for place in self.other_dropouts)
        attention = self.attention()
        drop = getattr(attention, self.dropout_of_weights.rpartition(".")[2])
        p = drop.p if type(drop) is nn.Dropout else drop if isinstance(drop, float | int) else 0.0
        of_weights = p if attention.training else 0.0
        if self.dropout_of_positions is not None:
            return of_weights, probability(self.dropout_of_positions.get()), *others
        return of_weights, *others

    def attention(self) -> nn.Module:
        """Their module of attention."""
        return self.theirs[0].get_submodule(self.dropout_of_weights.rpartition(".")[0])

    def computed(self) -> list[nn.Module]:
        """What is computed or called in its turn: linear layers and norms, or what stands in their places."""
        joined = (linear for _, part in self.joined for linear in part.linears())
        return [*joined, *(place.get() for name, place in self.places.items() if name != "relative")]


class ForeignEncoder(Encoder):
    """An encoder of someone else's modules.

    Args:
        theirs: their encoder.
        family: which it is of.

    Attributes:
        layer_type: what computes a layer.
    """

    layer_type: type[ForeignLayer] = ForeignLayer

    def __init__(self, theirs: nn.Module, family: Family) -> None:
        layers = family.layers(theirs)
        if not layers:
            raise ArgumentError("layers", "none", "one or more")
        config = family.config(family.own(theirs, family.hf(theirs).to_dict()))
        tables: dict[str, str | None] = {}
        if config.relative_buckets is not None or config.disentangled is not None:
            tables["relative"] = family.relative
        if config.disentangled is not None and config.disentangled.normalised:
            tables["relative_norm"] = family.relative_norm
        shared = {name: Place.of(theirs, path) for name, path in tables.items() if path is not None}
        last_norm = None if family.last_norm is None else Place.of(theirs, family.last_norm)
        self._read(theirs, config, layers, family.modules or family.names, shared, last_norm)
        if config.convolution is not None and family.convolution is not None:
            cast("ForeignLayer", self.layer[0]).add_convolution(theirs.get_submodule(family.convolution))

    def _read(
        self,
        theirs: nn.Module,
        config: EncoderConfig,
        layers: Sequence[nn.Module],
        names: Names,
        shared: dict[str, Place],
        last_norm: Place | None,
    ) -> None:
        nn.Module.__init__(self)
        self.config, self.kept, self.theirs = config, Kept(), (theirs,)
        made: dict[tuple[int, Place | None], ForeignLayer] = {}
        self.layer = nn.ModuleList()
        for i, layer in enumerate(layers):
            following: Place | None = Place.of(layer, names.output_norm)
            if config.norm_first:
                last = i + 1 == len(layers)
                following = last_norm if last else Place.of(layers[i + 1], names.output_norm)
            key = id(layer), following
            if key not in made:
                made[key] = self.layer_type(layer, i, names, config, shared, following)
            self.layer.append(made[key])
        self.first_norm = Place.of(layers[0], names.output_norm) if config.norm_first else None

    def registers(self, x: Tensor, packing: Packing) -> dict[str, Tensor]:
        """See Encoder; layers that normalise first begin with a LayerNorm of the first of them, if it has one."""
        if self.first_norm is None:
            return super().registers(x, packing)
        norm = self.first_norm.get()
        return {"x": x if type(norm) is nn.Identity else normalised(norm, x, packing), "sum": x}

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Theirs."""
        return self.theirs[0].parameters(recurse)

    def watched(self) -> nn.Module:
        """Theirs."""
        return self.theirs[0]

    def follow(self) -> None:
        """Be in the mode that they are in, and compute again in the backward pass where they do."""
        self.training = self.theirs[0].training
        for layer in self.layer:
            assert isinstance(layer, ForeignLayer)
            theirs: Any = layer.theirs[0]
            layer.training = theirs.training
            layer.gradient_checkpointing = getattr(theirs, "gradient_checkpointing", False)
            layer._gradient_checkpointing_func = getattr(theirs, "_gradient_checkpointing_func", None)
