from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastbert import reference
from fastbert.errors import ArgumentError
from fastbert.ops.rotary import angles_of_places, rotary
from fastbert.packing import Packing
from fastbert.testing import assert_close

BASE = 10_000.0


def numbers(packing: Packing, dtype: torch.dtype, generator: torch.Generator, slack: int = 0) -> Tensor:
    """With every second row of its memory between its own."""
    x = torch.randn(2 * (packing.tokens + slack), 3, 2, 6, generator=generator).to(dtype)
    return x[::2]


def exactly(qkv: Tensor, packing: Packing, dtype: torch.dtype) -> Tensor:
    return reference.rotary(qkv.to(dtype), reference.rotary_angles(packing, qkv.shape[3], BASE, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_forward_and_backward(dtype: torch.dtype, generator: torch.Generator) -> None:
    packing = Packing.from_lengths([7, 0, 300, 1])
    qkv = numbers(packing, dtype, generator, slack=3).detach().requires_grad_()
    dout = torch.randn(qkv.shape, generator=generator).to(dtype)
    plain_qkv, exact_qkv = qkv.detach().clone().requires_grad_(), qkv.detach().double().requires_grad_()
    out = rotary(qkv, packing, BASE)
    assert out.dtype == dtype
    plain, exact = exactly(plain_qkv, packing, dtype), exactly(exact_qkv, packing, torch.float64)
    assert_close(out, plain, exact)
    torch.testing.assert_close(out[:, 2], qkv[:, 2], atol=0, rtol=0)
    torch.testing.assert_close(out[packing.tokens :], qkv[packing.tokens :], atol=0, rtol=0)
    grads = [
        torch.autograd.grad(y, x, dout.to(y.dtype))[0] for y, x in ((out, qkv), (plain, plain_qkv), (exact, exact_qkv))
    ]
    assert_close(*grads)


def test_it_is_transformers(generator: torch.Generator) -> None:
    modeling = pytest.importorskip("transformers.models.modernbert.modeling_modernbert", reason="what is compared with")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    packing = Packing.from_mask(mask)
    padded = torch.randn(2, 5, 3, 2, 8, generator=generator, dtype=torch.float64)
    places = torch.arange(5, dtype=torch.float64)[:, None] * BASE ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    cos, sin = (torch.cat([turn, turn], -1)[None] for turn in (places.cos(), places.sin()))
    query, key, _ = padded.permute(2, 0, 3, 1, 4)
    wanted = torch.stack([*modeling.apply_rotary_pos_emb(query, key, cos, sin)]).permute(1, 3, 0, 2, 4)
    got = rotary(packing.pack(padded), packing, BASE)
    torch.testing.assert_close(got[:, :2], packing.pack(wanted.double()), atol=1e-6, rtol=0)


def test_a_score_depends_on_the_distance_alone(generator: torch.Generator) -> None:
    query, key = torch.randn(2, 64, generator=generator, dtype=torch.float64)
    packing = Packing.from_lengths([1000])
    qkv = torch.stack([query, key, key])[None, :, None].expand(1000, 3, 1, 64)
    turned = rotary(qkv, packing, BASE)[:, :2, 0]
    near, far = turned[5, 0] @ turned[12, 1], turned[985, 0] @ turned[992, 1]
    torch.testing.assert_close(near, far, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("argument", "shape", "base"),
    [
        ("qkv", (4, 3, 2, 5), BASE),
        ("qkv", (4, 2, 2, 4), BASE),
        ("qkv", (3, 3, 2, 4), BASE),
        ("base", (4, 3, 2, 4), 1.0),
    ],
)
def test_what_it_refuses(argument: str, shape: tuple[int, ...], base: float) -> None:
    with pytest.raises(ArgumentError) as raised:
        rotary(torch.zeros(shape), Packing.from_lengths([4]), base)
    assert raised.value.argument == argument


def test_what_is_kept_outlives_no_mode(generator: torch.Generator) -> None:
    packing, qkv = Packing.from_lengths([4, 3]), torch.randn(7, 3, 2, 8, generator=generator)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        rotary(mode.from_tensor(qkv), packing, BASE)
    with torch.inference_mode():
        rotary(qkv, packing, BASE)
    got = rotary(qkv.requires_grad_(), packing, BASE)
    want = exactly(qkv, packing, torch.float32)
    dout = torch.randn(got.shape, generator=generator)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y, qkv, dout)[0] for y in (got, want)))


@pytest.mark.parametrize("base", ["a", None, float("inf"), float("nan")])
def test_bases_that_are_none(base: object) -> None:
    with pytest.raises(ArgumentError, match="base: got"):
        rotary(torch.zeros(4, 3, 2, 4), Packing.from_lengths([4]), base)  # type: ignore[arg-type]


def test_angles_of_places_are_made_once_and_those_of_the_op() -> None:
    with torch.inference_mode():
        angles = angles_of_places(300, 6, BASE)
    assert angles.dtype == torch.float32 and angles.shape[0] >= 300 and not angles.is_inference()
    exact = reference.rotary_angles(Packing.from_lengths([300]), 6, BASE, torch.float32)
    torch.testing.assert_close(angles[:300].transpose(0, 1), exact, atol=0, rtol=0)
    assert angles_of_places(301, 6, BASE) is angles
    assert angles_of_places(len(angles) + 1, 6, BASE).shape == (2 * len(angles), 2, 3)
    for base in (1.0, float("nan"), "10000"):
        with pytest.raises(ArgumentError, match="base"):
            angles_of_places(8, 6, base)  # type: ignore[arg-type]
