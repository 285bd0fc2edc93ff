"""Checkpoints of other families: the numbers of transformers' classes, both ways, and the same files back."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny_bert
import torch
from safetensors.torch import load_file, save_file
from test_remote_code import JINA, NEW
from torch import Tensor

import fastbert
from fastbert.config import Read
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.families import FAMILIES
from fastbert.families.accelerated import accelerated
from fastbert.families.names import Family
from fastbert.model.body import EncoderModel
from fastbert.model.mapping import to_theirs
from fastbert.packing import Packing
from fastbert.run import prepared
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
    "narrower embeddings": {"embedding_size": 24, "position_biased_input": True, "type_vocab_size": 2},
    "wider embeddings": {"embedding_size": 64},
    "a convolution": {"conv_kernel_size": 3, "conv_act": "gelu"},
    "a convolution of groups": {"conv_kernel_size": 5, "conv_groups": 4},
    "a convolution wider than the texts": {"conv_kernel_size": 13, "embedding_size": 24},
    "a convolution after the only layer": {"conv_kernel_size": 3, "num_hidden_layers": 1},
    "a convolution beside content alone": {
        "relative_attention": False, "pos_att_type": None, "norm_rel_ebd": "none", "position_biased_input": True,
        "conv_kernel_size": 3,
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
    choices = 5 if head == "ForMultipleChoice" else 1  # of each of three questions
    ids = torch.randint(5, 70, (3 * choices, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS * choices)[:, None]
    mask = mask if side == "right" else mask.flip(1)
    batch = {"input_ids": ids.where(mask, theirs.config.pad_token_id), "attention_mask": mask.long()}
    if choices > 1:
        return {key: value.unflatten(0, (choices, 3)).transpose(0, 1).contiguous() for key, value in batch.items()}
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

    def gradients(model: Any, scale: float = 1.0) -> dict[str, Tensor]:
        made = outputs(model(**batch), head, mask)
        named = dict(model.named_parameters())
        given = [scale * d.to(made[0].dtype) for d in douts]
        grads = torch.autograd.grad(made, list(named.values()), given, allow_unused=True)
        return {
            name: torch.zeros_like(named[name]) if grad is None else grad / scale
            for name, grad in zip(named, grads, strict=True)
        }

    exact = by_file(theirs, gradients(copy.deepcopy(theirs).double()), tmp_path / "g")
    # the worst of some roundings, as a few numbers that happen to be rounded well say nothing of how well they are
    tries = [by_file(theirs, gradients(theirs, scale), tmp_path / "g") for scale in (1.0, 0.7, 1.3, 1.9)]
    got = to_theirs(gradients(ours), ours.origin.dialect.rules(ours))
    for key, grad in got.items():
        if exact[key].abs().max() < 1e-12:  # that of a bias of keys, which softmax takes out again
            assert grad.abs().max() < 1e-5
        else:
            plain = max((one[key] for one in tries), key=lambda x: float((x - exact[key]).abs().max()))
            assert_close(grad, plain, exact[key], factor=3.0, what=key)


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


PRETRAINED = {
    "Albert": ("EncoderForPreTraining", {"classifier_dropout_prob": 0.4}),
    "Electra": ("EncoderForReplacedTokens", {}),
}


def pretrained(family: str, folder: Path) -> tuple[Any, Any]:
    """transformers' class of pretraining, and ours."""
    ours, changes = PRETRAINED[family]
    theirs = theirs_of(family, "ForPreTraining", **changes)
    theirs.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return theirs, fastbert.load(folder, getattr(fastbert, ours))


def scores_of(out: Any, mask: Tensor) -> list[Tensor]:
    if (words := getattr(out, "prediction_logits", None)) is None:
        return [out.logits[mask]]
    return [words[mask], out.sop_logits if hasattr(out, "sop_logits") else out.seq_relationship_logits]


