"""What the compilers say of the code that they made: a TPU's bundles, an H100's registers, spills, loads, instructions.

A TPU's bundle is one cycle of its core. Bundles are counted loop by loop: what is outside of loops once, the rest as
often as its loop turns, which libtpu's own comment (the grid) and, inside our kernel, its tiling tell. What a unit of
the core has to do, over how much of it the core can do in a cycle, tells which unit limits.

On CUDA the instructions are PTX, of warps: threads / 32 of them for each. A kernel with a loop whose turns the program
doesn't tell has none counted.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import jax.numpy as jnp

from asl_pallas.kernels.tile import Operands, Task
from asl_pallas.kernels.tiling import LANES, TPU_IDS, TpuTiling, tpu_ids, tpu_tiling, triton_tiling
from asl_pallas.losses import AsymmetricLoss
from profiling import contenders, targets
from profiling.cases import FORWARD, GRADIENT, MODES, Case
from profiling.contenders import Contender
from profiling.session import Job, Request, Session, pairs, places_of

# Compiles one step in a process of its own, as libtpu reads its flags once: target, case, contender, mode.
SCRIPT = """
import json, sys
from profiling import cases, contenders, targets
target, case, contender, mode = sys.argv[1:]
step = contenders.step(contenders.find(contender).build(), mode)
targets.compile_for(target, step, *cases.Case(**json.loads(case)).shapes())
"""


# Loops of fewer bundles are the heads of others, or wait for copies.
_WAITING = 16


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
    found = targets.schedules(target, SCRIPT, target, json.dumps(dataclasses.asdict(case)), contender.name, mode)
    task = Task(AsymmetricLoss(), "rows", mode == GRADIENT, labels=case.form)
    kernels: list[dict[str, Any]] = []
    cycles, counted, innermost = 0.0, True, None
    units: dict[str, float] = {}
    for schedule in found:
        turns = turns_of(schedule, target, task, case.operands())
        loops = [
            {"depth": loop.depth, "bundles": loop.bundles, "turns": turns and turns[n]}
            for n, loop in enumerate(schedule.loops)
        ]
        kernels.append({"name": schedule.name, "bundles_by_depth": schedule.by_depth, "loops": loops})
        if is_ours(schedule) and turns is not None:
            tiling = tiling_for(target, task, case.operands())
            _, of_tiles = max((n * loop.bundles, loop.bundles) for n, loop in zip(turns, schedule.loops, strict=True))
            innermost = of_tiles / (tiling.group * tiling.chunk / 1024)
        if turns is None:
            counted = False
            continue
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


def is_ours(schedule: targets.Schedule) -> bool:
    return "asl_pallas" in schedule.name


def tiling_for(target: str, task: Task, operands: Operands) -> TpuTiling:
    with targets.lowering_for(target):
        return tpu_tiling(task, operands)


def turns_of(schedule: targets.Schedule, target: str, task: Task, operands: Operands) -> list[float] | None:
    """How often each loop's bundles run in all; the operands are those of our kernel, if it is ours.

    None for a kernel of XLA's with loops inside its grid, whose turns nothing tells: copies from one layout to another.
    """
    grid = float(math.prod(schedule.grid))
    if not is_ours(schedule):
        return [(1.0, grid)[loop.depth] for loop in schedule.loops] if len(schedule.by_depth) <= 2 else None
    tiling = tiling_for(target, task, operands)
    rows, classes = operands.logits.shape
    # Groups of rows in all blocks of them, of which the last one may have fewer.
    whole, rest = divmod(rows, tiling.rows)
    groups = whole * (tiling.rows // tiling.group) + math.ceil(rest / tiling.group)
    # Exponentials are of tiles: those of a block, and those at the classes' edge.
    of_tiles = [groups * (classes // tiling.chunk)] if classes >= tiling.chunk else []
    if classes % tiling.chunk:
        of_tiles.append(groups)
    exponentials = [name for name, _ in schedule.units].index("EUP")
    in_block = max(loop.depth for loop in schedule.loops if loop.used[exponentials])
    # Words are made of ids, 128 rows at a time, and some of their ids at a time, once for all blocks that share them.
    words = math.ceil(rows / LANES) * math.ceil(math.ceil(classes / tiling.classes) / tiling.blocks_of_words)
    found = []
    for loop in schedule.loops:
        of_block = loop.depth == in_block > 0 and loop.bundles > _WAITING
        if loop.depth > in_block:
            found.append(words * tpu_ids(operands.labels.shape[1]) / TPU_IDS)
        elif of_block and loop.used[exponentials]:
            found.append(float(of_tiles.pop(0)))
        elif of_block and task.labels == "sparse":
            found.append(float(words))
        else:
            found.append(grid if loop.depth else 1.0)
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
    plain = case.form == "dense" and not case.soft
    tiling = triton_tiling(rows, classes, jnp.dtype(case.logits).itemsize, plain)
    if classes > tiling.chunk and classes % tiling.chunk:
        return None  # a loop for chunks with an edge beside the one for those without
    chunks = math.ceil(rows / tiling.rows) * math.ceil(classes / tiling.chunk)
    return warps * (kernel.instructions - kernel.loop) + chunks * tiling.warps * kernel.loop
