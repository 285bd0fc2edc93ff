"""A folder's tokenizer against transformers.AutoTokenizer, over settings, files and texts drawn at random.

FASTBERT_LONG=20000 draws so many folders; CI draws few.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from fastbert.errors import CheckpointError
from fastbert.text.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="transformers 4 reads these folders otherwise: needs 5"
)

EXAMPLES = int(os.environ.get("FASTBERT_LONG", "150"))
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
OTHER_SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
LATIN = "the The cat ##s ##é é e ##e \u0301 a ##a b ##b ab A , . ! [ ] < > / s i \u0307 ß ss ǆ fi ﬁ 1 ##1 ½"
OTHERS = "中 国 ##国 ー が か \u3099 한 \u1112"
PIECES = [*LATIN.split(), *OTHERS.split()]
ROLES = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
ADDED = ["covid", "[E1]", "New York", "<ent>", "中a", "É", "cat", "ab", "  ", "##s", "a\tb", "x\u200by"]

flags = st.booleans()
maybe = lambda strategy: st.one_of(st.just("ABSENT"), strategy)  # noqa: E731


@st.composite
def added_token(draw: st.DrawFn, content: str | None = None) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"content": content or draw(st.sampled_from(ADDED)), **{name: draw(flags) for name in names}}


def marked(token: dict[str, Any]) -> dict[str, Any]:
    return {"__type": "AddedToken", **token}


@st.composite
def folder_files(draw: st.DrawFn) -> dict[str, Any]:
    """Contents of a folder's files, by name."""
    special = draw(st.sampled_from([SPECIAL, OTHER_SPECIAL]))
    named = special is OTHER_SPECIAL
    vocabulary = [*special, *PIECES]
    if draw(flags):
        vocabulary.remove(special[draw(st.sampled_from([0, 4]))])
    vocabulary += draw(st.lists(st.sampled_from(["", " x", "cat", "y ", "covid"]), max_size=3))
    config: dict[str, Any] = {}
    table: dict[str, Any] = {}
    files: dict[str, Any] = {"config.json": {"model_type": "bert"}}
    for name in ("do_lower_case", "tokenize_chinese_chars", "split_special_tokens"):
        config[name] = draw(maybe(flags))
    config["strip_accents"] = draw(maybe(st.sampled_from([None, True, False])))
    config["truncation_side"] = draw(maybe(st.sampled_from(["left", "right"])))
    config["padding_side"] = draw(maybe(st.sampled_from(["left", "right"])))
    config["model_max_length"] = draw(maybe(st.sampled_from([512, 10**30, None])))
    config["model_input_names"] = draw(maybe(st.sampled_from([["input_ids"], ["input_ids", "token_type_ids"]])))
    config["never_split"] = draw(maybe(st.just(["covid"])))
    config["do_basic_tokenize"] = draw(maybe(flags))
    config["clean_up_tokenization_spaces"] = draw(maybe(flags))
    as_json = draw(flags)
    kinds = ["BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "ABSENT"]
    if as_json:
        kinds += ["PreTrainedTokenizerFast", "TokenizersBackend", "Unheard"]
    config["tokenizer_class"] = draw(st.sampled_from(kinds))
    for target in (config, table):
        for role, name in zip(ROLES, special, strict=True):
            if named and target is config:
                form = draw(st.sampled_from(["string", "object"]))
            else:
                form = draw(st.sampled_from(["no", "no", "string", "object"]))
            if form != "no":
                target[role] = name if form == "string" else draw(added_token(name))
            if form == "object" and target is config:
                target[role] = marked(target[role])
    if draw(flags):
        config["bos_token"] = draw(st.sampled_from(["<bos>", "cat"]))
    if draw(flags):
        config["image_token"] = draw(st.sampled_from(["<image>", "covid"]))
    texts = st.lists(st.sampled_from(ADDED), max_size=3, unique=True)
    config["additional_special_tokens"] = draw(maybe(texts))
    config["extra_special_tokens"] = draw(maybe(st.one_of(texts, st.just({"video_token": "<video>"}), st.just([]))))
    table["additional_special_tokens"] = draw(maybe(texts))
    table["extra_special_tokens"] = draw(
        maybe(
            st.one_of(
                texts, st.lists(added_token().map(lambda t: {k: v for k, v in t.items() if k != "special"}), max_size=2)
            )
        )
    )
    tokens = draw(st.lists(added_token(), max_size=4, unique_by=lambda token: token["content"]))
    if draw(flags):
        numbers = {
            vocabulary.index(t["content"]) if t["content"] in vocabulary else len(vocabulary) + i: t
            for i, t in enumerate(tokens)
        }
        if draw(flags):
            numbers |= {i: draw(added_token(name)) for i, name in enumerate(vocabulary) if name in special}
        config["added_tokens_decoder"] = {str(i): token for i, token in numbers.items()}
    if draw(flags):
        start = draw(st.sampled_from([0, 3])) + len(vocabulary)
        files["added_tokens.json"] = {t["content"]: start + i for i, t in enumerate(tokens)}
    table = {name: value for name, value in table.items() if value != "ABSENT"}
    if table and draw(flags):
        for value in table.values():
            if isinstance(value, dict):
                value.pop("special", None)
        files["special_tokens_map.json"] = table
    if draw(st.integers(0, 9)):
        files["tokenizer_config.json"] = {name: value for name, value in config.items() if value != "ABSENT"}
    elif named:
        files["tokenizer_config.json"] = dict(zip(ROLES, special, strict=True))
    if as_json:
        files["tokenizer.json"] = draw(tokenizer_json(vocabulary, special))
    else:
        ending = draw(st.sampled_from(["\n", "\r\n"]))
        files["vocab.txt"] = ending.join(vocabulary) + ending
    return files


@st.composite
def tokenizer_json(draw: st.DrawFn, vocabulary: list[str], special: list[str]) -> str:
    """A tokenizer.json, of BERT's kind or of one that was made by hand."""
    table = {word: i for i, word in enumerate(vocabulary)}
    made = tokenizers.Tokenizer(models.WordPiece(table, unk_token=special[1]))
    made.normalizer = draw(
        st.sampled_from(
            [
                normalizers.BertNormalizer(lowercase=lower, strip_accents=strip, clean_text=lower)
                for lower in (True, False)
                for strip in (None, True)
            ]
            + [normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])]
        )
    )
    made.pre_tokenizer = draw(st.sampled_from([pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Whitespace()]))
    ends = [(special[3], 3), (special[2], 2)]
    made.post_processor = draw(
        st.sampled_from(
            [
                processors.BertProcessing(*ends),
                processors.TemplateProcessing(
                    single=f"{special[2]} $A {special[3]} {special[3]}",
                    pair=f"{special[2]} $A {special[3]} $B:1",
                    special_tokens=ends,
                ),
            ]
        )
    )
    if draw(flags):
        made.add_special_tokens(draw(st.lists(st.sampled_from([*special, "[E1]"]), unique=True)))
    for token in draw(st.lists(added_token(), max_size=2)):
        made.add_tokens([tokenizers.AddedToken(**token)])
    if draw(flags):
        made.enable_truncation(5, direction=draw(st.sampled_from(["left", "right"])))
        made.enable_padding(length=9)
    content = json.loads(made.to_str())
    if draw(st.integers(0, 4)) == 0:
        content["post_processor"] = None
    return json.dumps(content)


