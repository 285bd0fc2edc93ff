"""Checkpoints as people have them: configs of every kind, labels, tensors of other heads, several dtypes, threads."""

from __future__ import annotations

import json
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_bert
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastbert
from fastbert.config import EncoderConfig, HeadConfig
from fastbert.errors import ArgumentError, CheckpointError, UntrainedWarning
from fastbert.model import heads
from fastbert.model.body import BertModel
from fastbert.tasks import loading

IDS = torch.tensor([[2, 10, 11, 12, 3]])
WORDS = len(tiny_bert.VOCABULARY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bert.make(tmp_path / "model")


@pytest.fixture
def classifier(folder: Path, tmp_path: Path) -> Path:
    return with_head(folder, tmp_path / "classifier", 3)


def with_head(
    folder: Path, out: Path, labels: int, kind: type[heads.HeadModel] = heads.BertForSequenceClassification
) -> Path:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedWarning)
        torch.manual_seed(0)
        fastbert.save(fastbert.load(folder, kind, head=HeadConfig(tuple(f"LABEL_{i}" for i in range(labels)))), out)
    return out


def change(folder: Path, **fields: Any) -> None:
    """Fields of config.json; `...` takes one away."""
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder: Path, changes: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Tensors of model.safetensors; None takes one away. Returns what is there now."""
    state = {
        key: tensor for key, tensor in (load_file(folder / "model.safetensors") | changes).items() if tensor is not None
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return state


def states(model: BertModel) -> Tensor:
    with torch.inference_mode():
        return model(IDS).last_hidden_state


# config.json


WRONG: dict[str, list[Any]] = {
    "hidden_size": [10**9, 2**63, -32, 0, 32.0, "32", True, [32], 1e308, float("nan"), 33, {}],
    "num_hidden_layers": [10**6, 10**9, -1, 2.0, "2", True],
    "num_attention_heads": [0, -1, 5, 64, 4.0, "4", 10**9, True],
    "intermediate_size": [10**9, 10**18, 0, 64.5, "64"],
    "vocab_size": [10**12, 0, "67", 67.0, 10],
    "max_position_embeddings": [10**9, 0, 512.0, 3],
    "type_vocab_size": [0, 10**9, 1],
    "layer_norm_eps": [-1, "x", float("nan"), float("inf"), 1e300, True, [1]],
    "hidden_dropout_prob": [-1, 2, "x", float("nan")],
    "attention_probs_dropout_prob": [1.0, "x"],
    "hidden_act": ["mish", 3, ["gelu"], {"a": 1}],
    "pad_token_id": [WORDS, WORDS + 5, -WORDS - 1, "0", 1.5, 2**63],
    "initializer_range": [-1, "x", float("nan")],
    "model_type": ["gpt2", 3, ["bert"], {}],
    "architectures": ["BertModel", 3, [3], {}],
    "position_embedding_type": ["relative_key", 3],
    "is_decoder": [True, "no"],
    "embedding_size": [16, "32"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_what_a_field_can_not_be_is_an_error_at_once(name: str, value: Any, folder: Path) -> None:
    change(folder, **{name: value}, **({"model_type": ...} if name == "architectures" else {}))
    started = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        fastbert.load(folder)
    assert time.monotonic() - started < 10
    if value not in (10, 3, 1, 2, 33):  # those disagree with a tensor, which is named instead
        assert "num_attention_heads" in str(caught.value) or name in str(caught.value)


@pytest.mark.parametrize("name", ["num_labels", "id2label", "problem_type", "classifier_dropout"])
@pytest.mark.parametrize(
    "value", [10**9, -1, "x", [1], {"5": "a", "6": "b"}, {"0": "a", "x": "b"}, {"0": None, "1": "a"}]
)
def test_what_a_head_can_not_be_is_an_error_at_once(name: str, value: Any, classifier: Path) -> None:
    change(classifier, **{"id2label": ..., "label2id": ..., name: value})
    with pytest.raises(CheckpointError, match=rf"config\.json: {name}: got "):
        fastbert.load(classifier, heads.BertForSequenceClassification)


@pytest.mark.parametrize(
    "fields", [{"hidden_size": "32"}, {"num_layers": 2.0}, {"eps": -1}, {"pad_token_id": -1}, {"pad_token_id": 9}]
)
def test_a_config_made_by_hand_is_checked_too(fields: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(fields))):
        EncoderConfig(**{"vocab_size": 9} | fields)


@pytest.mark.parametrize("pad", [3, None, -1, -WORDS])
def test_user_case_35_pad_token_id(pad: int | None, folder: Path, tmp_path: Path) -> None:
    expected = states(fastbert.load(folder))
    change(folder, pad_token_id=pad)
    model = fastbert.load(folder)
    assert torch.equal(states(model), expected)
    out = model.train()(IDS).last_hidden_state
    out.backward(torch.randn_like(out))
    assert model.embeddings.word.padding_idx == (pad if pad is None else pad % WORDS)
    fastbert.save(model, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["pad_token_id"] == pad


def test_user_case_35_is_as_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    for pad in (1, None, -1):
        change(folder, pad_token_id=pad)
        theirs = transformers.BertModel.from_pretrained(folder).eval()
        ours = fastbert.load(folder)
        assert ours.embeddings.word.padding_idx == theirs.embeddings.word_embeddings.padding_idx
        with torch.inference_mode():
            assert (states(ours) - theirs(IDS).last_hidden_state).abs().max() < 2e-5


def test_bare_keys_without_a_model_type(folder: Path) -> None:
    expected = states(fastbert.load(folder))
    change(folder, model_type=..., architectures=...)
    with pytest.warns(UserWarning, match="names no model_type; by its keys it is read as bert"):
        assert torch.equal(states(fastbert.load(folder)), expected)
    change_tensors(folder, {"embeddings.token_type_embeddings.weight": None})  # as DistilBERT
    with pytest.raises(CheckpointError, match=r"config\.model_type: got None; expected one of bert"):
        fastbert.load(folder)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model.", "module.bert.", "0.auto_model."])
def test_keys_of_a_wrapped_model_are_named(wrapper: str, folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({wrapper + key: tensor for key, tensor in state.items()}, folder / "model.safetensors")
    inner = wrapper.removesuffix("bert.")
    with pytest.raises(CheckpointError, match=f"without the '{inner}' before its keys"):
        fastbert.load(folder)


# Labels


def labels_of(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(fastbert.classify(["film"], folder, max_length=16)[0].probabilities))


LABELS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"num_labels": 3, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, ("LABEL_0", "LABEL_1", "LABEL_2")),
    ({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
    ({"label2id": {"a": 0, "b": 1, "c": 2}}, ("a", "b", "c")),
    ({"label2id": {"a": "0", "b": "1", "c": "2"}}, ("a", "b", "c")),
    ({"id2label": {"2": "c", "0": "a", "1": "b"}}, ("a", "b", "c")),
    ({"num_labels": 3, "id2label": {"0": "a", "1": "b", "2": "c"}}, ("a", "b", "c")),
]


@pytest.mark.parametrize(("fields", "expected"), LABELS)
def test_user_case_19_num_labels_against_id2label(
    fields: dict[str, Any], expected: tuple[str, ...], classifier: Path, recwarn: pytest.WarningsRecorder
) -> None:
    change(classifier, **{"id2label": ..., "label2id": ...} | fields)
    assert labels_of(classifier) == expected
    assert not recwarn.list


def test_user_case_19_names_of_another_number_are_replaced_and_said(classifier: Path) -> None:
    change(classifier, num_labels=3, id2label={"0": "bad", "1": "good"}, label2id=...)
    with pytest.warns(UserWarning, match="names 2 labels and has num_labels 3: they are LABEL_0 and on"):
        assert labels_of(classifier) == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"0": "x", "1": "x", "2": "y"}, "different names"),
        ({"0": 1, "1": "1", "2": "y"}, "different names"),
        ({"1": "a", "2": "b", "3": "c"}, "numbered from 0, without a gap"),
        ({"0": "a", "2": "b", "3": "c"}, "numbered from 0, without a gap"),
        (["a", "b", "c"], "numbered from 0, without a gap"),
        ({"0": "a", "1": "b"}, r"classifier\.weight: got shape \(3, 32\); expected \(2, 32\)"),
        ({"0": ["a"], "1": "b", "2": "c"}, "strings or numbers"),
    ],
)
def test_user_case_19_names_that_mean_nothing(names: Any, message: str, classifier: Path) -> None:
    change(classifier, id2label=names, label2id=...)
    with pytest.raises(CheckpointError, match=message):
        labels_of(classifier)


@pytest.mark.parametrize("names", [[0, 1, 2], [1, 2, 3], [1.5, 2.5, -3], [False, True, "other"]])
def test_user_case_14_labels_that_are_numbers(names: list[Any], classifier: Path, tmp_path: Path) -> None:
    change(classifier, id2label={str(i): name for i, name in enumerate(names)}, label2id=...)
    found = fastbert.classify(["film"], classifier, max_length=16)[0]
    assert set(found.probabilities) == set(map(str, names))
    assert isinstance(found.label, str)
    fastbert.save(fastbert.load(classifier, heads.BertForSequenceClassification), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["id2label"]
    assert list(saved.values()) == names


# Classes


@pytest.mark.parametrize(
    "classes",
    [["BertForMaskedLM"], ["BertModel"], ["MyBertClassifier"], [], None, ..., ["X", "BertForSequenceClassification"]],
)
def test_user_case_30_architectures_of_another_class(classes: Any, classifier: Path) -> None:
    expected = fastbert.classify(["the film"], classifier, max_length=16)
    change(classifier, architectures=classes)
    assert fastbert.classify(["the film"], classifier, max_length=16) == expected
    with pytest.raises(CheckpointError, match="it lacks predictions"):  # what config.json names is not there
        loading.with_trained_head(heads.BertForMaskedLM, classifier, "fp32", "cpu")


@pytest.mark.parametrize(
    "name", ["BertForTokenClassification", "BertCrfForTokenClassification", "BertForMultipleChoice"]
)
def test_a_classifier_of_another_task_is_not_taken(name: str, classifier: Path) -> None:
    change(classifier, architectures=[name])
    with pytest.raises(CheckpointError, match="no trained BertForSequenceClassification: it lacks classifier"):
        fastbert.classify(["the film"], classifier, max_length=16)


# Tensors of other heads


STRANGERS: dict[str, dict[str, Tensor]] = {
    "ColBERT": {"linear.weight": torch.randn(16, 32)},
    "CRF": {"crf.transitions": torch.randn(3, 3), "crf.start_transitions": torch.randn(3)},
    "a loss's weights": {"loss_fct.weight": torch.ones(2)},
    "LSTM": {"lstm.weight_ih_l0": torch.randn(4, 4)},
    "integers": {"steps": torch.tensor(3), "mask": torch.ones(4, dtype=torch.bool), "empty": torch.empty(0, 4)},
}


@pytest.mark.parametrize("prefix", ["", "bert."])
@pytest.mark.parametrize("name", STRANGERS)
def test_user_case_10_tensors_of_other_heads_are_carried(name: str, prefix: str, folder: Path, tmp_path: Path) -> None:
    expected = states(fastbert.load(folder))
    body = load_file(folder / "model.safetensors")
    state = {prefix + key: tensor for key, tensor in body.items()} | STRANGERS[name]
    save_file(state, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="tensors that no BertModel computes with") as caught:
        model = fastbert.load(folder)
    assert all(key in str(caught[0].message) for key in STRANGERS[name])
    assert Path(caught[0].filename) == Path(__file__)
    assert torch.equal(states(model), expected)
    fastbert.save(model, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], tensor) for key, tensor in state.items())


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_user_case_10_buffers_of_old_versions_are_carried_silently(
    prefix: str, folder: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    buffers = {f"{prefix}embeddings.{name}": torch.zeros(1, 48).long() for name in ("position_ids", "token_type_ids")}
    body = {prefix + key: tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    save_file(body | buffers, folder / "model.safetensors")
    fastbert.save(fastbert.load(folder), tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == body.keys() | buffers.keys()
    assert not recwarn.list


@pytest.mark.parametrize(
    "key", ["encoder.layer.0.adapter.weight", "embeddings.projection.weight", "embeddings.norm.weight"]
)
def test_tensors_within_the_body_are_still_refused(key: str, folder: Path) -> None:
    change_tensors(folder, {key: torch.zeros(3)})
    with pytest.raises(CheckpointError, match=f"1 unexpected keys: {key}"):
        fastbert.load(folder)


def test_many_strangers_are_not_all_listed(folder: Path) -> None:
    change_tensors(folder, {f"head.{i:03}": torch.zeros(1) for i in range(300)})
    with pytest.warns(UserWarning, match=r"head\.000, .*head\.009, \.\.\.$"):
        fastbert.load(folder)


# Several dtypes


KEPT = {
    "pooler and classifier": ("pooler", "classifier"),
    "LayerNorm": ("LayerNorm",),
    "tables": ("embeddings",),
    "biases": (".bias",),
    "query": ("query",),
}


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("named", ["float32", "config's", None])
def test_user_case_20_mixed_dtypes_become_one(
    kept: str, half: torch.dtype, named: str | None, classifier: Path, tmp_path: Path
) -> None:
    half_name = str(half).removeprefix("torch.")
    name = half_name if named == "config's" else named
    change(classifier, dtype=... if name is None else name)
    state = load_file(classifier / "model.safetensors")
    mixed = {key: t if any(part in key for part in KEPT[kept]) else t.to(half) for key, t in state.items()}
    change_tensors(classifier, dict(mixed))
    target = half if named == "config's" else torch.float32
    with pytest.warns(UserWarning, match=rf"has tensors of {'b?float16, float32'}; the model is {str(target)[6:]}$"):
        model = fastbert.load(classifier, heads.BertForSequenceClassification)
    assert {parameter.dtype for parameter in model.parameters()} == {target}
    with torch.inference_mode():
        assert model(IDS).logits.dtype == target
    fastbert.save(model, tmp_path / "saved")
    for key, tensor in load_file(tmp_path / "saved" / "model.safetensors").items():
        assert torch.equal(tensor, mixed[key].to(target)), key


def test_user_case_20_a_dtype_that_was_asked_for_needs_no_warning(
    folder: Path, recwarn: pytest.WarningsRecorder
) -> None:
    change_tensors(folder, {"embeddings.LayerNorm.bias": torch.zeros(32, dtype=torch.float64)})
    assert {p.dtype for p in fastbert.load(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert not recwarn.list


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_dtypes_that_are_no_weights(dtype: torch.dtype, folder: Path) -> None:
    change_tensors(folder, {"embeddings.LayerNorm.bias": torch.zeros(32).to(dtype)})
    with pytest.raises(CheckpointError, match=rf"embeddings\.norm\.bias: got {dtype}; expected a floating dtype of 16"):
        fastbert.load(folder)
    with pytest.raises(ArgumentError, match="dtype"):
        fastbert.load(folder, dtype=dtype)


@pytest.mark.parametrize("shape", [(0,), (), (31,), (32, 1), (1, 32)])
def test_a_tensor_of_another_shape(shape: tuple[int, ...], folder: Path) -> None:
    change_tensors(folder, {"embeddings.LayerNorm.bias": torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=r"embeddings\.norm\.bias: got shape"):
        fastbert.load(folder)


# Several threads


def test_user_case_17_loading_in_threads_leaves_the_filters(
    classifier: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two loads, the second of which begins within the first and ends after it: the order in which a filter leaks."""
    read, begun, inside, done = loading.read_model, threading.Event(), threading.Event(), threading.Event()

    def slow(*arguments: Any, **named: Any) -> Any:
        first = threading.current_thread().name == "first"
        (begun if first else inside).set()
        (inside if first else done).wait(20)
        return read(*arguments, **named)

    monkeypatch.setattr(loading, "read_model", slow)
    before = list(warnings.filters)

    def run() -> None:
        fastbert.TextClassifier.from_folder(classifier)
        done.set()

    first = threading.Thread(target=run, name="first")
    second = threading.Thread(target=run, name="second")
    first.start()
    assert begun.wait(20)
    second.start()
    first.join(60)
    second.join(60)
    assert warnings.filters == before
    with pytest.warns(UntrainedWarning):
        fastbert.load(folder, heads.BertForSequenceClassification)


