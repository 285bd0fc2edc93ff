"""Names of parameters: ours on one side, Hugging Face's on the other, and an exact way across in both directions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastbert.errors import CheckpointError

KEYS_SHOWN = 10


@dataclass(frozen=True)
class Rule:
    """Parameters of ours and those of theirs that are the same numbers, concatenated on dimension 0.

    On one side there is one, the whole of those on the other. With `swapped` the second half of theirs is the first of
    ours.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    swapped: bool = False


_LAYER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)

# The names that fastbert 0.1.0 gave a layer's modules, and what they are now.
_LAYER_OF_0_1 = {
    "qkv": _LAYER[:3],
    "attention_output": _LAYER[3:4],
    "attention_norm": _LAYER[4:5],
    "intermediate": _LAYER[5:6],
    "output": _LAYER[6:7],
    "output_norm": _LAYER[7:8],
}


def from_names_of_0_1(state: dict[str, Tensor], prefix: str) -> None:
    """Rename, in place, the keys `PREFIXlayers.N...` of an `Encoder` of fastbert 0.1.0."""
    for key in [key for key in state if key.startswith(f"{prefix}layers.")]:
        number, *name = key.removeprefix(f"{prefix}layers.").split(".")
        if len(name) == 2 and name[0] in _LAYER_OF_0_1:
            names = _LAYER_OF_0_1[name[0]]
            new = tuple(f"{prefix}layer.{number}.{one}.{name[1]}" for one in names)
            state.update(zip(new, _split(key, state.pop(key), len(new)), strict=True))


def to_ours(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Their state dict under our names; the exact inverse of `to_theirs`.

    Raises:
        CheckpointError: a key is missing or unexpected, or the parts of one parameter differ in shape or dtype.
    """
    _account_for(state, [name for rule in rules for name in rule.theirs])
    return _across(state, [(rule.theirs, rule.ours, rule.swapped) for rule in rules])


def to_theirs(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Our state dict under their names; the exact inverse of `to_ours`. The tensors may be views of ours.

    Raises:
        CheckpointError: a key is missing or unexpected, or a parameter does not split into equal parts.
    """
    _account_for(state, [name for rule in rules for name in rule.ours])
    return _across(state, [(rule.ours, rule.theirs, rule.swapped) for rule in rules])


def _across(
    state: Mapping[str, Tensor], sides: Iterable[tuple[tuple[str, ...], tuple[str, ...], bool]]
) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for have, want, swapped in sides:
        whole = _join(have, [state[name] for name in have])
        if swapped:
            whole = torch.cat(tuple(reversed(_split(have[0], whole, 2))))
        made.update(zip(want, _split(have[0], whole, len(want)), strict=True))
    return made


def _account_for(state: Iterable[str], expected: list[str]) -> None:
    given, wanted = set(state), set(expected)
    for what, keys in (("missing", wanted - given), ("unexpected", given - wanted)):
        if keys:
            shown = ", ".join(sorted(keys)[:KEYS_SHOWN]) + (", ..." if len(keys) > KEYS_SHOWN else "")
            raise CheckpointError(
                "state dict", f"{len(keys)} {what} keys: {shown}", f"the {len(wanted)} keys of the model"
            )


def _join(names: tuple[str, ...], parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    kinds = {(tuple(part.shape), part.dtype) for part in parts}
    if len(kinds) > 1 or parts[0].dim() == 0:
        got = ", ".join(f"{part.dtype} {tuple(part.shape)}" for part in parts)
        raise CheckpointError(", ".join(names), got, "one shape and one dtype")
    return torch.cat(parts)


def _split(name: str, whole: Tensor, parts: int) -> Sequence[Tensor]:
    if parts == 1:
        return [whole]
    if whole.dim() == 0 or whole.shape[0] % parts:
        raise CheckpointError(name, f"shape {tuple(whole.shape)}", f"a first dimension that {parts} divides")
    return whole.chunk(parts)
