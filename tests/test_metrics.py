from __future__ import annotations

import random

import pytest

from fastbert.errors import ArgumentError
from fastbert.training.metrics import Chunk, accuracy, chunks, entity_scores, macro_f1, odd_tag, plain_mark


def test_accuracy() -> None:
    assert accuracy(["a", "b", "b", "c"], ["a", "b", "c", "c"]) == 0.75
    assert accuracy([], []) == 0.0


def test_macro_f1_by_hand() -> None:
    # a: 1 right of 2 predicted, 1 gold: 2/3. b: 1 of 1, 2: 2/3. c is only gold: 0. d is only predicted: 0.
    assert macro_f1(["a", "b", "b", "c"], ["a", "b", "a", "d"]) == pytest.approx((2 / 3 + 2 / 3) / 4)
    assert macro_f1(["a"] * 9 + ["b"], ["a"] * 10) == pytest.approx((18 / 19) / 2)
    assert macro_f1([], []) == 0.0


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("", []),
        ("O O", []),
        ("B-PER", [("PER", 0, 1)]),
        ("B-PER I-PER O B-LOC", [("PER", 0, 2), ("LOC", 3, 4)]),
        ("I-PER I-PER", [("PER", 0, 2)]),  # IOB1, or I- without B-: an entity all the same
        ("O I-PER O", [("PER", 1, 2)]),
        ("I-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),  # IOB1: B- parts two neighbours
        ("B-PER B-PER", [("PER", 0, 1), ("PER", 1, 2)]),
        ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),  # another type begins another entity
        ("I-PER I-LOC I-LOC", [("PER", 0, 1), ("LOC", 1, 3)]),
        ("B-PER I-LOC B-LOC I-PER", [("PER", 0, 1), ("LOC", 1, 2), ("LOC", 2, 3), ("PER", 3, 4)]),
        ("B-A-B I-A-B", [("A-B", 0, 2)]),  # a type may have dashes
        ("B-PER I-PER E-PER S-PER S-PER", [("PER", 0, 3), ("PER", 3, 4), ("PER", 4, 5)]),  # BIOES
        ("B-PER L-PER U-LOC O", [("PER", 0, 2), ("LOC", 2, 3)]),  # BILOU
        ("B-PER M-PER E-PER W-LOC", [("PER", 0, 3), ("LOC", 3, 4)]),  # BMEWO
        ("E-PER E-PER I-PER", [("PER", 0, 1), ("PER", 1, 2), ("PER", 2, 3)]),  # conlleval: what follows an end begins
    ],
)
def test_chunks(tags: str, expected: list[tuple[str, int, int]]) -> None:
    assert chunks(tags.split()) == [Chunk(*entity) for entity in expected]


@pytest.mark.parametrize("tag", ["", "B", "I-", "X-PER", "o", "PER", "B_PER"])
def test_tags_of_other_schemes(tag: str) -> None:
    with pytest.raises(ArgumentError, match="O, B-TYPE or I-TYPE"):
        chunks(["O", tag])


def test_tags_that_go_together() -> None:
    for together in (
        {"O"},
        {"O", "I-X"},
        {"B-X", "E-X"},
        {"NOUN", "VERB"},
        {"O", "PER"},
        {"X", "-LRB-", "O"},
        {"0", "1", "2"},
    ):
        assert odd_tag(together) is None
    for tags, odd in (
        (["O", "B-X", "X"], "X"),
        (["b-x"], "b-x"),
        (["B_X", "O"], "B_X"),
        (["A", ""], ""),
        (["I-"], "I-"),
        (["PER", "0"], "0"),
        (["X", "Y", "X", "Y", "B-X"], "X"),
    ):
        assert odd_tag(tags) == odd
    assert [plain_mark(tags) for tags in (["O"], ["O", "S-X"], ["O", "X"], ["X"])] == ["", "", "I-", "B-"]


def test_entity_scores_by_hand() -> None:
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "O"], ["B-ORG", "I-ORG", "I-ORG"]]
    predicted = [["B-PER", "I-PER", "O", "B-ORG"], ["O", "B-LOC"], ["B-ORG", "I-ORG", "O"]]
    # Gold has 3, predicted 4; only the person has both borders and the type right. 6 of 9 tags are equal.
    assert entity_scores(gold, predicted) == {
        "precision": 1 / 4,
        "recall": 1 / 3,
        "f1": pytest.approx(2 / 7),
        "accuracy": pytest.approx(6 / 9),
    }


def test_entity_scores_at_the_borders() -> None:
    # An entity ends with its sentence: these two are not one of two words.
    scores = entity_scores([["B-PER"], ["I-PER"]], [["B-PER"], ["B-PER"]])
    assert (scores["f1"], scores["accuracy"]) == (1.0, 0.5)
    assert entity_scores([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "accuracy": 1.0}
    assert entity_scores([["B-PER"]], [["O"]])["f1"] == 0.0
    assert entity_scores([], [])["f1"] == 0.0


def conlleval(gold: list[list[str]], predicted: list[list[str]]) -> tuple[int, int, int]:
    """`(entities, found, right)` by a word-by-word count, as the original script does it: a second way to the same."""
    entities = found = right = 0
    in_right = False
    last = ("O", "")
    last_guess = ("O", "")
    stream = [pair for a, b in zip(gold, predicted, strict=True) for pair in [*zip(a, b, strict=True), ("O", "O")]]
    for gold_tag, guess_tag in stream:
        tag = ("O", "") if gold_tag == "O" else (gold_tag[0], gold_tag[2:])
        guess = ("O", "") if guess_tag == "O" else (guess_tag[0], guess_tag[2:])
        ends, guess_ends = _ends(last, tag), _ends(last_guess, guess)
        begins, guess_begins = _begins(last, tag), _begins(last_guess, guess)
        if in_right:
            if ends and guess_ends and last[1] == last_guess[1]:
                in_right, right = False, right + 1
            elif ends != guess_ends or tag[1] != guess[1]:
                in_right = False
        if begins and guess_begins and tag[1] == guess[1]:
            in_right = True
        entities, found = entities + begins, found + guess_begins
        last, last_guess = tag, guess
    return entities, found, right


def _ends(last: tuple[str, str], tag: tuple[str, str]) -> bool:
    return (last[0] in "BI" and tag[0] in "BO") or (last[0] != "O" and last[1] != tag[1])


def _begins(last: tuple[str, str], tag: tuple[str, str]) -> bool:
    return tag[0] == "B" or (last[0] == "O" and tag[0] == "I") or (tag[0] != "O" and last[1] != tag[1])


def test_entity_scores_as_the_word_by_word_count() -> None:
    draw = random.Random(0)
    tags = ["O", "O", "B-A", "I-A", "B-B", "I-B"]
    for _ in range(300):
        gold = [draw.choices(tags, k=draw.randrange(9)) for _ in range(4)]
        predicted = [[tag if draw.random() < 0.7 else draw.choice(tags) for tag in sentence] for sentence in gold]
        entities, found, right = conlleval(gold, predicted)
        scores = entity_scores(gold, predicted)
        assert scores["precision"] == right / max(found, 1)
        assert scores["recall"] == right / max(entities, 1)


def test_lengths_are_checked() -> None:
    for call in (accuracy, macro_f1, entity_scores):
        with pytest.raises(ArgumentError, match="as many as gold"):
            call(["O"], [])
    with pytest.raises(ArgumentError, match=r"predicted\[1\]"):
        entity_scores([[], ["O"]], [[], ["O", "O"]])
