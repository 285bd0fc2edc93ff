"""More than one process: who they are, how they share a step, and a model that is replicated or sharded over them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbert.backend import first_device
from fastbert.model.heads import HeadModel

Parallel = Literal["ddp", "fsdp"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Processes:
    """This process among those that train one model together.

    Attributes:
        rank: its number, from 0. The first one writes the files.
        count: how many there are.
    """

    rank: int = 0
    count: int = 1

    def sum(self, x: Tensor) -> Tensor:
        """The sum of everyone's `x`."""
        if self.count > 1:
            dist.all_reduce(x)
        return x

    def collect(self, value: _T) -> list[_T]:
        """Everyone's `value`, in the order of ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def first_of(self, value: _T) -> _T:
        """The first process's `value`."""
        return self.collect(value)[0]

    def wait(self) -> None:
        """Until everyone is here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined() -> Iterator[Processes]:
    """The processes that torchrun started, or that the caller has joined already; else this one alone."""
    if dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size())
    elif is_one_of_several():
        device = own_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # else all would meet on the first GPU
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        yield Processes(dist.get_rank(), dist.get_world_size())
        # Neither after an error nor while a model is spread: what outlives the group and is freed after it, as by a
        # traceback, ends it with Python's lock held, which a thread of gloo may be waiting for.
        dist.destroy_process_group()
    else:
        yield Processes()


def is_one_of_several() -> bool:
    """Whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def is_first() -> bool:
    """Whether this process is the first that torchrun started, or one alone."""
    return not is_one_of_several() or os.environ["RANK"] == "0"


def leave() -> None:
    """End a process that torchrun started, whose work is done, at once; do nothing in any other.

    A thread of gloo may still have a tensor to let go, for which it waits for Python's lock. If Python shuts down in
    the meantime it ends that thread, and C++ then aborts the process.
    """
    if is_one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def own_device() -> torch.device:
    """Where this process computes if nobody says: a GPU of its own, or the CPU where there is none."""
    device = first_device()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device.type == "cuda" else device


def shares(batches: Sequence[Sequence[int]], processes: int) -> list[list[list[int]]]:
    """`[rank][batch]`: the places in each batch of a step that a process takes, ascending; it may get none.

    Longest first within a batch, each sequence goes to the process with the fewest tokens of the step so far (Graham
    1969), so no two processes differ by more tokens than the longest sequence has.

    Args:
        batches: the lengths of the sequences of each batch of a step.
        processes: how many share the step.
    """
    taken: list[list[list[int]]] = [[[] for _ in batches] for _ in range(processes)]
    tokens = [0] * processes
    for number, lengths in enumerate(batches):
        for place in np.argsort([-length for length in lengths], kind="stable").tolist():
            rank = tokens.index(min(tokens))
            taken[rank][number].append(place)
            tokens[rank] += lengths[place]
    return [[sorted(places) for places in mine] for mine in taken]


def spread(model: HeadModel, how: Parallel) -> nn.Module:
    """What to call for the model's forward in training, so that the gradients are the mean over all processes.

    "ddp" gives each process the whole model; "fsdp" shards the parameters of `model` itself, layer by layer.
    """
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    return model
