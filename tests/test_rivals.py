"""Other libraries on a user's model: held to the reference, timed in turns, left out with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_bert
import torch
from rich.console import Console

import fastbert
from fastbert.errors import ArgumentError, BackendError, CheckpointError
from fastbert.rivals import bench, contenders, runtimes, turns
from fastbert.rivals.contenders import Contender, Entry, Job
from fastbert.rivals.runtimes import UnservedError

TEXTS = ["the film was fine", "a", "ada hopper met alan turing in paris , and the story was very lovely ."]
PAIRS = [("the film", "was fine"), ("a", "dull plot , with a very lovely scene"), ("the actor", "music")]


# Turns


def test_contenders_take_turns() -> None:
    order: list[str] = []
    clock = {"slow": 0.5, "fast": 0.004}
    seen: list[tuple[int, int]] = []

    def timer(run: Any, calls: int) -> float:
        name = run()
        order.extend([name] * (calls > 0))
        return clock[name]

    runs = {"slow": lambda: "slow", "fast": lambda: "fast"}
    samples = turns.interleaved(runs, 3, timer=timer, watch=lambda done, of: seen.append((done, of)))
    assert samples == {"slow": [0.5] * 3, "fast": [0.004] * 3}
    assert order == ["slow", "fast", "fast"] + ["slow", "fast"] * 3  # what is fast is tried twice first
    assert seen == [(done, 6) for done in range(1, 7)]


def test_a_turn_of_something_fast_is_many_calls() -> None:
    asked: list[int] = []

    def timer(run: Any, calls: int) -> float:
        asked.append(calls)
        return 0.001

    turns.interleaved({"fast": lambda: None}, 2, timer=timer)
    assert asked == [1, 1, 20, 20]


@pytest.mark.parametrize(("seconds", "rounds"), [(10.0, 3), (0.5, 10), (1e-9, 25)])
def test_rounds_are_what_the_budget_allows(seconds: float, rounds: int) -> None:
    samples = turns.interleaved({"one": lambda: None}, budget=5.2, timer=lambda run, calls: seconds)
    assert len(samples["one"]) == rounds


def test_the_clock_counts_seconds_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "SETTLE", 0)
    readings = iter([10.0, 16.0])
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(readings))
    assert turns.cpu_seconds(lambda: None, 3) == 2.0


def test_spread() -> None:
    assert turns.Spread.of([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == turns.Spread(2.5, 1.0, 4.0)
    assert turns.Spread.of([7.0]) == turns.Spread(7.0, 7.0, 7.0)


# The bench, among contenders of ours alone


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.01)
    monkeypatch.setattr(bench, "FULL_SECONDS", 0.01)
    monkeypatch.setattr(turns, "LEAST", 1e-6)
    monkeypatch.setattr(turns, "SETTLE", 0)


@pytest.fixture
def folder(tmp_path: Path, brief: None) -> Path:
    return tiny_bert.make(tmp_path / "model")


@pytest.fixture
def among(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`among(entry, ...)`: these take part, after fastbert in float32."""

    def take(*entries: Entry) -> None:
        ours = next(one for one in contenders.entries(torch.device("cpu")) if str(one) == "fastbert fp32")
        monkeypatch.setattr(bench, "entries", lambda device: [ours, *entries])

    return take


def changed(change: Callable[[Any], Any], calls: list[int] | None = None, dtype: Any = "fp32") -> Entry:
    """fastbert's answers, changed; `calls` gets how many texts each call had."""

    def make(job: Job) -> Contender:
        ours = next(one for one in contenders.entries(job.device) if str(one) == "fastbert fp32").make(job)

        def run(texts: Sequence[Any]) -> Any:
            if calls is not None:
                calls.append(len(texts))
            return change(ours.array(ours.run(texts)))

        return Contender(run)

    return Entry("other", dtype, make)


