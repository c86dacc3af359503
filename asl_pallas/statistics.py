"""What a loss says of the model beside the number to descend: how well either side is predicted, and who is heard."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from asl_pallas.kernels.sums import ClassSums, Sums


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassStatistics:
    """Sums over the examples of a batch that are in its loss, class by class.

    A pytree of float32 arrays (float64 beside float64 logits), in which counts are exact up to 16,777,216. `a + b` of
    two steps or devices is that of both. What is left out or not annotated is as in `Statistics`.

    Attributes:
      positives, negatives: (classes,), how many there are; of soft labels the sums of y and 1 - y.
      positive_probability, negative_probability: (classes,), sums of p = sigmoid(logit) over either.
      loss: (classes,), weighted.
      true_positives, false_positives: (..., classes), of the shape of decision_logits: how many positives and negatives
        have a logit at or above it.
    """

    positives: Any
    negatives: Any
    positive_probability: Any
    negative_probability: Any
    loss: Any
    true_positives: Any
    false_positives: Any

    def __add__(self, other: ClassStatistics) -> ClassStatistics:
        if not isinstance(other, ClassStatistics):
            return NotImplemented
        return jax.tree.map(operator.add, self, other)

    @property
    def precision(self) -> Array:
        """Of each class, TP / (TP + FP); NaN where none is predicted."""
        return jnp.divide(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> Array:
        """Of each class, TP / (TP + FN); NaN without a positive."""
        return jnp.divide(self.true_positives, self.positives)

    @property
    def f1(self) -> Array:
        """Of each class, 2 TP / (2 TP + FP + FN); NaN where there is no positive and none is predicted."""
        return _f1(self.true_positives, self.false_positives, self.positives)

    @property
    def macro_f1(self) -> Array:
        """The mean of `f1` over the classes that have one: scikit-learn's with zero_division=NaN."""
        return jnp.nanmean(self.f1, axis=-1)

    @property
    def micro_f1(self) -> Array:
        """F1 of all elements together."""
        sums = (self.true_positives, self.false_positives, self.positives)
        return _f1(*(jnp.sum(part, axis=-1) for part in sums))

    @property
    def mcc(self) -> Array:
        """Of each class, Matthews' correlation between label and prediction; 0 where either is constant."""
        return _mcc(self.true_positives, self.false_positives, self.positives, self.negatives)

    @property
    def micro_mcc(self) -> Array:
        """Matthews' correlation of all elements together."""
        sums = (self.true_positives, self.false_positives, self.positives, self.negatives)
        return _mcc(*(jnp.sum(part, axis=-1) for part in sums))

    def best_decision_logits(self, decision_logits: ArrayLike) -> tuple[Array, Array]:
        """For each class that of the decision logits with the greatest F1 on what was counted, and this F1.

        Args:
          decision_logits: those that these statistics were counted with: (..., classes) or (..., 1), of at least two
            dimensions.

        Returns:
          (classes,) and (classes,). Of equal ones the highest logit, so that a class without positives is called least.

        Raises:
          ValueError: another shape.
        """
        given = jnp.asarray(decision_logits)
        counted = self.true_positives.shape
        if len(counted) < 2 or given.ndim != len(counted) or jnp.broadcast_shapes(given.shape, counted) != counted:
            raise ValueError(
                f"decision_logits has shape {given.shape}; expected the ones that were counted by, several a class: "
                f"these statistics have true_positives of {counted}"
            )
        logits = jnp.broadcast_to(given, counted).reshape(-1, counted[-1])
        f1 = jnp.nan_to_num(self.f1).reshape(logits.shape)
        best = jnp.max(f1, axis=0)
        return jnp.max(jnp.where(f1 == best, logits, -jnp.inf), axis=0), best


def _f1(true: Array, false: Array, positives: Array) -> Array:
    return jnp.divide(2 * true, true + false + positives)


