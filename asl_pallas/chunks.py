"""A linear layer's classes, a chunk at a time: logits come, are used and go, and are never all there.

A sigmoid loss needs no normaliser across the classes, so a chunk's logits give its loss, its gradient and both of its
gradient products at once. The loop is XLA's, around XLA's own products; between them runs the elementwise kernel. What
is carried from chunk to chunk is the sum of each example's losses, the gradient of the features, and the parameters'
gradients, which the loop fills slice by slice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from asl_pallas import kernels
from asl_pallas.bits import GROUP, LANES, PADDING, cut, words_for
from asl_pallas.kernels.summation import add_exactly, sum_over, total_of
from asl_pallas.kernels.tile import Form, Operands, Task, compute_dtype, is_annotated
from asl_pallas.kernels.tiling import head_chunk
from asl_pallas.kernels.versions import unify_varying_axes


class Arrays(NamedTuple):
    """The arrays of a call, or one device's part of them; None where the call has none.

    features: (..., d). kernel: (d, classes), where it lies whole. bias: (classes,). cotangent: (..., 1).
    The others are as in `Operands`, with any number of leading dimensions.
    """

    features: Array
    kernel: Array
    bias: Array | None
    labels: Any
    where: Array | None = None
    weights: Array | None = None
    pos_weight: Array | None = None
    cotangent: Array | None = None
    negatives: Any = None
    vectors: tuple[Array, ...] = ()
    scalars: Any = None


class Found(NamedTuple):
    """value: (...,), one loss an example; features, kernel, bias: their gradients, that of the features in the compute
    dtype, the others in their own; sums: `Sums` of (...,). None where not asked for."""

    value: Any = None
    features: Any = None
    kernel: Any = None
    bias: Any = None
    sums: Any = None

    def summed(self) -> Found:
        """Over all examples."""
        value, sums = jax.tree.map(lambda part: sum_over(part, tuple(range(part.ndim))), (self.value, self.sums))
        return self._replace(value=value, sums=sums)


PARAMETERS = ("features", "kernel", "bias")


@dataclasses.dataclass(frozen=True)
class Work:
    """What to find of a call, and how: static.

    Attributes:
      task: of the elementwise kernel, its gradient apart, which `gradients` decides.
      gradients: of these `PARAMETERS`.
      chunk: classes at a time; None for what fits.
      precision: of the products, as in jax.lax.dot_general.
    """

    task: Task
    gradients: tuple[str, ...]
    chunk: int | None
    precision: Any
    implementation: str | None
    interpret: bool


class Exchange(NamedTuple):
    """How a chunk of the kernel is put together from devices' parts, and its gradient added up and taken apart."""

    gather: Callable[[Array], Array]
    scatter: Callable[[Array], Array]


ALONE = Exchange(lambda chunk: chunk, lambda gradient: gradient)


