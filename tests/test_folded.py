"""The folded encoder: against float64 by the error rule, and used only where it may be."""

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbert.config import EncoderConfig
from fastbert.model import folded
from fastbert.model.body import BertModel
from fastbert.model.heads import BertForSequenceClassification
from fastbert.packing import Packing
from fastbert.run.steps import shared
from fastbert.testing import assert_close

pytestmark = pytest.mark.cpu


def random_model(generator, **options):
    """A model whose every parameter is random, LayerNorm's weights between 0.2 and 1.7."""
    sizes = {"vocab_size": 50, "hidden_size": 48, "num_layers": 3, "num_heads": 3, "intermediate_size": 72}
    model = BertModel(EncoderConfig(**sizes, max_positions=256, **options)).eval()
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * (0.5 if parameter.dim() == 1 else 0.2)
        if "norm.weight" in name.lower():
            values = 0.2 + 1.5 * torch.rand(parameter.shape, generator=generator)
        parameter.data.copy_(values)
    return model


def norms(model):
    parts = [layer.parts() for layer in model.encoder.layer]
    return [model.embeddings.norm, *(norm for of in parts for norm in (of["attention_norm"], of["output_norm"]))]


def batch(lengths, generator):
    packing = Packing.from_lengths(lengths)
    return torch.randint(50, (packing.tokens,), generator=generator), packing


@pytest.fixture
def runs(monkeypatch, choose):
    """Grows by one item with each run of a folded encoder, which here is meant for every CPU."""
    choose("blas")
    seen = []
    run = folded.FoldedEncoder.run

    def counted(self, *args):
        seen.append(self)
        return run(self, *args)

    monkeypatch.setattr(folded.FoldedEncoder, "run", counted)
    return seen


def check(model, ids, packing):
    """Hold the folded run to the error rule; returns its hidden state."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        plain = model(ids, packing=packing, output_hidden_states=True).last_hidden_state  # layer by layer
        got = model(ids, packing=packing).last_hidden_state
        assert_close(got, plain, exact(ids, packing=packing).last_hidden_state, factor=3.0)
    return got


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu", "silu"])
@pytest.mark.parametrize("lengths", [[16], [1, 30, 30, 129, 5], [250, 3, 96]], ids=str)
def test_against_float64(lengths, activation, generator, runs, nan_empty):
    model = random_model(generator, activation=activation)
    check(model, *batch(lengths, generator))
    assert len(runs) == 1


def test_a_few_rows_run_plainly(generator, runs):
    check(random_model(generator), *batch([7, 8], generator))
    assert runs == []


def test_buffers_of_one_batch_do_not_reach_the_next(generator, runs):
    model = random_model(generator)
    batches = [batch(lengths, generator) for lengths in ([120, 40], [17], [100, 100, 2], [])]
    with torch.inference_mode():
        together = [model(ids, packing=packing).last_hidden_state for ids, packing in batches]
    for (ids, packing), hidden in zip(batches, together, strict=True):
        assert torch.equal(check(model, ids, packing), hidden)
    assert runs[0] is runs[1] is runs[2]


def test_only_rows_that_are_read(generator, runs):
    model = BertForSequenceClassification(random_model(generator).config).eval()
    model.bert.load_state_dict(random_model(generator).state_dict(), strict=False)
    ids, packing = batch([4, 110, 1, 9], generator)
    with torch.no_grad():
        plain = model(ids, packing=packing, output_hidden_states=True).logits  # layer by layer
        torch.testing.assert_close(model(ids, packing=packing).logits, plain, rtol=1e-4, atol=1e-5)
    assert len(runs) == 1


@pytest.mark.parametrize("where", range(7))
@pytest.mark.parametrize("weight", [0.0, 1e-6, -1e-9])
def test_weights_near_zero_are_not_folded_where_their_rows_are_probed(weight, where, generator):
    """A zero has no reciprocal, and a large one leaves little of the 1. No product reads the rows of the last norm."""
    model = random_model(generator)
    norms(model)[where].weight.data[3] = weight
    made = folded.fold(model.encoder, model.embeddings.norm)
    assert (made is not None) == (where == 6)


@pytest.mark.parametrize("weight", [0.05, -1.2])
def test_a_small_weight_or_a_negative_one_does_not_hurt(weight, generator, runs):
    model = random_model(generator)
    for i, norm in enumerate(norms(model)):
        norm.weight.data[i] = weight
    check(model, *batch([33, 100], generator))
    assert len(runs) == 1


def test_a_model_that_is_not_folded_runs_as_it_is(generator, runs):
    model = random_model(generator)
    norms(model)[2].weight.data.zero_()
    ids, packing = batch([33, 100], generator)
    with torch.no_grad():
        plain = model(ids, packing=packing, output_hidden_states=True).last_hidden_state  # layer by layer
        torch.testing.assert_close(model(ids, packing=packing).last_hidden_state, plain)
    assert not runs


@pytest.mark.parametrize(
    "case",
    ["gradient", "frozen embeddings", "training", "bfloat16", "hidden states", "bias", "autocast", "dispatch mode"],
)
def test_where_it_does_not_run(case, generator, runs):
    model = random_model(generator, hidden_dropout=0.0, attention_dropout=0.0)
    ids = torch.randint(50, (2, 9), generator=generator)
    options = {}
    if case == "frozen embeddings":
        model.embeddings.requires_grad_(False)
    if case == "training":
        model.train()
    if case == "bfloat16":
        model.bfloat16()
    if case == "hidden states":
        options["output_hidden_states"] = True
    if case == "bias":
        options["attention_mask"] = torch.randn(2, 1, 9, 9, generator=generator)
    with (
        torch.set_grad_enabled(case in ("gradient", "frozen embeddings")),
        torch.autocast("cpu", enabled=case == "autocast"),
        FlopCounterMode(display=False) if case == "dispatch mode" else contextlib.nullcontext(),
    ):
        model(ids, **options)
    assert not runs


def test_changed_weights_are_seen_by_the_next_call(generator):
    model = random_model(generator)
    ids, packing = batch([20, 4], generator)
    first = check(model, ids, packing)
    model.encoder.layer[1].output.dense.bias.data.add_(1.0)
    model.encoder.layer[2].attention.self.key.weight.data.mul_(2.0)
    assert not torch.allclose(check(model, ids, packing), first)


def test_other_steps_are_not_folded(generator, runs):
    """A window in one layer: folding knows the layer of BERT alone."""
    model = random_model(generator)
    layer = model.encoder.layer[0]
    qkv, attend, *rest = layer.steps.of
    layer.steps = shared((qkv, replace(attend, window=2), *rest))
    check(model, *batch([16, 20], generator))
    assert runs == []
    assert "other steps" in model.executors()["folded"]
