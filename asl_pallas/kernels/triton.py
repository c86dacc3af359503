"""Pallas for any CUDA GPU, through Triton.

A program owns a block of rows and a span of classes, which it walks chunk by chunk; lanes keep their own partial sums
and add them up once at the end. Rows too few to fill the chip have their classes split into several spans, whose sums
XLA adds.

A thread loads and stores 16 bytes at a time where every chunk starts at a multiple of as many. Of rows whose length is
no such multiple, 9605 classes say, the arrays are handed over flat, and a row's chunks lie as the memory does: the
first starts at the multiple below the row's beginning. What isn't the row's is no part of its sum. Its gradient is
masked, or, where it comes out the same there, written with the vector that it is in, by both rows' programs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from asl_pallas.bits import PADDING, byte_tile, unpack_bytes, word_and_bit
from asl_pallas.kernels.sums import packed_like, unpacked
from asl_pallas.kernels.tile import ENCODED, Operands, Result, Task, compute_dtype
from asl_pallas.kernels.tiling import TritonTiling, triton_tiling
from asl_pallas.kernels.versions import result_like
from asl_pallas.losses.ops import EXACT, Ops


def _instruction(name: str, *numbers: Any) -> Array:
    """One instruction of PTX, on float32."""
    operands = jnp.broadcast_arrays(*(jnp.asarray(number, jnp.float32) for number in numbers))
    (result,) = plgpu.elementwise_inline_asm(
        f"{name} {', '.join(f'${k}' for k in range(len(operands) + 1))};",
        args=operands,
        constraints=",".join(["=f", *["f"] * len(operands)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(operands[0].shape, jnp.float32)],
    )
    return result


# What Triton makes of jnp.exp, jnp.log, quotients and selects is some 50 instructions an element, and these are 11. By
# NVIDIA's PTX manual they err by at most 2^-22, the reciprocal by a unit in the last place; tests/test_formula.py lets
# them err so and finds loss and gradient within the bound.
_GPU = Ops(
    exp=lambda x: _instruction("ex2.approx.ftz.f32", x * (1 / math.log(2))),
    log=lambda x: _instruction("lg2.approx.ftz.f32", x) * math.log(2),
    reciprocal=lambda x: _instruction("rcp.approx.ftz.f32", x),
    maximum=functools.partial(_instruction, "max.NaN.f32"),
    minimum=functools.partial(_instruction, "min.NaN.f32"),
    multiply_add=functools.partial(_instruction, "fma.rn.f32"),
    negate=lambda condition, x: jnp.where(condition, -x, x),
    share_power=True,
    differentiable=False,
)

# Elements that a thread has side by side: 16 bytes of bfloat16.
_VECTOR = 8
# The share of a row's elements, those that aren't there included, up to which its vectors are worth more of them.
_MOST_FOR_FLAT = 1.5
# Indices are 32 bits, those of a last chunk that isn't all there too.
_MOST_ELEMENTS_FLAT = 2**31 - 2**16


def run(task: Task, operands: Operands, *, interpret: bool = False) -> Result:
    rows, classes = operands.logits.shape
    plain = task.labels == "dense" and not task.is_soft(operands.labels.dtype)
    tile = functools.partial(triton_tiling, logits_bytes=operands.logits.dtype.itemsize, plain=plain)
    flat = _is_flat(rows, classes, tile)
    tiling = tile(rows, _width(classes, flat))
    spans = pl.cdiv(_width(classes, flat), tiling.span)
    dtype = compute_dtype(operands.logits.dtype)
    ops = dataclasses.replace(EXACT if interpret else _GPU, signed_per_element=task.needs_elements(operands))
    whole = _stores_whole_vectors(task, operands)
    packed = task.packs_counts(operands, tiling.span // tiling.chunk)

    if task.labels == "sparse":

        def at_least_one(name: str, array: Array) -> Array:
            is_empty = name in ENCODED and array.shape[1] == 0
            return jnp.full((rows, 1), PADDING, jnp.int32) if is_empty else array

        operands = operands.map(at_least_one)

    def flattened(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (rows * classes,) if flat and shape == (rows, classes) else shape

    def in_memory(name: str, array: Array) -> Array:
        # As many ids as classes, say, are no labels per element.
        return array if name in ENCODED and task.labels != "dense" else array.reshape(flattened(array.shape))

    of_elements = flattened((rows, classes))
    of_spans = result_like(operands.logits, (rows, spans), dtype)
    results = task.results(
        sums=of_spans,
        elements=result_like(operands.logits, of_elements, dtype),
        gradient=result_like(operands.logits, of_elements, operands.logits.dtype),
        statistics=task.sums_like(operands, of_spans),
    )
    ((value, gradient, sums),) = pl.pallas_call(
        functools.partial(_kernel, task, tiling, (rows, classes), flat, whole, packed, ops),
        grid=(pl.cdiv(rows, tiling.rows), spans),
        out_shape=[results],
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        # Safe in one pass: an element is read before its own gradient is written, and what others read of it is masked.
        input_output_aliases={0: int(task.value is not None)} if task.gradient and task.donate_logits else {},
        interpret=interpret,
        name=task.kernel_name,
    )(operands.map(in_memory))
    if task.value == "rows":
        value, sums = jax.tree.map(lambda of_spans: jnp.sum(of_spans, axis=1), (value, sums))
        value = task.row_losses(value, ops)
        sums = None if sums is None else task.row_statistics(sums, ops, operands)
    elif task.value is not None:
        value = value.reshape(rows, classes)
    return Result(value, gradient.reshape(rows, classes) if task.gradient else None, sums)


def _is_flat(rows: int, classes: int, tile: Callable[[int, int], TritonTiling]) -> bool:
    """Whether chunks start at multiples of a vector in memory because they wouldn't otherwise, and can.

    The last vector of all has to end where the array does, and a short row must not take half a chunk more for it.
    """
    if classes % _VECTOR == 0 or rows == 1:
        return False

    def padded(width: int) -> int:
        chunk = tile(rows, width).chunk
        return pl.cdiv(width, chunk) * chunk

    fits = padded(_width(classes, True)) <= _MOST_FOR_FLAT * padded(classes)
    return fits and rows * classes % _VECTOR == 0 and rows * classes < _MOST_ELEMENTS_FLAT


def _stores_whole_vectors(task: Task, operands: Operands) -> bool:
    """Whether what a flat row's vectors have of its neighbours may be computed and written with it.

    It comes out as in their own programs, if nothing is but by element; and must not have been written over before.
    """
    by_element = all(array.shape == operands.logits.shape for _, array in operands.arrays())
    return task.labels == "dense" and by_element and not task.donate_logits


def _width(classes: int, flat: bool) -> int:
    """A row's elements, and those between it and the multiple of a vector below it."""
    return classes + (_VECTOR - 1 if flat else 0)


