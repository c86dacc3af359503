"""Loss, gradient and statistics on the CPU, a block of rows at a time.

XLA's CPU backend makes a loop of each sum, and in each it computes again whatever isn't a power or a quotient. So the
losses, slopes and probabilities of a block are computed in a branch of their own, whose results are arrays, and every
sum reads these from the cache. A sum over the classes adds whole pieces of the row to each other first, which is
vectorised, and their elements last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from asl_pallas.kernels import of_classes
from asl_pallas.kernels.operands import ENCODED, Operands, Result, compute_dtype, index_where_it_varies
from asl_pallas.kernels.summation import GROUP_OF_A_SUM, add_exactly, sum_over, total_of
from asl_pallas.kernels.tile import Task
from asl_pallas.kernels.tiling import cpu_tiling
from asl_pallas.kernels.xla import CPU, elements, run, unpacked, with_words

# Elements of a block. XLA shares an expression out among the cores only where it is large: ASL's value, gradient and
# statistics at 1024 x 8192 took 25 ms in blocks of 256 K, 30 in 128 K and 43 in 32 K (two cores; 18 ms without
# statistics). A block's arrays take a quarter of the logits' bytes together, unless the logits are small.
_BLOCK = 256 * 1024
_SHARE_OF_ALL = 32
_LEAST_BLOCK = 32 * 1024
# Pieces of a row, or groups of rows, that are added to each other, and the fewest classes of a piece.
_PIECES = 16
_CLASSES_OF_A_PIECE = 256


def streamed(task: Task, operands: Operands) -> Result:
    """Value, gradient, sums of rows and, with decisions, of classes."""
    operands = operands.own_labels()
    if cpu_tiling(*operands.logits.shape) is None:
        return run(task, operands, CPU)
    task, operands = with_words(task, operands)
    rows, classes = operands.logits.shape
    dtype = compute_dtype(operands.logits.dtype)
    of_element = dataclasses.replace(task, labels="dense", gradient_dtype=None)
    gradient = jnp.zeros((rows, classes), task.gradient_of(operands.logits)) if task.gradient else None
    of_rows = jax.tree.map(lambda _: jnp.zeros(rows, dtype), (1, task.sums_like(operands, 1)))
    # What `add_exactly` keeps: the sum, and what its roundings lost.
    of_columns = (task.class_sums_like(operands, jnp.zeros(classes, dtype)),) * 2

    def block(carry: Any, operands: Operands, row: Array | int, size: int) -> Any:
        gradient, of_rows, of_columns = carry
        tile, its_gradient, in_cache = _in_cache(of_element, task, operands, row, size)
        if its_gradient is not None:
            gradient = lax.dynamic_update_slice(gradient, its_gradient.astype(gradient.dtype), (row, 0))

        def of_part(tile: Operands, in_cache: list[Array]) -> Result:
            """What is in the cache isn't computed again."""
            parts = iter(in_cache)
            ops = dataclasses.replace(CPU, aside=lambda values: jax.tree.map(lambda _: next(parts), values))
            return elements(of_element, tile, ops)

        def by_row(*part: Any) -> Any:
            found = of_part(*part)
            return found.value, found.sums

        def by_class(tile: Operands, in_cache: list[Array]) -> Any:
            found = of_part(tile, in_cache)
            return of_classes.elements(of_element, tile, found.value, found.sums.counts)

        sums = _folded(by_row, tile, in_cache, axis=1)
        of_rows = jax.tree.map(lambda all, part: lax.dynamic_update_slice(all, part, (row,)), of_rows, sums)
        if operands.decisions:
            sums = _folded(by_class, tile, in_cache, axis=0)
            both = jax.tree.map(add_exactly, *of_columns, sums)
            of_columns = jax.tree.transpose(jax.tree.structure(sums), jax.tree.structure((0, 0)), both)
        return gradient, of_rows, of_columns

    gradient, (value, sums), of_columns = _walk(operands, (rows, classes), (gradient, of_rows, of_columns), block)
    return Result(value, gradient, sums, jax.tree.map(total_of, *of_columns))


