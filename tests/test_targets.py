"""GPUs that nobody compiled the kernels for: newer ones take the choices of the nearest, older ones take torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fake_gpu import fake_gpu

from fastbert import backend
from fastbert.errors import BackendError
from fastbert.kernels import attention_choices, bias_gelu_choices, choices, row_wise_choices, target

# Arch, and the one whose launch choices it takes.
NEWER = {
    "sm_87": "sm_86",  # Orin
    "sm_100": "sm_100",
    "sm_101": "sm_100",
    "sm_103": "sm_100",  # B300
    "sm_110": "sm_100",  # Thor
    "sm_120": "sm_120",
    "sm_121": "sm_120",  # GB10
    "sm_130": "sm_120",  # none yet
    "gfx940": "gfx942",
    "gfx950": "gfx942",  # MI350
    "gfx1101": "gfx1100",
    "gfx1151": "gfx1100",  # Strix Halo
    "gfx1201": "gfx1100",  # RX 9070
}
OLDER = ("sm_60", "sm_70", "sm_75", "gfx906", "gfx908", "gfx90c", "gfx1030", "gfx803")


@pytest.mark.parametrize(("arch", "kin"), NEWER.items())
def test_a_newer_gpu_takes_the_choices_of_the_nearest(arch: str, kin: str) -> None:
    with fake_gpu(arch) as device:
        assert backend.decide(device).path == "triton"
        mine, known = target.of(device), target.KNOWN[kin]
    assert (mine.arch, mine.kin) == (arch, kin)
    assert choices.family(mine) == choices.family(known)
    for dtype in (torch.float16, torch.float32):
        for width in (384, 768, 1024, 4096):
            for choose in (row_wise_choices.layer_norm_forward, row_wise_choices.layer_norm_backward):
                assert choose(width, dtype, mine) == choose(width, dtype, known)
            of_mine, of_known = (
                row_wise_choices.pool_forward(width, dtype, one, how="mean", normalise=True) for one in (mine, known)
            )
            assert of_mine == of_known
        for head_dim in (32, 64, 128):
            of_mine, of_known = (
                attention_choices.attention_unserved(head_dim, dtype, one, gradient=False) for one in (mine, known)
            )
            assert (of_mine is None) == (of_known is None)
            if of_known is not None:
                continue
            of_mine, of_known = (
                attention_choices.attention_forward(head_dim, dtype, 300, rows=900, batch=4, extras=False, target=one)
                for one in (mine, known)
            )
            assert of_mine == of_known


@pytest.mark.parametrize("arch", OLDER)
def test_an_older_gpu_takes_torch_and_says_why(arch: str) -> None:
    with fake_gpu(arch) as device:
        decision = backend.decide(device)
        assert decision.path == "torch"
        assert arch in decision.reason and "or later" in decision.reason

        class OnGpu:
            pass

        x = OnGpu()
        x.device = device  # type: ignore[attr-defined]
        with backend.use_backend("triton"), pytest.raises(BackendError, match=arch):
            backend.uses_triton("op", x)  # type: ignore[arg-type]


def test_what_was_measured_on_a_gpu_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A B300 that was tuned does not change what a B200 takes, nor the other way round."""
    with fake_gpu("sm_103") as device:
        mine = target.of(device)
    plain = bias_gelu_choices.bias_gelu_forward(768, torch.float16, mine)
    measured = replace(plain, num_warps=2 * plain.num_warps)
    monkeypatch.setitem(choices.TUNED, ("sm_103", "bias_gelu_forward", "width=768,dtype=float16"), measured)
    assert bias_gelu_choices.bias_gelu_forward(768, torch.float16, mine) == measured
    assert bias_gelu_choices.bias_gelu_forward(768, torch.float16, target.KNOWN["sm_100"]) == plain


@pytest.mark.parametrize("device", ["cpu", "mps", "xpu", "meta"])
def test_devices_that_triton_serves_not_are_asked_nothing(device: str) -> None:
    """Ops ask for the target before they take torch's path, as they do on a Mac's GPU."""
    assert target.of(torch.device(device)) is target.KNOWN["interpreter"]
