"""Sums over the rows for a GPU, for statistics by class: a second Triton kernel, which reads logits and labels again.

A program has some rows of a chunk of classes, walks them a few at a time, and adds them up in registers. XLA adds up
the programs. Of the same sums as reductions of XLA's, XLA writes arrays of the logits' size.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from asl_pallas.kernels import of_classes
from asl_pallas.kernels.operands import Operands
from asl_pallas.kernels.sums import ClassSums
from asl_pallas.kernels.tile import Task
from asl_pallas.kernels.tiling import TritonTiling, triton_column_tiling
from asl_pallas.kernels.triton import GPU, all_of, decoders_of, with_an_id
from asl_pallas.kernels.versions import result_like
from asl_pallas.losses.ops import EXACT, Ops


def sums(task: Task, operands: Operands, *, interpret: bool = False) -> ClassSums:
    rows, classes = operands.logits.shape
    tiling, groups = triton_column_tiling(rows, classes)
    turns = math.ceil(rows / (groups * tiling.rows))
    of_element = dataclasses.replace(task, value="elements", gradient=False, statistics=False)
    ops = dataclasses.replace(EXACT if interpret else GPU, signed_per_element=True)
    of_groups = task.class_sums_like(operands, result_like(operands.logits, (groups, classes), jnp.float32))
    (found,) = pl.pallas_call(
        functools.partial(_kernel, of_element, tiling, (rows, classes), turns, ops),
        grid=(pl.cdiv(classes, tiling.chunk), groups),
        out_shape=[of_groups],
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        interpret=interpret,
        name="asl_pallas_sums_of_classes",
    )(with_an_id(task, operands))
    return jax.tree.map(lambda of_groups: jnp.sum(of_groups, axis=0), found)


def _kernel(
    task: Task,
    tiling: TritonTiling,
    shape: tuple[int, int],
    turns: int,
    ops: Ops,
    inputs: Operands,
    outputs: ClassSums,
):
    """One program. References are whole arrays: [rows, classes], [1, classes], [rows, 1]; results [groups, classes]."""
    rows, classes = shape
    c, group = pl.program_id(0), pl.program_id(1)
    at_classes = pl.ds(c * tiling.chunk, tiling.chunk)
    column = lax.broadcasted_iota(jnp.int32, (1, tiling.chunk), 1) + c * tiling.chunk
    class_exists = column < classes if classes % tiling.chunk else None
    if inputs.scalars is not None:
        scalars = inputs.scalars
        inputs = inputs._replace(scalars=tuple(scalars[n] for n in range(scalars.shape[0])))

    def some_rows(t: Array, partial: ClassSums) -> ClassSums:
        first = (group * turns + t) * tiling.rows
        row_exists = lax.broadcasted_iota(jnp.int32, (tiling.rows, 1), 0) + first < rows
        decoders = decoders_of(task, inputs, tiling, first, row_exists, 0)

        def load(name, ref):
            if name in decoders:
                return decoders[name](c, column)
            by_row, by_class = ref.shape[0] > 1 or rows == 1, ref.shape[1] > 1 or classes == 1
            index = pl.ds(first, tiling.rows) if by_row else pl.ds(0, 1), at_classes if by_class else pl.ds(0, 1)
            mask = all_of(row_exists if by_row else None, class_exists if by_class else None)
            if mask is None:
                return plgpu.load(ref.at[index])
            mask = jnp.broadcast_to(mask, (tiling.rows if by_row else 1, tiling.chunk if by_class else 1))
            return plgpu.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))

        loaded, valid = inputs.map(load), all_of(row_exists, class_exists)
        losses = task.evaluate(loaded, valid, ops).value
        found = of_classes.elements(task, loaded, losses, task.count(loaded, valid, ops), valid)
        return jax.tree.map(jnp.add, partial, found)

    zeros = jax.tree.map(lambda _: jnp.zeros((tiling.rows, tiling.chunk), jnp.float32), outputs)
    added = lax.fori_loop(jnp.int32(0), jnp.int32(turns), some_rows, zeros)
    for ref, part in zip(jax.tree.leaves(outputs), jax.tree.leaves(added), strict=True):
        plgpu.store(ref.at[pl.ds(group, 1), at_classes], jnp.sum(part, axis=0, keepdims=True), mask=class_exists)
