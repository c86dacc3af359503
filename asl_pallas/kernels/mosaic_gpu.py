"""Pallas for Hopper and later, through Mosaic GPU: the copy engine brings chunks of rows, a warpgroup computes on them.

The copy engine starts at multiples of 16 bytes, with a tensor map too. Where all rows do, it brings chunks as they are
and takes the gradient away. Where they don't, 9605 classes say, it brings a chunk of the flat array with what lies
between it and the multiple below, and the threads write to memory themselves, each beside its neighbour.

A row's last chunk starts early enough to be whole. What it computes twice comes out the same twice; only the sum must
not count it again. The programs stay on the chip and take one span of a row after the other; while a chunk is computed
the next ones are on their way, across the ends of spans too.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.sharding import NamedSharding, PartitionSpec

from asl_pallas.kernels.logarithm import log
from asl_pallas.kernels.tile import Operands, Result, Task, compute_dtype, index_where_it_varies
from asl_pallas.kernels.tiling import MOSAIC_GPU_CLASSES, MosaicGpuTiling, mosaic_gpu_tiling
from asl_pallas.kernels.versions import mosaic_gpu_kernel, mosaic_gpu_module, unify_varying_axes
from asl_pallas.losses.ops import Ops

plgpu = mosaic_gpu_module()

# The copy engine's addresses and sizes are multiples of 16 bytes, and so is this many elements of any size.
_ALIGNMENT = 16


def _log1p(x: Array) -> Array:
    """2 artanh(x / (2 + x)) by its series, which for x from -0.5 on has no need of a tenth term."""
    s = x / (2.0 + x)
    square = s * s
    series = jnp.full_like(s, 1.0 / _TERMS[0])
    for n in _TERMS[1:]:
        series = series * square + 1.0 / n
    return 2.0 * s * series


_TERMS = range(17, 0, -2)


def _refined_reciprocal(z: Array) -> Array:
    """A Newton step from the square of rsqrt's estimate, which errs by 2^-22: by itself that is a little too much."""
    estimate = lax.rsqrt(z) ** 2
    return estimate * (2.0 - z * estimate)


# Mosaic GPU knows neither log1p nor stop_gradient, and on 0.11 no function with a derivative of its own.
_EXACT = Ops(
    log=log,
    log1p=_log1p,
    reciprocal=lambda z: 1.0 / z,
    maximum=jnp.maximum,
    minimum=jnp.minimum,
    negate=lambda condition, x: jnp.where(condition, -x, x),
    stop_gradient=lambda x: x,
    share_power=True,
    differentiable=False,
)
# With `approx_math` exp, log and rsqrt are an instruction or two each. They err as Triton's do.
_APPROXIMATE = dataclasses.replace(_EXACT, log=jnp.log, reciprocal=_refined_reciprocal)


def arithmetic(task: Task, operands: Operands) -> Ops:
    ops = _APPROXIMATE if task.loss.allows_approximate_math else _EXACT
    return dataclasses.replace(ops, signed_per_element=task.needs_elements(operands))


def run(task: Task, operands: Operands, *, interpret: bool = False) -> Result:
    rows, classes = operands.logits.shape
    if classes < MOSAIC_GPU_CLASSES:
        raise NotImplementedError(f"mosaic_gpu walks rows of at least {MOSAIC_GPU_CLASSES} classes, and has {classes}")
    sharding = jax.typeof(operands.logits).sharding
    if any(sharding.spec):
        # A mesh of one device, with Explicit axes: a shard_map has been spared, but no reference may have them.
        whole = jax.tree.map(lambda array: jax.reshard(array, NamedSharding(sharding.mesh, PartitionSpec())), operands)
        value, gradient, _ = run(task, whole, interpret=interpret)
        by_rows = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
        return Result(
            None if value is None else jax.reshard(value, by_rows if value.ndim == 1 else sharding),
            None if gradient is None else jax.reshard(gradient, sharding),
        )
    operands = operands.map(lambda _, array: _loadable(array, classes))
    elements = _Shape((rows, classes), compute_dtype(operands.logits.dtype))
    gradient = _Shape((rows, classes), operands.logits.dtype)
    stored = task.results(elements=elements, gradient=gradient)
    by_engine = all(result.is_aligned for result in stored if result is not None)
    tiling = mosaic_gpu_tiling(rows, classes, operands.logits.dtype.itemsize, vectors=by_engine)
    sums = _Shape((rows, tiling.spans), elements.dtype)
    results = task.results(sums=sums, elements=elements, gradient=gradient)
    ops = arithmetic(task, operands)
    inputs = operands.map(lambda _, array: _Shape(array.shape, array.dtype))
    kernel = _Kernel(task, tiling, inputs, results, stored, by_engine, ops)
    flat = operands.map(lambda _, array: _flat(array, tiling.chunk, kernel.lead(_Shape(array.shape, array.dtype))))

    # vmap one by one: the engine wants strides of 16 bytes, which a flat array's do not have once they are batched.
    @jax.custom_batching.sequential_vmap
    @jax.custom_batching.sequential_vmap
    def call(operands: Operands) -> Result:
        shapes = Result(*(r if r is None else jax.ShapeDtypeStruct((r.size,), r.dtype) for r in results))
        approximate = task.loss.allows_approximate_math
        run = mosaic_gpu_kernel(
            kernel, shapes, kernel.scratch(), tiling.programs, task.kernel_name, interpret, approximate
        )
        return run(operands)

    # plgpu.kernel forgets which manual mesh axes its results vary over.
    (value, gradient, _), _ = unify_varying_axes((call(flat), operands.logits))
    if task.value is not None:
        value = value.reshape(results.value.shape)
    if task.value == "rows":
        value = task.row_losses(jnp.sum(value, axis=1), ops)
    return Result(value, gradient.reshape(rows, classes) if task.gradient else None)


