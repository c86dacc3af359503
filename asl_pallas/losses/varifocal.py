"""Varifocal loss, whose soft labels are qualities."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from asl_pallas.losses.base import ElementwiseLoss, hyperparameter
from asl_pallas.losses.ops import EXACT, Hyperparameter, Label, Ops, is_static
from asl_pallas.losses.pieces import to_the, unless_infinite


@dataclasses.dataclass(frozen=True)
class VarifocalLoss(ElementwiseLoss):
    """Varifocal loss of a label y in [0, 1], with p = sigmoid(x):

        y > 0:  y * (-y * log(p) - (1 - y) * log(1 - p))
        y = 0:  alpha * p^gamma * -log(1 - p)

    A label is how good a positive is, the overlap of a detection with its object say. Hard labels are 0 and 1. There is
    no label smoothing: it would leave no label 0.

    Attributes:
      alpha: weight of the negatives, >= 0.
      gamma: focusing exponent of the negatives, >= 0.

    Reference:
      Zhang, Wang, Dayoub, Suenderhauf: VarifocalNet, CVPR 2021, https://arxiv.org/abs/2008.13367, equation (2);
      defaults of mmdetection.
    """

    alpha: Hyperparameter = hyperparameter(0.75, least=0.0)
    gamma: Hyperparameter = hyperparameter(2.0, least=0.0)

    mixes_soft_labels: ClassVar[bool] = False
    non_negative: ClassVar[bool] = True

    def value(self, logit: Array, label: Label, ops: Ops = EXACT) -> Array:
        return self.value_and_slope(logit, label, ops)[0]

    def value_and_slope(self, logit: Array, label: Label, ops: Ops = EXACT) -> tuple[Array, Array]:
        """The slope of a positive is y (p - y), that of a negative alpha p^gamma (p + gamma (1 - p) -log(1 - p))."""
        is_above = logit > 0.0
        magnitude = jnp.where(is_above, logit, 0.0 - logit)
        small = ops.exp(0.0 - magnitude)
        larger = ops.reciprocal(1.0 + small)
        smaller = small * larger
        log = 0.0 - ops.log1p(0.0 - smaller)  # log(1 + exp(-|x|))
        p, q = jnp.where(is_above, larger, smaller), jnp.where(is_above, smaller, larger)
        minus_log_q = ops.maximum(logit, 0.0) + log
        minus_log_p = ops.maximum(0.0 - logit, 0.0) + log
        focus = self.alpha * to_the(self.gamma, p)
        of_negative = minus_log_q
        if not is_static(self.alpha) or self.alpha == 0:
            of_negative = unless_infinite(focus, minus_log_q)
        entropy = jnp.where(q > 0.0, q * minus_log_q, q)  # its limit at infinity is 0
        negative = focus * of_negative, focus * (p + self.gamma * entropy)
        if label.target is None:
            positive = minus_log_p, 0.0 - q
        else:
            y = label.target
            of_absent = jnp.where(y < 1.0, (1.0 - y) * minus_log_q, 0.0 * y)
            positive = y * (y * minus_log_p + of_absent), y * (p - y)
        value, slope = (label.select(*pair) for pair in zip(positive, negative, strict=True))
        return value, slope