@pytest.mark.parametrize("family", PRETRAINED)
def test_heads_of_pretraining(family: str, tmp_path: Path) -> None:
    """Forward, gradient and loss, and the same file back."""
    theirs, ours = pretrained(family, tmp_path / "a")
    batch, exact = batch_of(theirs, "ForPreTraining"), copy.deepcopy(theirs).double()
    mask = batch["attention_mask"].bool()
    generator = torch.Generator().manual_seed(2)
    made = [scores_of(model(**batch), mask) for model in (ours, theirs, exact)]
    douts = [torch.randn(x.shape, generator=generator) for x in made[0]]
    grads = []
    for model, scores in zip((ours, theirs, exact), made, strict=True):
        named = dict(model.named_parameters())
        of_all = torch.autograd.grad(
            scores, list(named.values()), [d.to(scores[0].dtype) for d in douts], allow_unused=True
        )
        of_named = zip(named.items(), of_all, strict=True)
        grads.append({name: torch.zeros_like(x) if grad is None else grad for (name, x), grad in of_named})
    for got, plain, wanted in zip(*made, strict=True):
        assert_close(got, plain, wanted, factor=3.0)
    plain_grads, exact_grads = (by_file(theirs, one, tmp_path / "g") for one in grads[1:])
    for key, grad in to_theirs(grads[0], ours.origin.dialect.rules(ours)).items():
        if exact_grads[key].abs().max() < 1e-12:
            assert grad.abs().max() < 1e-5
        else:
            assert_close(grad, plain_grads[key], exact_grads[key], factor=3.0, what=key)
    fastbert.save(ours, tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("packed", [False, True])
def test_a_loss_of_replaced_tokens(packed: bool, tmp_path: Path) -> None:
    """As transformers', and -100 counts for nothing."""
    theirs, ours = pretrained("Electra", tmp_path)
    batch = batch_of(theirs, "ForPreTraining")
    mask = batch["attention_mask"].bool()
    labels = torch.randint(0, 2, mask.shape, generator=torch.Generator().manual_seed(3))
    given, of = batch, labels
    if packed:
        given, of = (
            {"input_ids": batch["input_ids"][mask], "packing": Packing.from_lengths(list(LENGTHS))},
            labels[mask],
        )
    exact = copy.deepcopy(theirs).double()
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(exact(**batch).logits[mask], labels[mask].double())
    assert_close(ours(**given, labels=of).loss, theirs(**batch, labels=labels).loss, wanted, factor=3.0)
    none = ours(**given, labels=torch.full_like(of, -100)).loss
    some = ours(**given, labels=of.where(torch.arange(len(of.flatten())).view(of.shape) % 2 == 0, -100)).loss
    assert none == 0 and some not in (0, wanted)
    with pytest.raises(ArgumentError, match="labels from 0 to 1"):
        ours(**given, labels=torch.full_like(of, 2))


def test_a_loss_of_swapped_sentences(tmp_path: Path) -> None:
    theirs, ours = pretrained("Albert", tmp_path)
    batch = batch_of(theirs, "ForPreTraining")
    mask = batch["attention_mask"].bool()
    labels, order = batch["input_ids"].where(mask & (torch.arange(11) % 3 == 0), -100), torch.tensor([0, 1, 1])
    words, pairs = scores_of(copy.deepcopy(theirs).double()(**batch), mask)
    wanted = torch.nn.functional.cross_entropy(words, labels[mask]) + torch.nn.functional.cross_entropy(pairs, order)
    plain = theirs(**batch, labels=labels, sentence_order_label=order).loss
    assert_close(ours(**batch, labels=labels, next_sentence_label=order).loss, plain, wanted, factor=3.0)


@pytest.mark.parametrize("family", PRETRAINED)
def test_dropouts_of_heads_of_pretraining(family: str, tmp_path: Path) -> None:
    """ALBERT drops before its classifier of pairs, ELECTRA nowhere."""
    theirs, ours = pretrained(family, tmp_path)
    batch = {key: value.repeat(60, 1)[:, :1] for key, value in batch_of(theirs, "ForPreTraining").items()}
    torch.manual_seed(0)
    wanted, got = dropped(theirs, theirs.base_model, batch), dropped(ours, ours.bert, batch)
    wanted = [*wanted[:1], *wanted[2:]] if family == "Albert" else wanted  # but the decoder, which is a product of ours
    assert len(got) == len(wanted)
    assert all(abs(x - y) < 0.04 for x, y in zip(got, wanted, strict=True)), (got, wanted)


def state_dict_file(theirs: Any, folder: Path) -> dict[str, Tensor]:
    """A folder whose weights are by the names of transformers' class, as torch gives them; its tensors."""
    theirs.save_pretrained(folder)
    tensors = {key: value.clone() for key, value in theirs.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification"])
@pytest.mark.parametrize("family", ["NomicBert", "Gte"])
def test_files_by_the_names_of_the_class(family: str, head: str, tmp_path: Path) -> None:
    """The same model as by the names that `save_pretrained` writes, and the same file back."""
    theirs = theirs_of(family, head)
    wanted = ours_of(theirs, tmp_path / "usual", head).state_dict()
    before = state_dict_file(theirs, tmp_path / "state")
    ours = fastbert.load(tmp_path / "state", getattr(fastbert, f"Encoder{head}"))
    assert ours.state_dict().keys() == wanted.keys()
    assert all(torch.equal(value, wanted[key]) for key, value in ours.state_dict().items())
    fastbert.save(ours, tmp_path / "saved")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    back = getattr(T, family + head).from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, back[key]) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize("family", ["NomicBert", "Gte"])
def test_a_file_by_the_names_of_the_class_that_lacks_a_key(family: str, tmp_path: Path) -> None:
    state = state_dict_file(theirs_of(family), tmp_path)
    lost = "layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in state.items() if key != lost}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"missing keys: {lost}"):
        fastbert.load(tmp_path)


def test_a_nomic_by_the_names_of_the_class_with_fields_of_the_remote_code(tmp_path: Path) -> None:
    theirs = theirs_of("NomicBert", n_embd=48, n_head=3, n_layer=3, n_inner=80)
    state_dict_file(theirs, tmp_path)
    ours = fastbert.load(tmp_path)
    batch = batch_of(theirs, "Model")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        plain, got = (model(**batch).last_hidden_state[mask] for model in (theirs, ours))
        assert_close(got, plain, copy.deepcopy(theirs).double()(**batch).last_hidden_state[mask], factor=3.0)


@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForSequenceClassification"])
def test_a_gte_under_the_prefix_of_its_remote_code(head: str, tmp_path: Path) -> None:
    """As transformers reads it; it comes back under the same prefix."""
    theirs = theirs_of("Gte", "ForSequenceClassification" if head == "Model" else head)
    theirs.save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    before = {key.replace("gte.", "new."): value for key, value in load_file(path).items()}
    save_file(before, path)
    read = getattr(T, f"Gte{head}").from_pretrained(tmp_path / "a").eval()
    ours = fastbert.load(tmp_path / "a", getattr(fastbert, f"Encoder{head}"))
    batch = batch_of(theirs, head)
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        got, plain, exact = (
            outputs(model(**batch), head, mask)[0] for model in (ours, read, copy.deepcopy(read).double())
        )
    assert_close(got, plain, exact, factor=3.0)
    fastbert.save(ours, tmp_path / "b")
    after = load_file(tmp_path / "b" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


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


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("changes", ["narrower embeddings", "a convolution", "a convolution after the only layer"])
def test_heads_of_debertas_of_other_shapes(changes: str, head: str, tmp_path: Path) -> None:
    """Also with labels, where only some rows of the last layer are read."""
    theirs = theirs_of("DebertaV2", head, **DEBERTAS[changes])
    ours = ours_of(theirs, tmp_path, head)
    batch = batch_of(theirs, head)
    mask = batch["attention_mask"].bool()
    exact = copy.deepcopy(theirs).double()
    with torch.no_grad():
        (got,), (plain,), (wanted,) = (outputs(model(**batch), head, mask) for model in (ours, theirs, exact))
        assert_close(got, plain, wanted, factor=3.0)
        if head == "ForMaskedLM":
            labels = batch["input_ids"].where(mask & (torch.arange(11) % 3 == 0), -100)
            loss = torch.nn.functional.cross_entropy(wanted, labels[mask])
            plain_loss = torch.nn.functional.cross_entropy(plain, labels[mask])
            assert_close(ours(**batch, labels=labels).loss, plain_loss, loss, factor=3.0)


def test_a_convolution_of_no_tokens(tmp_path: Path) -> None:
    ours = ours_of(theirs_of("DebertaV2", conv_kernel_size=5), tmp_path)
    assert ours(torch.zeros(0, 3, dtype=torch.int64)).last_hidden_state.shape == (0, 3, 48)
    assert (ours(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)).last_hidden_state == 0).all()
    assert ours(torch.zeros(2, 0, dtype=torch.int64)).last_hidden_state.shape == (2, 0, 48)


def test_what_stays_as_it_is_with_a_convolution(tmp_path: Path) -> None:
    """Hooks see the padded layout, a compiled model is the same one, and in int8 it stays in floats."""
    theirs = theirs_of("DebertaV2", conv_kernel_size=3)
    ours = ours_of(theirs, tmp_path)
    batch = batch_of(theirs, "Model")
    seen: list[torch.Size] = []
    ours.encoder.layer[0].convolution.conv.register_forward_hook(lambda _, args, out: seen.append(args[0].shape))
    with torch.no_grad():
        out = ours(**batch).last_hidden_state
        again = torch.compile(fastbert.load(tmp_path), backend="eager")(**batch).last_hidden_state
    assert seen == [(3, 48, 11)] and torch.allclose(out, again, atol=1e-5)
    with torch.no_grad():
        coarse = fastbert.quantize(fastbert.load(tmp_path), dtype="int8")(**batch).last_hidden_state
    assert torch.nn.functional.cosine_similarity(coarse, out, dim=-1)[batch["attention_mask"].bool()].min() > 0.98


def test_ids_outside_the_tables_of_narrower_embeddings(tmp_path: Path) -> None:
    ours = ours_of(theirs_of("DebertaV2", **DEBERTAS["narrower embeddings"]), tmp_path)
    for name, ids in (("input_ids", {"input_ids": 70}), ("token_type_ids", {"input_ids": 5, "token_type_ids": 2})):
        with pytest.raises(ArgumentError, match=name):
            ours(**{key: torch.full((1, 3), one) for key, one in ids.items()})


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
        ({"conv_kernel_size": 4}, "conv_kernel_size: got 4; expected a positive odd int"),
        ({"conv_kernel_size": 3, "conv_groups": 5}, "conv_groups: got 5; expected a divisor of hidden_size=48"),
        ({"conv_kernel_size": 3, "conv_act": "other"}, "conv_act: got 'other'; expected one of"),
        ({"embedding_size": "x"}, "embedding_size: got 'x'; expected a positive int"),
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


# Of every family a number of its own for each dropout that its config has.
DROPOUTS = {
    "hidden_dropout_prob": 0.1,
    "dropout": 0.1,
    "classifier_dropout": 0.3,
    "classifier_dropout_prob": 0.4,
    "cls_dropout": 0.5,
    "pooler_dropout": 0.2,
    "seq_classif_dropout": 0.6,
    "qa_dropout": 0.7,
    "summary_first_dropout": 0.2,
    "summary_last_dropout": 0.65,
}
WITH_CLASSIFIERS = [head for head in HEADS if head not in ("Model", "ForMaskedLM")]


def dropped(model: Any, body: torch.nn.Module, batch: dict[str, Tensor]) -> list[float]:
    """How much of what goes into each linear layer of a head is dropped out in training, in the order of calls."""
    seen: dict[bool, list[Tensor]] = {True: [], False: []}
    inside = set(body.modules())
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module not in inside:
            module.register_forward_pre_hook(lambda _, args: seen[model.training].append(args[0].detach()))
    for training in (True, False):
        model.train(training)
        body.eval()
        with torch.no_grad():
            model(**batch)
    return [float((x[y != 0] == 0).double().mean()) for x, y in zip(seen[True], seen[False], strict=True)]


@pytest.mark.parametrize("head", WITH_CLASSIFIERS)
def test_dropouts_of_heads(family: str, head: str, tmp_path: Path) -> None:
    """As much is dropped before each linear layer of a head as in transformers, whatever config.json calls it."""
    known = getattr(T, f"{family}Config")().to_dict() | dict.fromkeys(("cls_dropout", "summary_first_dropout"))
    theirs = theirs_of(family, head, **{name: p for name, p in DROPOUTS.items() if name in known})
    ours = ours_of(theirs, tmp_path, head)
    batch = {key: value.repeat(40, *[1] * (value.dim() - 1)) for key, value in batch_of(theirs, head).items()}
    if head in OF_TOKENS:
        batch = {key: value[:, :1] for key, value in batch.items()}  # theirs drops at padding too
    torch.manual_seed(0)
    wanted, got = dropped(theirs, theirs.base_model, batch), dropped(ours, ours.bert, batch)
    assert len(got) == len(wanted)
    assert all(abs(x - y) < 0.04 for x, y in zip(got, wanted, strict=True)), (got, wanted)


def test_dropouts_of_layers(family: str, tmp_path: Path) -> None:
    """Our layers drop where transformers' modules do: with the same seed their encoder, accelerated, gives the same."""
    changes = {"hidden_dropout_prob": 0.3, "dropout": 0.3, "attention_dropout": 0.2}
    known = getattr(T, f"{family}Config")().to_dict()
    theirs = theirs_of(family, **{name: p for name, p in changes.items() if name in known and family != "ModernBert"})
    check_dropouts_of_layers(family, theirs, tmp_path)


def test_dropouts_of_layers_with_a_convolution(tmp_path: Path) -> None:
    """Which are one more in the first."""
    changes = {"conv_kernel_size": 3, "hidden_dropout_prob": 0.3}
    check_dropouts_of_layers("DebertaV2", theirs_of("DebertaV2", **changes), tmp_path / "a")
    theirs = theirs_of("DebertaV2", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, conv_kernel_size=3)
    ours = ours_of(theirs, tmp_path / "b").train()
    ours.encoder.layer[0].convolution.dropout.p = 0.5
    seen: list[Tensor] = []
    layer = ours.encoder.layer[0]
    layer.output.LayerNorm.register_forward_hook(lambda _, args, out: seen.append(out))
    layer.convolution.LayerNorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    batch = batch_of(theirs, "Model")
    torch.manual_seed(0)
    ours(**batch)
    before, total = (one[batch["attention_mask"].bool()] for one in seen)
    assert abs(float((total == before).double().mean()) - 0.5) < 0.05  # tanh(0) is added there


@pytest.mark.parametrize("checkpointed", [False, True])
def test_training_with_a_convolution(checkpointed: bool, tmp_path: Path) -> None:
    """With dropout; layers that are computed again have the same gradient."""
    theirs = theirs_of("DebertaV2", "ForSequenceClassification", **DEBERTAS["narrower embeddings"], conv_kernel_size=3)
    ours = ours_of(theirs, tmp_path, "ForSequenceClassification").train()
    batch, labels = batch_of(theirs, "Model"), torch.tensor([0, 1, 1])
    grads = []
    for again in (False, checkpointed):
        for layer in ours.bert.encoder.layer:
            layer.gradient_checkpointing = again
        torch.manual_seed(0)
        loss = ours(**batch, labels=labels).loss
        grads.append(torch.autograd.grad(loss, list(ours.parameters())))
    assert all(torch.allclose(x, y, atol=1e-7) for x, y in zip(*grads, strict=True))
    assert grads[0][0].abs().max() > 0


def check_dropouts_of_layers(family: str, theirs: Any, folder: Path) -> None:
    """The dropouts of our layers are those of theirs, and with the same seed drop the same."""
    ours = ours_of(theirs, folder).train().encoder
    fastbert.accelerate(theirs.train())
    ((_, forward), *_) = accelerated(theirs)
    own = getattr(forward, "encoder", forward).ours
    own.follow()
    assert own.layer[0].dropouts() == ours.layer[0].dropouts()
    packing, x = Packing.from_lengths(list(LENGTHS)), torch.randn(sum(LENGTHS), 48)
    states = []
    for encoder in (ours, own):
        torch.manual_seed(3)
        states.append(encoder.run(x, packing)[-1])
    assert torch.equal(*states)
    assert family == "ModernBert" or not torch.equal(states[0], ours.run(x, packing)[-1])


@pytest.mark.parametrize("head", WITH_CLASSIFIERS)
def test_a_dropout_is_written_where_transformers_reads_it(family: str, head: str, tmp_path: Path) -> None:
    theirs_of(family, head).base_model.save_pretrained(tmp_path / "body")
    kind, config = getattr(fastbert, f"Encoder{head}"), fastbert.HeadConfig(classifier_dropout=0.45)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = fastbert.load(tmp_path / "body", kind, head=config)
    fastbert.save(model, tmp_path / "saved")
    back = getattr(T, family + head).from_pretrained(tmp_path / "saved")
    inside = set(back.base_model.modules())
    found = {one.p for one in back.modules() if isinstance(one, torch.nn.Dropout) and one not in inside}
    lost = any("no field for classifier_dropout=0.45" in str(one.message) for one in said)
    assert (0.45 in found) is not lost
    assert fastbert.load(tmp_path / "saved", kind).head_config.classifier_dropout == (None if lost else 0.45)


def test_other_labels_keep_the_dropout_of_the_file(tmp_path: Path) -> None:
    theirs_of("DistilBert", "ForSequenceClassification", seq_classif_dropout=0.35).save_pretrained(tmp_path / "a")
    with pytest.warns(fastbert.errors.UntrainedWarning):
        model = fastbert.load(
            tmp_path / "a", fastbert.EncoderForSequenceClassification, head=fastbert.HeadConfig(("a", "b", "c"))
        )
    assert model.head_config.classifier_dropout == 0.35
    fastbert.save(model, tmp_path / "b")
    saved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert saved["seq_classif_dropout"] == 0.35 and "classifier_dropout" not in saved


# Words of a config.json that change neither a number nor a shape, or that are read elsewhere than in a family's file.
OF_NO_MEANING = {
    "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "cls_token_id",
    "deterministic_flash_attn", "dtype", "eos_token_id", "is_encoder_decoder", "label2id", "legacy", "model_type",
    "output_attentions", "output_hidden_states", "return_dict", "sep_token_id", "tie_word_embeddings",
    "transformers_version", "use_cache",
}  # fmt: skip
# Of how transformers begins untrained weights; ours begin as BERT's.
OF_INITIALISATION = {"sinusoidal_pos_embds", "initializer_cutoff_factor"}
# Those that transformers' code reads though its config class does not list them, and that set one another off.
MORE: dict[str, dict[str, Any]] = {
    "Electra": {"summary_first_dropout": 0.0, "summary_proj_to_labels": False},
    "ModernBert": {
        "head_dim": None, "sliding_window": None, "rope_scaling": None, "partial_rotary_factor": None,
        "sparse_prediction": True, "sparse_pred_ignore_index": -1,
    },
    "NomicBert": {"head_dim": None, "rope_scaling": None, "partial_rotary_factor": None},
    "Gte": {"head_dim": None, "rope_scaling": None, "partial_rotary_factor": None},
    "DebertaV2": {
        "cls_dropout": None, "conv_kernel_size": 3, "conv_groups": 1, "conv_act": "tanh",
        "embedding_size": 48, "attention_head_size": 16,
        "share_att_key": False, "position_buckets": 8,
    },
}  # fmt: skip


def meaning(read: Family, given: dict[str, Any]) -> Any:
    """What a family reads of a config.json: the configs for each kind of head, and what is said, or the error."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            made = [(read.read_config(given, of), read.read_head(given, of)) for of in (None, *get_args(Read))]
        except ArgumentError as error:
            return str(error)
    return made, [str(one.message) for one in said]


def test_no_word_of_a_config_is_ignored(family: str) -> None:
    """Each, when it is another, changes what is computed, is refused, or is warned of."""
    given = getattr(T, f"{family}Config")(**CONFIGS[family]).to_dict() | MORE.get(family, {})
    others = {bool: lambda x: [not x], int: lambda x: [x + 2], float: lambda x: [0.37], str: lambda x: ["relu", "mean"]}
    ignored = OF_NO_MEANING | OF_INITIALISATION | ({"pad_token_id"} if family == "MPNet" else set())  # theirs too
    read = FAMILIES[given["model_type"]]
    usual = meaning(read, given)
    assert not isinstance(usual, str)
    for name, value in given.items():
        changed = others.get(type(value), lambda x: [0.37, 3, "relu", {"rope_type": "linear", "factor": 2.0}])(value)
        same = [meaning(read, {**given, name: one}) == usual for one in changed]
        assert name in ignored or not all(same), f"{family}: {name}={changed} is ignored"


def test_what_calls_ask_for_is_not_read_of_a_config(tmp_path: Path) -> None:
    theirs_of("Bert", output_hidden_states=True).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="output_hidden_states: a model of fastbert gives what a call asks it for"):
        model = fastbert.load(tmp_path)
    assert model(torch.full((1, 3), 7)).hidden_states is None


def test_a_distilbert_by_berts_names(tmp_path: Path) -> None:
    """As transformers reads them, before those of its own."""
    theirs_of("DistilBert").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps({**given, "n_layers": 9, "num_hidden_layers": given["n_layers"]}))
    assert T.DistilBertConfig.from_pretrained(tmp_path).n_layers == fastbert.load(tmp_path).config.num_layers == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classifier_pooling", "max"),
        ("classifier_activation", "other"),
        ("hidden_activation", "other"),
        ("rope_parameters", 3),
        ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
        ("partial_rotary_factor", 0.5),
        ("head_dim", 8),
        ("sliding_window", 0),
    ],
)
def test_what_of_modernbert_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    theirs_of("ModernBert").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps({**given, name: value}))
    with pytest.raises(
        CheckpointError, match="rope_parameters" if name in ("rope_scaling", "partial_rotary_factor") else name
    ):
        fastbert.load(tmp_path)


def test_a_window_of_modernbert_by_its_half(tmp_path: Path) -> None:
    theirs_of("ModernBert").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sliding_window": 2}))
    theirs, ours = T.ModernBertModel.from_pretrained(tmp_path).eval(), fastbert.load(tmp_path)
    batch = batch_of(theirs, "Model")
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        plain, got = (model(**batch).last_hidden_state[mask] for model in (theirs, ours))
        assert_close(got, plain, copy.deepcopy(theirs).double()(**batch).last_hidden_state[mask], factor=3.0)


def test_a_decoder_without_a_bias(tmp_path: Path) -> None:
    theirs = theirs_of("ModernBert", "ForMaskedLM", decoder_bias=False)
    ours = ours_of(theirs, tmp_path / "a", "ForMaskedLM")
    batch = batch_of(theirs, "ForMaskedLM")
    mask = batch["attention_mask"].bool()
    labels = batch["input_ids"].where(mask & (torch.arange(11) % 2 == 0), -100)
    exact = copy.deepcopy(theirs).double()
    with torch.no_grad():
        plain, got = (model(**batch).logits[mask] for model in (theirs, ours))
        assert_close(got, plain, exact(**batch).logits[mask], factor=3.0)
        got, plain = (model(**batch, labels=labels).loss for model in (ours, theirs))
        wanted = torch.nn.functional.cross_entropy(exact(**batch).logits[mask], labels[mask])
        assert_close(got, plain, wanted, factor=3.0)
    fastbert.save(ours, tmp_path / "b")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


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


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
# Of a family on the page its name in FAMILIES.
NAMED = {
    "BERT": "bert", "RoBERTa": "roberta", "XLM-RoBERTa": "xlm-roberta", "CamemBERT": "camembert", "ELECTRA": "electra",
    "DistilBERT": "distilbert", "ALBERT": "albert", "MPNet": "mpnet", "DeBERTa v2, v3": "deberta-v2",
    "ModernBERT": "modernbert", "NomicBERT": "nomic_bert", "GTE": "gte", "GTE-new": "new", "Jina v2": "bert, Jina's",
}  # fmt: skip


def table(heading: str) -> dict[str, list[str]]:
    """The cells of a table on the page, by the first of each row."""
    lines = PAGE.partition(heading)[2].partition("|---")[2].partition("\n\n")[0].splitlines()[1:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in rows}


def test_the_page_names_every_family_with_its_heads_and_classes() -> None:
    rows = table("# Families of models")
    forms = {name for name, family in FAMILIES.items() if family.form_of is not None and name != "bert, Jina's"}
    assert list(rows) == list(NAMED) and sorted(NAMED.values()) == sorted(FAMILIES.keys() - forms)
    for shown, (model_type, heads, classes, _) in rows.items():
        family = FAMILIES[NAMED[shown]]
        assert model_type.startswith(f"`{NAMED[shown].partition(',')[0]}`")
        five = "".join(f"`{head.removeprefix('For')}`" for head in HEADS if head != "Model")
        named = set(re.findall(r"`(\w+)`", heads.replace("the five", five)))
        assert named == {head.removeprefix("For") for head in family.heads}, shown
        all_classes = [name.rpartition(".")[2] for name in (*family.models, *family.encoders)]
        its_own = [name for name in all_classes if family.form_of is None and belongs(name, family, NAMED[shown])]
        assert re.findall(r"`(\w+)`", classes) == its_own, shown


def belongs(name: str, family: Family, model_type: str) -> bool:
    """Whether a class of transformers is of this `model_type`, where a family has several."""
    others = [start for other, start in family.model_types.items() if other != model_type]
    return not name.startswith(tuple(others))


@pytest.mark.filterwarnings("ignore:int8 is slower")
@pytest.mark.parametrize("shown", NAMED)
def test_the_page_says_what_serves_a_family(shown: str) -> None:
    family = FAMILIES[NAMED[shown]]
    remote = {"new": NEW, "bert, Jina's": JINA}
    classes = family.model_types[NAMED[shown]]
    given = remote.get(NAMED[shown]) or getattr(T, f"{classes}Config")(**CONFIGS[classes]).to_dict()

    def made() -> EncoderModel:
        return EncoderModel(family.read_config(given)).eval()

    quantized = []
    for dtype in ("int8", "fp8"):
        try:
            fastbert.quantize(made(), dtype=dtype)
            quantized.append(True)
        except ArgumentError:
            quantized.append(False)
    assert quantized[0] == quantized[1], "the page has one column for both"
    encoder = made().encoder
    reasons = [prepared.unserved(steps, parts) for steps, parts in encoder.layers()]
    _, eight_bits, launches = table("## Layers")[shown]
    assert [eight_bits, launches] == ["yes" if served else "no" for served in (quantized[0], not any(reasons))]
