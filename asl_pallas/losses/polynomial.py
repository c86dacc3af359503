"""The asymmetric polynomial loss (APL)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array

from asl_pallas.losses.base import (
    EXACT,
    ElementwiseLoss,
    Hyperparameter,
    Label,
    Ops,
    bounded_exp,
    hyperparameter,
    is_chain,
    is_static,
    power,
    surprise,
    to_the,
)


@dataclasses.dataclass(frozen=True)
class AsymmetricPolynomialLoss(ElementwiseLoss):
    """Asymmetric loss whose logarithms have other first terms in their Taylor series (APL).

    With p = sigmoid(x), q = 1 - p and p_m = max(p - clip, 0):

        positive:  q^gamma_pos * (-log(p) - epsilon_pos * q - epsilon_pos_2 * q^2 / 2)
        negative:  p_m^gamma_neg * (-log(1 - p_m) - epsilon_neg * (1 - p_m))

    Attributes:
      gamma_neg, gamma_pos: focusing exponents, >= 0.
      clip: probability margin in [0, 1).
      epsilon_pos, epsilon_pos_2: what is taken from the first two coefficients of the positives' series, 1 and 1 / 2 *
        1; the authors call the second epsilon_pos_pow.
      epsilon_neg: the negatives' term, as in the authors' code.
      stop_focus_gradient: the factors q^gamma_pos and p_m^gamma_neg count as constants in the derivative.

    Reference:
      Huang, Qi, Wang, Lin: Asymmetric Polynomial Loss For Multi-Label Classification, ICASSP 2023,
      https://arxiv.org/abs/2304.05361; defaults of github.com/LUMIA-Group/APL.
    """

    gamma_neg: Hyperparameter = hyperparameter(4.0, least=0.0)
    gamma_pos: Hyperparameter = hyperparameter(0.0, least=0.0)
    clip: Hyperparameter = hyperparameter(0.05, least=0.0, most=1.0, includes_most=False)
    epsilon_pos: Hyperparameter = hyperparameter(1.0)
    epsilon_pos_2: Hyperparameter = hyperparameter(-2.5)
    epsilon_neg: Hyperparameter = hyperparameter(0.0)
    stop_focus_gradient: bool = True

    @property
    def non_negative(self) -> bool:  # type: ignore[override]
        """What is taken from a coefficient of the series leaves it at or above 0."""
        known = all(map(is_static, (self.epsilon_pos, self.epsilon_pos_2, self.epsilon_neg)))
        return known and self.epsilon_pos <= 1 and self.epsilon_pos_2 <= 1 and self.epsilon_neg <= 0

    def value(self, logit: Array, label: Label, ops: Ops = EXACT) -> Array:
        u, _, _, m, over = self._probabilities(logit, label, ops)
        focus, loss, _ = self._factors(label, ops, u, m, over)
        return focus * loss

    def value_and_slope(self, logit: Array, label: Label, ops: Ops = EXACT) -> tuple[Array, Array]:
        """In u, the logit of the wrong answer, with w = sigmoid(u) and f the factor that has the exponent:

        dL/du = w * (1 - w) * (f * dl/dm + df/dm * l),  0 where m is 0
        """
        u, wrong, right, m, over = ops.cut(*self._probabilities(logit, label, ops))
        focus, loss, derived = self._factors(label, ops, u, m, over)
        slope = focus * derived
        if not self.stop_focus_gradient:
            slope = slope + label.select(_derived(self.gamma_pos, m, ops), _derived(self.gamma_neg, m, ops)) * loss
        slope = jnp.where(m <= 0.0, 0.0, slope * (wrong * right))  # a NaN stays one
        return focus * loss, label.select(0.0 - slope, slope)

    def _probabilities(self, logit: Array, label: Label, ops: Ops) -> tuple[Array, Array, Array, Array, Array]:
        """u, w, 1 - w, m = w less the margin, 1 / (1 - m)."""
        u = label.select(0.0 - logit, logit)
        e = bounded_exp(u, ops)
        right = ops.reciprocal(1.0 + e)
        wrong = e * right
        if not self._has_margin:
            return u, wrong, right, wrong, 1.0 + e
        margin = label.select(0.0, self.clip)
        return u, wrong, right, ops.maximum(wrong - margin, 0.0), ops.reciprocal(right + margin)

    def _factors(self, label: Label, ops: Ops, u: Array, m: Array, over: Array) -> tuple[Array | float, Array, Array]:
        """The factor with the exponent, the one with the logarithm, and the latter's derivative in m."""
        focused = all(is_static(g) and g >= 1 for g in (self.gamma_neg, self.gamma_pos))
        log = surprise(m, over, ops, focused)
        unbounded = ops.maximum(log, u)
        if self._has_margin:
            unbounded = label.select(unbounded, log)
        e_1, e_2, e_neg = self.epsilon_pos, self.epsilon_pos_2, self.epsilon_neg
        loss = unbounded - label.select(m * (e_1 + 0.5 * e_2 * m), e_neg * (1.0 - m))
        derived = over - label.select(e_1 + e_2 * m, 0.0 - e_neg)
        return label.select(to_the(self.gamma_pos, m), to_the(self.gamma_neg, m)), loss, derived

    @property
    def _has_margin(self) -> bool:
        return not (is_static(self.clip) and self.clip == 0)


def _derived(exponent: Hyperparameter, m: Array, ops: Ops) -> Array | float:
    """Of m^exponent, in m; anything where m is 0."""
    if is_chain(exponent):
        return exponent * power(m, exponent - 1) if exponent else 0.0
    return exponent * ops.quotient(jnp.asarray(to_the(exponent, m)), jnp.where(m <= 0.0, 1.0, m))