fragments = st.one_of(
    st.sampled_from([*SPECIAL, *OTHER_SPECIAL, *PIECES, *ADDED, "<image>", "<video>", "<bos>", "[cls]", "[ MASK ]"]),
    st.sampled_from(
        ["the cats", "THE CAT", "É", "İ", "CAFÉ", "new york", "中国人", "ａｂ", "👩‍👩‍👧", "🇫🇷", "a" * 101, "ab" * 60]
    ),
    st.sampled_from(
        list(" \t\n\r\x0b\x0c\x00\x7f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000\u200b\u200d\ufeff\ufffd")
    ),
    st.text(max_size=6),
    st.characters(categories=["Mn", "Mc", "Cf", "Lo", "Lm", "Zs", "Cc", "Po", "Sk"]),
)
texts = st.lists(fragments, max_size=8).flatmap(
    lambda parts: st.sampled_from(["", " "]).map(lambda gap: gap.join(parts))
)


def rows(tokens: Any, values: Any) -> list[list[int]]:
    return [values[a:b].tolist() for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


def panics(theirs: Any, texts: list[str]) -> bool:
    """Whether the library itself breaks at these texts, as it does where added tokens claim the same space."""
    try:
        theirs(texts)
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        return True
    return False


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 150,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(folder_files(), st.lists(texts, min_size=1, max_size=5), st.integers(4, 12))
def test_every_folder_is_read_as_transformers_reads_it(files: dict[str, Any], texts: list[str], length: int) -> None:
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        for file, content in files.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / file).write_bytes(text.encode())
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = Tokenizer.from_folder(folder)
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        if panics(theirs, texts):
            with pytest.raises(CheckpointError, match="rules that serve these texts"):
                ours.encode(texts, length)
            return
        tokens = ours.encode(texts, length)
        assert rows(tokens, tokens.ids) == theirs(texts, truncation=True, max_length=length)["input_ids"]

        pairs = list(zip(texts, reversed(texts), strict=True))
        tokens = ours.encode(pairs, length)
        hf = theirs(pairs, truncation=True, max_length=length)
        assert rows(tokens, tokens.ids) == hf["input_ids"]
        types = hf.get("token_type_ids")
        if tokens.types is not None:
            assert rows(tokens, tokens.types) == types
        else:
            assert types is None or not any(map(any, types))

        words = [text.split(" ") for text in texts]
        tokens = ours.encode_words(words, 4000)
        pieces = [theirs(sentence, is_split_into_words=True, add_special_tokens=False) for sentence in words]
        assert len(tokens.words[tokens.words >= 0]) == sum(map(len, words))
        if all(set(one.word_ids()) == set(range(len(sentence))) for one, sentence in zip(pieces, words, strict=True)):
            assert rows(tokens.tokens, tokens.tokens.ids) == theirs(words, is_split_into_words=True)["input_ids"]
        special = set(theirs.all_special_ids) | {i for i, t in theirs.added_tokens_decoder.items() if t.special}
        framed = theirs("the", "cat", return_special_tokens_mask=True)
        around = {i for i, own in zip(framed["input_ids"], framed["special_tokens_mask"], strict=True) if own}
        known = theirs.get_vocab()
        usual = {known[name] for name in SPECIAL if name in known and not theirs.all_special_ids}
        assert special <= set(ours.special_ids) <= special | around | usual
        assert ours.highest_id == max(theirs.get_vocab().values())
        assert ours.max_length == (theirs.model_max_length if theirs.model_max_length < 10**9 else None)
        if theirs.mask_token is not None:
            assert ours.mask_id == theirs.mask_token_id
        if theirs.unk_token is not None:
            assert ours.unknown_id == theirs.unk_token_id
