"""Where the tests run, and on which implementations."""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

pytest_plugins = ["cpu_time", "executed_lines"]


def pytest_configure(config: pytest.Config) -> None:
    """The CPU, unless tests of an accelerator are asked for; before anything imports jax."""
    marks = config.getoption("-m", default="") or ""
    if not any(mark in marks.replace(f"not {mark}", "") for mark in ("gpu", "tpu")):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
        # libtpu compiles for chips that are not there; without these it looks for them on the network.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    else:
        # The workers share the chip's memory: none may take most of it when it starts.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # The same examples every time and no clock: a slow machine must not fail a property.
    hypothesis.settings.register_profile(
        "asl_pallas", derandomize=True, deadline=None, database=None, max_examples=60, print_blob=False
    )
    hypothesis.settings.load_profile("asl_pallas")


# Files whose tests start processes: the longest tests come first, so that no worker waits for one at the end.
LONGEST = ("test_checkpoints.py", "test_processes.py", "test_example.py")


# Of tests with many parameters, those that take seconds and execute nothing that three short ones don't.
LONG = set((Path(__file__).parent / "long_by_measurement.txt").read_text().splitlines())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _mark_most_as_long(items)
    for item in items:
        if item.nodeid in LONG:
            item.add_marker(pytest.mark.long)
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def _mark_most_as_long(items: list[pytest.Item]) -> None:
    """Of a test with many parameters and the mark mostly_long(short=n), all but n are long; these are spread evenly."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("mostly_long") and not item.get_closest_marker("long"):
            groups.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for name, group in groups.items():
        mark = group[0].get_closest_marker("mostly_long")
        n = len(group)
        # Steps that share no divisor with how many there are meet every value of every parameter in turn. Each test
        # begins with another one: the first is "xla" in many of them.
        step = next(step for step in range(math.ceil(0.618 * n), 2 * n + 2) if math.gcd(step, n) == 1)
        begin = zlib.crc32(name.encode())
        kept = {(begin + i * step) % n for i in range(mark.kwargs["short"] if mark else 0)}
        for i, item in enumerate(group):
            if i not in kept:
                item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True)
def no_program_is_left() -> Iterator[None]:
    """Of those that a test has started, also where it failed or hung."""
    import programs

    yield
    programs.kill_all()


@pytest.fixture(params=["xla", "mosaic_tpu", "triton"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation by name, the kernels in interpret mode."""
    from cases import interpreted

    with interpreted(request.param):
        yield request.param
