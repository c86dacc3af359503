"""The asymmetric loss of one element: its value, its derivative, and both at once.

This file holds all of the mathematics and nothing else. It is plain ``jnp``, so the same lines run inside a TPU kernel,
inside a GPU kernel and under XLA. A formula is any object with the methods of `Formula`; another loss of the family is
another small class here and no line in a kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array, lax

# A hyper-parameter: a Python number compiles into specialised code, a traced scalar serves a whole schedule with one
# compilation, and `TRACED` marks the place of the latter in a formula that has to be hashable.
Scalar = Any
TRACED = None

# Beyond this logit the probability of the right answer is 0 even in float64 (exp(-746) underflows).
_SATURATED = 1000.0
# Powers up to this one are chains of multiplications.
_LARGEST_CHAIN = 16


# How the chip divides: 1 / z for z in [1e-6, 2]. A kernel passes its own where the exact one costs too much.
Reciprocal = Callable[[Array], Array]


def exact_reciprocal(z: Array) -> Array:
    return 1.0 / z


class Formula(Protocol):
    """What a kernel asks of a loss. `positive` is a bool array like `logit`, or a Python bool for one side only."""

    def value(self, logit: Array, positive: Array | bool, reciprocal: Reciprocal) -> Array: ...

    def gradient(self, logit: Array, positive: Array | bool, reciprocal: Reciprocal) -> Array: ...

    def value_and_gradient(
        self, logit: Array, positive: Array | bool, reciprocal: Reciprocal
    ) -> tuple[Array, Array]: ...

    def traced(self) -> tuple[str, ...]: ...

    def bind(self, scalars: tuple[Scalar, ...]) -> Formula: ...


@dataclasses.dataclass(frozen=True)
class AsymmetricLoss:
    r"""The asymmetric loss (ASL) of a logit x with a hard label, and its derivative with respect to x.

    With p = sigmoid(x) and p_m = max(p - clip, 0), equations (4) to (7) of arXiv 2009.14119:

        positive:  L+ = (1 - p)^gamma_pos * -log(p)
        negative:  L- = p_m^gamma_neg * -log(1 - p_m)

    Both sides are one expression in u, the logit of the *wrong* answer (-x for a positive, x for a negative), with the
    margin c (0 for a positive, clip for a negative):

        w = sigmoid(u),  m = max(w - c, 0),  L = m^g * -log(1 - m)
        dL/du = w * [m^g * (1 - w) / (1 - m) + g * m^(g - 1) * (1 - w) * -log(1 - m)],  0 where w <= c

    Nothing is clamped: a positive at x = -1e4 has the loss 1e4 and the slope -1. Loss and slope are finite wherever the
    mathematics is, for infinite logits too, and NaN for a NaN: m carries it, by a select, since max and min drop a NaN
    on a GPU. All selects are taken so that the derivative of the slope, by autodiff, is right at x = 0 as well.

    Attributes:
      gamma_neg, gamma_pos: focusing exponents, >= 0.
      clip: probability margin in [0, 1).
      stop_focus_gradient: the focusing factor m^g counts as a constant in the derivative.
    """

    gamma_neg: Scalar = 4.0
    gamma_pos: Scalar = 1.0
    clip: Scalar = 0.05
    stop_focus_gradient: bool = False

    def value(self, logit: Array, positive: Array | bool, reciprocal: Reciprocal = exact_reciprocal) -> Array:
        return self._evaluate(logit, positive, reciprocal, gradient=False)[0]

    def gradient(self, logit: Array, positive: Array | bool, reciprocal: Reciprocal = exact_reciprocal) -> Array:
        return self._evaluate(logit, positive, reciprocal, gradient=True)[1]

    def value_and_gradient(
        self, logit: Array, positive: Array | bool, reciprocal: Reciprocal = exact_reciprocal
    ) -> tuple[Array, Array]:
        return self._evaluate(logit, positive, reciprocal, gradient=True)

    def traced(self) -> tuple[str, ...]:
        """Names of the hyper-parameters that `bind` has to fill in, in its order."""
        return tuple(n for n in ("gamma_neg", "gamma_pos", "clip") if getattr(self, n) is TRACED)

    def bind(self, scalars: tuple[Scalar, ...]) -> AsymmetricLoss:
        return dataclasses.replace(self, **dict(zip(self.traced(), scalars, strict=True)))

    def _evaluate(
        self, logit: Array, positive: Array | bool, reciprocal: Reciprocal, gradient: bool
    ) -> tuple[Array, Array]:
        sign = _select(positive, -1.0, 1.0, logit.dtype)
        u = logit * sign
        wrong, right, a, t, above = _sigmoid(u, reciprocal)

        # -log(1 - m): for a positive softplus(u), from u itself, since 1 - w underflows; for a negative with a margin
        # from (1 - w) + clip, which is at least clip. One logarithm serves both; where nothing else makes easy elements
        # negligible, a second, log1p, keeps their small losses exact: thousands of them add up.
        # share = (1 - w) / (1 - m).
        if self._has_margin:
            margin = _select(positive, 0.0, self.clip, u.dtype)
            m = jnp.where(wrong <= margin, 0.0, wrong - margin)
            rest = jnp.minimum(right + margin, 1.0)  # rounding could take it past 1, and the loss below 0
            softplus = positive if _is_static(self.clip) else jnp.logical_or(positive, margin == 0.0)
            z = _select(softplus, t, rest)
            log = jnp.log(z)
            if not self._is_focused:
                easy = softplus if softplus is True else jnp.logical_or(softplus, m < 0.5)
                log = _select(easy, jnp.log1p(_select(easy, _select(softplus, a, -m), 0.0)), log)
            flip = sign if _is_static(self.clip) else _select(softplus, -1.0, 1.0, u.dtype)
            loss = _select(_and(softplus, above), u, 0.0) - flip * log
            share = _select(softplus, 1.0, right * reciprocal(z)) if gradient else 1.0
        else:
            m = wrong
            loss = jnp.where(above, u, 0.0) + (jnp.log(t) if self._is_focused else jnp.log1p(a))
            share = 1.0

        # slope = gamma * m^(gamma - 1); focus = m^gamma.
        slope, focus = self._focus(m, positive)
        if self.stop_focus_gradient:
            focus = lax.stop_gradient(focus) if isinstance(focus, Array) else focus
        value = focus * loss
        if not gradient:
            return value, value
        du = focus * share
        if not self.stop_focus_gradient:
            # The bound keeps inf * 0 out; where it bites, right is 0.
            du = du + slope * (jnp.minimum(loss, _SATURATED) * right)
        return value, wrong * du * sign

    @property
    def _has_margin(self) -> bool:
        return not (_is_static(self.clip) and self.clip == 0)

    @property
    def _is_focused(self) -> bool:
        """Both sides have a factor m^g with g >= 1, beside which an error of a rounding in log(1 - m) is negligible."""
        return all(_is_static(g) and g >= 1 for g in (self.gamma_neg, self.gamma_pos))

    def _focus(self, m: Array, positive: Array | bool) -> tuple[Array, Array]:
        """gamma * m^(gamma - 1) and m^gamma of the element's own side."""
        sides = _sides(positive, self.gamma_pos, self.gamma_neg)
        if not all(_is_chain(gamma) for gamma in sides):
            gamma = _select(positive, self.gamma_pos, self.gamma_neg, m.dtype)
            inside = m > 0.0
            power = jnp.where(inside, jnp.exp((gamma - 1.0) * jnp.log(jnp.where(inside, m, 1.0))), 0.0)
            return gamma * power, power * m
        of_positive, of_negative = sides
        step: Any = jnp.where(m > 0.0, 1.0, m) if self._has_margin else 1.0  # m^0 on the active side of the margin

        def lower(gamma: float) -> Any:  # m^(gamma - 1), unneeded where gamma is 0
            return _power(m, gamma - 1) if gamma else 0.0

        slope = _select(positive, of_positive * lower(of_positive), of_negative * lower(of_negative), m.dtype)
        if of_positive and of_negative:
            return slope, _select(positive, lower(of_positive), lower(of_negative), m.dtype) * m
        focus = [lower(gamma) * m if gamma else step for gamma in sides]
        return slope, _select(positive, focus[0], focus[1], m.dtype)


