"""How good predictions are: accuracy, macro F1, and entity F1 exactly as CoNLL's conlleval counts it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastbert.errors import ArgumentError

OUTSIDE = "O"


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
    """The entities of one sentence's IOB tags, in order, by the rules of conlleval.

    An entity begins at B-, and at an I- that follows O, another type, or the sentence's beginning: so IOB1 and IOB2
    are both read. It ends before O, before B-, and before another type.

    Raises:
        ArgumentError: a tag is not O, B-TYPE or I-TYPE.
    """
    found: list[Chunk] = []
    start, kind = 0, ""  # of the entity we are in; "" outside
    for i, tag in enumerate([*tags, OUTSIDE]):
        mark, new = split_tag(tag)
        if kind and (mark == "B" or new != kind):
            found.append(Chunk(kind, start, i))
        if new and (mark == "B" or new != kind):
            start = i
        kind = new
    return found


def split_tag(tag: str) -> tuple[str, str]:
    """`("B", "LOC")` of "B-LOC", `("I", "LOC")` of "I-LOC", `("O", "")` of "O".

    Raises:
        ArgumentError: the tag is none of these.
    """
    if tag == OUTSIDE:
        return OUTSIDE, ""
    mark, _, kind = tag.partition("-")
    if mark not in ("B", "I") or not kind:
        raise ArgumentError("tag", repr(tag), "O, B-TYPE or I-TYPE", "Write the tags as IOB1 or IOB2.")
    return mark, kind


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
