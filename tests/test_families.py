"""Checkpoints of other families: the numbers of transformers' classes, both ways, and the same files back."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastbert
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.families import FAMILIES
from fastbert.model.mapping import to_theirs
from fastbert.packing import Packing
from fastbert.testing import assert_close

T = pytest.importorskip("transformers", reason="its models are meant")

SIZES = {
    "vocab_size": 70,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
}
TYPELESS = {**SIZES, "type_vocab_size": 1, "pad_token_id": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "Bert": SIZES,
    "Electra": {**SIZES, "embedding_size": 24},
    "Roberta": TYPELESS,
    "XLMRoberta": TYPELESS,
    "Camembert": {**TYPELESS, "pad_token_id": 3},
    "DistilBert": {
        "vocab_size": 70,
        "dim": 48,
        "n_layers": 3,
        "n_heads": 3,
        "hidden_dim": 80,
        "max_position_embeddings": 40,
        "initializer_range": 0.2,
        "qa_dropout": 0.0,
    },
    "Albert": {**SIZES, "embedding_size": 16, "num_hidden_groups": 2},
    "ModernBert": {
        **SIZES,
        "num_hidden_layers": 4,
        "local_attention": 6,
        **{f"{name}_token_id": i for i, name in enumerate(("pad", "cls", "sep", "bos", "eos"))},
    },
    "MPNet": {key: value for key, value in TYPELESS.items() if key != "type_vocab_size"},
    "NomicBert": {**SIZES, "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 1.3}},
    "Gte": {**SIZES, "type_vocab_size": 0, "pad_token_id": 1},
    "DebertaV2": {
        **SIZES,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_buckets": 8,
        "max_relative_positions": 12,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
}
# DeBERTa's other shapes, as changes of the one above.
DEBERTAS: dict[str, dict[str, Any]] = {
    "projections of its own": {"share_att_key": False, "position_biased_input": True, "type_vocab_size": 2},
    "c2p": {"pos_att_type": "c2p", "norm_rel_ebd": "none"},
    "p2c": {"pos_att_type": "p2c", "share_att_key": False},
    "a row for each distance": {"position_buckets": -1, "max_relative_positions": 5},
    "as many rows as positions": {"position_buckets": -1, "max_relative_positions": -1},
    "an odd number of buckets": {"position_buckets": 5, "max_relative_positions": 40},
    "two buckets": {"position_buckets": 2, "max_relative_positions": 3},
    "no relative positions": {
        "relative_attention": False, "pos_att_type": None, "norm_rel_ebd": "none", "position_biased_input": True
    },
    "none by name": {
        "relative_attention": False, "pos_att_type": "None", "norm_rel_ebd": "none", "position_biased_input": True
    },
}  # fmt: skip
HEADS = [
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
]
LENGTHS = (11, 4, 1)
OF_TOKENS = ("Model", "ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering")


@pytest.fixture(params=CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=HEADS)
def head(request: pytest.FixtureRequest) -> str:
    return request.param


def theirs_of(family: str, head: str = "Model", **changes: Any) -> Any:
    if not hasattr(T, family + head):
        pytest.skip(f"transformers has no {family}{head}")
    torch.manual_seed(0)
    model = getattr(T, family + head)(getattr(T, f"{family}Config")(**{**CONFIGS[family], **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def ours_of(theirs: Any, folder: Path, head: str = "Model") -> Any:
    theirs.save_pretrained(folder)
    return fastbert.load(folder, getattr(fastbert, f"Encoder{head}"))


def by_file(theirs: Any, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """What belongs to the parameters of `theirs`, by the keys that their class writes."""
    holder = copy.deepcopy(theirs).to(next(iter(tensors.values())).dtype)
    with torch.no_grad():
        for name, parameter in holder.named_parameters():
            parameter.copy_(tensors[name])
    holder.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def batch_of(theirs: Any, head: str, side: str = "right") -> dict[str, Tensor]:
    ids = torch.randint(5, 70, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    mask = mask if side == "right" else mask.flip(1)
    batch = {"input_ids": ids.where(mask, theirs.config.pad_token_id), "attention_mask": mask.long()}
    if head == "ForMultipleChoice":  # five choices of each of three questions
        return {key: torch.stack([value.roll(i, 0) for i in range(5)], 1) for key, value in batch.items()}
    return batch


def outputs(out: Any, head: str, mask: Tensor) -> list[Tensor]:
    """What a head gives, without padding."""
    if head == "Model":
        pooled = getattr(out, "pooler_output", None)
        return [out.last_hidden_state[mask], *([] if pooled is None else [pooled])]
    if head == "ForQuestionAnswering":
        return [out.start_logits[mask], out.end_logits[mask]]
    return [out.logits[mask] if head in OF_TOKENS else out.logits]


@pytest.mark.parametrize("side", ["right", "left"])
def test_forward(family: str, head: str, side: str, tmp_path: Path) -> None:
    theirs = theirs_of(family, head)
    ours = ours_of(theirs, tmp_path, head)
    batch = batch_of(theirs, head, side)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        plain, got = (outputs(model(**batch), head, mask) for model in (theirs, ours))
        exact = outputs(copy.deepcopy(theirs).double()(**batch), head, mask)
    if side == "left" and head in ("Model", "ForSequenceClassification", "ForMultipleChoice"):
        # theirs read column 0, which is padding here; ours read the first token
        kept = slice(0, 0 if head == "ForMultipleChoice" else 1)
        got, plain, exact = ([one if one.shape[0] > 3 else one[kept] for one in x] for x in (got, plain, exact))
    for x, y, z in zip(got, plain, exact, strict=True):
        assert_close(x, y, z, factor=3.0)


def test_gradients(family: str, head: str, tmp_path: Path) -> None:
    theirs = theirs_of(family, head)
    ours = ours_of(theirs, tmp_path, head)
    batch = batch_of(theirs, head)
    mask = batch["attention_mask"].bool()
    generator = torch.Generator().manual_seed(2)
    douts = [torch.randn(x.shape, generator=generator) for x in outputs(theirs(**batch), head, mask)]

    def gradients(model: Any) -> dict[str, Tensor]:
        made = outputs(model(**batch), head, mask)
        named = dict(model.named_parameters())
        grads = torch.autograd.grad(made, list(named.values()), [d.to(made[0].dtype) for d in douts], allow_unused=True)
        return {
            name: torch.zeros_like(named[name]) if grad is None else grad
            for name, grad in zip(named, grads, strict=True)
        }

    plain, exact = (by_file(m, gradients(m), tmp_path / "g") for m in (theirs, copy.deepcopy(theirs).double()))
    got = to_theirs(gradients(ours), ours.origin.dialect.rules(ours))
    for key, grad in got.items():
        if exact[key].abs().max() < 1e-12:  # that of a bias of keys, which softmax takes out again
            assert grad.abs().max() < 1e-5
        else:
            assert_close(grad, plain[key], exact[key], factor=3.0, what=key)


def test_packed_is_padded(family: str, tmp_path: Path) -> None:
    theirs = theirs_of(family)
    ours = ours_of(theirs, tmp_path)
    batch = batch_of(theirs, "Model")
    packing = Packing.from_lengths(list(LENGTHS))
    with torch.no_grad():
        padded = ours(**batch).last_hidden_state[batch["attention_mask"].bool()]
        packed = ours(batch["input_ids"][batch["attention_mask"].bool()], packing=packing).last_hidden_state
        alone = ours(batch["input_ids"][1:2, : LENGTHS[1]]).last_hidden_state[0]
    assert torch.allclose(packed, padded, atol=1e-6)
    assert torch.allclose(alone, padded[LENGTHS[0] : LENGTHS[0] + LENGTHS[1]], atol=1e-5)


def test_hidden_states_and_embeddings_given(family: str, tmp_path: Path) -> None:
    theirs = theirs_of(family)
    ours = ours_of(theirs, tmp_path)
    batch = batch_of(theirs, "Model")
    mask = batch["attention_mask"].bool()
    embeds = theirs.get_input_embeddings()(batch.pop("input_ids")).detach()
    with torch.no_grad():
        plain, got = (m(inputs_embeds=embeds, output_hidden_states=True, **batch) for m in (theirs, ours))
        exact = copy.deepcopy(theirs).double()(inputs_embeds=embeds.double(), output_hidden_states=True, **batch)
    for x, y, z in zip(got.hidden_states, plain.hidden_states, exact.hidden_states, strict=True):
        assert_close(x[mask], y[mask], z[mask], factor=3.0)


def test_positions_of_texts_with_holes(family: str, tmp_path: Path) -> None:
    """A token that the mask hides is counted where the family counts tokens, and one that is padding is not."""
    theirs = theirs_of(family)
    ours = ours_of(theirs, tmp_path)
    ids = torch.randint(5, 70, (2, 9), generator=torch.Generator().manual_seed(3))
    ids[1, 3] = theirs.config.pad_token_id  # which is attended to
    mask = torch.ones_like(ids)
    mask[0, 2] = 0
    with torch.no_grad():
        plain, got = (m(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()] for m in (theirs, ours))
        exact = copy.deepcopy(theirs).double()(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]
    assert_close(got, plain, exact, factor=3.0)


def test_saved_as_it_came(family: str, head: str, tmp_path: Path) -> None:
    theirs = theirs_of(family, head)
    ours = ours_of(theirs, tmp_path / "a", head)
    fastbert.save(ours, tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    back = getattr(T, family + head).from_pretrained(tmp_path / "b").state_dict()
    assert all(torch.equal(value, back[key]) for key, value in theirs.state_dict().items())
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == json.loads(
        (tmp_path / "b" / "config.json").read_text()
    )


def test_shards_and_pickles(family: str, tmp_path: Path) -> None:
    theirs = theirs_of(family)
    ours = ours_of(theirs, tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    torch.save(load_file(tmp_path / "whole" / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    for name in ("shards", "bin"):
        state = fastbert.load(tmp_path / name).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())


def test_every_key_is_accounted_for(family: str, tmp_path: Path) -> None:
    ours_of(theirs_of(family), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in state if any(name in key for name in ("query", "q_lin", "attn.q", "Wqkv", "qkv_proj")))
    save_file({key: value for key, value in state.items() if key != lost}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"missing keys: {lost.replace('.', chr(92) + '.')}"):
        fastbert.load(tmp_path)


def test_a_head_put_on_a_body(family: str, tmp_path: Path) -> None:
    """It begins untrained, is told so, and is written as transformers' class of the family would be."""
    ours_of(theirs_of(family), tmp_path / "body")
    with pytest.warns(fastbert.errors.UntrainedWarning, match=f"classifier.* for {family}ForSequenceClassification"):
        model = fastbert.load(tmp_path / "body", fastbert.EncoderForSequenceClassification)
    fastbert.save(model, tmp_path / "out")
    theirs = T.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(theirs).__name__ == f"{family}ForSequenceClassification"
    batch = batch_of(theirs, "ForSequenceClassification")
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(**batch).logits, model(**batch).logits, atol=1e-5)


