"""Loss, gradient and statistics on the CPU, a block of rows at a time.

XLA's CPU backend makes a loop of each sum, and in each it computes again whatever isn't a power or a quotient. So the
losses, slopes and probabilities of a block are written to memory that stays in the cache, and every sum reads these. A
sum over the classes adds whole pieces of the row to each other first, which is vectorised, and their elements last.
"""

from __future__ import annotations

import dataclasses

# Elements of a block: half and twice as many took 2 and 20 % more of ASL's time at 1024 x 8192.
import os
from collections.abc import Callable, Iterator
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
from asl_pallas.losses.ops import Ops

_BLOCK = int(os.environ.get("BLK", 32)) * 1024
# Pieces of a row that are added to each other, and the fewest classes of one.
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
    # The gradient takes the place of logits that have been read, and has their dtype until all have been.
    logits = operands.logits if task.gradient else None
    of_rows = jax.tree.map(lambda _: jnp.zeros(rows, dtype), (1, task.sums_like(operands, 1)))
    # What `add_exactly` keeps: the sum, and what its roundings lost.
    of_columns = (task.class_sums_like(operands, jnp.zeros(classes, dtype)),) * 2

    def block(carry: Any, tile: Operands, row: Array | int, ops: Ops) -> Any:
        logits, of_rows, of_columns = carry
        size = tile.labels.shape[0]
        if logits is not None:
            tile = tile._replace(logits=lax.dynamic_slice(logits, (row, 0), (size, classes)))
        tile = tile.map(lambda name, array: _at_hand(task, name, array, (size, classes), bool(operands.decisions), ops))
        in_cache: list[Array] = []

        def keep(values: Any) -> Any:
            values = ops.aside(values)
            in_cache.extend(jax.tree.leaves(values))
            return values

        gradient = elements(of_element, tile, dataclasses.replace(ops, aside=keep)).gradient
        if logits is not None:
            logits = lax.dynamic_update_slice(logits, gradient.astype(logits.dtype), (row, 0))

        def of_some(tile: Operands, in_cache: list[Array]) -> Result:
            """Of a part of the block: what has been written isn't computed again."""
            parts = iter(in_cache)
            return elements(
                of_element, tile, dataclasses.replace(ops, aside=lambda tree: jax.tree.map(lambda _: next(parts), tree))
            )

        def by_row(*part: Any) -> Any:
            found = of_some(*part)
            return found.value, found.sums

        def by_class(tile: Operands, in_cache: list[Array]) -> Any:
            found = of_some(tile, in_cache)
            return of_classes.elements(of_element, tile, found.value, found.sums.counts)

        sums = _folded(by_row, tile, in_cache, axis=1)
        of_rows = jax.tree.map(lambda all, part: lax.dynamic_update_slice(all, part, (row,)), of_rows, sums)
        if operands.decisions:
            sums = _folded(by_class, tile, in_cache, axis=0)
            both = jax.tree.map(add_exactly, *of_columns, sums)
            of_columns = jax.tree.transpose(jax.tree.structure(sums), jax.tree.structure((0, 0)), both)
        return logits, of_rows, of_columns

    others = operands if logits is None else operands._replace(logits=None)
    carry = (logits, of_rows, of_columns)
    gradient, (value, sums), of_columns = _walk(others, (rows, classes), carry, block)
    gradient = gradient.astype(task.gradient_of(operands.logits)) if task.gradient else None
    return Result(value, gradient, sums, jax.tree.map(total_of, *of_columns))


def _at_hand(task: Task, name: str, array: Array, shape: tuple[int, int], has_decisions: bool, ops: Ops) -> Array:
    """A block's operand as every sum reads it: an index of its own in each would keep a compiler from vectorising."""
    if name in ENCODED and task.labels == "packed":
        return unpacked(array, shape[1])
    # Logits too, where decisions look at them after the gradient has taken their place.
    shared = (*ENCODED, "where", *(["logits"] if has_decisions else []))
    return ops.aside(array) if name in shared and array.shape == shape else array


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
    size = max(1, min(rows, _BLOCK // classes))
    divisors = (n for n in range(size, size // 2, -1) if rows % n == 0)
    return next(divisors, size)


def _walk(
    operands: Operands, shape: tuple[int, int], carry: Any, block: Callable[[Any, Operands, Array | int, Ops], Any]
) -> Any:
    """block(carry, operands of some rows, the first of them, operations) for all rows, in their order.

    Operands with words are cut as the others are. What the carry has of them may be left out of `operands`.
    """
    rows, classes = shape
    size = _rows_of_a_block(rows, classes)
    whole, rest = divmod(rows, size)

    def tile_at(arrays: Operands, row: Array | int, size: int) -> Operands:
        def part(_: str, array: Array) -> Array:
            at = index_where_it_varies(array.shape, (row, 0), (0, 0))
            return lax.dynamic_slice(array, at, (min(size, array.shape[0]), array.shape[1]))

        return arrays.map(part)

    places = _places(lambda ops: block(carry, tile_at(operands, 0, size), 0, ops))

    def body(i: Array, state: tuple[Any, list[Array]]) -> tuple[Any, list[Array]]:
        carry, places = state
        # The barrier ties the operands to the block, or XLA converts all of a bfloat16 one ahead of the loop.
        arrays, row = lax.optimization_barrier((operands, i * size))
        written: list[Array] = []
        # Always 0, and XLA doesn't know: it would take what was written for what is read.
        first = jnp.minimum(row, 0)

        import os

        one = jnp.where(row < 0, 2.0, 1.0)

        def write(value: Array) -> Array:
            if os.environ.get("DIV") and jnp.issubdtype(value.dtype, jnp.floating):
                written.append(places[len(written)])
                return jnp.broadcast_to(value, (size, classes)) / one.astype(value.dtype)
            place = places[len(written)]
            value = jnp.broadcast_to(value, (size, classes))
            written.append(lax.dynamic_update_slice(place, value, (first, jnp.zeros_like(first))))
            return written[-1][:size]

        aside = dataclasses.replace(CPU, aside=lambda values: jax.tree.map(write, values))
        return block(carry, tile_at(arrays, row, size), row, aside), written

    start = carry, [jnp.zeros((size + 1, classes), dtype) for dtype in places]
    carry, _ = lax.fori_loop(0, whole, body, start)
    return block(carry, tile_at(operands, whole * size, rest), whole * size, CPU) if rest else carry


def _places(run: Callable[[Ops], Any]) -> Iterator[Any]:
    """The dtypes of the arrays that are put aside."""
    dtypes: list[Any] = []

    def record(values: Any) -> Any:
        dtypes.extend(value.dtype for value in jax.tree.leaves(values))
        return values

    jax.eval_shape(lambda: run(dataclasses.replace(CPU, aside=record)))
    return iter(dtypes)
