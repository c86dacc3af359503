"""What a kernel adds up over a row beside its losses, for `asl_pallas.statistics`.

Sums over everything that is annotated, and over the positives of it: the negatives' are what is left. An element's part
of each sum is a number like its logit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

# Two counts in one number: of positives, and this many times that of dropped negatives. Each has to stay below it, so
# that float32 holds both.
PACKED = 4096


class Counts(NamedTuple):
    """Sums that hang on logits and labels alone: a kernel may add them up before it knows the loss.

    Attributes:
      annotated: how many elements; None where that is all classes.
      positives: how many of them, or the sum of soft labels.
      dropped: how many negatives are at or below the loss's margin; None where it has none.
      wrong: the probabilities, by the sigmoid, of what the labels don't say: p of negatives, 1 - p of positives.
      wrong_of_positives: those of the positives.
    """

    annotated: Any
    positives: Any
    dropped: Any
    wrong: Any
    wrong_of_positives: Any


class Sums(NamedTuple):
    """All of them.

    Attributes:
      losses_of_positives: with their weights.
      slopes: absolute derivatives of the loss with respect to the logit, with their weights. Where a task's
        `slopes_are_signed`, with their signs.
      slopes_of_positives: those of the positives.
    """

    counts: Any
    losses_of_positives: Any
    slopes: Any
    slopes_of_positives: Any


def packed_like(sums: Sums) -> Sums:
    """Without a place for what is packed into another."""
    return sums._replace(counts=sums.counts._replace(dropped=None))


def unpacked(sums: Sums) -> Sums:
    """Of sums whose positives are packed."""
    counts = sums.counts
    dropped = jnp.floor(counts.positives * (1 / PACKED))
    return sums._replace(counts=counts._replace(positives=counts.positives - dropped * PACKED, dropped=dropped))
