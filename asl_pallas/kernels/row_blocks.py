"""Many sums of the same arrays on the CPU, some rows at a time.

XLA's CPU backend makes a loop of each sum, and computes anew in each what they have in common, unless that is a power
or a quotient. So a block's losses, slopes and probabilities are written to memory that stays in the cache, and all sums
are made of these.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from asl_pallas.kernels.tile import Operands, index_where_it_varies
from asl_pallas.losses.ops import Ops

# Elements of a block.
_BLOCK = 32 * 1024


def rows_of_a_block(rows: int, classes: int, most: int) -> int:
    """A divisor of all rows where there is one, since what is left of them is compiled once more."""
    size = max(1, min(rows, most, _BLOCK // classes))
    divisors = (n for n in range(size, size // 2, -1) if rows % n == 0)
    return next(divisors, size)


def walk(
    operands: Operands,
    shape: tuple[int, int],
    size: int,
    ops: Ops,
    carry: Any,
    block: Callable[[Any, Operands, Array | int, Ops], Any],
) -> Any:
    """block(carry, operands of `size` rows, the first of them, operations) for all rows, in their order.

    Operands with words or ids are cut as the others are. What the carry has of them may be left out of `operands`.
    """
    rows, classes = shape
    whole, rest = divmod(rows, size)

    def tile_at(arrays: Operands, row: Array | int, size: int) -> Operands:
        def part(_: str, array: Array) -> Array:
            at = index_where_it_varies(array.shape, (row, 0), (0, 0))
            return lax.dynamic_slice(array, at, (min(size, array.shape[0]), array.shape[1]))

        return arrays.map(part)

    places = _places(lambda ops: block(carry, tile_at(operands, 0, size), 0, ops), ops)

    def body(i: Array, state: tuple[Any, list[Array]]) -> tuple[Any, list[Array]]:
        carry, places = state
        # The barrier ties the operands to the block, or XLA converts all of a bfloat16 one ahead of the loop.
        arrays, row = lax.optimization_barrier((operands, i * size))
        written: list[Array] = []
        # Always 0, and XLA doesn't know: it would take what was written for what is read.
        first = jnp.minimum(row, 0)

        def write(value: Array) -> Array:
            place = places[len(written)]
            value = jnp.broadcast_to(value, (size, classes))
            written.append(lax.dynamic_update_slice(place, value, (first, jnp.zeros_like(first))))
            return written[-1][:size]

        aside = dataclasses.replace(ops, aside=lambda values: jax.tree.map(write, values))
        return block(carry, tile_at(arrays, row, size), row, aside), written

    start = carry, [jnp.zeros((size + 1, classes), dtype) for dtype in places]
    carry, _ = lax.fori_loop(0, whole, body, start)
    return block(carry, tile_at(operands, whole * size, rest), whole * size, ops) if rest else carry


def _places(run: Callable[[Ops], Any], ops: Ops) -> list[Any]:
    """The dtypes of the arrays that are put aside."""
    dtypes: list[Any] = []

    def record(values: Any) -> Any:
        dtypes.extend(value.dtype for value in jax.tree.leaves(values))
        return values

    jax.eval_shape(lambda: run(dataclasses.replace(ops, aside=record)))
    return dtypes
