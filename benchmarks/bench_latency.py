"""One sequence at a time: the time of a call of BERT, from ids to hidden states."""

from __future__ import annotations

from typing import Any

import pytest
from bench_encoder import CONTEST, NAMES
from contest import Case, cases
from workloads import BYTETRANSFORMER, KERNL, LATENCY, TENSORRT

WORKLOADS = {
    work.name: work for grid in (LATENCY, TENSORRT, BYTETRANSFORMER, KERNL) for work in grid if work.batch == 1
}


@pytest.mark.parametrize("provider", NAMES)
@pytest.mark.parametrize("case", cases("latency", WORKLOADS.values()))
def test_latency(case: Case, provider: str, compete: Any) -> None:
    compete(CONTEST, case, provider)
