"""How a session's processes learn at once that one of them has ended, and why.

A process that waits for another one's part of a sum waits in native code, where no exception comes up; JAX's own
heartbeats end it in the end, by SIGABRT and with a page of C++ frames. Here every process holds a connection to
process 0, which the kernel closes when either end dies in whatever way, and a thread ends the waiting process with a
sentence. What closes no connection (a machine without power, a stopped process) is noticed by its silence.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from phenotypes.errors import EXIT_LOST

SIGN_OF_LIFE = 5.0  # seconds between two
SILENCE = 30.0  # seconds after which a process counts as lost


class Lifeline:
    """Connections between process 0 and all others, from `connect` until `finish` or `fail`."""

    def __init__(self, index: int, peers: dict[int, socket.socket], program: str):
        self._index, self._peers, self._program = index, peers, program
        self._farewells = {peer: threading.Event() for peer in peers}
        self._leaving = threading.Lock()  # taken once and for all: one thread has the last word
        for peer, connection in peers.items():
            connection.settimeout(SILENCE)
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()
        threading.Thread(target=self._live, daemon=True).start()

    @classmethod
    def connect(cls, coordinator_host: str, timeout: float, program: str) -> "Lifeline":
        """Called in all processes at the same time, once jax.distributed works.

        Args:
          coordinator_host: process 0's.
          timeout: seconds for all to be connected.
          program: begins the sentences on stderr.

        Raises:
          OSError: no connection in time.
        """
        index, processes = jax.process_index(), jax.process_count()
        family = socket.getaddrinfo(coordinator_host, None, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as listener:
            if index == 0:
                listener.bind((coordinator_host if coordinator_host == "127.0.0.1" else "", 0))
                listener.listen(processes)
                listener.settimeout(timeout)
            port = int(multihost_utils.broadcast_one_to_all(np.int32(index or listener.getsockname()[1])))
            if index:
                connection = socket.create_connection((coordinator_host, port), timeout)
                connection.sendall(index.to_bytes(4, "big"))
                peers = {0: connection}
            else:
                accepted = [listener.accept()[0] for _ in range(processes - 1)]
                peers = {
                    int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big"): connection for connection in accepted
                }
        return cls(index, peers, program)

    def finish(self) -> None:
        """Returns once every process has come to its end; until then a lost one is noticed."""
        if self._index:
            self._tell("farewell")
        for farewell in self._farewells.values():
            farewell.wait()
        if not self._index:
            self._tell("farewell")

    def fail(self, sentence: str, code: int) -> NoReturn:
        """Tells the others why and ends this process, without the farewells that would wait for the others."""
        self._leaving.acquire()
        self._end(sentence, f"process {self._index}: {sentence.removeprefix(self._program + ': ')}", code)

    def _live(self) -> None:
        while True:
            time.sleep(SIGN_OF_LIFE)
            self._tell("alive")

    def _listen(self, peer: int) -> None:
        sentence = f"process {peer} has ended or can't be reached any more"
        try:
            with self._peers[peer].makefile(encoding="utf-8") as lines:
                for word, reason in map(json.loads, lines):
                    if word == "farewell":
                        self._farewells[peer].set()
                    elif word == "failed":
                        sentence = reason
                        break
        except TimeoutError:
            sentence = f"process {peer} hasn't been heard of for {SILENCE:g} seconds"
        except OSError:
            pass  # the connection was cut: as above
        if not self._farewells[peer].is_set():
            self._leaving.acquire()
            self._end(f"{self._program}: {sentence}", sentence, EXIT_LOST)

    def _tell(self, word: str, reason: str = "") -> None:
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps([word, reason]).encode() + b"\n")

    def _end(self, here: str, there: str, code: int) -> NoReturn:
        self._tell("failed", there)
        if sys.stdout.isatty():
            sys.stdout.write("\x1b[?25h")  # a progress bar hides the cursor
        sys.stdout.flush()
        sys.stderr.write(here + "\n")
        sys.stderr.flush()
        if not self._index:
            # With process 0 goes the service that all others need, and without it they don't end by a sentence.
            time.sleep(0.5)
        os._exit(code)