def test_user_case_17b_every_thread_is_warned(classifier: Path, folder: Path) -> None:
    """Loads that are fine, loads that warn and loads that are refused, at once."""
    before = list(warnings.filters)

    def one(i: int) -> str:
        try:
            if i % 3 == 0:
                return type(fastbert.TextClassifier.from_folder(classifier)).__name__
            if i % 3 == 1:
                return type(fastbert.load(folder, heads.BertForSequenceClassification)).__name__
            return type(fastbert.TextTagger.from_folder(folder)).__name__
        except CheckpointError:
            return "refused"

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(one, range(48)))
    assert found == ["TextClassifier", "EncoderForSequenceClassification", "refused"] * 16
    assert [issubclass(one.category, UntrainedWarning) for one in caught] == [True] * 16
    assert warnings.filters == before


def test_nothing_of_the_process_is_changed_for_a_while() -> None:
    """What is the whole process's is never ours to change and to set back: another thread would see it, or keep it.

    The process of the command line is its own, and so is that of a worker of Ray. A comparison with rivals, whose
    warnings it does not pass on, has the process for itself or its times mean nothing.
    """
    forbidden = ("catch_warnings", "simplefilter", "filterwarnings", "chdir(", "environ[", "setlocale", "set_default_")
    root = Path(fastbert.__file__).parent
    own = {
        *(root / "cli").rglob("*.py"),
        root / "__main__.py",
        root / "ray" / "worker.py",
        root / "rivals" / "bench.py",
    }
    for path in {*root.rglob("*.py"), *(root.parent / "kernels").glob("*.py")} - own:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            reads = "os.environ[" in line and " = " not in line.split("os.environ[")[1]
            assert reads or not any(word in line for word in forbidden), f"{path}:{number}: {line.strip()}"
