"""Hill loss, for labels of which some positives are missing."""

from __future__ import annotations

import dataclasses

from jax import Array

from asl_pallas.losses.base import ElementwiseLoss, hyperparameter
from asl_pallas.losses.ops import EXACT, Hyperparameter, Label, Ops, is_static
from asl_pallas.losses.pieces import bounded_exp, is_chain, is_focused, surprise, to_the


@dataclasses.dataclass(frozen=True)
class HillLoss(ElementwiseLoss):
    """Hill loss: negatives that look like positives, which may be missing labels, weigh less again.

    With p = sigmoid(x) and p_m = sigmoid(x - margin):

        positive:  (1 - p_m)^gamma * -log(p_m)
        negative:  (lamb - p) * p^2

    Attributes:
      lamb: how soon the hill's far side begins. Below 1 the loss of a confident negative is below 0.
      margin: what a positive's logit has to be above 0.
      gamma: focusing exponent of the positives, >= 0.

    Reference:
      Zhang, Cheng, Huang, et al.: Simple and Robust Loss Design for Multi-Label Learning with Missing Labels,
      https://arxiv.org/abs/2112.07368, equations (6) and (8); names and defaults of github.com/xinyu1205/
      robust-loss-mlml.
    """

    lamb: Hyperparameter = hyperparameter(1.5)
    margin: Hyperparameter = hyperparameter(1.0)
    gamma: Hyperparameter = hyperparameter(2.0, least=0.0)

    @property
    def non_negative(self) -> bool:  # type: ignore[override]
        return is_static(self.lamb) and self.lamb >= 1

    @property
    def allows_approximate_math(self) -> bool:
        return is_focused(self.gamma) and is_chain(self.gamma)

    def value(self, logit: Array, label: Label, ops: Ops = EXACT) -> Array:
        u, e, wrong, _ = self._sigmoid_of_wrong(logit, label, ops)
        unlikely = ops.maximum(surprise(wrong, 1.0 + e, ops, is_focused(self.gamma)), u)
        return label.select(to_the(self.gamma, wrong) * unlikely, wrong * wrong * (self.lamb - wrong))

    def value_and_slope(self, logit: Array, label: Label, ops: Ops = EXACT) -> tuple[Array, Array]:
        """With w = sigmoid(u), where u = margin - x for a positive and u = x for a negative:

        positive:  dL/du = w^gamma * (w + gamma * (1 - w) * softplus(u))
        negative:  dL/du = w^2 * (1 - w) * (2 lamb - 3 + 3 (1 - w))
        """
        u, e, wrong, right = ops.cut(*self._sigmoid_of_wrong(logit, label, ops))
        log = surprise(wrong, 1.0 + e, ops, is_focused(self.gamma))
        focus, square = to_the(self.gamma, wrong), wrong * wrong
        value = label.select(focus * ops.maximum(log, u), square * (self.lamb - wrong))
        of_positive = focus * (wrong + self.gamma * (right * log))
        of_negative = square * (right * ((2.0 * self.lamb - 3.0) + 3.0 * right))
        return value, label.select(0.0 - of_positive, of_negative)

    def _sigmoid_of_wrong(self, logit: Array, label: Label, ops: Ops) -> tuple[Array, Array, Array, Array]:
        """u, exp(u), w = sigmoid(u) and 1 - w, both to their own relative precision."""
        u = label.select(self.margin - logit, logit)
        e = bounded_exp(u, ops)
        right = ops.reciprocal(1.0 + e)
        return u, e, e * right, right
