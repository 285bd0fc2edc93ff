"""Texts to embeddings."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbert.backend import first_device, usable_device
from fastbert.checkpoints.files import checkpoint_folder
from fastbert.checkpoints.load import load
from fastbert.checkpoints.sentence import Recipe, read_recipe
from fastbert.errors import ArgumentError, CheckpointError
from fastbert.families.quantization import in_int8
from fastbert.model.body import EncoderModel
from fastbert.model.sentence import SIMILARITIES, Embedder, Mode, Truncate
from fastbert.packing import Packing
from fastbert.tasks.loading import DTYPES, DTypeName, parameter_dtype, quantized
from fastbert.tasks.max_length import tokens_at_most, warn_of_cuts
from fastbert.tasks.results import text_results
from fastbert.text.checks import Text, check_whole, items_of
from fastbert.text.tokenizer import Tokenizer
from fastbert.text.tokens import Tokens


def encode(
    texts: Iterable[Text],
    model: str | os.PathLike[str] | TextEncoder,
    *,
    dtype: DTypeName | None = None,
    pooling: Mode | None = None,
    normalize: bool | None = None,
    max_length: int | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    truncate_dim: int | None = None,
    batch_tokens: int | None = None,
    progress: bool = False,
) -> npt.NDArray[np.float32]:
    """Embeddings of texts, float32 `[texts, width]`, in the order of `texts`.

    Args:
        texts: strings, or pairs of strings.
        model: a Hugging Face checkpoint folder, loaded anew by each call; or a `TextEncoder`, loaded once.
        dtype: what the model computes in, for a folder as in `TextEncoder.from_folder`; a `TextEncoder` has its own
            already.

    See `TextEncoder.encode` for the other arguments.

    Raises:
        ArgumentError: an argument is not as described; `texts[i]` names the item.
        CheckpointError: the folder is not a checkpoint fastbert reads.
    """
    if not isinstance(model, TextEncoder):
        model = TextEncoder.from_folder(model, dtype=dtype)
    elif dtype is not None and (DTYPES.get(dtype), dtype == "int8") != (model.dtype, in_int8(model.model.encoder)):
        own = "int8" if in_int8(model.model.encoder) else model.dtype
        raise ArgumentError("dtype", repr(dtype), f"that of the TextEncoder, {own}", "Leave dtype out.")
    return model.encode(
        texts,
        pooling=pooling,
        normalize=normalize,
        max_length=max_length,
        prompt=prompt,
        prompt_name=prompt_name,
        truncate_dim=truncate_dim,
        batch_tokens=batch_tokens,
        progress=progress,
    )


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A model and its tokenizer, loaded once to encode often.

    Attributes:
        model: in eval mode.
        tokenizer: of the same checkpoint.
        recipe: how texts become embeddings, where a call does not say.
    """

    model: EncoderModel
    tokenizer: Tokenizer
    recipe: Recipe = field(default_factory=Recipe)

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: DTypeName | None = None,
        device: torch.device | str | None = None,
    ) -> TextEncoder:
        """Load a Hugging Face checkpoint folder, or one of sentence-transformers.

        Args:
            folder: holds config.json, weights, and tokenizer.json or vocab.txt; or modules.json, which names the
                folders of a transformer, its pooling, and the Dense, LayerNorm and Normalize behind it.
            dtype: "fp32", "bf16", "fp16", or "int8" on a CPU: `fastbert.quantize` of the model in float32. By default
                "fp16" on a GPU and "fp32" on a CPU. On a CPU "fp16" is float32, with a warning, and so is "bf16" where
                the CPU has no instructions for it.
            device: where to compute; the first GPU, or the CPU where there is none.

        Raises:
            ArgumentError: `dtype` is none of these, or torch can't use `device` here.
            BackendError: the device has no int8.
            CheckpointError: the folder is not a checkpoint fastbert reads.
        """
        device = first_device() if device is None else usable_device(device)
        transformer, recipe = read_recipe(checkpoint_folder(folder), device)
        model = load(transformer, dtype=parameter_dtype(dtype, transformer, device), device=device)
        try:
            (recipe.embedder or Embedder()).width(model.config.hidden_size)
        except ArgumentError as error:
            raise CheckpointError(f"{folder}: {error.argument}", error.got, error.expected) from error
        tokenizer = Tokenizer.from_folder(transformer)
        if recipe.lower_case:
            tokenizer.lower_case()
        return cls(quantized(model, dtype), tokenizer, recipe)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's parameters."""
        return next(self.model.parameters()).dtype

    def encode(
        self,
        texts: Iterable[Text],
        *,
        pooling: Mode | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Embeddings of texts, float32 `[texts, width]`, in the order of `texts`.

        Args:
            texts: strings, or pairs of strings.
            pooling: how the rows of a text become one: their mean, their maximum, the first one ("cls"), or what else
                sentence-transformers has. By default what the folder says, and the mean where it says nothing; another
                than the folder's is taken, with a warning. The folder's Dense and LayerNorm follow in any case.
            normalize: scale each embedding to length 1 in the end (a zero embedding stays zero), or don't. By default
                what the folder's modules do, and True where it has none.
            max_length: most tokens of a text, special ones included; the rest is cut off, and a warning counts the
                texts that were this long. By default what the folder says, and at most the model's positions.
            prompt: what is put before each text (before the first one of a pair).
            prompt_name: the name of one of the folder's prompts. Without it and `prompt`, the folder's default one.
            truncate_dim: how many columns of an embedding to keep, the first ones, for models that were trained for it
                (Matryoshka). As in sentence-transformers they are cut off after the folder's modules, so that after
                its Normalize they have no length of 1 unless `normalize` is True. By default what the folder says.
            batch_tokens: most tokens of a batch (a longer text is a batch of its own); by default as many as the last
                cache of a CPU holds the activations of.
            progress: show a bar on stderr, if the work is long.

        Raises:
            ArgumentError: an argument is not as described; `texts[i]` names the item.
            BackendError: a result is NaN or infinite; `texts[i]` names the text.
        """
        how = self._how(pooling, normalize, max_length, prompt, prompt_name, truncate_dim)
        tokens = self._tokens(texts, how)
        warn_of_cuts(tokens.full(how.max_length), how.max_length)
        return self._embed(tokens, how.embedder, batch_tokens, "encoding" if progress else None)

    def encode_query(
        self,
        texts: Iterable[Text],
        *,
        pooling: Mode | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> npt.NDArray[np.float32]:
        """`encode` of what is searched for, as sentence-transformers does it: by the folder's prompt "query".

        Where the folder has none, and a call names none, nothing is put before the texts; not the default prompt.
        """
        return self.encode(
            texts,
            pooling=pooling,
            normalize=normalize,
            max_length=max_length,
            prompt=self._prompt_of("query", prompt, prompt_name),
            prompt_name=prompt_name,
            truncate_dim=truncate_dim,
            batch_tokens=batch_tokens,
            progress=progress,
        )

    def encode_document(
        self,
        texts: Iterable[Text],
        *,
        pooling: Mode | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> npt.NDArray[np.float32]:
        """`encode` of what is searched in, as sentence-transformers does it: by the folder's prompt "document".

        Where the folder has none, and a call names none, nothing is put before the texts; not the default prompt. A
        folder may have "passage" or "corpus" in its place. sentence-transformers means to take them then, and up to
        6.2 does not, because it adds an empty "document" to every folder's prompts. So it is here, and a warning says
        which one to name.
        """
        prompts = self.recipe.prompts
        other = next((name for name in ("passage", "corpus") if prompts.get(name)), None)
        if other is not None and "document" not in prompts and prompt is None and prompt_name is None:
            warnings.warn(
                f"encode_document puts nothing before the texts, because the folder has no prompt 'document'. It has "
                f"{other!r}: say prompt_name={other!r} for that one, or prompt='' for none.",
                stacklevel=2,
            )
        return self.encode(
            texts,
            pooling=pooling,
            normalize=normalize,
            max_length=max_length,
            prompt=self._prompt_of("document", prompt, prompt_name),
            prompt_name=prompt_name,
            truncate_dim=truncate_dim,
            batch_tokens=batch_tokens,
            progress=progress,
        )

    def similarity(self, a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """How alike embeddings are, float32 `[n, m]`: more is more alike.

        It is the folder's `similarity_fn_name`: the cosine (by default), the dot product, or the euclidean or manhattan
        distance with a minus before it.

        Args:
            a: embeddings `[n, width]`, or one `[width]`.
            b: embeddings `[m, width]`, or one `[width]`.

        Raises:
            ArgumentError: one of them is no such array, or they differ in their width.
        """
        for name, x in (("a", a), ("b", b)):
            if not isinstance(x, np.ndarray) or x.ndim not in (1, 2) or x.dtype.kind != "f":
                got = f"{x.dtype} of shape {x.shape}" if isinstance(x, np.ndarray) else f"a {type(x).__name__}"
                raise ArgumentError(name, got, "an array of embeddings, floating [texts, width] or [width]")
        if a.shape[-1] != b.shape[-1]:
            raise ArgumentError("b", f"a width of {b.shape[-1]}", f"{a.shape[-1]}, the width of a")
        rows = [torch.from_numpy(np.atleast_2d(x).astype(np.float32)) for x in (a, b)]
        return SIMILARITIES[self.recipe.similarity](*rows).numpy()

    def encode_stream(
        self,
        texts: Iterable[Text],
        *,
        texts_at_once: int = 8192,
        pooling: Mode | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> Iterator[npt.NDArray[np.float32]]:
        """`encode` of more texts than memory holds: an array of each `texts_at_once` of them, in their order.

        `texts` is read in the thread that asks for the arrays: the next ones before an array is given, so that a thread
        of ours tokenises them while these are encoded. If `texts` raises, what came before is encoded first. Closing
        the stream closes `texts`, if that is a generator. See `encode` for the other arguments; a progress bar is that
        of an array, and the warning of texts that were cut comes at the end.

        Raises:
            ArgumentError: as `encode`, where `texts[i]` counts from the first of an array; or `texts_at_once` is not
                positive.
        """
        check_whole("texts_at_once", texts_at_once)
        if not 1 <= texts_at_once <= sys.maxsize:
            raise ArgumentError("texts_at_once", texts_at_once, "a positive number of texts")
        return self.encode_parts(
            _parts(items_of(texts), texts_at_once),
            pooling=pooling,
            normalize=normalize,
            max_length=max_length,
            prompt=prompt,
            prompt_name=prompt_name,
            truncate_dim=truncate_dim,
            batch_tokens=batch_tokens,
            progress=progress,
        )

    def encode_parts(
        self,
        parts: Generator[Sequence[Text], None, None],
        *,
        pooling: Mode | None = None,
        normalize: bool | None = None,
        max_length: int | None = None,
        prompt: str | None = None,
        prompt_name: str | None = None,
        truncate_dim: int | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> Iterator[npt.NDArray[np.float32]]:
        """`encode_stream` of texts that come in parts: an array of each.

        A part is taken before the array of the one before it is given. An empty part has no array: with it a source
        says that the next one may be long in coming, and nothing is held back. See `encode` for the other arguments.

        Raises:
            ArgumentError: as `encode`, where `texts[i]` counts from the first of a part.
        """
        how = self._how(pooling, normalize, max_length, prompt, prompt_name, truncate_dim)
        return self._stream(parts, how, batch_tokens, "encoding" if progress else None)

    def embedder(
        self, pooling: Mode | None = None, normalize: bool | None = None, truncate_dim: int | None = None
    ) -> Embedder:
        """What makes embeddings of hidden states, where `encode` is given these arguments; raises as it does."""
        if pooling is not None and pooling not in get_args(Mode):
            raise ArgumentError("pooling", repr(pooling), f"one of {', '.join(get_args(Mode))}")
        if normalize is not None and not isinstance(normalize, bool | np.bool_):
            raise ArgumentError("normalize", repr(normalize), "True, False, or None for what the folder says")
        own = self.recipe.embedder or Embedder()
        layers = own.layers
        if normalize is not None and not normalize and layers[-1:] == (F.normalize,):
            layers = layers[:-1]
        embedder = Embedder(own.pooling if pooling is None else (pooling,), layers)
        width = embedder.width(self.model.config.hidden_size)
        if truncate_dim is not None:
            check_whole("truncate_dim", truncate_dim)
            if not 1 <= truncate_dim <= width:
                raise ArgumentError("truncate_dim", truncate_dim, f"1 to {width}, the columns of an embedding")
        columns = self.recipe.truncate_dim if truncate_dim is None else truncate_dim
        if columns is not None:
            layers = (*layers, Truncate(columns))
        if (self.recipe.embedder is None if normalize is None else normalize) and layers[-1:] != (F.normalize,):
            layers = (*layers, F.normalize)
        return replace(embedder, layers=layers)

    def width(self, pooling: Mode | None = None, truncate_dim: int | None = None) -> int:
        """Columns of an embedding, where `encode` is given these arguments."""
        return self.embedder(pooling, None, truncate_dim).width(self.model.config.hidden_size)

    def _stream(
        self,
        parts: Generator[Sequence[Text], None, None],
        how: _How,
        batch_tokens: int | None,
        description: str | None,
    ) -> Iterator[npt.NDArray[np.float32]]:
        full = 0
        with closing(parts), ThreadPoolExecutor(1) as tokenising:
            waiting: Future[Tokens] | None = None
            for part in chain(parts, [()]):
                following = tokenising.submit(self._tokens, part, how) if part else None
                if waiting is not None:
                    tokens = waiting.result()
                    full += tokens.full(how.max_length)
                    yield self._embed(tokens, how.embedder, batch_tokens, description)
                waiting = following
        warn_of_cuts(full, how.max_length)

    def _how(
        self,
        pooling: Mode | None,
        normalize: bool | None,
        max_length: int | None,
        prompt: str | None,
        prompt_name: str | None,
        truncate_dim: int | None,
    ) -> _How:
        """What a call asks for, and the folder's where it does not; checked before the work."""
        prompts = self.recipe.prompts
        for argument, value in (("prompt", prompt), ("prompt_name", prompt_name)):
            if not isinstance(value, str | None):
                raise ArgumentError(argument, repr(value), "a string, or None")
        if prompt is not None and prompt_name is not None:
            raise ArgumentError("prompt_name", repr(prompt_name), "None where prompt is given")
        name = prompt_name if prompt_name is not None else self.recipe.prompt_name
        if prompt is None and name is not None:
            if name not in prompts:
                known = ", ".join(prompts) or "(it has none)"
                raise ArgumentError("prompt_name", repr(name), f"one of the folder's prompts: {known}")
            prompt = prompts[name]
        embedder = self.embedder(pooling, normalize, truncate_dim)
        own = self.recipe.embedder
        if own is not None and embedder.pooling != own.pooling:
            folders = ", ".join(map(repr, own.pooling))
            warnings.warn(f"pooling={pooling!r} is taken in place of the folder's {folders}", stacklevel=3)
        longest = tokens_at_most(max_length, self.tokenizer, self.model.config, self.recipe.max_length)
        return _How(embedder, longest, prompt or "")

    def _prompt_of(self, name: str, prompt: str | None, prompt_name: str | None) -> str | None:
        """What a call says, and where it says nothing the folder's prompt of this name, or an empty one."""
        return self.recipe.prompts.get(name, "") if prompt is None and prompt_name is None else prompt

    def _tokens(self, texts: Iterable[Text], how: _How) -> Tokens:
        if how.prompt:
            texts = [_after(how.prompt, text) for text in items_of(texts)]
        return self.tokenizer.encode(texts, how.max_length)

    def _embed(
        self, tokens: Tokens, embedder: Embedder, batch_tokens: int | None, description: str | None
    ) -> npt.NDArray[np.float32]:
        def embeddings(ids: Tensor, types: Tensor | None, packing: Packing) -> Tensor:
            out = self.model(ids, token_type_ids=types, packing=packing, output_pooled=False)
            return embedder(out.last_hidden_state, packing)

        width = embedder.width(self.model.config.hidden_size)
        return text_results(self.model, tokens, embeddings, width, batch_tokens, description)


@dataclass(frozen=True, eq=False)
class _How:
    """What one call of `TextEncoder` does."""

    embedder: Embedder
    max_length: int
    prompt: str


def _after(prompt: str, text: Any) -> Any:
    """`text`, or the first one of a pair, with a prompt before it; what is no text stays, and is an error later."""
    if isinstance(text, str):
        return prompt + text
    if isinstance(text, tuple | list) and text and isinstance(text[0], str):
        return (prompt + text[0], *text[1:])
    return text


def _parts(texts: Generator[Text, None, None], texts_at_once: int) -> Generator[list[Text], None, None]:
    """Lists of so many texts, the last one of fewer; if `texts` raises, what it gave before, and an empty list."""
    with closing(texts):
        while True:
            part: list[Text] = []
            try:
                for text in islice(texts, texts_at_once):
                    part.append(text)
            except Exception:
                yield part
                yield []
                raise
            if not part:
                return
            yield part
