"""The tokenizer that a folder's files describe: settings, special tokens, and files that are not what they must be."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, processors

from fastbert.errors import CheckpointError
from fastbert.text.tokenizer import Tokenizer
from fastbert.text.tokens import Tokens

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXT = "the The cat Cat met ada Ada ##s a ##a ##b , . [ ] < > new york"
WORDS = TEXT.split()
VOCABULARY = [*SPECIAL, *WORDS]
NAMES = {"pad_token": "<p>", "unk_token": "<u>", "cls_token": "<c>", "sep_token": "<s>", "mask_token": "<m>"}

needs_transformers_5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 reads these folders otherwise: needs 5"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with config.json and vocab.txt."""
    write(tmp_path, **{"config.json": {"model_type": "bert"}})
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return tmp_path


def write(folder: Path, **contents: Any) -> None:
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))


def configure(folder: Path, **settings: Any) -> None:
    write(folder, **{"tokenizer_config.json": settings})


def backend(vocabulary: list[str] = VOCABULARY, **parts: Any) -> tokenizers.Tokenizer:
    """What a user trains with the library: BERT's rules, and nothing registered or framed unless a part says so."""
    made = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def rows(tokens: Tokens) -> list[list[int]]:
    return [tokens.ids[a:b].tolist() for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


def read(folder: Path, *texts: Any, length: int = 64) -> list[list[int]]:
    """The rows of texts, which are those of transformers."""
    found = rows(Tokenizer.from_folder(folder).encode(texts, length))
    if int(transformers.__version__.split(".")[0]) >= 5:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert found == theirs(list(texts), truncation=True, max_length=length)["input_ids"]
    return found


@pytest.mark.parametrize("decoder", [False, True])
def test_user_case_02_added_tokens_beside_vocab_txt(folder: Path, decoder: bool) -> None:
    first = len(VOCABULARY)
    write(folder, **{"added_tokens.json": {"[E1]": first, "covid": first + 1}})
    settings: dict[str, Any] = {"additional_special_tokens": ["[E1]"]}
    if decoder:
        tokens = [(first, "[E1]", True), (first + 1, "covid", False)]
        settings["added_tokens_decoder"] = {
            str(i): {"content": token, "special": special, "normalized": not special} for i, token, special in tokens
        }
    configure(folder, **settings)
    assert read(folder, "the [E1] cat covid") == [[2, 5, first, 7, first + 1, 3]]
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.size, tokenizer.highest_id) == (first + 2, first + 1)
    assert first in tokenizer.special_ids and first + 1 not in tokenizer.special_ids


@pytest.mark.parametrize("kind", ["tokenizer.json", "vocab.txt"])
def test_user_case_03_tokenizer_config_decides_about_case(folder: Path, kind: str) -> None:
    if kind == "tokenizer.json":
        backend().save(str(folder / kind))
        (folder / "vocab.txt").unlink()
    configure(folder, do_lower_case=False)
    assert read(folder, "The Cat met Ada") == [[2, 6, 8, 9, 11, 3]]
    configure(folder, do_lower_case=True)
    assert read(folder, "The Cat met Ada") == [[2, 5, 7, 9, 10, 3]]


def test_transformers_lowers_case_where_no_setting_says_so_and_we_say_it(folder: Path) -> None:
    backend(normalizer=normalizers.BertNormalizer(lowercase=False)).save(str(folder / "tokenizer.json"))
    with pytest.warns(UserWarning, match=r"not heeded.*tokenizer\.json: normalizer, since tokenizer_class is BERT's"):
        assert read(folder, "The Cat") == [[2, 5, 7, 3]]


def test_user_case_28_no_post_processor(folder: Path) -> None:
    backend().save(str(folder / "tokenizer.json"))
    assert read(folder, "the cat", "") == [[2, 5, 7, 3], [2, 3]]
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.special_ids == [0, 1, 2, 3, 4]  # although none is registered in the file
    assert rows(tokenizer.encode_words([["the", "cat"]], 8).tokens) == [[2, 5, 7, 3]]


def test_a_file_of_no_class_is_used_as_it_is(folder: Path) -> None:
    """Without a post-processor it then frames nothing, in every way of encoding."""
    backend().save(str(folder / "tokenizer.json"))
    configure(folder, tokenizer_class="PreTrainedTokenizerFast", do_lower_case=True)
    assert read(folder, "the cat", "") == [[5, 7], []]
    tokenizer = Tokenizer.from_folder(folder)
    assert rows(tokenizer.encode_words([["the", "cats"]], 3).tokens) == [[5, 7, 12]]
    assert rows(tokenizer.encode_documents(["the cat met", ""], 2)) == [[5, 7], [9]]
    with pytest.raises(CheckpointError, match="post_processor: got 0 tokens after a text"):
        tokenizer.encode_sentences([["the", "cat"]], 8)
    configure(folder, tokenizer_class="PreTrainedTokenizerFast", do_lower_case=False)
    with pytest.warns(UserWarning, match="do_lower_case, since tokenizer.json is used as it is"):
        Tokenizer.from_folder(folder)


