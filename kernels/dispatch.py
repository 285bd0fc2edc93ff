"""Start a kernel, and from its second time on past Triton's search for the compiled code.

`kernel[grid](...)` binds, describes and hashes every argument to find the code that was compiled for such arguments:
some 20 us of Python, about as long as BERT's small kernels run. Of an argument the code depends on little: of a tensor
on its dtype and on whether its address is a multiple of 16 bytes, of a whole number on its kind (Triton's
`specialize.cc`). That little is the key here.
"""

from __future__ import annotations

from typing import Any

from triton import knobs
from triton.knobs import HookChain
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastbert.kernels import choices, target

Grid = tuple[int, int, int]

_compiled: dict[tuple[Any, ...], Any] = {}  # by what the code depends on


def dispatch(kernel: Any, grid: Grid, *arguments: Any, **constexprs: Any) -> None:
    """`kernel[grid](*arguments, **constexprs)` on the device of the first argument, a tensor.

    Triton's knobs, such as `debug`, are those of the first launch of its kind.

    Args:
        kernel: a function under `triton.jit`.
        grid: programs along x, y and z.
        arguments: tensors, whole numbers, floats and None for the parameters that are no constexpr; these come first.
        constexprs: the others, and options of the compiler.
    """
    Prepared(kernel, **constexprs)(grid, *arguments)


class Prepared:
    """Launches that compiled code is found for once: `dispatch` that need not search again.

    From the second call on, arguments may differ from those of the first in what the code does not depend on: grids,
    tensors' addresses, and whole numbers as far as `choices.number_kind` of them is the same. All tensors must be
    multiples of 16 bytes if they were in the first call, and of less than 2 GiB if they were then.
    """

    def __init__(self, kernel: Any, **constexprs: Any) -> None:
        self.kernel = kernel
        self.constexprs = constexprs
        self.compiled: Any = None
        self.rest: tuple[Any, ...] = ()

    def __call__(self, grid: Grid, *arguments: Any) -> None:
        """Launch with the arguments of `dispatch`."""
        with target.guard(arguments[0]):
            if self.compiled is not None:
                self._start(grid, arguments)
            elif isinstance(self.kernel, JITFunction):
                self._search(grid, arguments)
            else:  # the interpreter compiles nothing
                self.kernel[grid](*arguments, **self.constexprs)

    def _start(self, grid: Grid, arguments: tuple[Any, ...]) -> None:
        """`self.compiled[grid](...)` without the description of the launch, which only a profiler's hooks read."""
        compiled, enter, leave = self.compiled, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        # anything else in their place, or None, is Triton's to handle
        if type(enter) is HookChain and type(leave) is HookChain and not enter.calls and not leave.calls:
            here = driver.active
            stream = here.get_current_stream(here.get_current_device())
            function, packed = compiled.function, compiled.packed_metadata
            compiled.run(*grid, stream, function, packed, None, enter, leave, *arguments, *self.rest)
        else:
            compiled[grid](*arguments, *self.rest)

    def _search(self, grid: Grid, arguments: tuple[Any, ...]) -> None:
        here = target.of(arguments[0].device)
        key = (self.kernel.fn, driver.active, driver.active.get_current_device(), *self.constexprs.items())
        key += tuple(_kind(argument, here) for argument in arguments)
        self.rest = tuple(self.constexprs[name] for name in self.kernel.arg_names[len(arguments) :])
        self.compiled = _compiled.get(key)
        if self.compiled is None:
            self.compiled = _compiled[key] = self.kernel[grid](*arguments, **self.constexprs)
        else:
            self._start(grid, arguments)


def _kind(argument: Any, here: target.Target) -> Any:
    """What a kernel's code depends on of an argument."""
    if argument is None:
        return None
    if isinstance(argument, int):
        return choices.number_kind(argument)
    if isinstance(argument, float):
        return float
    if here.backend == "hip":  # AMD's code also knows whether offsets fit 32 bits
        return argument.dtype, argument.data_ptr() % 16 == 0, argument.untyped_storage().nbytes() >> 31
    return argument.dtype, argument.data_ptr() % 16 == 0