def test_what_is_right_is_timed_and_shown(folder: Path, among: Callable[..., None]) -> None:
    among(changed(lambda answers: answers))
    report = fastbert.bench(folder, TEXTS)
    assert report.reference == "fastbert fp32" and not report.wrong
    assert {row.name for row in report.rows} == {"fastbert", "other"}
    assert all(len(row.seconds) >= 3 and row.tokens_per_s > 0 for row in report.rows)
    assert [row.times for row in report.rows] == sorted((row.times for row in report.rows), reverse=True)
    encoder = fastbert.TextEncoder.from_folder(folder)
    assert report.tokens == encoder.tokenizer.encode(TEXTS, 48).lengths.sum() and report.max_length == 48
    assert report.code == f"fastbert.TextEncoder.from_folder({str(folder)!r}, dtype='fp32').encode(texts)"
    eval(report.code, {"fastbert": fastbert, "texts": TEXTS})
    console = Console(width=200, record=True)
    console.print(report)
    shown = console.export_text()
    assert all(words in shown for words in ("3 of your 3 texts", "other fp32", "worst cosine", report.code))
    assert json.loads(json.dumps(report.as_dict()))["rows"][0]["accuracy"]["worst cosine"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rows: -rows, "worst cosine -1.0000"),
        (lambda rows: np.roll(rows, 1, axis=0), "worst cosine"),
        (lambda rows: rows[:, 1:], r"shape \(3, 31\), and not \(3, 32\)"),
        (lambda rows: rows * np.nan, "NaN or infinity"),
    ],
)
def test_what_is_wrong_is_said_and_never_timed(
    change: Callable[[Any], Any], reason: str, folder: Path, among: Callable[..., None]
) -> None:
    calls: list[int] = []
    among(changed(change, calls))
    report = fastbert.bench(folder, TEXTS)
    assert [str(row.name) for row in report.rows] == ["fastbert"]
    assert list(report.wrong) == ["other fp32"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(report.wrong["other fp32"])
    assert calls == [3]  # the check, and no turn
    console = Console(width=200, record=True)
    console.print(report)
    assert "not timed, because wrong: other fp32" in console.export_text()


def test_int8_may_round_more(folder: Path, among: Callable[..., None]) -> None:
    def rounded(rows: Any) -> Any:
        return rows + np.random.default_rng(0).normal(0, 0.02, rows.shape)

    among(changed(rounded, dtype="fp32"), changed(rounded, dtype="int8"))
    report = fastbert.bench(folder, TEXTS)
    assert list(report.wrong) == ["other fp32"] and [row.dtype for row in report.rows if row.name == "other"] == [
        "int8"
    ]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UnservedError("absent"), "absent"),
        (RuntimeError("a kernel\nfailed"), "RuntimeError: a kernel"),
        (OSError("no file"), "OSError: no file"),
        (ValueError(), "ValueError: "),
    ],
)
def test_who_fails_is_left_out_with_the_reason(
    error: Exception, reason: str, folder: Path, among: Callable[..., None]
) -> None:
    def make(job: Job) -> Contender:
        raise error

    among(Entry("broken", "fp32", make))
    report = fastbert.bench(folder, TEXTS)
    assert report.left_out["broken fp32"] == reason
    assert [row.name for row in report.rows] == ["fastbert"]


def test_the_next_one_is_the_reference_where_the_first_fails(
    folder: Path, among: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    among(changed(lambda rows: rows))
    ours, other = bench.entries(torch.device("cpu"))

    def make(job: Job) -> Contender:
        raise UnservedError("absent")

    monkeypatch.setattr(bench, "entries", lambda device: [Entry("first", "fp32", make), other, ours])
    assert fastbert.bench(folder, TEXTS).reference == "other fp32"
    monkeypatch.setattr(bench, "entries", lambda device: [Entry("first", "fp32", make)])
    with pytest.raises(BackendError, match="first fp32: absent"):
        fastbert.bench(folder, TEXTS)


def test_quick_takes_batches_of_like_lengths_spread_over_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def make(job: Job) -> Contender:
        def run(texts: Sequence[Any]) -> Any:
            calls.append(list(texts))
            return np.ones((len(texts), 1), np.float32)

        return Contender(run)

    monkeypatch.setattr(bench, "entries", lambda device: [Entry("one", "fp32", make)])
    many = [" ".join(["film"] * (1 + i % 40)) for i in range(32 * 20)]  # 16 of each length
    for seconds, batches in ((1e-9, 1), (1e9, 20)):
        monkeypatch.setattr(bench, "CALL_SECONDS", seconds)
        calls.clear()
        report = fastbert.bench(folder, many)
        assert report.given == len(many) and report.texts == 32 * batches
        lengths = sorted((len(text.split()) for text in calls[-1]), reverse=True)
        groups = [lengths[begin : begin + 32] for begin in range(0, len(lengths), 32)]
        assert all(group[0] - group[-1] <= 1 for group in groups)
        assert abs(np.mean(lengths) - 20.5) <= 1.5
    monkeypatch.setattr(bench, "MOST_DRAWN", 100)
    assert fastbert.bench(folder, many).texts == 100
    assert fastbert.bench(folder, many, full=True).texts == len(many)


def test_without_texts_it_takes_its_own(folder: Path, among: Callable[..., None]) -> None:
    among()
    report = fastbert.bench(folder, full=True, max_length=16)
    assert (report.given, report.texts, report.max_length) == (0, 300, 16)
    assert 0 < report.cut < 300 and report.code is not None and report.code.endswith("max_length=16)")
    console = Console(width=200, record=True)
    console.print(report)
    assert "300 of fastbert's own sentences" in console.export_text()


def test_wrong_arguments(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="texts: got none"):
        fastbert.bench(folder, [])
    with pytest.raises(ArgumentError, match="a single string"):
        fastbert.bench(folder, "a text")
    with pytest.raises(ArgumentError, match=r"texts\["):
        fastbert.bench(folder, ["a", 5])  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="max_length"):
        fastbert.bench(folder, TEXTS, max_length=1000)
    with pytest.raises(CheckpointError):
        fastbert.bench(tmp_path / "nothing", TEXTS)


