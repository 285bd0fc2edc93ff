"""What runs the kernels of a CPU: their machine code, and programs of calls on torch's threads, which are OpenMP's.

A kernel is a function of a task's number. `compiled` makes machine code of it with LLVM, which llvmlite brings, so no
compiler need be installed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from torch import Tensor

from fastbert import forks
from fastbert.cpu import guards
from fastbert.cpu.code import Code
from fastbert.cpu.machine import Machine, openmp
from fastbert.cpu.memory import Argument, PerWorker, located, room
from fastbert.cpu.values import I64, POINTER


def float_bits(number: float) -> int:
    """A float32 as the integer that a kernel takes."""
    return ctypes.c_uint32.from_buffer(ctypes.c_float(number)).value


class Call:
    """A kernel's tasks and its arguments, for a `Program` to run. It keeps the memory that they are alive."""

    def __init__(self, kernel: Kernel, tasks: int, arguments: Mapping[str, Argument]) -> None:
        self.kernel, self.tasks, self.arguments = kernel, tasks, arguments
        values = [_integer(parameter, arguments[parameter]) for parameter in kernel.places]
        # What a worker reads: the next task, the next thread's number, how many tasks; then the arguments.
        self.fields = (ctypes.c_int64 * (3 + len(values)))(0, 0, tasks, *values)
        # Of the memory for each worker: where its address is to be written, and how large it is.
        self.scratch = [
            (self.fields, kernel.places[parameter], argument.size)
            for parameter, argument in arguments.items()
            if isinstance(argument, PerWorker)
        ]

    def run(self) -> None:
        """Run it alone."""
        Program([self]).run()


def _integer(parameter: str, argument: Argument) -> int:
    """The argument as a kernel gets it; 0 for no tensor, and for what the `Program` fills in."""
    if isinstance(argument, tuple):
        x, dtypes, elements = argument
        return 0 if x is None else located(parameter, x, dtypes, elements)
    return argument if isinstance(argument, int) else 0


def _give(threads: int, wanted: Sequence[tuple[Any, int, int]]) -> Tensor:
    """Memory for each of so many threads; calls that run one after another, of which it is wanted, share it."""
    memory = room([threads * max(size for _, _, size in wanted)], torch.uint8)
    for fields, i, _ in wanted:
        fields[i] = memory.data_ptr()
    return memory


@dataclass(frozen=True)
class Kernel:
    """Machine code of a kernel.

    Attributes:
        name: what it is called in messages.
        address: of `worker(int64 *fields)`, which takes tasks until there are none.
        engine: keeps the code alive.
        places: of each parameter, in their order: where its argument is among the fields.
    """

    name: str
    address: int
    engine: Any
    places: dict[str, int]

    def __call__(self, tasks: int, /, **arguments: Argument) -> Call:
        """Tasks 0 to `tasks`, with an argument for each parameter.

        Raises:
            TypeError: an argument is missing, or no parameter has its name.
            ArgumentError: a tensor is not what the kernel touches, see `memory.located`.
        """
        if arguments.keys() != self.places.keys():
            raise TypeError(f"{self.name}: got {', '.join(arguments)}; expected {', '.join(self.places)}")
        return Call(self, tasks, arguments)


class Program:
    """Calls that follow one another: the tasks of each begin when all of the one before are done.

    A run is a single call on torch's threads, so that short kernels cost little. It may run often, but not in two
    threads at once. How many threads there are is settled when it is made, with the memory that they work in.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        threads = min(max((call.tasks for call in calls if call.tasks), default=1), torch.get_num_threads())
        wanted = zip_longest(*(call.scratch for call in calls))
        self._scratch = [_give(threads, [one for one in some if one is not None]) for some in wanted]
        addresses = [x for call in calls for x in (call.kernel.address, ctypes.addressof(call.fields))]
        self._fields = (ctypes.c_int64 * (2 + len(addresses)))(len(calls), threads, *addresses)

    def run(self) -> None:
        """Run them all."""
        _driver()(self._fields)
        if guards.ON:
            self._verify()

    def _verify(self) -> None:
        for call in self.calls:
            for parameter, argument in call.arguments.items():
                if isinstance(argument, tuple) and argument[0] is not None:
                    guards.verify(f"{call.kernel.name}: {parameter}", argument[0])
        for scratch in self._scratch:
            guards.verify("scratch", scratch)


# What runs a `Program`: %program is how many calls there are, on how many threads, and of each call the address of
# its worker and of its fields.
DRIVER = """
declare void @GOMP_parallel(ptr, ptr, i32, i32)
declare void @GOMP_barrier()

define void @team(ptr %program) {
entry:
  %calls = load i64, ptr %program
  br label %next
next:
  %i = phi i64 [0, %entry], [%following, %call]
  %more = icmp slt i64 %i, %calls
  br i1 %more, label %call, label %done
call:
  %following = add i64 %i, 1
  %worker_at = getelementptr [2 x i64], ptr %program, i64 %following, i64 0
  %fields_at = getelementptr [2 x i64], ptr %program, i64 %following, i64 1
  %worker = load ptr, ptr %worker_at
  %fields = load ptr, ptr %fields_at
  call void %worker(ptr %fields)
  call void @GOMP_barrier()
  br label %next
done:
  ret void
}