def _kernel(
    task: Task,
    tiling: TritonTiling,
    shape: tuple[int, int],
    flat: bool,
    whole: bool,
    packed: bool,
    ops: Ops,
    inputs: Operands,
    outputs: Result,
):
    """One program. The references are whole arrays: [rows, classes], flat or not, [1, classes] or [rows, 1]."""
    rows, classes = shape
    i, j = pl.program_id(0), pl.program_id(1)
    at_rows = pl.ds(i * tiling.rows, tiling.rows)
    row_exists = None
    if rows % tiling.rows:
        row_exists = lax.broadcasted_iota(jnp.int32, (tiling.rows, 1), 0) + i * tiling.rows < rows

    before: Any = 0
    if flat:
        row_start = (lax.broadcasted_iota(jnp.int32, (tiling.rows, 1), 0) + i * tiling.rows) * classes
        vector = lax.div(row_start, jnp.int32(_VECTOR))
        before = row_start - vector * _VECTOR  # elements that the first chunk has of the row above

    if inputs.scalars is not None:
        scalars = inputs.scalars
        inputs = inputs._replace(scalars=tuple(scalars[n] for n in range(scalars.shape[0])))

    decoders: dict[str, Callable[..., Array]] = {}
    if task.labels != "dense":
        form = {"packed": _packed_labels, "sparse": _sparse_labels}[task.labels]
        for name in ENCODED:
            if (ref := getattr(inputs, name)) is not None:
                decoders[name] = form(ref, tiling, i * tiling.rows, row_exists, before)

    def chunk(c, partial, edge: bool):
        at_classes = pl.ds(c * tiling.chunk, tiling.chunk)
        class_exists: Any = None
        vector_exists: Any = None
        column = lax.broadcasted_iota(jnp.int32, (1, tiling.chunk), 1) + c * tiling.chunk
        if flat:
            here = vector * _VECTOR + column
            column = column - before
        if edge:
            class_exists = column < classes
        if edge and flat:
            class_exists = jnp.logical_and(column >= 0, class_exists)
            # The same for all of a vector, of which one element at least is the row's.
            vector_exists = lax.div(here, jnp.int32(_VECTOR)) <= lax.div(row_start + (classes - 1), jnp.int32(_VECTOR))

        def place(ref, stored):
            """Index and mask of the tile in an operand that may be constant along either dimension."""
            if len(ref.shape) == 1:
                mask = _all(class_exists if stored and not whole else vector_exists, row_exists)
                # The interpreter writes back what is masked, which is the next row's where a tile has several.
                aside = stored and mask is not None and tiling.rows > 1
                return (jnp.where(mask, here, rows * classes) if aside else here,), mask
            by_row, by_class = ref.shape[0] > 1 or rows == 1, ref.shape[1] > 1 or classes == 1
            if flat and by_class:  # the same for all rows
                return (jnp.zeros_like(column), jnp.clip(column, 0, classes - 1)), None
            index = (at_rows if by_row else pl.ds(0, 1), at_classes if by_class else pl.ds(0, 1))
            tile = (tiling.rows if by_row else 1, tiling.chunk if by_class else 1)
            mask = _all(row_exists if by_row else None, class_exists if by_class else None)
            return index, None if mask is None else jnp.broadcast_to(mask, tile)

        def load(name, ref):
            if name in decoders:
                return decoders[name](c, jnp.clip(column, 0, classes - 1) if edge and flat else column)
            index, mask = place(ref, stored=False)
            other = None if mask is None else jnp.zeros((), ref.dtype)
            return plgpu.load(ref.at[index], mask=mask, other=other)

        neighbours = edge and flat and whole
        loaded, valid = inputs.map(load), None if neighbours else class_exists
        result = task.evaluate(loaded, valid, ops)
        stored = task.results(elements=outputs.value, gradient=outputs.gradient)
        for ref, tile in zip(stored[:2], result[:2], strict=True):
            if ref is not None:
                index, mask = place(ref, stored=True)
                plgpu.store(ref.at[index], tile.astype(ref.dtype), mask=mask)
        if task.value != "rows":
            return partial

        def add(partial: Array, tile: Array) -> Array:
            return partial + (jnp.where(class_exists, tile, 0.0) if neighbours else tile)

        sums = result.sums
        if task.statistics:
            sums = sums._replace(counts=task.count(loaded, valid, ops, packed))
        return jax.tree.map(add, partial, (result.value, sums))

    # A row's chunks have an edge in them from `end` on and, of a flat row, the first one, and none between.
    total = pl.cdiv(_width(classes, flat), tiling.chunk)
    begin = 1 if flat else 0
    end = max(classes // tiling.chunk, begin)

    def edges_before(c):
        return jnp.minimum(c, begin) + jnp.maximum(c - end, 0)

    chunks = tiling.span // tiling.chunk
    first, last = j * chunks, jnp.minimum((j + 1) * chunks, total)
    of_rows = outputs.value if task.value == "rows" else None, outputs.sums
    kept = of_rows
    if packed:
        kept = outputs.value, packed_like(outputs.sums)
    partial = jax.tree.map(lambda _: jnp.zeros((tiling.rows, tiling.chunk), jnp.float32), kept)
    if begin < end:
        inner = jnp.maximum(first, begin), jnp.minimum(last, end)
        partial = lax.fori_loop(*inner, lambda c, p: chunk(c, p, edge=False), partial)
    if begin or end < total:
        edges = edges_before(first), edges_before(last)
        partial = lax.fori_loop(
            *edges, lambda e, p: chunk(jnp.where(e < begin, e, e - begin + end), p, edge=True), partial
        )
    if packed:
        partial = partial[0], unpacked(partial[1])
    for ref, sums in zip(jax.tree.leaves(of_rows), jax.tree.leaves(partial), strict=True):
        plgpu.store(ref.at[at_rows, pl.ds(j, 1)], jnp.sum(sums, axis=1, keepdims=True), mask=row_exists)


def _all(*masks: Any) -> Any:
    """What all of those say that there are; None where there is none."""
    found = [mask for mask in masks if mask is not None]
    return functools.reduce(jnp.logical_and, found) if found else None


def _packed_labels(ref, tiling: TritonTiling, first_row, row_exists, before):
    """The labels of a chunk's columns, bit by bit; eight that are neighbours are so in eight words of the cache."""

    def labels(c, column):
        word, bit = word_and_bit(column)
        words = _load_at(ref, first_row, word, row_exists, (tiling.rows, tiling.chunk))
        return (words >> bit.astype(jnp.uint32)) & jnp.uint32(1) != 0

    return labels


def _sparse_labels(ref, tiling: TritonTiling, first_row, row_exists, before):
    """The labels of chunk c, by a look at every id if any is in the chunk, which few chunks of a long row have.

    An id is as many elements further than its class as the row's first chunk has before the row; padding may come to
    lie among those.
    """
    k = ref.shape[1]
    columns = lax.broadcasted_iota(jnp.int32, (1, 1 << (k - 1).bit_length()), 1)
    shape = (tiling.rows, columns.shape[1])
    in_row = columns < k if row_exists is None else jnp.logical_and(columns < k, row_exists)
    ids = _load_at(ref, first_row, columns, in_row, shape, PADDING) + before

    def labels(c, column):
        def mark(t, found):
            ids = _load_at(ref, first_row, t, row_exists, (tiling.rows, 1), PADDING) + before
            return found | byte_tile(ids - c * tiling.chunk, tiling.chunk)

        none = jnp.zeros((tiling.rows, tiling.chunk // 8), jnp.int32)
        here = jnp.max((ids >> (tiling.chunk.bit_length() - 1) == c).astype(jnp.int32)) > 0
        return unpack_bytes(lax.cond(here, lambda: lax.fori_loop(0, k, mark, none), lambda: none))

    return labels


def _load_at(ref, first_row, columns, mask, shape: tuple[int, int], other: int = 0):
    """Elements of the program's rows, at any columns."""
    rows = lax.broadcasted_iota(jnp.int32, (shape[0], 1), 0) + first_row
    index = tuple(jnp.broadcast_to(at, shape) for at in (rows, columns))
    if mask is None:
        return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=jnp.broadcast_to(mask, shape), other=jnp.array(other, ref.dtype))
