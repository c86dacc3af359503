"""Cross-entropy and focal loss: the asymmetric loss without a margin, the same exponent on both sides."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from jax import Array

from asl_pallas.losses.asymmetric import AsymmetricLoss
from asl_pallas.losses.base import ElementwiseLoss, hyperparameter
from asl_pallas.losses.ops import EXACT, Hyperparameter, Label, Ops, is_static
from asl_pallas.losses.pieces import unless_infinite


@dataclasses.dataclass(frozen=True)
class BinaryCrossEntropy(ElementwiseLoss):
    """Sigmoid binary cross-entropy: -log(p) for a positive, -log(1 - p) for a negative, with p = sigmoid(x).

    It is optax.sigmoid_binary_cross_entropy, and torch's BCEWithLogitsLoss with reduction="none".
    """

    non_negative: ClassVar[bool] = True
    slope_tells_label: ClassVar[bool] = True

    def value(self, logit: Array, label: Label, ops: Ops = EXACT) -> Array:
        return _CROSS_ENTROPY.value(logit, label, ops)

    def value_and_slope(self, logit: Array, label: Label, ops: Ops = EXACT) -> tuple[Array, Array]:
        return _CROSS_ENTROPY.value_and_slope(logit, label, ops)

    def sign(self, gradient: bool) -> float:
        return _CROSS_ENTROPY.sign(gradient)


_CROSS_ENTROPY = AsymmetricLoss(0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class FocalLoss(ElementwiseLoss):
    """Focal loss, with p = sigmoid(x):

        positive:  alpha * (1 - p)^gamma * -log(p)
        negative:  (1 - alpha) * p^gamma * -log(1 - p)

    For soft labels it is the mixture y L+ + (1 - y) L-, where optax mixes p and alpha before they meet.

    Attributes:
      gamma: focusing exponent, >= 0.
      alpha: weight of the positives, in [0, 1]; None for no weights.

    Reference:
      Lin, Goyal, Girshick, He, Dollar: Focal Loss for Dense Object Detection, ICCV 2017,
      https://arxiv.org/abs/1708.02002, equation (5); defaults as in optax.sigmoid_focal_loss.
    """

    gamma: Hyperparameter = hyperparameter(2.0, least=0.0)
    alpha: Hyperparameter | None = hyperparameter(None, least=0.0, most=1.0)

    non_negative: ClassVar[bool] = True
    slope_tells_label: ClassVar[bool] = True

    def value(self, logit: Array, label: Label, ops: Ops = EXACT) -> Array:
        infinity = math.inf if ops.signed_per_element else -math.inf
        return self._weighted(self._unweighted.value(logit, label, ops), label, infinity)

    def value_and_slope(self, logit: Array, label: Label, ops: Ops = EXACT) -> tuple[Array, Array]:
        value, slope = self._unweighted.value_and_slope(logit, label, ops)
        return self._weighted(value, label, math.inf), self._weighted(slope, label, math.inf)

    def sign(self, gradient: bool) -> float:
        return self._unweighted.sign(gradient)

    @property
    def allows_approximate_math(self) -> bool:
        return self._unweighted.allows_approximate_math

    @property
    def _unweighted(self) -> AsymmetricLoss:
        return AsymmetricLoss(self.gamma, self.gamma, 0.0)

    def _weighted(self, x: Array, label: Label, infinity: float) -> Array:
        if self.alpha is None:
            return x
        weight = label.select(self.alpha, 1.0 - self.alpha)
        if is_static(self.alpha) and 0 < self.alpha < 1:
            return x * weight
        return unless_infinite(weight, x, infinity) * weight
