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
from contest import REPLAY, Case, Contest, Standing, hold, present
from environment import environment
from measure import pin_threads

from fastbert.errors import FastbertError

BUDGET, FULL_BUDGET = 1.5, 20.0  # seconds for the timing of one contest


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
        if "benchmark" in getattr(item, "fixturenames", ()):
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
) -> Callable[[Contest, Case, str], dict[str, Standing]]:
    """Show how a provider did in a contest, which is held when the first of its tests runs; gives all standings."""

    def show(contest: Contest, case: Case, provider: str) -> dict[str, Standing]:
        if case not in held:
            budget = FULL_BUDGET if request.config.getoption("--full") else BUDGET
            names = _asked(request)
            try:
                held[case] = hold(contest, case, names, budget=budget, timed=benchmark.enabled)
            except (FastbertError, RuntimeError, ValueError) as error:  # told by each of its tests; others go on
                held[case] = {name: Standing(broken=f"{case}: {type(error).__name__}: {error}") for name in names}
            _say(request.config, case, held[case])
        standing = held[case][provider]
        if standing.unserved:
            pytest.skip(standing.unserved)
        if standing.broken:
            pytest.fail(standing.broken, pytrace=False)
        present(benchmark, str(case), standing.seconds or [], standing.facts or {})
        return held[case]

    return show


def _say(config: pytest.Config, case: Case, standings: dict[str, Standing]) -> None:
    """A line of a contest as soon as it ends: the fastest first."""
    times = sorted((one.facts["median_ms"], name) for name, one in standings.items() if one.facts)
    line = "; ".join(f"{name} {median:.2f} ms" for median, name in times)
    lost = [name for name, one in standings.items() if one.broken]
    reporter, capture = (config.pluginmanager.get_plugin(name) for name in ("terminalreporter", "capturemanager"))
    with capture.global_and_fixture_disabled():
        reporter.ensure_newline()
        reporter.write_line(f"{case}: {line or 'nothing timed'}{'; broken: ' if lost else ''}{', '.join(lost)}")


def _asked(request: pytest.FixtureRequest) -> list[str]:
    """The providers whose tests beside this one were selected, by -k say."""
    mine = _but_provider(request.node)
    return [item.callspec.params["provider"] for item in request.session.items if _but_provider(item) == mine]


def _but_provider(item: Any) -> tuple[Any, dict[str, Any]] | None:
    if "compete" not in getattr(item, "fixturenames", ()):
        return None
    return item.function, {name: value for name, value in item.callspec.params.items() if name != "provider"}
