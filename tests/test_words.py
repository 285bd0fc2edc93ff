"""How texts are cut into words, and what of that a tagger's folder remembers."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import transformers
from processes import PYTHON

from fastbert.errors import ArgumentError, CheckpointError
from fastbert.tasks.tag import TextTagger, tag
from fastbert.text.words import WordRule, parted_by_spaces
from fastbert.training import Settings, train

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.filterwarnings("ignore:no losses.png", "ignore:.*learned nothing")


def cut(rule: WordRule, text: str) -> list[str]:
    return [text[start:end] for start, end in rule.spans(text)]


def learned(*sentences: str) -> WordRule:
    """Of sentences as a corpus has them, words told apart by spaces."""
    return WordRule.learned([sentence.split() for sentence in sentences])


def test_user_case_36b_conll_words() -> None:
    """Abbreviations stay whole and endings are words, as in CoNLL-2003; marks at the ends of others are cut off."""
    rule = learned(
        "EU rejects U.S. call .", "He met St. Pierre 's aide ( in the U.S. ) , he said .",
        "' No , ' said Ada 's aide ...", "O'Neill of Acme Inc. won 1-0 .", "Inc. is not the end .", "Is it Inc . ?",
        "The O'Neill 's .",
    )  # fmt: skip
    text = "St. Pierre's aide, in the (U.S.), met 'O'Neill'... of Acme Inc. today. U.S.A. won 3-2."
    assert cut(rule, text) == [
        "St.", "Pierre", "'s", "aide", ",", "in", "the", "(", "U.S.", ")", ",", "met", "'", "O'Neill", "'", "...", "of",
        "Acme", "Inc.", "today", ".", "U.S.A", ".", "won", "3-2", ".",
    ]  # fmt: skip
    assert cut(WordRule(), "the U.S. (Inc.)") == ["the", "U.S", ".", "(", "Inc", ".", ")"]


def test_words_of_tweets() -> None:
    """The kind of 36b: a model that learned `@bob` as one word has to read it as one."""
    rule = learned("@bob is in #paris :) !", "RT @ann : so good , #nice", "see http://t.co/a1 , @bob", "i 'm at & t")
    assert cut(rule, "RT @grace: (#rome), at http://t.co/b2! :)") == [
        "RT", "@grace", ":", "(", "#rome", ")", ",", "at", "http://t.co/b2", "!", ":)",
    ]  # fmt: skip
    assert cut(WordRule(), "@bob") == ["@", "bob"]


def test_words_that_only_spaces_part() -> None:
    rule = learned("Paris, and (Rome).", 'He said: "No."', "-- well, Paris,")
    for text in ("Oslo, and (Bonn).", 'She said: "Yes."', "-- well, Oslo,"):
        assert cut(rule, text) == text.split()
    text = " a\u2003(b),\n c\u3000"
    assert [text[start:end] for start, end in parted_by_spaces(text)] == ["a", "(b),", "c"]


def test_one_slip_of_a_corpus_teaches_nothing() -> None:
    sentences = [["in", "Paris", ","]] * 9 + [["in", "Paris,"]]
    assert cut(WordRule.learned(sentences), "in Paris, in Rome,") == ["in", "Paris", ",", "in", "Rome", ","]


@pytest.mark.parametrize("sentences", [[], [[]], [["a"]], [["."]], [["\u4e2d\u6587", "\u3002"]]])
def test_little_to_learn_from(sentences: list[list[str]]) -> None:
    rule = WordRule.learned(sentences)
    for text in ("", " ", ".", "..", "a.", "(", "\u4e2d"):
        assert "".join(cut(rule, text)) == text.strip()


def test_every_character_is_in_one_word() -> None:
    rule = learned("@a 's ... U.S. a. .a (a)", "'s 's ... ...", ". . . ( )")
    for text in (
        "(((",
        ")))",
        "'s",
        "...",
        "a...",
        "'s's",
        "@",
        "@@a",
        "U.S.U.S.",
        "(U.S.)",
        "....",
        "a'sa's",
        "\u4e2da'\u6587",
    ):
        assert "".join(cut(rule, text)) == text


def test_a_rule_is_remembered(tmp_path: Path) -> None:
    rule = learned("@bob 's U.S. \u00e9.", "( \u201eA \u201c )")
    (tmp_path / "fastbert_words.json").write_bytes(rule.to_json())
    assert WordRule.from_folder(tmp_path) == rule and rule != WordRule()
    (tmp_path / "fastbert_words.json").write_text('{"whole": [1]}')
    with pytest.raises(CheckpointError, match=r"whole: .*a list of strings"):
        WordRule.from_folder(tmp_path)
    (tmp_path / "fastbert_words.json").unlink()
    assert WordRule.from_folder(tmp_path) == WordRule()


# --------------------------------------------------------------------------------------------------------- in folders


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that learned to tell words with @ as people, in which `@ada` is one word."""
    path = tmp_path_factory.mktemp("tagger")
    tiny_bert.make(path / "model", dropout=0.0)
    vocabulary = (path / "model" / "vocab.txt").read_text().replace("##burg", "@")
    (path / "model" / "vocab.txt").write_text(vocabulary)
    people = ("ada", "alan", "grace", "hopper", "turing")
    lines = [
        f"the O\n@{name} B-PER\nmet O\nin O\n{place} B-LOC\n. O\n\n" for name in people for place in ("rome", "oslo")
    ]
    (path / "train.txt").write_text("".join(lines * 10))
    given = Settings("tag", str(path / "model"), str(path / "train.txt"), str(path / "out"), max_length=40)
    metrics = train(Settings(**{**vars(given), "epochs": 4, "lr": 1e-2, "batch_tokens": 60, "valid": given.train}))
    assert metrics["f1"] == 1.0
    return path / "out"


