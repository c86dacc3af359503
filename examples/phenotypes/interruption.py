"""Ctrl-C as a wish to stop, read where stopping is safe."""

import signal
import sys
from types import FrameType, TracebackType
from typing import Protocol


class StopRequest(Protocol):
    """Whether the user wants the session to stop: an Interruption, or cluster.SharedInterruption."""

    @property
    def requested(self) -> bool: ...


class Interruption:
    """Within this context the first SIGINT sets `requested` and the second ends the process with exit code 130.

    An exception instead would come up wherever the signal finds the program: inside a compilation, an import, or a
    step that has already given its old parameters away.
    """

    EXIT_CODE = 128 + signal.SIGINT

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interruption":
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            sys.exit(self.EXIT_CODE)
        self.requested = True