def test_unregistered_tokens_of_a_file_used_as_it_is_are_special(folder: Path) -> None:
    template = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", VOCABULARY.index("["))]
    )
    backend(post_processor=template).save(str(folder / "tokenizer.json"))
    configure(folder, tokenizer_class="PreTrainedTokenizerFast")
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.mask_id, tokenizer.unknown_id) == (4, 1)
    assert tokenizer.special_ids == [0, 1, 2, 3, 4, VOCABULARY.index("[")]


@pytest.mark.parametrize("place", ["tokenizer_config.json", "special_tokens_map.json"])
def test_user_case_38_special_tokens_of_other_names(folder: Path, place: str) -> None:
    (folder / "vocab.txt").write_text("\n".join([*NAMES.values(), *WORDS]) + "\n")
    write(folder, **{place: NAMES})
    assert read(folder, "the cat xx <m>") == [[2, 5, 7, 1, 4, 3]]
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.mask_id, tokenizer.unknown_id, tokenizer.special_ids) == (4, 1, [0, 1, 2, 3, 4])


def test_user_case_38_without_pad_and_mask(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL[1:4], *WORDS]) + "\n")
    assert read(folder, "the cat") == [[1, 3, 5, 2]]
    assert Tokenizer.from_folder(folder).mask_id == len(WORDS) + 4  # after [PAD], as transformers adds them


def test_user_case_38_blank_and_repeated_lines(folder: Path) -> None:
    (folder / "vocab.txt").write_bytes(("\r\n".join([*VOCABULARY, "", " ", "cat  "]) + "\r\n").encode())
    with pytest.warns(UserWarning, match=r"vocab\.txt: 1 lines repeat a word; of each word the last line counts"):
        assert read(folder, "the cat") == [[2, 5, len(VOCABULARY) + 2, 3]]


@pytest.mark.parametrize("form", ["string", "object", "marked"])
def test_tokens_come_as_strings_or_objects(folder: Path, form: str) -> None:
    (folder / "vocab.txt").write_text("\n".join([*NAMES.values(), *WORDS]) + "\n")
    properties = {"lstrip": True, "single_word": False, "normalized": False, "rstrip": False}
    forms = {
        "string": lambda name: name,
        "object": lambda name: {"content": name, **properties},
        "marked": lambda name: {"__type": "AddedToken", "content": name, "special": True, **properties},
    }
    configure(folder, **{role: forms[form](name) for role, name in NAMES.items()})
    found = rows(Tokenizer.from_folder(folder).encode(["the <m> cat"], 9))
    assert found == [[2, 5, 4, 7, 3]]
    if form != "object":  # of these transformers wants the mark
        assert read(folder, "the <m> cat") == found


@needs_transformers_5
def test_split_special_tokens(folder: Path) -> None:
    configure(folder, split_special_tokens=True)
    assert read(folder, "[CLS]") == [[2, 18, 1, 19, 3]]
    tokenizer = Tokenizer.from_folder(folder)
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert rows(twin.encode(["[CLS]"], 9)) == [[2, 18, 1, 19, 3]]


