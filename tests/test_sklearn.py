"""`TextEmbedder`, as scikit-learn's users use a transformer."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_bert

from fastbert.errors import ArgumentError, CheckpointError
from fastbert.tasks.encode import TextEncoder

pytest.importorskip("sklearn", reason="its pipelines are meant; pip install scikit-learn runs this")

from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.utils.estimator_checks import check_estimator_cloneable

from fastbert.sklearn import TextEmbedder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bert.with_prompts(tmp_path / "model", query="the film ", document="a story ")


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[list[str], list[str]]:
    lines = map(json.loads, tiny_bert.opinions(tmp_path / "opinions.jsonl", 24, 0).read_text().splitlines())
    texts, labels = zip(*((line["text"], line["label"]) for line in lines), strict=True)
    return list(texts), list(labels)


def classifier(folder: Path) -> Pipeline:
    return make_pipeline(TextEmbedder(folder), LogisticRegression())


@pytest.mark.filterwarnings("ignore:pooling=", "ignore:.*max_length")
def test_it_gives_what_encode_gives(folder: Path) -> None:
    texts = ["film was great", "a dull plot", ""]
    options = {"pooling": "max", "normalize": True, "max_length": 4, "prompt_name": "query", "truncate_dim": 8}
    encoder = TextEncoder.from_folder(folder)
    got = TextEmbedder(folder, **options).fit_transform(texts)
    assert got.dtype == np.float32 and got.shape == (3, 8)
    np.testing.assert_array_equal(got, encoder.encode(texts, **options))
    got = TextEmbedder(folder, prompt="very ").fit_transform(texts)
    np.testing.assert_array_equal(got, encoder.encode(texts, prompt="very "))
    assert TextEmbedder(folder).fit(texts).transform([]).shape == (0, 32)


def test_parameters_and_clones(folder: Path) -> None:
    embedder = TextEmbedder(folder, truncate_dim=8)
    check_estimator_cloneable("TextEmbedder", embedder)
    fitted = embedder.fit(["film"])
    other = clone(fitted).set_params(truncate_dim=4)
    assert other.get_params() == fitted.get_params() | {"truncate_dim": 4}
    assert not hasattr(other, "encoder_"), "a clone is not fitted"
    with pytest.raises(NotFittedError):
        other.transform(["film"])
    assert list(fitted.get_feature_names_out()[:2]) == ["textembedder0", "textembedder1"]
    assert len(fitted.get_feature_names_out()) == 8


def test_a_pipeline_classifies_and_is_pickled_without_its_folder(
    folder: Path, labelled: tuple[list[str], list[str]]
) -> None:
    texts, labels = labelled
    fitted = classifier(folder).fit(texts, labels)
    rows = TextEncoder.from_folder(folder).encode(texts)
    wanted = LogisticRegression().fit(rows, labels).predict_proba(rows)
    np.testing.assert_array_equal(fitted.predict_proba(texts), wanted)
    pickled = pickle.dumps(fitted)
    shutil.rmtree(folder)
    np.testing.assert_array_equal(pickle.loads(pickled).predict_proba(texts), wanted)


def test_a_grid_of_settings_is_searched_with_a_cache(
    folder: Path, labelled: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    """scikit-learn #19953: a transformer that is taken from the cache of a pipeline is fitted."""
    texts, labels = labelled
    pipeline = classifier(folder).set_params(memory=str(tmp_path / "cache"))
    grid = {"textembedder__truncate_dim": [4, 32], "logisticregression__C": [0.1, 1.0]}
    search = GridSearchCV(pipeline, grid, cv=2, error_score="raise").fit(texts, labels)
    assert len(search.cv_results_["params"]) == 4
    best = clone(search.best_estimator_).fit(texts, labels)
    np.testing.assert_array_equal(search.predict(texts), best.predict(texts))
    assert len(list((tmp_path / "cache").rglob("output.pkl"))) == 5, (
        "a width and a part of the texts each, and all texts"
    )


@pytest.mark.parametrize("of", ["array", "object", "tuple", "generator"])
def test_texts_come_in_many_forms(of: str, folder: Path) -> None:
    texts = ["film was great", "a dull plot"]
    forms = {
        "array": np.array(texts),
        "object": np.array(texts, object),
        "tuple": tuple(texts),
        "generator": iter(texts),
    }
    embedder = TextEmbedder(folder)
    np.testing.assert_array_equal(embedder.fit_transform(forms[of]), embedder.transform(texts))


def test_a_column_of_a_data_frame(folder: Path) -> None:
    """category-encoders #492: frames as output broke a transformer whose names were not there yet."""
    pandas = pytest.importorskip("pandas", reason="its frames are meant; pip install pandas runs this")
    frame = pandas.DataFrame({"text": ["film was great", "a dull plot"], "stars": [5, 1]}, index=[7, 3])
    columns = make_column_transformer((TextEmbedder(folder), "text"), remainder="passthrough")
    out = columns.set_output(transform="pandas").fit_transform(frame)
    assert out.shape == (2, 33) and out.columns[0] == "textembedder__textembedder0" and list(out.index) == [7, 3]
    with pytest.raises(ArgumentError, match="2 dimensions"):
        TextEmbedder(folder).fit_transform(frame[["text"]])
    with pytest.raises(ArgumentError, match=r"texts\[1\]"):
        TextEmbedder(folder).fit_transform(pandas.Series(["film", None]))


def test_what_is_wrong_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        TextEmbedder(tmp_path / "nowhere").fit(["film"])
    wrong = {"dtype": "fp8", "device": "gpu", "pooling": "sum", "truncate_dim": 99, "batch_tokens": 0}
    for argument, value in wrong.items():
        with pytest.raises(ArgumentError) as raised:
            TextEmbedder(folder, **{argument: value}).fit_transform(["film"])
        assert raised.value.argument == argument
    with pytest.raises(ArgumentError, match="Wrap it in a list"):
        TextEmbedder(folder).fit_transform("film")
