"""The gate's ratios: what counts as slower, and what is said when something can't be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import ratios
from contest import Standing

from fastbert.errors import ArgumentError

FORWARD, BOTH = ratios.CASES


@pytest.mark.parametrize(
    ("speeds", "slower"),
    [
        ([0.9] * 10, True),
        ([0.9] * 8 + [1.2] * 2, True),
        ([0.9] * 7 + [1.2] * 3, False),  # slower in the median, but not in four rounds of five
        ([1.0] * 10, False),
        ([0.5] * 4 + [1.2] * 6, False),
        ([0.96] * 10, False),
    ],
)
def test_slower_means_in_the_median_and_in_four_rounds_of_five(speeds: list[float], slower: bool) -> None:
    assert ratios.below(speeds, 0.95) is slower


def least_file(folder: Path, text: str) -> Path:
    path = folder / "ratios.json"
    path.write_text(text)
    return path


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Standing]:
    """What a contest would find."""
    standings = {"fastbert": Standing([1.0] * 5), "transformers": Standing([2.0] * 5)}
    monkeypatch.setattr(ratios, "hold", lambda *args, **options: standings)
    return standings


@pytest.mark.parametrize(("least", "failures"), [(1.9, 0), (2.1, 2)])
def test_the_rival_is_compared_with_what_is_asked(
    timed: dict[str, Standing], least: float, failures: int, tmp_path: Path
) -> None:
    path = least_file(tmp_path, json.dumps(dict.fromkeys(ratios.CASES, least)))
    reasons = ratios.against_rival(baseline=path)
    assert len(reasons) == failures
    assert all("2.00 times transformers's speed" in reason for reason in reasons)


def test_a_wrong_result_fails_and_an_absent_rival_is_said(
    timed: dict[str, Standing], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = least_file(tmp_path, json.dumps(dict.fromkeys(ratios.CASES, 3)))
    timed["transformers"] = Standing(unserved="transformers: it is not installed")
    assert ratios.against_rival(baseline=path) == []
    assert "not compared: transformers: it is not installed" in capsys.readouterr().out
    timed["fastbert"] = Standing(broken="refusing to time a wrong result")
    assert set(ratios.against_rival(baseline=path)) == {"refusing to time a wrong result"}


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({FORWARD: 1.5}), json.dumps({FORWARD: 1.5, BOTH: "2"})])
def test_a_corrupt_file_is_an_error(text: str, tmp_path: Path) -> None:
    path = least_file(tmp_path, text)
    with pytest.raises(ArgumentError, match=r"ratios\.json"):
        ratios.read_least(path)
    with pytest.raises(ArgumentError, match="No such file"):
        ratios.read_least(tmp_path / "absent.json")


def test_the_shipped_file_can_be_read() -> None:
    assert min(ratios.read_least(ratios.BASELINE).values()) > 1


def test_another_commit_is_compared_round_by_round(capsys: pytest.CaptureFixture[str]) -> None:
    base = {FORWARD: [1.0] * 10, BOTH: [1.0] * 10}
    assert ratios.slower("main", base, base) == []
    [reason] = ratios.slower("main", base, {FORWARD: [1.2] * 10, BOTH: [0.8] * 10})
    assert reason == f"slower: {FORWARD}: 0.833 times the speed of main"
    assert "1.25 (1.25 to 1.25 in 10 rounds) times the speed of main" in capsys.readouterr().out


def test_an_unknown_commit_is_an_error() -> None:
    with pytest.raises(ArgumentError, match="a commit of this repository"):
        ratios.against("no-such-commit")


@pytest.mark.heavy
def test_a_planted_delay_is_seen(tmp_path: Path) -> None:
    """Two trees, really timed: one whose model is busy for 100 ms more is the slower of them."""

    plain, delayed = tmp_path / "plain", tmp_path / "delayed"
    for tree in (plain, delayed):
        for room in ("fastbert", "kernels"):
            shutil.copytree(ratios.ROOT / room, tree / room)
    with (delayed / "fastbert" / "model" / "body.py").open("a") as file:
        file.write(
            "\n\nimport time\n_run = BertModel.run\n\n\ndef _late(*args, **options):\n"
            "    end = time.process_time() + 0.1\n    while time.process_time() < end:\n        pass\n"
            "    return _run(*args, **options)\n\n\n"
            "BertModel.run = _late\n"
        )
    seconds: dict[Path, list[float]] = {plain: [], delayed: []}
    with ratios._server(plain) as first, ratios._server(delayed) as second:
        for counted in [False] + [True] * 5:
            for tree, server in ((plain, first), (delayed, second)):
                one = ratios._ask(server, FORWARD)
                seconds[tree] += [one] if counted else []
    assert len(ratios.slower("plain", {FORWARD: seconds[plain]}, {FORWARD: seconds[delayed]})) == 1
    assert ratios.slower("delayed", {FORWARD: seconds[delayed]}, {FORWARD: seconds[plain]}) == []
