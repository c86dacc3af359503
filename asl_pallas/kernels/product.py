"""Logits that are a product, with their loss: one kernel on a TPU, elsewhere a product of XLA's and `kernels.run`."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from asl_pallas import kernels
from asl_pallas.kernels.operands import ENCODED, Operands, Result, compute_dtype
from asl_pallas.kernels.platforms import Code, by_platform
from asl_pallas.kernels.tile import Task
from asl_pallas.kernels.tiling import LANES, tpu_product_tiling

# Of the TPU's vector memory, 64 or 128 MiB.
_MOST_VMEM = 48 * 2**20


class Factors(NamedTuple):
    """features: (rows, d). kernel: (d, classes). bias: (1, classes), or None."""

    features: Any
    kernel: Any
    bias: Any


def run(
    task: Task, operands: Operands, factors: Factors, precision: Any, implementation: str | None, interpret: bool
) -> Result:
    """`kernels.run` of features @ kernel + bias. In `operands.logits` is their shape, as a `jax.ShapeDtypeStruct`."""
    plain = functools.partial(_plain, task, precision, implementation, interpret)
    shapes = operands.logits
    operands = operands._replace(logits=None)
    if implementation not in (None, "mosaic_tpu") or precision is not None or not _fits(task, operands, factors):
        return plain(shapes, operands, factors)
    fused = functools.partial(_fused, task, interpret)
    if interpret and implementation is not None:
        return fused(operands, factors)
    return by_platform((operands, factors), _Code(task, precision, implementation, shapes))


def _plain(
    task: Task,
    precision: Any,
    implementation: str | None,
    interpret: bool,
    shapes: jax.ShapeDtypeStruct,
    operands: Operands,
    factors: Factors,
) -> Result:
    logits = product(factors.features, factors.kernel, (1, 0), compute_dtype(factors.features.dtype), precision)
    if factors.bias is not None:
        logits = logits + factors.bias.astype(logits.dtype)
    operands = operands._replace(logits=logits.reshape(shapes.shape))
    if implementation not in (None, kernels.PLAIN):
        reason = kernels.refusal(implementation, operands, task.labels)
        if reason is not None:
            raise NotImplementedError(f"implementation={implementation!r} can't serve this call: {reason}")
    return kernels.run(task, operands, implementation, interpret)


def product(a: Array, b: Array, contracted: tuple[int, int], dtype: Any, precision: Any) -> Array:
    """Of two matrices, summed over dimension contracted[0] of a and contracted[1] of b, accumulated in `dtype`."""
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=dtype)


def _fused(task: Task, interpret: bool, operands: Operands, factors: Factors) -> Result:
    return importlib.import_module("asl_pallas.kernels.tpu_product").run(task, operands, factors, interpret=interpret)


def _fits(task: Task, operands: Operands, factors: Factors) -> bool:
    """Whether the TPU's kernel of both can serve: hard labels, and nothing else with a number per row or element."""
    sizes = (*factors.features.shape, factors.kernel.shape[1])
    if not all(isinstance(n, int) for n in sizes):
        return False
    rows, depth, classes = sizes
    if task.statistics or task.value == "elements" or not task.gradient or task.is_soft(operands.labels.dtype):
        return False
    if operands.labels.ndim != 2 or operands.where is not None or operands.cotangent is not None:
        return False
    others = [array for name, array in operands.arrays() if name not in ENCODED]
    if not all(array.shape == (1, classes) for array in others):
        return False
    logits = jax.ShapeDtypeStruct((rows, classes), jnp.float32)
    if kernels.why_not_chosen("mosaic_tpu", task, operands._replace(logits=logits)):
        return False
    are_narrow = factors.features.dtype == factors.kernel.dtype == jnp.bfloat16
    return are_narrow and depth % LANES == 0 and tpu_product_tiling(rows, classes).vmem_bytes(depth) <= _MOST_VMEM


@dataclasses.dataclass(frozen=True)
class _Code:
    """By platform, as `by_platform` asks for it."""

    task: Task
    precision: Any
    implementation: str | None
    shapes: jax.ShapeDtypeStruct

    def __call__(self, asked: tuple[bool, ...]) -> Code:
        def plain(both: tuple[Operands, Factors]) -> Any:
            return _plain(self.task, self.precision, self.implementation, False, self.shapes, *both)

        def fused(both: tuple[Operands, Factors]) -> Any:
            return _fused(self.task, False, *both)

        def alone(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
            if not asked or all(asked):
                return function

            def of_asked(both: tuple[Operands, Factors]) -> Any:
                return [part for part, one in zip(jax.tree.leaves(function(both)), asked, strict=True) if one]

            return of_asked

        return alone(plain), {"tpu": alone(fused), "default": alone(plain)}
