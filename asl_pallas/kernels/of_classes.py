"""What is added up over the examples, class by class, as an expression for XLA where no kernel has it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array, lax

from asl_pallas.kernels.operands import ENCODED, Operands, positives
from asl_pallas.kernels.sums import ClassSums, Counts
from asl_pallas.kernels.tile import Task
from asl_pallas.losses.ops import EXACT, Ops


def sums(task: Task, operands: Operands, ops: Ops = EXACT) -> ClassSums:
    """In one expression, in any number of dimensions. Nothing of it has a derivative."""
    shape = operands.logits.shape
    operands = operands.map(lambda name, array: positives(task.labels, array, shape[-1]) if name in ENCODED else array)

    def of_classes(part: Array) -> Array:
        return jnp.sum(jnp.broadcast_to(part, shape), tuple(range(len(shape) - 1)))

    operands = lax.stop_gradient(operands)
    ops = dataclasses.replace(ops, signed_per_element=True)
    of_element = dataclasses.replace(task, value="elements", gradient=False, statistics=False)
    losses = of_element.evaluate(operands, ops=ops).value
    counts = task.count(operands, ops=ops)
    return jax.tree.map(of_classes, elements(task, operands, losses, counts))


def elements(task: Task, operands: Operands, losses: Array, counts: Counts, valid: Array | None = None) -> ClassSums:
    """Each element's part of the sums; `valid` is False beyond the array's edge."""
    annotated = jnp.ones_like(losses) if counts.annotated is None else counts.annotated
    if valid is not None:
        annotated = jnp.where(valid, annotated, 0.0)
    predicted = task.predict(operands, counts, valid)
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
