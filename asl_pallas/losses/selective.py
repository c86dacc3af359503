"""Class-aware selective loss (CSL), for labels of which some are not annotated."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

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
class SelectiveLoss(ElementwiseLoss):
    """Asymmetric loss with an exponent and a weight of its own for what is not annotated (partial ASL, CSL).

    With p = sigmoid(x) and p_m = max(p - clip, 0):

        positive (label 1):    alpha_pos * (1 - p)^gamma_pos * -log(p)
        negative (label 0):    alpha_neg * p_m^gamma_neg * -log(1 - p_m)
        not annotated:         alpha_unann * p_m^gamma_unann * -log(1 - p_m), or 0 where it is ignored

    What is not annotated counts as a weak negative. It is ignored where its class is frequent, prior >
    prior_threshold, or where the model takes it for a likely positive, p > likelihood_threshold. The authors' modes:

        negative                    the defaults here, without a prior
        ignore                      alpha_unann=0
        ignore_normalize_classes    alpha_unann=0, and weights=1 + 1 / (1 + annotated), where annotated is
                                    (labels != -1).sum(-1, keepdims=True)
        selective                   prior=..., and likelihood_threshold: the k-th largest p of what is not annotated in
                                    the batch, for the authors' likelihood_topk

    Attributes:
      gamma_pos, gamma_neg, gamma_unann: focusing exponents, >= 0.
      alpha_pos, alpha_neg, alpha_unann: weights, >= 0.
      clip: probability margin in [0, 1).
      prior: (classes,), how frequent each class is, in [0, 1]; None for a selection without it.
      prior_threshold, likelihood_threshold: in [0, 1].
      unannotated_label: the integer that marks what is not annotated.
      stop_focus_gradient: the factors with the exponents count as constants in the derivative, as in the authors' code.

    Reference:
      Ben-Baruch, Ridnik, Friedman, et al.: Multi-label Classification with Partial Annotations using Class-aware
      Selective Loss, CVPR 2022, https://arxiv.org/abs/2110.10955, equations (3) to (8); defaults of
      github.com/Alibaba-MIIL/PartialLabelingCSL.
    """

    gamma_pos: Hyperparameter = hyperparameter(0.0, least=0.0)
    gamma_neg: Hyperparameter = hyperparameter(1.0, least=0.0)
    gamma_unann: Hyperparameter = hyperparameter(2.0, least=0.0)
    alpha_pos: Hyperparameter = hyperparameter(1.0, least=0.0)
    alpha_neg: Hyperparameter = hyperparameter(1.0, least=0.0)
    alpha_unann: Hyperparameter = hyperparameter(1.0, least=0.0)
    clip: Hyperparameter = hyperparameter(0.0, least=0.0, most=1.0, includes_most=False)
    prior: Hyperparameter | None = hyperparameter(None, least=0.0, most=1.0)
    prior_threshold: Hyperparameter = hyperparameter(0.05, least=0.0, most=1.0)
    likelihood_threshold: Hyperparameter = hyperparameter(1.0, least=0.0, most=1.0)
    unannotated_label: int = -1
    stop_focus_gradient: bool = True

    states: ClassVar[int] = 3
    non_negative: ClassVar[bool] = True

    @property
    def probability_margin(self) -> Any:
        return self.clip if has_margin(self.clip) else None

    def value(self, logit: Array, label: Label, ops: Ops = EXACT) -> Array:
        u, wrong, _, m, over = wrong_answer(logit, label, self.clip, ops)
        log = surprise(m, over, ops, self._is_focused)
        return self._weighted(self._focus(m, label, ops) * unbounded(log, u, label, self.clip, ops), wrong, label)

    def value_and_slope(self, logit: Array, label: Label, ops: Ops = EXACT) -> tuple[Array, Array]:
        """In u, the logit of the wrong answer, with w = sigmoid(u) and f the factor that has the exponent:

        dL/du = w * (1 - w) * (f / (1 - m) + df/dm * -log(1 - m)),  0 where m is 0
        """
        u, wrong, right, m, over = ops.cut(*wrong_answer(logit, label, self.clip, ops))
        log = surprise(m, over, ops, self._is_focused)
        focus = self._focus(m, label, ops)
        slope = focus * over
        if not self.stop_focus_gradient:
            slope = slope + label.select(*(derived_power(gamma, m) for gamma in self._gammas)) * log
        slope = jnp.where(m <= 0.0, 0.0, slope * (wrong * right))  # a NaN stays one
        value = self._weighted(focus * unbounded(log, u, label, self.clip, ops), wrong, label)
        return value, self._weighted(label.select(0.0 - slope, slope), wrong, label)

    @property
    def _gammas(self) -> tuple[Any, Any, Any]:
        return self.gamma_pos, self.gamma_neg, self.gamma_unann

    @property
    def _is_focused(self) -> bool:
        return is_focused(*self._gammas)

    def _focus(self, m: Array, label: Label, ops: Ops) -> Any:
        focus = label.select(*(to_the(gamma, m) for gamma in self._gammas))
        return constant_if(self.stop_focus_gradient, focus, ops)

    def _weighted(self, x: Array, wrong: Array, label: Label) -> Array:
        """x times its state's weight; 0 where it is ignored, even if it is infinite."""
        weight = label.select(self.alpha_pos, self.alpha_neg, self.alpha_unann)
        if is_static(weight) and weight == 0:
            return jnp.zeros_like(x)
        without = [] if is_static(weight) else [weight == 0.0]
        if not is_static(self.likelihood_threshold) or self.likelihood_threshold < 1.0:
            without.append(jnp.logical_and(label.unannotated, wrong > self.likelihood_threshold))
        if self.prior is not None:
            without.append(jnp.logical_and(label.unannotated, self.prior > self.prior_threshold))
        weighted = x * weight
        return jnp.where(functools.reduce(jnp.logical_or, without), 0.0, weighted) if without else weighted
