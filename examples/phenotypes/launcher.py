"""--processes N: N processes of the same command on this machine, which end together."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import FrameType
from typing import IO

from phenotypes.errors import EXIT_LOST

GRACE = 5.0  # seconds that the others have to end by themselves when one has failed
POLL = 0.02
SAID_LINES = 20
INTERRUPTED = 128 + signal.SIGINT


def run(processes: int, program: str) -> int:
    """Runs this command again in `processes` processes of one cluster; returns what this one has to exit with.

    Process 0's output is this process's. What any of them writes to stderr is kept until the end: when one process
    dies, all complain, and only one of them knows why.

    Args:
      processes: how many.
      program: its name, which begins its own sentences on stderr.
    """
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in range(processes)]
        signals = stack.enter_context(_Signals())
        address = f"127.0.0.1:{_free_port()}"
        children: list[subprocess.Popen] = []
        stack.callback(_kill, children)
        for index in range(processes):
            children.append(_start(index, address, said[index]))
        ended = _wait(children, signals)
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # a progress bar hides the cursor, and process 0 may not have brought it back
        if signals.terminated:
            return 128 + signals.terminated
        culprit = _culprit(ended)
        if signals.interrupts and (culprit is None or ended[culprit] == -signal.SIGINT):
            return INTERRUPTED
        if culprit is None:
            sys.stderr.write(_text(said[0]))
            return ended[0]
        sys.stderr.write(_sentence(program, culprit, ended[culprit], _text(said[culprit])))
        return 1


class _Signals:
    """What the terminal and others ask of the launcher within this context. Its children are out of their reach."""

    def __init__(self) -> None:
        self.interrupts = 0
        self.terminated = 0

    def __enter__(self) -> "_Signals":
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupts += 1
        else:
            self.terminated = number


def _start(index: int, address: str, said: IO[str]) -> subprocess.Popen:
    # sys.orig_argv has the interpreter's own flags as well.
    command = [sys.executable, *sys.orig_argv[1:], "--coordinator", address, "--process-id", str(index), "--launched"]
    return subprocess.Popen(
        command,
        # Every process of a machine would otherwise take all of its accelerators.
        env={"JAX_PLATFORMS": "cpu", **os.environ},
        stdin=subprocess.PIPE,  # never written to; it closes when the launcher goes, however it goes
        stdout=None if index == 0 else subprocess.DEVNULL,
        stderr=said,
        # Ctrl-C reaches the launcher alone, which passes it on: a child that got it twice would leave at once.
        start_new_session=True,
    )


def _wait(children: list[subprocess.Popen], signals: _Signals) -> dict[int, int]:
    """Until all have ended, by themselves or by force; the exit codes of the former, in the order of their ends."""
    passed_on = 0
    deadline = float("inf")
    ended: dict[int, int] = {}
    while len(ended) < len(children):
        if signals.terminated or signals.interrupts > 1 or time.monotonic() > deadline:
            break
        if signals.interrupts > passed_on:
            passed_on = signals.interrupts
            for child in children:
                child.send_signal(signal.SIGINT)
        for index, child in enumerate(children):
            code = child.poll()
            if code is not None and index not in ended:
                ended[index] = code
        if deadline == float("inf") and any(map(_has_failed, ended.values())):
            deadline = time.monotonic() + GRACE
        time.sleep(POLL)
    return ended


def _has_failed(code: int) -> bool:
    return code not in (0, INTERRUPTED)


def _culprit(ended: dict[int, int]) -> int | None:
    """The first process that failed on its own account, and not because it had lost another one."""
    failed = [index for index, code in ended.items() if _has_failed(code)]
    return next((index for index in failed if ended[index] != EXIT_LOST), failed[0] if failed else None)


def _sentence(program: str, index: int, code: int, said: str) -> str:
    if code in (1, EXIT_LOST) and said.startswith(f"{program}: "):
        return said
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    last = "".join(said.splitlines(keepends=True)[-SAID_LINES:])
    return f"{program}: process {index} {how}" + (f"; the last that it said:\n{last}" if last else "\n")


def _text(said: IO[str]) -> str:
    said.seek(0)
    return said.read()


def _kill(children: list[subprocess.Popen]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()
        if child.stdin:
            child.stdin.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_with_launcher() -> None:
    """Blocks until the launcher is gone, and then ends this process: for a thread of a process that it has started."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(EXIT_LOST)
