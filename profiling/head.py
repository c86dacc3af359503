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

from asl_pallas import SparseLabels, asymmetric_loss, linear_asymmetric_loss
from asl_pallas.kernels.tile import Operands, Task
from asl_pallas.kernels.tiling import head_chunk
from asl_pallas.losses import AsymmetricLoss
from profiling import results, targets
from profiling.bounds import MIB, ROUNDS, Line
from profiling.cases import CPU, GPU, GRADIENT, SHORT, TPU
from profiling.results import Row
from profiling.schedule import is_ours, turns_of
from profiling.session import Session, described, device_of, places_of
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
        compiled = targets.compile_for(target, STEPS["fused"], *shapes(classes, "ids"))
        yield Line(_name(classes), "temporaries, fused", targets.temporary_bytes(compiled) / MIB, "MiB", bound)
        if classes == CLASSES:
            compiled = targets.compile_for(target, STEPS["unfused"], *shapes(classes, "bytes"))
            yield Line(_name(classes), "temporaries, unfused", targets.temporary_bytes(compiled) / MIB, "MiB")


def _name(classes: int) -> str:
    return f"{ROWS}x{DEPTH}-bf16, {classes:,} classes, {IDS} ids"


SCRIPT = """
import sys
from profiling import head, targets
targets.compile_for("v5e", head.STEPS[sys.argv[1]], *head.shapes(head.CLASSES, sys.argv[2]))
"""


def cycles_on_v5e() -> Iterator[Line]:
    """Bundles times turns of the fused step over those of its three products alone."""
    where = _name(CLASSES)
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
    """Of one call of a kernel: ours by its tiling, XLA's by its grid, and a sum by what its loop loads at a time."""
    if is_ours(schedule):
        logits = jax.ShapeDtypeStruct((ROWS, chunk), jnp.float32)
        labels = jax.ShapeDtypeStruct((ROWS, IDS), jnp.int32)
        task = Task(AsymmetricLoss(), "rows", True, labels="sparse")
        of_loops = turns_of(schedule, "v5e", task, Operands(logits, labels))
        return sum(n * loop.bundles for n, loop in zip(of_loops or (), schedule.loops, strict=True))
    outside = schedule.by_depth[0]
    if schedule.grid:
        return outside + math.prod(schedule.grid) * sum(schedule.by_depth[1:])
    if len(schedule.by_depth) == 1:
        return float(outside)
    names = [name for name, _ in schedule.units]
    loads = max(loop.used[names.index("VLOAD")] for loop in schedule.loops)
    turns = ROWS * chunk / 1024 / loads if schedule.name.startswith("reduce") else 1
    return outside + turns * sum(schedule.by_depth[1:])


def on_this_device(shape: tuple[int, int, int], dtype: str) -> Iterator[Line]:
    """Times in turns; on an accelerator beside the three products, whose rate is the floor there."""
    rows, depth, classes = shape
    where = f"{rows}x{depth}-{SHORT[dtype]}, {classes:,} classes, int8"
    random = np.random.default_rng(0)
    features = jnp.asarray(random.standard_normal((rows, depth), np.float32), dtype)
    kernel = jnp.asarray(random.standard_normal((depth, classes), np.float32) / depth**0.5, dtype)
    labels = jnp.asarray(random.random((rows, classes), np.float32) < 1e-4, jnp.int8)
    operands = {"fused": labels, "unfused": labels}
    if dtype != "float32":
        operands["three_products"] = labels.astype(dtype)
    compiled = {name: jax.jit(STEPS[name]).lower(features, kernel, third).compile() for name, third in operands.items()}
    runners = {
        name: Runner(name, lambda n=name: jax.block_until_ready(compiled[n](features, kernel, operands[n])), None)
        for name in compiled
    }
    for _ in range(ROUNDS):
        for runner in runners.values():
            runner.time()
    for name, runner in runners.items():
        yield Line(where, f"time, {name.replace('_', ' ')}", 1e3 * statistics.median(runner.seconds), "ms")
    for name, least in (("unfused", 1.0), ("three_products", 0.75)):
        if name in runners:
            ratios = [b / a for a, b in zip(runners["fused"].seconds, runners[name].seconds, strict=True)]
            what = f"{name.replace('_', ' ')} over fused, median of {ROUNDS}"
            yield Line(where, what, statistics.median(ratios), "x", least, True)
    ours, theirs = (targets.temporary_bytes(compiled[name]) / MIB for name in ("fused", "unfused"))
    yield Line(where, "temporaries, fused", ours, "MiB", theirs / 20)
    yield Line(where, "temporaries, unfused", theirs, "MiB")


PARTS: dict[str, tuple[Callable[[], Iterator[Line]], ...]] = {
    CPU: (lambda: on_this_device(ON_CPU, "float32"),),
    GPU: (lambda: on_this_device((ROWS, DEPTH, CLASSES), "bfloat16"),),
    TPU: (lambda: on_this_device((ROWS, DEPTH, CLASSES), "bfloat16"),),
    "v5e": (functools.partial(memory, "v5e", {CLASSES: 8, MANY_CLASSES: 64}), cycles_on_v5e),
    "h100": (functools.partial(memory, "h100", {CLASSES: 128}),),
}


def measure(session: Session) -> None:
    """Of the places asked for; a request for some cases or contenders of the loss is none for the head."""
    if session.request.case is not None or session.request.only is not None:
        return
    with session.progress() as progress:
        task = progress.add_task("head", total=len(PARTS))
        for place in places_of(session.request, PARTS):
            progress.update(task, description=f"head: {place}")
            for part in PARTS[place]:
                session.rows += _rows(device_of(place), part)
            progress.advance(task)


def _rows(device: str, part: Callable[[], Iterator[Line]]) -> list[Row]:
    found = []
    try:
        for line in part():
            figures = {"figure": line.figure, "unit": line.unit, "bound": line.bound, "at_least": line.at_least}
            found.append(Row("head", device, line.where, line.what, GRADIENT, figures | {"holds": line.holds}))
    except targets.MissingCompiler as reason:
        return [Row("head", device, "", "", GRADIENT, status=results.MISSING, note=str(reason))]
    except Exception as error:  # of any kind: the other places go on
        failed = Row("head", device, "", "", GRADIENT, status=results.FAILED, note=described(error))
        return [*found, failed]
    return found
