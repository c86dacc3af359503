"""Several processes as one program: they meet, agree, and end together."""

import argparse
import contextlib
import json
import math
import os
import pathlib
import socket
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from phenotypes import cluster_flags, launcher
from phenotypes.errors import CannotRun
from phenotypes.interruption import Interruption, StopRequest
from phenotypes.lifeline import Lifeline

HEARTBEAT_TIMEOUT = 50  # seconds; JAX's own, which come after the lifeline's
_EACH_ITS_OWN = ("process_id", "coordinator", "join_timeout", "launched", "output")
PROGRAM = pathlib.Path(sys.argv[0]).name


class SharedInterruption:
    """Ctrl-C in any process, as all see it. Reading `requested` communicates: all read it at the same places."""

    def __init__(self, own: Interruption):
        self._own = own
        self._known = False

    @property
    def requested(self) -> bool:
        if not self._known:
            self._known = bool(multihost_utils.process_allgather(np.array(self._own.requested)).any())
        return self._known


def check_alike(options: argparse.Namespace, release: str) -> None:
    """Raises CannotRun where a process was started with other flags, or has other data, than process 0.

    They would draw other batches, or wait for each other forever.
    """
    if jax.process_count() == 1:
        return
    here = {name: value for name, value in vars(options).items() if name not in _EACH_ITS_OWN}
    here |= {"checkpoint_dir": options.checkpoint_dir is not None, "release": release}
    hashes = np.array([zlib.crc32(json.dumps(here[name]).encode()) for name in here], np.uint32)
    everywhere = multihost_utils.process_allgather(hashes)
    for process, place in np.argwhere(everywhere != everywhere[0]):
        name = list(here)[place]
        what = "the ontology's release" if name == "release" else "--" + name.replace("_", "-")
        raise CannotRun(f"{what} isn't the same for process {process} as for process 0")


@contextlib.contextmanager
def joined(options: argparse.Namespace, interruption: Interruption) -> Iterator[StopRequest]:
    """Makes the CPU's devices and, where the options say so, meets the cluster's other processes.

    Within a cluster an exception doesn't leave this context: it ends the process, and with it all others, by the
    exception's message if that is a CannotRun and by its traceback if not.

    Yields:
      The interruption that the session has to heed.
    """
    if options.launched:
        threading.Thread(target=launcher.end_with_launcher, daemon=True).start()
    if options.mesh is not None or options.coordinator is not None:
        devices = math.prod(cluster_flags.mesh_sizes(options.mesh).values()) if options.mesh else options.processes
        jax.config.update("jax_num_cpu_devices", devices // options.processes)  # other platforms have what they have
    if options.coordinator is None:
        yield interruption
        return
    lifeline = _join(options)
    try:
        yield SharedInterruption(interruption)
    except CannotRun as error:
        lifeline.fail(f"{PROGRAM}: {error}", 1)
    except SystemExit:
        lifeline.fail(f"{PROGRAM}: left by Ctrl-C", Interruption.EXIT_CODE)
    except BaseException as error:
        # A lost process may come up as an error of the sum that it took part in. The lifeline knows better.
        time.sleep(2)
        lifeline.fail("".join(traceback.format_exception(error)).rstrip(), 1)
    lifeline.finish()
    jax.distributed.shutdown()


def _join(options: argparse.Namespace) -> Lifeline:
    host = options.coordinator.rpartition(":")[0].strip("[]")
    if options.process_id == 0:
        _check_port(options.coordinator)
    timeout = options.join_timeout
    late = threading.Timer(timeout, _give_up, [options])
    late.daemon = True
    late.start()
    _silence_native_stdout()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would catch SIGTERM, and nothing here asks it
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process_id,
            # JAX's own timeouts end the process by SIGABRT: they come after ours.
            initialization_timeout=timeout + 60,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            coordinator_bind_address=options.coordinator if host == "127.0.0.1" else None,
        )
        lifeline = Lifeline.connect(host, timeout, PROGRAM)
    except (RuntimeError, OSError) as error:
        print(f"{PROGRAM}: --coordinator {options.coordinator}: {str(error).partition(chr(10))[0]}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)
    late.cancel()
    return lifeline


def _check_port(coordinator: str) -> None:
    """JAX's service hangs or prints two screens where it can't listen."""
    host, _, port = coordinator.rpartition(":")
    try:
        family = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", int(port)))
    except OSError as error:
        raise CannotRun(f"--coordinator: process 0 can't listen on {coordinator}: {error.strerror}") from error


def _give_up(options: argparse.Namespace) -> None:
    others = f"the {options.processes} processes haven't all met at {options.coordinator}"
    print(f"{PROGRAM}: {others} within --join-timeout {options.join_timeout} seconds", file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)


def _silence_native_stdout() -> None:
    """Gloo writes a line for each group of devices, from C++, to where the tables go."""
    sys.stdout.flush()
    ours = os.dup(sys.stdout.fileno())
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
    sys.stdout = os.fdopen(ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)
