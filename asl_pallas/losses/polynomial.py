"""The asymmetric polynomial loss (APL)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from asl_pallas.losses.base import ElementwiseLoss, hyperparameter
from asl_pallas.losses.ops import EXACT, Hyperparameter, Label, Ops, is_static
from asl_pallas.losses.pieces import (
    constant_if,
    derived_power,
    has_margin,
    is_focused,
    surprise,
    to_the,
    unbounded,
    wrong_answer,
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

    @property
    def probability_margin(self) -> Any:
        return self.clip if has_margin(self.clip) else None

    def value(self, logit: Array, label: Label, ops: Ops = EXACT) -> Array:
        u, _, _, m, over = wrong_answer(logit, label, self.clip, ops)
        log = surprise(m, over, ops, self._is_focused)
        return self._focus(m, label, ops) * self._of_log(unbounded(log, u, label, self.clip, ops), m, label)

    def value_and_slope(self, logit: Array, label: Label, ops: Ops = EXACT) -> tuple[Array, Array]:
        """In u, the logit of the wrong answer, with w = sigmoid(u), f the factor that has the exponent, l the other:

        dL/du = w * (1 - w) * (f * dl/dm + df/dm * l),  0 where m is 0
        """
        u, wrong, right, m, over = ops.cut(*wrong_answer(logit, label, self.clip, ops))
        log = surprise(m, over, ops, self._is_focused)
        focus = self._focus(m, label, ops)
        value = focus * self._of_log(unbounded(log, u, label, self.clip, ops), m, label)
        slope = focus * (over - label.select(self.epsilon_pos + self.epsilon_pos_2 * m, 0.0 - self.epsilon_neg))
        if not self.stop_focus_gradient:
            derived = label.select(derived_power(self.gamma_pos, m), derived_power(self.gamma_neg, m))
            slope = slope + derived * self._of_log(log, m, label)
        slope = jnp.where(m <= 0.0, 0.0, slope * (wrong * right))  # a NaN stays one
        return value, label.select(0.0 - slope, slope)

    def _focus(self, m: Array, label: Label, ops: Ops) -> Any:
        focus = label.select(to_the(self.gamma_pos, m), to_the(self.gamma_neg, m))
        return constant_if(self.stop_focus_gradient, focus, ops)

    def _of_log(self, log: Array, m: Array, label: Label) -> Array:
        of_positive = m * (self.epsilon_pos + 0.5 * self.epsilon_pos_2 * m)
        return log - label.select(of_positive, self.epsilon_neg * (1.0 - m))

    @property
    def _is_focused(self) -> bool:
        return is_focused(self.gamma_neg, self.gamma_pos)
