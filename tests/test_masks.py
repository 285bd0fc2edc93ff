"""Every mask form Hugging Face passes, read as a packing or a bias."""

import copy
import warnings

import pytest
import torch
from torch.overrides import TorchFunctionMode

import fastbert
from fastbert import backend
from fastbert.errors import ArgumentError
from fastbert.model.masks import read_mask
from fastbert.packing import Packing

KEPT = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
MIN = torch.finfo(torch.float32).min


def additive(kept, dtype=torch.float32, hidden=None):
    hidden = torch.finfo(dtype).min if hidden is None else hidden
    return torch.zeros(kept.shape, dtype=dtype).masked_fill(~kept, hidden)


PADDING_FORMS = {
    "2-D bool": KEPT,
    "2-D int": KEPT.long(),
    "2-D float": KEPT.float(),
    "4-D bool": KEPT[:, None, None],
    "4-D bool, expanded rows": KEPT[:, None, None].expand(3, 1, 5, 5),
    "4-D int": KEPT[:, None, None].long(),
    "4-D minimum": additive(KEPT)[:, None, None],
    "4-D minimum, expanded rows": additive(KEPT)[:, None, None].expand(3, 1, 5, 5),
    "4-D minimum, half": additive(KEPT, torch.float16)[:, None, None],
    "4-D minimum, bfloat16": additive(KEPT, torch.bfloat16)[:, None, None],
    "4-D -inf": additive(KEPT, hidden=-torch.inf)[:, None, None],
    "4-D for each head": KEPT[:, None, None].expand(3, 4, 5, 5),
    "3-D bool": KEPT[:, None].expand(3, 5, 5),
}


@pytest.mark.parametrize("form", PADDING_FORMS)
def test_case_03_padding_in_any_form_is_packed(form):
    packing, bias = read_mask(PADDING_FORMS[form], 3, 5, torch.device("cpu"))
    assert bias is None
    assert packing.padded_shape == (3, 5)
    assert packing.indices.tolist() == KEPT.flatten().nonzero().flatten().tolist()


def test_no_mask_is_no_padding():
    packing, bias = read_mask(None, 2, 3, torch.device("cpu"))
    assert bias is None
    assert packing.lengths.tolist() == [3, 3]


def test_one_row_of_mask_serves_the_whole_batch():
    packing, bias = read_mask(KEPT[:1, None, None], 3, 5, torch.device("cpu"))
    assert bias is None
    assert packing.lengths.tolist() == [3, 3, 3]


def test_a_mask_that_differs_between_rows_becomes_a_bias():
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    for mask in (causal[None, None], additive(causal)[None, None], causal[None, None].int()):
        packing, bias = read_mask(mask, 3, 5, torch.device("cpu"))
        assert packing.lengths.tolist() == [5, 5, 5]
        assert bias.shape == (1, 1, 5, 5)
        assert torch.equal(bias == -torch.inf, ~causal[None, None])
        assert (bias[0, 0][causal] == 0).all()


def test_a_bias_that_does_more_than_hide_is_kept(generator):
    mask = torch.randn(1, 2, 1, 5, generator=generator)
    mask[..., 3] = MIN
    packing, bias = read_mask(mask, 3, 5, torch.device("cpu"))
    assert packing.lengths.tolist() == [5, 5, 5]
    assert bias.shape == (1, 2, 5, 5)
    assert torch.equal(bias[..., 0, :3], mask[..., 0, :3])
    assert (bias[..., 3] == -torch.inf).all()


def test_a_block_mask_of_flex_attention():
    from torch.nn.attention.flex_attention import create_block_mask

    block = create_block_mask(lambda b, h, q, k: KEPT[b, k], 3, None, 5, 5, device="cpu")
    packing, bias = read_mask(block, 3, 5, torch.device("cpu"))
    assert bias is None
    assert packing.lengths.tolist() == [3, 5, 0]


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(5),
        torch.ones(2, 5),
        torch.ones(3, 4),
        torch.ones(3, 1, 4, 5),
        torch.ones(2, 1, 1, 5),
        torch.ones(3, 1, 1, 1, 5),
        torch.tensor([[2.0] * 5] * 3),
        "mask",
    ],
    ids=str,
)
def test_bad_masks(mask):
    with pytest.raises(ArgumentError, match="mask"):
        read_mask(mask, 3, 5, torch.device("cpu"))


@pytest.mark.parametrize("shape", [(2, 4), (2, 1, 4, 4)], ids=str)
def test_a_mask_on_another_device_or_without_values(shape):
    mask = torch.ones(shape, device="meta")
    with pytest.raises(ArgumentError, match="attention_mask: got on meta; expected on cpu"):
        read_mask(mask, 2, 4, torch.device("cpu"))
    with pytest.raises(ArgumentError, match="attention_mask: got on the meta device; expected a tensor with values"):
        read_mask(mask, 2, 4, torch.device("meta"))


