"""What is added up over the examples, class by class: by XLA, in a pass of its own over logits and labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from asl_pallas.bits import pack_ids
from asl_pallas.kernels.platforms import Code
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
    x = operands.logits.astype(losses.dtype)
    annotated = jnp.ones_like(losses) if counts.annotated is None else counts.annotated
    right_of_positives = counts.positives - counts.wrong_of_positives

    def predicted(part: Array) -> tuple[Array, ...]:
        return tuple(jnp.where(x >= decision, part, jnp.zeros_like(part)) for decision in operands.decisions)

    return ClassSums(
        annotated=annotated,
        positives=counts.positives,
        probability=right_of_positives + (counts.wrong - counts.wrong_of_positives),
        probability_of_positives=right_of_positives,
        losses=losses,
        predicted=predicted(annotated),
        true=predicted(counts.positives),
    )


@dataclasses.dataclass(frozen=True)
class SumsCode:
    """`sums` of matrices, by platform."""

    task: Task

    def __call__(self, asked: tuple[bool, ...]) -> Code:
        def chosen(function: Callable[[Task, Operands], ClassSums]) -> Callable[[Operands], Any]:
            def run(operands: Operands) -> Any:
                found = function(self.task, operands)
                if not asked:
                    return found
                return [part for part, one in zip(jax.tree.leaves(found), asked, strict=True) if one]

            return run

        return chosen(sums), {"cpu": chosen(_by_blocks), "default": chosen(sums)}


def _by_blocks(task: Task, operands: Operands) -> ClassSums:
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