def run(work: Work, arrays: Arrays, exchange: Exchange = ALONE) -> Found:
    """Losses of the examples and gradients, in one pass over the classes."""
    arrays = unify_varying_axes(arrays)
    *leading, depth = arrays.features.shape
    classes = arrays.kernel.shape[-1]
    dtype = compute_dtype(arrays.features.dtype)
    task = dataclasses.replace(work.task, gradient=bool(work.gradients))
    # What has no gradient at all may be NaN: 0 times a NaN is one, and would go into the other factor's gradient.
    features = arrays.features
    if (counts := _counts(task, arrays.where, arrays.labels)) is not None:
        features = jnp.where(counts.any(-1, keepdims=True), features, jnp.zeros_like(features))
    features = features.reshape(math.prod(leading), depth)
    chunk = work.chunk or head_chunk(features.shape[0], classes)
    around = Operands(
        *(None, None, arrays.where, arrays.weights, arrays.pos_weight, arrays.cotangent), vectors=arrays.vectors
    )

    def one(start: Any, size: int, found: Found) -> Found:
        kernel = _kernel_of(arrays.kernel, start, size, features.dtype, exchange)
        labels = _labels_of(task.labels, arrays.labels, start, size, chunk)
        where = arrays.where
        where = _slice(where, start, size) if where is not None and where.shape[-1] == classes else where
        if (counts := _counts(task, where, labels)) is not None:
            of_classes = counts.any(tuple(range(len(leading))))
            kernel = jnp.where(of_classes[None], kernel, jnp.zeros_like(kernel))
        logits = _product(features, kernel, (1, 0), dtype, work.precision)
        if arrays.bias is not None:
            logits = logits + _slice(arrays.bias, start, size).astype(dtype)[None]

        def part(_: str, operand: Array) -> Array:
            return _slice(operand, start, size) if operand.shape[-1] == classes else operand

        negatives = arrays.negatives
        if negatives is not None:
            negatives = _labels_of(task.labels, negatives, start, size, chunk)
        logits = logits.reshape(*leading, size)
        tile = around.map(part)._replace(logits=logits, labels=labels, negatives=negatives, scalars=arrays.scalars)
        if work.implementation not in (None, kernels.PLAIN):
            reason = kernels.refusal(work.implementation, tile, task.labels)
            if reason is not None:
                raise NotImplementedError(f"implementation={work.implementation!r} can't serve this call: {reason}")
        value, gradient, sums = kernels.run(task, tile, work.implementation, work.interpret)
        sums = jax.tree.map(jnp.add, found.sums, sums)
        if value is not None:
            total, lost = found.value
            value = add_exactly(total, lost, value)
        if gradient is None:
            return Found(value, sums=sums)
        gradient = gradient.reshape(features.shape[0], size)
        of_features, of_kernel, of_bias = found.features, found.kernel, found.bias
        if "bias" in work.gradients:
            of_bias = _put(of_bias, jnp.sum(gradient, axis=0), start)
        gradient = gradient.astype(features.dtype)
        if "features" in work.gradients:
            of_features = of_features + _product(gradient, kernel, (1, 1), dtype, work.precision)
        if "kernel" in work.gradients:
            of_chunk = _product(features, gradient, (0, 0), dtype, work.precision)
            of_kernel = _put(of_kernel, exchange.scatter(of_chunk.astype(of_kernel.dtype)), start)
        return Found(value, of_features, of_kernel, of_bias, sums)

    everything = around._replace(
        logits=jax.ShapeDtypeStruct((*leading, classes), dtype),
        labels=arrays.labels,
        negatives=arrays.negatives,
        scalars=arrays.scalars,
    )
    nothing = Found(
        value=None if task.value is None else (jnp.zeros(leading, dtype),) * 2,
        features=jnp.zeros(features.shape, dtype) if "features" in work.gradients else None,
        kernel=jnp.zeros(arrays.kernel.shape, arrays.kernel.dtype) if "kernel" in work.gradients else None,
        bias=jnp.zeros(classes, arrays.bias.dtype) if arrays.bias is not None and "bias" in work.gradients else None,
        sums=task.sums_like(everything, jnp.zeros(leading, dtype)),
    )
    nothing, _ = unify_varying_axes((nothing, arrays.features))
    # Autodiff of the plain formula would keep what it knows of every chunk; it can know it again.
    body = jax.checkpoint(one, static_argnums=1) if work.implementation == kernels.PLAIN else one
    found = over_chunks(body, nothing, classes, chunk)
    if found.value is not None:
        total, lost = found.value
        found = found._replace(value=total_of(total, lax.stop_gradient(lost)))
    if found.features is not None:
        found = found._replace(features=found.features.reshape(arrays.features.shape))
    return found


def _counts(task: Task, where: Array | None, labels: Array) -> Array | None:
    """Which elements are in the loss, of the logits' rank; None for all."""
    masks = [] if where is None else [where]
    if task.ignore_label is not None and labels.dtype != jnp.bool_:
        masks.append(is_annotated(labels, task.ignore_label))
    return functools.reduce(jnp.logical_and, masks) if masks else None


def over_chunks(one: Callable[[Any, int, Any], Any], carry: Any, classes: int, chunk: int, start: int = 0) -> Any:
    """`one(start, size, carry)` for every chunk of the classes from `start`; the last one has what is left."""
    whole, rest = divmod(classes - start, chunk)
    if whole == 1:
        carry = one(start, chunk, carry)
    elif whole:
        # In 32 bits also where JAX counts in 64, which a TPU would do by halves.
        def body(i: Array, carry: Any) -> Any:
            return one(start + i * chunk, chunk, carry)

        carry = lax.fori_loop(np.int32(0), np.int32(whole), body, carry)
    return one(start + whole * chunk, rest, carry) if rest else carry


