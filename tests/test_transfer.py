"""Tensors go to a device together; what the host waits for on a GPU is what the docs say."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
import torch
from stand_in import GPU, StandIn

from fastbert import backend
from fastbert.checkpoints.load import load, save
from fastbert.config import EncoderConfig, HeadConfig
from fastbert.model import heads
from fastbert.model.heads import BertForSequenceClassification, BertForTokenClassification
from fastbert.model.sentence import Mode
from fastbert.ops import cross_entropy
from fastbert.packing import Packing
from fastbert.tasks.batch_tokens import gpu_batch_tokens
from fastbert.tasks.classify import TextClassifier
from fastbert.tasks.encode import TextEncoder
from fastbert.tasks.score import TextScorer
from fastbert.tasks.tag import TextTagger
from fastbert.text.tokens import Tokens
from fastbert.training import Settings, loop
from fastbert.training.objectives import OBJECTIVES, Task
from fastbert.training.parallel import Processes
from fastbert.training.word_gradient import WordGradient
from fastbert.transfer import fetch, send

TEXTS = [f"the {word} was {'very ' * (i % 7)}{tiny_bert.GOOD[i % 3]}" for i, word in enumerate(tiny_bert.PLAIN)]
GIB = 2**30


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """Its device plays a GPU in this test, and the kernels run there."""
    with backend.use_backend("triton"), StandIn() as mode:
        yield mode


@contextmanager
def noted(stand_in: StandIn) -> Iterator[list[Packing]]:
    """The batches that are made inside, whose copies and waits are counted anew."""
    seen: list[Packing] = []
    made = Tokens.batch

    def batch(tokens: Tokens, rows: Sequence[int], device: torch.device) -> Any:
        found = made(tokens, rows, device)
        seen.append(found[2])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokens, "batch", batch)
        stand_in.waits.clear()
        stand_in.copies = 0
        yield seen


def given() -> list[torch.Tensor]:
    return [
        torch.arange(5), torch.tensor([1, 2, 3], dtype=torch.int32), torch.empty(0), torch.randn(3, 7),
        torch.tensor(True), torch.randn(4, 6).half().t(),
    ]  # fmt: skip


def test_on_the_cpu_tensors_stay_themselves() -> None:
    tensors = given()
    sent = send(tensors, torch.device("cpu"))
    assert all(a is b for a, b in zip(sent, tensors, strict=True))


def test_any_tensors_arrive_whole_by_one_copy_that_nobody_waits_for(stand_in: StandIn) -> None:
    tensors = given()
    sent = send(tensors, GPU)
    assert stand_in.copies == 1 and not stand_in.waits
    for there, here in zip(sent, tensors, strict=True):
        assert (there.device, there.dtype, there.shape) == (GPU, here.dtype, here.shape)
        assert there.is_contiguous() and there.data_ptr() % 16 == sent[0].data_ptr() % 16
        assert torch.equal(there.cpu(), here)


def test_a_packing_of_lengths_waits_for_nothing(stand_in: StandIn) -> None:
    packing = Packing.from_lengths([3, 0, 5], device=GPU)
    assert packing.cu_seqlens.device == packing.indices.device == GPU
    assert stand_in.copies == 1 and not stand_in.waits


@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "lasttoken"])
def test_encode_copies_once_a_batch_and_waits_once(pooling: Mode, stand_in: StandIn, tmp_path: Path) -> None:
    folder = tiny_bert.make(tmp_path)
    encoder = TextEncoder.from_folder(folder, dtype="fp32", device=GPU)
    with noted(stand_in) as seen:
        found = encoder.encode(TEXTS, pooling=pooling, batch_tokens=32)
    assert stand_in.copies == len(seen) > 2
    assert stand_in.waits == Counter({"copy to the CPU": 1})
    with backend.use_backend("torch"):
        expected = TextEncoder.from_folder(folder, device="cpu").encode(TEXTS, pooling=pooling)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("task", ["classify", "score", "tag"])
def test_so_do_the_other_tasks(task: str, stand_in: StandIn, tmp_path: Path) -> None:
    folder, kinds = (
        tiny_bert.make(tmp_path / "body"),
        {"classify": TextClassifier, "score": TextScorer, "tag": TextTagger},
    )
    head = {"classify": ("a", "b"), "score": ("a",), "tag": ("B-PER", "I-PER", "O")}[task]
    kind = BertForTokenClassification if task == "tag" else BertForSequenceClassification
    with pytest.warns(UserWarning, match="no trained"):
        model = load(folder, kind, head=HeadConfig(head), device="cpu")
    save(model, tmp_path / "headed")
    (tmp_path / "headed/vocab.txt").write_text((folder / "vocab.txt").read_text())
    answers = []
    for device, path in ((GPU, "triton"), (torch.device("cpu"), "torch")):
        one = kinds[task].from_folder(tmp_path / "headed", dtype="fp32", device=device)
        with backend.use_backend(path), noted(stand_in) as seen:
            answers.append(getattr(one, task)(TEXTS, batch_tokens=32))
        if device == GPU:
            assert stand_in.copies == len(seen) > 2
            assert stand_in.waits == Counter({"copy to the CPU": 1})
    if task == "score":
        np.testing.assert_allclose(*answers, atol=1e-5)
    for ours, theirs in zip(*answers, strict=True):
        if task == "classify":
            assert ours.probabilities == pytest.approx(theirs.probabilities, abs=1e-5)
        if task == "tag":
            assert [(found.kind, found.start, found.end) for found in ours] == [
                (found.kind, found.start, found.end) for found in theirs
            ]
            assert [found.score for found in ours] == pytest.approx([found.score for found in theirs], abs=1e-5)


def test_a_batch_for_a_gpu_is_as_large_as_it_needs_and_as_the_memory_allows() -> None:
    """Predicted for 80 GiB: a batch takes the GPU twice the host's time; 32,768 tokens at least, where they fit."""
    minilm = EncoderConfig(hidden_size=384, num_heads=12, num_layers=6, intermediate_size=1536)
    tiny = EncoderConfig(hidden_size=128, num_heads=2, num_layers=2, intermediate_size=512)
    large = EncoderConfig(hidden_size=1024, num_heads=16, num_layers=24, intermediate_size=4096)
    assert gpu_batch_tokens(minilm, 2, 80 * GIB) == gpu_batch_tokens(large, 2, 80 * GIB) == 32768
    assert 200_000 < gpu_batch_tokens(tiny, 2, 80 * GIB) < 250_000
    fits = gpu_batch_tokens(large, 4, 4 * GIB)
    assert 4096 < fits < 32768 and fits * (4096 + 5 * 1024) * 4 <= 4 * GIB / 10
    assert gpu_batch_tokens(large, 4, 2**20) == 1024


