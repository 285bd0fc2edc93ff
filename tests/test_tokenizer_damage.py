"""Tokenizer files that are damaged, of another type, or no files at all; rules that fail; ids that the model lacks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_bert
import tokenizers
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from fastbert.errors import CheckpointError
from fastbert.tasks.encode import TextEncoder
from fastbert.text.tokenizer import Tokenizer
from fastbert.text.tokens import Tokens
from fastbert.training import Settings, train

FILES = ["tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "added_tokens.json"]
REPLACED = '{"type": "Replace", "pattern": {"String": "a"}, "content": "' + "a" * 50 + '"}'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a vocab.txt and nothing else."""
    (tmp_path / "vocab.txt").write_text("\n".join(tiny_bert.VOCABULARY) + "\n")
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert.make(tmp_path_factory.mktemp("model"))


def word_piece(**options: Any) -> dict[str, Any]:
    """The content of a tokenizer.json that is used as it is."""
    vocabulary = {word: i for i, word in enumerate(tiny_bert.VOCABULARY)}
    made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", **options))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    content: dict[str, Any] = json.loads(made.to_str())
    return content


def put(folder: Path, content: dict[str, Any] | str) -> Path:
    (folder / "tokenizer.json").write_text(content if isinstance(content, str) else json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing", "link to itself", "device"])
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    makers: dict[str, Callable[[], object]] = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "link to nothing": lambda: path.symlink_to("nothing"),
        "link to itself": lambda: path.symlink_to(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }
    makers[kind]()
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.from_folder(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file: needs another user")
@pytest.mark.parametrize("name", FILES)
def test_files_closed_to_us(folder: Path, name: str) -> None:
    (folder / name).touch()
    (folder / name).chmod(0)
    with pytest.raises(CheckpointError, match=f"{name}: got a file closed to us"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no \\[UNK\\]"),
        (b"\xe9\n", "in UTF-8"),
        (b"\xef\xbb\xbf[PAD]\n[UNK]\n[CLS]\n[SEP]\n", "byte-order mark"),
        ("[PAD]\n[UNK]\n".encode("utf-16"), "in UTF-8"),
        (b"[UNK]\n[SEP]\n", "no \\[CLS\\]"),
        (b"[UNK]\n[CLS]\n", "no \\[SEP\\]"),
    ],
)
def test_a_damaged_vocabulary(folder: Path, content: bytes, message: str) -> None:
    (folder / "vocab.txt").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"vocab\.txt: got .*{message}|vocab\.txt.*expected .*{message}"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "nul"])
@pytest.mark.parametrize("name", [name for name in FILES if name != "vocab.txt"])
def test_what_is_no_json_object(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        *[("tokenizer_config.json", {"do_lower_case": value}, "do_lower_case") for value in ("yes", 1, [], 0.5)],
        ("tokenizer_config.json", {"strip_accents": "x"}, "strip_accents"),
        ("tokenizer_config.json", {"tokenize_chinese_chars": 3}, "tokenize_chinese_chars"),
        ("tokenizer_config.json", {"split_special_tokens": "no"}, "split_special_tokens"),
        ("tokenizer_config.json", {"tokenizer_class": ["BertTokenizer"]}, "tokenizer_class"),
        ("tokenizer_config.json", {"truncation_side": "middle"}, "truncation_side"),
        ("tokenizer_config.json", {"model_input_names": "input_ids"}, "model_input_names"),
        *[("tokenizer_config.json", {"model_max_length": value}, "model_max_length") for value in ("9", -1, True, [])],
        *[("tokenizer_config.json", {"mask_token": value}, "mask_token") for value in (3, [], {}, {"content": 3})],
        ("tokenizer_config.json", {"mask_token": {"content": "[MASK]", "lstrip": "x"}}, "mask_token: lstrip"),
        *[("tokenizer_config.json", {name: None}, name) for name in ("unk_token", "cls_token", "sep_token")],
        ("tokenizer_config.json", {"cls_token": ""}, "cls_token"),
        ("tokenizer_config.json", {"additional_special_tokens": "x"}, "additional_special_tokens"),
        ("tokenizer_config.json", {"extra_special_tokens": [3]}, r"extra_special_tokens: \[0\]"),
        ("tokenizer_config.json", {"extra_special_tokens": {"image_token": 3}}, "extra_special_tokens: image_token"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, None),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "a"}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": "a"}}, "added_tokens_decoder: 7"),
        ("special_tokens_map.json", {"pad_token": 3}, "pad_token"),
        ("special_tokens_map.json", {"additional_special_tokens": 3}, "additional_special_tokens"),
        *[("added_tokens.json", {"covid": value}, "covid") for value in ("7", -1, 2**31, 1.5, True, [])],
        ("config.json", {"tokenizer_class": 3}, "tokenizer_class"),
    ],
)
def test_types_of_fields(folder: Path, name: str, content: dict[str, Any], field: str | None) -> None:
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{name}: {field or next(iter(content))}"):
        Tokenizer.from_folder(folder)


