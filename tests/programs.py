"""Programs that tests start.

They have no deadlines: how fast this machine is says nothing about them. What hangs is ended by pytest's own timeout,
and whatever a test leaves running is killed after it (`conftest`).
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
# Seconds between two looks at what a program has done.
LOOK = 0.02

_started: list[subprocess.Popen[str]] = []


def start(*command: Any, **environment: str) -> subprocess.Popen[str]:
    """A Python program of these arguments, with pipes; the environment is the test's and this."""
    quiet = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    # Compiling takes longer than the few steps that are run. The number of devices is the program's own affair.
    quiet |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | quiet | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _started.append(process)
    return process


def example(name: str, *arguments: Any, **environment: str) -> subprocess.Popen[str]:
    """A script of examples/, in which a DeprecationWarning is an error."""
    return start("-W", "error::DeprecationWarning", EXAMPLES / name, *arguments, **environment)


def wait_until(process: subprocess.Popen[str], ready: Callable[[], bool], look: float = LOOK) -> None:
    """Until `ready()`, while the process runs."""
    while not ready():
        assert process.poll() is None, process.communicate()
        time.sleep(look)


def wait_for_line(process: subprocess.Popen[str], text: str) -> None:
    """Until it has printed a line with this text."""
    assert process.stdout is not None
    while text not in (line := process.stdout.readline()):
        assert line, process.communicate()


def kill_all() -> None:
    """What the test before has left."""
    for process in _started:
        if process.returncode is None:
            process.kill()
            process.communicate()
    _started.clear()
