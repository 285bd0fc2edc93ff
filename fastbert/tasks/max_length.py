"""How long a text may be, in tokens, and the warning of texts that were cut."""

from __future__ import annotations

import warnings

from fastbert.config import EncoderConfig
from fastbert.errors import ArgumentError
from fastbert.text.checks import check_whole
from fastbert.text.tokenizer import Tokenizer


def tokens_at_most(
    max_length: int | None, tokenizer: Tokenizer, config: EncoderConfig, recipe_limit: int | None = None
) -> int:
    """`max_length`, checked; where it is None `recipe_limit`, else what the tokenizer allows, within the positions.

    Raises:
        ArgumentError: `max_length` is no whole number, or more than the model's positions.
    """
    positions = config.longest
    if max_length is None:
        return min(recipe_limit or tokenizer.max_length or positions, positions)
    check_whole("max_length", max_length)
    if max_length > positions:
        raise ArgumentError("max_length", max_length, f"at most the model's {positions} positions")
    return max_length


def warn_of_cuts(full: int, max_length: int, stacklevel: int = 3) -> None:
    """Warn that so many texts may have lost their end; `stacklevel` as for `warnings.warn`."""
    if full:
        which = "1 text fills" if full == 1 else f"{full} texts fill"
        message = f"{which} max_length={max_length} tokens; what is beyond was not read"
        warnings.warn(message, stacklevel=stacklevel)