def test_the_added_tokens_of_a_tokenizer_json_are_looked_at(folder: Path) -> None:
    content = word_piece()
    content["added_tokens"] = [{"id": 1, "content": "[UNK]", "single_word": False, "lstrip": False, "rstrip": False}]
    content["added_tokens"][0] |= {"normalized": False, "special": True}
    assert Tokenizer.from_folder(put(folder, content)).unknown_id == 1
    content["added_tokens"][0]["id"] = 2**31
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(put(folder, content))


@pytest.mark.parametrize("number", [-1, 2**31 + 5, 2**40, 1.5, "x"])
def test_ids_that_are_none(folder: Path, number: Any) -> None:
    content = word_piece()
    content["model"]["vocab"]["the"] = number
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(put(folder, content))


def processed(single: str, pair: str) -> dict[str, Any]:
    template = processors.TemplateProcessing(single=single, pair=pair, special_tokens=[("[CLS]", 2)])
    return word_piece() | {"post_processor": json.loads(template.__getstate__())}


def test_templates_that_lose_a_text(folder: Path) -> None:
    content = processed("$A", "$A $B")
    content["post_processor"]["single"] = [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}]
    with pytest.raises(CheckpointError, match="post_processor: got a text that is lost in it"):
        Tokenizer.from_folder(put(folder, content))
    content = processed("$A", "$A $B")
    content["post_processor"]["pair"] = [{"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer = Tokenizer.from_folder(put(folder, content))
    assert tokenizer.encode(["the"], 8).ids.tolist() == [tiny_bert.VOCABULARY.index("the")]
    with pytest.raises(CheckpointError, match="post_processor: got a pair that loses a text"):
        tokenizer.encode([("the", "film")], 8)


def test_templates_of_many_types(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="post_processor: got the token type 300"):
        Tokenizer.from_folder(put(folder, processed("$A", "$A $B:300")))


def test_two_tokens_before_a_text_and_none_after_it(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(put(folder, processed("[CLS] [CLS] $A", "$A $B")))
    assert tokenizer.encode_words([["the", "film"]], 9).tokens.ids.tolist()[:2] == [2, 2]
    assert len(tokenizer.encode_words([["the", "film"]], 9).tokens.ids) == 4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "zz"}, "Missing"),
        ({"type": "Unigram", "unk_id": None, "vocab": [["a", 0.0]], "byte_fallback": False}, "unk_id"),
        ({"type": "WordPiece", "vocab": {}, "unk_token": "[UNK]", "continuing_subword_prefix": "##"}, "Missing"),
    ],
)
def test_words_that_a_model_knows_nothing_about(folder: Path, model: dict[str, Any], message: str) -> None:
    if model["type"] == "WordPiece":
        model = model | {"max_input_chars_per_word": 100}
    tokenizer = Tokenizer.from_folder(put(folder, word_piece() | {"model": model}))
    for encode in (tokenizer.encode, tokenizer.encode_documents):
        with pytest.raises(CheckpointError, match=f"{message}.*rules that serve these texts"):
            encode(["the"], 8)
    with pytest.raises(CheckpointError, match="rules that serve these texts"):
        tokenizer.encode_words([["the"]], 8)


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer"])
def test_a_panic_of_the_library_is_an_error(folder: Path, part: str) -> None:
    rule = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": "z"}
    if part == "pre_tokenizer":
        rule = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Removed", "invert": False}
    tokenizer = Tokenizer.from_folder(put(folder, word_piece() | {part: rule}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: got .*Regex"):
        tokenizer.encode(["x" * 40], 8)
    assert len(tokenizer.encode(["the"], 8).ids) == 1  # and goes on


def test_rules_that_take_for_ever(folder: Path) -> None:
    content = word_piece(max_input_chars_per_word=2**40)
    with pytest.raises(CheckpointError, match=r"max_input_chars_per_word 1099511627776; expected at most"):
        Tokenizer.from_folder(put(folder, content))
    content = word_piece() | {"normalizer": {"type": "Sequence", "normalizers": [json.loads(REPLACED)] * 6}}
    with pytest.raises(CheckpointError, match="characters of one"):
        Tokenizer.from_folder(put(folder, content))
    content["normalizer"]["normalizers"] = content["normalizer"]["normalizers"][:2]
    assert Tokenizer.from_folder(put(folder, content)).size == len(tiny_bert.VOCABULARY)


def test_padding_and_truncation_of_a_file_do_not_show(folder: Path) -> None:
    made = tokenizers.Tokenizer.from_str(json.dumps(word_piece()))
    made.enable_padding(length=10_000)
    made.enable_truncation(3, stride=2)
    assert len(Tokenizer.from_folder(put(folder, made.to_str())).encode(["the film " * 4], 64).ids) == 8


def test_ids_beyond_the_models_table(model: Path, folder: Path) -> None:
    words = [*tiny_bert.VOCABULARY, "beyond"]
    for path in model.iterdir():
        if path.name != "vocab.txt":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    encoder = TextEncoder.from_folder(folder)
    assert np.isfinite(encoder.encode(["the film"])).all()  # texts without such a token go on working
    message = f"got a token of id {len(words) - 1}; expected ids below {len(words) - 1}, the rows of the model's table"
    with pytest.raises(CheckpointError, match=message):
        encoder.encode(["the film", "beyond"])
    texts = tiny_bert.stories(folder / "texts.txt", 10, 0)
    texts.write_text(texts.read_text() + "\nbeyond the film\n")
    settings = Settings(task="mlm", model=str(folder), train=str(texts), out=str(folder / "out"), max_length=16)
    with pytest.raises(CheckpointError, match=message):
        train(settings)


def test_a_mask_token_beyond_the_models_table(model: Path, folder: Path) -> None:
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "tokenizer_config.json").write_text('{"mask_token": "<mask>"}')
    texts = tiny_bert.stories(folder / "texts.txt", 10, 0)
    settings = Settings(task="mlm", model=str(folder), train=str(texts), out=str(folder / "out"), max_length=16)
    with pytest.raises(CheckpointError, match=f"a mask token of id {len(tiny_bert.VOCABULARY)}"):
        train(settings)


def test_types_beyond_the_models_table() -> None:
    config = tiny_bert.EncoderConfig(vocab_size=8, hidden_size=32, num_heads=2)
    tokens = Tokens(np.array([7, 7], np.int32), np.array([1, 2], np.uint8), np.array([0, 2]))
    with pytest.raises(CheckpointError, match="got a token of type 2; expected types below 2"):
        tokens.check_fit(config)
    Tokens(np.array([], np.int32), np.array([], np.uint8), np.array([0])).check_fit(config)


def test_added_tokens_that_claim_the_same_space(folder: Path) -> None:
    """The library panics, and transformers passes that on."""
    made = tokenizers.Tokenizer.from_str(json.dumps(word_piece()))
    made.normalizer = normalizers.BertNormalizer()
    made.add_tokens([AddedToken("  ", lstrip=True), AddedToken("É", rstrip=True)])
    tokenizer = Tokenizer.from_folder(put(folder, made.to_str()))
    with pytest.raises(CheckpointError, match="bad split; expected rules that serve these texts"):
        tokenizer.encode(["É   "], 8)
