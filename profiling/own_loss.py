"""A loss object of one's own: how exact every kernel is, and what it costs on a TPU.

    python -m profiling.own_loss my_losses:Squared                # the class or object of that name, in that module
    python -m profiling.own_loss asl_pallas.losses:HillLoss --target v5e --target v6e
    python -m profiling.own_loss asl_pallas.losses:AsymmetricLoss --statistics --target v5e
    python -m profiling.own_loss asl_pallas.losses:HillLoss --local    # on this machine's accelerator, against a copy

Exactness: loss and slope of each element by every implementation, the kernels in Pallas's interpreter, against the
object's own `value` in float64 and its derivative by autodiff. The bound is the project's: 1.5 times the error of the
same `value` in float32, plus 1e-6, in units of max(1, |truth|). A formula that is itself inexact, log(1 + exp(x)) say,
shows in the column of float32.

Cost: value and gradient of 4096 x 8192 bfloat16 logits with int8 labels, compiled for a chip that needn't be there: how
many bundles the schedule takes for 1024 elements, how many values are spilled, how many bytes of temporaries there are.

Speed: the same step here, by the clock, in turns with a copy of logits and labels. Its rate counts logits and labels
read once and the gradient written once; the copy's, both read and written once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asl_pallas import kernels, multilabel_loss
from asl_pallas.kernels.tile import Operands, Task
from asl_pallas.kernels.versions import lacks_mosaic_gpu
from asl_pallas.losses import ElementwiseLoss, Label
from profiling import schedule, targets
from profiling.parity import FACTOR, PLUS

ROWS, CLASSES = 4096, 8192

_SCRIPT = """
import os, sys
target, name, statistics, path = sys.argv[1:]
sys.path[:0] = path.split(os.pathsep)
import jax
from asl_pallas import multilabel_loss
from profiling import own_loss, targets
loss = own_loss.find(name)
targets.compile_for(target, own_loss.step(loss, statistics == "True"), *own_loss.shapes())
"""


class Exactness(NamedTuple):
    """The largest errors of loss and slope, in units of max(1, |truth|), and those that are allowed."""

    implementation: str
    value: float
    slope: float
    most_value: float
    most_slope: float

    @property
    def holds(self) -> bool:
        return self.value <= self.most_value and self.slope <= self.most_slope


class Cost(NamedTuple):
    target: str
    bundles_per_1024: float
    spills: int
    temporary_bytes: int


def find(name: str) -> ElementwiseLoss:
    """The loss object "module:name"; of a class, one with its defaults."""
    module, _, attribute = name.partition(":")
    loss = getattr(importlib.import_module(module), attribute)
    loss = loss() if isinstance(loss, type) else loss
    if not isinstance(loss, ElementwiseLoss):
        raise TypeError(f"{name} is {loss!r}; expected a loss object or its class")
    return loss


def shapes() -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct((ROWS, CLASSES), jnp.bfloat16), jax.ShapeDtypeStruct((ROWS, CLASSES), jnp.int8)


def exactness(loss: ElementwiseLoss, shape: tuple[int, int] = (9, 300)) -> list[Exactness]:
    """Of hard labels; logits around 0, and some of +-30, +-88 and +-1e4."""
    random = np.random.default_rng(0)
    x = random.normal(0, 4, shape).astype(np.float32)
    x.reshape(-1)[:7] = [0, 30, -30, 88, -88, 1e4, -1e4]
    states = [0, 1] if loss.third_state is None else [0, 1, loss.third_state]
    y = random.choice(states, shape).astype(np.int8)
    with jax.enable_x64(True):
        truth = _by_definition(loss, x.astype(np.float64), y)
    in_float32 = [_error(part, of_truth) for part, of_truth in zip(_by_definition(loss, x, y), truth, strict=True)]
    most = [FACTOR * error + PLUS for error in in_float32]
    found = [Exactness("value, in float32", *in_float32, *most)]
    for name in ("xla", "mosaic_tpu", "triton", "mosaic_gpu"):
        if name == "mosaic_gpu" and lacks_mosaic_gpu():
            continue
        with kernels.interpret_mode():
            pair = jax.jit(lambda x, y, name=name: _of_elements(loss, x, y, name))(x, y)
        found.append(Exactness(name, *(_error(part, t) for part, t in zip(pair, truth, strict=True)), *most))
    return found


def _by_definition(loss: ElementwiseLoss, x: Any, y: Any) -> tuple[Any, Any]:
    third = loss.third_state
    label = Label(jnp.asarray(y == 1), False if third is None else jnp.asarray(y == third), dtype=np.asarray(x).dtype)
    value, pull_back = jax.vjp(lambda x: loss.value(x, label), jnp.asarray(x))
    return value, pull_back(jnp.ones_like(value))[0]


def _of_elements(loss: ElementwiseLoss, x: Any, y: Any, implementation: str) -> tuple[Any, Any]:
    value, pull_back = jax.vjp(lambda x: multilabel_loss(loss, x, y, axis=(), implementation=implementation), x)
    return value, pull_back(jnp.ones_like(value))[0]


def _error(found: Any, truth: Any) -> float:
    f, t = np.asarray(found, np.float64), np.asarray(truth)
    with np.errstate(invalid="ignore"):
        error = np.abs(f - t) / np.maximum(1, np.abs(t))
    same = (f == t) | (np.isnan(f) & np.isnan(t))
    return float(np.max(np.where(same, 0.0, np.where(np.isfinite(error), error, np.inf))))


def step(loss: ElementwiseLoss, statistics: bool = False, implementation: str = "mosaic_tpu") -> Any:
    """Value and gradient of all losses' sum, and the statistics of each row."""

    def total(x: Any, y: Any) -> Any:
        found = multilabel_loss(loss, x, y, statistics=statistics, implementation=implementation)
        losses, of_rows = found if statistics else (found, None)
        return losses.sum(), of_rows

    return jax.value_and_grad(total, has_aux=True)


