"""The peak memory of one step in a process of its own: python -m profiling.peak CASE CONTENDER MODE, for `memory`."""

from __future__ import annotations

import json
import os
import sys
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
        before = local.reset_peak()
        found = run()
        peak, by = local.peak() - before, "the process's peak resident size"
    elif contender.torch:
        torch = torch_peers._torch()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = run()
        peak, by = torch.cuda.max_memory_allocated() - before, "torch's allocator"
    else:
        device = jax.devices()[0]
        statistics: Any = device.memory_stats
        before, earlier = statistics()["bytes_in_use"], statistics()["peak_bytes_in_use"]
        found = run()
        peak, by = statistics()["peak_bytes_in_use"] - before, "the device's allocator"
        if backend != GPU and statistics()["peak_bytes_in_use"] == earlier:
            return {"peak": None, "peak_by": "an earlier contender's peak was higher, and the TPU's can't be set back"}
    del found
    return {"peak": peak, "peak_by": by}


if __name__ == "__main__":
    name, contender_name, asked_mode = sys.argv[1:]
    (asked,) = cases.select([name])
    print(json.dumps(measure(asked, contenders.find(contender_name), asked_mode)))
