"""Every door to an encoder takes the fast path of a CPU, and leaves it where somebody looks on or changes something."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapted import Adapted
from torch import Tensor, nn
from torch.nn.utils import prune

import fastbert
from fastbert import BertModel, Encoder, EncoderConfig, paths_taken
from fastbert.backend import use_backend
from fastbert.cpu.machine import Machine, host
from fastbert.errors import ArgumentError
from fastbert.run.frozen import FrozenLinear
from fastbert.run.steps import shared

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(not isinstance(host(), Machine), reason="no kernels for this CPU: one with AVX2 runs this"),
]

IDS = torch.tensor([[3, 7, 9, 4, 8], [5, 6, 2, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.fixture(autouse=True)
def kernels() -> Any:
    with use_backend("native"):
        yield


@pytest.fixture
def model() -> BertModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_heads": 3, "intermediate_size": 72, "num_layers": 2}
    return BertModel(EncoderConfig(vocab_size=50, **sizes)).eval()


def run(model: Any, **options: Any) -> tuple[Tensor, dict[str, int]]:
    """The hidden states, and what computed the layers."""
    with torch.no_grad(), paths_taken() as taken:
        out = model(IDS, attention_mask=MASK, **options).last_hidden_state
    return out, dict(taken)


def check(model: Any, taken: dict[str, int]) -> None:
    """By these executors it computes what it does layer by layer."""
    wanted, _ = run(model, output_hidden_states=True)
    got, found = run(model)
    assert found == taken
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


FAST, SLOW = {"cpu": 1}, {"eager": 2}


@pytest.mark.filterwarnings("ignore::fastbert.errors.UntrainedWarning")
def test_each_door(model: BertModel, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", reason="one of the doors")
    fastbert.save(model, tmp_path)
    check(model, FAST)
    check(fastbert.load(tmp_path), FAST)
    check(fastbert.load(tmp_path, fastbert.BertForTokenClassification).bert, FAST)
    theirs = transformers.BertModel.from_pretrained(tmp_path).eval()
    theirs.encoder = Encoder.from_hf(theirs.encoder)
    got, taken = run(theirs)
    assert taken == FAST
    torch.testing.assert_close(got[MASK.bool()], run(model)[0][MASK.bool()], atol=1e-4, rtol=1e-4)


def test_who_looks_on_is_called(model: BertModel) -> None:
    check(model, FAST)
    for part in (model.encoder.layer[1].output.dense, model.encoder.layer[0]):
        seen: list[int] = []
        handle = part.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        check(model, SLOW)
        assert seen == [1, 1]
        handle.remove()
        check(model, FAST)


def test_adapters_come_and_go(model: BertModel) -> None:
    check(model, FAST)
    attention = model.encoder.layer[0].attention.self
    base, attention.query = attention.query, Adapted(attention.query)
    check(model, SLOW)
    attention.query = base
    check(model, FAST)


CHANGES: dict[str, Callable[[BertModel], object]] = {
    "in place": lambda made: [p.mul_(1.1) for p in made.parameters()],
    "data": lambda made: [p.data.mul_(1.1) for p in made.parameters()],
    "loaded": lambda made: made.load_state_dict({name: x * 0.9 for name, x in made.state_dict().items()}),
    "trained": lambda made: made.train().eval(),
    "said": lambda made: fastbert.weights_changed(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change(model: BertModel, change: str) -> None:
    check(model, FAST)
    with torch.no_grad():
        CHANGES[change](model)
    check(model, FAST)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"])
def test_copies_have_weights_of_their_own(model: BertModel, how: Callable[[BertModel], BertModel]) -> None:
    before, _ = run(model)
    other = how(model)
    with torch.no_grad():
        for parameter in other.encoder.parameters():
            parameter.zero_()
    check(other, FAST)
    assert torch.equal(run(model)[0], before)


def test_parameters_in_the_place_of_its_own(model: BertModel) -> None:
    before, _ = run(model)
    halved = {name: x * 0.5 for name, x in model.named_parameters()}
    with torch.no_grad():
        got = torch.func.functional_call(model, halved, (IDS, MASK)).last_hidden_state
    other = copy.deepcopy(model)
    other.load_state_dict(halved, strict=False)
    torch.testing.assert_close(got, run(other)[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(run(model)[0], before)


def test_what_comes_out_may_be_written_to(model: BertModel) -> None:
    with torch.inference_mode():
        inside = model(IDS, MASK).last_hidden_state
    out, _ = run(model)
    assert torch.equal(out, inside)
    out.add_(1.0)
    assert torch.equal(run(model)[0], inside)


def test_a_gradient_or_a_dropout_goes_layer_by_layer(model: BertModel) -> None:
    check(model, FAST)
    with paths_taken() as taken:
        assert model(IDS, MASK).last_hidden_state.requires_grad
    assert taken == SLOW
    model.encoder.layer[0].output.dropout.train()
    assert run(model)[1] == SLOW


def test_threads_share_what_was_laid_out(model: BertModel) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for length in range(1, 20):
                ids = torch.randint(1, 50, (2, length), generator=generator)
                wanted = model(ids, output_hidden_states=True).last_hidden_state
                if not torch.allclose(model(ids).last_hidden_state, wanted, atol=1e-4):
                    wrong.append(length)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_steps_that_change(model: BertModel) -> None:
    check(model, FAST)
    first = model.encoder.layer[0]
    before = run(model)[0]
    qkv, attend, *rest = first.steps.of
    first.steps = shared((qkv, dataclasses.replace(attend, window=1), *rest))
    after, taken = run(model)
    torch.testing.assert_close(after, run(model, output_hidden_states=True)[0], atol=1e-4, rtol=1e-4)
    assert taken == FAST and not torch.allclose(after, before, atol=1e-3)


def test_a_frozen_model_computes_the_same_to_the_bit(model: BertModel, tmp_path: Any) -> None:
    model = BertModel(dataclasses.replace(model.config, hidden_size=96)).eval()
    fastbert.save(model, tmp_path / "saved")
    frozen = fastbert.load(tmp_path / "saved", frozen=True)
    assert frozen.encoder.is_frozen() and not any(p.requires_grad for p in frozen.parameters())
    got, taken = run(frozen)
    assert taken == FAST
    assert torch.equal(got, run(model)[0])
    check(frozen, FAST)
    wanted, given = model.state_dict(), frozen.state_dict()
    assert list(given) == list(wanted)
    assert all(torch.equal(given[name], wanted[name]) for name in wanted)
    fastbert.save(frozen, tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "saved" / file).read_bytes()


@pytest.fixture
def frozen(model: BertModel) -> BertModel:
    made = BertModel(dataclasses.replace(model.config, hidden_size=96)).eval()
    assert made.encoder.freeze()
    return made


def test_a_frozen_model_holds_no_other_copy_of_its_weights(frozen: BertModel) -> None:
    run(frozen)
    held = {part.matrix.untyped_storage().data_ptr() for part in frozen.modules() if isinstance(part, FrozenLinear)}
    with torch.no_grad():
        program = frozen.encoder._program(torch.zeros(1, 96))
    assert program is not None
    assert {given.matrix.untyped_storage().data_ptr() for of in program.weights for given in of.values()} == held
    assert len(held) == 1


@pytest.mark.parametrize("copied", ["deepcopy", "pickled", "half"])
def test_copies_of_a_frozen_model_are_ordinary(frozen: BertModel, copied: str) -> None:
    wanted, _ = run(frozen)
    if copied == "half":
        frozen.half().float()
        made, tolerance = frozen, 2e-2
    else:
        made = copy.deepcopy(frozen) if copied == "deepcopy" else pickle.loads(pickle.dumps(frozen))
        tolerance = 0.0
    assert not made.encoder.is_frozen()
    torch.testing.assert_close(run(made)[0], wanted, atol=tolerance, rtol=0.0)
    check(made, FAST)
    made.train()


def test_weights_are_loaded_into_a_frozen_model(frozen: BertModel) -> None:
    other = BertModel(frozen.config).eval()
    run(frozen)
    frozen.load_state_dict(other.state_dict())
    assert frozen.encoder.is_frozen()
    assert torch.equal(run(frozen)[0], run(other)[0])
    wrong = {**other.state_dict(), "encoder.layer.0.intermediate.dense.weight": torch.zeros(3, 3)}
    with pytest.raises(RuntimeError, match=r"size mismatch for encoder\.layer\.0\.intermediate"):
        frozen.load_state_dict(wrong)
    del wrong["encoder.layer.0.intermediate.dense.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        frozen.load_state_dict(wrong)


def test_a_hook_on_a_frozen_part_is_called(frozen: BertModel) -> None:
    seen: list[int] = []
    frozen.encoder.layer[0].output.dense.register_forward_hook(lambda *_: seen.append(1))
    check(frozen, SLOW)
    assert seen == [1, 1]


def test_what_a_frozen_model_refuses(frozen: BertModel, tmp_path: Any) -> None:
    with pytest.raises(ArgumentError, match="the whole encoder"):
        frozen.encoder.layer[0].half()
    with pytest.raises(ArgumentError, match="a frozen model"):
        fastbert.quantize(frozen, dtype="int8")
    with pytest.raises(ArgumentError, match="frozen=True"):
        frozen.train()
    assert not any(part.training for part in frozen.modules())
    check(frozen, FAST)
    half = {name: x.half() for name, x in frozen.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"got torch\.float16 to be assigned"):
        frozen.load_state_dict(half, assign=True)
    fastbert.save(BertModel(frozen.config), tmp_path)
    with pytest.raises(ArgumentError, match="frozen: got 'no'"):
        fastbert.load(tmp_path, frozen="no")  # type: ignore[call-overload]


def test_parts_of_a_frozen_model_that_are_put_elsewhere(frozen: BertModel) -> None:
    attention = frozen.encoder.layer[0].attention.self
    for change in (
        lambda: setattr(attention, "key", frozen.encoder.layer[1].attention.self.key),
        lambda: attention._modules.update(query=attention.key, key=attention.query),
        lambda: setattr(attention.query, "bias", None),
        lambda: frozen.to(memory_format=torch.channels_last),
        lambda: frozen._apply(torch.clone),
        lambda: frozen.encoder.layer[0].output.dense.share_memory(),
        lambda: setattr(frozen.encoder.layer[0].output.dense, "bias", None),
        lambda: frozen.encoder.layer[0].output.dense.share_memory(),
    ):
        change()
        check(frozen, FAST)


def test_shared_parts_are_frozen_together(model: BertModel) -> None:
    made = BertModel(dataclasses.replace(model.config, hidden_size=96)).eval()
    made.encoder.layer[0].attention.self.key = made.encoder.layer[0].attention.self.query
    made.encoder.layer[1].output.dense = made.encoder.layer[0].output.dense
    want = run(made)[0]
    assert made.encoder.freeze()
    assert made.encoder.layer[0].output.dense is made.encoder.layer[1].output.dense
    torch.testing.assert_close(run(made)[0], want, atol=0, rtol=0)
    check(made, FAST)


def test_a_copy_of_a_frozen_model_keeps_hooks_and_pruning(frozen: BertModel) -> None:
    part = frozen.encoder.layer[0].output.dense
    part.register_forward_hook(lambda *given: given[-1] * 2)
    prune.l1_unstructured(part, "bias", 0.3)
    want = run(frozen)[0]
    torch.testing.assert_close(run(copy.deepcopy(frozen))[0], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run(frozen.double().float())[0], want, atol=1e-5, rtol=1e-5)


def test_without_no_grad_where_nothing_wants_a_gradient(frozen: BertModel) -> None:
    frozen.requires_grad_(False)
    with paths_taken() as taken:
        out = frozen(IDS, attention_mask=MASK).last_hidden_state
    assert taken == FAST and not out.requires_grad and not out.is_inference()
    frozen.embeddings.word.weight.requires_grad_()
    with paths_taken() as taken:
        out = frozen(IDS, attention_mask=MASK).last_hidden_state
    assert taken == SLOW and out.requires_grad


def test_where_freezing_gains_nothing_it_does_nothing(model: BertModel) -> None:
    with use_backend("torch"):
        assert not model.encoder.freeze()
    odd = BertModel(dataclasses.replace(model.config, hidden_size=36)).eval()  # no whole number of vectors
    assert not odd.encoder.freeze()
    check(odd, FAST)


def test_plain_tensors_in_the_place_of_parameters(model: BertModel) -> None:
    """`functional_call` puts them there; they change in place between two calls."""
    given = {name: x.detach().clone() for name, x in model.named_parameters()}

    def call() -> Tensor:
        with torch.no_grad():
            return torch.func.functional_call(model, given, (IDS,), {"attention_mask": MASK}).last_hidden_state

    before = call()
    for x in given.values():
        x.mul_(1.5)
    after = call()
    want = copy.deepcopy(model)
    want.load_state_dict(given)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, run(want)[0])


def test_eps_that_changes(model: BertModel) -> None:
    check(model, FAST)
    before = run(model)[0]
    model.encoder.layer[-1].output.LayerNorm.eps = 0.5
    check(model, FAST)
    assert not torch.allclose(run(model)[0], before, atol=1e-4)


def test_layers_of_different_widths(model: BertModel) -> None:
    """A pruned feed-forward: memory of one layer is not that of another."""
    layer = model.encoder.layer[0]
    layer.intermediate.dense, layer.output.dense = nn.Linear(48, 40), nn.Linear(40, 48)
    check(model, FAST)
