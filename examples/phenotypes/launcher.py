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

GRACE = 10.0  # seconds that the others have to end by themselves when one has failed
SAID_LINES = 20


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
        signals = _Signals()
        stack.callback(signals.restore)
        address = f"127.0.0.1:{_free_port()}"
        children: list[subprocess.Popen] = []
        stack.callback(_kill, children)
        for index in range(processes):
            children.append(_start(index, address, said[index]))
        ended = _wait(children, signals)
        if signals.interrupts > 1:
            return 128 + signal.SIGINT
        if signals.terminated:
            return 128 + signals.terminated
        codes = [child.poll() for child in children]
        if signals.interrupts and (ended is None or codes[0] == -signal.SIGINT):
            return 128 + signal.SIGINT
        failed = _culprit(codes, ended)
        sys.stderr.write(_text(said[0]) if failed is None else _sentence(program, failed, codes[failed], said[failed]))
        if failed is None:
            return codes[0] or 0
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # a progress bar hides the cursor, and process 0 may not have brought it back
        return 1


class _Signals:
    """What the terminal and others ask of the launcher. Its children are out of the terminal's reach."""

    def __init__(self) -> None:
        self.interrupts = 0
        self.terminated = 0
        self._previous = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self.interrupts += 1
        else:
            self.terminated = number

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _start(index: int, address: str, said: IO[str]) -> subprocess.Popen:
    # sys.orig_argv has the interpreter's own flags as well.
    command = [sys.executable, *sys.orig_argv[1:], "--coordinator", address, "--process-id", str(index), "--launched"]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # never written to; it closes when the launcher goes, however it goes
        stdout=None if index == 0 else subprocess.DEVNULL,
        stderr=said,
        # Ctrl-C reaches the launcher alone, which passes it on: a child that got it twice would leave at once.
        start_new_session=True,
    )


def _wait(children: list[subprocess.Popen], signals: _Signals) -> int | None:
    """Until all have ended, by themselves or by force; returns which one failed first."""
    passed_on = 0
    failed, deadline = None, float("inf")
    while any(child.poll() is None for child in children):
        if signals.terminated or signals.interrupts > 1 or time.monotonic() > deadline:
            break
        if signals.interrupts > passed_on:
            passed_on = signals.interrupts
            for child in children:
                child.send_signal(signal.SIGINT)
        if failed is None:
            failed = next((i for i, child in enumerate(children) if _has_failed(child.poll())), None)
            if failed is not None:
                deadline = time.monotonic() + GRACE
        time.sleep(0.02)
    codes = [child.poll() for child in children]
    _kill(children)
    return failed if failed is not None else next((i for i, code in enumerate(codes) if _has_failed(code)), None)


def _has_failed(code: int | None) -> bool:
    return code not in (None, 0, 128 + signal.SIGINT)


def _culprit(codes: list[int | None], first: int | None) -> int | None:
    """The process that failed on its own account; the others lost it, or were killed here."""
    if first is None or codes[first] != EXIT_LOST:
        return first
    return next((i for i, code in enumerate(codes) if _has_failed(code) and code not in (EXIT_LOST, -9)), first)


def _sentence(program: str, index: int, code: int | None, said: IO[str]) -> str:
    text = _text(said)
    if code in (1, EXIT_LOST) and text.startswith(f"{program}: "):
        return text
    code = code or 0
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    last = "".join(text.splitlines(keepends=True)[-SAID_LINES:])
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
