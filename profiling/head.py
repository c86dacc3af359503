"""The head without logits, measured beside the head with them: memory, traffic of labels, cycles on a TPU, time here.

    python -m profiling head

The unfused step is a linear layer in the features' dtype and `asymmetric_loss` of its logits, with int8 labels. Both
give the loss and the gradients of features and kernel.
"""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from asl_pallas import SparseLabels, asymmetric_loss, linear_asymmetric_loss
from asl_pallas.formula import AsymmetricLoss
from asl_pallas.kernels.tile import Operands, Task
from asl_pallas.kernels.tiling import head_chunk, tpu_tiling
from profiling import targets
from profiling.bounds import MIB, ROUNDS, Line, show
from profiling.speed import Runner

ROWS, DEPTH, CLASSES, IDS = 4096, 1024, 131_072, 16
MANY_CLASSES = 1_048_576
ON_CPU = (256, 256, CLASSES)


def fused(features: Any, kernel: Any, labels: Any) -> Any:
    return linear_asymmetric_loss(features, kernel, labels, axis=None)


def unfused(features: Any, kernel: Any, labels: Any) -> Any:
    return asymmetric_loss(features @ kernel, labels, axis=None)


def three_products(features: Any, kernel: Any, slope: Any) -> tuple[Any, Any, Any]:
    """What any head has to multiply: the logits, and both gradients from the logits' gradient."""
    logits = jnp.dot(features, kernel, preferred_element_type=jnp.float32)
    return logits.astype(features.dtype), slope @ kernel.T, features.T @ slope


STEPS = {f.__name__: jax.value_and_grad(f, (0, 1)) for f in (fused, unfused)} | {"three_products": three_products}


def shapes(classes: int, third: str) -> tuple[Any, ...]:
    """Features, kernel, and labels as ids or bytes or, for the products alone, the logits' gradient."""
    thirds = {
        "ids": SparseLabels.tree_unflatten(classes, (jax.ShapeDtypeStruct((ROWS, IDS), jnp.int32),)),
        "bytes": jax.ShapeDtypeStruct((ROWS, classes), jnp.int8),
        "slope": jax.ShapeDtypeStruct((ROWS, classes), jnp.bfloat16),
    }
    of_features, of_kernel = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((ROWS, DEPTH), (DEPTH, classes)))
    return of_features, of_kernel, thirds[third]


def memory(target: str, most: dict[int, float]) -> Iterator[Line]:
    """Temporaries compiled for a chip; `most` has the bound by the number of classes."""
    targets.device(target)
    for classes, bound in most.items():
        where = f"{target}, bf16 features {ROWS} x {DEPTH}, {classes:,} classes, {IDS} ids"
        compiled = targets.compile_for(target, STEPS["fused"], *shapes(classes, "ids"))
        yield Line(where, "temporaries, fused", targets.temporary_bytes(compiled) / MIB, "MiB", bound)
        if classes == CLASSES:
            compiled = targets.compile_for(target, STEPS["unfused"], *shapes(classes, "bytes"))
            yield Line(where, "temporaries, unfused", targets.temporary_bytes(compiled) / MIB, "MiB")


SCRIPT = """
import sys
from profiling import head, targets
targets.compile_for("v5e", head.STEPS[sys.argv[1]], *head.shapes(head.CLASSES, sys.argv[2]))
"""


def cycles_on_v5e() -> Iterator[Line]:
    """Bundles times turns of the fused step over those of its three products alone."""
    where = f"v5e, bf16 features {ROWS} x {DEPTH}, {CLASSES:,} classes, {IDS} ids"
    text = targets.compile_for("v5e", STEPS["fused"], *shapes(CLASSES, "ids")).as_text()
    in_loop = set(re.findall(r"%([\w.]+) = [^\n]*/while/body/", text))
    chunk = head_chunk(ROWS, CLASSES)
    chunks = math.ceil(CLASSES / chunk)
    mine = sum(
        _cycles(schedule, chunk) * (chunks if schedule.name in in_loop else 1)
        for schedule in targets.schedules("v5e", SCRIPT, "fused", "ids")
    )
    products = sum(_cycles(s, chunk) for s in targets.schedules("v5e", SCRIPT, "three_products", "slope"))
    yield Line(where, "cycles of the three products alone", products / 1e6, "million")
    yield Line(where, f"cycles of the fused step, {chunks} chunks of {chunk} classes", mine / 1e6, "million")
    yield Line(where, "fused over the products", mine / products, "x", 1.35)


