"""A tile's way through a TPU kernel: the loss's arithmetic, and the stages between which a tile may wait in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu

from asl_pallas.kernels.operands import Operands, Result
from asl_pallas.kernels.tile import Task
from asl_pallas.kernels.tiling import TpuTiling
from asl_pallas.kernels.tpu_columns import ColumnSums, rows_added
from asl_pallas.kernels.versions import reciprocal
from asl_pallas.losses.ops import Ops

Stage = Callable[[Any, Operands, "Array | None"], Any]


def arithmetic(task: Task, operands: Operands, refines: bool) -> Ops:
    """The vector unit's max and min keep a NaN. Its reciprocal need not, and the numerator beside it does."""
    return Ops(
        reciprocal=_refined_reciprocal if refines else reciprocal,
        maximum=jnp.maximum,
        minimum=jnp.minimum,
        signed_per_element=task.needs_elements(operands),
        infer_label_from_slope=True,
        differentiable=False,
    )


def _refined_reciprocal(x: Array) -> Array:
    """The chip's estimate and a Newton step. One operation less than the compiler's own, which adds a correction."""
    estimate = reciprocal(x, approx=True)
    return estimate * (2.0 - x * estimate)


def stages_of(task: Task, tiling: TpuTiling, cut: int, ops: Ops, packed: bool) -> list[Stage]:
    """Up to one of the loss's cuts and from there on, or in one for a cut of 0.

    Statistics are counted in the first stage, which has the labels, and are handed on as partial sums: it also takes a
    tile that never gets to its end. Of the tile's last result `of_classes` is `ColumnSums`.
    """

    def count(tile: Operands, valid: Array | None) -> Any:
        if not task.statistics:
            return None
        counts = task.count(tile, valid, ops, packed)
        columns = None
        if tile.decisions:
            columns = jax.tree.map(rows_added, (counts, task.predict(tile, counts, valid, packed)))
        return jax.tree.map(tiling.partial_sums, counts), columns

    def counted(result: Result, found: Any) -> Result:
        if not task.statistics:
            return result
        counts, columns = found
        of_classes = None if columns is None else ColumnSums(rows_added(result.value), *columns)
        return result._replace(sums=result.sums._replace(counts=counts), of_classes=of_classes)

    if cut == 0:
        return [lambda carry, tile, valid: counted(task.evaluate(tile, valid, ops), count(tile, valid))]
    return [
        lambda carry, tile, valid: (task.until_cut(cut, tile, valid, ops), count(tile, valid)),
        lambda carry, tile, valid: counted(task.from_cut(cut, carry[0], tile, valid, ops), carry[1]),
    ]


def tile_of(task: Task, tiling: TpuTiling, operands: Operands) -> Operands:
    """Shapes and dtypes of a tile, as far as a loss sees them."""

    def of(n: int, m: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(tiling.lying(n, m), dtype)

    labels = operands.labels.dtype if task.labels == "dense" else jnp.dtype("bool")
    scalars = None
    if operands.scalars is not None:
        scalars = (jax.ShapeDtypeStruct((), operands.scalars.dtype),) * operands.scalars.size
    return Operands(
        logits=of(tiling.group, tiling.chunk, operands.logits.dtype),
        labels=of(tiling.group, tiling.chunk, labels),
        where=None if operands.where is None else of(tiling.group, tiling.chunk, jnp.bool_),
        negatives=None if operands.negatives is None else of(tiling.group, tiling.chunk, labels),
        vectors=tuple(of(1, tiling.chunk, jnp.float32) for _ in operands.vectors),
        scalars=scalars,
        decisions=tuple(of(1, tiling.chunk, jnp.float32) for _ in operands.decisions),
    )


def aside_of(stages: list[Stage], tile: Operands) -> list[Any]:
    """Memory for what the stages hand on, but for the last."""

    def hand_on(tile: Operands) -> list[Any]:
        carry, handed = None, []
        for stage in stages[:-1]:
            carry = stage(carry, tile, None)
            handed.append(carry)
        return handed

    return jax.tree.map(lambda a: pltpu.VMEM(a.shape, a.dtype), jax.eval_shape(hand_on, tile))
