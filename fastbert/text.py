"""Text to token ids, and texts to batches: tokenise, cut at a length, group by a budget of tokens."""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
import torch
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from fastbert.checkpoints import files
from fastbert.errors import ArgumentError, CheckpointError

Text = str | tuple[str, str]

# Texts are handed to `tokenizers` this many characters at a time, because it takes some 100 bytes a character, and
# as much for an empty text as for this many characters.
CHUNK_CHARACTERS = 1_000_000
ENCODING_CHARACTERS = 10
# A text longer than this many characters per token asked for is first tried by its beginning alone.
HEAD_CHARACTERS_PER_TOKEN = 32

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of many texts, one text after the other.

    Attributes:
        ids: int32 `[tokens]`.
        types: uint8 `[tokens]`, 0 for the first text of a pair and 1 for the second; None when all are 0.
        offsets: int64 `[texts + 1]`; text `i` is `ids[offsets[i]:offsets[i + 1]]`.
    """

    ids: npt.NDArray[np.int32]
    types: npt.NDArray[np.uint8] | None
    offsets: npt.NDArray[np.int64]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 `[texts]`: tokens of each text, special ones included."""
        return np.diff(self.offsets)

    def packed(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """`(ids, types)` of these texts in this order: int64 `[tokens]` on the CPU, types None when all are 0."""
        slices = [slice(self.offsets[row], self.offsets[row + 1]) for row in rows]
        types = None if self.types is None else _gather(self.types, slices)
        return _gather(self.ids, slices), types


class Tokenizer:
    """A `tokenizers.Tokenizer` that cuts and pads as the caller says, whatever its file says."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # truncation is state of the tokenizer, so one encode at a time
        # BERT's rules look at no character beyond a space, so the tokens of a text cut at a space are the first tokens
        # of the whole text. Not so for other rules, or for added tokens that have spaces in them.
        self._heads_tell = (
            isinstance(tokenizer.normalizer, normalizers.BertNormalizer)
            and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
            and not any(" " in token.content for token in tokenizer.get_added_tokens_decoder().values())
        )

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a checkpoint folder: tokenizer.json, else vocab.txt read as BERT's WordPiece.

        With vocab.txt, `do_lower_case`, `strip_accents` and `tokenize_chinese_chars` come from tokenizer_config.json.

        Raises:
            CheckpointError: neither file is there, or one is damaged.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if path.is_file():
            try:
                return cls(tokenizers.Tokenizer.from_buffer(path.read_bytes()))
            except ValueError as error:
                raise CheckpointError(str(path), f"{error}", "a file that `tokenizers` reads") from error
        if (folder / "vocab.txt").is_file():
            return cls(_word_piece(folder))
        raise CheckpointError(str(folder), "no tokenizer", "tokenizer.json or vocab.txt in it")

    def encode(self, texts: Iterable[Text], max_length: int) -> Tokens:
        """Token ids of texts, or of pairs of texts: `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]` for BERT.

        Args:
            texts: all strings, or all tuples of two strings. An empty string is a legal text. Lone surrogates, which
                have no UTF-8 form, become U+FFFD, and one warning counts them.
            max_length: most tokens of a text, special ones included; longer texts lose their end, pairs that of the
                longer one first.

        Raises:
            ArgumentError: an item is something else, or `max_length` leaves no room for a token.
        """
        if isinstance(texts, str):
            raise ArgumentError("texts", "a single string", "a list of strings", "Wrap it in a list.")
        texts = list(texts)
        pairs = bool(texts) and not isinstance(texts[0], str)
        special = self._tokenizer.num_special_tokens_to_add(pairs)
        if max_length <= special:
            raise ArgumentError("max_length", max_length, f"more than the {special} special tokens of each text")
        texts = _checked(texts, pairs)
        ids, types, lengths = [np.empty(0, np.int32)], [np.empty(0, np.uint8)], [0]
        with self._lock:
            self._tokenizer.enable_truncation(max_length, strategy="longest_first")
            for chunk in _chunks(texts):
                encodings = self._encodings(chunk, max_length, pairs)
                lengths += [len(encoding) for encoding in encodings]
                ids.append(np.fromiter(chain.from_iterable(one.ids for one in encodings), np.int32))
                if pairs:
                    types.append(np.fromiter(chain.from_iterable(one.type_ids for one in encodings), np.uint8))
        return Tokens(np.concatenate(ids), np.concatenate(types) if pairs else None, np.cumsum(lengths, dtype=np.int64))

    def _encodings(self, texts: list[Any], max_length: int, pairs: bool) -> list[tokenizers.Encoding]:
        if pairs or not self._heads_tell:
            return self._tokenizer.encode_batch_fast(texts)
        heads = [_head(text, max_length) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(heads)
        for i, (text, head) in enumerate(zip(texts, heads, strict=True)):
            if head is not text and len(encodings[i]) < max_length:
                encodings[i] = self._tokenizer.encode_batch_fast([text])[0]
        return encodings


def batches(lengths: Sequence[int] | npt.NDArray[np.int64], batch_tokens: int) -> list[list[int]]:
    """Rows of texts grouped so that a batch has at most `batch_tokens` tokens; a longer text is a batch of its own.

    Rows are sorted by length, longest first and stable, so that lengths in a batch are alike.

    Raises:
        ArgumentError: `batch_tokens` is not positive.
    """
    if batch_tokens < 1:
        raise ArgumentError("batch_tokens", batch_tokens, "a positive number of tokens")
    lengths = np.asarray(lengths, dtype=np.int64)
    groups: list[list[int]] = []
    room = 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        if not groups or length > room:
            groups.append([])
            room = batch_tokens
        groups[-1].append(row)
        room -= length
    return groups


def _word_piece(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "vocab.txt"
    try:
        words = path.read_bytes().decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(str(path), f"{error}", "one word a line, in UTF-8") from error
    vocabulary = {word.removesuffix("\r"): i for i, word in enumerate(words)}
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    for token in special[1:4]:
        if token not in vocabulary:
            raise CheckpointError(str(path), f"no {token}", "BERT's special tokens among the words")
    settings_path = folder / "tokenizer_config.json"
    settings = files.read_json(settings_path) if settings_path.is_file() else {}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings.get("do_lower_case", True),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special if token in vocabulary])
    return tokenizer


def _checked(texts: list[Any], pairs: bool) -> list[Any]:
    expected = "a pair of strings, as texts[0]" if pairs else "a string, as texts[0]"
    replaced = 0
    checked: list[Any] = []
    for i, text in enumerate(texts):
        strings = text if pairs else (text,)
        if not isinstance(strings, (tuple, list)) or len(strings) != 1 + pairs:
            raise ArgumentError(f"texts[{i}]", f"a {type(text).__name__}", expected)
        for string in strings:
            if not isinstance(string, str):
                raise ArgumentError(f"texts[{i}]", f"a {type(string).__name__}", expected)
        if not all(string.isascii() for string in strings):
            mended = [_SURROGATE.subn("\ufffd", string) for string in strings]
            replaced += sum(count for _, count in mended)
            strings = tuple(string for string, _ in mended)
        checked.append(tuple(strings) if pairs else strings[0])
    if replaced:
        warnings.warn(f"{replaced} lone surrogates in the texts were replaced by U+FFFD", stacklevel=3)
    return checked


def _head(text: str, max_length: int) -> str:
    """`text`, or its beginning up to a space, if that is likely to hold `max_length` tokens."""
    cut = text.find(" ", HEAD_CHARACTERS_PER_TOKEN * max_length)
    return text if cut < 0 else text[:cut]


def _chunks(texts: list[Any]) -> Iterator[list[Any]]:
    start, characters = 0, 0
    for i, text in enumerate(texts):
        characters += ENCODING_CHARACTERS + (len(text) if isinstance(text, str) else sum(map(len, text)))
        if characters >= CHUNK_CHARACTERS:
            yield texts[start : i + 1]
            start, characters = i + 1, 0
    if start < len(texts):
        yield texts[start:]


def _gather(values: npt.NDArray[Any], slices: list[slice]) -> Tensor:
    return torch.from_numpy(np.concatenate([values[part] for part in slices], dtype=np.int64))
