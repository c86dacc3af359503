"""What a loss says of the model beside the number to descend: how well either side is predicted, and who is heard."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from asl_pallas.kernels.sums import Sums


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
      positive_gradient, negative_gradient: sums of |d loss / d logit| over either, weighted.
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

    def __add__(self, other: Statistics) -> Statistics:
        if not isinstance(other, Statistics):
            return NotImplemented
        return jax.tree.map(operator.add, self, other)

    def total(self) -> Statistics:
        """Of all examples: scalars."""
        return jax.tree.map(jnp.sum, self)

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
