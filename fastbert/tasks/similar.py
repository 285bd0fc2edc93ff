"""The nearest texts to a query, by exact search over embeddings, which may be kept in a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fastbert.errors import ArgumentError
from fastbert.families.quantization import in_int8
from fastbert.installed import optional
from fastbert.model.sentence import SIMILARITIES
from fastbert.tasks.encode import TextEncoder
from fastbert.tasks.fingerprint import fingerprint, fingerprint_of_texts
from fastbert.tasks.hits import Hit, best_rows, hits
from fastbert.tasks.max_length import tokens_at_most
from fastbert.text.checks import check_count, check_string, strings_of
from fastbert.writing import check_replaceable, replacing

Library = Literal["torch", "faiss", "usearch"]
# Above so many texts faiss or usearch searches, where one is installed; and how many scores torch makes at once.
MANY_TEXTS, SCORES_AT_ONCE = 1_000_000, 2**24
ROUNDING = 1e-5  # of the largest score: what is so near to the last one that is wanted is looked at once more
# What each library calls how alike embeddings are; it is one product of unit vectors for the cosine.
_FAISS = {"cosine": "METRIC_INNER_PRODUCT", "dot": "METRIC_INNER_PRODUCT", "euclidean": "METRIC_L2"}
_USEARCH = {"cosine": "IP", "dot": "IP", "euclidean": "L2sq"}

_FORMAT = "fastbert embeddings 1"


def similar(
    query: str,
    texts: Iterable[str],
    model: str | os.PathLike[str] | TextEncoder,
    *,
    top_k: int = 10,
    embeddings: str | os.PathLike[str] | None = None,
    library: Library | None = None,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> list[Hit]:
    """The texts nearest to a query, the nearest first.

    Args:
        query: a string; for many of them make a `TextIndex` once.
        texts: strings.
        model: a checkpoint folder, loaded anew by each call; or a `TextEncoder`, loaded once.

    See `TextIndex.of` and `TextIndex.search` for the other arguments and for the errors.
    """
    check_string("query", query)
    if not isinstance(model, TextEncoder):
        model = TextEncoder.from_folder(model)
    index = TextIndex.of(
        texts, model, embeddings=embeddings, max_length=max_length, batch_tokens=batch_tokens, progress=progress
    )
    [found] = index.search([query], top_k=top_k, library=library, batch_tokens=batch_tokens)
    return found


@dataclass(frozen=True, eq=False)
class TextIndex:
    """Texts and their embeddings, made once to be searched often.

    Attributes:
        encoder: of the embeddings, and of queries.
        texts: what is searched.
        embeddings: float32 `[texts, width]`.
        max_length: most tokens of a text or a query, special ones included.
    """

    encoder: TextEncoder
    texts: Sequence[str]
    embeddings: npt.NDArray[np.float32]
    max_length: int

    @classmethod
    def of(
        cls,
        texts: Iterable[str],
        encoder: TextEncoder,
        *,
        embeddings: str | os.PathLike[str] | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> TextIndex:
        """Embed texts, by the folder's prompt for documents; or read their embeddings from the file that keeps them.

        Args:
            texts: strings.
            encoder: see `TextEncoder.from_folder`.
            embeddings: a file. If it is there, it must have been made of these very texts by this very model; else it
                is made, in the format of safetensors.
            max_length: as `TextEncoder.encode`.
            batch_tokens: as there.
            progress: as there.

        Raises:
            ArgumentError: an argument is not as described; `texts[i]` names the item. Or the file is damaged, or was
                made of other texts or by another model, dtype or `max_length`.
            BackendError: a result is NaN or infinite.
        """
        most = tokens_at_most(max_length, encoder.tokenizer, encoder.model.config, encoder.recipe.max_length)
        held = strings_of(texts, "texts")
        path = None if embeddings is None else Path(embeddings)
        made: Mapping[str, str] = {} if path is None else _described(held, encoder, most)
        if path is not None:
            if path.exists():
                return cls(encoder, held, _read(path, made, len(held), encoder.width()), most)
            check_replaceable(path)
        rows = encoder.encode_document(held, max_length=max_length, batch_tokens=batch_tokens, progress=progress)
        if path is not None:
            with replacing(path) as temporary:
                save_file({"embeddings": rows}, temporary, dict(made))
        return cls(encoder, held, rows, most)

    def search(
        self,
        queries: Iterable[str],
        *,
        top_k: int = 10,
        library: Library | None = None,
        batch_tokens: int | None = None,
    ) -> list[list[Hit]]:
        """The texts nearest to each query, the nearest first; of equal ones the earlier.

        Every text is looked at: the search is exact. The score is the folder's `similarity_fn_name`, by default the
        cosine; see `TextEncoder.similarity`.

        Args:
            queries: strings; they get the folder's prompt for queries.
            top_k: how many texts; all, where there are fewer.
            library: what searches: "torch"; or "faiss" or "usearch", which know no manhattan distance. By default torch
                up to a million texts, and above that one of the others where it is installed.
            batch_tokens: most tokens of a batch of queries; as `TextEncoder.encode`.

        Raises:
            ArgumentError: an argument is not as described; `queries[i]` names the item.
            BackendError: a result is NaN or infinite.
            MissingError: `library` is not installed.
        """
        check_count("top_k", top_k)
        if library is not None and library not in get_args(Library):
            raise ArgumentError("library", repr(library), f"one of {', '.join(get_args(Library))}")
        name = self.encoder.recipe.similarity
        if library in ("faiss", "usearch") and name not in _FAISS:
            raise ArgumentError("library", repr(library), f"'torch', for the {name} distance")
        given = strings_of(queries, "queries")
        rows = self.encoder.encode_query(given, max_length=self.max_length, batch_tokens=batch_tokens)
        rows = _unit(rows) if name == "cosine" else rows
        count = min(top_k, len(self.texts))
        if not count or not given:  # of which usearch says that memory is short
            return [[] for _ in given]
        search = {"torch": self._by_torch, "faiss": self._by_faiss, "usearch": self._by_usearch}
        candidates = search[library or self._library()](rows, count)
        found = []
        for row, places in zip(rows, candidates, strict=True):
            scores = self._scores_alone(row, self._rows[places])  # the same ones, whatever found them
            best = np.lexsort((places, -scores))[:count]
            found.append(hits(places[best], scores[best], self.texts))
        return found

    def _library(self) -> Library:
        if len(self.texts) > MANY_TEXTS and self.encoder.recipe.similarity in _FAISS:
            if find_spec("faiss") is not None:
                return "faiss"
            if find_spec("usearch") is not None:
                return "usearch"
        return "torch"

    @cached_property
    def _rows(self) -> npt.NDArray[np.float32]:
        """The embeddings as they are compared."""
        return _unit(self.embeddings) if self.encoder.recipe.similarity == "cosine" else self.embeddings

    def _scores(self, a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Of rows as they are compared, float32 `[n, m]`."""
        name = self.encoder.recipe.similarity
        return SIMILARITIES["dot" if name == "cosine" else name](torch.from_numpy(a), torch.from_numpy(b)).numpy()

    def _scores_alone(self, a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Of one row and of float32 `[m, width]`; a product of matrices rounds equal rows otherwise by their place."""
        one, rows = a.astype(np.float64), b.astype(np.float64)
        name = self.encoder.recipe.similarity
        if name == "manhattan":
            found = -np.abs(rows - one).sum(axis=1)
        elif name == "euclidean":
            found = -np.sqrt(np.square(rows - one).sum(axis=1))
        else:
            found = (rows * one).sum(axis=1)
        return found.astype(np.float32)

    def _by_torch(self, rows: npt.NDArray[np.float32], count: int) -> list[npt.NDArray[np.int64]]:
        at_once = max(SCORES_AT_ONCE // len(self.texts), 1)
        found = []
        for start in range(0, len(rows), at_once):
            for scores in self._scores(rows[start : start + at_once], self._rows):
                least = scores[best_rows(scores, count)[-1]]
                found.append(np.flatnonzero(scores >= least - ROUNDING * np.abs(scores).max()))
        return found

    def _by_faiss(self, rows: npt.NDArray[np.float32], count: int) -> Iterable[npt.NDArray[np.int64]]:
        faiss: Any = optional("faiss", "search", "to search", "faiss-cpu")
        metric = getattr(faiss, _FAISS[self.encoder.recipe.similarity])
        _, places = faiss.knn(rows, self._rows, count, metric=metric)
        return places

    def _by_usearch(self, rows: npt.NDArray[np.float32], count: int) -> Iterable[npt.NDArray[np.int64]]:
        usearch: Any = optional("usearch.index", "search", "to search")
        metric = getattr(usearch.MetricKind, _USEARCH[self.encoder.recipe.similarity])
        found = usearch.search(self._rows, rows, count, metric, exact=True)
        return np.atleast_2d(found.keys).astype(np.int64)  # of one query it has no axis


def _unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return F.normalize(torch.from_numpy(rows)).numpy()


def _described(texts: Sequence[str], encoder: TextEncoder, max_length: int) -> dict[str, str]:
    """What a file of embeddings says of how they were made, by what messages call it."""
    return {
        "format": _FORMAT,
        "dtype": "int8" if in_int8(encoder.model.encoder) else str(encoder.dtype),
        "max_length": str(max_length),
        "model": fingerprint(encoder),
        "texts": fingerprint_of_texts(texts),
    }


def _read(path: Path, wanted: Mapping[str, str], rows: int, width: int) -> npt.NDArray[np.float32]:
    if not path.is_file():  # to open a pipe waits for its writer
        raise ArgumentError("embeddings", f"{path}, a folder, pipe or device", "a file of embeddings", "Name another.")
    try:
        with safe_open(path, "np") as file:
            made = file.metadata() or {}
            held = file.get_slice("embeddings") if made.get("format") == _FORMAT else None
            kind = None if held is None else (held.get_dtype(), tuple(held.get_shape()))
            found = file.get_tensor("embeddings") if kind == ("F32", (rows, width)) else None
    except (SafetensorError, OSError) as error:
        raise ArgumentError("embeddings", f"{path}: {error}", "a file of embeddings that is whole", _ANEW) from error
    if kind is None:
        raise ArgumentError("embeddings", f"{path}, which is something else", "a file of embeddings", "Name another.")
    for name, value in wanted.items():
        if made.get(name) != value:
            got, expected = f"{path}, made of other texts", "the embeddings of these"
            if name == "model":
                got, expected = f"{path}, made by another model", "the embeddings of this one"
            elif name != "texts":
                got, expected = f"{path}, made with {name}={made.get(name)}", f"{name}={value}"
            raise ArgumentError("embeddings", got, expected, _ANEW)
    if found is None:
        got = f"{path} with {kind[0]} {kind[1]}"
        raise ArgumentError("embeddings", got, f"F32 {(rows, width)}, as its texts say", _ANEW)
    if not np.isfinite(found).all():
        raise ArgumentError("embeddings", f"{path} with NaN or infinity", "finite numbers", _ANEW)
    return found


_ANEW = "Delete the file to have it made anew, or name another."
