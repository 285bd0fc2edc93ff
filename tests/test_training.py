from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny_bert
import torch
import torch.nn.functional as F
import transformers
from processes import PYTHON
from torch import Tensor

from fastbert.checkpoints.load import load
from fastbert.errors import ArgumentError
from fastbert.model.heads import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from fastbert.tasks.classify import TextClassifier
from fastbert.tasks.tag import TextTagger
from fastbert.testing import assert_close
from fastbert.training import Settings, loop, objectives, optimizer, resume, train
from fastbert.training.data import read_classified, read_tagged
from fastbert.training.metrics import entity_scores
from fastbert.training.objectives import Classify, Examples, MaskedLM, Pretrain, Tag
from fastbert.training.parallel import Processes
from fastbert.training.word_gradient import WordGradient

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

pytestmark = pytest.mark.filterwarnings("ignore:no losses.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def undropped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without dropout, which so small a model learns with but slowly."""
    return tiny_bert.make(tmp_path_factory.mktemp("undropped"), dropout=0.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of opinions and names: train and valid."""
    path = tmp_path_factory.mktemp("data")
    for name, count, seed in (("train", 240, 0), ("valid", 60, 1)):
        tiny_bert.opinions(path / f"{name}.jsonl", count, seed)
        tiny_bert.names(path / f"{name}.conll", count, seed)
        tiny_bert.stories(path / f"{name}.txt", count, seed)
    return path


@pytest.fixture
def settings(folder: Path, files: Path, tmp_path: Path) -> Callable[..., Settings]:
    def make(task: Any = "classify", **changes: Any) -> Settings:
        ending = {"tag": "conll", "pretrain": "txt"}.get(task, "jsonl")
        given = Settings(
            task, str(folder), str(files / f"train.{ending}"), str(tmp_path / "out"),
            valid=str(files / f"valid.{ending}"), lr=3e-3, batch_tokens=200, max_length=48,
        )  # fmt: skip
        return replace(given, **changes)

    return make


Make = Callable[..., Settings]


@pytest.fixture(scope="module")
def classifier(undropped: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("classifier")
    train(
        Settings(
            "classify", str(undropped), str(files / "train.jsonl"), str(out), str(files / "valid.jsonl"), epochs=3,
            lr=3e-3, batch_tokens=60, max_length=48,
        )
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def tagger(undropped: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tagger")
    train(
        Settings(
            "tag", str(undropped), str(files / "train.conll"), str(out), str(files / "valid.conll"), epochs=3,
            lr=3e-3, batch_tokens=60, max_length=48, schedule="cosine",
        )
    )  # fmt: skip
    return out


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


def test_a_classifier_is_learned_and_loads_in_transformers(classifier: Path, files: Path) -> None:
    metrics = json.loads((classifier / "metrics.json").read_text())
    assert metrics["accuracy"] > 0.95 and metrics["finished"] and metrics["epoch"] == 3
    assert metrics["best"]["accuracy"] >= metrics["accuracy"]
    assert not list(classifier.glob("*checkpoint*"))
    texts, labels = read_classified(files / "valid.jsonl")
    ours = TextClassifier.from_folder(classifier, device="cpu").classify(texts, max_length=48)
    # The folder holds the best epoch's model: its accuracy, counted anew, is the best one.
    assert np.mean([one.label == label for one, label in zip(ours, labels, strict=True)]) == metrics["best"]["accuracy"]

    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    assert theirs.config.id2label == {0: "neg", 1: "pos"} and theirs.config.label2id == {"neg": 0, "pos": 1}
    with torch.inference_mode():
        logits = theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits
    expected = logits.softmax(1)
    got = torch.tensor([[one.probabilities["neg"], one.probabilities["pos"]] for one in ours])
    assert (got - expected).abs().max() < 1e-5


def test_a_tagger_is_learned_and_loads_in_transformers(tagger: Path, files: Path) -> None:
    metrics = json.loads((tagger / "metrics.json").read_text())
    assert metrics["f1"] > 0.9 and {"precision", "recall", "accuracy"} <= metrics.keys()
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(tagger).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tagger)
    sentences, tags = read_tagged(files / "valid.conll")
    predicted: list[list[str]] = []
    for words in sentences:
        batch = tokenizer(words, is_split_into_words=True, return_tensors="pt")
        with torch.inference_mode():
            best = theirs(**batch).logits[0].argmax(1).tolist()
        firsts = {word: i for i, word in reversed(list(enumerate(batch.word_ids())))}
        predicted.append([theirs.config.id2label[best[firsts[i]]] for i in range(len(words))])
    assert entity_scores(tags, predicted)["f1"] == pytest.approx(metrics["best"]["f1"])


def test_entities_have_their_place_in_the_text(tagger: Path) -> None:
    found = TextTagger.from_folder(tagger, device="cpu").tag(
        ["the Adas met in (Osloburg).", "", "film plot", "Graces  hopper met in Parisburg, " * 12], max_length=16
    )
    text = "the Adas met in (Osloburg)."
    assert [(one.kind, one.start, one.end, one.text) for one in found[0]] == [
        ("PER", 4, 8, "Adas"), ("LOC", 17, 25, "Osloburg"),
    ]  # fmt: skip
    assert all(text[one.start : one.end] == one.text and 0.3 < one.score <= 1 for one in found[0])
    assert found[1] == found[2] == []
    # Twelve windows' worth of text, and nothing lost between them.
    assert [one.text for one in found[3]] == ["Graces  hopper", "Parisburg"] * 12
    assert found[3][-1].end == len("Graces  hopper met in Parisburg, ") * 12 - 2


def test_masked_tokens_are_learned_and_load_in_transformers(settings: Make, tmp_path: Path) -> None:
    metrics = train(settings("mlm", epochs=3, batch_tokens=60, max_length=12))
    first = next(record["loss"] for record in records(tmp_path / "out") if "loss" in record)
    assert metrics["loss"] < 0.75 * first
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[2, 5, 6, 4, 8, 3]])
    ours = load(tmp_path / "out", BertForMaskedLM)(ids).logits
    assert (ours - model(ids).logits).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore::fastbert.errors.UntrainedWarning", "ignore:.*less than two sentences")
def test_pretraining_learns_both_and_loads_in_transformers(settings: Make, undropped: Path, tmp_path: Path) -> None:
    metrics = train(settings("pretrain", model=str(undropped), epochs=25, batch_tokens=120))
    first = next(record["loss"] for record in records(tmp_path / "out") if "loss" in record)
    assert metrics["loss"] == metrics["mlm_loss"] + metrics["next_sentence_loss"] < 0.75 * first
    assert metrics["next_sentence_accuracy"] > 0.8  # a document keeps to its word, so strangers can be told
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["mlm_loss"]))
    model, info = transformers.BertForPreTraining.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids, types = torch.tensor([[2, 5, 6, 3, 4, 8, 3]]), torch.tensor([[0, 0, 0, 0, 1, 1, 1]])
    ours, theirs = load(tmp_path / "out", BertForPreTraining)(ids, token_type_ids=types), model.eval()(ids, None, types)
    for name in ("prediction_logits", "seq_relationship_logits"):
        assert (getattr(ours, name) - getattr(theirs, name)).abs().max() < 1e-4


@pytest.fixture(scope="module")
def pairs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pretrain, Examples]:
    """Of documents whose tokens tell them apart: document d has only the word d, its sentence s has s + 1 of it."""
    path = tmp_path_factory.mktemp("pairs") / "documents.txt"
    words = tiny_bert.VOCABULARY[5:11]
    path.write_text("\n".join("".join(" ".join([word] * n) + "\n" for n in range(1, 8)) for word in words))
    objective = Pretrain(folder, 20, CPU)
    return objective, objective.read_training(path)


def test_pairs_follow_or_are_strangers(pairs: tuple[Pretrain, Examples]) -> None:
    objective, examples = pairs
    rows = [*range(len(examples.tokens.lengths))] * 200
    batch = objective.batch(examples, rows, np.random.default_rng(0))
    assert batch.types is not None and batch.labels is not None and batch.next_sentence is not None
    assert batch.counts == [int((batch.labels != -100).sum()), len(rows)]
    whole = torch.where(batch.labels == -100, batch.ids, batch.labels)
    lengths = batch.packing.lengths.tolist()
    strangers = set()
    for row, ids, types, stranger in zip(
        rows, whole.split(lengths), batch.types.split(lengths), batch.next_sentence.tolist(), strict=True
    ):
        cut = int(types.argmax())
        first, second = ids[:cut].tolist(), ids[cut:].tolist()
        assert types.tolist() == [0] * len(first) + [1] * len(second)
        assert (first[0], first[-1], second[-1]) == (2, 3, 3)
        [one], [other] = set(first[1:-1]), set(second[:-1])  # each text is from one document
        assert (one != other) == stranger
        strangers |= {other} if stranger else set()
        original = examples.tokens.packed([row])[0].tolist()
        if stranger:
            assert len(ids) <= len(original) and len(second) >= 2
        else:  # nothing lost, cut at a sentence's end
            assert [*first[:-1], *second[:-1]] == original[:-2]
            assert len(examples.tokens.packed([row])[0]) == len(ids)
    assert len(strangers) == 6
    share = batch.next_sentence.double().mean().item()
    assert abs(share - 0.5) < 5 * math.sqrt(0.25 / len(rows))


def test_each_place_between_sentences_is_cut(pairs: tuple[Pretrain, Examples]) -> None:
    objective, examples = pairs
    random = np.random.default_rng(0)
    cuts = set()
    for _ in range(100):
        batch = objective.batch(examples, [0], random)
        assert batch.types is not None
        cuts.add(int(batch.types.argmax()) - 2)  # without [CLS] and [SEP]
    sizes = [1, 2, 3, 4, 5, 6, 7]
    assert cuts == {sum(sizes[:n]) for n in range(1, 5)}  # 1 + 2 + 3 + 4 + 5 fill the 17 tokens of the row


def test_pairs_need_two_documents(settings: Make, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("the film\na plot\n\nthe music\n")
    with pytest.raises(ArgumentError, match="1 of 2 documents with two sentences or more; expected two such"):
        train(settings("pretrain", train=str(tmp_path / "one.txt")))
    (tmp_path / "three.txt").write_text("the film\na plot\n\nthe music\n\na scene\nthe plot\n")
    with pytest.warns(UserWarning, match="1 of 3 documents have less than two sentences and are not read"):
        Pretrain(Path(settings().model), 20, CPU).read_training(tmp_path / "three.txt")


def test_the_fingerprint_sees_where_sentences_end(settings: Make, tmp_path: Path) -> None:
    """The tokens of a row are the same however it is cut into sentences; the pairs are not."""
    prints = set()
    for name, text in (("a", "the film\na plot\n"), ("b", "the film a\nplot\n")):
        (tmp_path / name).write_text(text + "\nmusic\nstory\n")
        examples = Pretrain(Path(settings().model), 20, CPU).read_training(tmp_path / name)
        prints.add(resume.fingerprint(examples))
    assert len(prints) == 2


def test_learning_rate() -> None:
    given = Settings("mlm", "", "", "", lr=1.0, warmup=0.2)
    rates = [optimizer.learning_rate(given, step, 10) for step in range(10)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = replace(given, schedule="cosine", warmup=0.0)
    rates = [optimizer.learning_rate(cosine, step, 4) for step in range(4)]
    assert rates == pytest.approx([1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])


def test_decay_spares_biases_and_norms(folder: Path) -> None:
    model = load(folder, BertForMaskedLM)
    decayed, spared = optimizer.decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    spared_names = {names[id(parameter)] for parameter in spared["params"]}
    assert spared_names == {name for name in names.values() if name.endswith("bias") or "norm" in name.lower()}


def test_masks_are_bert_s(folder: Path) -> None:
    objective = MaskedLM(folder, 48, CPU)
    ids = torch.randint(5, objective.tokenizer.size, (40_000,), generator=torch.Generator().manual_seed(0))
    ids[::10] = 3
    masked, labels = objective.mask(ids, np.random.default_rng(0))
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen]) and not chosen[::10].any()
    assert torch.equal(masked[~chosen], ids[~chosen])
    # Binomial counts: five standard deviations around what is expected.
    n = int(chosen.sum())
    assert abs(n - 0.15 * 36_000) < 5 * math.sqrt(36_000 * 0.15 * 0.85)
    hidden = int((masked[chosen] == 4).sum())
    assert abs(hidden - 0.8 * n) < 5 * math.sqrt(n * 0.16)
    kept = int((masked[chosen] == ids[chosen]).sum())
    assert abs(kept - 0.1 * n) < 5 * math.sqrt(n * 0.09)
    for _ in range(20):  # a batch of one token still has something to learn
        assert (objective.mask(torch.tensor([2, 7, 3]), np.random.default_rng(1))[1] != -100).tolist() == [
            False, True, False,
        ]  # fmt: skip


@pytest.mark.parametrize("kind", [Classify, Tag])
def test_accumulation_is_one_mean_over_all_labels(
    kind: Any, undropped: Path, settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of unequal numbers of labels, so that the mean of their means would be something else."""
    task = "classify" if kind is Classify else "tag"
    given = settings(task, model=str(undropped), clip=1e9)
    torch.manual_seed(0)
    objective = kind(Path(given.model), 48, CPU)
    examples = objective.read_training(Path(given.train))
    run = loop._Run(given, objective, objective.model(), examples, None, Processes())
    assert run.model.training
    grads: dict[str, Tensor] = {}
    monkeypatch.setattr(
        run.optimizer, "step", lambda: grads.update({n: p.grad.clone() for n, p in run.model.named_parameters()})
    )

    groups = [[0, 1, 2, 3, 4], [5], [6, 7]]
    step = run._step(groups)
    record, tokens = step.record(), step.tokens
    actual = dict(grads)
    whole = objective.batch(examples, [row for rows in groups for row in rows], np.random.default_rng(0))
    assert tokens == whole.packing.tokens
    run.model.bert.embeddings.word.sparse = False
    results = {}
    for dtype in (torch.float32, torch.float64):
        model = run.model.to(dtype)
        model.zero_grad()
        out = whole.run(model)
        loss = F.cross_entropy(out.logits, whole.labels)
        loss.backward()
        results[dtype] = loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}
    (plain_loss, plain), (exact_loss, exact) = results[torch.float32], results[torch.float64]
    assert_close(torch.tensor(record["loss"], dtype=torch.float32), plain_loss, exact_loss, factor=3, what="loss")
    for name, gradient in exact.items():
        scale = max(exact[other].abs().max().item() for other in exact)  # key biases have a gradient of 0 but for noise
        got, expected = actual[name].double() - gradient, plain[name].double() - gradient
        assert got.abs().max() <= 3 * expected.abs().max() + 1e-6 * scale, name


@pytest.mark.filterwarnings("ignore::fastbert.errors.UntrainedWarning", "ignore:.*less than two sentences")
def test_accumulated_pretraining_weighs_each_loss_by_its_own_labels(settings: Make, undropped: Path) -> None:
    given = settings("pretrain", model=str(undropped))
    objective = Pretrain(undropped, 48, CPU)
    examples = objective.read_training(Path(given.train))
    run = loop._Run(given, objective, objective.model(), examples, None, Processes())
    groups = [[0, 1, 2, 3, 4], [5]]
    batches = [objective.batch(examples, rows, run._random(i)) for i, rows in enumerate(groups)]
    with torch.no_grad():
        outs = [batch.run(run.model.double()) for batch in batches]
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(2):
        total = sum(batch.losses(out)[i] * batch.counts[i] for batch, out in zip(batches, outs, strict=True))
        expected += total / sum(batch.counts[i] for batch in batches)
    record = run._step(groups).record()
    assert record["loss"] == pytest.approx(expected.item(), rel=1e-12)


def test_clipping_and_its_record(settings: Make, tmp_path: Path) -> None:
    train(settings(epochs=1, clip=1e-3))
    clipped = [record for record in records(tmp_path / "out") if "loss" in record]
    assert min(record["norm"] for record in clipped) > 1e-3  # what is recorded is the norm before
    train(settings(epochs=1, out=str(tmp_path / "free")))
    free = [record for record in records(tmp_path / "free") if "loss" in record]
    assert clipped[0] == {**free[0], "lr": clipped[0]["lr"]} and clipped[5]["loss"] != free[5]["loss"]


def test_the_same_seed_gives_the_same_run(settings: Make, tmp_path: Path) -> None:
    runs = {}
    for name, changes in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"checkpoint_every": 2})):
        train(settings(epochs=1, out=str(tmp_path / name), **changes))
        runs[name] = (tmp_path / name / "losses.jsonl").read_bytes()
    assert runs["a"] == runs["b"] == runs["d"] != runs["c"]


