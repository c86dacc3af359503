"""How much memory there is, how much a train step takes, and what its unfused twin would take."""

import dataclasses
import pathlib
import resource
import sys
from typing import Any

import jax
import numpy as np

from extreme.corpus import LENGTH

GIBIBYTE = 2**30

# Of what is free: XLA, the corpus and the other programs want some too.
SHARE = 0.75
SIZES = (1_000_000, 500_000, 200_000, 100_000, 50_000, 20_000, 10_000)


def available_bytes() -> int | None:
    """Free memory of the device, or of this machine and its container for the CPU; None where nothing says so."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    found = []
    meminfo = pathlib.Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 2**10)
    limit, used = (pathlib.Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip().isdecimal():
        found.append(int(limit.read_text()) - int(used.read_text()))
    return min(found, default=None)


def needed_bytes(labels: int, width: int, vocabulary: int, examples: int) -> int:
    """About what training takes: four times the parameters, for there are gradients and Adafactor's squares of them.

    Beside them are the examples, whose words are looked up one by one, forward and backward, and 1/2 GiB for Python and
    XLA. `train_extreme.py --steps 20` says 2.5 GiB of a million labels, and printed 2,552 MiB as its process's peak.
    """
    parameters = (width + 1) * (labels + vocabulary) + width**2
    return 4 * 4 * parameters + 2 * 4 * examples * LENGTH * width + GIBIBYTE // 2


def labels_that_fit(available: int | None, width: int, vocabulary: int, examples: int) -> int:
    """The largest of SIZES that does, a million where nobody knows, the least where none does."""
    if available is None:
        return SIZES[0]
    fitting = (size for size in SIZES if needed_bytes(size, width, vocabulary, examples) <= SHARE * available)
    return next(fitting, SIZES[-1])


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of a compiled train step; parameters and optimizer state are updated where they are.

    Attributes:
      state: parameters and optimizer state.
      labels: of a batch.
      temporaries: the parameters' gradients among them.
    """

    state: int
    labels: int
    temporaries: int

    @property
    def peak(self) -> int:
        return self.state + self.labels + self.temporaries


def step_memory(compiled: Any, state: Any, labels: Any) -> StepMemory:
    """By the compiler's plan; `labels` may be a shape alone."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError(f"the {jax.default_backend()} compiler doesn't say how much memory a step takes")
    return StepMemory(
        state=sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        labels=sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(labels)),
        temporaries=analysis.temp_size_in_bytes,
    )


def peak_resident_bytes() -> int:
    """The most that this process has had in memory so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 2**10
