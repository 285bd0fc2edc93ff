"""Gradients of gradients: a penalty on a gradient, in training mode too. They are right, or an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_accelerate import FAMILIES, model_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert import accelerate
from fastbert.ops.attention import attention
from fastbert.ops.cross_entropy import linear_cross_entropy
from fastbert.ops.dropout import drop
from fastbert.ops.linear import linear
from fastbert.ops.pooling import pool
from fastbert.packing import Packing


@pytest.mark.parametrize("lengths", [[3, 2], [1, 4], [2, 2]])
def test_attention_with_dropout(lengths: list[int]) -> None:
    torch.manual_seed(0)
    packing = Packing.from_lengths(lengths)
    qkv = torch.randn(sum(lengths) + 1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([5])

    def run(x: Tensor) -> Tensor:
        return attention(x, packing, dropout=0.3, seed=seed)

    assert torch.autograd.gradcheck(run, (qkv,))
    assert torch.autograd.gradgradcheck(run, (qkv,))


@pytest.mark.parametrize("frozen", [(), ("x",), ("weight", "bias")])
def test_a_loss_that_makes_its_logits_twice(frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    leaves = {"x": torch.randn(4, 3), "weight": torch.randn(5, 3), "bias": torch.randn(5)}
    leaves = {name: x.double().requires_grad_(name not in frozen) for name, x in leaves.items()}
    labels = torch.tensor([1, -100, 4, 0])

    def run(*given: Tensor) -> Tensor:
        return linear_cross_entropy(*given, labels)

    assert torch.autograd.gradgradcheck(run, tuple(leaves.values()))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_accelerated_model_in_training(family: str) -> None:
    model = accelerate(model_of(family)).double().train()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.2
        if isinstance(getattr(part, "attention_dropout", None), float):
            part.attention_dropout = 0.2
    torch.manual_seed(1)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    width = model.get_input_embeddings().embedding_dim
    x, along, weights = (torch.randn(2, 3, width, dtype=torch.float64) for _ in range(3))

    def gradient(x: Tensor) -> Tensor:
        torch.manual_seed(7)
        out = model(inputs_embeds=x, attention_mask=mask).last_hidden_state[mask.bool()]
        dout = torch.linspace(-1, 1, out.shape[1], dtype=torch.float64).expand_as(out)
        return torch.autograd.grad(out, x, dout, create_graph=True)[0]

    with sdpa_kernel(SDPBackend.MATH):  # torch has no second gradient of the others
        at = x.clone().requires_grad_()
        (got,) = torch.autograd.grad(gradient(at), at, weights)
        near = [gradient((x + step * along).requires_grad_()) for step in (1e-5, -1e-5)]
    wanted = ((near[0] - near[1]) * weights).sum() / 2e-5
    torch.testing.assert_close((got * along).sum(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["linear", "dropped attention", "dropout", "maximum", "cross entropy"])
def test_many_gradients_at_once(name: str, generator: torch.Generator) -> None:
    """torch.autograd.grad(is_grads_batched=True), as one after another; the others are in test_cpu."""
    x = torch.randn(80, 16, generator=generator, requires_grad=True)
    packing, seed = Packing.from_lengths([50, 30]), torch.tensor([3])
    weight, labels = torch.randn(24, 16, generator=generator), torch.arange(80) % 24
    run: Callable[[], Tensor] = {
        "linear": lambda: linear(x, weight, None),
        "dropped attention": lambda: attention(
            torch.stack([x, 2 * x, x], 1).unflatten(2, (2, 8)), packing, dropout=0.1, seed=seed
        ),
        "dropout": lambda: drop(x, seed, 0.1),
        "maximum": lambda: pool(x, packing, "max"),
        "cross entropy": lambda: linear_cross_entropy(x, weight, None, labels),
    }[name]
    out = run()
    dout = torch.randn(3, *out.shape, generator=generator)
    [found] = torch.autograd.grad(out, x, dout, is_grads_batched=True)
    for one, made in zip(dout, found, strict=True):
        torch.testing.assert_close(made, torch.autograd.grad(run(), x, one)[0], rtol=1e-4, atol=1e-5)