@pytest.mark.parametrize("labels", [1, 3])
def test_labels_and_scores(labels: int, brief: None, tmp_path: Path, among: Callable[..., None]) -> None:
    folder = tiny_bert.with_head(tmp_path, labels)
    among(changed(lambda rows: rows + 1e-5), changed(lambda rows: 1 - rows, dtype="bf16"))
    report = fastbert.bench(folder, PAIRS)
    assert list(report.wrong) == ["other bf16"] and report.code is not None
    assert report.kind == ("scores" if labels == 1 else "labels")
    other = next(row for row in report.rows if row.name == "other")
    assert other.accuracy["largest difference"] == pytest.approx(1e-5, rel=0.1)
    assert ("same label" in other.accuracy) == (labels > 1)
    eval(report.code, {"fastbert": fastbert, "texts": PAIRS})


# The libraries themselves


def of_another_family(folder: Path, family: str) -> Path:
    """DistilBERT has no types of tokens and no pooler, and names its sizes otherwise; MPNet has no SDPA."""
    transformers = pytest.importorskip("transformers", reason="it makes the model")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    if family == "DistilBert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tiny_bert.VOCABULARY), max_position_embeddings=50, initializer_range=0.2, pad_token_id=0, **sizes
    )
    getattr(transformers, f"{family}Model")(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tiny_bert.VOCABULARY) + "\n")
    tokenizer = transformers.BertTokenizerFast.from_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]", model_max_length=48,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.long
@pytest.mark.parametrize("kind", ["embeddings", "DistilBert", "MPNet", "labels", "pairs", "scores"])
def test_libraries_agree(kind: str, brief: None, tmp_path: Path) -> None:
    if kind in ("DistilBert", "MPNet"):
        folder = of_another_family(tmp_path / "model", kind)
    elif kind == "embeddings":
        folder = tiny_bert.make(tmp_path / "model")
    else:
        folder = tiny_bert.with_head(tmp_path, 1 if kind == "scores" else 3)
    texts: list[Any] = PAIRS if kind in ("pairs", "scores") else TEXTS
    report = fastbert.bench(folder, texts * 20)
    assert not report.wrong
    here = {str(entry) for entry in contenders.entries(torch.device("cpu"))}
    timed = {f"{row.name} {row.dtype}" for row in report.rows}
    assert timed == here - report.left_out.keys()
    for name, reason in report.left_out.items():
        assert " " not in name or "is not installed" in reason or (kind, name[:8]) == ("labels", "sentence"), reason


def test_absent_libraries_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> Any:
        raise UnservedError(f"{module} is not installed")

    monkeypatch.setattr(runtimes, "installed", absent)
    monkeypatch.setattr(contenders, "installed", absent)
    report = fastbert.bench(folder, TEXTS)
    assert {row.name for row in report.rows} == {"fastbert"} and report.reference == "fastbert fp32"
    assert report.left_out["transformers fp32"] == "transformers is not installed"
    assert report.left_out["sentence-transformers fp32"] == "sentence_transformers is not installed"
    assert report.left_out["onnxruntime int8"] == "onnxruntime is not installed"
    assert report.left_out["OpenVINO fp32"] == "openvino is not installed"


def test_a_rival_that_can_t_be_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rival_of_old.py").write_text("from os import no_such_thing")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnservedError, match=r"rival_of_old can't be imported: cannot import name 'no_such_thing'"):
        runtimes.installed("rival_of_old")
    with pytest.raises(UnservedError, match="no_such_rival is not installed"):
        runtimes.installed("no_such_rival.part")


def test_transformers_is_as_loud_as_before() -> None:
    logging = pytest.importorskip("transformers", reason="it is meant").utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    try:
        with runtimes.quiet_transformers():
            assert logging.get_verbosity() == logging.ERROR and not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before[0])
        if not before[1]:
            logging.disable_progress_bar()


# What users of other libraries met