def _loadable(array: Array, classes: int) -> Array:
    """As the engine brings it, or as it is loaded a number at a time. Of what is large, 64-bit weights alone change."""
    if array.dtype == jnp.bool_:
        return array.astype(jnp.int8 if array.shape[1] == classes else jnp.int32)
    return array.astype(jnp.float32) if array.dtype.itemsize == 8 or array.shape[1] < classes else array


def _flat(array: Array, chunk: int, lead: int) -> Array:
    """In one dimension, and where copies start before their chunk filled up to whole pieces of the engine's.

    So an array of which 16 is no divisor is copied first.
    """
    flat = array.reshape(-1)
    size = max(-(-flat.size // _ALIGNMENT) * _ALIGNMENT, chunk + lead)
    return jnp.pad(flat, (0, size - flat.size)) if lead and size > flat.size else flat


def _divmod(n: Array, by: int) -> tuple[Array, Array]:
    """Of what isn't negative; jnp's, for any sign, is ten times the instructions."""
    return lax.div(n, jnp.int32(by)), lax.rem(n, jnp.int32(by))


class _Shape(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any

    @property
    def size(self) -> int:
        return functools.reduce(int.__mul__, self.shape)

    @property
    def is_aligned(self) -> bool:
        """Every row starts at a multiple of 16 bytes, and so do chunks of it."""
        return self.shape[-1] * self.dtype.itemsize % _ALIGNMENT == 0


class _Kernel:
    """The program of one warpgroup. Its operands are flat; what it knows of their shapes comes before them."""

    def __init__(
        self,
        task: Task,
        tiling: MosaicGpuTiling,
        inputs: Operands,
        results: Result,
        stored: Result,
        by_engine: bool,
        ops: Ops,
    ):
        self.task, self.tiling, self.inputs, self.results = task, tiling, inputs, results
        self.stored, self.by_engine, self.ops = stored, by_engine, ops
        self.rows, self.classes = inputs.logits.shape
        self.layout = plgpu.Layout.WG_STRIDED((tiling.tile,), tiling.vector)
        self.__name__ = "asl_pallas"

    def scratch(self) -> dict[str, Any]:
        stages, chunk = self.tiling.stages, self.tiling.chunk

        def load(_: str, source: _Shape) -> Any:
            if not self.is_loaded(source):
                return None
            return plgpu.SMEM((stages, chunk + self.lead(source)), source.dtype)

        loads = self.inputs.map(load)._replace(scalars=None)
        stored = self.stored if self.by_engine else Result(None, None)
        return {
            "loads": loads,
            "stores": Result(*(s if s is None else plgpu.SMEM((stages, chunk), s.dtype) for s in stored)),
            "arrived": plgpu.Barrier(num_arrivals=len(loads.arrays()), num_barriers=stages),
        }

    def is_loaded(self, source: _Shape) -> bool:
        """Whether the copy engine brings it, chunk by chunk."""
        return source.shape[1] == self.classes

    def lead(self, source: _Shape) -> int:
        """The most elements that a copy has before its chunk."""
        return 0 if source.is_aligned or not self.is_loaded(source) else _ALIGNMENT

    def __call__(self, inputs: Operands, outputs: Result, *, loads: Operands, stores: Result, arrived: Any) -> None:
        tiling = self.tiling
        by_engine = any(buffer is not None for buffer in stores)
        program = lax.axis_index("program")
        units, _ = _divmod(self.rows * tiling.spans - program + (tiling.programs - 1), tiling.programs)
        scalars = None
        if inputs.scalars is not None:
            scalars = tuple(self.spread(inputs.scalars[n]) for n in range(inputs.scalars.shape[0]))

        def place(step: Array) -> tuple[Array, Array, Array]:
            """The row, the class that the chunk starts at, and how many of its elements the chunk before it has had."""
            turn, c = _divmod(step, tiling.steps)
            row, span = _divmod(program + turn * tiling.programs, tiling.spans)
            first = (span * tiling.steps + c) * tiling.chunk
            start = jnp.minimum(first, self.classes - tiling.chunk)
            return row, start, first - start

        def source(shape: _Shape, ref: Any, row: Array, start: Array) -> tuple[Array, Array]:
            """Where in the flat array a copy begins, and how far before the chunk."""
            first = start if shape.shape[0] == 1 else row * self.classes + start
            if not self.lead(shape):
                return first, jnp.zeros_like(first)
            whole, _ = _divmod(first, _ALIGNMENT)
            begin = jnp.minimum(whole * _ALIGNMENT, ref.shape[0] - tiling.chunk - _ALIGNMENT)
            return begin, first - begin

        def fetch(step: Array) -> None:
            row, start, _ = place(step)
            _, slot = _divmod(step, tiling.stages)

            def copy(name: str, buffer: Any, shape: _Shape, ref: Any) -> None:
                begin, _ = source(shape, ref, row, start)
                plgpu.copy_gmem_to_smem(
                    ref.at[pl.ds(begin, buffer.shape[1])],
                    buffer.at[slot],
                    arrived.at[slot],
                    oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                )

            loads.map(copy, self.inputs, inputs)

        def compute(step: Array, partial: Array) -> Array:
            row, start, repeated = place(step)
            _, slot = _divmod(step, tiling.stages)
            plgpu.barrier_wait(arrived.at[slot])
            if by_engine:
                plgpu.wait_smem_to_gmem(tiling.stages - 1, wait_read_only=True)

            def tile(first: Array, partial: Array) -> Array:
                at = pl.ds(first, tiling.tile)

                def load(name: str, ref: Any, shape: _Shape, buffer: Any) -> Array:
                    if buffer is None:
                        return self.spread(ref[index_where_it_varies(shape.shape[:1], (row,), (0,))])
                    _, lead = source(shape, ref, row, start)
                    return plgpu.load(buffer.at[slot, pl.ds(lead + first, tiling.tile)], layout=self.layout)

                operands = inputs.map(load, self.inputs, loads)._replace(scalars=scalars)
                result = self.task.evaluate(operands, ops=self.ops)
                for part, output, buffer, shape in zip(result, outputs, stores, self.stored, strict=True):
                    if shape is None:
                        continue
                    if buffer is not None:
                        buffer[slot, at] = part.astype(shape.dtype)
                    else:
                        output[pl.ds(row * self.classes + start + first, tiling.tile)] = part.astype(shape.dtype)
                if self.task.value != "rows":
                    return partial
                value = result.value
                if tiling.spans * tiling.steps * tiling.chunk != self.classes:
                    index = plgpu.layout_cast(lax.iota(jnp.int32, tiling.tile), self.layout)
                    value = jnp.where(index >= repeated - first, value, jnp.zeros_like(value))
                return partial + value

            tiles = jnp.int32(tiling.chunk // tiling.tile)
            partial = lax.fori_loop(jnp.int32(0), tiles, lambda k, p: tile(k * tiling.tile, p), partial)
            if by_engine:
                plgpu.commit_smem()
                for output, buffer in zip(outputs, stores, strict=True):
                    if buffer is not None:
                        target = output.at[pl.ds(row * self.classes + start, tiling.chunk)]
                        plgpu.copy_smem_to_gmem(buffer.at[slot], target, commit_group=False)
                plgpu.commit_smem_to_gmem_group()
            pl.when(step + tiling.stages < units * tiling.steps)(lambda: fetch(step + tiling.stages))
            return partial

        for stage in range(tiling.stages):
            pl.when(stage < units * tiling.steps)(functools.partial(fetch, jnp.int32(stage)))

        @pl.loop(0, units)
        def _walk_a_span(k: Array) -> None:
            start = self.spread(jnp.float32(0)) if self.task.value == "rows" else jnp.float32(0)
            first, steps = k * tiling.steps, jnp.int32(tiling.steps)
            partial = lax.fori_loop(jnp.int32(0), steps, lambda c, p: compute(first + c, p), start)
            if self.task.value == "rows":
                outputs.value[program + k * tiling.programs] = jnp.sum(partial)

        if by_engine:
            plgpu.wait_smem_to_gmem(0)

    def spread(self, scalar: Array) -> Array:
        """A tile of one number: Mosaic GPU broadcasts no predicate of a select by itself."""
        return plgpu.layout_cast(jnp.broadcast_to(scalar, (self.tiling.tile,)), self.layout)
