"""A pytest plugin: `--cpu-times FILE` writes the seconds of CPU time that each test takes, its child processes' too.

CPU time says what a test costs on a machine that does something else as well. A test's setup and teardown are its own;
a fixture that many share is the first one's. What is in the file of other tests stays there.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

FLAG = "--cpu-times"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(FLAG, metavar="FILE", help="write the CPU time of each test to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption(FLAG):
        config.pluginmanager.register(_CpuTimes(config), "asl-pallas-cpu-times")


def _used() -> float:
    """Of this process and of the children that it has waited for."""
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, who))


class _CpuTimes:
    def __init__(self, config: pytest.Config):
        self._file = Path(config.getoption(FLAG))
        self._is_worker = hasattr(config, "workerinput")  # of xdist, which sends its reports to the controller
        self._before = _used()
        self._seconds: dict[str, float] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        if self._is_worker or not self._seconds:
            self._before = _used()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        outcome = yield
        now = _used()
        outcome.get_result().user_properties.append(("cpu_seconds", now - self._before))  # type: ignore[attr-defined]
        self._before = now

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        seconds = sum(value for name, value in report.user_properties if name == "cpu_seconds")
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + float(seconds)

    def pytest_sessionfinish(self) -> None:
        if self._is_worker:
            return
        known = json.loads(self._file.read_text()) if self._file.exists() else {}
        known |= {test: round(seconds, 3) for test, seconds in self._seconds.items()}
        self._file.write_text(json.dumps(dict(sorted(known.items())), indent=0) + "\n")