def test_copies_are_apart_and_equal(folder: Path) -> None:
    configure(folder, truncation_side="left", model_max_length=77)
    tokenizer = Tokenizer.from_folder(folder)
    for twin in (copy.copy(tokenizer), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert twin._lock is not tokenizer._lock
        assert twin.max_length == 77
        assert rows(twin.encode(["the cat met"], 4)) == rows(tokenizer.encode(["the cat met"], 4)) == [[2, 7, 9, 3]]


@pytest.mark.parametrize("place", ["config", "file"])
def test_texts_lose_what_the_folder_says(folder: Path, place: str) -> None:
    made = backend()
    if place == "file":
        made.enable_truncation(3, direction="left")
        made.enable_padding(length=20)
    else:
        configure(folder, truncation_side="left")
    made.save(str(folder / "tokenizer.json"))
    long = "ada " * 50 + "the cat"
    assert read(folder, long, length=4) == [[2, 5, 7, 3]]
    assert read(folder, (long, "met the cat"), length=7) == [[2, 5, 7, 3, 5, 7, 3]]
    assert read(folder, " ".join(["ada"] * 3000 + ["the"]), length=3) == [[2, 5, 3]]  # no head is tried


@pytest.mark.parametrize(
    ("settings", "length"),
    [({}, None), ({"model_max_length": 512}, 512), ({"model_max_length": 10**30}, None), ({"max_len": 64}, 64)],
)
def test_max_length(folder: Path, settings: dict[str, Any], length: int | None) -> None:
    configure(folder, **settings)
    assert Tokenizer.from_folder(folder).max_length == length


@needs_transformers_5
def test_token_types_are_given_where_the_model_wants_them(folder: Path) -> None:
    pair = [("the", "cat")]
    types = Tokenizer.from_folder(folder).encode(pair, 9).types
    assert types is not None and types.tolist() == [0, 0, 0, 1, 1]
    configure(folder, model_input_names=["input_ids", "attention_mask"])
    with pytest.warns(UserWarning, match="model_input_names in tokenizer_config.json lacks token_type_ids"):
        assert Tokenizer.from_folder(folder).encode(pair, 9).types is None
    assert "token_type_ids" not in transformers.AutoTokenizer.from_pretrained(folder)(pair)


def test_a_single_text_may_have_a_type(folder: Path) -> None:
    template = processors.TemplateProcessing(single="$A:1", pair="$A:0 $B:0", special_tokens=[])
    backend(post_processor=template).save(str(folder / "tokenizer.json"))
    configure(folder, tokenizer_class="PreTrainedTokenizerFast", model_input_names=["input_ids", "token_type_ids"])
    tokenizer = Tokenizer.from_folder(folder)
    types = tokenizer.encode(["the cat"], 9).types
    assert types is not None and types.tolist() == [1, 1]
    assert tokenizer.encode([("the", "cat")], 9).types is None
    with pytest.raises(CheckpointError, match="post_processor: got token types other than 0"):
        tokenizer.encode_words([["the"]], 9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"never_split": ["covid"]}, "never_split"),
        ({"do_basic_tokenize": False}, "do_basic_tokenize"),
        ({"wordpieces_prefix": "_"}, "wordpieces_prefix"),
        ({"do_lowercase": False}, "do_lowercase"),
        ({"auto_map": {"AutoTokenizer": ["a.B", None]}}, "auto_map"),
        ({"never_split": [], "do_basic_tokenize": True, "strip_accents": None, "padding_side": "left"}, None),
    ],
)
def test_what_is_not_heeded_is_said(folder: Path, settings: dict[str, Any], message: str | None) -> None:
    configure(folder, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Tokenizer.from_folder(folder)
    said = [str(warning.message) for warning in caught]
    assert said == (
        [] if message is None else [f"{folder}: not heeded, as in transformers: tokenizer_config.json: {message}"]
    )


def test_ids_that_a_file_promises_and_the_library_does_not_keep(folder: Path) -> None:
    write(folder, **{"added_tokens.json": {"covid": 99}})
    with pytest.warns(UserWarning, match=f"id 99 of 'covid', whose id is {len(VOCABULARY)}"):
        assert read(folder, "covid") == [[2, len(VOCABULARY), 3]]


def test_rules_of_a_tokenizer_json_that_berts_replace(folder: Path) -> None:
    template = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    made = backend(pre_tokenizer=pre_tokenizers.Whitespace(), post_processor=template)
    made.model.max_input_chars_per_word = 7
    made.save(str(folder / "tokenizer.json"))
    with pytest.warns(UserWarning, match="not heeded") as caught:
        assert read(folder, "the cat") == [[2, 5, 7, 3]]
    [said] = {str(warning.message) for warning in caught if "not heeded" in str(warning.message)}
    for part in ("max_input_chars_per_word", "pre_tokenizer", "post_processor"):
        assert f"tokenizer.json: {part}, since tokenizer_class is BERT's" in said
    assert "normalizer" not in said


@pytest.mark.parametrize("content", ["new york", "new\tyork", "new\u00a0york"])
def test_a_head_is_not_trusted_with_tokens_that_get_a_space(folder: Path, content: str) -> None:
    write(folder, **{"added_tokens.json": {content: len(VOCABULARY)}})
    assert read(folder, " " * 95 + "new york", length=3) == [[2, len(VOCABULARY), 3]]


@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json"])
def test_tokenizers_that_are_programs_are_refused(folder: Path, place: str) -> None:
    write(folder, **{place: {"model_type": "bert", "tokenizer_class": "BertJapaneseTokenizer"}})
    with pytest.raises(CheckpointError, match=f"{place}: tokenizer_class: got 'BertJapaneseTokenizer'"):
        Tokenizer.from_folder(folder)


def test_a_vocab_txt_is_berts(folder: Path) -> None:
    configure(folder, tokenizer_class="XLMRobertaTokenizer")
    with pytest.raises(CheckpointError, match=r"XLMRobertaTokenizer without tokenizer\.json"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": "XLMRobertaTokenizer", "mask_token": "<mask>"}])
def test_other_models_go_on_working(folder: Path, settings: dict[str, Any]) -> None:
    pieces = [("<unk>", 0.0), ("▁the", -1.0), ("▁cat", -1.5), ("s", -2.0), ("<mask>", 0.0)]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.save(str(folder / "tokenizer.json"))
    configure(folder, **settings)
    tokenizer = Tokenizer.from_folder(folder)
    assert rows(tokenizer.encode(["the cats"], 9)) == [[1, 2, 3]]
    assert tokenizer.mask_id == 4
