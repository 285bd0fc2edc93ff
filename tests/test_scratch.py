from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_bert
import torch
import transformers

from fastbert.checkpoints.load import load
from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.model.heads import BertForPreTraining
from fastbert.text.tokenizer import Tokenizer
from fastbert.training import initialise_embedding, read_word_vectors, scratch

WORDS = tiny_bert.VOCABULARY
CONFIG = EncoderConfig(
    vocab_size=len(WORDS), hidden_size=8, num_layers=1, num_heads=1, intermediate_size=16, max_positions=16
)


def line(word: str, first: float) -> str:
    return " ".join([word, *(str(first + i) for i in range(8))])


@pytest.mark.parametrize("header", ["", "5 8\n"])
def test_both_formats_fill_the_table(header: str, tmp_path: Path) -> None:
    lines = [line("Film", 1), line("film", 20), line("nowhere", 2), line("[PAD]", 3), line("at a b", 4)]
    (tmp_path / "v.txt").write_text(header + " \n".join(lines) + "\n")
    plain, filled = tmp_path / "plain", tmp_path / "filled"
    assert scratch(plain, WORDS, CONFIG) == 0
    assert scratch(filled, WORDS, CONFIG, word_vectors=tmp_path / "v.txt") == 1
    before, after = (load(f, BertForPreTraining).bert.embeddings.word.weight for f in (plain, filled))
    row = WORDS.index("film")
    assert after[row].tolist() == list(range(1, 9))  # the first of two spellings
    others = [i for i in range(len(WORDS)) if i != row]
    assert torch.equal(before[others], after[others]) and not after[0].any()


def test_cased_words_and_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("\n".join([line("Film", 1), line("[PAD]", 3), line("film", 20)]))
    assert scratch(tmp_path / "m", WORDS, CONFIG, lower_case=False, word_vectors=tmp_path / "v.txt") == 1
    word = load(tmp_path / "m", BertForPreTraining).bert.embeddings.word.weight
    assert word[WORDS.index("film"), 0] == 20 and not word[0].any()


def test_the_folder_loads_in_transformers(tmp_path: Path) -> None:
    scratch(tmp_path, WORDS, CONFIG)
    ids = torch.tensor([[2, 5, 6, 4, 8, 3]])
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path).eval()(ids)
    ours = load(tmp_path, BertForPreTraining)(ids)
    assert (ours.prediction_logits - theirs.prediction_logits).abs().max() < 1e-5
    assert (ours.seq_relationship_logits - theirs.seq_relationship_logits).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line("a", 0) + "\nb 1 2\n", "line 2: got 'b 1 2'"),
        (line("a", 0) + " 9\n", "line 1: got more than 8 numbers"),
        ("1 9\n", "line 1: got vectors of 9 numbers; expected 8"),
        ("3 8\n" + line("a", 0) + "\n", "line 2: got the end after 1 vectors; expected 3"),
        (line("a", 0) + "\n" + line("b", 0).replace("7", "x"), "line 2"),
        (line("a", 0).replace("7", "nan"), "finite in float32"),
        (line("a", 0).replace("7", "1e39"), "finite in float32"),
        (line("", 0), "line 1"),
        ("", "no vectors"),
        (line("a", 0).encode() + b"\n\xff 1\n", "line 2: .*UTF-8"),
    ],
)
def test_bad_lines(content: str | bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ArgumentError, match=message):
        list(read_word_vectors(path, 8))
    scratch(tmp_path / "m", WORDS, CONFIG)
    model = load(tmp_path / "m", BertForPreTraining)
    before = model.bert.embeddings.word.weight.detach().clone()
    with pytest.raises(ArgumentError):
        initialise_embedding(model, Tokenizer.from_folder(tmp_path / "m"), path)
    assert torch.equal(before, model.bert.embeddings.word.weight)


def test_vectors_are_float32_and_a_missing_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text(line("a", 0.5))
    ((word, vector),) = read_word_vectors(tmp_path / "v.txt", 8)
    assert word == "a" and vector.dtype == np.float32 and vector[0] == 0.5
    with pytest.raises(ArgumentError, match="No such file"):
        list(read_word_vectors(tmp_path / "none.txt", 8))


@pytest.mark.parametrize(
    ("words", "message"),
    [([*WORDS[:-1], "film"], "two of one word"), (WORDS[1:], r"no \[PAD\]"), ([*WORDS, "more"], "vocab_size")],
)
def test_vocabularies_have_to_fit(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message):
        scratch(tmp_path / "m", words, CONFIG)
    assert not (tmp_path / "m").exists()


def test_an_error_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "v.txt").write_text("a 1 2\n")
    with pytest.raises(ArgumentError, match="line 1"):
        scratch(tmp_path / "m", WORDS, CONFIG, word_vectors=tmp_path / "v.txt")
    assert not (tmp_path / "m").exists()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ArgumentError, match=r"tokenizer\.json"):
        scratch(tmp_path, WORDS, CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "v.txt"]
