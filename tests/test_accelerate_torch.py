"""`fastbert.accelerate` on `torch.nn.TransformerEncoder`: the same numbers, the same objects, and the way back."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from fastbert import accelerate, paths_taken, restore, use_backend, verify, weights_changed
from fastbert.errors import ArgumentError, BackendError
from fastbert.families.accelerated import accelerated
from fastbert.testing import assert_close

WIDTH, HEADS, BATCH, SEQLEN = 48, 3, 4, 9
KINDS: dict[str, dict[str, Any]] = {
    "post": {"batch_first": True},
    "post, columns": {"activation": "gelu"},
    "post, norm": {"norm": True, "bias": False, "layer_norm_eps": 1e-3},
    "pre": {"norm_first": True, "activation": "gelu"},
    "pre, norm": {"norm_first": True, "norm": True, "batch_first": True, "activation": nn.GELU("tanh")},
    "pre, no bias": {"norm_first": True, "norm": True, "bias": False},
}
RIGHT = torch.arange(SEQLEN) >= torch.tensor([[SEQLEN], [4], [1], [6]])  # True is padding, as torch has it
HOLES = RIGHT.clone()
HOLES[0, 3], HOLES[3, 2] = True, True
PADDING = {"right": RIGHT, "left": RIGHT.flip(1), "holes": HOLES, "none": None}
X = torch.randn(BATCH, SEQLEN, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def encoder_of(kind: str, **changes: Any) -> Any:
    """In eval mode, without dropout; nothing of its weights is a unit."""
    options = {"dropout": 0.0, **KINDS[kind], **changes}
    norm = nn.LayerNorm(WIDTH) if options.pop("norm", False) else None
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 80, **options)
    encoder = nn.TransformerEncoder(layer, 3, norm=norm, enable_nested_tensor=False).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return encoder


def states(encoder: Any, padding: Tensor | None = RIGHT, mask: Tensor | None = None, x: Tensor = X) -> Tensor:
    """Rows that are no padding."""
    first = next(layer for layer in encoder.modules() if isinstance(layer, nn.MultiheadAttention)).batch_first
    x = x.to(next(encoder.parameters()).dtype)
    out = encoder(x if first else x.transpose(0, 1), mask, src_key_padding_mask=padding)
    out = out if first else out.transpose(0, 1)
    return out.flatten(0, 1) if padding is None else out[~padding]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("path", ["native", "torch"])
def test_inference(kind: str, padding: str, path: Any) -> None:
    encoder, given = encoder_of(kind), PADDING[padding]
    poisoned = X if given is None else X.masked_fill(given[..., None], torch.nan)
    with torch.no_grad(), use_backend(path):
        plain, exact = states(encoder, given), states(copy.deepcopy(encoder).double(), given)
        before, state = dict(encoder.named_parameters()), list(encoder.state_dict())
        assert accelerate(encoder, strict=True) is encoder
        with paths_taken() as taken:
            got = states(encoder, given, x=poisoned)
    assert sum(taken.values()) > 0
    assert_close(got, plain, exact, factor=3.0)
    after = dict(encoder.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(encoder.state_dict()) == state


def grid(dtype: Any, *shape: int) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if dtype != torch.bool:
        return drawn.to(dtype)
    hidden = drawn > 0.3
    return hidden & ~torch.eye(SEQLEN, dtype=torch.bool)  # a token sees itself


MASKS = {
    "bool": grid(torch.bool, SEQLEN, SEQLEN),
    "floating": grid(torch.float32, SEQLEN, SEQLEN),
    "of heads": grid(torch.float32, BATCH * HEADS, SEQLEN, SEQLEN),
    "bool of heads": grid(torch.bool, BATCH * HEADS, SEQLEN, SEQLEN),
    "a key that none sees": (torch.arange(SEQLEN) == 2).expand(SEQLEN, SEQLEN),  # and that sees the others
    "causal": nn.Transformer.generate_square_subsequent_mask(SEQLEN),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masks(kind: str, name: str, padded: bool) -> None:
    padding, mask = RIGHT if padded else None, MASKS[name]
    if padded and name in ("bool", "bool of heads", "a key that none sees"):  # else torch has NaN where all is hidden
        mask = mask & (torch.arange(SEQLEN) != 0)
    encoder = encoder_of(kind)
    with torch.no_grad():
        plain = states(encoder, padding, mask)
        wide = mask if mask.dtype == torch.bool else mask.double()
        exact = states(copy.deepcopy(encoder).double(), padding, wide)
        got = states(accelerate(encoder, strict=True), padding, mask)
    assert_close(got, plain, exact, factor=3.0)


def test_padding_as_numbers(kind: str) -> None:
    encoder = encoder_of(kind)
    added = torch.randn(BATCH, SEQLEN).masked_fill(RIGHT, -torch.inf)
    with torch.no_grad():
        for given in (torch.zeros(BATCH, SEQLEN).masked_fill(RIGHT, -torch.inf), added):
            first = encoder.layers[0].self_attn.batch_first
            x = X if first else X.transpose(0, 1)
            want = encoder(x, src_key_padding_mask=given)
            got = accelerate(copy.deepcopy(encoder), strict=True)(x, src_key_padding_mask=given)
            want, got = (out if first else out.transpose(0, 1) for out in (want, got))
            torch.testing.assert_close(got[~RIGHT], want[~RIGHT], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_gradients(kind: str, masked: bool) -> None:
    encoder = encoder_of(kind).train()
    rows = int((~RIGHT).sum())
    grads = []
    dout = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(2))
    for one in (copy.deepcopy(encoder), accelerate(copy.deepcopy(encoder), strict=True), encoder.double()):
        dtype = next(one.parameters()).dtype
        x = X.to(dtype).requires_grad_()
        mask = grid(dtype, SEQLEN, SEQLEN).requires_grad_() if masked else None
        padding = torch.zeros(RIGHT.shape, dtype=dtype).masked_fill(RIGHT, -torch.inf) if masked else RIGHT
        first = one.layers[0].self_attn.batch_first
        out = one(x if first else x.transpose(0, 1), mask, padding)
        out = (out if first else out.transpose(0, 1))[~RIGHT]
        named = {"x": x, **({"mask": mask} if masked else {}), **dict(one.named_parameters())}
        grads.append(dict(zip(named, torch.autograd.grad(out, list(named.values()), dout.to(dtype)), strict=True)))
    plain, got, exact = grads
    for name in exact:
        assert_close(got[name], plain[name], exact[name], factor=3.0, ulps=16.0, what=name)


def test_one_token_and_a_sequence_of_none(kind: str) -> None:
    """A sequence that is all padding is 0 before the last norm, where torch has NaN; the others are as they were."""
    encoder = encoder_of(kind)
    padding = RIGHT.clone()
    padding[1] = True
    with torch.no_grad():
        want = states(encoder)[torch.tensor([0] * 9 + [1] * 4 + [0] * 7) == 0]
        got = states(accelerate(encoder, strict=True), padding)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
        one = states(encoder, None, x=X[:1, :1])
        torch.testing.assert_close(one, states(restore(encoder), None, x=X[:1, :1]), atol=2e-5, rtol=2e-5)


def test_a_token_that_sees_nothing_attends_to_nothing() -> None:
    encoder = encoder_of("post")
    encoder.layers = encoder.layers[:1]
    layer, mask = encoder.layers[0], torch.zeros(SEQLEN, SEQLEN, dtype=torch.bool)
    mask[2] = True
    with torch.no_grad():
        want, got = encoder(X), accelerate(encoder, strict=True)(X, mask)
        summed = layer.norm1(X[:, 2] + layer.self_attn.out_proj.bias)
        want[:, 2] = layer.norm2(summed + layer.linear2(layer.linear1(summed).relu()))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_padding_is_zero_before_the_last_norm(kind: str) -> None:
    encoder = accelerate(encoder_of(kind), strict=True)
    first = encoder.layers[0].self_attn.batch_first
    with torch.no_grad():
        out = encoder(X if first else X.transpose(0, 1), src_key_padding_mask=RIGHT)
        out = (out if first else out.transpose(0, 1))[RIGHT]
        zero = torch.zeros(WIDTH)
        want = zero if encoder.norm is None else encoder.norm(zero)
    assert torch.equal(out, want.expand_as(out))


def test_padding_is_as_in_torchs_nested_path() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 80, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH, bias=True)).eval()
    nn.init.normal_(encoder.norm.bias)
    with torch.no_grad():
        want = encoder(X, src_key_padding_mask=RIGHT)
        assert torch.allclose(want[RIGHT], encoder.norm.bias)  # torch took that path
        got = accelerate(encoder, strict=True)(X, src_key_padding_mask=RIGHT)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_restored_to_the_bit(kind: str) -> None:
    encoder = encoder_of(kind)
    with torch.no_grad():
        want = states(encoder)
        states(accelerate(encoder))
        assert restore(encoder) is encoder and not list(accelerated(encoder))
        assert torch.equal(states(encoder), want)


def test_verify(kind: str) -> None:
    found = verify(accelerate(nn.ModuleDict({"inner": encoder_of(kind)})))
    assert found[0].name == "TransformerEncoder: output" and len(found) > 20
    assert all(one.difference <= 5 * one.rounding + 1e-6 for one in found)


def dropping(encoder: nn.Module, where: str, p: float) -> None:
    for layer in encoder.layers:
        if where == "attention":
            layer.self_attn.dropout = p
        else:
            layer.get_submodule(where).p = p


@pytest.mark.parametrize("where", ["attention", "dropout", "dropout1", "dropout2"])
def test_each_dropout(kind: str, where: str) -> None:
    """Drawn anew in training, off in eval mode; on average what it is without."""
    encoder = accelerate(encoder_of(kind), strict=True).train()
    with torch.no_grad():
        want = states(encoder)
        dropping(encoder, where, 0.2)
        drawn = [states(encoder) for _ in range(2)]
        assert not torch.equal(*drawn) and not torch.equal(drawn[0], want)
        torch.testing.assert_close(states(encoder.eval()), want, atol=2e-5, rtol=2e-5)
        dropping(encoder.train(), where, 1.0)
        with pytest.raises(BackendError, match="a dropout of everything"):
            states(encoder)


def test_dropout_inside_the_feed_forward_drops_after_the_activation() -> None:
    """Of one layer whose second product counts: how many of its inputs are dropped, by how much the others grow."""
    encoder = encoder_of("pre")
    encoder.layers = encoder.layers[:1]
    layer = encoder.layers[0]
    with torch.no_grad():
        for parameter in (layer.self_attn.out_proj.weight, layer.self_attn.out_proj.bias, layer.linear1.weight):
            parameter.zero_()
        layer.linear1.bias.fill_(8.0)  # GELU of it is 8 to float32's last digit
        layer.linear2.weight.fill_(1.0)
        layer.linear2.bias.zero_()
        layer.dropout.p = 0.25
        added = states(accelerate(encoder, strict=True).train(), None) - X.flatten(0, 1)
    counted = added * 0.75 / 8.0
    torch.testing.assert_close(counted, counted.round(), atol=1e-3, rtol=0.0)
    assert abs(float(counted.mean()) / 80 - 0.75) < 0.05 and counted[:, 0].std() > 1


def test_gradients_of_a_dropout_inside_are_those_of_its_mask() -> None:
    encoder = accelerate(encoder_of("post").double(), strict=True).train()
    dropping(encoder, "dropout", 0.3)
    weight = encoder.layers[1].linear1.weight

    def total() -> Tensor:
        torch.manual_seed(7)
        return states(encoder).sin().sum()

    (gradient,) = torch.autograd.grad(total(), weight)
    step = torch.zeros_like(weight)
    step[5, 7] = 1e-6
    with torch.no_grad():
        high = weight.add_(step) is weight and total()
        low = weight.sub_(2 * step) is weight and total()
    torch.testing.assert_close((high - low) / 2e-6, gradient[5, 7], atol=1e-6, rtol=1e-5)


def test_hooks(kind: str) -> None:
    encoder = accelerate(encoder_of(kind))
    with torch.no_grad():
        want, seen = states(encoder), []
        for name in ("", "layers.0.linear1", "layers.1.linear2", "layers.0.norm1", "layers.2.norm2"):
            encoder.get_submodule(name).register_forward_hook(lambda m, x, y, name=name: seen.append((name, y.dim())))
        torch.testing.assert_close(states(encoder), want, atol=2e-5, rtol=2e-5)
        assert len(seen) == 5 and all(dim == 3 for _, dim in seen)  # in the padded layout
        encoder.layers[0].linear1.register_forward_hook(lambda m, x, y: 2 * y)
        torch.testing.assert_close(states(encoder), states(restore(copy.deepcopy(encoder))), atol=2e-5, rtol=2e-5)
        for name in ("layers.0", "layers.0.self_attn", "layers.0.self_attn.out_proj", "layers.1.dropout1"):
            handle = encoder.get_submodule(name).register_forward_hook(lambda *_: None)
            accelerate(encoder, strict=True)
            with pytest.raises(BackendError, match="a hook on a module"):
                states(encoder)
            handle.remove()


class Adapted(nn.Module):
    """What an adapter puts in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.added = base, nn.Linear(base.in_features, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.added(x)


def activate(layers: Any, made: Any) -> None:
    for layer in layers:
        layer._modules.pop("activation", None)
        layer.activation = made


def halved(x: Tensor) -> Tensor:
    return x / 2


class Mine(nn.TransformerEncoderLayer):
    """A layer of the user's."""

    def forward(self, src: Tensor, *args: Any, **given: Any) -> Tensor:
        return 2 * super().forward(src, *args, **given)


def other(layer: nn.Module) -> Any:
    made = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(0.7)
    return made


def parameter_of(module: nn.Module, name: str) -> None:
    module._parameters[name] = nn.Parameter(torch.randn_like(module._parameters[name]))


# What others do, and whether fastbert still computes it.
CHANGES: dict[str, tuple[Any, bool]] = {
    "layers removed": (lambda e: e.layers.__delitem__(slice(1, None)), True),
    "a layer twice": (lambda e: e.layers.append(e.layers[0]), True),
    "a layer of another": (lambda e: e.layers.__setitem__(0, other(e.layers[0])), True),
    "attention of another": (lambda e: setattr(e.layers[1], "self_attn", other(e.layers[1].self_attn)), True),
    "its output of another": (
        lambda e: setattr(e.layers[1].self_attn, "out_proj", other(e.layers[1].self_attn.out_proj)),
        True,
    ),
    "a parameter of another": (lambda e: parameter_of(e.layers[1].self_attn, "in_proj_weight"), True),
    "an activation": (lambda e: activate(e.layers, nn.functional.silu), True),
    "unequal activations": (lambda e: activate(e.layers[:1], nn.functional.silu), False),
    "an activation of the user's": (lambda e: activate(e.layers[:1], halved), False),
    "heads": (lambda e: setattr(e.layers[0].self_attn, "num_heads", 4), False),
    "a norm at the end": (lambda e: setattr(e, "norm", nn.RMSNorm(WIDTH)), True),
    "eps": (lambda e: setattr(e.layers[0].norm1, "eps", 0.1), True),
    "another norm": (lambda e: setattr(e.layers[0], "norm1", nn.RMSNorm(WIDTH)), True),
    "an adapter": (lambda e: setattr(e.layers[0], "linear1", Adapted(e.layers[0].linear1)), True),
    "quantized": (lambda e: torch.ao.quantization.quantize_dynamic(e, {nn.Linear}, torch.qint8, inplace=True), True),
    "a subclass": (lambda e: setattr(e.layers[0], "__class__", Mine), False),
    "a method": (lambda e: setattr(e.layers[0], "_ff_block", halved), False),
    "pruned": (lambda e: prune.l1_unstructured(e.layers[0].self_attn, "in_proj_weight", 0.5), False),
    "pruned linear": (lambda e: prune.l1_unstructured(e.layers[0].linear2, "weight", 0.5), True),
    "parametrized": (
        lambda e: parametrize.register_parametrization(e.layers[0].self_attn, "in_proj_weight", nn.Tanh()),
        False,
    ),
    "frozen": (lambda e: e.layers[0].requires_grad_(False), True),
    "written": (lambda e: [p.data.mul_(0.9) for p in e.parameters()], True),
}


@pytest.mark.filterwarnings("ignore:.*runs its own code", "ignore:torch.ao", "ignore:.*deprecated")
@pytest.mark.parametrize("kind", ["post", "pre, norm"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_others_change(change: str, when: str, kind: str) -> None:
    (act, served), encoder = CHANGES[change], encoder_of(kind)
    wanted = copy.deepcopy(encoder)
    act_on = torch.random.fork_rng
    with torch.no_grad():
        with act_on():
            torch.manual_seed(3)
            act(wanted)
        want = states(wanted, None)  # a quantized one takes its range from what is there
        if when == "after":
            states(accelerate(encoder), None)
        with act_on():
            torch.manual_seed(3)
            act(encoder)
        weights_changed()
        if when == "before" and not served:
            try:
                accelerate(encoder)
            except ArgumentError:
                assert not list(accelerated(encoder))
                return
        elif when == "before":
            accelerate(encoder)
        with paths_taken() as taken:
            for _ in range(2):
                torch.testing.assert_close(states(encoder, None), want, atol=2e-5, rtol=2e-5)
        assert bool(taken) is served


@pytest.mark.parametrize("how", ["deepcopy", "pickled"])
def test_copies(kind: str, how: str) -> None:
    encoder = accelerate(encoder_of(kind), strict=True)
    with torch.no_grad():
        want = states(encoder)
        made = copy.deepcopy(encoder) if how == "deepcopy" else pickle.loads(pickle.dumps(encoder))
        [(theirs, forward)] = accelerated(made)
        assert theirs is made and forward.theirs is made
        for parameter in made.parameters():
            parameter.mul_(1.5)
        assert not torch.allclose(states(made), want, atol=1e-2)
        torch.testing.assert_close(states(made), states(restore(made)), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(states(encoder), want)


def test_moved_and_cast_and_loaded(kind: str) -> None:
    encoder = accelerate(encoder_of(kind), strict=True)
    with torch.no_grad():
        states(encoder)
        for change in (lambda: encoder.bfloat16(), lambda: encoder.double(), lambda: encoder.float()):
            change()
            want = states(restore(copy.deepcopy(encoder)))
            atol = 0.2 if want.dtype == torch.bfloat16 else 2e-5
            torch.testing.assert_close(states(encoder), want, atol=atol, rtol=1e-2)
        state = {name: x * 0.9 for name, x in encoder.state_dict().items()}
        for assign in (False, True):
            encoder.load_state_dict(state, assign=assign)
            torch.testing.assert_close(states(encoder), states(restore(copy.deepcopy(encoder))), atol=2e-5, rtol=2e-5)


def test_a_step_of_an_optimizer_is_seen(kind: str) -> None:
    encoder = accelerate(encoder_of(kind), strict=True).train()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    out = states(encoder)
    out.backward(torch.randn_like(out))
    optimizer.step()
    with torch.no_grad():
        for mode in (True, False):
            want = states(restore(copy.deepcopy(encoder.train(mode))))
            torch.testing.assert_close(states(encoder), want, atol=2e-4, rtol=2e-4)


UNSERVED: dict[str, tuple[Any, str]] = {
    "is_causal": (lambda e: e(X, MASKS["causal"], is_causal=True), "is_causal"),
    "a mask of another shape": (lambda e: e(X, torch.zeros(2, 2)), "mask of another shape"),
    "one sequence": (lambda e: e(X[0]), "not .batch, seqlen, hidden."),
    "nested": (lambda e: e(torch.nested.nested_tensor([X[0], X[1, :4]])), "a nested tensor"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", UNSERVED)
def test_what_is_not_served_runs_its_own_code_and_says_so_once(name: str) -> None:
    call, reason = UNSERVED[name]
    encoder = encoder_of("post")
    own = copy.deepcopy(encoder)
    accelerate(encoder)

    def result(one: Any) -> Any:
        try:
            with torch.no_grad():
                return call(one)
        except (RuntimeError, AssertionError) as error:
            return str(error)

    with pytest.warns(UserWarning, match=f"runs its own code, not fastbert's: .*{reason}"):
        got = result(encoder)
    want = result(own)
    assert torch.equal(got, want) if isinstance(want, Tensor) else got == want
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result(encoder)
    with pytest.raises(BackendError, match=reason):
        call(accelerate(encoder, strict=True))


def test_another_model_holds_it() -> None:
    """nn.Transformer's decoder is left alone."""
    model = nn.Transformer(WIDTH, HEADS, 2, 1, 80, batch_first=True).eval()
    with torch.no_grad():
        want = model(X, X[:, :4], src_key_padding_mask=RIGHT, memory_key_padding_mask=RIGHT)
        accelerate(model, strict=True)
        with paths_taken() as taken:
            got = model(X, X[:, :4], src_key_padding_mask=RIGHT, memory_key_padding_mask=RIGHT)
    assert taken and [type(one) for one, _ in accelerated(model)] == [nn.TransformerEncoder]
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_a_torch_export_records_its_own_code() -> None:
    encoder = accelerate(encoder_of("post"))
    with torch.no_grad():
        want = encoder(X)
        got = torch.export.export(encoder, (X,), strict=False).module()(X)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["post", "pre, norm"])
def test_it_compiles(kind: str) -> None:
    """And sees parameters that are put in the places of others."""
    encoder = encoder_of(kind)
    own = copy.deepcopy(encoder)
    compiled = torch.compile(accelerate(encoder), backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(states(compiled), states(own), atol=2e-5, rtol=2e-5)
        state = {name: x * 0.9 for name, x in own.state_dict().items()}
        encoder.load_state_dict(state, assign=True)
        own.load_state_dict(state)
        torch.testing.assert_close(states(compiled), states(own), atol=2e-5, rtol=2e-5)
    out, plain = states(compiled.train()), states(own.train())
    dout = torch.randn_like(plain)
    out.backward(dout)
    plain.backward(dout)
    for (name, got), want in zip(encoder.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, atol=1e-3, rtol=1e-3, msg=name)
