"""A chunk's logits and their loss in one TPU kernel: the loss keeps the vector units busy beside the matrix unit.

A block's product and loss are one piece of straight code, which the compiler interleaves. The logits stay in VMEM.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from asl_pallas.bits import BITS, GROUP, pack_tile, unpack_tile
from asl_pallas.kernels.operands import ENCODED, Operands, Result
from asl_pallas.kernels.product import Factors
from asl_pallas.kernels.tile import Task
from asl_pallas.kernels.tiling import LANES, tpu_product_tiling, tpu_refines
from asl_pallas.kernels.tpu_labels import lay_encoded, pack_rows
from asl_pallas.kernels.tpu_stages import arithmetic
from asl_pallas.kernels.versions import result_like
from asl_pallas.losses.ops import Ops


class _Scratch(NamedTuple):
    logits: Any  # [rows, classes] of a block
    words: Any  # `Operands` of [rows, LANES] words that are made of ids


def run(task: Task, operands: Operands, factors: Factors, *, interpret: bool = False) -> Result:
    """Sums of rows and gradient of features @ kernel + bias, in the place of `operands.logits`."""
    rows, depth = factors.features.shape
    classes = factors.kernel.shape[1]
    logits = jax.ShapeDtypeStruct((rows, classes), jnp.float32)
    operands = operands._replace(logits=logits).own_labels()._replace(logits=None)
    tiling = tpu_product_tiling(rows, classes)
    grid = (pl.cdiv(rows, tiling.rows), pl.cdiv(classes, tiling.classes))
    block = pl.BlockSpec((tiling.rows, tiling.classes), lambda i, j: (i, j))
    by_class = pl.BlockSpec((1, tiling.classes), lambda i, j: (jnp.int32(0), j))
    by_row = pl.BlockSpec((tiling.rows, LANES), lambda i, j: (i, jnp.int32(0)))
    scalars = operands.scalars

    def lay(name: str, array: Array) -> Any:
        if name in ENCODED and task.labels != "dense":
            return lay_encoded(task.labels, array, tiling)
        return array, (block if array.shape[0] > 1 or rows == 1 else by_class), None

    def part(n: int) -> Any:
        return operands.map(lambda name, array: lay(name, array)[n])

    words = operands.map(lambda name, array: getattr(lay(name, array), "words", None))
    factor_specs = Factors(
        pl.BlockSpec((tiling.rows, depth), lambda i, j: (i, jnp.int32(0))),
        pl.BlockSpec((depth, tiling.classes), lambda i, j: (jnp.int32(0), j)),
        None if factors.bias is None else by_class,
    )
    results = task.results(
        sums=result_like(factors.features, (rows, LANES), jnp.float32),
        gradient=result_like(factors.features, (rows, classes), task.gradient_of(logits)),
    )
    ops = arithmetic(task, operands._replace(logits=logits), tpu_refines())
    ((value, gradient, _, _),) = pl.pallas_call(
        functools.partial(_kernel, task, tiling, classes, ops),
        grid=grid,
        in_specs=[
            factor_specs,
            part(1)._replace(scalars=None if scalars is None else pl.BlockSpec(memory_space=pltpu.SMEM)),
        ],
        out_specs=[task.results(sums=by_row, gradient=block)],
        out_shape=[results],
        scratch_shapes=[
            _Scratch(
                pltpu.VMEM((tiling.rows, tiling.classes), jnp.float32),
                words._replace(scalars=None),
            )
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=tiling.vmem_bytes(depth)
        ),
        interpret=interpret,
        name=f"{task.kernel_name}_of_product",
    )(factors, part(0)._replace(scalars=None if scalars is None else scalars[None]))
    if value is not None:
        value = task.row_losses(jnp.sum(value, axis=1), ops)
    return Result(value, gradient)


def _kernel(
    task: Task,
    tiling: Any,
    classes: int,
    ops: Ops,
    factors: Factors,
    inputs: Operands,
    outputs: Result,
    scratch: _Scratch,
):
    """One block: features [rows, d], kernel [d, classes], labels [rows, classes] or [rows, LANES] words, the others
    [1, classes]."""
    j = pl.program_id(1)
    if inputs.scalars is not None:
        scalars = inputs.scalars
        inputs = inputs._replace(scalars=tuple(scalars[0, n] for n in range(scalars.shape[1])))
    if task.labels == "sparse":
        of_group = functools.partial(pack_tile, first=j * tiling.classes, classes=GROUP)

        def make_words(_: str, ids: Any, words: Any) -> None:
            if words is not None:
                pack_rows(ids, words, jnp.int32(tiling.rows // LANES), of_group)

        all_ids = inputs

        @pl.when(lax.rem(j, jnp.int32(tiling.blocks_of_words)) == 0)
        def _words():
            all_ids.map(make_words, scratch.words)

        inputs = inputs.map(lambda _, ref, words: ref if words is None else words, scratch.words)
    logits = jnp.dot(factors.features[...], factors.kernel[...], preferred_element_type=jnp.float32)
    scratch.logits[...] = logits if factors.bias is None else logits + factors.bias[...]
    blocks = tiling.classes // LANES
    first_bit = 0 if task.labels == "dense" else lax.rem(j * jnp.int32(blocks), jnp.int32(BITS))

    def load(name: str, ref: Any) -> Array:
        if name in ENCODED and task.labels != "dense":
            return unpack_tile(ref[...], first_bit, blocks)
        return ref[...]

    valid = None
    if classes % tiling.classes:
        of_class = lax.broadcasted_iota(jnp.int32, (tiling.rows, tiling.classes), 1) + j * tiling.classes
        valid = of_class < classes
    result = task.evaluate(inputs.map(load)._replace(logits=scratch.logits[...]), valid, ops)
    if outputs.gradient is not None:
        outputs.gradient[...] = result.gradient.astype(outputs.gradient.dtype)
    if task.value:
        # Lane by lane; the block stays in VMEM until the row's last classes have come.
        lanes = sum(result.value[:, k : k + LANES] for k in range(0, tiling.classes, LANES))
        outputs.value[...] = jnp.where(j == 0, 0.0, outputs.value[...]) + lanes
