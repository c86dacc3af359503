"""What the compilers say of the code that they made: a TPU's bundles, an H100's registers, spills, loads, instructions.

A TPU's bundle is one cycle of its core. Bundles are counted loop by loop: what is outside of loops once, the rest as
often as its loop turns, which libtpu's own comment (the grid) and, inside our kernel, its tiling tell. What a unit of
the core has to do, over how much of it the core can do in a cycle, tells which unit limits.

On CUDA the instructions are PTX, of warps: threads / 32 of them for each. A kernel with a loop whose turns the program
doesn't tell has none counted.
"""

from __future__ import annotations

import math
from typing import Any

from asl_pallas.formula import AsymmetricLoss
from asl_pallas.kernels.tile import Task
from asl_pallas.kernels.tiling import LANES, TPU_IDS, TpuTiling, tpu_ids, tpu_tiling, triton_tiling
from profiling import cases, contenders, targets
from profiling.cases import FORWARD, GRADIENT, MODES, Case
from profiling.contenders import Contender
from profiling.session import Job, Request, Session, pairs, places_of

# Compiles one step in a process of its own, as libtpu reads its flags once: target, case, contender, mode.
SCRIPT = """
import sys
from profiling import cases, contenders, targets
target, (case,), contender, mode = sys.argv[1], cases.select([sys.argv[2]]), contenders.find(sys.argv[3]), sys.argv[4]
targets.compile_for(target, contenders.step(contender.build(), mode), *case.shapes())
"""


def jobs(request: Request) -> list[Job]:
    found = []
    for place in places_of(request, targets.TARGETS):
        for case, contender in pairs(request, place):
            # All contenders on the case that the tables show; ours alone on the others, which is what is tuned.
            if not request.whole(case) and not (contender.ours and contender.implementation != "xla"):
                continue
            for mode in MODES:
                if mode == FORWARD and (request.quick or not contender.ours):
                    continue
                found.append(_job(request, place, case, contender, mode))
    return found


def _job(request: Request, place: str, case: Case, contender: Contender, mode: str) -> Job:
    def measure() -> dict[str, Any]:
        return (on_tpu if place in targets.TPU else on_cuda)(place, case, contender, mode)

    return Job("schedule", place, case, contender, mode, measure, request.left_out(place, contender))


def measure(session: Session) -> None:
    session.run("schedule", jobs(session.request))


def on_tpu(target: str, case: Case, contender: Contender, mode: str) -> dict[str, Any]:
    found = targets.schedules(target, SCRIPT, target, case.name, contender.name, mode)
    kernels: list[dict[str, Any]] = []
    cycles, counted, innermost = 0.0, True, None
    units: dict[str, float] = {}
    for schedule in found:
        trips, tile = trips_of(schedule, case, mode)
        innermost = schedule.innermost.bundles / (tile / 1024) if tile else innermost
        kernels.append({"name": schedule.name, "bundles_by_depth": schedule.by_depth, "trips_by_depth": trips})
        if trips is None:
            counted = False
            continue
        turns = [trips[loop.depth] for loop in schedule.loops]
        if tile and case.form == "sparse":
            turns = _with_ids(turns, schedule, case, mode)
        cycles += sum(n * loop.bundles for n, loop in zip(turns, schedule.loops, strict=True))
        for k, (unit, capacity) in enumerate(schedule.units):
            busy = sum(n * loop.used[k] for n, loop in zip(turns, schedule.loops, strict=True)) / capacity
            units[unit] = units.get(unit, 0) + busy
    limiting = max(units, key=lambda name: units[name])
    return {
        "bundles_per_1024": cycles / (case.elements / 1024) if counted else None,
        "innermost_per_1024": innermost,
        "bundles": sum(sum(schedule.by_depth) for schedule in found),
        "limiting_unit": limiting,
        "limiting_share": units[limiting] / cycles,
        "spills": sum(schedule.spills for schedule in found),
        "kernels": kernels,
    }


