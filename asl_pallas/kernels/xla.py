"""Plain jnp: in one expression where XLA fuses it, streamed over blocks on the CPU, where it does not."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from asl_pallas.kernels.tile import Operands, Result, Task
from asl_pallas.kernels.tiling import cpu_tiling


def run(task: Task, operands: Operands) -> Result:
    """The whole problem at once, in any number of dimensions."""
    value, gradient = task.bind(operands.scalars).evaluate(operands)
    if task.value == "rows":
        value = jnp.sum(value, axis=-1)
    if task.gradient:
        gradient = gradient.astype(operands.logits.dtype)
    return Result(value, gradient)


def run_streamed(task: Task, operands: Operands) -> Result:
    """Block by block, so that everything between the logits and the result stays in the processor's cache.

    XLA's CPU backend splits an expression with two outputs into several loops with arrays of the logits' size between
    them; a loop over blocks has them of a block's size.
    """
    rows, classes = operands.logits.shape
    tiling = cpu_tiling(rows, classes)
    bound = task.bind(operands.scalars)
    if (tiling.rows, tiling.classes) == (rows, classes):
        return run(task, operands)

    def at(operand: Array, row: Array, column: Array) -> Array:
        """The block's part of an operand that may be constant along either dimension."""
        start = (row if operand.shape[0] > 1 else 0, column if operand.shape[1] > 1 else 0)
        size = tuple(min(n, m) for n, m in zip(operand.shape, (tiling.rows, tiling.classes), strict=True))
        return lax.dynamic_slice(operand, start, size)

    def block(i: Array, j: Array, result: Result) -> Result:
        # The last block starts early enough to be whole. What it computes twice comes out the same twice; only a
        # row's sum must not count it again.
        row = jnp.minimum(i * tiling.rows, rows - tiling.rows)
        column = jnp.minimum(j * tiling.classes, classes - tiling.classes)
        tile = {name: at(array, row, column) for name, array in operands.arrays().items()}
        value, gradient = bound.evaluate(Operands(**tile))
        if task.gradient:
            gradient = gradient.astype(operands.logits.dtype)
            gradient = lax.dynamic_update_slice(result.gradient, gradient, (row, column))
        if task.value == "elements":
            value = lax.dynamic_update_slice(result.value, value, (row, column))
        if task.value == "rows":
            if classes % tiling.classes:
                fresh = lax.broadcasted_iota(jnp.int32, value.shape, 1) + column >= j * tiling.classes
                value = jnp.where(fresh, value, 0.0)
            before = jnp.where(j == 0, 0.0, lax.dynamic_slice(result.value, (row,), (tiling.rows,)))
            value = lax.dynamic_update_slice(result.value, before + jnp.sum(value, axis=1), (row,))
        return Result(value, gradient)

    n_rows, n_columns = -(-rows // tiling.rows), -(-classes // tiling.classes)
    like = jax.eval_shape(functools.partial(run, task), operands)
    start = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
    if n_columns == 1:
        return lax.fori_loop(0, n_rows, lambda i, r: block(i, jnp.zeros_like(i), r), start)
    return lax.fori_loop(
        0, n_rows, lambda i, result: lax.fori_loop(0, n_columns, lambda j, r: block(i, j, r), result), start
    )
