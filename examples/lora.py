"""LoRA by PEFT, the encoder computed by fastbert: train adapters and the new head, save them, load them back.

    python examples/lora.py OUT [--small]

Needs transformers and PEFT: pip install peft
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from reviews import reviews
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fastbert
from fastbert.assets import fetch

BATCH = 32


def main() -> None:
    """Train a few per cent of the weights, and print how often the classifier is right before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the adapters")
    parser.add_argument("--small", action="store_true", help="on little data")
    options = parser.parse_args()

    rows = reviews(800 if options.small else 8500)
    held_out = rows[: len(rows) // 6]
    learned = rows[len(held_out) :]
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(fetch("minilm"), num_labels=2)
    fastbert.accelerate(base)  # before or after the adapters are put in
    # The head is new, so it must learn and be saved with the adapters: the task type SEQ_CLS says so to get_peft_model.
    adapters = LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=32, target_modules=["query", "value"])
    model = get_peft_model(base, adapters)
    model.print_trainable_parameters()
    classifier = Classifier(model)
    before = classifier.accuracy(held_out)
    for _ in range(2):
        classifier.learn(learned, lr=2e-3)
    after = classifier.accuracy(held_out)
    print(f"{before:.1%} of {len(held_out)} reviews told right before training, {after:.1%} after")

    model.save_pretrained(options.out)
    fresh = AutoModelForSequenceClassification.from_pretrained(fetch("minilm"), num_labels=2)
    loaded = PeftModel.from_pretrained(fastbert.accelerate(fresh), options.out)
    again = Classifier(loaded).accuracy(held_out)
    print(f"{again:.1%} after they were saved and loaded")


class Classifier:
    """A model of transformers with the tokenizer of MiniLM, and a plain loop."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(fetch("minilm"))

    def batch(self, rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        """Padded tensors, and labels."""
        texts = [row["text"] for row in rows]
        made = self.tokenizer(texts, truncation=True, max_length=64, padding=True, return_tensors="pt")
        return {**made, "labels": torch.tensor([int(row["label"] == "positive") for row in rows])}

    def learn(self, rows: list[dict[str, str]], lr: float) -> None:
        """One epoch."""
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr)
        for begin in range(0, len(rows), BATCH):
            self.model(**self.batch(rows[begin : begin + BATCH])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    @torch.inference_mode()
    def accuracy(self, rows: list[dict[str, str]]) -> float:
        """The share that is told right."""
        self.model.eval()
        right = 0
        for begin in range(0, len(rows), BATCH):
            batch = self.batch(rows[begin : begin + BATCH])
            right += int((self.model(**batch).logits.argmax(1) == batch["labels"]).sum())
        return right / len(rows)


if __name__ == "__main__":
    main()