def _cycles(schedule: targets.Schedule, chunk: int) -> float:
    """Of one call of a kernel: XLA's by its grid, ours by its tiling, and a sum by what its loop loads at a time."""
    outside = schedule.by_depth[0]
    if "asl_pallas" in schedule.name:
        logits = jax.ShapeDtypeStruct((ROWS, chunk), jnp.float32)
        labels = jax.ShapeDtypeStruct((ROWS, IDS), jnp.int32)
        task = Task(AsymmetricLoss(), "rows", True, labels="sparse")
        tiling = tpu_tiling(task, Operands(logits, labels))  # type: ignore[arg-type]
        blocks = math.ceil(ROWS / tiling.rows) * math.ceil(chunk / tiling.classes)
        tiles = math.ceil(ROWS / tiling.group) * math.ceil(chunk / tiling.chunk)
        innermost = schedule.innermost
        total = float(outside + blocks * schedule.by_depth[1])
        for loop in schedule.loops:
            if loop.depth >= 2:
                # Before the loop over tiles there is one that makes words of ids: 128 rows a turn, 8 ids in its own.
                of_words = loop.depth == 3 and loop is not innermost and loop.bundles > 8
                turns = ROWS / 128 * (math.ceil(IDS / 8) if of_words else 1)
                total += loop.bundles * (tiles if loop is innermost else turns)
        return total
    if schedule.grid:
        return outside + math.prod(schedule.grid) * sum(schedule.by_depth[1:])
    if len(schedule.by_depth) == 1:
        return float(outside)
    names = [name for name, _ in schedule.units]
    loads = max(loop.used[names.index("VLOAD")] for loop in schedule.loops)
    turns = ROWS * chunk / 1024 / loads if schedule.name.startswith("reduce") else 1
    return outside + turns * sum(schedule.by_depth[1:])


def on_the_cpu() -> Iterator[Line]:
    rows, depth, classes = ON_CPU
    where = f"CPU, float32 features {rows} x {depth}, {classes:,} classes, int8 labels"
    random = np.random.default_rng(0)
    arrays = jax.device_put(
        (
            random.standard_normal((rows, depth), np.float32),
            random.standard_normal((depth, classes), np.float32) / math.sqrt(depth),
            (random.random((rows, classes), np.float32) < 1e-4).astype(np.int8),
        )
    )
    compiled = {name: jax.jit(STEPS[name]).lower(*arrays).compile() for name in ("fused", "unfused")}
    runners = {
        name: Runner(name, lambda run=run: jax.block_until_ready(run(*arrays)), None)  # type: ignore[misc]
        for name, run in compiled.items()
    }
    for _ in track(range(ROUNDS), "CPU, in turns", console=Console(stderr=True)):
        for runner in runners.values():
            runner.time()
    for name, runner in runners.items():
        yield Line(where, f"time, {name}", 1e3 * statistics.median(runner.seconds), "ms")
    ratios = [b / a for a, b in zip(runners["fused"].seconds, runners["unfused"].seconds, strict=True)]
    yield Line(where, f"unfused over fused, median of {ROUNDS}", statistics.median(ratios), "x", 1, True)
    ours, theirs = (targets.temporary_bytes(compiled[name]) / MIB for name in ("fused", "unfused"))
    yield Line(where, "temporaries, fused", ours, "MiB", theirs / 20)
    yield Line(where, "temporaries, unfused", theirs, "MiB")


def main() -> int:
    parts: list[Callable[[], Iterator[Line]]] = [
        on_the_cpu,
        functools.partial(memory, "v5e", {CLASSES: 8, MANY_CLASSES: 64}),
        cycles_on_v5e,
        functools.partial(memory, "h100", {CLASSES: 128}),
    ]
    return show(f"The head without logits: value, gradients of features and kernel, jax {jax.__version__}", parts)
