"""Accelerated models whose modules, settings or memory others change: they go on giving what their own code gives."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from test_accelerate import FAMILIES, IDS, RIGHT, T, encoder_of, model_of, states
from torch import Tensor, nn

import fastbert
from fastbert import accelerate, paths_taken, restore, verify
from fastbert.errors import ArgumentError, BackendError
from fastbert.families import FAMILIES as FAMILIES_OF_FILES
from fastbert.families.accelerated import accelerated
from fastbert.testing import assert_close

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


# layers and settings that others change

LAYERS: dict[str, Any] = {
    "the first is gone": lambda layers: layers[1:],
    "the last is gone": lambda layers: layers[:-1],
    "turned around": lambda layers: layers[::-1],
    "one alone": lambda layers: [layers[1]],
    "two change places": lambda layers: [layers[1], layers[0], *layers[2:]],
    "a copy comes twice": lambda layers: [copy.deepcopy(layers[2]), layers[0], layers[1], layers[0]],
    "none": lambda layers: [],
}


def with_layers(model: Any, change: str) -> None:
    holder = getattr(model, "encoder", getattr(model, "transformer", model))
    name = "layer" if hasattr(holder, "layer") else "layers"
    setattr(holder, name, nn.ModuleList(LAYERS[change](list(getattr(holder, name)))))
    if hasattr(model.config, "layer_types") or name == "layers":
        model.config.num_hidden_layers = len(getattr(holder, name))  # which some forwards read


@pytest.mark.filterwarnings("ignore:.*runs its own code")
@pytest.mark.parametrize("change", LAYERS)
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Albert"])
def test_layers_that_are_moved_keep_what_they_are(family: str, change: str) -> None:
    """ModernBERT's layers are of two kinds, and its first one has no LayerNorm before it."""
    plain, before, after = model_of(family), model_of(family), accelerate(model_of(family))
    with torch.no_grad():
        states(after)
        for one in (plain, before, after):
            with_layers(one, change)
        if family == "DebertaV2" and change == "none":
            pytest.skip("has no size without a layer")
        want = states(plain)
        if change == "none":
            with pytest.raises(ArgumentError, match="layers: got none"):
                accelerate(before)
            torch.testing.assert_close(states(after), want)
            return
        accelerate(before)
        for one in (before, after):
            with paths_taken() as taken:
                torch.testing.assert_close(states(one), want, atol=5e-5, rtol=5e-5)
            assert taken


SETTINGS: list[tuple[str, str, Any, bool]] = [
    # of a family, where and what, whether fastbert still computes it
    ("Roberta", "config.pad_token_id", 2, True),
    ("Roberta", "embeddings.padding_idx", 2, True),
    ("MPNet", "embeddings.padding_idx", 0, True),
    ("MPNet", "config.num_attention_heads", 2, False),
    ("Bert", "config.is_decoder", True, False),
    ("Bert", "encoder.layer.1.attention.self.attention_head_size", 24, False),
    ("Albert", "config.num_hidden_layers", 2, True),
    ("Albert", "config.num_hidden_groups", 1, True),
    ("NomicBert", "config.num_hidden_layers", 2, True),
    ("NomicBert", "rotary_emb.attention_scaling", 2.0, False),
    ("Gte", "config.num_hidden_layers", 2, True),
    ("Gte", "rotary_emb.inv_freq", torch.linspace(1, 0.1, 8), False),
    ("ModernBert", "config.local_attention", 8, True),
    ("ModernBert", "config.num_attention_heads", 2, False),
    ("ModernBert", "rotary_emb.sliding_attention_inv_freq", torch.linspace(1, 0.1, 8), False),
    ("ModernBert", "rotary_emb.full_attention_attention_scaling", 2.0, False),
    ("DebertaV2", "encoder.position_buckets", 7, False),
    ("DebertaV2", "encoder.max_relative_positions", 24, False),
    ("DebertaV2", "encoder.norm_rel_ebd", [], False),
    ("DebertaV2", "config.max_relative_positions", 24, False),
    ("DebertaV2", "encoder.layer.1.attention.self.num_attention_heads", 4, False),
    ("DebertaV2", "encoder.layer.1.attention.self.pos_att_type", ["p2c"], False),
    ("DebertaV2", "encoder.layer.1.attention.self.pos_ebd_size", 7, False),
]


def set_at(model: Any, path: str, value: Any) -> None:
    *above, name = path.split(".")
    holder: Any = model
    for part in above:
        holder = getattr(holder, part)
    setattr(holder, name, value.clone() if isinstance(value, Tensor) else value)


@pytest.mark.filterwarnings("ignore:.*runs its own code")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("family", "path", "value", "served"), SETTINGS)
def test_settings_that_are_set_later(family: str, path: str, value: Any, served: bool, when: str) -> None:
    """Of a model's own code some are read at each call, and others only when its modules are made."""
    plain, model = model_of(family), model_of(family)
    with torch.no_grad():
        if when == "after":
            states(accelerate(model))
        for one in (plain, model):
            set_at(one, path, value)
        if when == "before" and path == "config.is_decoder":
            with pytest.raises(ArgumentError, match=path):
                accelerate(model)
            return
        if when == "before":
            accelerate(model)
        with paths_taken() as taken:
            got = states(model)
        torch.testing.assert_close(got, states(plain), atol=5e-5, rtol=5e-5)
    assert bool(taken) is served or (when == "after" and path == "config.num_attention_heads")


def test_frequencies_that_are_written_in_place() -> None:
    plain, model = model_of("NomicBert"), accelerate(model_of("NomicBert"))
    with torch.no_grad():
        states(model)
        for one in (plain, model):
            one.rotary_emb.inv_freq.mul_(0.3)
        with pytest.warns(UserWarning, match="rotary positions of other frequencies"):
            torch.testing.assert_close(states(model), states(plain))


