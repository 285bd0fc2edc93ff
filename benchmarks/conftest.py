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
from contest import PRESENTED, REPLAY, Case, Contest, Standing, compared, hold, show
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


@pytest.hookimpl(trylast=True)  # below the tables of pytest-benchmark
def pytest_terminal_summary(terminalreporter: Any) -> None:
    if lines := compared(PRESENTED):
        terminalreporter.section("beside rivals")
        terminalreporter.write("".join(f"{line}\n" for line in lines))


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


@pytest.fixture(scope="session")
def say(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Print a line at once, whatever pytest captures."""
    reporter, capture = (pytestconfig.pluginmanager.get_plugin(name) for name in ("terminalreporter", "capturemanager"))

    def line(text: str) -> None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(text)
            reporter.flush()

    return line


@pytest.fixture
def compete(
    request: pytest.FixtureRequest, benchmark: Any, held: dict[Case, dict[str, Standing]], say: Callable[[str], None]
) -> Callable[..., dict[str, Standing]]:
    """Show how a provider did in a contest, which is held when the first of its tests runs; gives all standings.

    What it gives takes a contest, a case, a provider's name, and options of `hold`.
    """

    def competed(contest: Contest, case: Case, provider: str, **options: Any) -> dict[str, Standing]:
        if case not in held:
            budget = FULL_BUDGET if request.config.getoption("--full") else BUDGET
            names = _asked(request)
            try:
                held[case] = hold(contest, case, names, budget=budget, timed=benchmark.enabled, **options)
            except (FastbertError, RuntimeError, ValueError) as error:  # told by each of its tests; others go on
                held[case] = {name: Standing(broken=f"{case}: {type(error).__name__}: {error}") for name in names}
            say(_line(case, held[case]))
        show(benchmark, case, held[case][provider])
        return held[case]

    return competed


def _line(case: Case, standings: dict[str, Standing]) -> str:
    """What is said of a contest as soon as it ends: the fastest first."""
    times = sorted((one.facts["median_ms"], name) for name, one in standings.items() if one.facts)
    line = "; ".join(f"{name} {median:.2f} ms" for median, name in times)
    lost = [name for name, one in standings.items() if one.broken]
    return f"{case}: {line or 'nothing timed'}{'; broken: ' if lost else ''}{', '.join(lost)}"


def _asked(request: pytest.FixtureRequest) -> list[str]:
    """The providers whose tests beside this one were selected, by -k say."""
    mine = _but_provider(request.node)
    return [item.callspec.params["provider"] for item in request.session.items if _but_provider(item) == mine]


def _but_provider(item: Any) -> tuple[Any, dict[str, Any]] | None:
    if "compete" not in getattr(item, "fixturenames", ()):
        return None
    return item.function, {name: value for name, value in item.callspec.params.items() if name != "provider"}
