"""Training by two processes, as torchrun starts them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny_bert
import torch
from processes import PYTHON

from fastbert.errors import ArgumentError
from fastbert.training import Settings, train
from fastbert.training.objectives import OBJECTIVES, Batch
from fastbert.training.parallel import shares
from fastbert.training.sampler import Sampler

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.filterwarnings(
    "ignore:no losses.png", "ignore::fastbert.errors.UntrainedWarning", "ignore:.*less than two sentences"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data")
    tiny_bert.make(path / "dropped")
    tiny_bert.make(path / "undropped", dropout=0.0)
    tiny_bert.opinions(path / "classify.jsonl", 60, 0)
    with (path / "classify.jsonl").open("a") as file:
        file.write(json.dumps({"text": "film " * 90 + "awful", "label": "neg"}) + "\n")  # a batch of its own
    tiny_bert.names(path / "tag.conll", 60, 0)
    tiny_bert.opinions(path / "mlm.jsonl", 60, 0)
    tiny_bert.stories(path / "pretrain.txt", 60, 0)
    return path


def settings(data: Path, task: Any, out: Path, model: str = "undropped", **more: Any) -> Settings:
    file = next(path for path in data.iterdir() if path.stem == task)
    given = Settings(task, str(data / model), str(file), str(out), valid=str(file), epochs=1, lr=3e-3, batch_tokens=60)
    return replace(given, max_length=48, **more)


def torchrun(given: Settings, *more: str) -> subprocess.Popen[str]:
    values = {name.replace("_", "-"): value for name, value in vars(given).items() if name != "task"}
    options = [f"--{name}={value}" for name, value in values.items() if value is not None]
    launcher = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*launcher, "fastbert", "train", given.task, *options, *more], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    return out


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("task", "parallel"),
    [
        ("classify", "ddp"),
        pytest.param("tag", "fsdp", marks=pytest.mark.long),
        ("mlm", "fsdp"),
        pytest.param("pretrain", "ddp", marks=pytest.mark.long),
    ],
)
def test_two_processes_are_as_one(task: str, parallel: Any, data: Path, tmp_path: Path) -> None:
    """A step is cut by tokens over both, a batch of one sequence among them, and accumulates two batches."""
    given = settings(data, task, tmp_path / "two", accumulate=2, parallel=parallel)
    said = finish(torchrun(given))
    metrics = json.loads(said)  # one line, so only one process said it
    expected = train(replace(given, out=str(tmp_path / "one")))
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(one) == len(two) > 5
    for ours, theirs in zip(one[:-1], two[:-1], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3)  # rounding, grown by AdamW
    assert one[0] == pytest.approx(two[0], rel=1e-5)  # and not yet in the first step
    assert metrics["loss" if "loss" in metrics else "f1"] == pytest.approx(
        expected["loss" if "loss" in metrics else "f1"], rel=2e-2
    )
    weights = [safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert tensor.shape == weights[1][name].shape
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(
        path.name for path in (tmp_path / "two").iterdir()
    )


ON_GPUS = """
import json, sys
import torch
import torch.distributed as dist
from fastbert.training import parallel

calls, join = [], dist.init_process_group
torch.cuda.is_available = lambda: True
torch.cuda.set_device = lambda device: calls.append(["set_device", str(device)])

def init(backend, device_id=None):
    calls.append(["init_process_group", backend, str(device_id)])
    join("gloo")

dist.init_process_group = init
with parallel.joined() as processes:
    assert parallel.own_device() == torch.device("cuda", processes.rank)
    open(f"{sys.argv[1]}/{processes.rank}", "w").write(json.dumps(calls))