def test_bf16_keeps_float32_weights(settings: Make, undropped: Path, tmp_path: Path) -> None:
    metrics = train(settings(epochs=3, dtype="bf16", batch_tokens=60, model=str(undropped)))
    assert metrics["accuracy"] > 0.9
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    train(settings(epochs=3, batch_tokens=60, model=str(undropped), out=str(tmp_path / "fp32")))
    half, full = records(tmp_path / "out"), records(tmp_path / "fp32")
    assert half[0]["loss"] != full[0]["loss"]
    assert half[0]["loss"] == pytest.approx(full[0]["loss"], rel=2e-2)


def test_best_epoch_is_kept_and_patience_ends(settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.5, 0.7, 0.6, 0.7, 0.9])
    weights = []

    def evaluate(self: Classify, run: Any, examples: Any, batch_tokens: int) -> dict[str, float]:
        weights.append(model[0].classifier.weight.detach().clone())
        assert not model[0].training
        return {"accuracy": next(scores)}

    model: list[Any] = []
    made = Classify.model
    monkeypatch.setattr(Classify, "model", lambda self: model.append(made(self)) or model[0])
    monkeypatch.setattr(Classify, "evaluate", evaluate)
    lines: list[str] = []
    metrics = train(settings(epochs=9, patience=2), say=lines.append)
    assert metrics["epoch"] == 4 and metrics["best"] == {"epoch": 2, "accuracy": 0.7} and len(lines) == 4
    assert lines[0].startswith("epoch 1, step ") and lines[0].endswith("accuracy 0.5000")
    saved = load(tmp_path / "out", BertForSequenceClassification)
    assert torch.equal(saved.classifier.weight, weights[1])


