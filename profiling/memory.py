"""Memory: temporary bytes and traffic as compilers plan them, here and for absent chips; peaks where a step runs.

The traffic is XLA's count of the bytes that its operations read and write. Two things it can't count are mended: a
Pallas kernel on CUDA counts as nothing, so its operands and results are added, once each, as the kernel reads and
writes them; and a loop counts as one turn of it, so a program with a loop (the CPU's stream of blocks) counts its
arguments, its results and twice its temporaries, since what a turn leaves in the cache is no traffic.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from typing import Any

import jax

from profiling import contenders, local, targets
from profiling.cases import BACKENDS, CPU, GRADIENT, MODES, TPU, Case
from profiling.contenders import Contender
from profiling.session import Job, Request, Session, pairs

BITS = re.compile(r"([a-z]+)(\d+)?\w*\[([\d,]*)\]")


def jobs(request: Request) -> list[Job]:
    found = []
    for place in request.places():
        for case, contender in pairs(request, place):
            # Of torch there is the peak of a process alone, and XLA takes a minute for a slow contender on a TPU.
            costly = contender.torch or (contender.slow and place in targets.TPU)
            if costly and not request.whole(case):
                continue
            for mode in MODES if request.whole(case) and not request.quick else (GRADIENT,):
                found.append(_job(request, place, case, contender, mode))
    return found


def _job(request: Request, place: str, case: Case, contender: Contender, mode: str) -> Job:
    def measure() -> dict[str, Any]:
        figures = {"floor": case.floor_of(mode)}
        if not contender.torch:
            figures |= planned(place, case, contender, mode)
        if place in BACKENDS and request.whole(case):
            figures |= peak(case, contender, mode)
        return figures

    return Job("memory", place, case, contender, mode, measure, request.left_out(place, contender))


def measure(session: Session) -> None:
    session.run("memory", jobs(session.request))


def planned(place: str, case: Case, contender: Contender, mode: str) -> dict[str, Any]:
    """What the compiler says of one step."""
    step = contenders.step(contender.build(), mode)
    start = time.perf_counter()
    compiled: Any
    if place in BACKENDS:
        compiled = jax.jit(step).lower(*case.shapes()).compile()
    else:
        compiled = targets.compile_for(place, step, *case.shapes())
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    moved, by = traffic(compiled)
    return {
        "temporaries": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "traffic": moved,
        "traffic_by": by,
        "floor": case.floor_of(mode),
        "compile_seconds": seconds,
    }


def traffic(compiled: Any) -> tuple[float | None, str]:
    """Bytes that the program reads and writes, and how they were counted."""
    text, memory = compiled.as_text(), compiled.memory_analysis()
    if re.search(r"= .* while\(", text):
        ends = memory.argument_size_in_bytes + memory.output_size_in_bytes
        return ends + 2 * memory.temp_size_in_bytes, "arguments, results and twice the temporaries"
    try:
        properties = compiled.cost_analysis() or _cost_analysis(compiled)
    except Exception as error:  # private interface, or a backend without one
        return None, f"not counted: {type(error).__name__}"
    kernels = [line for line in text.splitlines() if "gpu.triton" in line and "custom-call(" in line]
    moved = properties["bytes accessed"] + sum(_operands_and_results(line, text) for line in kernels)
    return moved, "XLA's count, and the kernel's operands and results" if kernels else "XLA's count"


def _cost_analysis(compiled: Any) -> dict[str, float]:
    """XLA's cost analysis where a compiled program for an absent card gives none. jaxlib's private interface."""
    from jaxlib import _jax

    module = compiled.runtime_executable().hlo_modules()[0]
    return _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, module)


def _operands_and_results(line: str, text: str) -> int:
    """Bytes of a custom call's operands and results, from the program's text."""
    result, arguments = line.split(" custom-call(", 1)
    size = _bytes(result.partition("= ")[2])
    for name in re.findall(r"%([\w.\-]+)", arguments.partition(")")[0]):
        defined = re.search(rf"%{re.escape(name)} = (\S+|\([^)]*\)) ", text)
        size += _bytes(defined.group(1)) if defined else 0
    return size


def _bytes(shapes: str) -> int:
    total = 0
    for kind, bits, dims in BITS.findall(shapes):
        width = 1 if kind == "pred" else int(bits or 0) // 8
        total += width * math.prod(int(n) for n in dims.split(",") if n)
    return total


def peak(case: Case, contender: Contender, mode: str) -> dict[str, Any]:
    """The peak of a step that runs, over what was in use before it: the inputs are not in it, the gradient is.

    A process of its own, since an allocator's peak can't be set back; but on a TPU, which one process owns.
    """
    from profiling import peak as child

    if jax.default_backend() == TPU:
        return child.measure(case, contender, mode)
    if jax.default_backend() == CPU and not local.resettable_peak():
        return {"peak": None, "peak_by": "this system doesn't let a process reset its peak resident size"}
    command = [sys.executable, "-m", "profiling.peak", case.name, contender.name, mode]
    done = subprocess.run(command, cwd=local.ROOT, env=child.environment(), capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])
