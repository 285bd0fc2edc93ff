"""transformers' Trainer on a model whose encoder is ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbert.model.encoder import Encoder

transformers = pytest.importorskip("transformers", reason="its Trainer is meant")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it")

LENGTHS = [3, 17, 9, 24, 5, 11, 2, 30]


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """Ragged rows whose label is whether the token 7 is in them."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.rows = [torch.randint(5, 40, (LENGTHS[i % 8],), generator=draw).tolist() for i in range(64)]
        for row in self.rows[::2]:
            row[len(row) // 2] = 7

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.rows[i], "labels": int(7 in self.rows[i])}


def collate(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    rows = [torch.tensor(example["input_ids"]) for example in examples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.tensor([example["labels"] for example in examples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


def fine_tune(model: Any, out: Path) -> tuple[list[float], Any]:
    arguments = transformers.TrainingArguments(
        output_dir=str(out), num_train_epochs=3, per_device_train_batch_size=8, learning_rate=2e-3, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, seed=3, disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Texts(), data_collator=collate)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer.model


def test_fine_tuning_is_the_same_with_our_encoder(tmp_path: Path) -> None:
    """Without dropout, whose draws differ; the same seed, so the same batches."""
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.BertForSequenceClassification(config)
    ours = copy.deepcopy(theirs)
    ours.bert.encoder = Encoder.from_hf(ours.bert.encoder)
    expected, plain = fine_tune(theirs, tmp_path / "theirs")
    actual, packed = fine_tune(ours, tmp_path / "ours")
    assert len(actual) == 12 and isinstance(packed.bert.encoder, Encoder)
    assert actual == pytest.approx(expected, rel=1e-3)
    assert actual[-1] < 0.7 * actual[0]
    batch = collate([Texts()[i] for i in range(16)])
    with torch.no_grad():
        torch.testing.assert_close(packed.eval()(**batch).logits, plain.eval()(**batch).logits, rtol=1e-2, atol=1e-2)