def trips_of(schedule: targets.Schedule, case: Case, mode: str) -> tuple[tuple[float, ...] | None, int]:
    """How often the bundles of each depth run: outside of loops, a block of the grid, a group of rows, a chunk.

    None for a kernel of XLA's with loops inside its grid, whose turns nothing tells: copies from one layout to another.
    And how many elements our kernel's innermost loop takes at a time, 0 for XLA's.
    """
    grid = float(math.prod(schedule.grid))
    if "asl_pallas" not in schedule.name:
        return ((1.0, grid)[: len(schedule.by_depth)], 0) if len(schedule.by_depth) <= 2 else (None, 0)
    tiling = _tiling(case, mode)
    rows, classes = case.shape
    groups = math.ceil(rows / tiling.group)
    blocks = math.ceil(classes / tiling.classes)
    if classes % tiling.chunk:
        # The last chunk, which isn't whole, is done in a loop over the groups of its own, in the last block of classes
        # alone. Beside it the bundles around the chunks of the other blocks, of the same depth, are a percent.
        blocks = 1
    # A grid of one block is no loop.
    trips = (1.0, *((grid,) if grid > 1 else ()), float(groups * blocks), float(groups * (classes // tiling.chunk)))
    return trips[: len(schedule.by_depth)], tiling.group * tiling.chunk


def _tiling(case: Case, mode: str) -> TpuTiling:
    task = Task(AsymmetricLoss(), "rows", mode == GRADIENT, labels=case.form)
    return tpu_tiling(task, case.operands())


def _with_ids(turns: list[float], schedule: targets.Schedule, case: Case, mode: str) -> list[float]:
    """The turns with those of the first loop of a block, which makes words of ids for 128 rows at a time."""
    tiling = _tiling(case, mode)
    rows, classes = case.shape
    first = next(n for n, loop in enumerate(schedule.loops) if loop.depth == 2)
    found = list(turns)
    found[first] = math.ceil(rows / LANES) * math.ceil(classes / tiling.classes)
    for n, loop in enumerate(schedule.loops[first + 1 :], first + 1):
        if loop.depth <= 2:
            break
        found[n] = found[first] * tpu_ids(cases.IDS) // TPU_IDS
    return found


def on_cuda(target: str, case: Case, contender: Contender, mode: str) -> dict[str, Any]:
    step = contenders.step(contender.build(), mode)
    found = targets.resources(target, step, *case.shapes())
    instructions: float | None = 0.0
    for kernel in found:
        warps = warp_instructions(kernel, case)
        instructions = None if warps is None or instructions is None else instructions + warps
    return {
        "kernels": len(found),
        "registers": max(kernel.registers for kernel in found),
        "spilled_bytes": sum(kernel.spilled_bytes for kernel in found),
        "widest_load": max(max(found, key=lambda kernel: kernel.instructions).loads, default=0),
        "instructions": sum(kernel.instructions for kernel in found),
        "instructions_per_1024": None if instructions is None else instructions / (case.elements / 1024),
        "by_kernel": [
            {"name": k.name, "registers": k.registers, "spilled_bytes": k.spilled_bytes, "instructions": k.instructions}
            for k in found
        ],
    }


def warp_instructions(kernel: targets.Resources, case: Case) -> float | None:
    """PTX instructions that all warps of a kernel issue; None where a loop's turns aren't known.

    What a branch skips is counted too: with sparse labels, the look at the ids in chunks that have none.
    """
    if kernel.launch is None:
        return None
    programs, threads = kernel.launch
    warps = programs * math.ceil(threads / 32)
    if not kernel.loop:
        return float(warps * kernel.instructions)
    if "asl_pallas" not in kernel.name:
        return None
    rows, classes = case.shape
    tiling = triton_tiling(rows, classes)
    if classes > tiling.chunk and classes % tiling.chunk:
        return None  # a loop for chunks with an edge beside the one for those without
    chunks = math.ceil(rows / tiling.rows) * math.ceil(classes / tiling.chunk)
    return warps * (kernel.instructions - kernel.loop) + chunks * tiling.warps * kernel.loop
