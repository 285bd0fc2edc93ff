"""What is installed beside us, and what is not."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest

from fastbert.errors import FastbertError, MissingError
from fastbert.installed import version


def test_versions() -> None:
    assert version("numpy") == importlib.import_module("numpy").__version__
    assert version("a package that nobody wrote") is None


@pytest.mark.parametrize(
    ("module", "theirs", "package"),
    [
        ("langchain", "langchain_core", "langchain-core"),
        ("llama_index", "llama_index", "llama-index-core"),
        ("sklearn", "sklearn", "scikit-learn"),
    ],
)
def test_a_library_that_is_not_there(module: str, theirs: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == f"fastbert.{module}" or name.partition(".")[0] == theirs]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, theirs, None)
    with pytest.raises(
        MissingError, match=f"expected {package} to be installed. Run: pip install {package} "
    ) as raised:
        importlib.import_module(f"fastbert.{module}")
    assert isinstance(raised.value, ImportError) and isinstance(raised.value, FastbertError)
    assert raised.value.argument == f"fastbert.{module}"
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
