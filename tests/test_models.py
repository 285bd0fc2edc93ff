"""BertModel against transformers' BertModel."""

import pytest
import torch
from test_encoder import HOLES, LEFT, RIGHT, hf_bert, inputs

from fastbert import backend
from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.families.bert import BERT
from fastbert.families.keys import key_rules
from fastbert.model import mapping
from fastbert.model.body import BertModel
from fastbert.packing import Packing
from fastbert.testing import assert_close


def ours_from(model):
    config = EncoderConfig.from_hf(model.config)
    ours = BertModel(config).eval()
    ours.load_state_dict(mapping.to_ours(model.state_dict(), key_rules(BERT, ours, str, str)))
    return ours


@pytest.mark.parametrize("path", ["triton", "torch"])
@pytest.mark.parametrize("mask", [RIGHT, LEFT, HOLES], ids=["right", "left", "holes"])
def test_as_transformers(mask, path, generator):
    model = hf_bert()
    batch = inputs(generator, mask)
    kept = batch["attention_mask"].bool()
    with torch.no_grad():
        with backend.use_backend(path):
            got = ours_from(model)(**batch, output_hidden_states=True)
        plain = model(**batch, output_hidden_states=True)
        exact = model.double()(**batch, output_hidden_states=True)
    for g, p, e in zip(got.hidden_states, plain.hidden_states, exact.hidden_states, strict=True):
        assert_close(g[kept], p[kept], e[kept], factor=3.0)
    if mask is RIGHT:
        assert_close(got.pooler_output, plain.pooler_output, exact.pooler_output, factor=3.0)
    assert got[0] is got.last_hidden_state
    assert got[1] is got.pooler_output


def test_left_padding_pools_the_first_kept_token(generator):
    """Transformers reads column 0, which is padding; ours reads the class token wherever it stands."""
    model = ours_from(hf_bert())
    batch = inputs(generator, LEFT)
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    left = Packing.from_mask(batch["attention_mask"])
    right = Packing.from_lengths(left.lengths, seqlen=9)
    moved = {name: right.unpack(left.pack(value), fill=0) for name, value in batch.items()}
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).pooler_output, model(**moved).pooler_output)


def test_packed_ids_give_packed_states(generator):
    model = ours_from(hf_bert())
    batch = inputs(generator)
    packing = Packing.from_mask(batch["attention_mask"])
    with torch.no_grad():
        padded = model(**batch)
        packed = model(
            packing.pack(batch["input_ids"]), token_type_ids=packing.pack(batch["token_type_ids"]), packing=packing
        )
    assert torch.equal(packing.pack(padded.last_hidden_state), packed.last_hidden_state)
    assert torch.equal(padded.pooler_output, packed.pooler_output)


def test_a_pooled_output_that_is_not_asked_for_is_not_made():
    model = BertModel(EncoderConfig(vocab_size=99, hidden_size=32, num_heads=2, num_layers=1)).eval()
    ids, called = torch.tensor([[5, 6, 7]]), []
    model.pooler.register_forward_hook(lambda *_: called.append(True))
    with torch.no_grad():
        out, full = model(ids, output_pooled=False), model(ids)
    assert out.pooler_output is None and called == [True]
    assert torch.equal(out.last_hidden_state, full.last_hidden_state)


def test_position_ids_of_one_row_serve_the_batch(generator):
    model = ours_from(hf_bert())
    batch = inputs(generator)
    with torch.no_grad():
        given = model(**batch, position_ids=torch.arange(9)[None])
        assert torch.equal(given.last_hidden_state, model(**batch).last_hidden_state)


def test_without_a_pooler_there_is_no_pooled_output(generator):
    model = BertModel(EncoderConfig(vocab_size=99, hidden_size=32, num_heads=2, num_layers=1), pooler=False)
    out = model(torch.ones(2, 3, dtype=torch.int64))
    assert out.pooler_output is None
    assert out.to_tuple() == (out.last_hidden_state,)


def test_an_empty_batch():
    model = ours_from(hf_bert())
    out = model(torch.zeros(0, 4, dtype=torch.int64))
    assert out.last_hidden_state.shape == (0, 4, 48)
    assert out.pooler_output.shape == (0, 48)


@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("input_ids", lambda m: m(torch.ones(4, dtype=torch.int64))),
        ("input_ids", lambda m: m(torch.ones(1, 41, dtype=torch.int64))),
        ("input_ids", lambda m: m(torch.full((1, 2), 99))),
        ("input_ids", lambda m: m(torch.full((1, 2), -1))),
        ("token_type_ids", lambda m: m(torch.ones(1, 2, dtype=torch.int64), token_type_ids=torch.full((1, 2), 2))),
        ("attention_mask", lambda m: m(torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 3))),
    ],
)
def test_bad_input_names_the_argument(argument, call):
    with pytest.raises(ArgumentError) as error:
        call(ours_from(hf_bert()))
    assert error.value.argument == argument
