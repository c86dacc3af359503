"""The peak memory of one step in a process of its own: python -m profiling.peak CASE CONTENDER MODE, for `memory`."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from profiling import cases, contenders, local, torch_peers
from profiling.cases import CPU, GPU, GRADIENT, Case
from profiling.contenders import Contender


def environment() -> dict[str, str]:
    """malloc gives a freed array back at once, where by default it learns to keep those below 32 MiB."""
    return dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")


def measure(case: Case, contender: Contender, mode: str) -> dict[str, Any]:
    """Runs the step once to compile and warm up, and once more to see what it takes.

    Returns:
      peak: bytes over what was in use before the step. peak_by: who counted them.
    """
    backend = jax.default_backend()
    if contender.torch:
        operands = torch_peers.tensors(case.arrays(), cuda=backend == GPU)
        run = torch_peers.step(contender.build(), operands, mode == GRADIENT)
    else:
        arrays = jax.device_put(case.arrays())
        compiled = jax.jit(contenders.step(contender.build(), mode)).lower(*arrays).compile()

        def run() -> Any:
            return jax.block_until_ready(compiled(*arrays))

    run()
    if backend == CPU:
        peak, by = _resident(run), "the process's peak resident size"
    elif contender.torch:
        torch = torch_peers._torch()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peak, by = torch.cuda.max_memory_allocated() - before, "torch's allocator"
    else:
        device = jax.devices()[0]
        statistics: Any = device.memory_stats
        before, earlier = statistics()["bytes_in_use"], statistics()["peak_bytes_in_use"]
        run()
        peak, by = statistics()["peak_bytes_in_use"] - before, "the device's allocator"
        if backend != GPU and statistics()["peak_bytes_in_use"] == earlier:
            return {"peak": None, "peak_by": "an earlier contender's peak was higher, and the TPU's can't be set back"}
    return {"peak": peak, "peak_by": by}


def _resident(run: Callable[[], Any]) -> int:
    """The largest peak of a few calls, each from where the process stands once the one before it is forgotten.

    XLA gives buffers back a moment after the result is dropped: a call that starts earlier seems to need nothing.
    """
    peaks = []
    for _ in range(3):
        gc.collect()
        time.sleep(0.3)
        before = local.reset_peak()
        result = run()
        peaks.append(local.peak() - before)
        del result
    return max(peaks)


if __name__ == "__main__":
    name, contender_name, asked_mode = sys.argv[1:]
    (asked,) = cases.select([name])
    print(json.dumps(measure(asked, contenders.find(contender_name), asked_mode)))