def _in_cache(
    of_element: Task, task: Task, operands: Operands, row: Array | int, size: int
) -> tuple[Operands, Array | None, list[Array]]:
    """The block's operands as every sum reads them, its gradient, and what `Ops.aside` was given."""
    shape = size, operands.logits.shape[1]

    def part(name: str, array: Array) -> Array:
        at = index_where_it_varies(array.shape, (row, 0), (0, 0))
        array = lax.dynamic_slice(array, at, (min(size, array.shape[0]), array.shape[1]))
        return unpacked(array, shape[1]) if name in ENCODED and task.labels == "packed" else array

    gradient_at: list[int] = []

    def compute(operands: Operands) -> Any:
        tile = operands.map(part)
        aside: list[Array] = []

        def keep(values: Any) -> Any:
            aside.extend(jax.tree.leaves(values))
            return values

        gradient = elements(of_element, tile, dataclasses.replace(CPU, aside=keep)).gradient
        gradient_at[:] = [n for n, array in enumerate(aside) if array is gradient]
        if not operands.decisions:
            tile = tile._replace(logits=None)
        return tile, None if gradient_at else gradient, [jnp.broadcast_to(array, shape) for array in aside]

    def nothing(operands: Operands) -> Any:
        return jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(compute, operands))

    if isinstance(row, int):
        tile, gradient, in_cache = compute(operands)
    else:
        # Always, and XLA doesn't know: a branch's results are arrays, where otherwise every use would compute its own.
        tile, gradient, in_cache = lax.cond(row >= 0, compute, nothing, operands)
    if tile.logits is None:
        tile = tile._replace(logits=jnp.zeros(shape, in_cache[0].dtype))
    return tile, in_cache[gradient_at[0]] if gradient_at else gradient, in_cache


def _folded(of_part: Callable[[Operands, list[Array]], Any], tile: Operands, in_cache: list[Array], axis: int) -> Any:
    """Sums over an axis of what `of_part` gives for the elements of a part of the block."""
    length = tile.labels.shape[axis]
    size = max(1, -(-length // _PIECES))
    if axis == 1:
        size = max(_CLASSES_OF_A_PIECE, length // _PIECES // GROUP_OF_A_SUM * GROUP_OF_A_SUM)
    of_part = jax.jit(of_part)  # traced once for all pieces

    def at(start: int, size: int) -> Any:
        def cut(array: Array) -> Array:
            varies = array.shape[axis] > 1 or length == 1
            return lax.slice_in_dim(array, start, start + size, axis=axis) if varies else array

        return of_part(tile.map(lambda _, array: cut(array)), [cut(array) for array in in_cache])

    pieces, rest = divmod(length, size)
    found: list[Any] = []
    if pieces:
        total = at(0, size)
        for piece in range(1, pieces):
            total = jax.tree.map(jnp.add, total, at(piece * size, size))
        found.append(total)
    if rest:
        found.append(at(pieces * size, rest))
    sums = [jax.tree.map(lambda part: sum_over(part, (axis,)), part) for part in found]
    return sums[0] if len(sums) == 1 else jax.tree.map(jnp.add, *sums)


def _rows_of_a_block(rows: int, classes: int) -> int:
    """A divisor of all rows where there is one, since what is left of them is compiled once more."""
    elements_of_one = min(_BLOCK, max(_LEAST_BLOCK, rows * classes // _SHARE_OF_ALL))
    size = max(1, min(rows, elements_of_one // classes))
    divisors = (n for n in range(size, size // 2, -1) if rows % n == 0)
    return next(divisors, size)


def _walk(
    operands: Operands, shape: tuple[int, int], carry: Any, block: Callable[[Any, Operands, Array | int, int], Any]
) -> Any:
    """block(carry, operands, a row, how many of them) for all rows, in their order."""
    rows, classes = shape
    size = _rows_of_a_block(rows, classes)
    whole, rest = divmod(rows, size)

    def body(i: Array, carry: Any) -> Any:
        # The barrier ties the operands to the block, or XLA converts all of a bfloat16 one ahead of the loop.
        arrays, row = lax.optimization_barrier((operands, i * size))
        return block(carry, arrays, row, size)

    carry = lax.fori_loop(0, whole, body, carry)
    return block(carry, operands, whole * size, rest) if rest else carry