def test_what_is_fetched_is_there_after_its_event(stand_in: StandIn) -> None:
    x = torch.arange(3.0, device=GPU)
    first, second = fetch(x), fetch(x + 1)
    assert not stand_in.waits
    assert second() == [1.0, 2.0, 3.0] and first() == [0.0, 1.0, 2.0]
    assert stand_in.waits == Counter({"event": 2})


@pytest.mark.parametrize(
    "task", [*(pytest.param(task, marks=pytest.mark.long) for task in ("classify", "tag", "mlm")), "pretrain"]
)
def test_a_training_step_waits_once_when_it_is_looked_at(
    task: Task, stand_in: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its batch goes by one copy; what counts of masked tokens, and the pairs' labels, by one more each."""
    clip = WordGradient.clip

    def clipped(self: WordGradient, parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
        parameters = list(parameters)
        for parameter in parameters:  # whose gradients C++ made
            if parameter.grad is not None:
                stand_in.place(parameter.grad, True)
        return clip(self, parameters, max_norm)

    monkeypatch.setattr(WordGradient, "clip", clipped)
    for module in (heads, cross_entropy):  # which looks at labels' values on a CPU only
        monkeypatch.setattr(module, "check_labels", lambda *_, **__: None)
    writes = {"tag": (tiny_bert.names, "conll"), "pretrain": (tiny_bert.stories, "txt")}
    write, ending = writes.get(task, (tiny_bert.opinions, "jsonl"))
    file = write(tmp_path / f"train.{ending}", 8, 0)
    folder = tiny_bert.make(tmp_path / "model")
    given = Settings(task, str(folder), str(file), str(tmp_path / "out"), batch_tokens=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        objective = OBJECTIVES[task](folder, 48, GPU)
        examples = objective.read_training(file)
        run = loop._Run(given, objective, objective.model(), examples, None, Processes())
    run._step([[0]]).record()
    stand_in.waits.clear()
    stand_in.copies = 0
    step = run._step([[1, 2]])
    assert stand_in.copies == {"mlm": 2, "pretrain": 3}.get(task, 1)
    assert not stand_in.waits
    assert math.isfinite(step.record()["loss"])
    assert stand_in.waits == Counter({"event": 1})
