"""The tokenizer of a checkpoint folder, made of its files as transformers 5 makes its fast tokenizers.

A folder has tokenizer.json, or vocab.txt, and settings in tokenizer_config.json, special_tokens_map.json and
added_tokens.json. Under the name of BERT's tokenizer (`_BERT_CLASSES`) only vocabulary and added tokens of a
tokenizer.json count, and BERT's own rules with the settings stand for the rest. Under another name it is used as it is.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, processors

from fastbert.checkpoints import files
from fastbert.checkpoints.fields import Fields
from fastbert.checkpoints.special_tokens import BERT_NAMES, ROLES, SpecialTokens, library_errors, read_fields
from fastbert.errors import CheckpointError

Side = Literal["left", "right"]

BERT_PREFIX, BERT_CHARACTERS = "##", 100  # of a piece within a word; of the longest word that is not unknown

# Names of classes, without "Fast" at their end.
_BERT_CLASSES = {
    "BertTokenizer",
    "ConvBertTokenizer",
    "DPRContextEncoderTokenizer",
    "DPRQuestionEncoderTokenizer",
    "DPRReaderTokenizer",
    "DistilBertTokenizer",
    "ElectraTokenizer",
    "LayoutLMTokenizer",
    "LxmertTokenizer",
    "MobileBertTokenizer",
    "SqueezeBertTokenizer",
}
_WITH_TYPES = (_BERT_CLASSES - {"DPRReaderTokenizer", "DistilBertTokenizer"}) | {
    "DebertaTokenizer",
    "DebertaV2Tokenizer",
    "FNetTokenizer",
    "LayoutLMv2Tokenizer",
    "MarkupLMTokenizer",
}
# They cut words by code of their own, which no file holds.
_IN_PYTHON = {
    "BertJapaneseTokenizer",
    "BertTokenizerLegacy",
    "BertweetTokenizer",
    "CanineTokenizer",
    "EsmTokenizer",
    "FlaubertTokenizer",
    "PhobertTokenizer",
    "RoCBertTokenizer",
    "TapasTokenizer",
    "XLMTokenizer",
}

# Settings of tokenizer_config.json that mean nothing for the ids of a text.
_WITHOUT_EFFECT = {
    "_commit_hash",
    "add_bos_token",
    "add_eos_token",
    "backend",
    "cache_dir",
    "chat_template",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "device_map",
    "files_loaded",
    "full_tokenizer_file",
    "is_local",
    "local_files_only",
    "mask_token_id",
    "max_length",
    "name_or_path",
    "pad_to_multiple_of",
    "pad_token_id",
    "pad_token_type_id",
    "padding_side",
    "processor_class",
    "response_schema",
    "response_template",
    "special_tokens_map_file",
    "stride",
    "tokenizer_file",
    "transformers_version",
    "trust_remote_code",
    "truncation_strategy",
    "use_fast",
    "verbose",
    "vocab_file",
}
_BERT_SETTINGS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
_HONOURED = {
    *ROLES,
    "added_tokens_decoder",
    "additional_special_tokens",
    "extra_special_tokens",
    "max_len",
    "model_input_names",
    "model_max_length",
    "split_special_tokens",
    "tokenizer_class",
    "truncation_side",
    *_BERT_SETTINGS,
}
# What transformers' fast tokenizers pass over, and so do we; these values are what happens anyway.
_PASSED_OVER: dict[str, tuple[Any, ...]] = {
    "add_prefix_space": (False,),
    "clean_text": (True,),
    "do_basic_tokenize": (True,),
    "init_inputs": ([],),
    "never_split": (None, []),
    "wordpieces_prefix": (BERT_PREFIX,),
}

_SINCE = ", since tokenizer_class is BERT's"

# A word of this many characters takes seconds; what a Replace may make of one character is limited for the same reason.
_MOST_CHARACTERS = 10_000


@dataclass(frozen=True)
class TokenizerSettings:
    """What a folder says about its tokenizer and a `tokenizers.Tokenizer` does not hold.

    Attributes:
        source: the file that the tokenizer is from, as messages name it.
        names: what the tokens of a role are called, as `{"mask_token": "[MASK]"}`.
        special: every special token.
        truncation_side: where a text that is too long loses tokens.
        split_special_tokens: a special token's spelling in a text is text like any other.
        token_types: the model is told which text of a pair a token belongs to.
        max_length: most tokens of a text, special ones included; None where the folder sets no limit.
    """

    source: str = "tokenizer"
    names: Mapping[str, str] = field(default_factory=dict)
    special: tuple[str, ...] = ()
    truncation_side: Side = "right"
    split_special_tokens: bool = False
    token_types: bool = True
    max_length: int | None = None


def read_tokenizer(folder: Path) -> tuple[tokenizers.Tokenizer, TokenizerSettings]:
    """The tokenizer of a checkpoint folder, which pads and truncates nothing, and its settings.

    What a file says and transformers passes over is passed over here too, with a warning that names it.

    Raises:
        CheckpointError: neither tokenizer.json nor vocab.txt is there, one of the files is damaged or has a field of
            another type, or the folder asks for a tokenizer that is a program.
    """
    config = read_fields(folder / "tokenizer_config.json")
    kind = _class_name(folder, config)
    path = folder / "tokenizer.json"
    if files.has(path):
        read = _read_tokenizer_json(path)
        as_bert = kind in _BERT_CLASSES and isinstance(read.model, models.WordPiece)
    else:
        path, read, as_bert = folder / "vocab.txt", None, True
        if not files.has(path):
            raise CheckpointError(str(folder), "no tokenizer", "tokenizer.json or vocab.txt in it")
        if kind not in _BERT_CLASSES:
            mend = "Save the tokenizer again with transformers' save_pretrained."
            raise CheckpointError(str(folder), f"{kind} without tokenizer.json", "tokenizer.json in it", mend)

    special = SpecialTokens(folder, config)
    if as_bert:
        special.named = {**BERT_NAMES, **special.named}
        model = cast("models.WordPiece", read.model) if read else _read_vocabulary(path)
        passed_over = _replaced_in(model)
        made = _bert(model, config, special, path)
        if read:
            passed_over += _replaced(read, made, config)
    else:
        assert read is not None
        made = read
        _check_growth(path, made)
        passed_over = _unheard(config, made)
        if read.padding is not None:
            special.named.setdefault("pad_token", read.padding["pad_token"])
        special.add_to(made)
    truncation = read.truncation if read else None
    made.no_padding()
    made.no_truncation()

    passed_over += [*_without_effect(config), *special.disagreements(made)]
    if passed_over:
        warnings.warn(f"{folder}: not heeded, as in transformers: {'; '.join(passed_over)}", stacklevel=3)
    side = config.text("truncation_side", truncation["direction"] if truncation else "right", ("left", "right"))
    types = "token_type_ids" in config.texts("model_input_names")
    return made, TokenizerSettings(
        source=str(path),
        names=special.names(),
        special=special.spellings(),
        truncation_side=cast("Side", side),
        split_special_tokens=config.flag("split_special_tokens", False),
        token_types=types if config.given("model_input_names") else kind in _WITH_TYPES,
        max_length=_max_length(config),
    )


def framed(tokenizer: tokenizers.Tokenizer) -> tuple[tokenizers.Encoding, tokenizers.Encoding]:
    """A text and a pair of texts, of one token each, between the special tokens of the post-processor."""
    toy = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    toy.post_processor = tokenizer.post_processor
    return toy.encode("a"), toy.encode("a", "a")


def _class_name(folder: Path, config: Fields) -> str:
    """The tokenizer's class in transformers, without "Fast"."""
    source = config if config.given("tokenizer_class") else read_fields(folder / files.CONFIG)
    kind = source.text("tokenizer_class", "BertTokenizer").removesuffix("Fast")
    if kind in _IN_PYTHON:
        expected = "a tokenizer of the `tokenizers` library: this one is a program in Python"
        raise source.error("tokenizer_class", expected, "Save it as a tokenizer.json, if that is possible.")
    return kind


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    content = files.read_bytes(path)
    with library_errors(str(path), "a file that `tokenizers` reads"):
        return tokenizers.Tokenizer.from_buffer(content)


