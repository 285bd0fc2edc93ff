"""The checkpoints of a run: written whole, and read by the same run alone, so that it goes on bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastbert.checkpoints.files import TORCH_LOAD_ERRORS
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.training.objectives import Examples
from fastbert.writing import making

CHECKPOINT, STATE = "checkpoint-", "state.pt"  # a folder with the number of its step, and the file in it


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


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a run needs to go on as if it had never stopped.

    Attributes:
        identity: what has to be the same for the losses to go on the same.
        state: where the run is.
        model, optimizer: their state dicts, whole, on the CPU.
        rng: of each process torch's generator of the CPU and those of the GPUs.
    """

    identity: dict[str, Any]
    state: State
    model: dict[str, Any]
    optimizer: dict[str, Any]
    rng: list[tuple[torch.Tensor, list[torch.Tensor]]]

    def write(self, out: Path) -> None:
        """A whole folder beside its place, renamed when it is on disk; then older ones go."""
        older = checkpoints(out)
        with making(out / f"{CHECKPOINT}{self.state.step}") as folder, (folder / STATE).open("wb") as file:
            try:
                torch.save({**vars(self), "state": asdict(self.state)}, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # what torch hides: a full disk
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
        for old in older:
            shutil.rmtree(old)

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """What `write` wrote.

        Raises:
            CheckpointError: it is damaged.
        """
        path = folder / STATE
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            identity, model, optimizer = (dict(saved[name]) for name in ("identity", "model", "optimizer"))
            return cls(identity, State(**saved["state"]), model, optimizer, list(saved["rng"]))
        except (*TORCH_LOAD_ERRORS, OSError) as error:
            got = f"{type(error).__name__} {error}".splitlines()[0]
            mend = f"Remove {folder} to go on from the one before it, or else from the beginning."
            raise CheckpointError(str(path), got, "a checkpoint of fastbert's training", mend) from error

    def check_same(self, now: dict[str, Any]) -> None:
        """Raise ArgumentError where `identity` was other than it is now."""
        changed = [name for name in now if now[name] != self.identity.get(name)]
        if changed:
            got = ", ".join(repr(now[name]) for name in changed)
            was = ", ".join(repr(self.identity.get(name)) for name in changed)
            raise ArgumentError(
                ", ".join(changed),
                f"{got} where the run began with {was}",
                "what it was",
                "Resume with the same settings, files and version; other ones are another run, in another folder.",
            )


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints in a run's folder, the newest last."""
    found = [path for path in out.glob(f"{CHECKPOINT}*") if path.name.removeprefix(CHECKPOINT).isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix(CHECKPOINT)))


def fingerprint(examples: Examples) -> str:
    """Of their tokens, labels and sentences."""
    digest = hashlib.sha256(examples.tokens.ids.tobytes())
    digest.update(examples.tokens.offsets.tobytes())
    digest.update(json.dumps(list(examples.gold)).encode())
    if examples.sentences is not None:
        digest.update(examples.sentences.starts.tobytes())
        digest.update(examples.sentences.documents.tobytes())
    return digest.hexdigest()[:16]
