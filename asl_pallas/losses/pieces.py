"""Pieces that the formulas of the family share: probabilities, powers and logarithms that stay exact in the tails."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from asl_pallas.losses.ops import Hyperparameter, Label, Ops, is_static

# By the size of a float: what exp takes without leaving the normal numbers, nor its reciprocal.
# A probability beyond it counts as the one there, 2e-35 in float32.
LIMIT = {4: 80.0, 8: 700.0}
# Powers up to this one are chains of multiplications.
_LARGEST_CHAIN = 16


def bounded_exp(u: Array, ops: Ops) -> Array:
    """exp(u), and the largest whose reciprocal is a normal number for larger u."""
    return ops.exp(ops.minimum(u, LIMIT[u.dtype.itemsize]))


def power(m: Array, n: float) -> Array | float:
    """m^n for an integer n >= 0, by multiplications."""
    if n in (0, 1):
        return m if n else 1.0
    return lax.integer_pow(m, int(n))


def to_the(exponent: Hyperparameter, m: Array) -> Array | float:
    """m^exponent for m >= 0; 0^0 is 1."""
    if is_chain(exponent):
        return power(m, exponent)
    outside = is_nothing(m)
    of_nothing = 0.0 if is_static(exponent) else jnp.where(exponent == 0.0, 1.0, 0.0)
    return jnp.where(outside, of_nothing, jnp.exp(exponent * jnp.log(jnp.where(outside, 1.0, m))))


def constant_if(stopped: bool, factor: Any, ops: Ops) -> Any:
    """The factor, which counts as a constant in derivatives where `stopped`; as a number it does anyway."""
    return ops.stop_gradient(factor) if stopped and isinstance(factor, Array) else factor


def is_nothing(m: Array) -> Array:
    """Whether m >= 0 is below the normal numbers, 1e-38 in float32: a GPU divides by 0 there. A NaN isn't."""
    return m < float(jnp.finfo(m.dtype).tiny)


def derived_power(exponent: Hyperparameter, m: Array) -> Array | float:
    """The derivative of m^exponent in m; anything where m is 0.

    No quotient of the power by m: a compiler may round m, a difference, in two ways where it is used twice.
    """
    if is_chain(exponent):
        return exponent * power(m, exponent - 1) if exponent else 0.0
    return exponent * jnp.exp((exponent - 1.0) * jnp.log(jnp.where(is_nothing(m), 1.0, m)))


class WrongAnswer(NamedTuple):
    """The answer that the label doesn't give: present for a negative, absent for a positive.

    Attributes:
      logit: u, x for a negative and -x for a positive.
      p, one_minus_p: w = sigmoid(u) and 1 - w, each to its own relative precision.
      m: w less the margin, which positives have none of, and at least 0.
      over: 1 / (1 - m).
    """

    logit: Array
    p: Array
    one_minus_p: Array
    m: Array
    over: Array


def wrong_answer(logit: Array, label: Label, clip: Hyperparameter, ops: Ops) -> WrongAnswer:
    u = label.select(0.0 - logit, logit)
    e = bounded_exp(u, ops)
    right = ops.reciprocal(1.0 + e)
    wrong = e * right
    if not has_margin(clip):
        return WrongAnswer(u, wrong, right, wrong, 1.0 + e)
    margin = label.select(0.0, clip)
    m = ops.maximum(ops.excess(u, wrong, margin), 0.0)
    return WrongAnswer(u, wrong, right, m, ops.reciprocal(right + margin))


def has_margin(clip: Hyperparameter) -> bool:
    return not (is_static(clip) and clip == 0)


def is_focused(*exponents: Hyperparameter) -> bool:
    """Each side has a factor m^g with g >= 1, beside which an error of a rounding in log(1 - m) is negligible."""
    return all(is_static(exponent) and exponent >= 1 for exponent in exponents)


def unbounded(log: Array, u: Array, label: Label, clip: Hyperparameter, ops: Ops) -> Array:
    """-log(1 - m) also where exp(u) is at its limit: there it is u for what has no margin, and elsewhere it is more."""
    of_any = ops.maximum(log, u)
    if not has_margin(clip):
        return of_any
    if is_static(clip):
        return label.select(of_any, log)
    return jnp.where(label.select(0.0, clip) == 0.0, of_any, log)


def unless_infinite(weight: Array, x: Array, infinity: float = math.inf) -> Array:
    """x, and 0 where it is that infinity and its weight is 0: what has no weight counts for nothing."""
    return jnp.where(jnp.logical_and(weight == 0.0, x == infinity), 0.0, x)


def surprise(m: Array, over: Array, ops: Ops, focused: bool) -> Array:
    """-log(1 - m), where `over` is 1 / (1 - m): at most 80, or 700 in float64, where `bounded_exp` is at its limit.

    `focused` is `is_focused` of the exponents. Nothing else makes easy elements negligible, and thousands of small
    losses add up: they have to be exact.
    """
    if focused and not ops.is_relative:
        return ops.maximum(ops.log(over), 0.0)
    return jnp.where(m < 0.5, -ops.log1p(-ops.minimum(m, 0.5)), jnp.log(over))


def is_chain(exponent: Hyperparameter) -> bool:
    """Whether `power` takes it."""
    return is_static(exponent) and float(exponent).is_integer() and exponent <= _LARGEST_CHAIN
