"""What an accelerator itself spends on a step: its kernels' own time, as JAX's profiler records it.

The clock of the host also has what lies between kernels, and waits for the host where that is slower than the chip.
"""

from __future__ import annotations

import glob
import re
import tempfile
from collections.abc import Callable
from typing import Any

import jax

# By the profiler's names, planes and in them the lines whose events fill the chip's time: a GPU's streams, one event a
# kernel or copy, and a TPU's programs.
_LINES = {"/device:GPU": "Stream", "/device:TPU": "XLA Modules"}
WARM_UP, STEPS = 3, 20


def seconds(run: Callable[[int], None]) -> float | None:
    """The chip's time of one step, where `run` makes any number of them and waits; None where nothing is recorded."""
    run(WARM_UP)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run(STEPS)
        found = [
            busy(jax.profiler.ProfileData.from_file(path))
            for path in glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        ]
    return sum(found) / STEPS or None


def busy(profile: Any) -> float:
    """Seconds that the events on the chips' lines take together."""
    nanoseconds = 0.0
    for plane in profile.planes:
        wanted = _LINES.get(re.sub(r":\d+.*$", "", plane.name))
        for line in plane.lines:
            if wanted is not None and line.name.startswith(wanted):
                nanoseconds += sum(event.duration_ns for event in line.events)
    return nanoseconds * 1e-9