def _sigmoid(u: Array, reciprocal: Reciprocal) -> tuple[Array, Array, Array, Array, Array]:
    """sigmoid(u), sigmoid(-u), a = exp(-|u|), 1 + a, and u >= 0: no cancellation on either side."""
    above = u >= 0.0
    a = jnp.exp(-jnp.abs(u))  # not of min(u, -u): at a tie autodiff takes half of each, and the curvature at 0 is lost
    t = 1.0 + a
    r = reciprocal(t)
    ar = a * r
    return jnp.where(above, r, ar), jnp.where(above, ar, r), a, t, above


def _power(m: Array, n: float) -> Array | float:
    return 1.0 if n == 0 else lax.integer_pow(m, int(n))


def _is_static(number: Scalar) -> bool:
    return isinstance(number, (int, float))


def _is_chain(gamma: Scalar) -> bool:
    return _is_static(gamma) and float(gamma).is_integer() and gamma <= _LARGEST_CHAIN


def _sides(positive: Array | bool, of_positive: Scalar, of_negative: Scalar) -> tuple[Scalar, ...]:
    """Both sides' numbers; twice the same where only one side can occur."""
    if isinstance(positive, bool):
        return (of_positive,) * 2 if positive else (of_negative,) * 2
    return of_positive, of_negative


def _select(condition: Array | bool, yes: Any, no: Any, dtype: Any = None) -> Any:
    """jnp.where that leaves no trace where both sides agree or the condition is known; `dtype` types two constants."""
    if isinstance(condition, bool):
        return yes if condition else no
    if _is_static(yes) and _is_static(no):
        return yes if yes == no else jnp.where(condition, jnp.asarray(yes, dtype), jnp.asarray(no, dtype))
    return jnp.where(condition, yes, no)


def _and(left: Array | bool, right: Array) -> Array | bool:
    if isinstance(left, bool):
        return right if left else False
    return jnp.logical_and(left, right)
