"""Pallas for any CUDA GPU, through Triton.

A program owns a block of rows and a span of classes, which it walks chunk by chunk; lanes keep their own partial sums
and add them up once at the end. Rows too few to fill the chip have their classes split into several spans, whose sums
XLA adds.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from asl_pallas.kernels.tile import Operands, Result, Task, compute_dtype
from asl_pallas.kernels.tiling import TritonTiling, triton_tiling
from asl_pallas.kernels.versions import result_like
from asl_pallas.labels import PADDING, byte_tile, unpack_bytes, word_and_bit


def run(task: Task, operands: Operands, *, interpret: bool = False) -> Result:
    rows, classes = operands.logits.shape
    tiling = triton_tiling(rows, classes)
    spans = pl.cdiv(classes, tiling.span)
    dtype = compute_dtype(operands.logits.dtype)

    if task.labels == "sparse" and operands.labels.shape[1] == 0:
        operands = operands._replace(labels=jnp.full((rows, 1), PADDING, jnp.int32))
    names = tuple(name for name in Operands._fields if getattr(operands, name) is not None)
    outputs = {}
    if task.value == "rows":
        outputs["value"] = result_like(operands.logits, (rows, spans), dtype)
    elif task.value == "elements":
        outputs["value"] = result_like(operands.logits, (rows, classes), dtype)
    if task.gradient:
        outputs["gradient"] = result_like(operands.logits, (rows, classes), operands.logits.dtype)

    results = pl.pallas_call(
        functools.partial(_kernel, task, names, tuple(outputs), tiling, (rows, classes)),
        grid=(pl.cdiv(rows, tiling.rows), spans),
        out_shape=list(outputs.values()),
        compiler_params=plgpu.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages),
        # Safe in one pass: an element is read before its own gradient is written, and by nobody else.
        input_output_aliases={0: list(outputs).index("gradient")} if task.gradient and task.donate_logits else {},
        interpret=interpret,
        name="asl_pallas_" + "_and_".join(outputs),
    )(*(getattr(operands, name) for name in names))
    found = dict(zip(outputs, results, strict=True))
    if task.value == "rows":
        found["value"] = jnp.sum(found["value"], axis=1)
    return Result(found.get("value"), found.get("gradient"))


def _kernel(task: Task, names, outputs, tiling: TritonTiling, shape, *refs):
    inputs = dict(zip(names, refs, strict=False))
    out = dict(zip(outputs, refs[len(names) :], strict=True))
    rows, classes = shape
    i, j = pl.program_id(0), pl.program_id(1)
    at_rows = pl.ds(i * tiling.rows, tiling.rows)
    row_exists = None
    if rows % tiling.rows:
        row_exists = lax.broadcasted_iota(jnp.int32, (tiling.rows, 1), 0) + i * tiling.rows < rows

    if "scalars" in inputs:
        scalars = inputs.pop("scalars")
        task = task.bind(scalars[k] for k in range(scalars.shape[0]))

    few_labels = None
    if task.labels != "dense":
        form = {"packed": _packed_labels, "sparse": _sparse_labels}[task.labels]
        few_labels = form(inputs.pop("labels"), tiling, i * tiling.rows, row_exists)

    def chunk(c, partial, edge: bool):
        at_classes = pl.ds(c * tiling.chunk, tiling.chunk)
        class_exists = None
        if edge:
            class_exists = lax.broadcasted_iota(jnp.int32, (1, tiling.chunk), 1) + c * tiling.chunk < classes

        def place(ref):
            """Index and mask of the tile in an operand that may be constant along either dimension."""
            by_row, by_class = ref.shape[0] > 1 or rows == 1, ref.shape[1] > 1 or classes == 1
            index = (at_rows if by_row else pl.ds(0, 1), at_classes if by_class else pl.ds(0, 1))
            tile = (tiling.rows if by_row else 1, tiling.chunk if by_class else 1)
            masks = [m for m, needed in ((row_exists, by_row), (class_exists, by_class)) if needed and m is not None]
            mask = functools.reduce(jnp.logical_and, masks) if masks else None
            return index, None if mask is None else jnp.broadcast_to(mask, tile)

        def load(ref):
            index, mask = place(ref)
            other = None if mask is None else jnp.zeros((), ref.dtype)
            return plgpu.load(ref.at[index], mask=mask, other=other)

        def store(ref, tile):
            index, mask = place(ref)
            plgpu.store(ref.at[index], tile.astype(ref.dtype), mask=mask)

        tile = {name: load(ref) for name, ref in inputs.items()}
        if few_labels is not None:
            tile["labels"] = few_labels(c)
        result = task.evaluate(Operands(**tile), class_exists)
        if task.gradient:
            store(out["gradient"], result.gradient)
        if task.value == "elements":
            store(out["value"], result.value)
        return partial + result.value if task.value == "rows" else partial

    chunks = tiling.span // tiling.chunk
    whole = classes // tiling.chunk  # chunks without an edge in the whole row
    last = jnp.minimum((j + 1) * chunks, whole)
    start = jnp.zeros((tiling.rows, tiling.chunk) if task.value == "rows" else (), jnp.float32)
    partial = lax.fori_loop(j * chunks, last, lambda c, p: chunk(c, p, edge=False), start)
    if classes % tiling.chunk:
        partial = lax.cond(j == pl.num_programs(1) - 1, lambda p: chunk(last, p, edge=True), lambda p: p, partial)
    if task.value == "rows":
        index = (at_rows, pl.ds(j, 1))
        plgpu.store(out["value"].at[index], jnp.sum(partial, axis=1, keepdims=True), mask=row_exists)


def _packed_labels(ref, tiling: TritonTiling, first_row, row_exists):
    """The labels of chunk c, bit by bit; eight classes that are neighbours are so in eight words of the cache."""

    def labels(c):
        word, bit = word_and_bit(c * tiling.chunk + lax.broadcasted_iota(jnp.int32, (1, tiling.chunk), 1))
        words = _load_at(ref, first_row, word, row_exists, (tiling.rows, tiling.chunk))
        return (words >> bit.astype(jnp.uint32)) & jnp.uint32(1) != 0

    return labels


def _sparse_labels(ref, tiling: TritonTiling, first_row, row_exists):
    """The labels of chunk c, by a look at every id if any is in the chunk, which few chunks of a long row have."""
    k = ref.shape[1]
    columns = lax.broadcasted_iota(jnp.int32, (1, 1 << (k - 1).bit_length()), 1)
    shape = (tiling.rows, columns.shape[1])
    in_row = columns < k if row_exists is None else jnp.logical_and(columns < k, row_exists)
    ids = _load_at(ref, first_row, columns, in_row, shape, PADDING)

    def labels(c):
        def mark(t, found):
            ids = _load_at(ref, first_row, t, row_exists, (tiling.rows, 1), PADDING)
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
