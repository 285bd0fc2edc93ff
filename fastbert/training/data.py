"""Files to examples: texts with labels, sentences with tags, documents."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fastbert.errors import ArgumentError
from fastbert.text.records import JSON, ending, has_records, read_lines, read_records
from fastbert.training.metrics import TAGS, odd_tag

SENTENCE_END = re.compile(r"(?<=[.!?])\s+|[\r\n]+")
CONLLU_COLUMNS = 10  # of them the second is the word and the fourth its part of speech
CONLLU_NUMBER = re.compile(
    r"\d+([-.]\d+)?"
)  # of a word; 1-2 are two words written as one, 1.1 is one that is not written

_Columns = tuple[int, list[str]]  # the number of a line, and what it has
_Sentence = list[tuple[str, str, str]]  # of each word its place, for errors; the word; its tag


def read_classified(path: Path) -> tuple[list[str], list[str]]:
    """`(texts, labels)`: the columns text and label of a .csv or .tsv, or these keys of JSON.

    Other columns and keys are ignored, text_pair with a warning. A label may be a string or an int; spaces around it
    are no part of it.

    Raises:
        ArgumentError: the file is missing or not UTF-8, has another ending, or a row lacks a text or a label.
    """
    texts, labels, pairs = [], [], 0
    for place, record in read_records(path):
        pairs += bool(record.get("text_pair"))
        texts.append(_field(place, record, "text", str))
        label = str(_field(place, record, "label", (str, int))).strip()
        if not label:
            raise ArgumentError(place, "an empty label", "a label in each row", "Fill it in, or leave the row out.")
        labels.append(label)
    if pairs:
        warnings.warn(f"{path}: text_pair of {pairs} rows is not read; classify learns from single texts", stacklevel=2)
    return _some(path, texts), labels


def read_tagged(path: Path) -> tuple[list[list[str]], list[list[str]]]:
    """`(sentences, tags)` of JSON with the keys tokens and tags, or of columns (any other ending but .csv).

    Sentences without words are left out. Tags are of the IOB kind (`metrics.split_tag`) or all without prefixes.

    Columns: a word a line, the word first and its tag last, whatever is between; an empty line ends a sentence.
    -DOCSTART- lines are no words, nor are comments before a sentence (`# id 17`). Where the first column counts the
    words of each sentence, the word is in the second; of CoNLL-U the tag is the universal part of speech.

    Raises:
        ArgumentError: the file is missing or not UTF-8, a line has no tag or other columns than the others, only some
            tags have prefixes, or there are not as many tags as tokens.
    """
    if ending(path) == ".csv":
        raise ArgumentError(str(path), "a .csv", "JSON lines (.jsonl) with tokens and tags, or CoNLL columns")
    sentences = list(_read_tagged_records(path) if ending(path) in JSON else _read_columns(path))
    places: dict[str, str] = {}  # of each tag, where it is first
    for place, _, tag in chain.from_iterable(sentences):
        places.setdefault(tag, place)
    if (odd := odd_tag(places)) is not None:
        raise ArgumentError(places[odd], f"tag {odd!r}", TAGS)
    sentences = _some(path, [sentence for sentence in sentences if sentence])
    return [[word for _, word, _ in words] for words in sentences], [[tag for *_, tag in words] for words in sentences]


def read_documents(path: Path) -> list[str]:
    """Documents: the column text of a .csv or .tsv, the key text of JSON, else the lines of a text file.

    Empty ones are left out.

    Raises:
        ArgumentError: the file is missing or not UTF-8, has no document, or a row lacks a text.
    """
    if has_records(path):
        documents = [_field(place, record, "text", str) for place, record in read_records(path)]
    else:
        documents = read_lines(path)
    return _some(path, [document for document in documents if document.strip()])


def read_sentences(path: Path) -> list[list[str]]:
    """Documents as lists of sentences. Empty ones are left out.

    Of a .csv or .tsv (column text) or JSON (key text), a document a row, cut at the ends of lines and after `.`, `!`
    and `?` before a space; of any other ending, a sentence a line, and an empty line between documents.

    Raises:
        ArgumentError: the file is missing or not UTF-8, has no sentence, or a row lacks a text.
    """
    if has_records(path):
        documents = [SENTENCE_END.split(document) for document in read_documents(path)]
    else:
        documents = [[]]
        for line in read_lines(path):
            if line.strip():
                documents[-1].append(line)
            else:
                documents.append([])
    sentences = [[sentence for sentence in document if sentence.strip()] for document in documents]
    return _some(path, [document for document in sentences if document])


def _read_tagged_records(path: Path) -> Iterator[_Sentence]:
    for place, record in read_records(path):
        words, tags = (_field(place, record, name, list) for name in ("tokens", "tags"))
        for name, strings in (("tokens", words), ("tags", tags)):
            if not all(isinstance(string, str) and string for string in strings):
                raise ArgumentError(place, f"{name} {strings!r:.80}", "a list of strings that are not empty")
        if len(words) != len(tags):
            raise ArgumentError(place, f"{len(words)} tokens and {len(tags)} tags", "as many tags as tokens")
        yield [(place, word, tag) for word, tag in zip(words, tags, strict=True)]


def _read_columns(path: Path) -> Iterator[_Sentence]:
    blocks = list(_without_comments(list(_blocks(path))))
    lines = [line for block in blocks for line in block]
    for number, columns in lines:
        if len(columns) < 2:
            raise ArgumentError(f"{path}, line {number}", repr(columns[0]), "a word, then its tag in the last column")
        if len(columns) != len(lines[0][1]):
            got, expected = f"{len(columns)} columns", f"{len(lines[0][1])}, as line {lines[0][0]} has"
            raise ArgumentError(f"{path}, line {number}", got, expected)
        if "" in columns:
            raise ArgumentError(f"{path}, line {number}", f"{columns!r:.80}", "no empty column")
    word, tag = 0, -1
    if lines and all(len(row) == CONLLU_COLUMNS and CONLLU_NUMBER.fullmatch(row[0]) for _, row in lines):
        blocks = [[(number, row) for number, row in block if row[0].isdecimal()] for block in blocks]
        word, tag = 1, 3
    elif all(len(row) > 2 and row[0] == str(i) for block in blocks for i, (_, row) in enumerate(block, start=1)):
        word = 1
    for block in blocks:
        yield [(f"{path}, line {number}", columns[word], columns[tag]) for number, columns in block]


def _blocks(path: Path) -> Iterator[list[_Columns]]:
    """The lines between empty ones."""
    block: list[_Columns] = []
    for number, line in enumerate(read_lines(path), start=1):
        line = line.strip(" \t")  # other kinds of space are words' own
        columns = [column.strip(" ") for column in line.split("\t")] if "\t" in line else re.split(" +", line)
        if line and columns[0] != "-DOCSTART-":
            block.append((number, columns))
        elif block:
            yield block
            block = []
    if block:
        yield block


def _without_comments(blocks: list[list[_Columns]]) -> Iterator[list[_Columns]]:
    """The blocks without the lines that they begin with and that are comments: `# id 17`, `#end document`.

    A word such as # or #tag has as many columns as other words, and a tag of their kind.
    """
    words = [columns for block in blocks for _, columns in block if not columns[0].startswith("#")]
    sizes = {len(columns) for columns in words}
    prefixed = all(odd_tag([columns[-1], "B-TYPE"]) is None for columns in words)
    for block in blocks:
        first = 0
        for _, columns in block:
            like_a_word = len(columns) in sizes and not (prefixed and odd_tag([columns[-1], "B-TYPE"]))
            if like_a_word or not columns[0].startswith("#"):
                break
            first += 1
        yield block[first:]


def _field(place: str, record: dict[str, Any], name: str, kind: Any) -> Any:
    value = record.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        got = (
            f"{name} {value!r:.80}" if name in record else f"no {name}, only {', '.join(map(str, record)) or 'nothing'}"
        )
        raise ArgumentError(place, got, f"{name} in each row, {_KINDS[kind]}")
    return value


_KINDS = {str: "a string", list: "a list of strings", (str, int): "a string or a whole number"}


def _some(path: Path, items: Sequence[Any]) -> list[Any]:
    if not items:
        raise ArgumentError(str(path), "no examples", "at least one")
    return list(items)
