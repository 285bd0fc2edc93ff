"""How a training goes: measured and said on its way, refused where it can't go on, ended where numbers break."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import torch

from fastbert.checkpoints.load import load
from fastbert.errors import ArgumentError
from fastbert.model.heads import BertForSequenceClassification
from fastbert.training import Settings, loop, report, train
from fastbert.training.objectives import Classify

pytestmark = pytest.mark.filterwarnings("ignore:no losses.png")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made")
    tiny_bert.make(path / "model")
    tiny_bert.opinions(path / "train.jsonl", 60, 0)
    tiny_bert.opinions(path / "valid.jsonl", 20, 1)
    return path


@pytest.fixture
def given(made: Path, tmp_path: Path) -> Settings:
    """Six or seven steps an epoch."""
    return Settings(
        "classify", str(made / "model"), str(made / "train.jsonl"), str(tmp_path / "out"), str(made / "valid.jsonl"),
        epochs=2, lr=3e-3, batch_tokens=120, max_length=48,
    )  # fmt: skip


def records(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "losses.jsonl").read_text().splitlines()]


class StopError(Exception):
    pass


def stop_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    step = loop._Run._step

    def stopping(self: Any, groups: Any) -> Any:
        if self.state.step == steps:
            raise StopError
        return step(self, groups)

    patch.setattr(loop._Run, "_step", stopping)


def test_measured_within_an_epoch(given: Settings) -> None:
    lines: list[str] = []
    metrics = train(replace(given, eval_every=2), say=lines.append)
    steps = metrics["step"]
    measured = [record["step"] for record in records(given.out) if "valid" in record]
    ends = {steps // 2, steps}
    assert steps >= 8 and measured == sorted({*range(2, steps, 2)} | ends)
    assert [int(line.split("step ")[1].split(",")[0]) for line in lines] == measured
    best = max((record for record in records(given.out) if "valid" in record), key=lambda one: one["valid"]["accuracy"])
    assert metrics["best"] == {"epoch": best["epoch"], "step": best["step"], **best["valid"]}
    # Nothing but what is measured changes.
    train(replace(given, out=given.out + "2"))
    assert [one for one in records(given.out) if "loss" in one] == [
        one for one in records(given.out + "2") if "loss" in one
    ]


def test_the_best_within_an_epoch_is_kept(given: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.9, *[0.6] * 100])
    weights: list[torch.Tensor] = []
    models: list[Any] = []
    made = Classify.model

    def evaluate(self: Classify, run: Any, examples: Any, batch_tokens: int) -> dict[str, float]:
        weights.append(models[0].classifier.weight.detach().clone())
        return {"accuracy": next(scores)}

    monkeypatch.setattr(Classify, "model", lambda self: models.append(made(self)) or models[0])
    monkeypatch.setattr(Classify, "evaluate", evaluate)
    metrics = train(replace(given, eval_every=2, epochs=9, patience=2))
    assert metrics["best"] == {"epoch": 1, "step": 4, "accuracy": 0.9}
    assert metrics["epoch"] == 3  # the first epoch had the best, the next two had not
    assert torch.equal(load(given.out, BertForSequenceClassification).classifier.weight, weights[1])


def test_going_on_between_measurements_is_as_never_stopped(given: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(given, eval_every=2, checkpoint_every=3)
    train(replace(given, out=given.out + "2"))
    with monkeypatch.context() as patch:
        stop_after(5, patch)  # a checkpoint after 3, measured after 4
        with pytest.raises(StopError):
            train(given)
    train(given, resume=True)
    assert records(given.out) == records(given.out + "2")


@pytest.mark.parametrize(
    ("changes", "message"), [({"eval_every": 0}, "at least 1 step"), ({"valid": None}, "measure by")]
)
def test_measuring_needs_steps_and_a_file(given: Settings, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"eval_every.*{message}"):
        replace(given, **{"eval_every": 2, **changes})


def test_a_log_gets_a_line_now_and_then(given: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    train(given, say=lines.append)
    assert len(lines) == 2 and all(line.startswith("epoch") for line in lines)  # it took less than half a minute
    monkeypatch.setattr(report, "SAID_EVERY", 0.0)
    lines.clear()
    metrics = train(replace(given, out=given.out + "2"), say=lines.append)
    told = [line for line in lines if line.startswith("step")]
    assert len(told) == metrics["step"] and len(lines) == len(told) + 2
    assert told[0].startswith(f"step 1 of {metrics['step']}, epoch 1, loss 0.") and " tokens/s, about 0:00:" in told[0]
    assert told[-1].endswith("about 0:00:00 left")
    lines.clear()
    train(replace(given, out=given.out + "3"), say=lines.append, progress=True)  # the bar says it
    assert len(lines) == 2


def test_user_case_25_resume_more_epochs(given: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule is laid out over all epochs, so more of them are another run, and the error says how."""
    once = replace(given, epochs=1)
    train(once)
    with pytest.raises(ArgumentError, match=r"a run that is finished; .*fallen to 0.*begin anew from its model"):
        train(replace(once, epochs=2), resume=True)
    assert train(replace(once, model=given.out, out=given.out + "2"))["train_loss"] > 0
    stopped = replace(given, out=given.out + "3", checkpoint_every=2)
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(StopError):
            train(stopped)
    with pytest.raises(ArgumentError, match=r"epochs: got 3 where the run began with 2; .* another run"):
        train(replace(stopped, epochs=3), resume=True)


def test_all_that_differs_on_resume_is_named(given: Settings, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(given, checkpoint_every=2)
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(StopError):
            train(given)
    for changes, message in (
        ({"lr": 1.0, "seed": 3}, "lr, seed: got 1.0, 3 where the run began with 0.003, 0"),
        ({"eval_every": 2, "clip": 2.0}, "clip, eval_every: got 2.0, 2 where the run began with 1.0, None"),
        ({"valid": str(made / "train.jsonl")}, "the validation examples: got"),
        ({"valid": None}, "the validation examples: got None"),
    ):
        with pytest.raises(ArgumentError, match=message):
            train(replace(given, **changes), resume=True)
    small = tiny_bert.make(made / "small", hidden_size=16)
    with pytest.raises(ArgumentError, match="the sizes of the model: got"):
        train(replace(given, model=str(small)), resume=True)


@pytest.mark.parametrize("valid", [True, False])
def test_a_model_that_broke_is_not_saved(given: Settings, valid: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step of an epoch may leave weights that no loss has seen yet."""
    given = given if valid else replace(given, valid=None)
    steps = train(replace(given, epochs=1, out=given.out + "1"))["step"]
    step = loop._Run._step

    def breaking(self: Any, groups: Any) -> Any:
        done = step(self, groups)
        if self.state.step + 1 == 2 * steps:
            with torch.no_grad():
                next(self.model.parameters()).view(-1)[0] = float("nan")
        return done

    monkeypatch.setattr(loop._Run, "_step", breaking)
    with pytest.raises(ArgumentError, match=f"not finite after step {2 * steps}; .*what was saved before is whole"):
        train(given)
    saved = load(given.out, BertForSequenceClassification)
    assert all(parameter.isfinite().all() for parameter in saved.parameters())
    assert "nan" not in (Path(given.out) / "losses.jsonl").read_text().lower()
    [folder] = Path(given.out).glob("checkpoint-*")
    assert folder.name == f"checkpoint-{steps}"