def top_k(
    features: Array,
    kernel: Array,
    bias: Array | None,
    k: int,
    chunk: int | None,
    precision: Any,
    exchange: Exchange = ALONE,
) -> tuple[Array, Array]:
    """Scores and ids of the best k classes of each example, best first, equal scores by the lower id."""
    features, kernel, bias = unify_varying_axes((features, kernel, bias))
    *leading, depth = features.shape
    classes = kernel.shape[-1]
    rows = features.reshape(math.prod(leading), depth)
    dtype = compute_dtype(features.dtype)

    def scores_of(start: Any, size: int) -> Array:
        of_chunk = _kernel_of(kernel, start, size, features.dtype, exchange)
        scores = _product(rows, of_chunk, (1, 0), dtype, precision)
        return scores if bias is None else scores + _slice(bias, start, size).astype(dtype)[None]

    def one(start: Any, size: int, best: tuple[Array, Array]) -> tuple[Array, Array]:
        of_chunk, at = lax.top_k(scores_of(start, size), min(k, size))
        # What is there already has the lower ids, and lax.top_k takes the first of equals.
        scores = jnp.concatenate([best[0], of_chunk], axis=1)
        ids = jnp.concatenate([best[1], at + start], axis=1)
        scores, at = lax.top_k(scores, k)
        return scores, jnp.take_along_axis(ids, at, axis=1)

    # The first k classes start the list, so that nothing made up is ever in it.
    best = tuple(lax.top_k(scores_of(0, k), k))
    scores, ids = over_chunks(one, best, classes, chunk or head_chunk(rows.shape[0], classes), start=k)
    return scores.reshape(*leading, k), ids.reshape(*leading, k)


def _product(a: Array, b: Array, contracted: tuple[int, int], dtype: Any, precision: Any) -> Array:
    """Of two matrices, summed over dimension contracted[0] of a and contracted[1] of b, accumulated in `dtype`."""
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=dtype)


def _kernel_of(kernel: Array, start: Any, size: int, dtype: Any, exchange: Exchange) -> Array:
    """The kernel of a chunk in the dtype of the products."""
    chunk = _slice(kernel, start, size)
    return exchange.gather((_held(chunk) if kernel.dtype != dtype else chunk).astype(dtype))


@jax.custom_jvp
def _held(chunk: Array) -> Array:
    """The chunk, as something that XLA can't take for a slice of a whole that it could convert ahead of the loop.

    That would be 256 MiB of bfloat16 from a float32 kernel of 1024 x 131,072 on v5e, where a barrier isn't enough.
    """
    bits = lax.bitcast_convert_type(chunk, jnp.dtype(f"uint{8 * chunk.dtype.itemsize}"))
    return lax.bitcast_convert_type(lax.optimization_barrier(bits), chunk.dtype)


@_held.defjvp
def _held_jvp(primals, tangents):
    return _held(*primals), tangents[0]


def _labels_of(form: Form, labels: Array, start: Any, size: int, chunk: int) -> Array:
    """The labels of a chunk, in their own form; `start` is a multiple of `chunk`."""
    if form == "sparse":
        ids = labels - start
        return jnp.where((ids >= 0) & (ids < size), ids, PADDING)
    if form == "dense":
        return _slice(labels, start, size)
    if chunk % GROUP == 0:
        return _slice(labels, start // GROUP * LANES, words_for(size))
    if GROUP % chunk == 0 and chunk % LANES == 0:
        # Part of a group: its bits move to where a group's first ones are.
        words = _slice(labels, start // GROUP * LANES, LANES)
        return words >> jnp.asarray(start % GROUP // LANES, jnp.uint32)
    return cut(labels, start, size)


def _slice(array: Any, start: Any, size: int) -> Any:
    """Classes from `start` on."""
    return lax.dynamic_slice_in_dim(array, start, size, axis=array.ndim - 1)


def _put(array: Array, part: Array, start: Any) -> Array:
    return lax.dynamic_update_slice_in_dim(array, part.astype(array.dtype), start, axis=array.ndim - 1)