def test_packings_are_made_of_values():
    with pytest.raises(ArgumentError, match="mask: got on the meta device"):
        Packing.from_mask(torch.ones(2, 4, device="meta"))
    with pytest.raises(ArgumentError, match="lengths: got on the meta device"):
        Packing.from_lengths(torch.ones(2, dtype=torch.int64, device="meta"))


# Left padding: zeros where a pooler reads

RIGHT_PADDED = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1], [0, 0, 0, 0]])
LEFT_PADDED = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])


@pytest.fixture
def unsaid(monkeypatch):
    """As if nothing had been said once in this process."""
    monkeypatch.setattr(backend, "_said", set())


@pytest.fixture
def bert():
    """A BertModel of transformers with our encoder in it."""
    transformers = pytest.importorskip("transformers", reason="its pooler is meant")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=9, max_position_embeddings=8, **sizes)).eval()
    model.encoder = fastbert.Encoder.from_hf(model.encoder)
    return model.requires_grad_(False)


def test_left_padding_that_a_pooler_would_read_is_said_once(bert, unsaid):
    ids = torch.ones_like(LEFT_PADDED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for mask in (None, RIGHT_PADDED, torch.zeros_like(ids), torch.ones_like(ids)):
            bert(ids, attention_mask=mask)
    with pytest.warns(UserWarning, match="padded on the left, and fastbert's encoder gives 0 at padding") as caught:
        outs = [bert(ids, attention_mask=LEFT_PADDED) for _ in range(3)]
    assert len(caught) == 1
    assert (outs[-1].last_hidden_state[2, 0] == 0).all(), "what the warning is about"


@pytest.mark.parametrize("form", ["2-D", "4-D bool", "4-D minimum", "3-D"])
def test_left_padding_in_any_form_is_said(form, unsaid):
    kept = LEFT_PADDED.bool()
    mask = {
        "2-D": kept,
        "4-D bool": kept[:, None, None].expand(4, 1, 4, 4),
        "4-D minimum": additive(kept)[:, None, None],
        "3-D": kept[:, None],
    }[form]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_mask(mask, 4, 4, torch.device("cpu"))  # by a model of ours, which pools packed rows
    with pytest.warns(UserWarning, match="Pad on the right"):
        read_mask(mask, 4, 4, torch.device("cpu"), zeros_at_padding=True)


def test_nothing_is_said_of_what_gives_no_zeros(unsaid):
    encoder = fastbert.Encoder(fastbert.EncoderConfig(9, 32, num_layers=1, num_heads=2, intermediate_size=48)).eval()
    causal = torch.ones(4, 4, dtype=torch.bool).triu(1)  # column 0 is hidden, and no padding
    x = torch.randn(4, 4, 32)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        encoder(x, attention_mask=causal[None, None])
        packing = Packing.from_mask(LEFT_PADDED)
        encoder(packing.pack(x), packing=packing)
        encoder(x[:, :0], attention_mask=LEFT_PADDED[:, :0])
        encoder(x[:0], attention_mask=LEFT_PADDED[:0])


class Reads(TorchFunctionMode):
    """Counts what makes the host wait for a GPU: numbers of a tensor that Python gets."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask", [LEFT_PADDED, LEFT_PADDED[:, None, None].bool()], ids=["2-D", "4-D"])
def test_left_padding_is_looked_for_in_the_one_sync_there_is(mask, unsaid):
    with pytest.warns(UserWarning, match="padded on the left"), Reads() as reads:
        read_mask(mask, 4, 4, torch.device("cpu"), zeros_at_padding=True)
    assert reads.names == ["tolist"]


def test_left_padding_under_torch_compile(unsaid):
    config = fastbert.EncoderConfig(9, 32, num_layers=1, num_heads=2, intermediate_size=48)
    encoder = fastbert.Encoder(config).eval().requires_grad_(False)
    x = torch.randn(4, 4, 32)
    with pytest.warns(UserWarning, match="padded on the left"):
        want = [copy.deepcopy(encoder)(x, attention_mask=mask)[0] for mask in (RIGHT_PADDED, RIGHT_PADDED.flip(1))]
    torch._dynamo.reset()
    backend._said.clear()
    compiled = torch.compile(lambda mask: encoder(x, attention_mask=mask)[0], backend="eager")
    torch.testing.assert_close(compiled(RIGHT_PADDED), want[0])
    with pytest.warns(UserWarning, match="padded on the left") as caught:
        got = [compiled(RIGHT_PADDED.flip(1)) for _ in range(2)]
    assert sum("padded on the left" in str(one.message) for one in caught) == 1
    for one in got:
        torch.testing.assert_close(one, want[1])
