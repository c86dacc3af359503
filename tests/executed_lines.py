"""A pytest plugin: `--executed-lines FILE` writes which lines of asl_pallas/ each test executes, and what it costs.

Most of the package runs while JAX traces, and what one test has traced the next one finds in a cache: so JAX's caches
are cleared before each test function, though not between its parameters. Lines that child processes execute aren't
seen. `mutations` reads the file.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

FLAG = "--executed-lines"
PACKAGE = str(Path(__file__).resolve().parent.parent / "asl_pallas")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(FLAG, metavar="FILE", help="write which lines of the package each test executes to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption(FLAG):
        config.pluginmanager.register(_ExecutedLines(config), "asl-pallas-executed-lines")


class _ExecutedLines:
    def __init__(self, config: pytest.Config):
        self._file = Path(config.getoption(FLAG))
        self._is_worker = hasattr(config, "workerinput")  # of xdist, which sends its reports to the controller
        self._lines: set[tuple[str, int]] = set()
        self._function = ""
        self._tests: dict[str, Any] = {}
        if sys.version_info >= (3, 12):
            self._monitor()
        else:
            sys.settrace(self._trace)
            threading.settrace(self._trace)

    def _monitor(self) -> None:
        monitoring: Any = sys.monitoring  # type: ignore[attr-defined,unused-ignore]

        def line(code: CodeType, number: int) -> Any:
            if not code.co_filename.startswith(PACKAGE):
                return monitoring.DISABLE
            self._lines.add((code.co_filename, number))
            return None

        monitoring.use_tool_id(monitoring.COVERAGE_ID, "executed lines")
        monitoring.register_callback(monitoring.COVERAGE_ID, monitoring.events.LINE, line)
        monitoring.set_events(monitoring.COVERAGE_ID, monitoring.events.LINE)

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        self._lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._trace_line

    def _trace_line(self, frame: FrameType, event: str, argument: Any) -> Any:
        self._lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._trace_line

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        import jax

        function = item.nodeid.partition("[")[0]
        if function != self._function:
            jax.clear_caches()
            self._function = function
        self._lines.clear()
        yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        outcome = yield
        by_file: dict[str, list[int]] = {}
        for path, number in sorted(self._lines):
            by_file.setdefault(str(Path(path).relative_to(Path(PACKAGE).parent)), []).append(number)
        report: Any = outcome.get_result()  # type: ignore[attr-defined]
        is_long = item.get_closest_marker("long") is not None
        report.user_properties.append(("executed", {"long": is_long, "lines": by_file}))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        known = self._tests.setdefault(report.nodeid, {"seconds": 0.0, "passed": True})
        known["seconds"] = round(known["seconds"] + report.duration, 3)
        known["passed"] = known["passed"] and report.outcome == "passed"
        known.update(next((value for name, value in report.user_properties if name == "executed"), {}))  # type: ignore[call-overload]

    def pytest_sessionfinish(self) -> None:
        if sys.version_info >= (3, 12):
            monitoring: Any = sys.monitoring  # type: ignore[attr-defined,unused-ignore]
            monitoring.free_tool_id(monitoring.COVERAGE_ID)
        else:
            sys.settrace(None)
        if not self._is_worker:
            before = json.loads(self._file.read_text()) if self._file.exists() else {}
            self._file.write_text(json.dumps(before | self._tests, indent=0) + "\n")