def found(entities: list[Any]) -> list[tuple[str, int, int, str]]:
    return [(one.kind, one.start, one.end, one.text) for one in entities]


def test_a_tagger_cuts_words_as_its_training_file(tagger: Path) -> None:
    loaded = TextTagger.from_folder(tagger, device="cpu")
    [entities] = loaded.tag(["the @ada met in rome."], max_length=40)
    assert found(entities) == [("PER", 4, 8, "@ada"), ("LOC", 16, 20, "rome")]
    [entities] = loaded.tag(["the @ada met in rome."], words="whitespace", max_length=40)
    assert found(entities)[-1] == ("LOC", 16, 21, "rome.")


def test_a_tagger_takes_words(tagger: Path) -> None:
    loaded = TextTagger.from_folder(tagger, device="cpu")
    words = ["the", "@ada", "met", "in", "rome", "."]
    mixed = [words, "the @ada met in rome.", [], tuple(words)]
    one, two, none, three = tag(mixed, loaded, max_length=40)
    assert found(one) == found(three) == [("PER", 1, 2, "@ada"), ("LOC", 4, 5, "rome")]
    assert [entity.score for entity in one] == [entity.score for entity in two] and none == []
    for wrong, message in (
        ([["a", ""]], r"texts\[0\]\[1\]: got ''"),
        (["a", [3]], r"texts\[1\]\[0\]: got 3"),
        ([3], r"texts\[0\]: got a int"),
        ("a b", "a single string"),
    ):
        with pytest.raises(ArgumentError, match=message):
            loaded.tag(wrong, max_length=40)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="remembered, whitespace"):
        loaded.tag(["a"], words="json", max_length=40)  # type: ignore[arg-type]


def test_a_folder_remembers_its_max_length(tagger: Path) -> None:
    settings = json.loads((tagger / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 40
    tokenizer = transformers.AutoTokenizer.from_pretrained(tagger)
    assert tokenizer.model_max_length == 40
    assert len(tokenizer("the " * 100, truncation=True)["input_ids"]) == 40


def test_other_settings_of_the_tokenizer_stay(tmp_path: Path) -> None:
    tiny_bert.make(tmp_path / "model")
    settings = {"do_lower_case": False, "tokenizer_class": "BertTokenizer", "model_max_length": 512}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(settings))
    tiny_bert.opinions(tmp_path / "train.jsonl", 10, 0)
    train(
        Settings(
            "classify", str(tmp_path / "model"), str(tmp_path / "train.jsonl"), str(tmp_path / "out"), max_length=30
        )
    )
    remembered = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert remembered == {**settings, "model_max_length": 30}


def test_words_on_the_command_line(tagger: Path, tmp_path: Path) -> None:
    def run(words: str, line: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "texts").write_text(line + "\n")
        options = ["--model", str(tagger), "--words", words, "--max-length", "40", str(tmp_path / "texts")]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [*PYTHON, "-m", "fastbert", "tag", *options], env=environment, capture_output=True, text=True, check=False
        )

    record = json.loads(run("json", '["the", "@ada", "met"]').stdout)
    assert record["words"] == ["the", "@ada", "met"]
    assert [(one["text"], one["start"], one["end"]) for one in record["entities"]] == [("@ada", 1, 2)]
    record = json.loads(run("whitespace", "the @ada met in rome.").stdout)
    assert record["text"] == "the @ada met in rome." and record["entities"][-1]["text"] == "rome."
    refused = run("json", "the @ada")
    assert (
        refused.returncode == 2 and "got 'the @ada', which is no JSON; expected a JSON list of words" in refused.stderr
    )


def test_time_of_a_long_run_grows_with_its_length() -> None:
    """A line of a CSV's dashes, or of a table of contents, is no hang; it was one, for 200,000 characters."""
    for text in ("." * 300_000, "a" + "-" * 300_000, "(" * 300_000 + "a"):
        began = time.monotonic()
        assert WordRule(whole=frozenset({"U.S."})).spans(text)[-1][1] == len(text)
        assert time.monotonic() - began < 10


def test_a_word_without_utf8_is_kept(tmp_path: Path) -> None:
    rule = WordRule(whole=frozenset({"U.\ud800", "Ü.S."}))
    (tmp_path / "fastbert_words.json").write_bytes(rule.to_json())
    assert "Ü.S.".encode() in rule.to_json()
    assert WordRule.from_folder(tmp_path) == rule
