"""Pallas for TPU.

The grid walks blocks of rows by blocks of classes. Inside a block two loops walk groups of rows and chunks of classes, a
few vector registers at a time, so that a chunk's intermediates stay in registers; partial sums of a row stay lane by lane
in a scratch of (rows, 128) until the last block of classes, then leave as one lane-major vector a block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from asl_pallas.formula import exact_reciprocal
from asl_pallas.kernels.tile import Operands, Result, Task, compute_dtype
from asl_pallas.kernels.tiling import LANES, TpuTiling, tpu_tiling


DTYPES = ("float32", "bfloat16", "int8", "int32")


def run(task: Task, operands: Operands, *, interpret: bool = False) -> Result:
    rows, classes = operands.logits.shape
    tiling = tpu_tiling(task, operands)
    grid = (pl.cdiv(rows, tiling.rows), pl.cdiv(classes, tiling.classes))
    padded_rows = grid[0] * tiling.rows

    if operands.cotangent is not None and operands.cotangent.shape[1] == 1:
        # (rows, 1) would be padded to 128 lanes in memory.
        vector = jnp.pad(operands.cotangent.reshape(1, rows), ((0, 0), (0, padded_rows - rows)))
        operands = operands._replace(cotangent=vector)

    block = pl.BlockSpec((tiling.rows, tiling.classes), lambda i, j: (i, j))
    by_class = pl.BlockSpec((1, tiling.classes), lambda i, j: (0, j))
    by_row = pl.BlockSpec((1, tiling.rows), lambda i, j: (0, i))
    in_smem = pl.BlockSpec(memory_space=pltpu.SMEM)

    def spec(name: str, operand: jax.Array) -> pl.BlockSpec:
        if name == "scalars":
            return in_smem
        if operand.shape == (rows, classes):
            return block
        return by_row if name == "cotangent" else by_class

    names = tuple(name for name in Operands._fields if getattr(operands, name) is not None)
    inputs = tuple(getattr(operands, name) for name in names)
    dtype = compute_dtype(operands.logits.dtype)
    outputs = {}
    if task.value == "rows":
        outputs["value"] = (jax.ShapeDtypeStruct((1, padded_rows), dtype), by_row)
    elif task.value == "elements":
        outputs["value"] = (jax.ShapeDtypeStruct((rows, classes), dtype), block)
    if task.gradient:
        outputs["gradient"] = (jax.ShapeDtypeStruct((rows, classes), operands.logits.dtype), block)

    scratch = [pltpu.VMEM((tiling.rows, LANES), dtype)] * ((task.value == "rows") + ("cotangent" in names))
    results = pl.pallas_call(
        functools.partial(_kernel, task, names, tuple(outputs), tiling, (rows, classes), interpret),
        grid=grid,
        in_specs=[spec(name, operand) for name, operand in zip(names, inputs, strict=True)],
        out_specs=[out_spec for _, out_spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="asl_pallas_" + "_and_".join(outputs),
    )(*inputs)
    found = dict(zip(outputs, results, strict=True))
    if task.value == "rows":
        found["value"] = found["value"][0, :rows]
    return Result(found.get("value"), found.get("gradient"))


def _newton_reciprocal(z: jax.Array) -> jax.Array:
    """The chip's estimate and one Newton step, as in its own division but without the cases for 0, inf and denormals."""
    estimate = pl.reciprocal(z, approx=True)
    return estimate * (2.0 - z * estimate)


def _kernel(task: Task, names, outputs, tiling: TpuTiling, shape, interpret: bool, *refs):
    # Interpret mode has the estimate in bfloat16, too coarse for one step.
    reciprocal = exact_reciprocal if interpret else _newton_reciprocal
    inputs = dict(zip(names, refs, strict=False))
    out = dict(zip(outputs, refs[len(names) :], strict=False))
    scratch = list(refs[len(names) + len(outputs) :])
    sums = scratch.pop(0) if task.value == "rows" else None
    by_row = scratch.pop(0) if scratch and inputs["cotangent"].shape[0] == 1 else None
    i, j = pl.program_id(0), pl.program_id(1)
    rows, classes = shape
    group, chunk = tiling.group, tiling.chunk

    scalars = inputs.pop("scalars", None)
    bound = None if scalars is None else tuple(scalars[k] for k in range(scalars.shape[0]))

    if sums is not None or by_row is not None:

        @pl.when(j == 0)
        def _start():
            if sums is not None:
                sums[...] = jnp.zeros_like(sums)
            if by_row is not None:
                by_row[...] = jnp.broadcast_to(inputs["cotangent"][...], (LANES, tiling.rows)).T

    def load(name: str, ref, at_rows, at_classes):
        if name == "cotangent" and by_row is not None:
            return jnp.tile(by_row[at_rows, :], (1, chunk // LANES))
        return ref[at_rows if ref.shape[0] > 1 else slice(None), at_classes]

    def walk(g, n_chunks, edge: bool):
        at_rows = pl.ds(pl.multiple_of(g * group, group), group)

        def step(c, partial):
            at_classes = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
            tile = Operands(**{n: load(n, ref, at_rows, at_classes) for n, ref in inputs.items()}, scalars=bound)
            valid = None
            if edge:
                column = lax.broadcasted_iota(jnp.int32, (group, chunk), 1)
                valid = column < classes % chunk
            result = task.evaluate(tile, valid, reciprocal)
            if task.gradient:
                out["gradient"][at_rows, at_classes] = result.gradient.astype(out["gradient"].dtype)
            if task.value == "elements":
                out["value"][at_rows, at_classes] = result.value
            if task.value == "rows":
                for k in range(chunk // LANES):
                    partial = partial + result.value[:, k * LANES : (k + 1) * LANES]
            return partial

        zero = jnp.zeros((group, LANES), jnp.float32)
        if edge:
            partial = step(n_chunks, zero)
        else:
            partial = lax.fori_loop(0, n_chunks, step, zero)
        if sums is not None:
            sums[at_rows, :] += partial

    # lax.div, since // asks for the sign, whose lowering asks which chip this process has.
    n_groups = lax.div(jnp.minimum(tiling.rows, rows - i * tiling.rows) + group - 1, group)
    n_chunks = lax.div(jnp.minimum(tiling.classes, classes - j * tiling.classes), chunk)

    @pl.loop(0, n_groups)
    def _groups(g):
        walk(g, n_chunks, edge=False)

    if classes % chunk:

        @pl.when(j == pl.num_programs(1) - 1)
        def _edge():
            @pl.loop(0, n_groups)
            def _groups(g):
                walk(g, n_chunks, edge=True)

    if sums is not None:

        @pl.when(j == pl.num_programs(1) - 1)
        def _finish():
            out["value"][...] = jnp.sum(sums[...].T, axis=0, keepdims=True)