def test_half_types(family: str, tmp_path: Path) -> None:
    theirs = theirs_of(family)
    theirs.save_pretrained(tmp_path)
    ours = fastbert.load(tmp_path, dtype=torch.bfloat16)
    batch = batch_of(theirs, "Model")
    mask = batch["attention_mask"].bool()
    half = copy.deepcopy(theirs).bfloat16()
    with torch.no_grad():
        got, plain = (m(**batch).last_hidden_state[mask] for m in (ours, half))
        exact = copy.deepcopy(half).double()(**batch).last_hidden_state[mask]
    assert_close(got, plain, exact, factor=3.0)


def test_training_lowers_the_loss(family: str, tmp_path: Path) -> None:
    ours = ours_of(theirs_of(family, "ForSequenceClassification"), tmp_path, "ForSequenceClassification").train()
    batch = batch_of(ours, "Model")
    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-4)
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 1])
    before = ours.eval()(**batch, labels=labels).loss.item()
    for _ in range(12):
        loss = ours.train()(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ours.eval()(**batch, labels=labels).loss.item() < before


def test_too_long_a_text_is_an_error(family: str, tmp_path: Path) -> None:
    ours = ours_of(theirs_of(family), tmp_path)
    longest = ours.config.longest
    ids = torch.full((1, longest + 1), 7)
    ours(ids[:, :longest])
    with pytest.raises(ArgumentError, match=f"at most the model's {longest} positions"):
        ours(ids)


def test_a_new_model_of_another_shape_is_not_saved_as_bert(tmp_path: Path) -> None:
    model = fastbert.EncoderModel(FAMILIES["roberta"].config(CONFIGS["Roberta"]))
    with pytest.raises(ArgumentError, match="a new model of another shape than BERT's"):
        fastbert.save(model, tmp_path)


def test_a_head_that_a_family_has_not(tmp_path: Path) -> None:
    theirs_of("Roberta").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a head that roberta has"):
        fastbert.load(tmp_path, fastbert.EncoderForNextSentencePrediction)


def test_positions_of_a_model_without_a_table(tmp_path: Path) -> None:
    ours = ours_of(theirs_of("NomicBert"), tmp_path)
    with pytest.raises(ArgumentError, match="position_ids"):
        ours(torch.full((1, 3), 7), position_ids=torch.arange(3)[None])


@pytest.mark.parametrize("family", ["DistilBert", "MPNet", "DebertaV2", "ModernBert"])
def test_token_types_of_a_model_without_them_are_not_read(family: str, tmp_path: Path) -> None:
    ours = ours_of(theirs_of(family), tmp_path)
    ids = torch.randint(5, 70, (2, 6), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        plain = ours(ids).last_hidden_state
        assert torch.equal(ours(ids, token_type_ids=torch.ones_like(ids)).last_hidden_state, plain)


@pytest.mark.parametrize("changes", DEBERTAS)
def test_shapes_of_deberta(changes: str, tmp_path: Path) -> None:
    """Forward and gradient, with padding on either side and with a token hidden between others."""
    theirs = theirs_of("DebertaV2", **DEBERTAS[changes])
    ours = ours_of(theirs, tmp_path)
    own = copy.deepcopy(theirs).double()
    generator = torch.Generator().manual_seed(4)
    for side in ("right", "left", "holes"):
        batch = batch_of(theirs, "Model", "right" if side == "holes" else side)
        if side == "holes":
            batch["attention_mask"][0, 3:5] = 0
        mask = batch["attention_mask"].bool()
        dout = torch.randn(int(mask.sum()), 48, generator=generator)
        made = []
        for model in (ours, theirs, own):
            out = model(**batch).last_hidden_state[mask]
            named = dict(model.named_parameters())
            grads = torch.autograd.grad(out, list(named.values()), dout.to(out.dtype))
            made.append((out, dict(zip(named, grads, strict=True))))
        (got, grads), (plain, plain_grads), (exact, exact_grads) = made
        assert_close(got, plain, exact, factor=3.0)
        for key, grad in to_theirs(grads, ours.origin.dialect.rules(ours)).items():
            if exact_grads[key].abs().max() < 1e-12:
                assert grad.abs().max() < 1e-5
            else:
                assert_close(grad, plain_grads[key], exact_grads[key], factor=3.0, what=key)
    fastbert.save(ours, tmp_path / "saved")
    before, after = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_a_text_longer_than_all_buckets_of_deberta(tmp_path: Path) -> None:
    """Far tokens share the last rows of the table, and a short text needs the middle of it alone."""
    theirs = theirs_of("DebertaV2", max_position_embeddings=300)
    ours = ours_of(theirs, tmp_path)
    for seqlen in (300, 1):
        ids = torch.randint(5, 70, (1, seqlen), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            plain, got = (model(ids).last_hidden_state for model in (theirs, ours))
            exact = copy.deepcopy(theirs).double()(ids).last_hidden_state
        assert_close(got, plain, exact, factor=3.0)


def test_the_other_head_of_deberta(tmp_path: Path) -> None:
    """That of its authors, which `legacy: false` asks for: loaded, saved, and put on a body."""
    theirs = theirs_of("DebertaV2", "ForMaskedLM", legacy=False)
    ours = ours_of(theirs, tmp_path / "a", "ForMaskedLM")
    batch = batch_of(theirs, "ForMaskedLM")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        plain, got = (model(**batch).logits[mask] for model in (theirs, ours))
        assert_close(got, plain, copy.deepcopy(theirs).double()(**batch).logits[mask], factor=3.0)
    fastbert.save(ours, tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    theirs.deberta.save_pretrained(tmp_path / "body")
    with pytest.warns(fastbert.errors.UntrainedWarning, match="predictions for DebertaV2ForMaskedLM"):
        fresh = fastbert.load(tmp_path / "body", fastbert.EncoderForMaskedLM)
    fastbert.save(fresh, tmp_path / "c")
    back = T.AutoModelForMaskedLM.from_pretrained(tmp_path / "c").eval()
    with torch.no_grad():
        assert torch.allclose(back(**batch).logits[mask], fresh(**batch).logits[mask], atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"conv_kernel_size": 3}, "conv_kernel_size: got 3; expected 0"),
        ({"pos_att_type": "p2p|c2p"}, "pos_att_type"),
        ({"relative_attention": False}, "pos_att_type: got 'p2c.c2p'; expected .* none without"),
        ({"position_buckets": 1}, "position_buckets: got 1; expected an int of 2 or more"),
        ({"max_relative_positions": 4}, "max_relative_positions: got 4; expected more than half of the 8 buckets"),
        ({"attention_head_size": 8}, "attention_head_size: got 8; expected 16"),
        ({"pooler_dropout": 1.5}, "pooler_dropout: got 1.5; expected a probability"),
    ],
)
def test_what_of_deberta_is_refused(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    theirs_of("DebertaV2").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pos_att_type": "p2c|c2p", **changes}))
    with pytest.raises(CheckpointError, match=match):
        fastbert.load(tmp_path)


def test_dropouts_of_a_deberta(tmp_path: Path) -> None:
    """That of the table of positions is one more, and the pooler has its own."""
    theirs_of("DebertaV2", "ForSequenceClassification", pooler_dropout=0.4, cls_dropout=0.3).save_pretrained(tmp_path)
    ours = fastbert.load(tmp_path, fastbert.EncoderForSequenceClassification).train()
    assert ours.config.heads.first_dropout == 0.4 and ours.head_config.classifier_dropout == 0.3
    batch = batch_of(ours, "Model")
    layer = ours.bert.encoder.layer[0]
    assert layer.dropouts() == (0.1, 0.1, 0.1, 0.1)
    for part in ours.bert.modules():
        if isinstance(part, torch.nn.Dropout) and part is not layer.attention.position_dropout:
            part.p = 0.0
    ours.bert.embeddings.eval()
    states = [ours.bert(**batch).last_hidden_state for _ in range(2)]
    assert not torch.equal(*states)
    layer.attention.position_dropout.p = 0.0
    states = [ours.bert(**batch).last_hidden_state for _ in range(2)]
    assert torch.equal(*states)
    x = torch.randn(5, 48)
    head = [ours.transform(x, lambda rows: rows) for _ in range(2)]
    assert not torch.equal(*head)
    head = [ours.eval().transform(x, lambda rows: rows) for _ in range(2)]
    assert torch.equal(*head)


def test_texts_are_cut_at_the_last_row_of_positions(tmp_path: Path) -> None:
    """transformers #9116: rows before the first token's are no places for tokens."""
    tiny_bert.make(tmp_path / "bert")
    sizes = {**CONFIGS["Roberta"], "vocab_size": len(tiny_bert.VOCABULARY), "pad_token_id": 0}
    T.RobertaModel(T.RobertaConfig(**sizes)).save_pretrained(tmp_path / "roberta")
    shutil.copy(tmp_path / "bert" / "vocab.txt", tmp_path / "roberta")
    encoder = fastbert.TextEncoder.from_folder(tmp_path / "roberta")
    with pytest.warns(UserWarning, match="max_length=39 tokens"):
        found = encoder.encode(["film " * 60, "film " * 37])
    assert (found[0] == found[1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("longest", [128, 224, 257])
def test_padding_wider_than_a_window(longest: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """mlx-embeddings #80: rows of padding that see no key, beside a text of a multiple of 32 tokens."""
    theirs_of("ModernBert", max_position_embeddings=512, local_attention=128).save_pretrained(tmp_path)
    model = fastbert.load(tmp_path, dtype=dtype)
    ids = torch.randint(5, 70, (2, longest), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with torch.no_grad():
        both = model(ids, mask).last_hidden_state
        alone = model(ids[:1, :5]).last_hidden_state
    assert both.isfinite().all() and torch.allclose(both[:1, :5].float(), alone.float(), atol=3e-2)
