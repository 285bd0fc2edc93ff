"""States of torch that a program around us may leave it in, and tensors as other programs hand them over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class FunctionMode(TorchFunctionMode):
    """Looks at every call of torch and changes none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class DispatchMode(TorchDispatchMode):
    """Looks at every op and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


AROUND = {
    "nothing": nullcontext,
    "device meta": lambda: torch.device("meta"),
    "device cpu": lambda: torch.device("cpu"),
    "function mode": FunctionMode,
    "dispatch mode": DispatchMode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
GRADIENT = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@dataclass(frozen=True)
class Ambient:
    """What the state is; `entered()` brings it about and takes it back."""

    dtype: torch.dtype = torch.float32
    around: str = "nothing"
    gradient: str = "no_grad"
    threads: int = 1
    filled: bool = False
    flushed: bool = False
    precision: str = "highest"

    @contextmanager
    def entered(self) -> Iterator[None]:
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        filled = torch.utils.deterministic.fill_uninitialized_memory
        try:
            torch.set_default_dtype(self.dtype)
            torch.set_num_threads(self.threads)
            torch.set_flush_denormal(self.flushed)
            torch.set_float32_matmul_precision(self.precision)
            torch.use_deterministic_algorithms(self.filled, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = self.filled
            with ExitStack() as stack:
                stack.enter_context(GRADIENT[self.gradient]())
                around: AbstractContextManager[Any] = AROUND[self.around]()
                stack.enter_context(around)
                yield
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_num_threads(threads)
            torch.set_flush_denormal(False)
            torch.set_float32_matmul_precision(precision)
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = filled


AMBIENTS = st.builds(
    Ambient,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    around=st.sampled_from(list(AROUND)),
    gradient=st.sampled_from(list(GRADIENT)),
    threads=st.sampled_from([1, 2, 3]),
    filled=st.booleans(),
    flushed=st.booleans(),
    precision=st.sampled_from(["highest", "medium"]),
)

# The same numbers, lying otherwise: a right result is asked for.
LYING = {
    "as it is": lambda x: x,
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "turned": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "off by one": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
    "negated twice": lambda x: torch._neg_view(-x) if x.dtype != torch.bool else x,
    "with a gradient": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
}
# Something else: a right result, or one of our errors.
SPOILT = {
    "no rows": lambda x: x[:0],
    "a row less": lambda x: x[:-1],
    "a column less": lambda x: x[..., :-1],
    "one dimension more": lambda x: x[None],
    "flat": lambda x: x.reshape(-1),
    "on meta": lambda x: x.to("meta"),
    "complex": lambda x: x.to(torch.complex64),
    "bool": lambda x: x != 0,
    "int32": lambda x: x.to(torch.int32),
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "sparse": lambda x: x.to_sparse(),
    "expanded": lambda x: x[:1].expand(x.shape),
    "negative": lambda x: -x if x.dtype != torch.bool else x,
    "huge": lambda x: x * 1_000_000 if x.dtype != torch.bool else x,
    "a list": lambda x: x.tolist(),
    "None": lambda x: None,
    "numpy": lambda x: x.resolve_neg().float().numpy(),
}


def spoilt(x: Tensor, how: str) -> Any:
    """`x`, spoilt so."""
    return SPOILT[how](x)
