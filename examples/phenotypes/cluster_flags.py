"""The flags that spread a session over processes and devices. Imports nothing that takes time."""

import argparse
import math
from collections.abc import Callable

AXES = ("data", "model")


def coordinator(text: str) -> str:
    """An argparse type: HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} isn't HOST:PORT, such as 10.0.0.1:1234")
    return text


def mesh(text: str) -> str:
    """An argparse type: sizes of the axes data and model, such as model=2; all axes, in order, in what it returns."""
    sizes = dict.fromkeys(AXES, 1)
    given = set()
    for part in text.split(","):
        axis, equals, size = part.partition("=")
        if not (equals and size.isascii() and size.isdecimal() and 0 < int(size) < 2**31):
            raise argparse.ArgumentTypeError(f"{text!r} isn't of the form data=4,model=2")
        if axis not in sizes:
            raise argparse.ArgumentTypeError(f"{text!r} has an axis {axis!r}; there are {' and '.join(AXES)}")
        if axis in given:
            raise argparse.ArgumentTypeError(f"{text!r} has the axis {axis} twice")
        given.add(axis)
        sizes[axis] = int(size)
    return mesh_name(sizes)


def mesh_name(sizes: dict[str, int]) -> str:
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES)


def mesh_sizes(name: str) -> dict[str, int]:
    """The other way round."""
    return {axis: int(size) for axis, size in (part.split("=") for part in name.split(","))}


def add(parser: argparse.ArgumentParser, whole: Callable[[int], Callable[[str], int]]) -> None:
    """Adds the flags; `whole` is the argparse type factory for whole numbers from a minimum on."""
    group = parser.add_argument_group("several processes and devices")
    group.add_argument(
        "--processes",
        type=whole(1),
        default=1,
        metavar="N",
        help="start N processes on this machine that train together, on the CPU (1)",
    )
    group.add_argument(
        "--mesh",
        type=mesh,
        metavar="data=D,model=M",
        help="share the batch out among D devices and the labels among M; D * M is the number of devices of all "
        "processes, and on the CPU each process makes as many as it needs (with --processes or --coordinator: all "
        "devices for data, on the CPU one a process)",
    )
    group.add_argument(
        "--coordinator",
        type=coordinator,
        metavar="HOST:PORT",
        help="be one of the N processes of a cluster, on any platform, which meet at this address of process 0's "
        "machine; start every one of them yourself, with the same flags but for --process-id",
    )
    group.add_argument("--process-id", type=whole(0), metavar="I", help="which of them, from 0")
    group.add_argument(
        "--join-timeout",
        type=whole(1),
        default=45,
        metavar="SECONDS",
        help="how long to wait for all of them (45)",
    )
    group.add_argument("--launched", action="store_true", help=argparse.SUPPRESS)  # by launcher.py


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exits with 2 and a sentence if two flags don't go together."""
    if options.process_id is not None and options.coordinator is None:
        parser.error("--process-id: needs --coordinator")
    if options.coordinator is not None and options.process_id is None:
        parser.error("--coordinator: needs --process-id (and --processes)")
    if options.process_id is not None and options.process_id >= options.processes:
        parser.error(
            f"--process-id: {options.process_id} isn't less than --processes {options.processes}; ids begin at 0"
        )
    if options.mesh is not None and math.prod(mesh_sizes(options.mesh).values()) % options.processes:
        devices = math.prod(mesh_sizes(options.mesh).values())
        parser.error(
            f"--mesh: the {devices} devices of {options.mesh} can't be shared out equally among --processes "
            f"{options.processes}"
        )
