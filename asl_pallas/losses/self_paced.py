"""Self-paced loss correction (SPLC), for labels of which some positives are missing."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from asl_pallas.losses.asymmetric import AsymmetricLoss
from asl_pallas.losses.base import ElementwiseLoss, hyperparameter
from asl_pallas.losses.ops import EXACT, Hyperparameter, Label, Ops, is_static
from asl_pallas.losses.pieces import bounded_exp


@dataclasses.dataclass(frozen=True)
class SelfPacedLoss(ElementwiseLoss):
    """Focal loss that takes likely negatives for positives whose label is missing (SPLC).

    With p = sigmoid(x), p_m = sigmoid(x - margin):

        positive:                        (1 - p_m)^gamma * -log(p_m)
        negative with p <= threshold:    p^gamma * -log(1 - p)
        negative with p > threshold:     (1 - p)^gamma * -log(p)

    The authors train the first epoch without the correction. A threshold of 1 is without it: give it as an array,
    and one compilation serves both.

    Attributes:
      threshold: probability in [0, 1] above which a negative counts as a positive, for pos_weight too.
      margin: what a positive's logit has to be above 0.
      gamma: focusing exponent, >= 0.

    Reference:
      Zhang, Cheng, Huang, et al.: Simple and Robust Loss Design for Multi-Label Learning with Missing Labels,
      https://arxiv.org/abs/2112.07368, section 3.3; defaults and the third line, which has no margin, are those of
      github.com/xinyu1205/robust-loss-mlml.
    """

    threshold: Hyperparameter = hyperparameter(0.6, least=0.0, most=1.0)
    margin: Hyperparameter = hyperparameter(1.0)
    gamma: Hyperparameter = hyperparameter(2.0, least=0.0)

    non_negative: ClassVar[bool] = True

    def value(self, logit: Array, label: Label, ops: Ops = EXACT) -> Array:
        return self._focal.value(self._shifted(logit, label), self.relabel(logit, label, ops), ops)

    def value_and_slope(self, logit: Array, label: Label, ops: Ops = EXACT) -> tuple[Array, Array]:
        return self._focal.value_and_slope(self._shifted(logit, label), self.relabel(logit, label, ops), ops)

    def relabel(self, logit: Array, label: Label, ops: Ops = EXACT) -> Label:
        if label.positive is True:
            return label
        p = self.threshold
        if is_static(p):
            missing = logit > (math.log(p / (1 - p)) if 0 < p < 1 else math.copysign(math.inf, p - 0.5))
        else:
            # Above 0 is every probability but that of -inf, though the smallest underflow.
            above_nothing = jnp.logical_and(p == 0.0, logit > -jnp.inf)
            missing = jnp.logical_or(bounded_exp(logit, ops) * (1.0 - p) > p, above_nothing)
        positive = missing if label.positive is False else jnp.logical_or(label.positive, missing)
        return label._replace(positive=positive)

    def sign(self, gradient: bool) -> float:
        return self._focal.sign(gradient)

    @property
    def allows_approximate_math(self) -> bool:
        return self._focal.allows_approximate_math

    def _shifted(self, logit: Array, label: Label) -> Array:
        return logit - label.select(self.margin, 0.0)

    @property
    def _focal(self) -> AsymmetricLoss:
        return AsymmetricLoss(self.gamma, self.gamma, 0.0)
