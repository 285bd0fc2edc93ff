"""transformers' Trainer as you know it, the encoder computed by fastbert: one line more.

    python examples/transformers_trainer.py [--small]            and with --plain without that line, to compare

Needs transformers and accelerate: pip install accelerate
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import transformers
from reviews import Review, reviews

import fastbert
from fastbert.assets import fetch


def main() -> None:
    """Fine-tune a classifier of reviews, and print how long it took and how often it is right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="on little data")
    parser.add_argument("--plain", action="store_true", help="without fastbert")
    options = parser.parse_args()

    rows = reviews(600 if options.small else 8500)
    held_out = len(rows) // 6
    tokenizer = transformers.AutoTokenizer.from_pretrained(fetch("minilm"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(fetch("minilm"), num_labels=2)
    if not options.plain:
        fastbert.accelerate(model)  # the one line

    def examples(rows: list[Review]) -> list[dict[str, Any]]:
        made = tokenizer([row["text"] for row in rows], truncation=True, max_length=64)
        return [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "label": int(row["label"] == "positive")}
            for ids, row in zip(made["input_ids"], rows, strict=True)
        ]

    def accuracy(of: Any) -> dict[str, float]:
        return {"accuracy": float((of.predictions.argmax(1) == of.label_ids).mean())}

    with tempfile.TemporaryDirectory() as out:
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                out,
                num_train_epochs=2,
                learning_rate=2e-4 if options.small else 5e-5,
                per_device_train_batch_size=32,
                per_device_eval_batch_size=32,
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=examples(rows[held_out:]),
            eval_dataset=examples(rows[:held_out]),
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            compute_metrics=accuracy,
        )
        trained = trainer.train()
        metrics = trainer.evaluate()
    print(
        f"{trained.metrics['train_runtime']:.0f} s of training, {metrics['eval_accuracy']:.1%} of {held_out} told right"
    )


if __name__ == "__main__":
    main()
