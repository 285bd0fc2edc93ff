"""Which keys of a checkpoint the parameters of a model are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from fastbert.errors import CheckpointError
from fastbert.families.names import OURS, Family, Spelled
from fastbert.model.body import EncoderModel
from fastbert.model.heads import HeadModel, body_of
from fastbert.model.mapping import Rule


def key_rules(
    family: Family, model: EncoderModel | HeadModel, spell: Callable[[str], str], spell_head: Callable[[str], str]
) -> list[Rule]:
    """Rules between the parameters of `model`, each of them once, and the keys of a checkpoint of this family.

    Args:
        spell, spell_head: a key of a body, without a prefix, and one of a head, as the checkpoint writes them.

    Raises:
        CheckpointError: the family has no such head.
    """
    body, names = body_of(model), _body_names(family, body_of(model))
    prefix = "" if body is model else "bert."
    heads: Mapping[str, Spelled] = {} if isinstance(model, EncoderModel) else head_names(family, type(model))
    found: dict[tuple[str, ...], list[str]] = {}  # by their keys: several of ours may be one of theirs
    for name in names_once(model):
        if name.startswith(prefix) and (body is model or name not in heads):
            theirs = tuple(map(spell, _theirs(name.removeprefix(prefix), names)))
        else:
            theirs = tuple(map(spell_head, _theirs(name, heads)))
        found.setdefault(theirs, []).append(name)
    halved = f".{OURS.intermediate}." if family.names.gate_last else None
    return [Rule(tuple(ours), theirs, halved is not None and halved in ours[0]) for theirs, ours in found.items()]


def names_once(model: nn.Module) -> list[str]:
    """The keys of the state dict of `model`; those of layers that share modules under the first of their names."""
    modules = {name for name, _ in model.named_modules()}
    return [name for name in model.state_dict() if name.rpartition(".")[0] in modules]


def head_names(family: Family, kind: type[HeadModel]) -> Mapping[str, str]:
    """Of each module of a head what it is called in ours and in theirs."""
    suffix = kind.__name__.removeprefix("Encoder")
    if suffix not in family.heads:
        known = ", ".join(f"Encoder{name}" for name in family.heads)
        raise CheckpointError("kind", kind.__name__, f"a head that {next(iter(family.model_types))} has: {known}")
    return family.heads[suffix]


def _body_names(family: Family, body: EncoderModel) -> dict[str, Spelled]:
    """Of each module of a body what it is called in ours and in theirs."""
    order = body.config.layer_order or range(body.config.num_layers)
    names = dict(family.body)
    for i, number in enumerate(order):
        layer = family.layer.format(number)
        for ours, theirs in family.names.weights().items():
            several = (theirs,) if isinstance(theirs, str) else theirs
            names[f"encoder.layer.{i}.{ours}"] = tuple(f"{layer}.{one}" for one in several)
        if family.last_norm is not None:  # a layer's last is the one that the next begins with
            following = f"{family.layer.format(number + 1)}.{family.names.output_norm}"
            last = i + 1 == len(order)
            names[f"encoder.layer.{i}.output.LayerNorm"] = family.last_norm if last else following
    return names


def _theirs(name: str, names: Mapping[str, Spelled]) -> tuple[str, ...]:
    """The keys of a parameter."""
    if name in names:  # a parameter that has a name of its own
        theirs, leaf = names[name], ""
    else:
        module, _, leaf = name.rpartition(".")
        if module not in names:
            raise CheckpointError("state dict", f"a parameter {name}", "the parameters of the model's class")
        theirs, leaf = names[module], f".{leaf}"
    return tuple(f"{one}{leaf}" for one in ((theirs,) if isinstance(theirs, str) else theirs))
