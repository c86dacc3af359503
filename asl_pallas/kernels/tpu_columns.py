"""Sums over the rows in the TPU's kernel, for statistics by class: of a tile, of a block, and of all blocks.

A tile adds its rows up to eight, which are added to its chunk's place in memory. At a block's end these eight become
one, for several kinds of sums together, and leave the chip; XLA adds up the blocks.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

from asl_pallas.kernels.sums import ClassSums, unpack_two, unpacked_counts
from asl_pallas.kernels.tile import Task
from asl_pallas.kernels.tiling import SUBLANES
from asl_pallas.losses.ops import Ops


class ColumnSums(NamedTuple):
    """What is added up along the rows, for `ClassSums`."""

    losses: Any
    counts: Any  # `Counts`
    predictions: Any  # as of `Task.predict`


def rows_added(tile: Array) -> Array:
    """[SUBLANES, classes], sums of every eighth row."""
    return sum((tile[k : k + SUBLANES] for k in range(SUBLANES, tile.shape[0], SUBLANES)), start=tile[:SUBLANES])


def merged(parts: list[Array]) -> Array:
    """[SUBLANES, classes], each row the sum over the rows of one of at most so many parts; in the rest is no meaning.

    By halves: of two parts one comes into the rows whose number has a bit, and the other into those that have it not.
    """
    row = lax.broadcasted_iota(jnp.int32, parts[0].shape, 0)
    shift = 1
    while shift < SUBLANES:
        has_bit = row & shift != 0
        pairs = itertools.zip_longest(parts[::2], parts[1::2])
        # What comes around has the same lower bits, so it is of the same part.
        parts = [
            (a if b is None else jnp.where(has_bit, b, a))
            + pltpu.roll(a if b is None else jnp.where(has_bit, a, b), jnp.int32(SUBLANES - shift), 0)
            for a, b in pairs
        ]
        shift *= 2
    return parts[0]


def of_all_blocks(task: Task, ops: Ops, columns: ColumnSums, packed: bool, rows: int) -> ClassSums:
    """Of the sums (blocks of rows, classes) of each block."""
    if packed:
        predictions = tuple(map(unpack_two, columns.predictions))
        columns = columns._replace(counts=unpacked_counts(columns.counts), predictions=predictions)
    losses, counts, predictions = jax.tree.map(lambda of_blocks: jnp.sum(of_blocks, 0), columns)
    right_of_positives = counts.positives - counts.wrong_of_positives
    return ClassSums(
        annotated=jnp.full_like(losses, rows) if counts.annotated is None else counts.annotated,
        positives=counts.positives,
        probability=right_of_positives + (counts.wrong - counts.wrong_of_positives),
        probability_of_positives=right_of_positives,
        losses=task.row_losses(losses, ops),
        predicted=tuple(all for all, _ in predictions),
        true=tuple(true for _, true in predictions),
    )
