"""scikit-learn's transformer: texts to embeddings, as a step of a pipeline."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fastbert.installed import missing
from fastbert.model.sentence import Mode
from fastbert.tasks.encode import TextEncoder
from fastbert.tasks.loading import DTypeName
from fastbert.text.checks import Text

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils.validation import check_is_fitted
except ImportError as error:
    raise missing("fastbert.sklearn", "scikit-learn", "sklearn", error) from error


class TextEmbedder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Embeds texts with the model of a checkpoint folder, which is not trained.

    `fit` loads the folder, so a clone is small and loads it anew. A fitted one is pickled with its weights, and needs
    the folder no more.

    Args:
        model: a checkpoint folder, as `TextEncoder.from_folder` takes it.
        dtype: what the model computes in, as there.
        device: where, as there.
        pooling, normalize, max_length, prompt, prompt_name, truncate_dim, batch_tokens: as `TextEncoder.encode` takes
            them.

    Attributes:
        encoder_: the `TextEncoder`, once it is fitted.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        dtype: DTypeName | None = None,
        device: torch.device | str | None = None,
        pooling: Mode | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.device = device
        self.pooling = pooling
        self.normalize = normalize
        self.max_length = max_length
        self.prompt = prompt
        self.prompt_name = prompt_name
        self.truncate_dim = truncate_dim
        self.batch_tokens = batch_tokens

    def fit(self, X: object, y: object = None) -> TextEmbedder:  # noqa: N803 - scikit-learn's name
        """Load the folder. X and y are not looked at.

        Raises:
            ArgumentError: `dtype`, `device`, `pooling` or `truncate_dim` is not as described.
            BackendError: the device has no int8.
            CheckpointError: the folder is not a checkpoint fastbert reads.
        """
        self.encoder_ = TextEncoder.from_folder(self.model, dtype=self.dtype, device=self.device)
        self._n_features_out = self.encoder_.width(self.pooling, self.truncate_dim)
        return self

    def transform(self, X: Iterable[Text]) -> npt.NDArray[np.float32]:  # noqa: N803
        """Embeddings, float32 `[texts, width]`.

        Args:
            X: strings, or pairs of strings: a list, an array of one dimension, a column of a data frame.

        Raises:
            NotFittedError: `fit` was not called.
            ArgumentError: a text or a setting is not as described.
            BackendError: a result is NaN or infinite; `texts[i]` names the text.
        """
        check_is_fitted(self)
        return self.encoder_.encode(
            X,
            pooling=self.pooling,
            normalize=self.normalize,
            max_length=self.max_length,
            prompt=self.prompt,
            prompt_name=self.prompt_name,
            truncate_dim=self.truncate_dim,
            batch_tokens=self.batch_tokens,
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        return tags