def test_without_validation_the_last_epoch_is_kept(settings: Make, tmp_path: Path) -> None:
    metrics = train(settings("tag", valid=None, epochs=2))
    assert metrics["best"] == {"epoch": 2} and "f1" not in metrics and metrics["train_loss"] > 0
    assert load(tmp_path / "out", BertForTokenClassification).head_config.labels == ("B-LOC", "B-PER", "I-PER", "O")


def test_a_trained_head_goes_on_learning(settings: Make, classifier: Path) -> None:
    metrics = train(settings(model=str(classifier), epochs=1, lr=1e-6))
    assert metrics["accuracy"] > 0.95


def test_a_loss_that_is_not_finite_ends_the_run(settings: Make, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"in step \d+; expected finite numbers\. Lower lr"):
        train(settings(lr=1e30, warmup=0.0))
    assert not (tmp_path / "out" / "model.safetensors").exists()


def broken_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Have the gradient of that step be NaN."""
    clip, seen = WordGradient.clip, []

    def clipped(self: WordGradient, parameters: Any, max_norm: float) -> Tensor:
        parameters = list(parameters)
        seen.append(0)
        if len(seen) == step:
            parameters[-1].grad.view(-1)[0] = torch.nan
        return clip(self, parameters, max_norm)

    patch.setattr(WordGradient, "clip", clipped)


def test_a_step_that_is_not_finite_leaves_weights_and_optimizer_as_they_were(
    settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings()
    objective = Classify(Path(given.model), 48, CPU)
    examples = objective.read_training(Path(given.train))
    run = loop._Run(given, objective, objective.model(), examples, None, Processes())
    broken_at(2, monkeypatch)
    run._step([[0, 1, 2]]).record()
    before = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()["state"]))
    broken = run._step([[3, 4]])
    after = run.model.state_dict(), run.optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    with pytest.raises(ArgumentError, match="gradient of norm nan in step 1"):  # the state counts in `go`
        broken.record()
    run._step([[5]])  # nor does one that was under way when the broken one was looked at change anything
    after = run.model.state_dict(), run.optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("every", [1, 2, 3, 500])
def test_the_step_that_broke_is_named_and_nothing_of_it_is_written(
    every: int, settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is looked at when the next one is under way, which leaves the weights as they were before it too."""
    weights: list[dict[str, Tensor]] = []
    runs: list[Any] = []
    step = loop._Run._step

    def noted(self: Any, groups: Any) -> Any:
        runs.append(self)
        weights.append({name: parameter.detach().clone() for name, parameter in self.model.named_parameters()})
        return step(self, groups)

    monkeypatch.setattr(loop._Run, "_step", noted)
    broken_at(4, monkeypatch)
    with pytest.raises(ArgumentError, match="gradient of norm nan in step 4;"):
        train(settings(checkpoint_every=every))
    assert len(weights) == (5 if 4 % every else 4)  # a checkpoint looks before there is a next one
    torch.testing.assert_close(dict(runs[0].model.named_parameters()), weights[3], rtol=0, atol=0)
    assert [record["step"] for record in records(tmp_path / "out")] == [1, 2, 3]
    last = 3 // every * every
    found = [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")]
    assert found == ([f"checkpoint-{last}"] if last else [])
    if last:
        saved = torch.load(tmp_path / "out" / found[0] / "state.pt", weights_only=True)["model"]
        for name, expected in weights[last].items():
            assert torch.equal(saved[name], expected), name


def test_the_last_step_is_written_down_when_a_run_is_interrupted(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = loop._Run._step

    def stopping(self: Any, groups: Any) -> Any:
        if self.state.step == 3:
            raise KeyboardInterrupt
        return step(self, groups)

    monkeypatch.setattr(loop._Run, "_step", stopping)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train(settings(), say=said.append)
    assert said[-1].startswith("ended at step 3;")
    assert [record["step"] for record in records(tmp_path / "out")] == [1, 2, 3]


def test_a_step_is_looked_at_when_the_next_is_under_way(settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a GPU has work while the host waits; but before a measurement, a checkpoint, the end of an epoch."""
    seen: list[tuple[str, int]] = []
    step, record, evaluate = loop._Run._step, loop._Step.record, loop._Run._evaluate

    def stepping(self: Any, groups: Any) -> Any:
        done = step(self, groups)
        seen.append(("step", done.step))
        return done

    def reading(self: Any) -> Any:
        seen.append(("read", self.step))
        return record(self)

    def evaluating(self: Any) -> Any:
        seen.append(("measure", self.state.step))
        return evaluate(self)

    monkeypatch.setattr(loop._Run, "_step", stepping)
    monkeypatch.setattr(loop._Step, "record", reading)
    monkeypatch.setattr(loop._Run, "_evaluate", evaluating)
    steps = train(settings(epochs=1, eval_every=4))["step"]
    assert steps > 5
    assert seen[:12] == [
        ("step", 1), ("step", 2), ("read", 1), ("step", 3), ("read", 2), ("step", 4), ("read", 3), ("read", 4),
        ("measure", 4), ("step", 5), ("step", 6), ("read", 5),
    ]  # fmt: skip
    assert seen[-2:] == [("read", steps), ("measure", steps)]
    assert [number for what, number in seen if what == "read"] == list(range(1, steps + 1))


def test_long_texts_are_said(settings: Make) -> None:
    with pytest.warns(UserWarning, match=r"train\.jsonl: \d+ of 240 texts fill max_length=8 tokens"):
        train(settings(epochs=1, max_length=8))


def test_long_sentences_lose_no_word(folder: Path, files: Path) -> None:
    objective = Tag(folder, 8, CPU)
    examples = objective.read_training(files / "train.conll")
    words = sum(len(sentence) for sentence in read_tagged(files / "train.conll")[0])
    assert examples.targets is not None and int((examples.targets != -100).sum()) == words
    assert len(examples.tokens.lengths) > 240 and examples.tokens.lengths.max() <= 8


def test_no_matplotlib_is_said_once(settings: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(settings(epochs=2))
    assert sum("matplotlib" in str(warning.message) for warning in caught) == 1
    assert not (tmp_path / "out" / "losses.png").exists()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_losses_as_a_picture(settings: Make, tmp_path: Path) -> None:
    train(settings(epochs=1))
    assert (tmp_path / "out" / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").glob(".*"))


def test_progress_shows_speed_and_time(
    settings: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(settings(epochs=1))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    train(settings(epochs=1, out=settings().out + "2"), progress=True)
    printed = capsys.readouterr()
    assert printed.out == "" and "tokens/s" in printed.err and "loss" in printed.err


# ---------------------------------------------------------------------------------------------------- going on


def command(given: Settings, *more: str) -> subprocess.Popen[bytes]:
    options = [
        "--model", given.model, "--train", given.train, "--valid", str(given.valid), "--out", given.out,
        "--epochs", str(given.epochs), "--lr", str(given.lr), "--batch-tokens", str(given.batch_tokens),
        "--max-length", str(given.max_length), "--checkpoint-every", str(given.checkpoint_every),
        "--accumulate", str(given.accumulate), *more,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    return subprocess.Popen(
        [*PYTHON, "-m", "fastbert", "train", given.task, *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip


def kill_after(lines: int, process: subprocess.Popen[bytes], losses: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if losses.exists() and losses.read_bytes().count(b"\n") >= lines:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    process.wait(timeout=60)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL, said


@pytest.mark.filterwarnings("ignore::fastbert.errors.UntrainedWarning", "ignore:.*less than two sentences")
@pytest.mark.parametrize(
    ("task", "kills"),
    [
        pytest.param("classify", 2, marks=pytest.mark.long),
        pytest.param("mlm", 1, marks=pytest.mark.long),
        ("pretrain", 1),
    ],
)
def test_killed_and_resumed_is_as_never_stopped(task: str, kills: int, settings: Make, tmp_path: Path) -> None:
    # Dropout is on, and the checkpoints are in the middle of epochs.
    given = settings(task, epochs=4, checkpoint_every=5, accumulate=2, batch_tokens=60, max_length=32)
    train(replace(given, out=str(tmp_path / "whole")))
    whole = tmp_path / "whole"
    total = len(records(whole))
    out = Path(given.out)
    for lines, more in ((8, ()), (total // 2, ("--resume",)))[:kills]:
        kill_after(lines, command(given, *more), out / "losses.jsonl")
        assert lines <= len((out / "losses.jsonl").read_bytes().splitlines()) < total  # it was under way
        assert len(list(out.glob("checkpoint-*"))) >= 1
    (out / ".config.json.1.tmp").touch()  # a kill may come while a file is written
    metrics = train(given, resume=True)
    for name in ("losses.jsonl", "model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    expected = json.loads((whole / "metrics.json").read_text())
    clock = {"seconds": 0, "tokens_per_second": 0}
    assert {**metrics, **clock} == {**expected, **clock}
    assert not list(out.glob("*checkpoint*")) + list(out.glob(".*"))


class StopError(Exception):
    pass


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the run end by an exception in the middle of that step."""
    step = loop._Run._step

    def stopping(self: Any, groups: Any) -> Any:
        if self.state.step == steps:
            raise StopError
        return step(self, groups)

    monkeypatch.setattr(loop._Run, "_step", stopping)


def test_resume_before_the_first_checkpoint_begins_anew(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(epochs=1, out=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(StopError):
            train(settings(epochs=1))
    assert not list((tmp_path / "out").glob("*checkpoint*"))
    train(settings(epochs=1), resume=True)
    assert (tmp_path / "out" / "losses.jsonl").read_bytes() == (tmp_path / "whole" / "losses.jsonl").read_bytes()


def test_resume_needs_the_same_run(settings: Make, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(StopError):
            train(settings(epochs=1, checkpoint_every=2))
    for changes, message in (
        ({"lr": 1.0}, "lr: got 1.0 where the run began with 0.003"),
        ({"epochs": 2}, "epochs"),
        ({"train": str(files / "valid.jsonl")}, "the training examples"),
    ):
        with pytest.raises(ArgumentError, match=message):
            train(settings(**{"epochs": 1, "checkpoint_every": 2, **changes}), resume=True)
    with pytest.raises(ArgumentError, match="a new or empty one"):
        train(settings(epochs=1))
    train(settings(epochs=1, checkpoint_every=3), resume=True)
    with pytest.raises(ArgumentError, match="a run that is finished"):
        train(settings(epochs=1), resume=True)


def test_a_checkpoint_is_whole_or_not_there(settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(epochs=1, checkpoint_every=2)
    train(replace(given, out=str(tmp_path / "whole")))
    saved = torch.save

    def failing(state: Any, file: Any) -> None:
        if state["state"]["step"] == 4:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        saved(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing)
        with pytest.raises(OSError, match="No space"):
            train(given)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    train(given, resume=True)
    assert (tmp_path / "out" / "losses.jsonl").read_bytes() == (tmp_path / "whole" / "losses.jsonl").read_bytes()
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "ner"}, "classify, tag, mlm, pretrain"),
        ({"dtype": "fp16"}, "fp32 or bf16"),
        ({"schedule": "constant"}, "linear or cosine"),
        ({"epochs": 0}, "epochs: got 0"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"clip": 0.0}, "clip"),
        ({"warmup": 1.0}, "warmup"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"seed": -1}, "seed"),
        ({"accumulate": 0}, "accumulate"),
        ({"patience": 0}, "patience"),
        ({"patience": 1, "valid": None}, "Give one to measure by"),
        ({"max_length": 49}, "at most the 48 positions"),
        ({"max_length": 2}, "max_length"),
        ({"train": "nowhere.jsonl"}, "No such file"),
        ({"model": "nowhere"}, "no folder there"),
    ],
)
def test_wrong_settings(settings: Make, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(settings(**changes))
    assert not (tmp_path / "out").exists()


def test_labels_have_to_fit(settings: Make, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("text,label\na,x\nb,x\n")
    with pytest.raises(ArgumentError, match="one label, 'x'"):
        train(settings(train=str(tmp_path / "one.csv")))
    with pytest.raises(ArgumentError, match="the label 'x'; expected labels that the training file has too"):
        train(settings(valid=str(tmp_path / "one.csv")))
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="a file; expected a folder"):
        train(settings(out=str(tmp_path / "file")))


def test_objectives_are_all_tested() -> None:
    assert set(objectives.OBJECTIVES) == {"classify", "tag", "mlm", "pretrain"}
