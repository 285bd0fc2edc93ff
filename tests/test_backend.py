"""Which path runs, and that nothing falls back silently."""

import warnings

import pytest
import torch
from fake_gpu import fake_gpu

from fastbert import backend
from fastbert.config import EncoderConfig
from fastbert.cpu.machine import Machine, host
from fastbert.errors import ArgumentError, BackendError
from fastbert.kernels import target
from fastbert.model.body import BertModel
from fastbert.ops.fastest import fastest

pytestmark = pytest.mark.cpu

CPU = torch.zeros(1)


def test_a_cpu_tensor_takes_the_kernels_of_the_cpu_or_torch_and_says_why():
    decision = backend.decide(torch.device("cpu"))
    assert decision.path == ("native" if isinstance(host(), Machine) else "torch")
    assert "CPU" in decision.reason
    with backend.use_backend("torch"):
        assert backend.decide(torch.device("cpu")).path == "torch"


def test_a_gpu_tensor_takes_triton_unless_torch_is_forced():
    with fake_gpu("sm_90") as device:
        assert backend.decide(device).path == "triton"
        with backend.use_backend("torch"):
            assert backend.decide(device).path == "torch"


@pytest.mark.skipif(not target.interpreted(), reason="kernels are compiled here, not interpreted")
def test_triton_on_cpu_tensors_needs_the_interpreter(monkeypatch):
    with backend.use_backend("triton"):
        assert backend.uses_triton("op", CPU)
        monkeypatch.setattr(target, "interpreted", lambda: False)
        with pytest.raises(BackendError, match="need a GPU"):
            backend.uses_triton("op", CPU)


@pytest.mark.skipif(not target.interpreted(), reason="kernels are compiled here, not interpreted")
def test_use_backend_nests_and_is_undone_by_an_error():
    with backend.use_backend("triton"):
        with pytest.raises(RuntimeError), backend.use_backend("torch"):
            raise RuntimeError
        assert backend.uses_triton("op", CPU)
    assert not backend.uses_triton("op", CPU)


def test_what_the_kernels_cannot_serve_is_said_once_or_refused(monkeypatch):
    class OnGpu:
        device = torch.device("cuda", 0)

    with fake_gpu("sm_90"):
        with pytest.warns(UserWarning, match="head_dim 12"):
            assert not backend.uses_triton("a_new_op", OnGpu(), "head_dim 12 is odd")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not backend.uses_triton("a_new_op", OnGpu(), "head_dim 12 is odd")
        with backend.use_backend("triton"), pytest.raises(BackendError, match="head_dim 12"):
            backend.uses_triton("a_new_op", OnGpu(), "head_dim 12 is odd")


def test_an_unknown_backend():
    with pytest.raises(ArgumentError, match="'triton', 'native' or 'torch'"), backend.use_backend("cuda"):
        pass


@pytest.mark.parametrize(("current", "switches"), [(0, 1), (1, 0)])
def test_case_20_launches_are_guarded_by_the_device_of_the_tensor(monkeypatch, current, switches):
    """The model is on cuda:1: where another device is current, a fake driver sees the switch."""
    calls = []

    class FakeDevice:
        def __init__(self, device):
            calls.append(device)

    class OnGpu:
        is_cuda = True
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "device", FakeDevice)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    target.guard(OnGpu())
    assert calls == [torch.device("cuda", 1)] * switches


def test_the_kernels_of_the_cpu_are_asked_for_by_name(choose):
    if not isinstance(host(), Machine):
        with pytest.raises(BackendError, match="kernels are compiled"), backend.use_backend("native"):
            pass
        return
    choose("blas")
    assert fastest(torch.float32, 9, "laid out") == "blas"
    with backend.use_backend("native"):
        assert backend.decide(torch.device("cpu")).path == "native" and fastest(torch.float32, 9, "laid out") == "own"


def test_paths_taken_are_counted_inside_the_block():
    model = BertModel(EncoderConfig(vocab_size=9, hidden_size=32, num_heads=2, intermediate_size=48, num_layers=3))
    ids = torch.ones(2, 5, dtype=torch.int64)
    with backend.paths_taken() as outer:
        model.train()(ids)
        with torch.no_grad(), backend.paths_taken() as inner:
            model.eval()(ids, output_hidden_states=True)
            if isinstance(host(), Machine):
                with backend.use_backend("native"):
                    model(ids)
    assert inner["eager"] == 3 and outer["eager"] == 6
    assert inner["cpu"] == outer["cpu"] == (1 if isinstance(host(), Machine) else 0)
    before = dict(outer)
    model(ids)
    assert outer == before
