from __future__ import annotations

import json
import shutil
import threading
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer

from fastbert.errors import ArgumentError, CheckpointError
from fastbert.text import tokenizer as text_module
from fastbert.text.batches import batches
from fastbert.text.tokenizer import Tokenizer
from fastbert.text.tokens import Tokens

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "The",
    "fox",
    "##es",
    "café",
    "cafe",
    "中",
    ",",
    ".",
    "a",
    "b",
]
TEXTS = [
    "The quick brown foxes jumped over the lazy dogs, didn't they?",
    "",
    " ",
    "\t\n\r",
    "Crème brûlée à la carte; naïve Ångström",
    "中文字符 and English",
    "\u2028\u2029\x0b\x0c\x00\x7f\u200b\ufeff",
    "e\u0301" * 50,
    "👩‍👩‍👧‍👦 🇫🇷 🏽",
    "مرحبا بالعالم ไทย ภาษา हिन्दी",
    "[CLS] [SEP] [MASK] [PAD] [UNK] [cls]",
    "supercalifragilisticexpialidocious" * 4,
    "word " * 400,
    "İstanbul ẞ ﬁne Ⅷ ½",
]


@pytest.fixture(scope="module")
def tokenizer(minilm: Path) -> Tokenizer:
    return Tokenizer.from_folder(minilm)


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    """A folder with nothing but a small vocab.txt."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return tmp_path


def rows(tokens: Tokens) -> list[list[int]]:
    return [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


def type_rows(tokens: Tokens) -> list[list[int]]:
    assert tokens.types is not None
    return [tokens.types[a:b].tolist() for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


# The file asks for padding and truncation to 128: neither may show.
@pytest.mark.parametrize("max_length", [3, 4, 17, 128, 256, 512])
def test_encode_matches_transformers(minilm: Path, tokenizer: Tokenizer, max_length: int) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)(TEXTS, truncation=True, max_length=max_length)
    tokens = tokenizer.encode(TEXTS, max_length)
    assert rows(tokens) == theirs["input_ids"]
    assert tokens.types is None
    assert tokens.ids.dtype == np.int32
    assert tokens.lengths.tolist() == [len(ids) for ids in theirs["input_ids"]]


@pytest.mark.parametrize("max_length", [4, 5, 18, 256])
def test_pairs_match_transformers(minilm: Path, tokenizer: Tokenizer, max_length: int) -> None:
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    theirs = transformers.AutoTokenizer.from_pretrained(minilm)(
        pairs, truncation="longest_first", max_length=max_length
    )
    tokens = tokenizer.encode(pairs, max_length)
    assert rows(tokens) == theirs["input_ids"]
    assert type_rows(tokens) == theirs["token_type_ids"]


def test_pairs_by_hand(vocabulary: Path) -> None:
    tokens = Tokenizer.from_folder(vocabulary).encode([("a a a a", "b"), ("", "b b")], 6)
    assert rows(tokens) == [[2, 14, 14, 3, 15, 3], [2, 3, 15, 15, 3]]
    assert type_rows(tokens) == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {"do_lower_case": False},
        {"do_lower_case": True, "strip_accents": False},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    ],
)
def test_vocabulary_files_match_transformers(vocabulary: Path, settings: dict[str, bool] | None) -> None:
    if settings is not None:
        (vocabulary / "tokenizer_config.json").write_text(json.dumps(settings))
    texts = ["The the foxes, café a中b.", "[MASK] [mask] xyz", "", "THE CAFÉ", "fo\u0301x"]
    theirs = transformers.BertTokenizer.from_pretrained(vocabulary, **(settings or {}))(texts)["input_ids"]
    assert rows(Tokenizer.from_folder(vocabulary).encode(texts, 64)) == theirs


def test_vocabulary_file_gives_what_tokenizer_json_gives(minilm: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(minilm / name, tmp_path)
    assert rows(Tokenizer.from_folder(tmp_path).encode(TEXTS, 99)) == rows(tokenizer.encode(TEXTS, 99))


def test_vocabulary_with_carriage_returns(vocabulary: Path) -> None:
    before = rows(Tokenizer.from_folder(vocabulary).encode(["the foxes"], 9))
    (vocabulary / "vocab.txt").write_bytes("\r\n".join(WORDS).encode())
    assert rows(Tokenizer.from_folder(vocabulary).encode(["the foxes"], 9)) == before == [[2, 5, 7, 8, 3]]


def test_no_texts(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode([], 8)
    assert (tokens.ids.size, tokens.offsets.tolist(), tokens.lengths.size) == (0, [0], 0)


def test_any_iterable(tokenizer: Tokenizer) -> None:
    assert rows(tokenizer.encode((text for text in ("a", "b")), 8)) == rows(tokenizer.encode(np.array(["a", "b"]), 8))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", "b", 3], r"texts\[2\]: got a int; expected a string"),
        (["a", None], r"texts\[1\]: got None, which is missing"),
        (["a", b"b"], r"texts\[1\]: got a bytes"),
        ([3], r"texts\[0\]: got a int"),
        (["a", ("b", "c")], r"texts\[1\]: got a tuple; expected a string"),
        ([("a", "b"), "c"], r"texts\[1\]: got a str; expected a pair"),
        ([("a", "b"), "cd"], r"texts\[1\]: got a str; expected a pair"),
        ([("a", "b"), ("c",)], r"texts\[1\]: got a tuple; expected a pair"),
        ([("a", "b", "c")], r"texts\[0\]"),
        ([("a", 3)], r"texts\[0\]: got a int"),
        ("ab", r"a list of strings\. Wrap it in a list"),
    ],
)
def test_items_that_are_not_texts(tokenizer: Tokenizer, texts: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        tokenizer.encode(texts, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize(("texts", "max_length"), [(["a"], 2), (["a"], 0), (["a"], -1), ([("a", "b")], 3)])
def test_no_room_for_a_token(tokenizer: Tokenizer, texts: list[str], max_length: int) -> None:
    with pytest.raises(ArgumentError, match="max_length"):
        tokenizer.encode(texts, max_length)


def test_lone_surrogates_are_replaced_and_counted(tokenizer: Tokenizer) -> None:
    with pytest.warns(UserWarning, match="^4 lone surrogates") as caught:
        tokens = tokenizer.encode(["a\ud800b", "fine", "\udfff\ud83d", "x\udc80"], 16)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows(tokens) == rows(tokenizer.encode(["a\ufffdb", "fine", "\ufffd\ufffd", "x\ufffd"], 16))
    with pytest.warns(UserWarning, match="^2 lone"):
        pair = tokenizer.encode([("a\ud800", "b\ud800")], 16)
    assert rows(pair) == rows(tokenizer.encode([("a\ufffd", "b\ufffd")], 16))


def test_a_head_gives_the_tokens_of_the_whole(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [
        *TEXTS,
        "a " * 1000,
        "\u200b \x00 " * 300 + "late words that a head does not reach " * 20,
        "x" * 2000 + " y",
        " \u0301a" * 200,
        "né " * 300,
        "[SEP] [SEP]" * 100,
        "don't stop " * 100,
    ]
    expected = rows(tokenizer.encode(texts, 32))
    heads: list[str] = []

    def short_head(text: str, max_length: int) -> str:
        heads.append(head(text, max_length))
        return heads[-1]

    head = text_module._head
    monkeypatch.setattr(text_module, "HEAD_CHARACTERS_PER_TOKEN", 1)
    monkeypatch.setattr(text_module, "_head", short_head)
    assert rows(tokenizer.encode(texts, 32)) == expected
    assert sum(len(head) < len(text) for head, text in zip(heads, texts, strict=True)) > 8
    tokenizer._heads_tell, before = False, tokenizer._heads_tell
    whole = rows(tokenizer.encode(texts, 32))
    tokenizer._heads_tell = before
    assert before and whole == expected


def test_a_head_is_not_trusted_with_spaces_in_added_tokens(minilm: Path, tmp_path: Path) -> None:
    with_spaces = HFTokenizer.from_file(str(minilm / "tokenizer.json"))
    with_spaces.add_tokens([AddedToken("new york")])
    with_spaces.save(str(tmp_path / "tokenizer.json"))
    [ids] = rows(Tokenizer.from_folder(tmp_path).encode([" " * 95 + "new york"], 3))
    assert ids == [101, with_spaces.token_to_id("new york"), 102]


def test_ten_megabytes(tokenizer: Tokenizer) -> None:
    long = "the quick brown fox jumps " * 400_000
    assert rows(tokenizer.encode([long], 256)) == rows(tokenizer.encode([long[:10_000]], 256))


def test_chunks_do_not_show(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = list(zip(TEXTS, reversed(TEXTS), strict=True))
    expected = tokenizer.encode(TEXTS, 40), tokenizer.encode(pairs, 40)
    for characters in (1, 100, 457):
        monkeypatch.setattr(text_module, "CHUNK_CHARACTERS", characters)
        assert rows(tokenizer.encode(TEXTS, 40)) == rows(expected[0])
        assert rows(tokenizer.encode(pairs, 40)) == rows(expected[1])
        assert type_rows(tokenizer.encode(pairs, 40)) == type_rows(expected[1])


def test_chunks_cover_every_text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "CHUNK_CHARACTERS", 25)
    texts = ["", "a" * 100, "b", "c", "d" * 16, "e" * 15, "f"]
    chunks = list(text_module._chunks(texts))
    assert [text for chunk in chunks for text in chunk] == texts
    assert [len(chunk) for chunk in chunks] == [2, 3, 1, 1]


def test_threads_do_not_share_a_length(tokenizer: Tokenizer) -> None:
    wrong: list[int] = []

    def work(max_length: int) -> None:
        for _ in range(30):
            wrong.extend(
                length for length in tokenizer.encode(["a " * 90] * 4, max_length).lengths if length != max_length
            )

    threads = [threading.Thread(target=work, args=(max_length,)) for max_length in (5, 50, 70)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_packed_follows_the_rows(vocabulary: Path) -> None:
    tokenizer = Tokenizer.from_folder(vocabulary)
    ids, types = tokenizer.encode(["a", "", "b b"], 8).packed([2, 0, 1])
    assert ids.dtype == torch.int64 and types is None
    assert ids.tolist() == [2, 15, 15, 3, 2, 14, 3, 2, 3]
    ids, types = tokenizer.encode([("a", "b"), ("", "a")], 8).packed([1, 0])
    assert types is not None and types.dtype == torch.int64
    assert ids.tolist() == [2, 3, 14, 3, 2, 14, 3, 15, 3]
    assert types.tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": "1.0"}', b"\xff\xfe"])
def test_damaged_tokenizer_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_damaged_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json or vocab\.txt"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n[UNK]\n[SEP]\n")
    with pytest.raises(CheckpointError, match=r"vocab\.txt: got no \[CLS\]"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\n")
    with pytest.raises(CheckpointError, match=r"vocab\.txt.*in UTF-8"):
        Tokenizer.from_folder(tmp_path)


def test_batches_by_hand() -> None:
    assert batches([3, 9, 3, 5, 1, 12], 8) == [[5], [1], [3, 0], [2, 4]]
    assert batches([], 8) == []
    assert batches([0, 0, 8, 0], 8) == [[2, 0, 1, 3]]


@pytest.mark.parametrize("batch_tokens", [1, 2, 7, 64, 65, 10_000])
def test_batches_keep_to_the_budget(batch_tokens: int) -> None:
    lengths = np.random.default_rng(0).integers(0, 66, 501)
    groups = batches(lengths, batch_tokens)
    order = [row for group in groups for row in group]
    assert sorted(order) == list(range(501))
    assert order == sorted(range(501), key=lambda row: -lengths[row])  # sorted() is stable
    for group in groups:
        assert len(group) == 1 or lengths[group].sum() <= batch_tokens
    for group, following in pairwise(groups):
        assert lengths[group].sum() + lengths[following[0]] > batch_tokens  # each as full as can be


@pytest.mark.parametrize("batch_tokens", [0, -5])
def test_batches_need_a_budget(batch_tokens: int) -> None:
    with pytest.raises(ArgumentError, match="batch_tokens"):
        batches([1], batch_tokens)
