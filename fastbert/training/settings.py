"""Everything that decides a training run, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fastbert.errors import ArgumentError
from fastbert.training.objectives import OBJECTIVES, Task
from fastbert.training.parallel import Parallel

Schedule = Literal["linear", "cosine"]


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training run.

    Attributes:
        task: "classify", "tag", "mlm" or "pretrain".
        model: the checkpoint folder to start from.
        train, valid: files of examples; see `training.data` for their formats. Without `valid` nothing is measured.
        out: the folder to write; see `train`.
        epochs: how often each example is seen.
        lr: the highest learning rate.
        batch_tokens: most tokens of a batch; a longer example is a batch of its own.
        accumulate: batches of a step; each loss is the mean over all their labels.
        max_length: most tokens of an example, special ones included.
        dtype: "fp32", or "bf16" for autocast over float32 weights.
        warmup: the share of all steps over which the learning rate rises from 0.
        schedule: how it falls to 0 after that.
        weight_decay: decoupled (AdamW), not on biases and LayerNorms.
        clip: most norm of the gradient.
        eval_every: steps between measurements within an epoch, besides the one after each; None for no others.
        patience: stop after this many epochs in a row without the best measurement; None to go on.
        checkpoint_every: steps between checkpoints, besides the one after each epoch.
        seed: of the new head, the order of the examples, dropout, masking and pairs.
        parallel: with several processes, "ddp" for a whole model in each, "fsdp" for one model sharded over them.

    Raises:
        ArgumentError: a value is none of these.
    """

    task: Task
    model: str
    train: str
    out: str
    valid: str | None = None
    epochs: int = 3
    lr: float = 5e-5
    batch_tokens: int = 1024
    accumulate: int = 1
    max_length: int = 256
    dtype: Literal["fp32", "bf16"] = "fp32"
    warmup: float = 0.1
    schedule: Schedule = "linear"
    weight_decay: float = 0.01
    clip: float = 1.0
    eval_every: int | None = None
    patience: int | None = None
    checkpoint_every: int = 500
    seed: int = 0
    parallel: Parallel = "ddp"

    def __post_init__(self) -> None:
        check("task", self.task, self.task in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
        check("dtype", self.dtype, self.dtype in ("fp32", "bf16"), "fp32 or bf16")
        check("schedule", self.schedule, self.schedule in get_args(Schedule), "linear or cosine")
        check("parallel", self.parallel, self.parallel in get_args(Parallel), "ddp or fsdp")
        for name in ("epochs", "batch_tokens", "accumulate", "checkpoint_every"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "clip"):
            check(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a number above 0")
        check("seed", self.seed, self.seed >= 0, "at least 0")
        check("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0")
        check("warmup", self.warmup, 0 <= self.warmup < 1, "a share of the steps in [0, 1)")
        for name, unit in (("patience", "epoch"), ("eval_every", "step")):
            value = getattr(self, name)
            if value is not None:
                check(name, value, value >= 1, f"at least 1 {unit}")
                check(name, value, self.valid is not None, "a valid file beside it", "Give one to measure by.")


def check(name: str, value: object, right: bool, expected: str, mend: str = "") -> None:
    """Raise ArgumentError for a value that is not right."""
    if not right:
        raise ArgumentError(name, value, expected, mend)
