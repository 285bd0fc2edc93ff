"""`fastbert.accelerate` on transformers' models: the same numbers, the same objects, and the way back."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted import Adapted
from torch import Tensor, nn

import fastbert
from fastbert import accelerate, paths_taken, restore, verify
from fastbert.cpu.machine import Machine, host
from fastbert.errors import ArgumentError, BackendError
from fastbert.families.accelerated import accelerated
from fastbert.testing import assert_close

T = pytest.importorskip("transformers", reason="its models are meant")

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "vocab_size": 60,
    "initializer_range": 0.2,
}
DISTILBERT = {"dim": 48, "n_layers": 3, "n_heads": 3, "hidden_dim": 80, "vocab_size": 60, "initializer_range": 0.2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Roberta": SIZES,
    "XLMRoberta": SIZES,
    "Camembert": SIZES,
    "Electra": {**SIZES, "embedding_size": 32},
    "DistilBert": DISTILBERT,
    "Albert": {**SIZES, "embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 1},
    "MPNet": SIZES,
    "DebertaV2": {
        **SIZES,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "max_relative_positions": 12,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
    "NomicBert": {**SIZES, "initializer_range": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "Gte": {**SIZES, "initializer_range": 0.1, "type_vocab_size": 0, "pad_token_id": 1},
    "ModernBert": {
        **SIZES,
        "local_attention": 4,
        **{f"{name}_token_id": i for i, name in enumerate(("pad", "cls", "sep", "bos", "eos"))},
    },
}
# Whose model is its encoder, which takes ids.
WHOLE = ("NomicBert", "Gte", "ModernBert")
IDS = torch.randint(5, 60, (3, 9), generator=torch.Generator().manual_seed(0))
RIGHT = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8])
MASKS = {"right": RIGHT, "left": RIGHT.flip(1), "none": torch.ones_like(RIGHT)}


def model_of(family: str, kind: str = "Model", **changes: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(T, family + kind)(getattr(T, f"{family}Config")(**{**FAMILIES[family], **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def encoder_of(model: Any) -> tuple[Any, Any]:
    """The encoder in an accelerated model, and what computes it."""
    *_, (module, forward) = accelerated(model)
    return module, getattr(forward, "encoder", forward)


def states(model: Any, mask: Tensor = RIGHT, **options: Any) -> Tensor:
    return model(IDS, attention_mask=mask, **options).last_hidden_state[mask.bool()]


@pytest.mark.parametrize("mask", MASKS)
def test_inference(family: str, mask: str) -> None:
    model = model_of(family)
    with torch.no_grad():
        plain, exact = states(model, MASKS[mask]), states(copy.deepcopy(model).double(), MASKS[mask])
        before = dict(model.named_parameters())
        assert accelerate(model) is model
        with paths_taken() as taken:
            got = states(model, MASKS[mask])
    assert sum(taken.values()) > 0
    assert_close(got, plain, exact, factor=3.0)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


@pytest.mark.skipif(not isinstance(host(), Machine), reason="no kernels here: Linux on x86-64 with AVX2 runs this")
def test_inference_is_one_program_of_the_cpu(family: str, choose: Callable[[str], None]) -> None:
    choose("own")
    model = accelerate(model_of(family))
    with torch.no_grad(), paths_taken() as taken:
        states(model)
    assert taken == {"cpu": 1}


@pytest.mark.skipif(
    not (isinstance(host(), Machine) and host().bfloat16),
    reason="no kernels for bfloat16: a CPU with AVX512-BF16 runs this",
)
def test_bfloat16_is_one_program_of_the_cpu_too(family: str, choose: Callable[[str], None]) -> None:
    choose("own")
    model = accelerate(model_of(family).to(torch.bfloat16))
    with torch.no_grad(), paths_taken() as taken:
        got = states(model)
        want = states(restore(copy.deepcopy(model)))
    assert taken == {"cpu": 1} and got.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(got.double(), want.double(), -1).min() > 0.999


def test_gradients(family: str) -> None:
    dropouts = [name for name in ("hidden_dropout_prob", "attention_probs_dropout_prob") if "Distil" not in family]
    model = model_of(family, **dict.fromkeys(dropouts or ["dropout", "attention_dropout"], 0.0)).train()
    grads = []
    dout = torch.randn(int(RIGHT.sum()), 48)
    for one in (copy.deepcopy(model), accelerate(copy.deepcopy(model)), copy.deepcopy(model).double()):
        out = states(one)
        names, parameters = zip(*one.named_parameters(), strict=True)
        found = torch.autograd.grad(out, parameters, dout.to(out.dtype), allow_unused=True)
        grads.append({name: grad for name, grad in zip(names, found, strict=True) if grad is not None})
    plain, got, exact = grads
    assert list(got) == list(plain)
    for name in exact:
        assert_close(got[name], plain[name], exact[name], factor=3.0, ulps=16.0, what=name)


def test_restored_to_the_bit(family: str) -> None:
    model = model_of(family)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        want = states(model)
        accelerate(model)
        states(model)
        assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())
        assert restore(model) is model
        assert not list(accelerated(model))
        assert torch.equal(states(model), want)


def test_verify(family: str) -> None:
    model = accelerate(model_of(family))
    found = verify(model)
    assert found[0].name.endswith(": output") and len(found) > 10
    assert all(one.difference <= 5 * one.rounding + 1e-6 for one in found)
    with pytest.raises(ArgumentError, match="given to fastbert"):
        verify(restore(model))


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification", "MaskedLM", "QuestionAnswering"])
def test_heads(family: str, kind: str) -> None:
    if not hasattr(T, f"{family}For{kind}"):
        pytest.skip("transformers has no such class")
    model = model_of(family, f"For{kind}")
    with torch.no_grad():
        want = model(IDS, attention_mask=RIGHT)
        got = accelerate(model)(IDS, attention_mask=RIGHT)
    for name in list(want):
        kept = RIGHT.bool() if want[name].shape[:2] == RIGHT.shape else slice(None)
        torch.testing.assert_close(got[name][kept], want[name][kept], atol=2e-5, rtol=2e-5)


@pytest.mark.filterwarnings("ignore:.*runs its own code")
@pytest.mark.parametrize("by", ["argument", "config"])
@pytest.mark.parametrize("asked", [True, [0, -1], 1, [7]])
def test_hidden_states(family: str, asked: Any, by: str) -> None:
    """Of all layers, or of those with these numbers, where the model knows such."""
    model = model_of(family)
    given = {"output_hidden_states": asked} if by == "argument" else {}
    if by == "config":
        model.config.output_hidden_states = asked
    with torch.no_grad():
        want = model(IDS, attention_mask=RIGHT, **given).hidden_states
        got = accelerate(model)(IDS, attention_mask=RIGHT, **given).hidden_states
    assert len(got) == len(want) == 4
    for ours, theirs in zip(got, want, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours[RIGHT.bool()], theirs[RIGHT.bool()], atol=2e-5, rtol=2e-5)


@pytest.mark.filterwarnings("ignore:.*runs its own code")
@pytest.mark.parametrize("tied", [True, False])
def test_hidden_states_and_the_last_norm(family: str, tied: bool) -> None:
    """Of a model that normalises first, the last of them is what a config says."""
    model = model_of(family)
    model.config.tie_last_hidden_states = tied
    with torch.no_grad():
        want = model(IDS, attention_mask=RIGHT, output_hidden_states=True).hidden_states[-1][RIGHT.bool()]
        got = accelerate(model)(IDS, attention_mask=RIGHT, output_hidden_states=True).hidden_states[-1][RIGHT.bool()]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_what_is_not_served_runs_its_own_code_and_says_so_once(family: str) -> None:
    model = model_of(family, attn_implementation="eager")
    with torch.no_grad():
        want = model(IDS, attention_mask=RIGHT, output_attentions=True)
        accelerate(model)
        with pytest.warns(UserWarning, match="runs its own code, not fastbert's: attention weights"):
            got = model(IDS, attention_mask=RIGHT, output_attentions=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(IDS, attention_mask=RIGHT, output_attentions=True)
        assert len(got.attentions) == 3
        assert torch.equal(got.attentions[-1], want.attentions[-1])
        accelerate(model, strict=True)
        with pytest.raises(BackendError, match="attention weights"):
            model(IDS, attention_mask=RIGHT, output_attentions=True)


def test_hooks(family: str) -> None:
    model = accelerate(model_of(family))
    with torch.no_grad():
        want = states(model)
        seen: list[str] = []
        model.register_forward_hook(lambda *_: seen.append("model"))
        encoder, forward = encoder_of(model)
        encoder.register_forward_hook(lambda *_: seen.append("encoder"))
        linear = next(part for part in encoder.modules() if isinstance(part, nn.Linear))
        linear.register_forward_hook(lambda *_: seen.append("linear"))
        torch.testing.assert_close(states(model), want, atol=2e-5, rtol=2e-5)
        assert {"model", "encoder", "linear"} == set(seen)
        forward.family.layers(encoder)[0].register_forward_hook(lambda *_: seen.append("layer"))
        with pytest.warns(UserWarning, match="a hook on a module"):
            torch.testing.assert_close(states(model), want, atol=2e-5, rtol=2e-5)
        assert "layer" in seen


def test_an_adapter_in_the_place_of_a_module(family: str) -> None:
    """As PEFT does it, after the model was accelerated; and its merge."""
    model = accelerate(model_of(family))
    with torch.no_grad():
        states(model)
        _, forward = encoder_of(model)
        layer = forward.ours.layer[0]
        place = dict(layer.joined)["qkv"].places[0] if layer.joined else layer.places["qkv"]
        setattr(place.parent, place.name, Adapted(place.get()))
        got = states(model)
        want = states(restore(copy.deepcopy(model)))
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
        setattr(place.parent, place.name, place.get().base)
        torch.testing.assert_close(states(model), states(restore(copy.deepcopy(model))), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("how", ["deepcopy", "pickled", "saved"])
def test_copies(family: str, how: str, tmp_path: Any) -> None:
    model = accelerate(model_of(family))
    with torch.no_grad():
        want = states(model)
        if how == "saved":
            model.save_pretrained(tmp_path)
            made = getattr(T, family + "Model").from_pretrained(tmp_path).eval()
            assert not list(accelerated(made))
        else:
            made = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
            encoder, forward = encoder_of(made)
            assert forward.theirs is encoder
            for parameter in made.parameters():
                parameter.mul_(1.5)
            assert not torch.allclose(states(made), want, atol=1e-2)
            torch.testing.assert_close(states(made), states(restore(made)), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(states(model), want)


def test_moved_and_cast_and_written(family: str) -> None:
    model = accelerate(model_of(family))
    frequencies = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}

    def own() -> Any:
        """Its frequencies in float32, which a cast rounds in transformers; ours are numbers of the config."""
        made = restore(copy.deepcopy(model))
        for name, buffer in frequencies.items():
            made.rotary_emb._buffers[name.rpartition(".")[2]] = buffer
        return made

    with torch.no_grad():
        states(model)
        for change in (lambda: model.bfloat16(), lambda: model.float(), lambda: model.double(), lambda: model.float()):
            change()
            want = states(own())
            atol = 0.3 if want.dtype == torch.bfloat16 else 2e-5
            torch.testing.assert_close(states(model), want, atol=atol, rtol=1e-2)
        for parameter in model.parameters():
            parameter.data.mul_(0.9)
        torch.testing.assert_close(states(model), states(own()), atol=2e-5, rtol=2e-5)


def test_gradient_checkpointing_trains(family: str) -> None:
    if family in ("Albert", "MPNet"):
        pytest.skip("transformers computes its layers again in no backward pass")
    model = model_of(family).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    plain = copy.deepcopy(model)
    accelerate(model).gradient_checkpointing_enable()
    dout = torch.randn(int(RIGHT.sum()), 48)
    for one in (model, plain):
        with paths_taken() as taken:
            states(one).backward(dout)
        assert (sum(taken.values()) > 3) == (one is model), "each layer of ours runs twice"
    for (name, got), want in zip(model.named_parameters(), plain.parameters(), strict=True):
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, atol=1e-3, rtol=1e-3, msg=name)


def test_a_text_alone_and_among_others(family: str) -> None:
    """And each time the same to the bit."""
    model = accelerate(model_of(family))
    with torch.no_grad():
        by_column = encoder_of(model)[1].ours.config.positions == "columns"  # padding on the left moves those
        for mask in (RIGHT, RIGHT if by_column else RIGHT.flip(1)):
            ids = IDS.masked_fill(mask == 0, model.config.pad_token_id)
            together, again = (model(ids, attention_mask=mask).last_hidden_state[mask.bool()] for _ in range(2))
            assert torch.equal(together, again)
            rows = zip(IDS, mask.bool(), strict=True)
            alone = [model(ids[kept][None]).last_hidden_state[0] for ids, kept in rows]
            torch.testing.assert_close(torch.cat(alone), together, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("again", [False, True])
def test_steps_of_training_with_what_is_tied(family: str, again: bool, tmp_path: Any) -> None:
    """Those of the model's own code, and so saved."""
    model = model_of(family, "ForMaskedLM").train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    accelerate(model)
    if again and family not in ("Albert", "MPNet"):  # which can't, in transformers
        model.gradient_checkpointing_enable()
    dout = torch.randn(int(RIGHT.sum()), 60)
    for one in (model, plain, exact):
        optimizer = torch.optim.SGD(one.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            with paths_taken() as taken:
                logits = one(IDS, attention_mask=RIGHT).logits[RIGHT.bool()]
            assert (sum(taken.values()) > 0) == (one is model)
            logits.backward(dout.to(logits.dtype))
            optimizer.step()
    word, decoder = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (decoder is word) == (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight)
    model.save_pretrained(tmp_path)
    after = getattr(T, f"{family}ForMaskedLM").from_pretrained(tmp_path).state_dict()
    theirs, wanted = plain.state_dict(), exact.state_dict()
    for name in model.state_dict():
        if after[name].is_floating_point():
            assert_close(after[name], theirs[name], wanted[name], factor=3.0, what=name)


def test_dropout_is_on_in_training(family: str) -> None:
    model = accelerate(model_of(family)).train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.2  # ALBERT's is 0 by default
    assert not torch.equal(states(model), states(model))
    assert torch.equal(states(model.eval()), states(model))


def test_resized_embeddings(family: str) -> None:
    model = accelerate(model_of(family, "ForMaskedLM"))
    model.resize_token_embeddings(70)
    with torch.no_grad():
        assert model(IDS + 9, attention_mask=RIGHT).logits.shape[-1] == 70


def test_shared_layers_share_what_is_made_of_them() -> None:
    model = accelerate(model_of("Albert", num_hidden_groups=1))
    with torch.no_grad(), fastbert.use_backend("native"):
        states(model)
        _, forward = encoder_of(model)
        program = forward.ours._program(torch.zeros(1, 48))
    if program is None or program.name != "cpu":
        pytest.skip("no program of our kernels here: a CPU with AVX2 runs this")
    assert len({given["output"].matrix.data_ptr() for given in program.weights}) == 1


def test_a_torch_export_records_their_own_code() -> None:
    model = accelerate(model_of("Bert"))
    with torch.no_grad():
        want = states(model)
        exported = torch.export.export(model, (IDS,), {"attention_mask": RIGHT}, strict=False)
        got = exported.module()(IDS, attention_mask=RIGHT).last_hidden_state[RIGHT.bool()]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("model", "got"),
    [(nn.Linear(3, 3), "model: got Linear; expected a model with one of these"), ("bert", "model: got a str")],
)
def test_what_has_no_encoder_is_refused(model: Any, got: str) -> None:
    with pytest.raises(ArgumentError, match=got):
        accelerate(model)


