"""transformers' own tests of its models, asked of accelerated ones: `make test-transformers FOLDER=...`.

FOLDER is a checkout of transformers at the installed version: `tests/`, `utils/`, `src/` and `conftest.py`; the package
on PyPI has no tests of a family. Each family's file runs twice, in a process of its own: with models as they are, and
with each model given to `fastbert.accelerate` as soon as it is built, before weights are loaded into it, but those of
eager attention where the class has another. A test that passes as it is and fails accelerated is listed, and then the
script ends with 1. Most show that models can be used as before, by comparing a model with itself; numbers are shown in
test_accelerate.py. Needs parameterized and httpx, as those files do. Nothing is fetched: tests of models on the hub
skip.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastbert
from fastbert.errors import ArgumentError

# Those without a file of their own are asked what RoBERTa is asked: their classes stand in for its own.
FAMILIES = {
    "bert": None,
    "roberta": None,
    "electra": None,
    "distilbert": None,
    "albert": None,
    "mpnet": None,
    "deberta_v2": None,
    "modernbert": None,
    "nomic_bert": None,
    "gte": None,
    "xlm_roberta": "XLMRoberta",
    "camembert": "Camembert",
}


class Asked:
    """Plugin of pytest: seeds each test, accelerates its models, writes a line of JSON for each to `out`."""

    def __init__(self, out: Path, *, accelerated: bool) -> None:
        self.out, self.accelerated = out.open("w", encoding="utf-8"), accelerated
        self.served: Counter[str] = Counter()
        self.reasons: dict[str, set[str]] = {}

    def pytest_configure(self) -> None:
        if self.accelerated:
            from transformers import PreTrainedModel

            post_init = PreTrainedModel.post_init

            def built(model: Any) -> None:
                post_init(model)
                if model.config._attn_implementation == "eager" and model._supports_sdpa:  # what sdpa is compared with
                    return
                try:
                    fastbert.accelerate(model)
                except ArgumentError:  # a decoder, or a part without an encoder
                    return

            PreTrainedModel.post_init = built

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        common = sys.modules.get("tests.test_modeling_common")
        if common is not None:
            common.global_rng.seed(0)
        with fastbert.paths_taken() as taken:
            try:
                yield
            finally:
                self.served[item.nodeid] = sum(taken.values())

    def pytest_warning_recorded(self, warning_message: Any, nodeid: str) -> None:
        _, found, reason = str(warning_message.message).partition("runs its own code, not fastbert's: ")
        if found:
            self.reasons.setdefault(nodeid, set()).add(reason)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = report.longrepr.reprcrash.message if hasattr(report.longrepr, "reprcrash") else ""
            line = {"test": report.nodeid, "outcome": report.outcome, "why": why, "served": self.served[report.nodeid]}
            self.out.write(json.dumps(line) + "\n")

    def pytest_sessionfinish(self) -> None:
        self.out.write(json.dumps({"reasons": {test: sorted(found) for test, found in self.reasons.items()}}) + "\n")
        self.out.close()


def stand_in(other: str) -> None:
    """Let classes of `other` be found where RoBERTa's are looked for."""
    import transformers
    from transformers.models.roberta import modeling_roberta

    for name in dir(transformers):
        if name.startswith("Roberta") and hasattr(transformers, name.replace("Roberta", other, 1)):
            setattr(transformers, name, getattr(transformers, name.replace("Roberta", other, 1)))
    theirs = sys.modules[getattr(transformers, f"{other}Model").__module__]
    modeling_roberta.RobertaEmbeddings = getattr(theirs, f"{other}Embeddings")


def answers(folder: Path, family: str, only: str, *, accelerated: bool) -> dict[str, dict[str, Any]]:
    """What each test of a family says, in a process of its own."""
    with tempfile.TemporaryDirectory() as made:
        out = Path(made) / "answers"
        command = [sys.executable, __file__, str(folder), family, "--out", str(out), "--only", only]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        command += ["--accelerated"] if accelerated else []
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if not out.exists() or not out.stat().st_size:
            sys.exit(f"pytest did not run:\n{ran.stdout[-4000:]}{ran.stderr[-4000:]}")
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    reasons = lines.pop()["reasons"]
    if not lines:
        sys.exit(f"no test of {family}:\n{ran.stdout[-4000:]}")
    lines.sort(key=lambda line: line["outcome"] == "failed")  # a test has a line of each of its subtests too
    return {line["test"]: {**line, "reasons": reasons.get(line["test"], [])} for line in lines}


def run_one(folder: Path, family: str, only: str, out: Path, *, accelerated: bool) -> None:
    other = FAMILIES[family]
    if other is not None:
        stand_in(other)
    name = "roberta" if other is not None else family
    options = ["-q", "--no-header", "--no-summary", "-p", "no:cacheprovider", "-W", "default", "--tb=line", "-k", only]
    file = f"tests/models/{name}/test_modeling_{name}.py"
    pytest.main([*options, file], plugins=[Asked(out, accelerated=accelerated)])


def in_short(own: dict[str, Any], ours: dict[str, Any]) -> str:
    """What became of a question."""
    if own["outcome"] != "passed":
        return f"{own['outcome']} without fastbert too"
    if ours["outcome"] != "passed":
        return "FAILS ACCELERATED"
    return "fastbert computes it" if ours["served"] else "passes; nothing of it is an encoder that fastbert computes"


def table(said: dict[str, dict[str, list[str]]], families: int) -> str:
    """Questions of one answer side by side; which families, where not all have it."""
    rows: dict[str, list[str]] = {}
    for question, answers in sorted(said.items()):
        for answer, who in answers.items():
            where = "" if len(who) == families else f" ({', '.join(who)})"
            rows.setdefault(answer, []).append(f"`{question}`{where}")
    lines = [f"| {answer} | {', '.join(questions)} |" for answer, questions in rows.items()]
    return "\n".join(["| answer | questions |", "|---|---|", *lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument("--only", default="", help="as pytest's -k")
    parser.add_argument("--list", type=Path, help="write a table of all questions and their answers")
    parser.add_argument("--accelerated", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.out is not None:
        run_one(given.folder, given.families[0], given.only, given.out, accelerated=given.accelerated)
        return 0
    failed = 0
    said: dict[str, dict[str, list[str]]] = {}
    for family in given.families:
        own, ours = (answers(given.folder.resolve(), family, given.only, accelerated=way) for way in (False, True))
        passed = [test for test, answer in own.items() if answer["outcome"] == "passed"]
        lost = [test for test in passed if ours[test]["outcome"] != "passed"]
        outcomes = Counter(answer["outcome"] for answer in own.values())
        served = sum(ours[test]["served"] > 0 for test in passed)
        print(f"{family}: {dict(outcomes)}; of those that passed {served} run fastbert, {len(lost)} fail accelerated")
        for reason, count in Counter(reason for test in passed for reason in ours[test]["reasons"]).most_common():
            print(f"  in {count} its own code: {reason}")
        for test in lost:
            print(f"  FAILS ACCELERATED {test}\n    {ours[test]['why'][:600]}")
        if not served and not given.only:
            print("  FASTBERT COMPUTES NONE: it refuses these models, or they were not given to it")
        failed += len(lost) + (not served and not given.only)
        for test, answer in ours.items():
            question = test.rpartition("::")[2]
            said.setdefault(question, {}).setdefault(in_short(own[test], answer), []).append(family)
    if given.list is not None:
        given.list.write_text(table(said, len(given.families)), encoding="utf-8")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
