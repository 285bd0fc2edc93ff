"""The training loop: steps over packed batches, checkpoints that continue bit for bit, the folder that comes out."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, get_args

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
from fastbert.checkpoints.files import TORCH_LOAD_ERRORS, making, read_json, remove, replacing
from fastbert.checkpoints.load import save
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.training.allocator import freed_memory_kept
from fastbert.training.lock import LOCK, locked
from fastbert.training.objectives import OBJECTIVES, Batch, Examples, Objective, Task
from fastbert.training.parallel import Parallel, Processes, joined, own_device, shares, spread
from fastbert.training.sampler import Sampler
from fastbert.training.word_gradient import WordGradient
from fastbert.transfer import fetch

Schedule = Literal["linear", "cosine"]

METRICS, LOSSES, CURVE, STATE = "metrics.json", "losses.jsonl", "losses.png", "state.pt"
CHECKPOINT = "checkpoint-"  # and the number of the step
SAID_EVERY = 30.0  # seconds between lines on how far the training is, where there is no bar
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on the first process, wherever the shards are


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
        _check("task", self.task, self.task in OBJECTIVES, f"one of {', '.join(OBJECTIVES)}")
        _check("dtype", self.dtype, self.dtype in ("fp32", "bf16"), "fp32 or bf16")
        _check("schedule", self.schedule, self.schedule in get_args(Schedule), "linear or cosine")
        _check("parallel", self.parallel, self.parallel in get_args(Parallel), "ddp or fsdp")
        for name in ("epochs", "batch_tokens", "accumulate", "checkpoint_every"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "clip"):
            _check(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a number above 0")
        _check("seed", self.seed, self.seed >= 0, "at least 0")
        _check("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0")
        _check("warmup", self.warmup, 0 <= self.warmup < 1, "a share of the steps in [0, 1)")
        for name, unit in (("patience", "epoch"), ("eval_every", "step")):
            value = getattr(self, name)
            if value is not None:
                _check(name, value, value >= 1, f"at least 1 {unit}")
                _check(name, value, self.valid is not None, "a valid file beside it", "Give one to measure by.")


@dataclass
class State:
    """Where a run is, beside the weights.

    Attributes:
        epoch, index: the next step is number `index` of this epoch.
        step: steps done.
        history: what losses.jsonl has: a record for each step and each evaluation.
        best: epoch and metrics of the best measurement so far, and its step where epochs have several.
        stale: epochs since.
        metrics: after the last epoch.
        tokens, seconds: spent on training so far.
    """

    epoch: int = 0
    index: int = 0
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    stale: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0


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
    positions = model.config.max_positions
    _check("max_length", settings.max_length, settings.max_length <= positions, f"at most the {positions} positions")
    processes.wait()  # nobody writes before everybody has looked
    out.mkdir(parents=True, exist_ok=True)
    with freed_memory_kept(), locked(out) if processes.rank == 0 else nullcontext():
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
            say(f"ended at step {run.state.step}; --resume goes on from the last checkpoint")
            raise


def learning_rate(settings: Settings, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`: a linear rise, then a linear or cosine fall to 0."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return settings.lr * (step + 1) / (warm + 1)
    done = (step - warm) / (steps - warm)
    return settings.lr * (1 - done if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


def adamw(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """The optimizer: AdamW over `decay_groups`."""
    return torch.optim.AdamW(decay_groups(model, settings.weight_decay), lr=settings.lr, fused=True)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups of parameters: matrices and tables decay; vectors (biases, LayerNorms) do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


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
        self.report: Callable[[dict[str, Any], int], None] = lambda record, tokens: None  # takes each step's, in order
        # 1.0 from the first step on whose loss or gradient is not finite, where the weights are
        self.broken = torch.zeros((), dtype=torch.float32, device=next(model.parameters()).device)

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.processes.rank == 0

    def go(self, progress: bool, say: Callable[[str], None]) -> dict[str, Any]:
        """All that is left to do."""
        settings, state = self.settings, self.state
        if self.writes:
            for leftover in self.out.glob(".*.tmp"):  # of a run that was killed while it wrote
                remove(leftover)
            with replacing(self.out / LOSSES) as temporary:
                temporary.write_text("".join(map(_line, state.history)), encoding="utf-8")
        path = self.out / LOSSES if self.writes else Path(os.devnull)
        said, step_said = time.monotonic(), state.step
        with path.open("a", encoding="utf-8") as losses, _bar(progress, self.steps, state.step) as show:

            def report(record: dict[str, Any], tokens: int) -> None:
                nonlocal said, step_said
                self._record(record, losses)
                show(record["loss"], tokens)
                step, now = record["step"], time.monotonic()
                if not progress and now - said > SAID_EVERY:
                    left = (now - said) / (step - step_said) * (self.steps - step)
                    say(self._how_far(record, left))
                    said, step_said = now, step

            self.report = report
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
                            say(_said(self._measure(state.epoch + 1, losses)))
                        if state.step % settings.checkpoint_every == 0 and within:
                            self._write_checkpoint()
                    self._end_epoch(losses)
                    say(_said(state.metrics))
            except (KeyboardInterrupt, SystemExit):
                if self.processes.count == 1:  # of several, one that is gone may keep a step from ending
                    self._settle()
                raise
        if self.writes and self.objective.complaint:
            warnings.warn(
                f"{self.objective.complaint}: it has learned nothing. Try more epochs, or another lr", stacklevel=3
            )
        if self.writes:
            _draw(self.out / CURVE, state.history)
        metrics = self._write_metrics(finished=True)
        if self.writes:
            for folder in _checkpoints(self.out):
                shutil.rmtree(folder)
        return metrics

    def restore(self) -> None:
        """Take up the newest checkpoint in the folder, if there is one."""
        folders = _checkpoints(self.out)
        if not folders:
            return
        path = folders[-1] / STATE
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            began = dict(saved["identity"])
            state, random = State(**saved["state"]), list(saved["rng"])
            parts = {name: dict(saved[name]) for name in ("model", "optimizer")}
        except (*TORCH_LOAD_ERRORS, OSError) as error:
            got = f"{type(error).__name__} {error}".splitlines()[0]
            mend = f"Remove {path.parent} to go on from the one before it, or else from the beginning."
            raise CheckpointError(str(path), got, "a checkpoint of fastbert's training", mend) from error
        now = self._identity()
        changed = [name for name in now if now[name] != began.get(name)]
        if changed:
            got = ", ".join(repr(now[name]) for name in changed)
            was = ", ".join(repr(began.get(name)) for name in changed)
            raise ArgumentError(
                ", ".join(changed),
                f"{got} where the run began with {was}",
                "what it was",
                "Resume with the same settings, files and version; other ones are another run, in another folder.",
            )
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=parts["model"],
            optim_state_dict=parts["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        self.state = state
        rng, cuda_rng = random[self.processes.rank]
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
        self.report(record, step.tokens)

    def _run(self, batch: Batch, model: nn.Module) -> Any:
        device = self.objective.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.settings.dtype == "bf16"):
            return batch.run(model)

    def _random(self, batch: int) -> np.random.Generator:
        """For what a batch of the next step draws: a function of the position, so there is no state to save."""
        return np.random.default_rng((self.settings.seed, self.state.epoch, self.state.index, batch))

    def _end_epoch(self, losses: IO[str]) -> None:
        self._settle()
        state = self.state
        state.epoch += 1
        state.index = 0
        mine = [record["loss"] for record in state.history if record["epoch"] == state.epoch and "loss" in record]
        place = {"epoch": state.epoch, "step": state.step, "train_loss": sum(mine) / len(mine)}
        state.metrics = {**place, **self._measure(state.epoch, losses)}
        state.stale = 0 if state.best is not None and state.best["epoch"] == state.epoch else state.stale + 1
        self._write_checkpoint()
        self._write_metrics(finished=False)

    def _measure(self, epoch: int, losses: IO[str]) -> dict[str, Any]:
        """Measure the model, and save it if it is the best so far, or there is nothing to measure by."""
        state = self.state
        self._check_weights()
        measured = self._evaluate()
        if self.valid is not None:
            self._record({"step": state.step, "epoch": epoch, "valid": measured}, losses)
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

    def _how_far(self, record: dict[str, Any], left: float) -> str:
        speed = self.state.tokens / self.state.seconds
        return (
            f"step {record['step']} of {self.steps}, epoch {record['epoch']}, loss {record['loss']:.4f}, "
            f"{speed:,.0f} tokens/s, about {timedelta(seconds=round(left))} left"
        )

    def _out_of_patience(self) -> bool:
        return self.settings.patience is not None and self.state.stale >= self.settings.patience

    def _record(self, record: dict[str, Any], losses: IO[str]) -> None:
        self.state.history.append(record)
        losses.write(_line(record))
        losses.flush()

    def _write_metrics(self, finished: bool) -> dict[str, Any]:
        state = self.state
        metrics = {"task": self.settings.task, **state.metrics, "best": state.best, "seconds": round(state.seconds, 1)}
        metrics |= {"tokens_per_second": round(state.tokens / state.seconds, 1), "finished": finished}
        if self.writes:
            with replacing(self.out / METRICS) as temporary:
                temporary.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        return metrics

    def _write_checkpoint(self) -> None:
        """A whole folder beside its place, renamed when it is on disk; then older ones go."""
        self._check_weights()
        model, optimizer = get_state_dict(self.model, self.optimizer, options=WHOLE)
        rng = self.processes.collect((torch.get_rng_state(), torch.cuda.get_rng_state_all()))
        if not self.writes:
            return
        older = _checkpoints(self.out)
        state = {
            "identity": self._identity(),
            "state": asdict(self.state),
            "model": model,
            "optimizer": optimizer,
            "rng": rng,
        }
        with making(self.out / f"{CHECKPOINT}{self.state.step}") as folder, (folder / STATE).open("wb") as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # what torch hides: a full disk
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
        for old in older:
            shutil.rmtree(old)

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for the losses to go on the same."""
        settings = asdict(self.settings)
        for free in ("model", "train", "valid", "out", "checkpoint_every"):
            del settings[free]
        settings |= {"device": self.objective.device.type, "processes": self.processes.count}
        settings["the sizes of the model"] = asdict(self.model.config)
        names = " ".join(name for name, _ in self.model.named_parameters())
        settings["the names of the weights"] = hashlib.sha256(names.encode()).hexdigest()[:16]
        settings["the training examples"] = _fingerprint(self.examples)
        settings["the validation examples"] = None if self.valid is None else _fingerprint(self.valid)
        return settings


