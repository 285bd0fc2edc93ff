"""Every mask form Hugging Face passes, read as a packing or a bias."""

import pytest
import torch

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
