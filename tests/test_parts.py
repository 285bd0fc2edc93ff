"""The parameters of queries, keys and values lie side by side in memory, whatever moves them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert import backend
from fastbert.run import parts
from fastbert.run.parts import SelfAttention

CONFIG = fastbert.EncoderConfig(num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32)
MOVES = {
    "no move": lambda model: model,
    "to where it is": lambda model: model.to("cpu"),
    "to the dtype it has": lambda model: model.float(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "half twice": lambda model: model.half().half(),
    "there and back": lambda model: model.double().float(),
    "deepcopy": lambda model: copy.deepcopy(model).to("cpu"),
    "one layer": lambda model: model.layer[1].double() and model,
}


class Copies(TorchDispatchMode):
    """Counts concatenations."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten.cat.default
        return func(*args, **(kwargs or {}))


def attentions(model) -> list[SelfAttention]:
    return [part for part in model.modules() if isinstance(part, SelfAttention)]


def check(model, monkeypatch, *, copies=0) -> None:
    """The joined tensors are right, with gradients and without, and made by so many copies for each attention."""
    monkeypatch.setattr(parts, "observed", lambda: False)  # Copies must not change what it counts
    for part in attentions(model):
        linears = part.query, part.key, part.value
        for grad in (False, True):
            with torch.set_grad_enabled(grad), Copies() as seen:
                weight, bias = part.joined()
            assert seen.number == copies
            assert torch.equal(weight, torch.cat([one.weight for one in linears]))
            assert torch.equal(bias, torch.cat([one.bias for one in linears]))


@pytest.mark.parametrize("name", MOVES)
def test_no_copy_after(name, monkeypatch):
    check(MOVES[name](fastbert.Encoder(CONFIG)), monkeypatch)


@pytest.mark.parametrize("name", [name for name in MOVES if name != "deepcopy"])
def test_a_move_keeps_the_parameters_and_what_they_are(name):
    model = fastbert.Encoder(CONFIG)
    frozen = "layer.0.attention.self.key.weight"
    model.get_parameter(frozen).requires_grad = False
    before = dict(model.named_parameters())
    values = {name: one.detach().clone() for name, one in before.items()}
    for one in before.values():
        one.grad = torch.ones_like(one) if one.requires_grad else None
    after = dict(MOVES[name](model).named_parameters())
    assert after.keys() == before.keys()
    for key, one in after.items():
        assert one is before[key]
        assert one.requires_grad == (key != frozen)
        assert (one.grad is None) == (key == frozen)
        assert one.grad is None or (one.grad == 1).all()
        torch.testing.assert_close(one.detach(), values[key], check_dtype=False, rtol=1e-2, atol=1e-3)


def test_a_move_to_where_it_is_keeps_the_addresses():
    """A CUDA graph may hold them."""
    model = fastbert.Encoder(CONFIG)
    before = [one.data_ptr() for one in model.parameters()]
    assert [one.data_ptr() for one in model.to("cpu").float().parameters()] == before


def test_no_copy_for_parameters_that_an_allocator_put_side_by_side(monkeypatch):
    """CUDA's does: large weights come from one pool, one after another, and the biases between them from another."""
    model = fastbert.Encoder(CONFIG)
    for part in attentions(model):
        for name in ("weight", "bias"):
            parameters = [one.get_parameter(name) for one in (part.query, part.key, part.value)]
            whole = torch.cat([one.detach() for one in parameters])
            for one, place in zip(parameters, whole.chunk(3), strict=True):
                one.data = place
    model.join()
    check(model, monkeypatch)


def test_no_copy_in_a_model_from_a_folder(tmp_path, monkeypatch):
    config = replace(CONFIG, vocab_size=9)
    fastbert.save(fastbert.BertModel(config), tmp_path)
    check(fastbert.load(tmp_path, fastbert.BertModel, device="cpu"), monkeypatch)


def test_parameters_that_were_assigned_are_copied_until_the_next_move(monkeypatch):
    model = fastbert.Encoder(CONFIG)
    model.load_state_dict({name: one + 1 for name, one in model.state_dict().items()}, assign=True)
    check(model, monkeypatch, copies=2)
    check(model.to("cpu"), monkeypatch)


def test_weights_transposed_where_they_lie_are_read_transposed(monkeypatch):
    model = fastbert.Encoder(CONFIG)
    for part in attentions(model):
        part.key.weight.data = part.key.weight.data.t()
    check(model, monkeypatch, copies=2)
    check(model.to("cpu"), monkeypatch)


@pytest.mark.parametrize("names", [["query"], ["dense"], ["query", "key", "value", "dense"], ["LayerNorm"]], ids=str)
@pytest.mark.parametrize("path", ["torch", "triton", None])
def test_hooks_see_no_slack_and_the_layer_keeps_it(path: str | None, names: list[str]) -> None:
    """oneDNN gets rows rounded up on some CPUs, and a graph a bucket's; whose output is packed again has fewer."""
    config = fastbert.EncoderConfig(hidden_size=32, num_heads=2, intermediate_size=48, num_layers=1)
    torch.manual_seed(0)
    layer = fastbert.Encoder(config).layer[0].eval()
    packing, x = fastbert.Packing.from_lengths([5, 0, 9]), torch.randn(20, 32)
    seen: list[tuple[int, ...]] = []
    with torch.no_grad(), backend.use_backend(path) if path else nullcontext():
        plain = layer(x, packing)
        for name, module in layer.named_modules():
            if name.rsplit(".")[-1] in names:
                module.register_forward_hook(lambda module, inputs, out: seen.append(tuple(out.shape[:2])))
        hooked = layer(x, packing)
    assert hooked.shape == plain.shape and seen and set(seen) == {(3, 9)}
    torch.testing.assert_close(hooked[:14], plain[:14], rtol=1e-4, atol=1e-5)


def test_a_hooked_layer_keeps_the_slack() -> None:
    encoder = fastbert.Encoder(fastbert.EncoderConfig(hidden_size=32, num_heads=2, intermediate_size=48, num_layers=2))
    encoder.layer[0].register_forward_hook(lambda module, inputs, out: out + 1.0)
    with torch.no_grad():
        states = encoder.eval().run(torch.randn(20, 32), fastbert.Packing.from_lengths([5, 0, 9]))
    assert [state.shape for state in states] == [(20, 32)] * 3
