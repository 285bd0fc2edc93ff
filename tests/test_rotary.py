from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastbert import backend, reference
from fastbert.errors import ArgumentError, BackendError
from fastbert.ops.rotary import angles_of_places, rotary, rotary_forward
from fastbert.packing import Packing
from fastbert.testing import assert_close

BASE = 10_000.0


PATHS = ["triton", "torch"]


def numbers(
    packing: Packing, dtype: torch.dtype, generator: torch.Generator, head_dim: int = 6, slack: int = 0
) -> Tensor:
    """With every second row of its memory between its own."""
    x = torch.randn(2 * (packing.tokens + slack), 3, 2, head_dim, generator=generator).to(dtype)
    return x[::2]


def exactly(qkv: Tensor, packing: Packing, dtype: torch.dtype) -> Tensor:
    return reference.rotary(qkv.to(dtype), reference.rotary_angles(packing, qkv.shape[3], BASE, dtype))


def check(path: str, qkv: Tensor, packing: Packing, generator: torch.Generator) -> None:
    """Hold forward and backward of one path to the error rule."""
    dtype = qkv.dtype
    dout = torch.randn(qkv.shape, generator=generator).to(dtype)
    leaves = [qkv.detach().requires_grad_(), qkv.detach().clone().requires_grad_(), qkv.double().requires_grad_()]
    with backend.use_backend(path):
        out = rotary(leaves[0], packing, BASE)
    assert out.dtype == dtype
    outs = [out, exactly(leaves[1], packing, dtype), exactly(leaves[2], packing, torch.float64)]
    assert_close(*outs)
    torch.testing.assert_close(out[:, 2], qkv[:, 2], atol=0, rtol=0)
    grads = [torch.autograd.grad(y, x, dout.to(y.dtype))[0] for y, x in zip(outs, leaves, strict=True)]
    assert_close(*grads)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [2, 6, 24, 64, 130])
def test_forward_and_backward(
    head_dim: int, dtype: torch.dtype, path: str, generator: torch.Generator, nan_empty: None
) -> None:
    packing = Packing.from_lengths([7, 0, 300, 1])
    check(path, numbers(packing, dtype, generator, head_dim, slack=3), packing, generator)


def test_float64_is_computed_as_such(generator: torch.Generator) -> None:
    packing = Packing.from_lengths([7, 0, 300, 1])
    check("torch", numbers(packing, torch.float64, generator, slack=3), packing, generator)


