"""The Triton kernels that PyTorch's inductor writes for a function of CUDA tensors, on a machine without CUDA.

`Compiled` takes the way of torch.compile from the graph on: gradients, partition, passes, kernels. What would touch a
device is replaced for that time, and the kernels are launched on CPU tensors, inside `offline`, which records them.
Only for NVIDIA's targets: a PyTorch that was not built for ROCm writes nothing for AMD's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import compile_fx, config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from fastbert.kernels.target import Target

# The release whose insides this file knows.
TORCH = "2.13."

CUDA = torch.device("cuda", 0)

# Registers and threads of a multiprocessor: CUDA C++ programming guide, "technical specifications per compute
# capability". Multiprocessors of the A100 and the H100, by which inductor splits its sums.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132}


@contextmanager
def pretended(target: Target) -> Iterator[None]:
    """Torch, asked for its CUDA device, answers for `target`; it still has none."""
    major, minor = divmod(int(target.arch.removeprefix("sm_")), 10)
    properties = SimpleNamespace(
        name=target.arch,
        major=major,
        minor=minor,
        multi_processor_count=MULTIPROCESSORS[target.arch],
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=target.warp_size,
        total_memory=80 << 30,
        shared_memory_per_block_optin=target.shared_memory,
    )
    answers: dict[str, Callable[..., Any]] = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (major, minor),
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
        "_DeviceGuard": lambda index: nullcontext(),
        "get_rng_state": lambda: torch.empty(0),
        "set_rng_state": lambda state: None,
    }
    with ExitStack() as patches:
        for name, answer in answers.items():
            patches.enter_context(patch.object(torch.cuda, name, answer))
            if name in vars(CudaInterface):
                patches.enter_context(patch.object(CudaInterface, name, staticmethod(answer)))
        yield


class Compiled:
    """A function compiled by inductor for `target`.

    Attributes:
        elements: by kernel, how many elements it goes over, and how many of them a sum has, or 1.
        bytes: of the tensors that the kernels launched so far read and write, each once a kernel. Triton's interpreter
            counts the same for LayerNorm's, but takes minutes.
    """

    def __init__(self, function: Callable[..., Tensor], shapes: list[tuple[int, ...]], target: Target) -> None:
        """
        Args:
            function: of float16 tensors of these shapes, all of which get a gradient.
        """
        self.function, self.shapes, self.target = function, shapes, target
        self.elements: dict[str, tuple[int, int]] = {}
        self.bytes = 0
        self.out: Tensor | None = None
        self.cache = tempfile.TemporaryDirectory()

    def forward(self) -> None:
        """Compile the forward, as training runs it, and launch its kernels."""
        with FakeTensorMode() as mode:  # autograd needs a device that torch was built for
            fake = [torch.empty(shape, dtype=torch.float16, device="meta").requires_grad_() for shape in self.shapes]
        inputs = [torch.ones(shape, dtype=torch.float16).requires_grad_() for shape in self.shapes]
        with self._patched(), tracing(TracingContext(mode)):
            graph = torch.fx.symbolic_trace(self.function)
            self.out = compile_fx.compile_fx(graph, fake, inner_compile=_compile_on_cuda)(*inputs)[0]

    def backward(self) -> None:
        """Compile the backward and launch its kernels; after `forward`."""
        assert self.out is not None
        with self._patched():
            self.out.backward(torch.ones_like(self.out))

    @contextmanager
    def _patched(self) -> Iterator[None]:
        def load(_: AsyncCompile, name: str, source: str, **options: Any) -> Any:
            return SimpleNamespace(run=self._launcher(getattr(PyCodeCache.load(source), name), source))

        def empty(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.empty_strided(size, stride, dtype=dtype)

        with (
            pretended(self.target),
            patch.object(torch._C._dynamo.guards, "_empty_strided_cuda", empty),
            patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True),
            patch.object(compile_fx, "_recursive_joint_graph_passes", _passes_on_cuda),
            patch.object(triton_helpers, "set_driver_to_gpu", lambda: None),
            patch.object(AsyncCompile, "triton", load),
            patch.dict(os.environ, {"TORCHINDUCTOR_CACHE_DIR": self.cache.name}),
            config.patch(compile_threads=1, fx_graph_cache=False),
        ):
            yield

    def _launcher(self, tuner: Any, source: str) -> Callable[..., None]:
        """Launch with each configuration among which inductor would choose by timing."""

        def run(*args: Any, stream: int) -> None:
            given = dict(zip(tuner.triton_meta["signature"], args, strict=False))
            rows, columns = given["xnumel"], given.get("r0_numel", 1)
            self.elements[tuner.fn.__name__] = (rows * columns, columns)
            for name, x in given.items():
                if isinstance(x, Tensor):
                    times = (f"tl.load({name} " in source) + (f"tl.store({name} " in source)
                    self.bytes += times * x.numel() * x.element_size()
            for choice in tuner.configs:
                args, grid = tuner._interpret_args_grid(args, choice)
                tuner.fn[grid](*args, **choice.kwargs, num_warps=choice.num_warps, num_stages=choice.num_stages)

        return run


def _moved(tensors: list[Tensor]) -> list[Tensor]:
    """Fake tensors as if they were on the CUDA device."""
    with detect_fake_mode(tensors):
        return [torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=CUDA) for x in tensors]


_passes = compile_fx._recursive_joint_graph_passes


def _passes_on_cuda(graph: GraphModule, skip_invoke_subgraph: bool = False, input_device: object = None) -> GraphModule:
    """Inductor's passes over forward and backward together, on the graph moved to the CUDA device."""
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": CUDA}
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    FakeTensorProp(graph, detect_fake_mode(inputs)).propagate_dont_convert_inputs(*_moved(inputs))
    return _passes(graph, skip_invoke_subgraph)


def _compile_on_cuda(graph: GraphModule, inputs: list[Tensor], **options: Any) -> Any:
    inputs = _moved(inputs)
    with patch.object(torch.cuda, "is_available", lambda: True):
        return compile_fx.compile_fx_inner(graph, inputs, **options)