def _read_vocabulary(path: Path) -> models.WordPiece:
    try:
        text = files.read_bytes(path).decode()
    except UnicodeDecodeError as error:
        raise CheckpointError(str(path), f"{error}", "one word a line, in UTF-8") from error
    if text.startswith("\ufeff"):
        raise CheckpointError(str(path), "a byte-order mark", "UTF-8 without it", "Save the file again without it.")
    with library_errors(str(path), "one word a line, in UTF-8"):
        model = models.WordPiece.from_file(str(path))
    words = [word for line in text.split("\n") if (word := line.rstrip())]
    if twice := len(words) - len(set(words)):
        warnings.warn(f"{path}: {twice} lines repeat a word; of each word the last line counts", stacklevel=4)
    return model


def _bert(model: models.WordPiece, config: Fields, special: SpecialTokens, path: Path) -> tokenizers.Tokenizer:
    """BERT's tokenizer with the vocabulary of a model."""
    names = special.names()
    unknown, first, last = (_needed(names, role) for role in ("unk_token", "cls_token", "sep_token"))
    model.unk_token = unknown
    model.continuing_subword_prefix, model.max_input_chars_per_word = BERT_PREFIX, BERT_CHARACTERS
    tokenizer = tokenizers.Tokenizer(model)
    for name in (unknown, first, last):
        if tokenizer.token_to_id(name) is None and (
            name == unknown or name not in {token.content for token in special.added.values()}
        ):
            mend = "If it has another name there, tokenizer_config.json must say so."
            raise CheckpointError(str(path), f"no {name}", "BERT's special tokens among the words", mend)
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.flag("tokenize_chinese_chars", True),
        strip_accents=config.flag("strip_accents", False) if config.given("strip_accents") else None,
        lowercase=config.flag("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special.add_to(tokenizer)
    ends = [(name, cast("int", tokenizer.token_to_id(name))) for name in (last, first)]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


def _needed(names: Mapping[str, str], role: str) -> str:
    if not names.get(role):
        raise CheckpointError(f"tokenizer_config.json: {role}", "none", f"the name of a token, as {BERT_NAMES[role]}")
    return names[role]


def _state(part: Any) -> Any:
    """A part of a tokenizer as the dict that tokenizer.json would have for it."""
    return None if part is None else json.loads(part.__getstate__())


def _replaced_in(model: models.WordPiece) -> list[str]:
    """The settings of a vocabulary's model in whose place BERT's stand."""
    usual = {"continuing_subword_prefix": BERT_PREFIX, "max_input_chars_per_word": BERT_CHARACTERS}
    return [f"tokenizer.json: {name}{_SINCE}" for name, value in usual.items() if getattr(model, name) != value]


def _replaced(read: tokenizers.Tokenizer, made: tokenizers.Tokenizer, config: Fields) -> list[str]:
    """The rules of a tokenizer.json in whose place BERT's stand, although no setting says so."""
    normalizer, bert = _state(read.normalizer), _state(made.normalizer)
    if isinstance(normalizer, dict) and normalizer.get("type") == bert["type"]:
        keys = ("lowercase", "strip_accents", "handle_chinese_chars")
        for key, setting in zip(keys, _BERT_SETTINGS, strict=True):
            if config.given(setting):
                normalizer[key] = bert[key]
    parts = {
        "normalizer": normalizer != bert,
        "pre_tokenizer": _state(read.pre_tokenizer) != _state(made.pre_tokenizer),
    }
    if read.post_processor is not None:
        parts["post_processor"] = any(
            (theirs.ids, theirs.type_ids) != (ours.ids, ours.type_ids)
            for theirs, ours in zip(framed(read), framed(made), strict=True)
        )
    return [f"tokenizer.json: {part}{_SINCE}" for part, differs in parts.items() if differs]


def _unheard(config: Fields, tokenizer: tokenizers.Tokenizer) -> list[str]:
    """BERT's settings beside a tokenizer.json that is used as it is and does otherwise."""
    normalizer = tokenizer.normalizer
    does: dict[str, Any] = {}
    if isinstance(normalizer, normalizers.BertNormalizer):
        does = dict(
            zip(
                _BERT_SETTINGS,
                (normalizer.lowercase, normalizer.strip_accents, normalizer.handle_chinese_chars),
                strict=True,
            )
        )
    return [
        f"{name}, since tokenizer.json is used as it is"
        for name in _BERT_SETTINGS
        if config.given(name) and config.values[name] != does.get(name)
    ]


def _without_effect(config: Fields) -> list[str]:
    """Settings that have no effect here or in transformers, unless they say what happens anyway."""
    known = _HONOURED | _WITHOUT_EFFECT
    found = [
        name
        for name, value in config.values.items()
        if name not in known
        and not (name.endswith("_token") and isinstance(value, (str, dict)))
        and value not in _PASSED_OVER.get(name, ())
    ]
    return [f"tokenizer_config.json: {', '.join(found)}"] if found else []


def _check_growth(path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Raise CheckpointError where a word has no limit, or replacements of replacements grow without one."""
    longest = getattr(tokenizer.model, "max_input_chars_per_word", 0)
    if longest > _MOST_CHARACTERS:
        got, expected = f"max_input_chars_per_word {longest}", f"at most {_MOST_CHARACTERS}"
        raise CheckpointError(str(path), got, expected)
    growth = 1
    state = _state(tokenizer.normalizer) or {}
    for step in state.get("normalizers", [state]):
        growth *= max(1, len(step.get("content") or "")) if step.get("type") == "Replace" else 1
    if growth > _MOST_CHARACTERS:
        got = f"a normalizer that makes {growth} characters of one"
        raise CheckpointError(str(path), got, f"at most {_MOST_CHARACTERS}")


def _max_length(config: Fields) -> int | None:
    name = "model_max_length" if "model_max_length" in config.values else "max_len"
    value = config.number(name, float(2**31), least=1)
    return int(value) if value < 2**31 else None  # transformers writes 10**30 where there is no limit