@pytest.mark.parametrize("field", ["num_hidden_groups"])
def test_a_config_that_does_not_fit_its_groups(field: str) -> None:
    model = model_of("Albert")
    setattr(model.config, field, 3)
    with pytest.raises(ArgumentError, match=f"config.{field}: got 3"):
        accelerate(model)


# masks


@pytest.mark.filterwarnings("ignore:.*runs its own code", "ignore:attention_mask. a sequence")
@pytest.mark.parametrize("kind", ["twos", "halves", "of one row", "nothing kept"])
def test_masks_of_other_numbers(family: str, kind: str) -> None:
    """What is no mask of 0 and 1 is for the model's own code, and all padding is no error."""
    mask = {"twos": 2 * RIGHT, "halves": 0.5 * RIGHT, "of one row": RIGHT[1:2], "nothing kept": 0 * RIGHT}[kind]
    plain, model = model_of(family), accelerate(model_of(family))
    kept = (mask > 0).expand(3, 9)
    with torch.no_grad():
        try:
            want = plain(IDS, attention_mask=mask)
        except (RuntimeError, IndexError) as error:
            with pytest.raises(type(error)):
                model(IDS, attention_mask=mask)
            return
        got = model(IDS, attention_mask=mask)
    for theirs, ours in zip(want.to_tuple(), got.to_tuple(), strict=True):
        assert ours.isfinite().all()
        if theirs.dim() == 3:
            torch.testing.assert_close(ours[kept], theirs[kept], atol=5e-5, rtol=5e-5)


# gradients of what is given back


@pytest.mark.parametrize("of", ["the last state", "the pooler"])
def test_all_that_is_given_back_has_a_gradient(family: str, of: str) -> None:
    """Hidden states are read by who explains a model: `retain_grad` on each of them, then a backward pass."""
    plain = model_of(family)
    models = (plain, accelerate(copy.deepcopy(plain)), copy.deepcopy(plain).double())
    found = []
    for one in models:
        out = one(IDS, attention_mask=RIGHT, output_hidden_states=True)
        if of == "the pooler" and "pooler_output" not in out:
            pytest.skip("has no pooler")
        for state in out.hidden_states:
            state.retain_grad()
        torch.manual_seed(0)
        end = out.pooler_output if of == "the pooler" else out.last_hidden_state[RIGHT.bool()]
        end.backward(torch.randn(end.shape).to(end.dtype))
        found.append([state.grad for state in out.hidden_states] + [one.get_input_embeddings().weight.grad])
    for i, (theirs, got, exact) in enumerate(zip(*found, strict=True)):
        kept = RIGHT.bool() if got.dim() == 3 else slice(None)
        assert_close(got[kept], theirs[kept], exact[kept], factor=3.0, ulps=16.0, what=f"state {i}")


def test_an_encoder_alone_gives_states_with_gradients() -> None:
    plain = model_of("Bert")
    x, dout = torch.randn(2, 3, 9, 48)
    grads = []
    for one in (plain, accelerate(copy.deepcopy(plain))):
        with_states = one(inputs_embeds=x, attention_mask=torch.ones(3, 9, 9), output_hidden_states=True)
        for state in with_states.hidden_states:
            state.retain_grad()
        with_states.last_hidden_state.backward(dout)
        grads.append([state.grad for state in with_states.hidden_states])
    for theirs, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, theirs, atol=1e-4, rtol=1e-3)


# dtypes


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_gives_back_what_the_models_own_code_gives(family: str, grad: bool) -> None:
    """Its states have the dtype that comes into the first layer: float32, which numpy can hold."""
    plain = model_of(family)
    outs = []
    for one in (plain, accelerate(copy.deepcopy(plain))):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
            outs.append(one(IDS, attention_mask=RIGHT, output_hidden_states=True).to_tuple())
    for theirs, got in zip(*outs, strict=True):
        several = isinstance(theirs, tuple)
        assert [x.dtype for x in (got if several else [got])] == [x.dtype for x in (theirs if several else [theirs])]


# modules in the place of a linear layer that look at more than a row


class OfPlaces(nn.Module):
    """A linear layer and what it adds at each place of a sequence."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + torch.arange(x.shape[1], dtype=x.dtype)[:, None] / 10


class OfSequences(OfPlaces):
    """A linear layer with a gate that the whole sequence opens."""

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * x.mean((1, 2), keepdim=True).sigmoid()


@pytest.mark.parametrize("how", [OfPlaces, OfSequences, "forward"])
@pytest.mark.parametrize("part", ["attention_output", "output", "qkv", "output_norm"])
@pytest.mark.parametrize("family", ["Bert", "NomicBert", "ModernBert", "DebertaV2"])
def test_a_module_that_looks_at_places_gets_them(family: str, part: str, how: Any) -> None:
    plain = model_of(family)
    model = accelerate(copy.deepcopy(plain))
    full = torch.ones_like(IDS)
    with torch.no_grad():
        states(model)
        _, forward = encoder_of(model)
        layer = forward.ours.layer[1]
        joined = dict(layer.joined)
        place = joined[part].places[0] if part in joined else layer.places[part]
        if how == "forward":
            own = place.get()
            own.forward = lambda x: type(own).forward(own, x) + torch.arange(x.shape[1], dtype=x.dtype)[:, None] / 10
        else:
            setattr(place.parent, place.name, how(place.get()))
        with paths_taken() as taken:
            got = states(model, full)
        assert taken
        torch.testing.assert_close(got, states(restore(model), full), atol=5e-5, rtol=5e-5)