@pytest.mark.parametrize("path", PATHS)
def test_slack_is_as_it_was(path: str, generator: torch.Generator, nan_empty: None) -> None:
    packing = Packing.from_lengths([7, 1])
    qkv = numbers(packing, torch.float16, generator, slack=60)
    qkv[8::2], qkv[9::2] = torch.nan, torch.inf
    with backend.use_backend(path):
        out = rotary(qkv, packing, BASE)
        assert torch.equal(rotary(qkv[:8], packing, BASE), out[:8])
    torch.testing.assert_close(out[8:], qkv[8:], atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("path", PATHS)
def test_strides(path: str, generator: torch.Generator) -> None:
    packing = Packing.from_lengths([9, 4])
    wide = torch.randn(13, 4, 5, 48, generator=generator)
    contiguous = wide[:, :3].contiguous()
    views = {
        "some heads": wide[:, :3, 1:3],
        "odd columns": wide[:, :3, :, 3:35],
        "dims outside": contiguous.transpose(2, 3).contiguous().transpose(2, 3),
        "one row, repeated": contiguous[:1].expand(13, -1, -1, -1),
        "no heads": contiguous[:, :, :0],
    }
    for view in views.values():
        if view.numel() > 0:
            check(path, view, packing, generator)
        else:
            with backend.use_backend(path):
                assert rotary(view, packing, BASE).shape == view.shape
    with backend.use_backend(path):
        assert rotary(contiguous[:0], Packing.from_lengths([0]), BASE).shape == (0, 3, 5, 48)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_opcheck(needs_gradient: bool, device: torch.device, generator: torch.Generator) -> None:
    packing = Packing.from_lengths([5, 3], device=device)
    qkv = torch.randn(9, 3, 2, 8, generator=generator).to(device).requires_grad_(needs_gradient)
    angles = reference.rotary_angles(packing, 8, BASE, torch.float32)
    for inverse in (False, True):
        torch.library.opcheck(rotary_forward, (qkv, angles, inverse))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_case_23_a_training_step_compiles_without_graph_breaks(
    compiler: str, path: str, generator: torch.Generator
) -> None:
    packing = Packing.from_lengths([5, 0, 9])
    qkv = torch.randn(14, 3, 2, 16, generator=generator).requires_grad_()

    def loss(qkv: Tensor, packing: Packing) -> Tensor:
        return rotary(qkv * 2, packing, BASE)[:, :, 1].sin().mean()

    with backend.use_backend(path):
        compiled = torch.compile(loss, fullgraph=True, backend=compiler)
        (got,) = torch.autograd.grad(compiled(qkv, packing), qkv)
        (expected,) = torch.autograd.grad(loss(qkv, packing), qkv)
    torch.testing.assert_close(got, expected)


@pytest.mark.kernels
@pytest.mark.parametrize("path", ["triton"])
def test_autocast_and_what_the_kernel_cannot_serve(path: str, generator: torch.Generator) -> None:
    packing = Packing.from_lengths([9, 4])
    qkv = torch.randn(13, 3, 2, 16, generator=generator).requires_grad_()
    with backend.use_backend(path), torch.autocast(qkv.device.type, torch.bfloat16):
        out = rotary(qkv, packing, BASE)
    assert out.dtype == torch.bfloat16
    out.backward(torch.randn(out.shape, generator=generator).bfloat16())
    assert qkv.grad is not None and qkv.grad.dtype == torch.float32 and qkv.grad.isfinite().all()
    with backend.use_backend(path):
        with pytest.raises(BackendError, match="float64"):
            rotary(qkv.detach().double(), packing, BASE)
        with pytest.raises(BackendError, match="head_dim 1026"):
            rotary(torch.zeros(13, 3, 1, 1026), packing, BASE)
    assert rotary(torch.zeros(13, 3, 1, 1026), packing, BASE).shape == (13, 3, 1, 1026)


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


@pytest.mark.parametrize("scale", [0.75, 2])
def test_a_scale_is_one_of_the_places(generator: torch.Generator, scale: float) -> None:
    """By the angles of every fourth place, those of the places between are known."""
    packing, far = Packing.from_lengths([9]), Packing.from_lengths([70])
    qkv, long = torch.randn(9, 3, 2, 6, generator=generator, dtype=torch.float64), torch.zeros(70, 3, 2, 6).double()
    places = (torch.arange(9) * scale * 4).long()
    long[places] = qkv
    quarter = rotary(long, far, BASE, 0.25)[places]
    torch.testing.assert_close(rotary(qkv, packing, BASE, scale), quarter, atol=1e-12, rtol=0)
    assert not torch.equal(quarter[:, :2], qkv[:, :2])
    exact = reference.rotary_angles(packing, 6, BASE, torch.float32, scale)
    got = angles_of_places(9, 6, BASE, scale)[:9].transpose(0, 1)
    torch.testing.assert_close(got, exact, atol=0, rtol=0)


@pytest.mark.parametrize("scale", [0.0, "a", None, float("inf"), float("nan")])
def test_scales_that_are_none(scale: object) -> None:
    with pytest.raises(ArgumentError, match="scale: got"):
        rotary(torch.zeros(4, 3, 2, 4), Packing.from_lengths([4]), BASE, scale)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="scale: got"):
        angles_of_places(4, 6, BASE, scale)  # type: ignore[arg-type]


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
