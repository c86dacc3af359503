"""Plain jnp: in one expression where XLA fuses it, and taken apart into what it does fuse on the CPU."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from asl_pallas.bits import BITS, LANES, cut, pack_ids, unpack_bits
from asl_pallas.kernels.logarithm import log
from asl_pallas.kernels.summation import GROUP_OF_A_SUM, sum_last, sum_over
from asl_pallas.kernels.tile import ENCODED, Operands, Result, Task, compute_dtype, index_where_it_varies, positives
from asl_pallas.kernels.tiling import CpuTiling, cpu_tiling
from asl_pallas.kernels.versions import least
from asl_pallas.losses.ops import EXACT, Ops

CPU = Ops(log=log, share_power=True, differentiable=False, reload_logit=True)
_UNPACKED = 1024  # classes


def run(task: Task, operands: Operands, ops: Ops = EXACT) -> Result:
    """The whole problem at once, in any number of dimensions."""
    classes = operands.logits.shape[-1]
    operands = operands.map(lambda name, array: positives(task.labels, array, classes) if name in ENCODED else array)
    value, gradient, sums = task.evaluate(operands, ops=ops)
    if task.statistics:
        sums = sums._replace(counts=task.count(operands, ops=ops))
        sums = lax.stop_gradient(task.row_statistics(sums, dataclasses.replace(ops, signed_per_element=True), operands))
    if task.value == "rows":
        value, sums = jax.tree.map(lambda part: sum_over(part, (part.ndim - 1,)), (value, sums))
    if task.gradient:
        gradient = gradient.astype(operands.logits.dtype)
    return Result(value, gradient, sums)


def run_streamed(task: Task, operands: Operands) -> Result:
    """The same for the CPU, without an array of the logits' size beside the operands and the result.

    XLA's CPU backend makes one vectorised loop on all cores of an expression with one result. Of one with two, or with
    a sum at its end, it makes several loops with arrays between them. So the gradient is an expression of its own, and
    the value comes block by block, with the block in the cache. That exp and log are computed twice costs less than the
    memory would. With packed labels the gradient comes block by block too, so that they can be unpacked in the cache.
    """
    tiling = cpu_tiling(*operands.logits.shape)
    if task.labels == "sparse":
        # Words are a thirty-second of the logits, and would be made twice otherwise.
        classes = operands.logits.shape[-1]
        operands = operands.map(lambda name, array: pack_ids(array, classes) if name in ENCODED else array)
        task = dataclasses.replace(task, labels="packed")
    one_result = task.value is None or (task.value == "elements" and not task.gradient)
    packed = task.labels == "packed"
    if tiling is None or (one_result and not packed) or task.statistics:
        return run(task, operands, CPU)
    value, gradient = None, None
    if task.value is not None:
        value = _by_blocks(dataclasses.replace(task, gradient=False), operands, tiling)
    if task.gradient:
        alone = dataclasses.replace(task, value=None)
        if packed:
            gradient = _by_blocks(alone, operands, tiling)
        else:
            ops = dataclasses.replace(CPU, signed_per_element=alone.needs_elements(operands))
            gradient = run(alone, operands if value is None else _after(value, operands), ops).gradient
    return Result(value, gradient)


def _after(value: Array, operands: Operands) -> Operands:
    """The operands, for what XLA must not begin before it has the value.

    So the gradient may take the place of logits that nothing else asks for, which XLA copies if it may read them for
    the value later. A barrier would do from jax 0.11 on; before, XLA's CPU backend drops it too early.
    """
    # No number is greater than infinity. XLA doesn't know, and LLVM does, so that it costs nothing.
    never = jnp.ravel(value)[0] > jnp.inf
    return operands._replace(logits=jnp.where(never, jnp.zeros_like(operands.logits), operands.logits))


def _by_blocks(task: Task, operands: Operands, tiling: CpuTiling) -> Array:
    """Losses of elements, their sums over the classes or the gradient, which the task asks for alone."""
    rows, classes = operands.logits.shape
    packed = task.labels == "packed"
    sums = task.value == "rows"
    dtype = operands.logits.dtype if task.gradient else compute_dtype(operands.logits.dtype)
    ops = dataclasses.replace(CPU, signed_per_element=task.needs_elements(operands))
    by_element = dataclasses.replace(task, value=None if task.gradient else "elements")

    # Whole groups of a sum: to fill them up, XLA would copy the losses.
    width = min(math.ceil(tiling.classes / tiling.pieces / GROUP_OF_A_SUM) * GROUP_OF_A_SUM, tiling.classes)

    def at(operand: Array, row: Array | int, column: Array | int, columns: int) -> Array:
        """The block's part of an operand that may be constant along either dimension."""
        start = index_where_it_varies(operand.shape, (row, column), (0, 0))
        size = tuple(min(n, m) for n, m in zip(operand.shape, (tiling.rows, columns), strict=True))
        return lax.dynamic_slice(operand, start, size)

    def block(i: Array, j: Array, result: Array) -> Array:
        # The last block starts early enough to be whole. What it computes twice comes out the same twice; only a row's
        # sum must not count it again.
        row = least(i * tiling.rows, rows - tiling.rows)
        column = least(j * tiling.classes, classes - tiling.classes)
        # The barrier ties the operands to the block, or XLA converts all of a bfloat16 one ahead of the loop.
        arrays, row = lax.optimization_barrier((operands, row))

        def unpacked(words: Array) -> Array:
            words = lax.dynamic_slice(words, (row, 0), (tiling.rows, words.shape[1]))
            if tiling.classes < classes:
                words = cut(words, column, tiling.classes)
            return _unpacked(words, tiling.classes)

        in_cache = {}
        if packed:
            in_cache = {name: unpacked(words) for name, words in arrays.arrays() if name in ENCODED}

        def evaluate(start: int, columns: int) -> Result:
            def part(name: str, array: Array) -> Array:
                if name in in_cache:
                    return at(in_cache[name], 0, start, columns)
                return at(array, row, column + start, columns)

            return by_element.evaluate(arrays.map(part), ops=ops)

        if not sums:
            found = evaluate(0, tiling.classes)
            part = found.gradient if task.gradient else found.value
            return lax.dynamic_update_slice(result, part.astype(result.dtype), (row, column))
        added = jnp.zeros((), dtype)
        for k in range(tiling.pieces):
            start = min(k * width, tiling.classes - width)  # the last piece is as wide as any, like the last block
            value = evaluate(start, width).value
            at_class = lax.broadcasted_iota(jnp.int32, value.shape, 1) + start
            if start < k * width:
                value = jnp.where(at_class >= k * width, value, 0.0)
            if classes % tiling.classes:
                value = jnp.where(at_class + column >= j * tiling.classes, value, 0.0)
            added = added + value
        return lax.dynamic_update_slice(result, sum_last(added)[:, None], (row, j))

    columns = math.ceil(classes / tiling.classes)

    def blocks_of_rows(i: Array, result: Array) -> Array:
        if columns == 1:
            return block(i, jnp.zeros_like(i), result)
        return lax.fori_loop(0, columns, lambda j, result: block(i, j, result), result)

    start = jnp.zeros((rows, columns if sums else classes), dtype)
    result = lax.fori_loop(0, math.ceil(rows / tiling.rows), blocks_of_rows, start)
    return task.row_losses(sum_last(result), ops) if sums else result


def _unpacked(words: Array, classes: int) -> Array:
    """The block's labels, written to the cache some classes at a time.

    In one expression with the loss it would keep the compiler from vectorising either: the gradient of float32
    1024 x 8192 took 34 ms of a core that way, takes 24 so, and 21 with int8 labels.
    """
    rows = words.shape[0]
    bits = _UNPACKED // LANES

    def some(k: Array, labels: Array) -> Array:
        group = lax.dynamic_slice(words, (0, k // (BITS // bits) * LANES), (rows, LANES))
        found = unpack_bits(group, k % (BITS // bits) * bits, bits)
        return lax.dynamic_update_slice(labels, found, (0, k * _UNPACKED))

    turns = -(-classes // _UNPACKED)
    return lax.fori_loop(0, turns, some, jnp.zeros((rows, turns * _UNPACKED), bool))[:, :classes]