define void @run(ptr %program) {
entry:
  %calls = load i64, ptr %program
  br label %next
next:
  %i = phi i64 [0, %entry], [%following, %reset]
  %more = icmp slt i64 %i, %calls
  br i1 %more, label %reset, label %start
reset:
  %following = add i64 %i, 1
  %fields_at = getelementptr [2 x i64], ptr %program, i64 %following, i64 1
  %fields = load ptr, ptr %fields_at
  store <2 x i64> zeroinitializer, ptr %fields, align 8
  br label %next
start:
  %threads_at = getelementptr i64, ptr %program, i64 1
  %threads = load i32, ptr %threads_at
  call void @GOMP_parallel(ptr @team, ptr %program, i32 %threads, i32 0)
  ret void
}
"""


# Around all use of LLVM, which has a lock of its own that no fork waits for.
_compiling = forks.lock()


@cache
def _driver() -> Any:
    """`run` of `DRIVER`."""
    with _compiling:
        _initialise()
        for name, function in openmp().items():
            llvm.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
        parsed = llvm.parse_assembly(DRIVER)
        parsed.verify()
        engine = llvm.create_mcjit_compiler(parsed, llvm.Target.from_default_triple().create_target_machine(jit=True))
        engine.finalize_object()
        run = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(engine.get_function_address("run"))
    run.engine = engine  # type: ignore[attr-defined]  # keeps the code alive
    return run


@cache
def _initialise() -> None:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()


def compiled(machine: Machine, name: str, parameters: Sequence[str], body: Callable[[Code], None]) -> Kernel:
    """A kernel of what `body` writes for one task.

    Args:
        parameters: names of the int64 arguments: numbers, addresses, or `float_bits`.
    """
    return Kernel(name, *_loaded(machine, name, parameters, body), _places(parameters))


def _loaded(machine: Machine, name: str, parameters: Sequence[str], body: Callable[[Code], None]) -> tuple[int, Any]:
    """Where a kernel's worker lies in this process, and what keeps it there."""
    with _compiling:
        _initialise()
        target = _target(machine, llvm.get_process_triple(), jit=True)
        engine = llvm.create_mcjit_compiler(_optimised(machine, target, name, parameters, body), target)
        engine.finalize_object()
        return engine.get_function_address(name), engine


def object_code(
    machine: Machine, triple: str, name: str, parameters: Sequence[str], body: Callable[[Code], None]
) -> bytes:
    """The object file of the kernel that `compiled` gives, for a linker: its function `name` is the kernel's worker.

    Args:
        triple: LLVM's name of the platform, "aarch64-linux-gnu" say, which need not be the one at hand.
    """
    with _compiling:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        target = _target(machine, triple, jit=False)
        return target.emit_object(_optimised(machine, target, name, parameters, body))


def _target(machine: Machine, triple: str, jit: bool) -> Any:
    target = llvm.Target.from_triple(triple)
    return target.create_target_machine(cpu=machine.cpu, features=machine.features, opt=3, jit=jit)


def _places(parameters: Sequence[str]) -> dict[str, int]:
    """Where the argument for each parameter is among the fields."""
    return {parameter: 3 + i for i, parameter in enumerate(parameters)}


def _optimised(
    machine: Machine, target: Any, name: str, parameters: Sequence[str], body: Callable[[Code], None]
) -> Any:
    """LLVM's module with the worker, for one of its target machines."""
    module = ir.Module(name)
    module.triple = target.triple
    worker = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER]), name)
    worker.attributes.alignstack = 64  # else a vector that is kept on the stack lies in two lines of the cache
    worker.attributes.add("nounwind")  # llvmlite writes no attributes where it has only the one before
    builder = ir.IRBuilder(worker.append_basic_block("entry"))

    def field(i: int) -> Any:
        return builder.gep(worker.args[0], [ir.Constant(I64, i)], source_etype=I64)

    one = ir.Constant(I64, 1)
    number = builder.atomic_rmw("add", field(1), one, "monotonic")
    tasks = builder.load(field(2), typ=I64)
    arguments = {parameter: builder.load(field(i), typ=I64) for parameter, i in _places(parameters).items()}
    following, inside, done = (builder.append_basic_block(label) for label in ("next", "task", "end"))
    builder.branch(following)
    builder.position_at_end(following)
    task = builder.atomic_rmw("add", field(0), one, "monotonic")
    builder.cbranch(builder.icmp_signed("<", task, tasks), inside, done)
    builder.position_at_end(inside)
    body(Code(machine, builder, arguments, task=task, worker=number))
    builder.branch(following)
    builder.position_at_end(done)
    builder.ret_void()

    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=3)
    options.slp_vectorization = options.loop_vectorization = False
    options.loop_unrolling = False
    passes = llvm.create_pass_builder(target, options)
    passes.getModulePassManager().run(parsed, passes)
    return parsed
