"""The asymmetric loss (ASL)."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array

from asl_pallas.losses.base import ElementwiseLoss, hyperparameter
from asl_pallas.losses.ops import EXACT, Hyperparameter, Label, Ops, is_static, select
from asl_pallas.losses.pieces import (
    LIMIT,
    bounded_exp,
    constant_if,
    has_margin,
    is_chain,
    is_focused,
    is_nothing,
    power,
)


@dataclasses.dataclass(frozen=True)
class AsymmetricLoss(ElementwiseLoss):
    r"""The asymmetric loss (ASL) of a logit x with a hard label, and its derivative with respect to x.

    With p = sigmoid(x) and p_m = max(p - clip, 0), equations (4) to (7) of arXiv 2009.14119:

        positive:  L+ = (1 - p)^gamma_pos * -log(p)
        negative:  L- = p_m^gamma_neg * -log(1 - p_m)

    Both sides are one expression in u, the logit of the *wrong* answer (-x for a positive, x for a negative), with the
    margin c (0 for a positive, clip for a negative):

        w = sigmoid(u),  m = max(w - c, 0),  L = m^g * -log(1 - m)
        dL/du = w * (1 - w) * [m^g / (1 - m) + g * m^(g - 1) * -log(1 - m)],  0 where w <= c

    w and 1 - w come from one exponential, each to its own relative precision. Nothing is cut off: a positive at
    x = -1e4 has the loss 1e4 and the slope -1. Loss and slope are finite wherever the mathematics is, for infinite
    logits too, and NaN for a NaN. The slope's own derivative, by autodiff, is right.

    Attributes:
      gamma_neg, gamma_pos: focusing exponents, >= 0.
      clip: probability margin in [0, 1).
      stop_focus_gradient: the focusing factor m^g counts as a constant in the derivative.
    """

    gamma_neg: Hyperparameter = hyperparameter(4.0, least=0.0)
    gamma_pos: Hyperparameter = hyperparameter(1.0, least=0.0)
    clip: Hyperparameter = hyperparameter(0.05, least=0.0, most=1.0, includes_most=False)
    stop_focus_gradient: bool = False

    non_negative: ClassVar[bool] = True
    slope_tells_label: ClassVar[bool] = True

    def value_and_slope(self, logit: Array, label: Label, ops: Ops = EXACT) -> tuple[Array, Array]:
        """From u, the logit of the wrong answer."""
        positive = label.positive
        u = _signed(positive, logit, ops)
        # Far below, exp(u) may be 0: the wrong answer has no probability then, and nothing is divided by it.
        u, e = ops.cut(u, bounded_exp(u, ops))
        right = ops.reciprocal(1.0 + e)
        wrong = e * right
        margin = self._margin(positive, logit.dtype)
        # The slope is du/dx dw/du, whose sign is the label's.
        if margin is None:
            slope, over, u, m = ops.cut(_signed(positive, right * wrong, ops), 1.0 + e, u, wrong)
        else:
            m, one_minus_m = _less_margin(ops.excess(u, wrong, margin), right, margin, ops)
            slope, one_minus_m, u, m = ops.cut(_signed(positive, right * wrong, ops), one_minus_m, u, m)
            over = ops.reciprocal(one_minus_m)
        slope, m, over, u = ops.cut(slope, m, over, u)
        if ops.infer_label_from_slope and not isinstance(positive, bool):
            positive = slope < 0.0
        log = self._log(over, m, 1.0, ops)
        if ops.signed_per_element or not self._is_steep:
            log = ops.maximum(log, 0.0)
        # Where exp(u) is at its limit, a positive's logarithm is u, and elsewhere it is more.
        loss = self._where_unbounded(positive, ops.maximum(log, u), log)
        if self.stop_focus_gradient:
            focus = constant_if(self.stop_focus_gradient, self._power(m, positive), ops)
            return focus * loss, slope * (focus * over)
        if ops.share_power and self.allows_approximate_math:
            of_positive, of_negative = _sides(positive, self.gamma_pos, self.gamma_neg)
            shared = select(positive, power(m, of_positive - 1), power(m, of_negative - 1), m.dtype)
            gamma = select(positive, of_positive, of_negative, m.dtype)
            return (shared * m) * loss, (slope * shared) * ops.multiply_add(gamma, log, m * over)
        focus = self._power(m, positive)
        return focus * loss, slope * ops.multiply_add(self._power_derived(m, positive), log, focus * over)

    def value(self, logit: Array, label: Label, ops: Ops = EXACT) -> Array:
        """From v, the logit of the right answer: log(1 - m) has no reciprocal to wait for."""
        positive = label.positive
        v = logit * select(positive, 1.0, -1.0, logit.dtype)
        v, e = ops.cut(v, bounded_exp(ops.maximum(v, -LIMIT[v.dtype.itemsize]), ops))
        wrong = ops.reciprocal(1.0 + e)
        margin = self._margin(positive, logit.dtype)
        if margin is None:
            one_minus_m, m, v = ops.cut(e * wrong, wrong, v)
        else:
            m, one_minus_m = _less_margin(wrong - margin, e * wrong, margin, ops)
            one_minus_m, margin, m, v = ops.cut(one_minus_m, margin, m, v)
            if ops.infer_label_from_slope and is_static(self.clip) and not isinstance(positive, bool):
                positive = margin == 0.0
        log = self._log(one_minus_m, m, -1.0, ops)
        # Where exp(v) is at its limit, a positive's logarithm is v, and elsewhere it is less; anyone's is at most 0.
        if ops.reload_logit:
            v = select(positive, logit, -logit)
        loss = ops.minimum(log, self._where_unbounded(positive, v, 0.0))
        if ops.signed_per_element and not (self._has_margin and is_static(self.clip)):
            loss = ops.minimum(loss, 0.0)
        value = loss * constant_if(self.stop_focus_gradient, self._power(m, positive), ops)
        return 0.0 - value if ops.signed_per_element else value

    @property
    def probability_margin(self) -> Any:
        return self.clip if has_margin(self.clip) else None

    def sign(self, gradient: bool) -> float:
        return 1.0 if gradient else -1.0

    @property
    def allows_approximate_math(self) -> bool:
        """Powers are products, and no logarithm of a small loss is taken but beside a factor that is smaller still."""
        return self._is_focused and all(map(is_chain, (self.gamma_neg, self.gamma_pos)))

    def _margin(self, positive: Array | bool, dtype: Any) -> Any:
        """c, or None where it is 0 everywhere."""
        return None if not self._has_margin or positive is True else select(positive, 0.0, self.clip, dtype)

    def _log(self, z: Array, m: Array, sign: float, ops: Ops) -> Array:
        """log(z), where z is 1 / (1 - m), or 1 - m for a sign of -1."""
        if self._is_focused and not ops.is_relative:
            return ops.log(z)
        # Nothing else makes easy elements negligible, and thousands of small losses add up: they have to be exact.
        return jnp.where(m < 0.5, -sign * ops.log1p(-ops.minimum(m, 0.5)), jnp.log(z))

    def _where_unbounded(self, positive: Array | bool, yes: Array, no: Any) -> Array:
        """Without a margin -log(1 - m) grows with u for ever: on both sides, or on the positives' alone."""
        if not self._has_margin:
            return yes
        if is_static(self.clip):
            return select(positive, yes, no)
        return jnp.where(select(positive, 0.0, self.clip, yes.dtype) == 0.0, yes, no)

    @property
    def _has_margin(self) -> bool:
        return has_margin(self.clip)

    @property
    def _is_focused(self) -> bool:
        return is_focused(self.gamma_neg, self.gamma_pos)

    @property
    def _is_steep(self) -> bool:
        """Where m is 0, so is a negative's m^(g - 1): a logarithm below 0 by a rounding does nothing there."""
        return self._is_focused and self.gamma_neg >= 2

    def _power(self, m: Array, positive: Array | bool) -> Array | float:
        """m^gamma of the element's own side, 0 below the margin."""
        sides = _sides(positive, self.gamma_pos, self.gamma_neg)
        if not all(map(is_chain, sides)):
            return self._any_power(m, positive, 0.0)[0]

        def of_side(gamma: float) -> Array | float:
            if gamma == 0 and self._has_margin:
                return jnp.where(m > 0.0, 1.0, m)  # a NaN stays one
            return power(m, gamma)

        of_positive, of_negative = map(of_side, sides)
        return select(positive, of_positive, of_negative, m.dtype)

    def _power_derived(self, m: Array, positive: Array | bool) -> Array | float:
        """gamma * m^(gamma - 1)."""
        sides = _sides(positive, self.gamma_pos, self.gamma_neg)
        if not all(map(is_chain, sides)):
            less_one, gamma = self._any_power(m, positive, 1.0)  # see derived_power
            return gamma * less_one
        of_positive, of_negative = (gamma * power(m, gamma - 1) if gamma else 0.0 for gamma in sides)
        return select(positive, of_positive, of_negative, m.dtype)

    def _any_power(self, m: Array, positive: Array | bool, less: float) -> tuple[Array, Array | float]:
        """m^(gamma - less), and gamma. Where m is 0 the power is too: the logarithm beside it needn't be."""
        gamma = select(positive, self.gamma_pos, self.gamma_neg, m.dtype)
        outside = is_nothing(m)
        exponent = gamma - less if less else gamma
        return jnp.where(outside, 0.0, jnp.exp(exponent * jnp.log(jnp.where(outside, 1.0, m)))), gamma


def _less_margin(excess: Array, right: Array, margin: Any, ops: Ops) -> tuple[Array, Array]:
    """m of w - c, and 1 - m as (1 - w) + c, without cancellation. Rounding can take it past 1."""
    return ops.maximum(excess, 0.0), right + margin


def _signed(positive: Array | bool, x: Array, ops: Ops) -> Array:
    """With the sign of the derivative, which is that of the wrong answer's logit too."""
    return x * (-1.0 if positive else 1.0) if isinstance(positive, bool) else ops.negate(positive, x)


def _sides(positive: Array | bool, of_positive: Any, of_negative: Any) -> tuple[Any, ...]:
    """Both sides' numbers; twice the same where only one side can occur."""
    if isinstance(positive, bool):
        return (of_positive,) * 2 if positive else (of_negative,) * 2
    return of_positive, of_negative
