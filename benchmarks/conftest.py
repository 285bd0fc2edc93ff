"""`pytest benchmarks`: options, and `compete`, by which a test is one provider of a contest.

pytest benchmarks                                  # what fits ten minutes on two cores
pytest benchmarks --full                           # everything
pytest benchmarks/bench_attention.py -k uniform
pytest benchmarks --benchmark-json=results.json    # for report.py, and for pytest-benchmark compare
pytest benchmarks --benchmark-disable              # check results, time nothing
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from contest import REPLAY, Case, Contest, Standing, hold
from environment import environment
from measure import pin_threads

BUDGET, FULL_BUDGET = 4.0, 20.0  # seconds for the timing of one contest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run all benchmarks: hours on a CPU")


def pytest_configure(config: pytest.Config) -> None:
    pin_threads()
    config.addinivalue_line("filterwarnings", "ignore:`torch.jit.script_method` is deprecated")  # torch.compile's own
    logging.getLogger("torch.__trace").propagate = False  # else torch.compile's inner life fills a failure's report


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.update(environment())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "compete" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=REPLAY))
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(scope="session")
def held() -> dict[Case, dict[str, Standing]]:
    """The contests of this run."""
    return {}


@pytest.fixture
def compete(
    request: pytest.FixtureRequest, benchmark: Any, held: dict[Case, dict[str, Standing]]
) -> Callable[[Contest, Case, str], None]:
    """Show how a provider did in a contest, which is held when the first of its tests runs."""

    def show(contest: Contest, case: Case, provider: str) -> None:
        if case not in held:
            budget = FULL_BUDGET if request.config.getoption("--full") else BUDGET
            held[case] = hold(contest, case, _asked(request, case), budget=budget, timed=benchmark.enabled)
        standing = held[case][provider]
        if standing.unserved:
            pytest.skip(standing.unserved)
        if standing.broken:
            pytest.fail(standing.broken, pytrace=False)
        seconds = standing.seconds or [0.0]  # nothing was timed under --benchmark-disable
        benchmark.group = str(case)
        benchmark.extra_info.update(standing.facts or {})
        REPLAY.load(seconds)
        benchmark.pedantic(_nothing, rounds=len(seconds), iterations=1)

    return show


def _asked(request: pytest.FixtureRequest, case: Case) -> list[str]:
    """The providers whose tests of this case were selected, by -k say."""
    specs = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    return [params["provider"] for params in specs if params.get("case") == case]


def _nothing() -> None:
    pass
