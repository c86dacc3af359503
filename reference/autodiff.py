"""What a user would write in jnp today: float32 intermediates, gradients left to autodiff.

Both functions return the loss of each element, in float32, and are what the library is measured against
in memory and speed. Neither is meant to be right in the tails.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def official(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
) -> jax.Array:
    """The order of operations of the authors' PyTorch code (Alibaba-MIIL/ASL), per element.

    Probabilities first, the margin added to the negatives' probability of being absent and cut at 1, both
    logarithms guarded at 1e-8, then one modulating power with an exponent chosen by the label. The guard
    costs the positives below a logit of about -18 their gradient. For soft labels this is another loss than
    the paper's y L+ + (1 - y) L-: power and exponent are blended before they meet.

    Args:
      logits: (..., classes), any float dtype.
      labels: the same shape, bool, integer or float.
      gamma_neg, gamma_pos, clip: as in the paper (arXiv 2009.14119).

    Returns:
      float32, the shape of the logits.
    """
    targets = jnp.asarray(labels).astype(jnp.float32)
    absent_targets = 1 - targets
    present = jax.nn.sigmoid(jnp.asarray(logits).astype(jnp.float32))
    absent = 1 - present
    if clip > 0:
        absent = jnp.minimum(absent + clip, 1)
    floor = 1e-8
    log_likelihood = targets * jnp.log(jnp.maximum(present, floor))
    log_likelihood += absent_targets * jnp.log(jnp.maximum(absent, floor))
    if gamma_neg > 0 or gamma_pos > 0:
        agreement = present * targets + absent * absent_targets
        exponent = gamma_pos * targets + gamma_neg * absent_targets
        log_likelihood *= jnp.power(1 - agreement, exponent)
    return -log_likelihood


def optax_style(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
) -> jax.Array:
    """The asymmetric loss in the manner of optax.sigmoid_focal_loss, per element.

    Cross-entropy from log_sigmoid, each side under its own power of the probability that it got wrong, the
    two sides blended by the labels. At (0, 0, 0) it is optax.sigmoid_binary_cross_entropy, at (g, g, 0)
    and hard labels optax.sigmoid_focal_loss.

    Args:
      logits: (..., classes), any float dtype.
      labels: the same shape, bool, integer or float.
      gamma_neg, gamma_pos, clip: as in the paper (arXiv 2009.14119).

    Returns:
      float32, the shape of the logits.
    """
    x = jnp.asarray(logits).astype(jnp.float32)
    y = jnp.asarray(labels).astype(jnp.float32)
    p = jax.nn.sigmoid(x)
    if clip > 0:
        p_m = jnp.maximum(p - clip, 0)
        log_absent = jnp.log1p(-p_m)
    else:
        p_m = p
        log_absent = jax.nn.log_sigmoid(-x)
    positive = -jax.nn.log_sigmoid(x) * jnp.power(1 - p, gamma_pos)
    negative = -log_absent * jnp.power(p_m, gamma_neg)
    return y * positive + (1 - y) * negative
