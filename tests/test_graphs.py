"""Graphs by bucket, with a capture that runs the function again at each replay, in place of a GPU's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastbert
from fastbert.backend import use_backend
from fastbert.config import EncoderConfig, HeadConfig
from fastbert.errors import ArgumentError, BackendError
from fastbert.model import graphs
from fastbert.model.body import BertModel
from fastbert.packing import Packing

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, tests/test_gpu.py runs real graphs")

CONFIG = EncoderConfig(
    vocab_size=50, hidden_size=16, num_layers=1, num_heads=1, intermediate_size=32, max_positions=128
)


class FakeStream:
    def __init__(self, device: torch.device) -> None:
        self.device = device


class FakeGraph:
    """Replays by running the function again into the output of its capture."""

    def __init__(self, run: Callable[[], Tensor], pool: Any) -> None:
        self.run, self.handle, self.replays = run, pool, 0
        self.stream: FakeStream | None = None
        self.out = run()
        self.out.fill_(torch.nan)  # a capture computes nothing

    def replay(self) -> None:
        self.out.copy_(self.run())
        self.replays += 1

    def pool(self) -> Any:
        return self.handle


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeGraph]]:
    """The graphs that were captured, in order; inside the fixture the Triton path is on and no gradient is kept."""
    made: list[FakeGraph] = []

    def capture(run: Callable[[], Tensor], stream: FakeStream, pool: Any) -> tuple[FakeGraph, Tensor]:
        made.append(FakeGraph(run, object() if pool is None else pool))
        made[-1].stream = stream
        return made[-1], made[-1].out

    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    with use_backend("triton"), torch.no_grad():
        yield made


def bert(**options: Any) -> BertModel:
    torch.manual_seed(1)
    return BertModel(CONFIG, **options).eval()


def batch(*lengths: int) -> dict[str, Any]:
    """Packed arguments with random ids, and types."""
    packing = Packing.from_lengths(lengths)
    ids, types = torch.randint(1, 50, (packing.tokens,)), torch.randint(0, 2, (packing.tokens,))
    return {"input_ids": ids, "token_type_ids": types, "packing": packing}


def same(got: Any, wanted: Any) -> None:
    for mine, theirs in zip(got.to_tuple(), wanted.to_tuple(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_changing_lengths_replay_one_graph(made: list[FakeGraph]) -> None:
    plain, model = bert(), fastbert.graphed(bert())
    for lengths in ((30, 1, 20, 2), (60, 1, 3), (0, 5, 0, 7)):
        arguments = batch(*lengths)
        same(model(**arguments), plain(**arguments))
    without = arguments | {"token_type_ids": None}
    same(model(**without), plain(**without))
    assert [graph.replays for graph in made] == [4]


@pytest.mark.long
def test_lengths_of_a_batch_before_are_forgotten(made: list[FakeGraph]) -> None:
    """Where the sequences before ended, a hundred rows before the end of these, no sequence may begin."""
    plain, model = bert(), fastbert.graphed(bert())
    for lengths in ([89] * 9 + [96], [113] * 7 + [117, 116]):
        arguments = batch(*lengths)
        same(model(**arguments), plain(**arguments))
    assert len(made) == 1


def test_padded_calls_are_those_of_the_plain_model(made: list[FakeGraph]) -> None:
    plain, model = bert(), fastbert.graphed(bert())
    mask = torch.tensor([[1] * 9 + [0] * 3, [0] * 7 + [1] * 5, [1, 0] * 6])
    ids = torch.randint(1, 50, mask.shape)
    same(model(ids, mask), plain(ids, mask))
    same(model(ids), plain(ids))
    assert len(made) == 1


def test_heads_are_served(made: list[FakeGraph]) -> None:
    for kind in (fastbert.BertForSequenceClassification, fastbert.BertForTokenClassification, fastbert.BertForMaskedLM):
        torch.manual_seed(2)
        model = kind(CONFIG, HeadConfig()) if kind is not fastbert.BertForMaskedLM else kind(CONFIG)
        ids = torch.randint(1, 50, (2, 11))
        wanted = model.eval()(ids)
        got = fastbert.graphed(model)(ids)
        torch.testing.assert_close(got.logits, wanted.logits)
    assert [graph.replays for graph in made] == [1, 1, 1]


def test_a_result_outlives_the_next_call(made: list[FakeGraph]) -> None:
    model = fastbert.graphed(bert())
    first = model(**batch(30, 20)).last_hidden_state
    before = first.clone()
    model(**batch(20, 30))
    assert len(made) == 1
    assert torch.equal(first, before)


def test_slack_of_the_arguments_is_zero(made: list[FakeGraph]) -> None:
    arguments = batch(5, 6)
    arguments = {name: value for name, value in arguments.items() if name != "token_type_ids"}
    arguments["input_ids"] = torch.cat([arguments["input_ids"], torch.ones(4, dtype=torch.int64)])
    arguments["position_ids"] = torch.zeros(15, dtype=torch.int64)
    out = fastbert.graphed(bert(pooler=False))(**arguments).last_hidden_state
    assert out.shape == (15, 16)
    assert out[:11].isfinite().all()
    assert torch.equal(out[11:], torch.zeros(4, 16))


def test_the_least_recently_used_graph_is_dropped(made: list[FakeGraph]) -> None:
    model = fastbert.graphed(bert(), most=2)
    small, large, wide = batch(5), batch(40, 40), batch(100)
    for arguments in (small, large, small, wide, small):
        model(**arguments)
    assert [graph.replays for graph in made] == [3, 1, 1]
    model(**large)
    assert len(made) == 4
    assert len({id(graph.pool()) for graph in made}) == 1, "one pool for all"


def test_all_graphs_of_a_model_are_captured_on_one_stream(made: list[FakeGraph]) -> None:
    """They share their memory, which PyTorch allows on one stream only; and each stream costs a workspace of cuBLAS."""
    model, other = fastbert.graphed(bert()), fastbert.graphed(bert())
    for lengths in ((3, 60), (70, 5), (1, 2, 3), (100, 100)):
        model(**batch(*lengths))
    other(**batch(3, 60))
    assert len(made) > 3
    streams, pools = {id(one.stream) for one in made[:-1]}, {id(one.handle) for one in made[:-1]}
    assert len(streams) == len(pools) == 1
    assert made[-1].stream is not made[0].stream and made[-1].handle is not made[0].handle
    model.embeddings.word.weight = torch.nn.Parameter(model.embeddings.word.weight.detach().clone())
    model(**batch(3, 60))
    assert made[-1].stream is made[0].stream and made[-1].handle is made[0].handle


@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle", "quantize"])
def test_a_copy_of_a_graphed_model_has_graphs_of_its_own(how: str, made: list[FakeGraph]) -> None:
    """A quantized copy's, in fp8, are those of its own layers; the first model's graphs stay as they are."""
    model, given = fastbert.graphed(bert().bfloat16(), most=3), batch(3, 5)
    wanted = model(**given)
    match how:
        case "copy":
            other = copy.copy(model)
        case "deepcopy":
            other = copy.deepcopy(model)
        case "pickle":
            other = pickle.loads(pickle.dumps(model))
        case "quantize":
            with use_backend("torch"):
                other = fastbert.quantize(model, dtype="fp8")
    if how == "quantize":
        plain = copy.deepcopy(other)
        plain.graphs = None
        same(other(**given), plain(**given))
        assert not torch.equal(plain(**given)[0], wanted[0]), "8 bits round more"
    else:
        same(other(**given), wanted)
    if how != "copy":  # which shares all, graphs too
        assert len(made) == 2 and other.graphs.most == 3
    replays = made[0].replays
    same(model(**given), wanted)
    assert made[0].replays == replays + 1


def test_moved_weights_are_captured_again(made: list[FakeGraph]) -> None:
    model, arguments = fastbert.graphed(bert()), batch(5, 6)
    single = model(**arguments)
    model.embeddings.word.weight.mul_(1.5)
    assert not torch.equal(model(**arguments)[0], single[0])
    assert len(made) == 1
    assert model.half()(**arguments)[0].dtype == torch.float16
    assert len(made) == 2


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ((0, 0, 0), (64, 64, 1)),
        ((64, 64, 1), (64, 64, 1)),
        ((65, 65, 2), (128, 128, 2)),
        ((512, 128, 3), (512, 128, 4)),
        ((513, 129, 5), (640, 256, 8)),
        ((1025, 512, 16), (1280, 512, 16)),
    ],
)
def test_buckets(sizes: graphs.Bucket, wanted: graphs.Bucket) -> None:
    assert graphs.bucket(*sizes) == wanted


def test_buckets_waste_at_most_a_fifth_and_are_few() -> None:
    found = [(tokens, graphs.bucket(tokens, 1, 1)[0]) for tokens in range(513, 20000)]
    assert all(0 <= size - tokens < 0.2 * size for tokens, size in found)
    assert len({size for _, size in found}) == 21


def test_what_graphs_do_not_serve_is_said(made: list[FakeGraph]) -> None:
    model, arguments = fastbert.graphed(bert()), batch(5)
    with pytest.raises(ArgumentError, match="training mode"):
        model.train()(**arguments)
    model.eval()
    with torch.enable_grad(), pytest.raises(ArgumentError, match="no_grad"):
        model(**arguments)
    with torch.autocast("cpu"), pytest.raises(ArgumentError, match="autocast"):
        model(**arguments)
    with pytest.raises(ArgumentError, match="output_hidden_states"):
        model(**arguments, output_hidden_states=True)
    triangle = torch.ones(1, 1, 5, 5).tril() != 0
    with pytest.raises(ArgumentError, match="more than padding"):
        model(torch.ones(1, 5, dtype=torch.int64), triangle)
    with use_backend("torch"), pytest.raises(BackendError, match="GPU"):
        model(**arguments)
    assert not made


def test_graphed_itself_refuses() -> None:
    with pytest.raises(ArgumentError, match="most"):
        fastbert.graphed(bert(), most=0)
    with pytest.raises(ArgumentError, match="Linear"):
        fastbert.graphed(torch.nn.Linear(1, 1))