"""


def test_each_process_has_a_gpu_of_its_own(tmp_path: Path) -> None:
    """With nccl both would otherwise meet on the first one. torch.cuda is a fake that records."""
    script = tmp_path / "script.py"
    script.write_text(ON_GPUS)
    launcher = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*launcher, script, tmp_path], env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert ran.returncode == 0, ran.stderr
    for rank in range(2):
        device = f"cuda:{rank}"
        calls = json.loads((tmp_path / str(rank)).read_text())
        assert calls == [["set_device", device], ["init_process_group", "nccl", device]]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes there")
@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_killed_and_resumed_is_as_never_stopped(parallel: Any, data: Path, tmp_path: Path) -> None:
    given = settings(data, "mlm", tmp_path / "out", "dropped", parallel=parallel, epochs=4, checkpoint_every=5)
    whole = tmp_path / "whole"
    finish(torchrun(replace(given, out=str(whole))))
    out, process = Path(given.out), torchrun(given)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "losses.jsonl").exists() and (out / "losses.jsonl").read_bytes().count(b"\n") >= 8:
            break
        time.sleep(0.001)
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):  # torchrun and its children, each of which has its own session
        with suppress(FileNotFoundError, ProcessLookupError):
            if f"--out={given.out}".encode() in cmdline.read_bytes().split(b"\0"):
                os.kill(int(cmdline.parent.name), signal.SIGKILL)
    process.communicate(timeout=60)
    assert 8 <= len(records(out)) < len(records(whole)) and list(out.glob("checkpoint-*"))
    with pytest.raises(ArgumentError, match="processes: got 1 where the run began with 2"):
        train(given, resume=True)
    finish(torchrun(given, "--resume"))
    for name in ("losses.jsonl", "model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_an_error_is_said_and_nothing_hangs(data: Path, tmp_path: Path) -> None:
    process = torchrun(settings(data, "classify", tmp_path / "out", lr=1e30, warmup=0.0))
    _, err = process.communicate(timeout=180)
    assert process.returncode != 0 and "expected finite numbers" in err


@pytest.mark.parametrize("task", list(OBJECTIVES))
def test_shares_of_a_batch_hold_its_sequences(task: str, data: Path) -> None:
    given = settings(data, task, data)
    objective = OBJECTIVES[task](Path(given.model), 48, torch.device("cpu"))
    examples = objective.read_training(Path(given.train))
    batch = objective.batch(examples, [0, 1, 2, 3, 4], np.random.default_rng(0))
    parts = [batch.take([1, 4]), batch.take([0, 2, 3])]

    def sequences(part: Batch) -> list[Any]:
        lengths = part.packing.lengths.tolist()
        assert part.labels is not None
        types = torch.zeros_like(part.ids) if part.types is None else part.types
        by_token = len(part.labels) == len(part.ids)
        labels = part.labels.split(lengths) if by_token else part.labels
        relation = labels if part.next_sentence is None else part.next_sentence
        split = zip(part.ids.split(lengths), types.split(lengths), labels, relation, strict=True)
        return [[x.tolist() for x in sequence] for sequence in split]

    whole = sequences(batch)
    assert sequences(parts[0]) == [whole[1], whole[4]] and sequences(parts[1]) == [whole[0], whole[2], whole[3]]
    assert [sum(counts) for counts in zip(*(part.counts for part in parts), strict=True)] == batch.counts
    none = batch.take([])
    assert none.packing.batch == 1 and not any(none.counts)
    model = objective.model()
    losses = none.losses(none.run(model))
    assert [loss.item() for loss in losses] == [0.0] * len(batch.counts)
    torch.autograd.backward(losses, [torch.randn(()) for _ in losses])
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_processes_get_about_equal_tokens_of_a_ragged_corpus(processes: int, accumulate: int) -> None:
    corpus = np.minimum(3 + np.random.default_rng(0).pareto(1.1, 2000) * 8, 512).astype(np.int64)
    for step in Sampler(corpus, 1024, accumulate, seed=1).steps(0):
        lengths = [corpus[rows].tolist() for rows in step]
        taken = shares(lengths, processes)
        tokens = [
            sum(lengths[number][place] for number, places in enumerate(mine) for place in places) for mine in taken
        ]
        assert max(tokens) - min(tokens) <= max(map(max, lengths))
        for number, rows in enumerate(step):
            assert sorted(place for mine in taken for place in mine[number]) == list(range(len(rows)))


def test_a_process_may_get_nothing() -> None:
    assert shares([[5, 9]], 3) == [[[1]], [[0]], [[]]]
