"""What was laid out of weights is made anew after every usual way of writing them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from test_dropin_arguments import pair
from torch import nn

import fastbert
from fastbert.config import EncoderConfig
from fastbert.model.body import BertModel
from fastbert.ops.watch import Watch, weights_changed

TEXTS = ["a b c d e f", "g", "h i j a b c d"] * 8


def model(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "hidden_size": 96, "num_heads": 12, "intermediate_size": 200, "vocab_size": 40}
    return BertModel(EncoderConfig(**(sizes | changes))).eval().to(dtype)


def of(made, name):
    return dict(made.named_parameters())[f"encoder.layer.1.{name}"]


def step_by_data(made):
    """An optimizer of its time: one step, written to `.data`."""
    for parameter in made.parameters():
        parameter.data.add_(torch.full_like(parameter, 1e-2))


def bitfit(made):
    for name, parameter in made.named_parameters():
        if name.endswith("bias") and "encoder" in name:
            parameter.data.add_(1e-2)


def averaged(made):
    """An EMA's shadow in the place of the weights, by pointers."""
    for parameter in made.parameters():
        parameter.data = parameter.data * 0.999


def copied(made):
    for parameter in made.parameters():
        parameter.data.copy_(parameter.data * 0.9)


def magnitude_pruned(made):
    """A fifth of each matrix, the smallest."""
    for name, parameter in made.named_parameters():
        if parameter.dim() == 2 and "encoder" in name:
            parameter.data.mul_(parameter.data.abs() > parameter.data.abs().quantile(0.2))


def merged(made):
    """A product of low rank, LoRA's, added in."""
    weight = of(made, "attention.self.value.weight")
    weight.data.add_(torch.randn(96, 2) @ torch.randn(2, 96) * 0.1)


CHANGES = {
    "a bias": lambda made: of(made, "intermediate.dense.bias").data[17].add_(0.5),
    "a norm": lambda made: of(made, "output.LayerNorm.weight").data[5].mul_(1.5),
    "NaN": lambda made: of(made, "output.LayerNorm.bias").data[5].fill_(torch.nan),
    **{
        f"head {head} of queries": lambda made, head=head: (
            of(made, "attention.self.query.weight").data[8 * head : 8 * head + 8].zero_()
        )
        for head in range(12)
    },
    **{
        f"head {head} of the output": lambda made, head=head: (
            of(made, "attention.output.dense.weight").data[:, 8 * head : 8 * head + 8].zero_()
        )
        for head in range(12)
    },
    "optimizer": step_by_data,
    "BitFit": bitfit,
    "EMA": averaged,
    "EMA in place": copied,
    "pruning": magnitude_pruned,
    "LoRA merged": merged,
    "one number": lambda made: of(made, "output.dense.weight").detach()[3, 4].add_(1.0),
    "a parameter": lambda made: setattr(made.encoder.layer[0].output.dense, "bias", nn.Parameter(torch.ones(96))),
    "a module": lambda made: setattr(made.encoder.layer[1].intermediate, "dense", nn.Linear(96, 200)),
    "a layer dropped": lambda made: made.encoder.layer.__delitem__(1),
    "cast": lambda made: made.double(),
    "loaded": lambda made: made.load_state_dict({k: v * 1.1 for k, v in made.state_dict().items()}),
    "a hook": lambda made: made.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None),
    "a forward in its place": lambda made: setattr(made.encoder.layer[0].output.dense, "forward", lambda x: x),
    "said": lambda made: weights_changed(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_once(change, dtype):
    made = model(dtype)
    watch = Watch(made)
    assert watch.changed() and not watch.changed()
    if dtype == torch.bfloat16 and change == "pruning":
        pytest.skip("torch has no quantile of bfloat16")
    with torch.no_grad():
        CHANGES[change](made)
    assert watch.changed()
    assert not watch.changed()


def test_training_mode_gradients_and_use_are_no_change():
    made = model()
    watch = Watch(made)
    watch.changed()
    made.train()
    out = made(torch.ones(1, 3, dtype=torch.int64)).last_hidden_state
    out.backward(torch.randn_like(out))
    made.eval().requires_grad_(False)
    assert not watch.changed()


def test_weights_made_in_inference_mode_and_odd_strides_are_watched():
    with torch.inference_mode():
        made = model()
    made.encoder.layer[0].output.dense.weight = nn.Parameter(torch.randn(200, 96).t(), requires_grad=False)
    watch = Watch(made)
    assert watch.changed() and not watch.changed()
    made.encoder.layer[0].output.dense.weight.data.mul_(2.0)
    assert watch.changed()


def test_what_no_sample_feels_can_be_said():
    """The page on the CPU says that a single number of a matrix, by `.data`, is not seen."""
    made = model()
    watch = Watch(made)
    watch.changed()
    of(made, "output.dense.weight").data[3, 150].add_(1.0)
    assert not watch.changed()
    weights_changed()
    assert watch.changed()


@pytest.fixture(params=["user_case_43", "user_case_43b"], ids=["kernels", "folded"])
def encoder(request, tmp_path, choose):
    """43: weights laid out for this CPU's kernels; 43b: folded for a BLAS."""
    if request.param == "user_case_43b":
        choose("blas")
    pair(tmp_path)
    return fastbert.TextEncoder.from_folder(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda made: made.encoder.layer[1].intermediate.dense.bias.data.add_(0.5),
        lambda made: made.encoder.layer[1].output.LayerNorm.weight.data[:9].mul_(1.5),
        lambda made: made.encoder.layer[0].attention.output.dense.weight.data[:, 16:].zero_(),
        bitfit,
        step_by_data,
        lambda made: made.encoder.layer[0].register_forward_hook(lambda module, inputs, out: out * 2.0),
        lambda made: made.encoder.layer.__delitem__(1),
    ],
    ids=["bias", "norm", "head", "BitFit", "optimizer", "hook", "dropped layer"],
)
def test_user_case_43_stale_layouts(change, encoder):
    before = encoder.encode(TEXTS, max_length=16)
    change(encoder.model)
    after = encoder.encode(TEXTS, max_length=16)
    fresh = fastbert.TextEncoder(copy.deepcopy(encoder.model), encoder.tokenizer).encode(TEXTS, max_length=16)
    np.testing.assert_allclose(after, fresh, atol=1e-5)
    assert np.abs(after - before).max() > 1e-4
