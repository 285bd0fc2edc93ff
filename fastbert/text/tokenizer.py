"""Text to token ids."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers import normalizers, pre_tokenizers, processors

from fastbert import forks
from fastbert.checkpoints.files import checkpoint_folder
from fastbert.checkpoints.special_tokens import BERT_NAMES, library_errors
from fastbert.checkpoints.tokenizer import TokenizerSettings, framed, read_tokenizer
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.text.checks import SURROGATE, Text, checked_texts, items_of
from fastbert.text.cutting import neighbours, parts, windows
from fastbert.text.tokens import SentenceTokens, Tokens, WordTokens

# Texts are handed to `tokenizers` this many characters at a time, because it takes some 100 bytes a character, and
# as much for an empty text as for this many characters.
CHUNK_CHARACTERS = 1_000_000
ENCODING_CHARACTERS = 10
# A text longer than this many characters per token asked for is first tried by its beginning alone.
HEAD_CHARACTERS_PER_TOKEN = 32


class Tokenizer:
    """A `tokenizers.Tokenizer` that cuts and pads as the caller says, whatever its file says.

    Args:
        tokenizer: from now on this object's own.
        settings: what else is known about it.

    Attributes:
        highest_id: the greatest id that a token of a text may have.

    Raises:
        CheckpointError: it has ids beyond int32, or its post-processor loses the text or knows more than 256 types.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, settings: TokenizerSettings | None = None) -> None:
        settings = settings or TokenizerSettings()
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = settings.split_special_tokens  # no file of the library's holds this
        if tokenizer.post_processor is None:  # the library's fast batches then leave the second text's types at 0
            tokenizer.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1")
        self._tokenizer, self._settings = tokenizer, settings
        self._lock = forks.lock()  # truncation is state of the tokenizer, so one encode at a time
        self._heads_tell = settings.truncation_side == "right" and _heads_tell(tokenizer)
        self._single, self._pair = framed(tokenizer)
        if self._single.special_tokens_mask.count(0) != 1:
            raise CheckpointError(f"{settings.source}: post_processor", "a text that is lost in it", "the text, once")
        if (highest := max([*self._single.type_ids, *self._pair.type_ids])) > np.iinfo(np.uint8).max:
            raise CheckpointError(f"{settings.source}: post_processor", f"the token type {highest}", "0 or 1")
        self.highest_id = max(tokenizer.get_vocab().values(), default=-1)
        if self.highest_id > np.iinfo(np.int32).max:
            raise CheckpointError(settings.source, f"the token id {self.highest_id}", "ids that fit int32")

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[tokenizers.Tokenizer, TokenizerSettings]]:
        return type(self), (self._tokenizer, self._settings)

    def __getstate__(self) -> dict[str, Any]:
        """To another process, or to a copy, goes all but the lock."""
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=forks.lock())

    @classmethod
    def from_folder(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a checkpoint folder: tokenizer.json, else vocab.txt read as BERT's WordPiece.

        Settings and special tokens come from tokenizer_config.json, special_tokens_map.json and added_tokens.json, as
        transformers 5 reads them (docs/tokenizers.md). What it passes over is passed over, with a warning.

        Raises:
            CheckpointError: there is no tokenizer, a file is damaged, or it asks for what the `tokenizers` library has
                not.
        """
        return cls(*read_tokenizer(checkpoint_folder(folder)))

    def encode(self, texts: Iterable[Text], max_length: int) -> Tokens:
        """Token ids of texts, or of pairs of texts: `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]` for BERT.

        Args:
            texts: all strings, or all tuples of two strings. An empty string is a legal text. Lone surrogates, which
                have no UTF-8 form, become U+FFFD, and one warning counts them.
            max_length: most tokens of a text, special ones included; longer texts lose their end (their beginning, if
                the folder says so), pairs that of the longer one first.

        Raises:
            ArgumentError: an item is something else, or `max_length` leaves no room for a token.
            CheckpointError: the folder's rules fail at one of these texts, or lose a text of a pair.
        """
        texts = list(items_of(texts))
        pairs = bool(texts) and not isinstance(texts[0], str)
        special = self._tokenizer.num_special_tokens_to_add(pairs)
        if max_length <= special:
            raise ArgumentError("max_length", max_length, f"more than the {special} special tokens of each text")
        texts = checked_texts(texts, pairs)
        typed = self._typed(pairs)
        ids: list[npt.NDArray[np.int32]] = [np.empty(0, np.int32)]
        types: list[npt.NDArray[np.uint8]] = [np.empty(0, np.uint8)]
        lengths = [0]
        with self._lock:
            self._tokenizer.enable_truncation(
                max_length, strategy="longest_first", direction=self._settings.truncation_side
            )
            for chunk in _chunks(texts):
                with self._failures():
                    encodings = self._encodings(chunk, max_length, pairs)
                lengths += [len(encoding) for encoding in encodings]
                ids.append(np.fromiter(chain.from_iterable(one.ids for one in encodings), np.int32))
                if typed:
                    types.append(np.fromiter(chain.from_iterable(one.type_ids for one in encodings), np.uint8))
        return Tokens(np.concatenate(ids), np.concatenate(types) if typed else None, np.cumsum(lengths, dtype=np.int64))

    def encode_words(self, sentences: Iterable[Sequence[str]], max_length: int) -> WordTokens:
        """Token ids of sentences given as words, each word split into pieces by itself: `[CLS] words [SEP]`.

        Args:
            sentences: lists of words. A word that has no piece (a control character) becomes the unknown token.
            max_length: most tokens of a row, special ones included. A longer sentence becomes windows that share about
                a quarter of their tokens, cut between words. A word longer than a row loses its end.

        Raises:
            ArgumentError: `max_length` leaves no room for a token.
        """
        before, after, room = self._frame(max_length)
        cleaned = [[SURROGATE.sub("\ufffd", word) for word in words] for words in sentences]
        ids: list[int] = []
        reads: list[int] = []
        offsets, first_word = [0], 0
        for words, pieces in zip(cleaned, self._pieces(cleaned), strict=True):
            pieces = [piece[:room] or [self.unknown_id] for piece in pieces]
            for start, end, read_start, read_end in windows([len(piece) for piece in pieces], room):
                ids += before
                reads += [-1] * len(before)
                for i in range(start, end):
                    ids += pieces[i]
                    reads.append(first_word + i if read_start <= i < read_end else -1)
                    reads += [-1] * (len(pieces[i]) - 1)
                ids += after
                reads += [-1] * len(after)
                offsets.append(len(ids))
            first_word += len(words)
        tokens = Tokens(np.array(ids, np.int32), None, np.array(offsets, np.int64))
        return WordTokens(tokens, np.array(reads, np.int64))

    def encode_documents(self, documents: Iterable[str], max_length: int) -> Tokens:
        """Token ids of documents, cut into rows of `[CLS] part [SEP]`, with nothing lost between the parts.

        Args:
            documents: strings; one without tokens has no row.
            max_length: most tokens of a row, special ones included.

        Raises:
            ArgumentError: an item is no string, or `max_length` leaves no room for a token.
        """
        before, after, room = self._frame(max_length)
        ids: list[int] = []
        offsets = [0]
        for document in self._bare(checked_texts(list(documents), pairs=False)):
            for part in parts(document, room):
                ids += [*before, *part, *after]
                offsets.append(len(ids))
        return Tokens(np.array(ids, np.int32), None, np.array(offsets, np.int64))

    def encode_sentences(self, documents: Iterable[Sequence[str]], max_length: int) -> SentenceTokens:
        """Token ids of documents given as sentences, neighbours together in a row, for pairs that are cut from a row.

        Args:
            documents: lists of sentences. A sentence longer than half a row counts as several. One that has no
                neighbour to share a row with is left out: of a document with a single sentence, and at times a last
                one after rows of two.
            max_length: most tokens of a row, the three special ones of a pair included.

        Raises:
            ArgumentError: a sentence is no string, or `max_length` leaves no room for two tokens.
        """
        before, after, room = self._frame(max_length)
        if len(after) != 1:
            got = f"{len(after)} tokens after a text"
            raise CheckpointError(f"{self._settings.source}: post_processor", got, "one, the separator of a pair")
        room -= 1
        if room < 2:
            raise ArgumentError("max_length", max_length, "room for two tokens beside the special ones of a pair")
        documents = list(documents)
        bare = self._bare(checked_texts(list(chain.from_iterable(documents)), pairs=False))
        ids: list[int] = []
        offsets, starts, owners = [0], [], []
        for number, document in enumerate(documents):
            sentences = [part for sentence in islice(bare, len(document)) for part in parts(sentence, room // 2)]
            for row in neighbours(sentences, room):
                ids += before
                for sentence in row:
                    starts.append(len(ids))
                    owners.append(number)
                    ids += sentence
                ids += [*after, *after]
                offsets.append(len(ids))
        tokens = Tokens(np.array(ids, np.int32), None, np.array(offsets, np.int64))
        return SentenceTokens(tokens, np.array(starts, np.int64), np.array(owners, np.int64))

    @property
    def max_length(self) -> int | None:
        """Most tokens of a text by the folder, special ones included; None where it sets no limit."""
        return self._settings.max_length

    @property
    def mask_id(self) -> int:
        """The id of the token that hides another.

        Raises:
            CheckpointError: the vocabulary has none.
        """
        return self._id_of("mask_token", "[MASK]", "<mask>")

    @property
    def mask_token(self) -> str:
        """How that token is spelled in a text.

        Raises:
            CheckpointError: the vocabulary has none.
        """
        return str(self._tokenizer.id_to_token(self.mask_id))

    @property
    def unknown_id(self) -> int:
        """The id of the token for what the vocabulary lacks.

        Raises:
            CheckpointError: the vocabulary has none.
        """
        return self._id_of("unk_token", "[UNK]", "<unk>")

    @cached_property
    def special_ids(self) -> list[int]:
        """The ids of the tokens that no text is made of: those that the folder calls so, and those around a text."""
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        for spelling in self._settings.special or BERT_NAMES.values():
            if (found := self._tokenizer.token_to_id(spelling)) is not None:
                special.add(found)
        for frame in (self._single, self._pair):
            special |= {i for i, own in zip(frame.ids, frame.special_tokens_mask, strict=True) if own}
        return sorted(special)

    def id_of_word(self, word: str) -> int | None:
        """The id of a word that is one token once it is normalised as texts are; None where it is not."""
        normalizer = self._tokenizer.normalizer
        return self._tokenizer.token_to_id(word if normalizer is None else normalizer.normalize_str(word))

    def id_of_token(self, text: str) -> int | None:
        """The id of a token, by its spelling in the vocabulary or as all that a text is cut into; else None."""
        if (found := self._tokenizer.token_to_id(text)) is not None:
            return found
        [pieces] = self._bare(checked_texts([text], pairs=False))
        return pieces[0] if len(pieces) == 1 and pieces[0] != self._find("unk_token", "[UNK]", "<unk>") else None

    def text_of(self, token: int) -> str:
        """What a token stands for in a text; "" where the vocabulary has none of this id."""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def description(self) -> str:
        """All that decides the ids of a text but `max_length`; where two are equal, so are the ids."""
        with self._lock:
            self._tokenizer.no_truncation()
            rules = self._tokenizer.to_str()
        settings = self._settings
        return f"{settings.truncation_side} {settings.split_special_tokens} {settings.token_types} {rules}"

    def lower_case(self) -> None:
        """Lowercase texts before the folder's own rules, from now on."""
        own = self._tokenizer.normalizer
        self._tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), *([] if own is None else [own])])

    @property
    def size(self) -> int:
        """Tokens in the vocabulary."""
        return self._tokenizer.get_vocab_size()

    def _id_of(self, role: str, *usual: str) -> int:
        """The token of a role; see `_find`."""
        if (found := self._find(role, *usual)) is not None:
            return found
        spellings = [self._settings.names[role]] if role in self._settings.names else usual
        mend = f"tokenizer_config.json may name another: {role}."
        source = self._settings.source
        raise CheckpointError(
            source, f"a vocabulary without {spellings[0]}", f"one with {' or '.join(spellings)}", mend
        )

    def _find(self, role: str, *usual: str) -> int | None:
        """The token of a role, by the folder's name for it, else by a usual one; None where there is none."""
        spellings = [self._settings.names[role]] if role in self._settings.names else usual
        found = (self._tokenizer.token_to_id(token) for token in spellings)
        return next((token for token in found if token is not None), None)

    def _typed(self, pairs: bool) -> bool:
        """Whether tokens have types other than 0."""
        source, frame = self._settings.source, self._pair if pairs else self._single
        if pairs and frame.special_tokens_mask.count(0) != 2:
            raise CheckpointError(f"{source}: post_processor", "a pair that loses a text in it", "each text, once")
        typed = any(frame.type_ids)
        if typed and not self._settings.token_types:
            warnings.warn(
                f"{source}: model_input_names in tokenizer_config.json lacks token_type_ids, so every token has type 0 "
                "as in transformers 5",
                stacklevel=3,
            )
        return typed and self._settings.token_types

    def _frame(self, max_length: int) -> tuple[list[int], list[int], int]:
        """The special tokens before a text, those after it, and the room between."""
        if any(self._single.type_ids) and self._settings.token_types:
            source = f"{self._settings.source}: post_processor"
            raise CheckpointError(source, "token types other than 0 for one text", "types of 0 for words and documents")
        at = self._single.special_tokens_mask.index(0)
        before, after = self._single.ids[:at], self._single.ids[at + 1 :]
        special = len(before) + len(after)
        if max_length <= special:
            raise ArgumentError("max_length", max_length, f"more than the {special} special tokens of each text")
        return before, after, max_length - special

    def _failures(self) -> AbstractContextManager[None]:
        return library_errors(self._settings.source, "rules that serve these texts")

    def _bare(self, texts: list[str]) -> Iterator[list[int]]:
        """The ids of each text, whole and without special tokens."""
        for chunk in _chunks(texts):
            with self._lock, self._failures():
                self._tokenizer.no_truncation()
                encodings = self._tokenizer.encode_batch_fast(chunk, add_special_tokens=False)
            for encoding in encodings:
                yield encoding.ids

    def _pieces(self, sentences: list[list[str]]) -> Iterator[list[list[int]]]:
        """The ids of each word's pieces."""
        for chunk in _chunks(sentences):
            with self._lock, self._failures():
                self._tokenizer.no_truncation()
                encodings = self._tokenizer.encode_batch(chunk, is_pretokenized=True, add_special_tokens=False)
            for words, encoding in zip(chunk, encodings, strict=True):
                pieces: list[list[int]] = [[] for _ in words]
                for word, token in zip(encoding.word_ids, encoding.ids, strict=True):
                    assert word is not None  # only special tokens belong to no word
                    pieces[word].append(token)
                yield pieces

    def _encodings(self, texts: list[Any], max_length: int, pairs: bool) -> list[tokenizers.Encoding]:
        if pairs or not self._heads_tell:
            return self._tokenizer.encode_batch_fast(texts)
        heads = [_head(text, max_length) for text in texts]
        encodings = self._tokenizer.encode_batch_fast(heads)
        for i, (text, head) in enumerate(zip(texts, heads, strict=True)):
            if head is not text and len(encodings[i]) < max_length:
                encodings[i] = self._tokenizer.encode_batch_fast([text])[0]
        return encodings


def _heads_tell(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether the tokens of a text that is cut at a space are the first tokens of the whole text.

    BERT's rules look at no character beyond a space. Not so other rules, and added tokens that have a space in them; a
    tab or another white space becomes one when it is normalised.
    """
    if not isinstance(tokenizer.normalizer, normalizers.BertNormalizer):
        return False
    if not isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer):
        return False
    added = tokenizer.get_added_tokens_decoder().values()
    return not any(character.isspace() for token in added for character in token.content)


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
