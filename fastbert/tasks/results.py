"""A tokenised corpus run through a model batch by batch: what came out, in the order of the texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastbert.errors import BackendError
from fastbert.model.body import EncoderModel
from fastbert.model.heads import EncoderForSequenceClassification, HeadModel
from fastbert.packing import Packing
from fastbert.tasks.batch_tokens import default_batch_tokens
from fastbert.tasks.max_length import tokens_at_most, warn_of_cuts
from fastbert.text.batches import batches
from fastbert.text.checks import Text
from fastbert.text.tokenizer import Tokenizer
from fastbert.text.tokens import Tokens

# Of the packed ids, token types and packing of a batch, some rows.
Compute: TypeAlias = Callable[[Tensor, Tensor | None, Packing], Tensor]

LONG_WORK = 16  # batches; less is done before a progress bar could be read


def answers(
    model: EncoderForSequenceClassification,
    tokenizer: Tokenizer,
    texts: Iterable[Text],
    activation: Callable[[Tensor], Tensor],
    max_length: int | None,
    batch_tokens: int | None,
    description: str | None,
) -> npt.NDArray[np.float32]:
    """What `activation` makes of the logits of each text, float32 `[texts, outputs]`, none of it NaN or infinite.

    See `TextClassifier.classify` for the arguments and for the errors.
    """

    def answer(ids: Tensor, types: Tensor | None, packing: Packing) -> Tensor:
        return activation(model(ids, token_type_ids=types, packing=packing).logits.float())

    max_length = tokens_at_most(max_length, tokenizer, model.config)
    tokens = tokenizer.encode(texts, max_length)
    warn_of_cuts(tokens.full(max_length), max_length, stacklevel=4)
    return text_results(model, tokens, answer, len(model.head_config.labels), batch_tokens, description)


def text_results(
    model: EncoderModel | HeadModel,
    tokens: Tokens,
    compute: Compute,
    width: int,
    batch_tokens: int | None,
    description: str | None,
) -> npt.NDArray[np.float32]:
    """Of each text the row that `compute` makes, float32 `[texts, width]`, in the order of the texts.

    See `results` for the arguments.

    Raises:
        BackendError: a row has NaN or infinity.
    """
    shape = (len(tokens.lengths), width)
    order, found = results(model, tokens, compute, shape, batch_tokens, description)
    return _of_texts(order, found, model)


def results(
    model: EncoderModel | HeadModel,
    tokens: Tokens,
    compute: Compute,
    shape: tuple[int, int],
    batch_tokens: int | None,
    description: str | None,
) -> tuple[list[int], npt.NDArray[np.float32]]:
    """What `compute` makes of each batch, one after the other, `[n, width]`; and the order of the texts in it.

    A GPU works through all batches by itself: the host waits for it once, at the end.

    Args:
        model: whose batches they are.
        compute: `[n of this batch, width]`.
        shape: of all results.
        description: shown beside a bar, if the work is long; None for no bar.
    """
    order: list[int] = []
    device = next(model.parameters()).device
    gathered = torch.empty(shape, dtype=torch.float32, device=device)
    end = 0
    tokens.check_fit(model.config)
    groups = batches(tokens.lengths, default_batch_tokens(model, device) if batch_tokens is None else batch_tokens)
    for rows in groups if description is None or len(groups) <= LONG_WORK else _shown(groups, description):
        with torch.inference_mode():
            ids, types, packing = tokens.batch(rows, device)
            found = compute(ids, types, packing)
        gathered[end : end + len(found)] = found
        end += len(found)
        order += rows
    return order, gathered.cpu().numpy()


def as_json(numbers: float | list[float]) -> str:
    """A float32, or a list of them, as JSON has it: 9 digits give each back exactly."""
    if isinstance(numbers, float):
        return f"{numbers:.9g}"
    return f"[{', '.join([f'{number:.9g}' for number in numbers])}]"


def not_finite(text: int, model: EncoderModel | HeadModel) -> BackendError:
    """The error of a text, by its number, whose result is NaN or infinite."""
    dtype = next(model.parameters()).dtype
    return BackendError(
        f"texts[{text}]",
        f"a result of NaN or infinity in {dtype}",
        "finite numbers",
        "Compute in float32, since activations overflow in narrower dtypes; if it is that, the weights are broken.",
    )


def _of_texts(
    order: list[int], found: npt.NDArray[np.float32], model: EncoderModel | HeadModel
) -> npt.NDArray[np.float32]:
    """Of rows in this order those in the order of the texts, none of which is NaN or infinite."""
    results = np.empty_like(found)
    results[order] = found
    if not np.isfinite(results).all():
        raise not_finite(int((~np.isfinite(results)).any(1).argmax()), model)
    return results


def _shown(groups: list[list[int]], description: str) -> Iterable[list[int]]:
    from rich.console import Console
    from rich.progress import track

    return track(groups, description=description, console=Console(stderr=True), transient=True)
