"""The machine at hand: which of its devices JAX should use, and how figures name it. Import before jax."""

from __future__ import annotations

import functools
import glob
import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import subprocess
from collections.abc import Iterable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
HUGE_PAGES = "-huge-pages"
_TRANSPARENT_HUGE_PAGES = "/sys/kernel/mm/transparent_hugepage/enabled"
VERSIONS = (
    *("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc"),
    *("numpy", "optax", "torch", "timm"),
)


def choose_backend() -> None:
    """The CPU where no accelerator's device file is there: JAX's plug-ins for absent chips are slow to give up.

    On a GPU, memory is taken as it is needed, so that a child process of the memory measurement finds some. torch's
    threads sleep while they wait: spinning on cores that others want, XLA's threads among them, made 3 ms 110.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not any(glob.glob(pattern) for pattern in ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


@functools.cache
def name() -> str:
    """The device in words."""
    import jax

    if jax.default_backend() == "cpu":
        return f"{_processor()}, {os.cpu_count()} cores"
    return jax.devices()[0].device_kind


def slug() -> str:
    """The device as a folder's name; a CPU whose large arrays lie in huge pages counts as another."""
    import jax

    found = re.sub(r"[^a-z0-9]+", "-", name().lower()).strip("-")
    if jax.default_backend() != "cpu":
        return found
    return f"cpu-{found}{HUGE_PAGES if huge_pages() else ''}"


def huge_pages() -> str:
    """The setting by which the C library asks the system for huge pages and gets them, or nothing.

    Of 4 KiB each, those of a new array take as long to be made as the gradient in them takes to be computed.
    """
    asked = re.search(r"\bglibc\.malloc\.hugetlb=[12]\b", os.environ.get("GLIBC_TUNABLES", ""))
    try:
        given = "[never]" not in pathlib.Path(_TRANSPARENT_HUGE_PAGES).read_text()
    except OSError:
        given = False
    return asked.group() if asked and given else ""


def command_line(arguments: Iterable[str]) -> str:
    """What was typed, with what of the environment is part of the measurement."""
    setting = huge_pages()
    return (f"GLIBC_TUNABLES={setting} " if setting else "") + shlex.join(["python", "-m", "profiling", *arguments])


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", pathlib.Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def commit() -> str:
    """The commit that is measured, with a plus sign where the code differs from it; empty outside a checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        sources = ("asl_pallas", "reference", "profiling/*.py")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "--", *sources) else "")
    except OSError:
        return ""


def resettable_peak() -> bool:
    """Whether this system lets a process set its peak resident size back (Linux)."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def reset_peak() -> int:
    """Sets the process's peak resident size back to its present one, which is returned, in bytes."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    found: Any = re.search(rf"^{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text(), re.MULTILINE)
    return 1024 * int(found.group(1))