def cost(name: str, target: str, statistics: bool = False) -> Cost:
    """Of the loss "module:name", compiled for a TPU: of its kernel, which all but some sums of rows is."""
    loss = find(name)
    task, operands = Task(loss, "rows", True, statistics=statistics), Operands(*shapes())
    cycles, spills = 0.0, 0
    path = os.pathsep.join(filter(None, sys.path))
    for one in targets.schedules(target, _SCRIPT, target, name, str(statistics), path):
        turns = schedule.turns_of(one, target, task, operands)
        if turns is None:
            raise RuntimeError(f"{one.name} has loops whose turns nothing tells")
        cycles += sum(n * loop.bundles for n, loop in zip(turns, one.loops, strict=True))
        spills += one.spills

    compiled = targets.compile_for(target, step(loss, statistics), *shapes())
    return Cost(target, cycles / (ROWS * CLASSES / 1024), spills, targets.temporary_bytes(compiled))


def speed(loss: ElementwiseLoss, rounds: int = 7, calls: int = 60) -> tuple[float, float]:
    """Bytes a second of value and gradient on this machine, and of a copy, medians of turns."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(-2, 2, (ROWS, CLASSES)), jnp.bfloat16)
    y = jnp.asarray(random.random((ROWS, CLASSES)) < 0.01, jnp.int8)
    step = jax.jit(jax.value_and_grad(lambda x, y: multilabel_loss(loss, x, y, axis=None)))
    copy = jax.jit(lambda x, y: (x + 1, y + 1))
    moved = {step: 2 * x.nbytes + y.nbytes, copy: 2 * x.nbytes + 2 * y.nbytes}
    seconds: dict[Any, list[float]] = {step: [], copy: []}
    for f in seconds:
        jax.block_until_ready(f(x, y))
    for _ in range(rounds):
        for f, times in seconds.items():
            start = time.perf_counter()
            for _ in range(calls):
                result = f(x, y)
            jax.block_until_ready(result)
            times.append((time.perf_counter() - start) / calls)
    ours, of_copy = (moved[f] / statistics.median(times) for f, times in seconds.items())
    return ours, of_copy


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m profiling.own_loss", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("loss", help="module:name of a loss object, or of its class")
    parser.add_argument("--target", action="append", choices=targets.TPU, help="a TPU to compile for, several times")
    parser.add_argument("--statistics", action="store_true", help="with statistics, in the bundles of --target")
    parser.add_argument("--local", action="store_true", help="time it on this machine, against a copy")
    options = parser.parse_args(arguments)
    rows = exactness(find(options.loss))
    print(f"{'':20} {'error of the loss':>18} {'allowed':>9} {'of the slope':>13} {'allowed':>9}")
    for row in rows:
        held = "" if row.holds else "  beyond the bound"
        print(
            f"{row.implementation:20} {row.value:18.1e} {row.most_value:9.1e} {row.slope:13.1e} "
            f"{row.most_slope:9.1e}{held}"
        )
    for target in options.target or []:
        found = cost(options.loss, target, options.statistics)
        print(
            f"{target}: {found.bundles_per_1024:.2f} bundles per 1024 elements, {found.spills} spills, "
            f"{found.temporary_bytes:,} bytes of temporaries"
        )
    if options.local:
        ours, of_copy = speed(find(options.loss))
        device = jax.devices()[0].device_kind
        print(f"{device}: {ours / 1e9:,.0f} GB/s, {ours / of_copy:.0%} of a copy's {of_copy / 1e9:,.0f}")
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
