"""Accelerated models whose modules, settings or memory others change: they go on giving what their own code gives."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from test_accelerate import FAMILIES, IDS, RIGHT, T, model_of, states
from torch import nn

import fastbert
from fastbert import accelerate, paths_taken, restore, verify
from fastbert.errors import ArgumentError, BackendError
from fastbert.families import FAMILIES as FAMILIES_OF_FILES
from fastbert.families.accelerated import accelerated

WITHIN = [family for family in FAMILIES if family not in ("NomicBert", "Gte", "ModernBert", "DebertaV2")]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


class Doubled(nn.Module):
    """A module around an encoder, as wrappers of other libraries are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **given: Any) -> Any:
        out = self.inner(*args, **given)
        out.last_hidden_state = 2 * out.last_hidden_state
        return out


def name_of_encoder(model: Any) -> str:
    return "transformer" if "transformer" in model._modules else "encoder"


# another encoder in the place of the one that was accelerated


@pytest.mark.parametrize("change", ["another", "wrapped"])
@pytest.mark.parametrize("family", WITHIN)
def test_an_encoder_that_comes_later_is_the_one_that_runs(family: str, change: str) -> None:
    plain, model = model_of(family), accelerate(model_of(family))
    place = name_of_encoder(plain)
    another = copy.deepcopy(getattr(plain, place))
    with torch.no_grad():
        for parameter in another.parameters():
            parameter.mul_(1.2)
        before = states(model)
        for one in (plain, model):
            setattr(one, place, another if change == "another" else Doubled(getattr(one, place)))
        want = states(plain)
        with pytest.warns(UserWarning, match=f"its {place} is not accelerated"):
            got = states(model)
    assert not torch.allclose(got, before, atol=1e-2)
    torch.testing.assert_close(got, want, atol=5e-5, rtol=5e-5)


def test_strictly_an_encoder_that_comes_later_is_an_error() -> None:
    model = accelerate(model_of("Bert"), strict=True)
    model.encoder = Doubled(model.encoder)
    with pytest.raises(BackendError, match="its encoder is not accelerated"):
        states(model)


@pytest.mark.filterwarnings("ignore:.*runs its own code")
def test_restoring_an_encoder_alone() -> None:
    model = accelerate(model_of("Bert"))
    with torch.no_grad():
        want = states(restore(copy.deepcopy(model)))
        restore(model.encoder)
        with paths_taken() as taken:
            assert torch.equal(states(model), want)
        assert not taken
        accelerate(model)
        with paths_taken() as taken:
            states(model)
        assert taken


@pytest.mark.parametrize("change", ["swapped", "a subclass", "gone"])
def test_an_encoder_of_another_class_is_refused_by_name(change: str) -> None:
    model = model_of("Bert")
    if change == "swapped":
        model.encoder = fastbert.Encoder.from_hf(model.encoder)
    elif change == "gone":
        del model.encoder
    else:
        model.encoder.__class__ = type("Mine", (type(model.encoder),), {})
    with pytest.raises(ArgumentError, match="model: got BertModel whose encoder is a"):
        accelerate(model)


def test_an_encoder_inside_of_a_wrapper_is_found() -> None:
    plain = model_of("Bert")
    plain.encoder = Doubled(plain.encoder)
    model = accelerate(copy.deepcopy(plain))
    with torch.no_grad(), paths_taken() as taken:
        torch.testing.assert_close(states(model), states(plain), atol=5e-5, rtol=5e-5)
    assert taken
    assert verify(model)


def test_a_class_is_of_one_family() -> None:
    families = {id(family): family for family in FAMILIES_OF_FILES.values()}.values()
    names = [name for family in families for name in (*family.encoders, *family.models)]
    assert len(set(names)) == len(names)


# what is called


def test_arguments_that_do_not_fit_are_errors_of_python() -> None:
    plain, model = model_of("Bert"), accelerate(model_of("Bert"))
    most = len(inspect.signature(type(plain).forward).parameters)
    for one in (plain, model):
        with pytest.raises(TypeError):
            one(IDS, RIGHT, *([None] * most))
        with pytest.raises(TypeError, match="token_type_ids"):
            one(IDS, RIGHT, None, token_type_ids=torch.ones_like(IDS))


# copies that have weights of their own


def replica(module: Any, factor: float) -> Any:
    """As `torch.nn.parallel.replicate` makes one for a device, with other weights."""
    made = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else replica(child, factor)
    for name, parameter in module._parameters.items():
        if parameter is None:
            made._parameters[name] = None
        else:
            setattr(made, name, parameter * factor)
    return made


def test_replicas_of_data_parallel_have_their_own_weights(family: str) -> None:
    model = model_of(family)
    want = states(replica(model, 1.1))
    accelerate(model)
    with pytest.warns(UserWarning, match="DataParallel makes copies"):
        made = replica(model, 1.1)
    torch.testing.assert_close(states(made), want)
    assert not list(accelerated(made)) and list(accelerated(model))
    copied = copy.deepcopy(model)  # whose replicas are those of the copy
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.1)
    torch.testing.assert_close(states(replica(copied, 1.0)), want)
    assert "_replicate_for_data_parallel" not in vars(restore(model))


# memory that is someone else's


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_flat_buffer_goes_on_being_the_memory_of_its_parameters(family: str, when: str) -> None:
    """As ZeRO and FSDP hold parameters: a step writes to the buffer, and parameters are views of it."""
    model, plain = model_of(family), model_of(family)
    if when == "after":
        accelerate(model)
    with torch.no_grad():
        before = states(model)
        flat = nn.utils.parameters_to_vector(model.parameters())
        nn.utils.vector_to_parameters(flat, model.parameters())
        accelerate(model)
        torch.testing.assert_close(states(model), before, atol=5e-5, rtol=5e-5)
        flat.mul_(1.2)
        for parameter in plain.parameters():
            parameter.mul_(1.2)
    want = states(plain)
    assert not torch.allclose(before, want, atol=1e-2)
    got = states(model)
    torch.testing.assert_close(got, want, atol=5e-5, rtol=5e-5)
    with torch.no_grad():
        torch.testing.assert_close(states(model), want, atol=5e-5, rtol=5e-5)
    dout = torch.randn_like(got)
    for out in (got, want):
        out.backward(dout)
    for (name, parameter), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, theirs.grad, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", ["NomicBert", "Gte"])
def test_what_transformers_split_out_of_a_file_is_moved_side_by_side(family: str, tmp_path: Path) -> None:
    """Queries, keys and values are views of one tensor then, which is nobody else's."""
    model_of(family).save_pretrained(tmp_path)
    model = accelerate(getattr(T, family + "Model").from_pretrained(tmp_path).eval())
    (forward,) = [forward for _, forward in accelerated(model)]
    weights = [part.joined()[0] for layer in forward.encoder.layers for _, part in layer.joined]
    again = [part.joined()[0] for layer in forward.encoder.layers for _, part in layer.joined]
    assert weights and all(one.data_ptr() == other.data_ptr() for one, other in zip(weights, again, strict=True))
