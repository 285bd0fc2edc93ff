"""The training loop: steps over packed batches, measurements, and the folder that comes out."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from fastbert.backend import usable_device
from fastbert.checkpoints.files import read_json
from fastbert.checkpoints.load import save
from fastbert.errors import ArgumentError
from fastbert.lock import locked
from fastbert.training.allocator import freed_memory_kept
from fastbert.training.objectives import OBJECTIVES, Batch, Examples, Objective
from fastbert.training.optimizer import adamw, learning_rate
from fastbert.training.parallel import Processes, joined, own_device, shares, spread
from fastbert.training.report import CURVE, METRICS, Report, draw
from fastbert.training.resume import Checkpoint, State, checkpoints, fingerprint
from fastbert.training.sampler import Sampler
from fastbert.training.settings import Settings, check
from fastbert.training.word_gradient import WordGradient
from fastbert.transfer import fetch
from fastbert.writing import remove

LOCK = ".training.lock"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the first process, wherever the shards are


def train(
    settings: Settings,
    *,
    resume: bool = False,
    device: torch.device | str | None = None,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a model and write it to `settings.out`.

    The folder gets the best model that was measured (the last one without a validation file) as a Hugging Face
    checkpoint with its tokenizer; metrics.json, the metrics after the last epoch; losses.jsonl, a line for each step;
    losses.png, the same as a curve, where matplotlib is installed; and while the training goes on, a checkpoint.

    Under torchrun all its processes train the one model. A batch is shared out among them by tokens, so the losses are
    those of one process but for rounding and dropout. The first process writes, all of them measure.

    Meanwhile the process keeps the memory that it frees; see `freed_memory_kept`.

    Args:
        settings: what to do.
        resume: go on from the checkpoint in the folder, bit for bit as if the run had never stopped; from the
            beginning if it stopped before its first checkpoint.
        device: where to compute; a GPU for each process, or the CPU where there is none.
        progress: show a bar on stderr, in the first process.
        say: takes a line after each measurement, and without a bar every half a minute; in the first process.

    Returns:
        What metrics.json has.

    Raises:
        ArgumentError: a file or setting is wrong, the folder holds another run or one that is under way, or the loss is
            no longer finite.
        CheckpointError: the folder of the model, or a checkpoint in the run's, is not one that fastbert reads.
        OSError: a file can't be written, as on a full disk; what is there is whole, and the run can be resumed.
    """
    with joined() as processes:
        speaks = processes.rank == 0
        say = say if say is not None and speaks else lambda line: None
        found = own_device() if device is None else usable_device(device)
        return _train(settings, resume, found, processes, progress and speaks, say)


