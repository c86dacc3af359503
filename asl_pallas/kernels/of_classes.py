"""What is added up over the examples, class by class: by XLA, in a pass of its own over logits and labels."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from asl_pallas.bits import pack_ids
from asl_pallas.kernels.row_blocks import rows_of_a_block, walk
from asl_pallas.kernels.summation import add_exactly, total_of
from asl_pallas.kernels.sums import ClassSums
from asl_pallas.kernels.tile import ENCODED, Operands, Task, compute_dtype, positives
from asl_pallas.kernels.xla import CPU, unpacked_labels
from asl_pallas.losses.ops import EXACT, Ops

# Rows that are added one after the other.
_ROWS = 64


def sums(task: Task, operands: Operands, ops: Ops = EXACT) -> ClassSums:
    """In one expression, in any number of dimensions. Nothing of it has a derivative."""
    shape = operands.logits.shape
    operands = operands.map(lambda name, array: positives(task.labels, array, shape[-1]) if name in ENCODED else array)

    def of_classes(part: Array) -> Array:
        return jnp.sum(jnp.broadcast_to(part, shape), tuple(range(len(shape) - 1)))

    return jax.tree.map(of_classes, _of_elements(task, lax.stop_gradient(operands), ops))


def _of_elements(task: Task, operands: Operands, ops: Ops) -> ClassSums:
    by_element = dataclasses.replace(task, value="elements", gradient=False, statistics=False)
    ops = dataclasses.replace(ops, signed_per_element=True)
    losses = ops.aside(by_element.evaluate(operands, ops=ops).value)
    counts = task.count(operands, ops=ops)
    annotated = jnp.ones_like(losses) if counts.annotated is None else counts.annotated
    predicted = task.predict(operands, counts)
    right_of_positives = counts.positives - counts.wrong_of_positives
    return ClassSums(
        annotated=annotated,
        positives=counts.positives,
        probability=right_of_positives + (counts.wrong - counts.wrong_of_positives),
        probability_of_positives=right_of_positives,
        losses=losses,
        predicted=tuple(all for all, _ in predicted),
        true=tuple(true for _, true in predicted),
    )


def sums_by_blocks(task: Task, operands: Operands) -> ClassSums:
    """For the CPU, whose cache a block stays in."""
    rows, classes = operands.logits.shape
    if task.labels == "sparse":
        operands = operands.map(lambda name, array: pack_ids(array, classes) if name in ENCODED else array)
    by_element = dataclasses.replace(task, labels="dense")

    def block(carry: Any, tile: Operands, row: Array | int, ops: Ops) -> Any:
        found = sums(by_element, unpacked_labels(task, tile, classes), ops)
        both = jax.tree.map(add_exactly, *carry, found)
        return jax.tree.transpose(jax.tree.structure(found), jax.tree.structure((0, 0)), both)

    zeros = task.class_sums_like(operands, jnp.zeros(classes, compute_dtype(operands.logits.dtype)))
    size = rows_of_a_block(rows, classes, _ROWS)
    return jax.tree.map(total_of, *walk(operands, (rows, classes), size, CPU, (zeros, zeros), block))
