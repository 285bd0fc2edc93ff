"""What is found of texts, embeddings or labels: by which model, and as which columns."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fastbert.ray.outputs import Json
from fastbert.tasks.classify import Classification, TextClassifier
from fastbert.tasks.encode import TextEncoder
from fastbert.tasks.results import as_json


class Embeddings:
    """The column "embedding": float32 [width] of each text.

    Args:
        folder, dtype, device: as in `TextEncoder.from_folder`.
        options: of `TextEncoder.encode`.
    """

    names: tuple[str, ...] = ("embedding",)

    def __init__(self, folder: str, dtype: Any, device: str, options: dict[str, Any]) -> None:
        self._encoder = TextEncoder.from_folder(folder, dtype=dtype, device=device)
        self._options = options
        self._width = self._encoder.width(options["pooling"], options["truncate_dim"])

    def of(self, parts: Generator[list[str], None, None]) -> Iterator[npt.NDArray[np.float32]]:
        """Of each part float32 [texts, width]; the next one is taken before."""
        return self._encoder.encode_parts(parts, **self._options)

    def types(self) -> list[Any]:
        """An Arrow list of `width` float32."""
        import pyarrow

        return [pyarrow.list_(pyarrow.float32(), self._width)]

    def arrays(self, found: npt.NDArray[np.float32]) -> list[Any]:
        """As `types` says."""
        import pyarrow

        return [pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(found.reshape(-1)), self._width)]

    def values(self, found: npt.NDArray[np.float32]) -> Iterator[list[Any]]:
        """A list of numbers."""
        for embedding in found.tolist():
            yield [Json(as_json(embedding))]


class Labels:
    """The columns "label" and "probabilities", of every label, of each text.

    Args:
        folder, dtype, device: as in `TextClassifier.from_folder`.
        options: of `TextClassifier.classify`.
    """

    names: tuple[str, ...] = ("label", "probabilities")

    def __init__(self, folder: str, dtype: Any, device: str, options: dict[str, Any]) -> None:
        self._classifier = TextClassifier.from_folder(folder, dtype=dtype, device=device)
        self._options = options
        self._labels = list(self._classifier.model.head_config.labels)

    def of(self, parts: Generator[list[str], None, None]) -> Iterator[list[Classification]]:
        """Of each part a classification a text."""
        for part in parts:
            yield self._classifier.classify(part, **self._options)

    def types(self) -> list[Any]:
        """An Arrow string, and a struct with a float32 for each label."""
        import pyarrow

        return [pyarrow.string(), pyarrow.struct([(label, pyarrow.float32()) for label in self._labels])]

    def arrays(self, found: list[Classification]) -> list[Any]:
        """As `types` says."""
        import pyarrow

        likely = [[one.probabilities[label] for one in found] for label in self._labels]
        fields = [pyarrow.array(numbers, pyarrow.float32()) for numbers in likely]
        labels = pyarrow.array([one.label for one in found], pyarrow.string())
        return [labels, pyarrow.StructArray.from_arrays(fields, self._labels)]

    def values(self, found: list[Classification]) -> Iterator[list[Any]]:
        """A string, and an object with a number for each label, the likeliest first."""
        for one in found:
            yield [one.label, one.probabilities]