def _train(
    settings: Settings,
    resume: bool,
    device: torch.device,
    processes: Processes,
    progress: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    out = Path(settings.out)
    _check_out(out, resume)
    torch.manual_seed(settings.seed)
    objective = OBJECTIVES[settings.task](Path(settings.model), settings.max_length, device)
    examples = objective.read_training(Path(settings.train))
    valid = objective.read_validation(Path(settings.valid)) if settings.valid is not None else None
    model = objective.model()
    for read in (examples, valid):
        if read is not None:
            read.tokens.check_fit(model.config)
    positions = model.config.longest
    check("max_length", settings.max_length, settings.max_length <= positions, f"at most the {positions} positions")
    processes.wait()  # nobody writes before everybody has looked
    out.mkdir(parents=True, exist_ok=True)
    with freed_memory_kept(), locked(out / LOCK, "training") if processes.rank == 0 else nullcontext():
        if processes.rank == 0:
            _check_out(out, resume)  # another training may have been here since
        run = _Run(settings, objective, model, examples, valid, processes)
        if resume:
            run.restore()
        try:
            return run.go(progress, say)
        except OSError as error:  # a full disk
            said = f"{error.strerror or error}: the training in {out} ended at step {run.state.step}. --resume goes on"
            raise OSError(error.errno or errno.EIO, said) from error
        except (KeyboardInterrupt, SystemExit):
            saved = "goes on from the last checkpoint"
            how = saved if checkpoints(out) else "begins anew, as no checkpoint was saved yet"
            say(f"ended at step {run.state.step}; --resume {how}")
            raise


@dataclass(frozen=True, eq=False)
class _Step:
    """A step of the optimizer that is under way.

    Attributes:
        step, epoch: its numbers, from 1.
        lr: its learning rate.
        tokens: its tokens.
        facts: its loss and the norm of its gradient; waits for them.
    """

    step: int
    epoch: int
    lr: float
    tokens: int
    facts: Callable[[], list[float]]

    def record(self) -> dict[str, Any]:
        """Its record in losses.jsonl.

        Raises:
            ArgumentError: the loss or the norm is not finite.
        """
        loss, norm = self.facts()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise _not_finite(f"{loss} with a gradient of norm {norm} in step {self.step}")
        return {"step": self.step, "epoch": self.epoch, "loss": loss, "norm": norm, "lr": self.lr}


class _Run:
    """One run: its model, optimizer and state."""

    def __init__(
        self,
        settings: Settings,
        objective: Objective,
        model: Any,
        examples: Examples,
        valid: Examples | None,
        processes: Processes,
    ) -> None:
        self.settings, self.objective, self.model = settings, objective, model.train()
        self.examples, self.valid = examples, valid
        self.processes = processes
        self.out = Path(settings.out)
        with torch.device("meta"):
            self.whole = type(model)(model.config, model.head_config)  # what is saved, without weights of its own
        self.whole.origin = objective.remembered(model.origin)
        self.forward = model if processes.count == 1 else spread(model, settings.parallel)
        if processes.rank > 0:
            torch.manual_seed(settings.seed + processes.rank)  # or all would drop the same
        self.word = WordGradient(model.bert.embeddings.word, sparse=processes.count == 1)
        self.optimizer = adamw(model, settings)
        self.sampler = Sampler(examples.tokens.lengths, settings.batch_tokens, settings.accumulate, settings.seed)
        self.steps = sum(len(self.sampler.steps(epoch)) for epoch in range(settings.epochs))
        self.state = State()
        self.waiting: _Step | None = None  # the last step, until its loss is written down
        self.report: Report  # while it goes on
        # 1.0 from the first step on whose loss or gradient is not finite, where the weights are
        self.broken = torch.zeros((), dtype=torch.float32, device=next(model.parameters()).device)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.processes.rank == 0

    def go(self, progress: bool, say: Callable[[str], None]) -> dict[str, Any]:
        """All that is left to do."""
        settings, state, out = self.settings, self.state, self.out
        if self.writes:
            for leftover in out.glob(".*.tmp"):  # of a run that was killed while it wrote
                remove(leftover)
        report = self.report = Report(out, settings.task, state, self.steps, self.writes, progress, say)
        with report.under_way():
            try:
                while state.epoch < settings.epochs and not self._out_of_patience():
                    steps = self.sampler.steps(state.epoch)
                    while state.index < len(steps):
                        begun = time.monotonic()
                        step = self._step(steps[state.index])
                        state.seconds += time.monotonic() - begun
                        state.tokens += step.tokens
                        state.index += 1
                        state.step += 1
                        self._settle()  # the step before, now that a GPU has the next one
                        self.waiting = step
                        within = state.index < len(steps)
                        if settings.eval_every and state.step % settings.eval_every == 0 and within:
                            report.measured(self._measure(state.epoch + 1))
                        if state.step % settings.checkpoint_every == 0 and within:
                            self._write_checkpoint()
                    self._end_epoch()
                    report.measured(state.metrics)
            except (KeyboardInterrupt, SystemExit):
                if self.processes.count == 1:  # of several, one that is gone may keep a step from ending
                    self._settle()
                raise
        if self.writes:
            if self.objective.complaint:
                said = f"{self.objective.complaint}: it has learned nothing. Try more epochs, or another lr"
                warnings.warn(said, stacklevel=3)
            draw(out / CURVE, state.history)
        metrics = report.metrics(finished=True)
        if self.writes:
            for folder in checkpoints(out):
                shutil.rmtree(folder)
        return metrics

    def restore(self) -> None:
        """Take up the newest checkpoint in the folder, if there is one."""
        folders = checkpoints(self.out)
        if not folders:
            return
        saved = Checkpoint.read(folders[-1])
        saved.check_same(self._identity())
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=saved.model,
            optim_state_dict=saved.optimizer,
            options=StateDictOptions(full_state_dict=True),
        )
        self.state = saved.state
        rng, cuda_rng = saved.rng[self.processes.rank]
        torch.set_rng_state(rng)
        torch.cuda.set_rng_state_all(cuda_rng)

    def _step(self, groups: list[list[int]]) -> _Step:
        """One step of the optimizer, which a GPU may still be at; a loss is the mean over all batches' labels.

        A step whose loss or gradient is not finite leaves weights and optimizer as they were, and so does each step
        after it, which may be under way before the loss is read: the fused optimizers look at `found_inf` on the
        device, as `torch.amp.GradScaler` has them do.
        """
        state = self.state
        batches = [self.objective.batch(self.examples, rows, self._random(i)) for i, rows in enumerate(groups)]
        counts = np.sum([batch.counts for batch in batches], axis=0)
        processes = self.processes
        mine = batches
        if processes.count > 1:
            places = shares([batch.packing.lengths.tolist() for batch in batches], processes.count)[processes.rank]
            mine = [batch.take(some) for batch, some in zip(batches, places, strict=True)]
        losses: list[Tensor] = []
        for batch in mine:
            weights = (batch.counts / np.maximum(counts, 1)).tolist()  # a step without any label has a loss of 0
            parts = batch.losses(self._run(batch, self.forward))
            loss = torch.stack([part * weight for part, weight in zip(parts, weights, strict=True)]).sum()
            (loss * processes.count).backward()  # gradients become the mean over the processes
            losses.append(loss.detach())
        norm = self.word.clip(self.model.parameters(), self.settings.clip)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        facts = torch.stack([processes.sum(torch.stack(losses).sum()), norm])
        self.broken = torch.maximum(self.broken, (~facts.isfinite().all()).float())
        self.optimizer.found_inf = self.broken  # type: ignore[attr-defined]
        lr = learning_rate(self.settings, state.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.word.clear()
        tokens = sum(batch.packing.tokens for batch in batches)
        return _Step(state.step + 1, state.epoch + 1, lr, tokens, fetch(facts))

    def _settle(self) -> None:
        """Write down the step that is waiting for it, if one is; what looks at weights or losses comes after this.

        Raises:
            ArgumentError: its loss or the norm of its gradient is not finite.
        """
        if self.waiting is None:
            return
        step, self.waiting = self.waiting, None
        begun = time.monotonic()
        record = step.record()
        self.state.seconds += time.monotonic() - begun
        self.report.step(record, step.tokens)

    def _run(self, batch: Batch, model: nn.Module) -> Any:
        device = self.objective.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.settings.dtype == "bf16"):
            return batch.run(model)

    def _random(self, batch: int) -> np.random.Generator:
        """For what a batch of the next step draws: a function of the position, so there is no state to save."""
        return np.random.default_rng((self.settings.seed, self.state.epoch, self.state.index, batch))

    def _end_epoch(self) -> None:
        self._settle()
        state = self.state
        state.epoch += 1
        state.index = 0
        mine = [record["loss"] for record in state.history if record["epoch"] == state.epoch and "loss" in record]
        place = {"epoch": state.epoch, "step": state.step, "train_loss": sum(mine) / len(mine)}
        state.metrics = {**place, **self._measure(state.epoch)}
        state.stale = 0 if state.best is not None and state.best["epoch"] == state.epoch else state.stale + 1
        self._write_checkpoint()
        self.report.metrics(finished=False)

    def _measure(self, epoch: int) -> dict[str, Any]:
        """Measure the model, and save it if it is the best so far, or there is nothing to measure by."""
        state = self.state
        self._check_weights()
        measured = self._evaluate()
        if self.valid is not None:
            self.report.record({"step": state.step, "epoch": epoch, "valid": measured})
        if self.valid is None or self.objective.better(measured, state.best):
            self._save()
            state.best = {"epoch": epoch, **({"step": state.step} if self.settings.eval_every else {}), **measured}
        return {"epoch": epoch, "step": state.step, **measured}

    def _check_weights(self) -> None:
        """Raise ArgumentError if a step has left a weight that is not finite: nothing of it is saved."""
        self._settle()
        mine = [x.to_local() if isinstance(x, DTensor) else x for x in self.model.parameters()]
        broken = torch.stack([~x.isfinite().all() for x in mine]).sum()
        if self.processes.sum(broken).item():
            raise _not_finite(f"weights that are not finite after step {self.state.step}")

    def _evaluate(self) -> dict[str, float]:
        if self.valid is None:
            return {}
        self.model.eval()
        with torch.no_grad():
            run = partial(self._run, model=self.model)
            measured = self.objective.evaluate(run, self.valid, self.settings.batch_tokens)
        self.model.train()
        return self.processes.first_of(measured)

    def _save(self) -> None:
        """The model, as a checkpoint of Hugging Face."""
        weights = get_model_state_dict(self.model, options=WHOLE)
        if self.writes:
            self.whole.load_state_dict(weights, assign=True)
            save(self.whole, self.out)

    def _out_of_patience(self) -> bool:
        return self.settings.patience is not None and self.state.stale >= self.settings.patience

    def _write_checkpoint(self) -> None:
        self._check_weights()
        model, optimizer = get_state_dict(self.model, self.optimizer, options=WHOLE)
        rng = self.processes.collect((torch.get_rng_state(), torch.cuda.get_rng_state_all()))
        if self.writes:
            Checkpoint(self._identity(), self.state, model, optimizer, rng).write(self.out)

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for the losses to go on the same."""
        settings = asdict(self.settings)
        for free in ("model", "train", "valid", "out", "checkpoint_every"):
            del settings[free]
        settings |= {"device": self.objective.device.type, "processes": self.processes.count}
        settings["the sizes of the model"] = asdict(self.model.config)
        names = " ".join(name for name, _ in self.model.named_parameters())
        settings["the names of the weights"] = hashlib.sha256(names.encode()).hexdigest()[:16]
        settings["the training examples"] = fingerprint(self.examples)
        settings["the validation examples"] = None if self.valid is None else fingerprint(self.valid)
        return settings


def _check_out(out: Path, resume: bool) -> None:
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ArgumentError(str(there), "a file", "a folder, or nothing there yet")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ArgumentError(str(out), f"no permission to write in {there}", "a folder that is yours to write in")
    held = {path.name for path in out.iterdir()} - {LOCK} if out.exists() else set()
    if held and not resume:
        raise ArgumentError(
            str(out), "a folder with files in it", "a new or empty one", "Resume the run in it, or choose another."
        )
    if METRICS in held and read_json(out / METRICS).get("finished") is True:
        mend = "The learning rate has fallen to 0 in it: to train on, begin anew from its model, into another folder."
        raise ArgumentError(str(out), "a run that is finished", "one to go on with", mend)


def _not_finite(got: str) -> ArgumentError:
    mend = "Lower lr, raise warmup, or use dtype fp32, in a new folder; what was saved before is whole."
    return ArgumentError("loss", got, "finite numbers", mend)
