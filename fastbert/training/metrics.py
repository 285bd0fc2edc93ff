"""How good predictions are: accuracy, macro F1, and entity F1 exactly as CoNLL's conlleval counts it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from fastbert.errors import ArgumentError

OUTSIDE = "O"
MARKS = {"B": "B", "I": "I", "E": "E", "S": "S", "L": "E", "U": "S", "M": "I", "W": "S"}  # of IOB, BIOES, BILOU, BMEWO
TAGS = "O, B-TYPE or I-TYPE (or E-TYPE, S-TYPE), or tags of which none has such a prefix"

_PREFIXED = re.compile(f"[{''.join(MARKS)}]-.+")
_MISSPELT = re.compile("[bi]-.+|[BI]_.+|[BI]-")


class Chunk(NamedTuple):
    """An entity: its type and its words, `words[start:end]`."""

    kind: str
    start: int
    end: int


def accuracy(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """The share of predictions that are right; 0.0 of none.

    Raises:
        ArgumentError: the two differ in length.
    """
    _check_lengths(gold, predicted)
    return sum(a == b for a, b in zip(gold, predicted, strict=True)) / max(len(gold), 1)


def macro_f1(gold: Sequence[str], predicted: Sequence[str]) -> float:
    """The mean F1 of the labels that occur in either, each label counting the same; 0.0 of none.

    Raises:
        ArgumentError: the two differ in length.
    """
    _check_lengths(gold, predicted)
    right = Counter(a for a, b in zip(gold, predicted, strict=True) if a == b)
    in_gold, in_predicted = Counter(gold), Counter(predicted)
    labels = in_gold.keys() | in_predicted.keys()
    # 2 P R / (P + R) with P = right/predicted and R = right/gold; a label in either has a denominator above 0.
    scores = [2 * right[label] / (in_gold[label] + in_predicted[label]) for label in sorted(labels)]
    return sum(scores) / max(len(scores), 1)


def chunks(tags: Sequence[str]) -> list[Chunk]:
    """The entities of one sentence's tags, in order, by the rules of conlleval.

    An entity begins at B- and S-, and at an I- or E- that follows O, another type, an entity's end, or the sentence's
    beginning: so IOB1, IOB2, IO and BIOES are all read. It ends before O, before B- and S-, before another type, and
    after E- and S-.

    Raises:
        ArgumentError: a tag is none that `split_tag` splits.
    """
    found: list[Chunk] = []
    start, kind, ended = 0, "", False  # of the entity we are in; "" outside
    for i, tag in enumerate([*tags, OUTSIDE]):
        mark, new = split_tag(tag)
        fresh = mark in ("B", "S") or new != kind or ended
        if kind and fresh:
            found.append(Chunk(kind, start, i))
        if new and fresh:
            start = i
        kind, ended = new, mark in ("E", "S")
    return found


def split_tag(tag: str) -> tuple[str, str]:
    """`("B", "LOC")` of "B-LOC", `("I", "LOC")` of "I-LOC", `("O", "")` of "O"; E for an end, S for a single word.

    Other schemes' letters are read as these: L as E, U and W as S, M as I.

    Raises:
        ArgumentError: the tag is none of these.
    """
    if tag == OUTSIDE:
        return OUTSIDE, ""
    mark, _, kind = tag.partition("-")
    if mark not in MARKS or not kind:
        raise ArgumentError("tag", repr(tag), TAGS, "Write the tags as IOB1 or IOB2.")
    return MARKS[mark], kind


def odd_tag(tags: Iterable[str]) -> str | None:
    """A tag that does not go with the others: some have prefixes, and it has none or one misspelt. None if all go.

    Tags without any prefixes, such as parts of speech, go together.
    """
    tags = list(tags)
    plain = [tag for tag in tags if tag != OUTSIDE and not _PREFIXED.fullmatch(tag)]
    mixed = len(set(plain)) + (OUTSIDE in tags) < len(set(tags))
    numbers = all(tag.isdecimal() for tag in tags)  # else a 0 is an O that was misread
    return next(
        (tag for tag in plain if mixed or not tag or _MISSPELT.fullmatch(tag) or (tag == "0" and not numbers)), None
    )


def plain_mark(tags: Iterable[str]) -> str:
    """What to put before all tags that a tagger knows to make them IOB's; "" where they are.

    Without prefixes but with O among them, neighbours with the same tag are one entity, as "I-" says. Without O, as
    with parts of speech, each word is one of its own: "B-".
    """
    tags = set(tags)
    if all(tag == OUTSIDE or _PREFIXED.fullmatch(tag) for tag in tags):
        return ""
    return "I-" if OUTSIDE in tags else "B-"


def marked(sentences: Sequence[Sequence[str]], mark: str) -> list[list[str]]:
    """Tags of the IOB kind of tags whose `plain_mark` is `mark`."""
    return [[tag if tag == OUTSIDE else mark + tag for tag in tags] for tags in sentences]


def entity_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Of the tags of many sentences: entity `precision`, `recall` and `f1`, and the words' `accuracy`, all in [0, 1].

    An entity is right if its first word, last word and type are. As in conlleval, precision without predictions,
    recall without entities, and F1 without either right are 0.

    Raises:
        ArgumentError: the sentences differ in number or in length, or a tag is not of the IOB kind.
    """
    _check_lengths(gold, predicted)
    for i, (a, b) in enumerate(zip(gold, predicted, strict=True)):
        if len(a) != len(b):
            raise ArgumentError(f"predicted[{i}]", f"{len(b)} tags", f"{len(a)}, as many as gold[{i}]")
    theirs, ours = set(_placed(gold)), set(_placed(predicted))
    right = len(theirs & ours)
    precision, recall = right / max(len(ours), 1), right / max(len(theirs), 1)
    return {
        "f1": 2 * precision * recall / (precision + recall) if right else 0.0,
        "precision": precision,
        "recall": recall,
        "accuracy": accuracy([tag for tags in gold for tag in tags], [tag for tags in predicted for tag in tags]),
    }


def _placed(sentences: Sequence[Sequence[str]]) -> Iterator[tuple[int, Chunk]]:
    return ((i, chunk) for i, tags in enumerate(sentences) for chunk in chunks(tags))


def _check_lengths(gold: Sequence[object], predicted: Sequence[object]) -> None:
    if len(gold) != len(predicted):
        raise ArgumentError("predicted", f"{len(predicted)} items", f"{len(gold)}, as many as gold")