def _mcc(true: Array, false: Array, positives: Array, negatives: Array) -> Array:
    """By shares and roots, since products of four counts go beyond what float32 holds."""
    predicted, elements = true + false, positives + negatives
    spared = elements - predicted
    covariance = true / elements - (positives / elements) * (predicted / elements)
    deviations = jnp.sqrt(positives / elements * (negatives / elements))
    deviations = deviations * jnp.sqrt(predicted / elements * (spared / elements))
    return jnp.where(deviations > 0, covariance / jnp.where(deviations > 0, deviations, 1), 0 * deviations)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over the elements of a batch that are in its loss, by the pass that gives the loss.

    A pytree of float32 arrays (float64 beside float64 logits) of one shape, that of the losses. Statistics add up:
    `a + b` of two steps or devices is that of both, and `total()` that of all examples. What is left out by where or
    ignore_label, or not annotated, is in none of them. They have no derivatives.

    Attributes:
      positives, negatives: how many there are; of soft labels the sums of y and 1 - y.
      positive_probability, negative_probability: sums of p = sigmoid(logit) over either. It is not what the logit
        stands for, unless the loss is cross-entropy: see `ElementwiseLoss.probability`.
      dropped_negatives: how many negatives are at or below the loss's margin, so that it doesn't hear them.
      positive_loss, negative_loss: the weighted loss of either. What is not annotated counts with the negatives here.
      positive_gradient, negative_gradient: sums of abs(d loss / d logit) over either, weighted.
      by_class: `ClassStatistics` of all examples, whatever the losses are summed over; None without decision_logits.
    """

    positives: Any
    negatives: Any
    positive_probability: Any
    negative_probability: Any
    dropped_negatives: Any
    positive_loss: Any
    negative_loss: Any
    positive_gradient: Any
    negative_gradient: Any
    by_class: ClassStatistics | None = None

    def __add__(self, other: Statistics) -> Statistics:
        if not isinstance(other, Statistics):
            return NotImplemented
        return jax.tree.map(operator.add, self, other)

    def total(self) -> Statistics:
        """Of all examples: scalars, and what there is by class as it is."""
        of_examples = dataclasses.replace(self, by_class=None)
        return dataclasses.replace(jax.tree.map(jnp.sum, of_examples), by_class=self.by_class)

    @property
    def mean_positive_probability(self) -> Array:
        """NaN without a positive."""
        return jnp.divide(self.positive_probability, self.positives)

    @property
    def mean_negative_probability(self) -> Array:
        """NaN without a negative."""
        return jnp.divide(self.negative_probability, self.negatives)

    @property
    def probability_gap(self) -> Array:
        """The mean p of positives less the mean 1 - p of negatives, what `AdaptiveAsymmetry` holds at its target."""
        return self.mean_positive_probability - (1 - self.mean_negative_probability)

    @property
    def dropped_share(self) -> Array:
        """Of the negatives."""
        return jnp.divide(self.dropped_negatives, self.negatives)

    @property
    def positive_loss_share(self) -> Array:
        """How much of the loss is the positives'."""
        return jnp.divide(self.positive_loss, self.positive_loss + self.negative_loss)

    @property
    def positive_gradient_share(self) -> Array:
        """How much of the gradient's absolute sum is the positives'."""
        return jnp.divide(self.positive_gradient, self.positive_gradient + self.negative_gradient)


def of_sums(losses: Array, sums: Sums, classes: int) -> Statistics:
    """From what a kernel has added up over rows of so many classes."""
    counts = sums.counts
    annotated = jnp.full_like(losses, classes) if counts.annotated is None else counts.annotated
    return Statistics(
        positives=counts.positives,
        negatives=annotated - counts.positives,
        positive_probability=counts.positives - counts.wrong_of_positives,
        negative_probability=counts.wrong - counts.wrong_of_positives,
        dropped_negatives=jnp.zeros_like(losses) if counts.dropped is None else counts.dropped,
        positive_loss=sums.losses_of_positives,
        negative_loss=losses - sums.losses_of_positives,
        positive_gradient=sums.slopes_of_positives,
        negative_gradient=sums.slopes - sums.slopes_of_positives,
    )


def with_classes(statistics: Statistics, sums: ClassSums | None, decisions: tuple[int, ...]) -> Statistics:
    """With what was added up by class: a class has decision logits of this shape."""
    if sums is None:
        return statistics

    def by_decision(parts: tuple[Array, ...]) -> Array:
        return jnp.stack(parts).reshape(*decisions, *parts[0].shape) if decisions else parts[0]

    true, predicted = by_decision(sums.true), by_decision(sums.predicted)
    by_class = ClassStatistics(
        positives=sums.positives,
        negatives=sums.annotated - sums.positives,
        positive_probability=sums.probability_of_positives,
        negative_probability=sums.probability - sums.probability_of_positives,
        loss=sums.losses,
        true_positives=true,
        false_positives=predicted - true,
    )
    return dataclasses.replace(statistics, by_class=by_class)