def _fingerprint(examples: Examples) -> str:
    digest = hashlib.sha256(examples.tokens.ids.tobytes())
    digest.update(examples.tokens.offsets.tobytes())
    digest.update(json.dumps(list(examples.gold)).encode())
    if examples.sentences is not None:
        digest.update(examples.sentences.starts.tobytes())
        digest.update(examples.sentences.documents.tobytes())
    return digest.hexdigest()[:16]


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


def _checkpoints(out: Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest last."""
    found = [path for path in out.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)))


def _check(name: str, value: object, right: bool, expected: str, mend: str = "") -> None:
    if not right:
        raise ArgumentError(name, value, expected, mend)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _not_finite(got: str) -> ArgumentError:
    mend = "Lower lr, raise warmup, or use dtype fp32, in a new folder; what was saved before is whole."
    return ArgumentError("loss", got, "finite numbers", mend)


def _said(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in metrics.items())


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _draw(path: Path, history: list[dict[str, Any]]) -> None:
    """The losses as a picture, if matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        warnings.warn(
            f"no {path.name}, because matplotlib is not installed (it is in fastbert's extra `train`)", stacklevel=2
        )
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    trained = [record for record in history if "loss" in record]
    axes.plot([record["step"] for record in trained], [record["loss"] for record in trained], label="training")
    measured = [record for record in history if "loss" in record.get("valid", {})]
    if measured:
        steps = [record["step"] for record in measured]
        axes.plot(steps, [record["valid"]["loss"] for record in measured], "o-", label="validation")
        axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


@contextmanager
def _bar(wanted: bool, steps: int, done: int) -> Iterator[Callable[[float, int], None]]:
    """A bar on stderr; what it gives is called with the loss and the tokens of each step."""
    if not wanted:
        yield lambda loss, tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("loss {task.fields[loss]:.4f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=steps, completed=done, loss=math.nan, speed=0.0)
        begun, seen = time.monotonic(), 0

        def show(loss: float, tokens: int) -> None:
            nonlocal seen
            seen += tokens
            progress.update(bar, advance=1, loss=loss, speed=seen / (time.monotonic() - begun))

        yield show