def settings(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def hand_made(folder: Path, pooling: str, texts: list[str]) -> Any:
    """What by-hand code around transformers makes of a sentence-transformers folder with this pooling."""
    settings(folder / "sentence_bert_config.json", max_seq_length=48)
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    names = ["idx", "name", "path", "type"]
    rows = [(i, str(i), path, f"sentence_transformers.models.{kind}") for i, (path, kind) in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps([dict(zip(names, row, strict=True)) for row in rows]))
    (folder / "1_Pooling").mkdir()
    settings(folder / "1_Pooling" / "config.json", word_embedding_dimension=32, **{f"pooling_mode_{pooling}": True})
    job = Job.of(folder, torch.device("cpu"), None, pairs=False, scratch=folder)
    entry = next(one for one in contenders.entries(job.device) if str(one) == "transformers fp32")
    return entry.make(job).run(texts)


@pytest.mark.parametrize("pooling", ["cls_token", "mean_tokens"])
def test_padding_on_the_left_does_not_reach_what_is_pooled_by_hand(pooling: str, folder: Path) -> None:
    """huggingface/sentence-transformers#3584: the first row of a text padded on the left is padding's."""
    pytest.importorskip("transformers", reason="it pads")
    settings(folder / "tokenizer_config.json", padding_side="left")
    found = hand_made(folder, pooling, TEXTS)
    np.testing.assert_allclose(found, fastbert.encode(TEXTS, folder), atol=1e-5)


def test_rivals_pad_to_the_longest_of_a_batch(folder: Path) -> None:
    """chroma-core/chroma#5353: a tokenizer.json that pads to 128 made every text as dear as a long one."""
    transformers = pytest.importorskip("transformers", reason="it pads")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    padding = {
        "strategy": {"Fixed": 40}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]",
    }  # fmt: skip
    settings(folder / "tokenizer.json", padding=padding)
    job = Job.of(folder, torch.device("cpu"), None, pairs=False, scratch=folder)
    shapes = []

    def run(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return ids[..., None].float().expand(-1, -1, 32)

    texts = [TEXTS[1]] * contenders.BATCH + [TEXTS[2]] * contenders.BATCH
    encode = contenders.by_length(job.their_tokenizer, run, contenders.mean, max_length=48, device=job.device)
    rows = encode(texts)
    longest = [int(job.tokenizer.encode([text], 48).lengths[0]) for text in (TEXTS[2], TEXTS[1])]
    assert shapes == [(contenders.BATCH, length) for length in longest] and longest[1] == 3
    assert (rows[: contenders.BATCH] == rows[0]).all() and (rows[contenders.BATCH :] == rows[-1]).all()
    assert rows[0, 0] != rows[-1, 0]  # in the order of the texts


def test_half_precision_is_not_taken_for_float32(folder: Path, among: Callable[..., None]) -> None:
    """openvinotoolkit/openvino.genai#164: where the CPU has bfloat16, OpenVINO takes it unless it is told otherwise."""

    def rounded(rows: Any) -> Any:
        return torch.from_numpy(rows).bfloat16().float().numpy()

    among(changed(rounded), changed(rounded, dtype="bf16"))
    report = fastbert.bench(folder, TEXTS)
    assert list(report.wrong) == ["other fp32"]


class SeenError(Exception):
    pass


def seen(*_: Any, **__: Any) -> Any:
    raise SeenError


def with_one_thread_more(run: Callable[[], Any]) -> int:
    """`run` until it is `seen`; how many threads torch had."""
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(SeenError):
            run()
    finally:
        torch.set_num_threads(before)
    return before + 1


def test_onnxruntime_has_as_many_threads_as_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface/sentence-transformers#3987: torch's number of threads does not reach other runtimes."""
    module = pytest.importorskip("onnxruntime", reason="its threads are counted")
    options = module.SessionOptions()
    monkeypatch.setattr(module, "SessionOptions", lambda: options)
    monkeypatch.setattr(module, "InferenceSession", seen)
    threads = with_one_thread_more(lambda: runtimes.onnxruntime_model(folder / "graph"))
    assert options.intra_op_num_threads == threads


def test_openvino_has_as_many_threads_as_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("openvino", reason="its threads are counted")
    asked: list[Any] = []

    def compiled(graph: Any, device: str, options: dict[str, Any]) -> Any:
        asked.append(options["INFERENCE_NUM_THREADS"])
        raise SeenError

    core = SimpleNamespace(read_model=lambda path: path, compile_model=compiled)
    monkeypatch.setattr(module, "Core", lambda: core)
    threads = with_one_thread_more(lambda: runtimes.openvino_model(folder / "graph", torch.float32))
    assert asked == [threads]