def test_a_decoder_is_refused_and_nothing_is_changed() -> None:
    model = nn.ModuleList([model_of("Bert"), T.BertModel(T.BertConfig(**SIZES, is_decoder=True))])
    with pytest.raises(ArgumentError, match="is_decoder"):
        accelerate(model)
    assert not list(accelerated(model))


class Halved(nn.ReLU):
    """An activation that no config names."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def narrower(layer: Any) -> None:
    torch.manual_seed(1)
    layer.intermediate.dense, layer.output.dense = nn.Linear(48, 64), nn.Linear(64, 48)


def subclassed(layer: Any) -> None:
    kind = type(layer)
    layer.__class__ = type(
        "Mine", (kind,), {"forward": lambda self, x, *args, **given: kind.forward(self, 2 * x, *args, **given)}
    )


def in_place(parent: nn.Module, name: str, made: nn.Module) -> None:
    setattr(parent, name, made)


CHANGES: dict[str, Any] = {
    "layers removed": lambda layers: layers.__delitem__(slice(1, None)),
    "a layer twice": lambda layers: layers.append(layers[0]),
    "a layer of another": lambda layers: layers.__setitem__(0, copy.deepcopy(layers[2])),
    "a group of another": lambda layers: in_place(layers[0], "intermediate", copy.deepcopy(layers[2].intermediate)),
    "attention of another": lambda layers: in_place(layers[0], "attention", copy.deepcopy(layers[2].attention)),
    "an activation": lambda layers: in_place(layers[0].intermediate, "intermediate_act_fn", Halved()),
    "eps": lambda layers: setattr(layers[0].output.LayerNorm, "eps", 0.1),
    "a subclass": lambda layers: subclassed(layers[0]),
    "a method": lambda layers: setattr(layers[0], "feed_forward_chunk", lambda x: 2 * x),
    "a narrower feed-forward": lambda layers: narrower(layers[0]),
    "an adapter": lambda layers: in_place(
        layers[0].attention.output, "dense", Adapted(layers[0].attention.output.dense)
    ),
    "another norm": lambda layers: in_place(layers[0].output, "LayerNorm", nn.LayerNorm(48, elementwise_affine=False)),
    "a hook on a norm": lambda layers: layers[0].output.LayerNorm.register_forward_hook(lambda *given: 2 * given[-1]),
    "a hook on an activation": lambda layers: layers[0].intermediate.intermediate_act_fn.register_forward_hook(
        lambda *given: 2 * given[-1]
    ),
    "a dropout of everything": lambda layers: in_place(layers[0].output, "dropout", nn.Dropout(1.0)),
    "scaling": lambda layers: setattr(layers[0].attention.self, "scaling", 1.0),
}


@pytest.mark.filterwarnings("ignore:.*runs its own code")
@pytest.mark.parametrize("path", ["native", "torch"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_others_change(change: str, when: str, path: Any) -> None:
    model = model_of("Bert")
    want_of = copy.deepcopy(model)
    if when == "before":
        torch.manual_seed(2)
        CHANGES[change](model.encoder.layer)
    accelerate(model)
    with torch.no_grad(), fastbert.use_backend(path):
        states(model)
        if when == "after":
            torch.manual_seed(2)
            CHANGES[change](model.encoder.layer)
        torch.manual_seed(2)
        CHANGES[change](want_of.encoder.layer)
        torch.testing.assert_close(states(model), states(want_of), atol=2e-5, rtol=2e-5)


def test_another_attention_is_not_passed_over() -> None:
    model = accelerate(model_of("Bert"))
    T.AttentionInterface.register("mine", lambda module, q, k, v, *args, **given: (0 * q.transpose(1, 2), None))
    with torch.no_grad():
        model.set_attn_implementation("mine")
        with pytest.warns(UserWarning, match="the attention implementation 'mine'"):
            got = states(model)
        torch.testing.assert_close(got, states(restore(model)))


def test_a_forward_that_was_replaced_is_refused() -> None:
    model = model_of("Bert")
    model.encoder.forward = lambda *args, **given: None
    with pytest.raises(ArgumentError, match="a forward that was replaced"):
        accelerate(model)
    assert "forward" in model.encoder.__dict__
    for do in (restore, verify):
        with pytest.raises(ArgumentError, match="model: got a str"):
            do("x")


@pytest.mark.long
def test_it_compiles() -> None:
    model = model_of("Bert")
    with torch.no_grad():
        want = states(model)
        torch.testing.assert_close(
            states(torch.compile(accelerate(model), backend="eager")), want, atol=2e-5, rtol=2e-5
        )


def test_a_layer_that_can_not_be_read_is_never_passed_over() -> None:
    """And when it can be read again, it is."""
    model = accelerate(model_of("Bert"))
    own, broken = model.encoder.layer[0], model_of("Bert").encoder.layer[1]
    del broken.attention.self.key
    broken.attention.self.forward = lambda x, *args, **given: (x, None)
    with torch.no_grad():
        want = states(model)
        model.encoder.layer[0] = broken
        for _ in range(2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.testing.assert_close(states(model), states(restore(copy.deepcopy(model))))
        model.encoder.layer[0] = own
        with paths_taken() as taken:
            torch.testing.assert_close(states(model), want)
    assert taken
