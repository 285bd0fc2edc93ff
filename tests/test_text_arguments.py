"""Arguments of the calls that take texts: what is none of the kind asked for is named."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_bert

from fastbert.errors import ArgumentError
from fastbert.tasks.encode import TextEncoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder.from_folder(tiny_bert.make(tmp_path_factory.mktemp("texts") / "model"), device="cpu")


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", None, True, 10**30, float("inf"), float("nan")], ids=repr)
def test_texts_at_once_is_a_number_of_texts(encoder: TextEncoder, value: Any) -> None:
    with pytest.raises(ArgumentError, match="texts_at_once"):
        encoder.encode_stream(["a"], texts_at_once=value)


@pytest.mark.parametrize("texts", [5, None, Ellipsis, "a film", b"a film", True, 2.5], ids=repr)
def test_texts_are_many(encoder: TextEncoder, texts: Any) -> None:
    for call in (encoder.encode, encoder.encode_stream, lambda texts: encoder.encode(texts, prompt="query: ")):
        with pytest.raises(ArgumentError, match=r"texts: .* expected a list of strings"):
            call(texts)


@pytest.mark.parametrize("argument", ["prompt", "prompt_name"])
@pytest.mark.parametrize("value", [5, ["query"], b"query", True, {}], ids=repr)
def test_a_prompt_is_a_string(encoder: TextEncoder, argument: str, value: Any) -> None:
    with pytest.raises(ArgumentError, match=f"{argument}: .* expected a string, or None"):
        encoder.encode(["a"], **{argument: value})
