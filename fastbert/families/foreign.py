"""An encoder of someone else's modules, which stay where they are: nothing is copied, moved or renamed.

A layer looks its modules up in their own parents each time it runs, so that one that is put in another's place (an
adapter, say) is seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import Parameter

from fastbert.config import EncoderConfig
from fastbert.families.names import Names
from fastbert.model.encoder import Encoder
from fastbert.model.layer import Layer, probability
from fastbert.ops.common import observed
from fastbert.run.kept import Kept
from fastbert.run.parts import Group, SelfAttention
from fastbert.run.steps import layer_steps


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


class ForeignAttention(SelfAttention):
    """Queries, keys and values at these places; see `SelfAttention`."""

    def __init__(self, places: Sequence[Place]) -> None:
        Group.__init__(self)
        self.places = tuple(places)
        self._forget()
        self.join()

    def linears(self) -> list[nn.Module]:
        """See SelfAttention."""
        return [place.get() for place in self.places]

    def _copied(self, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, Tensor]:
        """What was moved or cast since is moved together again, and no copy; see SelfAttention."""
        if not observed():
            self.join()
        if observed() or self._joined is None:
            return super()._copied(weights, biases)
        return self.joined()

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Those of the three."""
        for linear in self.linears():
            yield from linear.parameters(recurse)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Nothing is joined yet: in the middle of a deep copy the places are not whole."""
        nn.Module.__setstate__(self, state)


class ForeignLayer(Layer):
    """A layer of someone else's; see `Names`."""

    def __init__(self, theirs: nn.Module, names: Names, config: EncoderConfig) -> None:
        super().__init__(layer_steps(config))
        self.theirs = (theirs,)  # in a tuple, for a module would become a child
        self.qkv = (ForeignAttention([Place.of(theirs, path) for path in (names.query, names.key, names.value)]),)
        self.places = {
            part: Place.of(theirs, getattr(names, part))
            for part in ("attention_output", "attention_norm", "intermediate", "output", "output_norm")
        }
        self.weights_dropout = Place.of(theirs, names.dropout_of_weights)
        self.other_dropouts = [
            None if path is None else Place.of(theirs, path)
            for path in (names.dropout_of_context, names.dropout_of_output)
        ]

    def parts(self) -> dict[str, nn.Module]:
        """See Layer."""
        return {"qkv": self.qkv[0], **{part: place.get() for part, place in self.places.items()}}

    def dropouts(self) -> tuple[float, ...]:
        """See Layer."""
        others = (0.0 if place is None else probability(place.get()) for place in self.other_dropouts)
        drop, attention = self.weights_dropout.get(), self.weights_dropout.parent
        of_weights = drop.p if type(drop) is nn.Dropout and attention.training else 0.0
        return of_weights, *others

    def computed(self) -> list[nn.Module]:
        """What is computed or called in its turn: linear layers and norms, or what stands in their places."""
        return [*self.qkv[0].linears(), *(place.get() for place in self.places.values())]


class ForeignEncoder(Encoder):
    """An encoder of someone else's modules.

    Args:
        theirs: their encoder.
        layers: of it, in the order in which they run.
    """

    def __init__(self, theirs: nn.Module, layers: Sequence[nn.Module], names: Names, config: EncoderConfig) -> None:
        nn.Module.__init__(self)
        self.config, self.kept, self.theirs = config, Kept(), (theirs,)
        made = {id(layer): ForeignLayer(layer, names, config) for layer in layers}
        self.layer = nn.ModuleList([made[id(layer)] for layer in layers])

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
