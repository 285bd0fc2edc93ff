"""From scratch: a checkpoint folder with initial weights, and word vectors from a text file as its word embedding."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fastbert.checkpoints.files import TOKENIZER_FILES, write_bytes
from fastbert.checkpoints.load import save
from fastbert.checkpoints.special_tokens import BERT_NAMES
from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.model.body import EncoderModel
from fastbert.model.heads import EncoderForPreTraining, HeadModel, body_of
from fastbert.text.tokenizer import Tokenizer


def scratch(
    folder: str | os.PathLike[str],
    vocabulary: Sequence[str],
    config: EncoderConfig,
    *,
    lower_case: bool = True,
    word_vectors: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> int:
    """Write a checkpoint folder of an untrained EncoderForPreTraining, for `train` to start from.

    Args:
        folder: where to; made if missing. After an error it is as it was.
        vocabulary: WordPieces in the order of their ids, BERT's special tokens among them.
        config: the sizes; `vocab_size` is that of the vocabulary and `pad_token_id` the place of [PAD].
        lower_case: whether the tokenizer lower-cases texts.
        word_vectors: a file for `initialise_embedding`.
        seed: of the initial weights.

    Returns:
        How many tokens got a word vector.

    Raises:
        ArgumentError: the vocabulary has two of one word, one that is no line, or lacks a special token; it does not
            fit the config; the folder has a tokenizer of its own; or see `read_word_vectors`.
    """
    words = list(vocabulary)
    if len(set(words)) < len(words) or any(set(word) & set("\r\n") for word in words):
        raise ArgumentError(
            "vocabulary", "two of one word, or a word with a line's end", "different words, a line each"
        )
    for token in BERT_NAMES.values():
        if token not in words:
            raise ArgumentError("vocabulary", f"no {token}", "BERT's special tokens among the words")
    if config.vocab_size != len(words):
        raise ArgumentError("config.vocab_size", config.vocab_size, f"{len(words)}, the words of the vocabulary")
    if config.pad_token_id != words.index("[PAD]"):
        raise ArgumentError("config.pad_token_id", config.pad_token_id, f"{words.index('[PAD]')}, the place of [PAD]")
    folder = Path(folder)
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower_case}
    tokenizer = {
        "vocab.txt": "".join(f"{word}\n" for word in words).encode(),
        "tokenizer_config.json": (json.dumps(settings, indent=2) + "\n").encode(),
    }
    for name in set(TOKENIZER_FILES) - set(tokenizer):
        if (folder / name).exists():
            raise ArgumentError("folder", f"{folder} with a {name}", "a folder without one", "It would be read.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = EncoderForPreTraining(config)
    found = 0
    if word_vectors is not None:
        with tempfile.TemporaryDirectory() as draft:  # an error in the vectors leaves nothing in the folder
            write_bytes(Path(draft), tokenizer)
            found = initialise_embedding(model, Tokenizer.from_folder(draft), word_vectors)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder, tokenizer)
    save(model, folder)
    return found


def initialise_embedding(model: EncoderModel | HeadModel, tokenizer: Tokenizer, path: str | os.PathLike[str]) -> int:
    """Put word vectors into the word table; tokens without one keep their row, and so do special tokens.

    A word of the file is normalised as the tokenizer normalises text (lower case, accents). Of words that then are one,
    the first counts: such files begin with the frequent ones. An error leaves the model as it was.

    Returns:
        How many tokens have a vector.

    Raises:
        ArgumentError: see `read_word_vectors`.
    """
    word = body_of(model).embeddings.word.weight
    special = set(tokenizer.special_ids)
    found: dict[int, npt.NDArray[np.float32]] = {}
    for spelled, vector in read_word_vectors(path, word.shape[1]):
        i = tokenizer.id_of_word(spelled)
        if i is not None and i not in special:
            found.setdefault(i, vector)
    if found:
        with torch.no_grad():
            rows = torch.tensor(list(found), dtype=torch.int64, device=word.device)
            word[rows] = torch.from_numpy(np.stack(list(found.values()))).to(word)
    return len(found)


def read_word_vectors(path: str | os.PathLike[str], size: int) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """`(word, float32 [size])` of each line of a text file: word2vec's, with its header "count size", or GloVe's.

    Fields are told apart by single spaces. A word may have spaces in it, as some of GloVe's have.

    Raises:
        ArgumentError: the file is missing or empty, a line is not UTF-8, has other than `size` numbers or one that is
            not finite in float32, or the header counts other lines than there are.
    """
    promised: int | None = None
    count = number = 0
    try:
        with Path(path).open("rb") as file:
            for number, raw in enumerate(file, start=1):
                place = f"{path}, line {number}"
                try:
                    line = raw.decode().removesuffix("\n").removesuffix("\r").rstrip(" ")
                except UnicodeDecodeError as error:
                    raise ArgumentError(place, str(error), "text in UTF-8") from error
                if number == 1 and (header := re.fullmatch("([0-9]{1,15}) ([0-9]{1,15})", line)):
                    promised, width = map(int, header.groups())
                    if width != size:
                        raise ArgumentError(place, f"vectors of {width} numbers", f"{size}, the model's hidden_size")
                    continue
                word, vector = _vector(place, line, size)
                count += 1
                yield word, vector
    except OSError as error:
        raise ArgumentError(str(path), str(error.strerror), "a file of word vectors") from error
    if promised is not None and promised != count:
        raise ArgumentError(f"{path}, line {number}", f"the end after {count} vectors", f"{promised}, as line 1 says")
    if not count:
        raise ArgumentError(str(path), "no vectors", "at least one")


def _vector(place: str, line: str, size: int) -> tuple[str, npt.NDArray[np.float32]]:
    word, *numbers = line.rsplit(" ", size)
    expected = f"a word and {size} numbers, the model's hidden_size"
    if len(numbers) != size or not word:
        raise ArgumentError(place, f"{line!r:.80}", expected)
    if " " in word and _is_number(word.rsplit(" ", 1)[1]):
        raise ArgumentError(place, f"more than {size} numbers", expected)
    try:
        exact = np.array([float(text) for text in numbers])
    except ValueError as error:
        raise ArgumentError(place, f"{line!r:.80}", expected) from error
    with np.errstate(over="ignore"):
        vector = exact.astype(np.float32)
    if not np.isfinite(vector).all():
        raise ArgumentError(place, f"{line!r:.80}", f"{expected}, finite in float32")
    return word, vector


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
