"""The words of a text: where they begin and end, as the corpus that a tagger learned from cuts them."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from fastbert.checkpoints.fields import Fields
from fastbert.checkpoints.files import WORDS, json_bytes, read_json

ENDING_CHARACTERS = 5  # of an ending such as 's or ... at most
MOST_WHOLE = 20_000  # words that are kept whole by name, the frequent ones

_IDEOGRAPHS = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class WordRule:
    """How texts are cut into words; by default as most corpora of news do.

    Words are told apart by spaces. Punctuation at either end of one is a word a character ("Paris," is two words, "U.S"
    and "O'Neill" one each), and so is every Chinese or Japanese ideograph, except as the attributes say.

    Attributes:
        before, after: punctuation that stays on the word that it begins or ends, such as the @ of "@bob".
        endings: endings that are words of their own, such as the 's of "Ada's".
        whole: words that are not cut at all, such as "U.S.".
    """

    before: frozenset[str] = frozenset()
    after: frozenset[str] = frozenset()
    endings: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()

    @classmethod
    def learned(cls, sentences: Iterable[Sequence[str]]) -> WordRule:
        """The rule that cuts as these sentences were cut, as far as words alone tell.

        Punctuation stays on a word where that is more often seen than the character by itself; a word stays whole where
        that is more often seen than its pieces side by side.
        """
        sentences = list(sentences)
        words = Counter(word for sentence in sentences for word in sentence)
        odd = {word: count for word, count in words.items() if len(word) > 1 and any(map(_is_punctuation, word))}
        tails = Counter[str]()  # what words end with, from a punctuation character on
        for word, count in odd.items():
            for i in range(max(1, len(word) - ENDING_CHARACTERS), len(word)):
                if _is_punctuation(word[i]):
                    tails[word[i:]] += count
        endings = frozenset(
            word
            for word, count in odd.items()
            if len(word) <= ENDING_CHARACTERS
            and (word[0] in "'\u2019" or all(map(_is_punctuation, word)))
            and count > tails[word]
        )
        first, last = Counter[str](), Counter[str]()
        for word, count in odd.items():
            if word not in endings and not all(map(_is_punctuation, word)):
                first[word[0]] += count
                last[word[-1]] += count
        before, after = (
            frozenset(mark for mark, count in ends.items() if _is_punctuation(mark) and count > words[mark])
            for ends in (first, last)
        )
        rule = cls(before, after, endings)
        pieces = {word: tuple(word[start:end] for start, end in rule.spans(word)) for word in odd}
        cut = Counter(_sequences(sentences, {parts for parts in pieces.values() if len(parts) > 1}))
        whole = [word for word, parts in pieces.items() if len(parts) > 1 and odd[word] > cut[parts]]
        whole.sort(key=lambda word: (-odd[word], word))
        return cls(before, after, endings, frozenset(whole[:MOST_WHOLE]))

    def spans(self, text: str) -> Spans:
        """`(start, end)` of the words of a text, in characters."""
        spans: Spans = []
        for run in re.finditer(r"\S+", text):
            start, end = run.span()
            tail: Spans = []
            while end - start > self._longest or text[start:end] not in self.whole:
                if start < end and self._is_cut(text[start], self.before):
                    spans.append((start, start + 1))
                    start += 1
                elif size := self._ending(text, start, end):
                    tail.append((end - size, end))
                    end -= size
                else:
                    spans += [part.span() for part in _IDEOGRAPHS.finditer(text, start, end)]
                    start = end
                    break
            if start < end:
                spans.append((start, end))
            spans += reversed(tail)
        return spans

    def to_json(self) -> bytes:
        """What `from_folder` reads."""
        return json_bytes({name: sorted(getattr(self, name)) for name in ("before", "after", "endings", "whole")})

    @classmethod
    def from_folder(cls, folder: Path) -> WordRule:
        """The rule that a checkpoint folder remembers; the default one if it remembers none.

        Raises:
            CheckpointError: its file is damaged.
        """
        path = folder / WORDS
        if not path.exists():
            return cls()
        fields = Fields(str(path), read_json(path))
        return cls(*(frozenset(fields.texts(name)) for name in ("before", "after", "endings", "whole")))

    def _is_cut(self, character: str, kept: frozenset[str]) -> bool:
        return character not in kept and _is_punctuation(character)

    def _ending(self, text: str, start: int, end: int) -> int:
        """Characters to be cut off the end of a word, or 0; never all of them but of a single one."""
        for size in range(min(ENDING_CHARACTERS, end - start - 1), 0, -1):
            if text[end - size : end] in self.endings:
                return size
        return int(start < end and self._is_cut(text[end - 1], self.after))

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest of `whole`: a line of a million dots is not looked for a million times."""
        return max(map(len, self.whole), default=0)


DEFAULT = WordRule()


def parted_by_spaces(text: str) -> Spans:
    """`(start, end)` of what spaces part, in characters."""
    return [run.span() for run in re.finditer(r"\S+", text)]


def _sequences(sentences: list[Sequence[str]], wanted: set[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Those words side by side that are wanted, each time that they are."""
    sizes: dict[str, set[int]] = {}
    for parts in wanted:
        sizes.setdefault(parts[0], set()).add(len(parts))
    for sentence in sentences:
        for i, word in enumerate(sentence):
            for size in sizes.get(word, ()):
                if (found := tuple(sentence[i : i + size])) in wanted:
                    yield found


@lru_cache(maxsize=4096)
def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character)[0] in "PS"
