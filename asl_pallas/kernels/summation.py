"""Sums whose rounding error hardly grows with how much is summed, on any machine.

XLA's CPU backend adds up a row in an order, and in a number of lanes, that depend on the CPU at hand. With n numbers in
one lane the error can be n roundings. The sums here take at most 31 roundings for each factor of 32, so that the error
grows with log(n) everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from asl_pallas.kernels.platforms import Code, by_platform

# Numbers that are added one after the other.
GROUP_OF_A_SUM = 32
# Rows that are added so, where each is an array.
_ROWS = 64


def sum_last(x: Array) -> Array:
    """Sum over the last dimension: of groups of `GROUP_OF_A_SUM` numbers, of groups of these sums, and so on.

    All are matrix products, which XLA's CPU backend neither fuses with what makes x nor merges, into one or with a mean
    that the caller takes of them.
    """
    *leading, n = x.shape
    while n > GROUP_OF_A_SUM:
        groups = math.ceil(n / GROUP_OF_A_SUM)
        padded = jnp.pad(x, [(0, 0)] * len(leading) + [(0, groups * GROUP_OF_A_SUM - n)])
        x = _dot_with_ones(padded.reshape(*leading, groups, GROUP_OF_A_SUM))
        n = groups
    return _dot_with_ones(x)


def _dot_with_ones(x: Array) -> Array:
    return jnp.dot(x, jnp.ones(x.shape[-1], x.dtype), precision=lax.Precision.HIGHEST)


def _sum_rows(x: Array, axis: int) -> Array:
    """Sum over a dimension with others behind it, which XLA adds up row by row and fuses with what makes x.

    Of the groups' sums, an array is written; it has a 64th of x.
    """
    group = _ROWS
    while (n := x.shape[axis]) > group:
        groups = math.ceil(n / group)
        fill = [(0, groups * group - n if k == axis else 0) for k in range(x.ndim)]
        padded = jnp.pad(x, fill)
        x = jnp.sum(padded.reshape(*x.shape[:axis], groups, group, *x.shape[axis + 1 :]), axis + 1)
        group = GROUP_OF_A_SUM
    return lax.optimization_barrier(jnp.sum(x, axis))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def sum_over(x: Array, axes: tuple[int, ...]) -> Array:
    """jnp.sum over the axes, on the CPU by `sum_last`. The reductions of accelerators are trees already."""
    if not axes:
        return x
    # Of an array on Explicit mesh axes no dimension may be reshaped, and of a symbolic one no size is known.
    if not all(isinstance(n, int) for n in x.shape) or any(jax.typeof(x).sharding.spec):
        return jnp.sum(x, axes)
    return by_platform(x, _SumCode(axes))


@sum_over.defjvp
def _sum_over_jvp(axes, primals, tangents):
    return sum_over(*primals, axes), jnp.sum(tangents[0], axes)


@dataclasses.dataclass(frozen=True)
class _SumCode:
    axes: tuple[int, ...]

    def __call__(self, asked: tuple[bool, ...]) -> Code:
        plain = functools.partial(jnp.sum, axis=self.axes)
        return plain, {"cpu": self._by_groups, "default": plain}

    def _by_groups(self, x: Array) -> Array:
        kept = x.ndim - len(self.axes)
        if self.axes == tuple(range(kept, x.ndim)):
            return sum_last(x.reshape(*x.shape[:kept], math.prod(x.shape[kept:])))
        for axis in reversed(self.axes):
            x = _sum_rows(x, axis)
        return x


def add_exactly(total: Array, lost: Array, x: Array) -> tuple[Array, Array]:
    """total + x, and `lost` with what that sum's rounding lost added to it; `total_of` puts them together.

    Reference: Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B (TwoSum).
    """
    s = total + x
    of_x = s - total
    return s, lost + ((total - (s - of_x)) + (x - of_x))


def total_of(total: Array, lost: Array) -> Array:
    """The sum that `add_exactly` has kept in two parts; of an infinite one the rest means nothing."""
    return jnp.where(jnp.abs(total) < jnp.inf, total + lost, total)
