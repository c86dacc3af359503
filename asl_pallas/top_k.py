"""The best labels of a linear head, without its logits."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from asl_pallas import arguments, chunks, head_arguments, head_sharding
from asl_pallas.head import layout_of
from asl_pallas.head_sharding import HeadLayout
from asl_pallas.losses import ElementwiseLoss


def linear_top_k(
    features: ArrayLike,
    kernel: ArrayLike,
    k: int,
    *,
    loss: ElementwiseLoss | None = None,
    bias: ArrayLike | None = None,
    chunk_size: int | None = None,
    precision: Any = None,
    features_spec: PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
) -> tuple[Array, Array]:
    """`jax.lax.top_k(features @ kernel + bias, k)` without the logits: the best k labels of each example.

    Args:
      features, kernel, bias, chunk_size, precision, features_spec, kernel_spec: as in `linear_asymmetric_loss`.
      k: how many, a Python int, 1 <= k <= classes.
      loss: what the head was trained with, for probabilities by its link, `ElementwiseLoss.probability`; None for
        logits. Its hyper-parameters are numbers or scalars: with a value per class, labels in the order of their
        logits aren't in that of their probabilities.

    Returns:
      scores: (..., k), best first: logits, or probabilities by the loss; float32, or float64 for float64 features.
      ids: (..., k), int32. Of equal scores the lower id comes first; -0.0 comes after 0.0, as in jax.lax.top_k.

    Raises:
      ValueError, TypeError: an argument of the wrong kind, shape or range.
    """
    x = head_arguments.check_features(features)
    w = head_arguments.check_kernel(kernel, x)
    b = head_arguments.check_bias(bias, w)
    call = _TopK(
        k=head_arguments.check_k(k, w.shape[1]),
        chunk_size=head_arguments.check_chunk_size(chunk_size),
        precision=head_arguments.check_precision(precision),
        features_spec=arguments.check_spec("features", features_spec, x.ndim),
        kernel_spec=arguments.check_spec("kernel", kernel_spec, 2),
    )
    _check_ranking_loss(loss)
    scores, ids = _linear_top_k(call, x, w, b)
    return (scores if loss is None else loss.probability(scores)), ids


def _check_ranking_loss(loss: Any) -> None:
    if loss is None:
        return
    if not isinstance(loss, ElementwiseLoss):
        raise TypeError(f"loss={loss!r}; expected None or a loss object, such as asl_pallas.AsymmetricLoss()")
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(loss)]
    if any(math.prod(shape) > 1 for shape in shapes):
        raise ValueError(
            f"loss has hyper-parameters of shapes {shapes}, so that the best logits aren't the best probabilities; "
            "expected numbers or scalars, or loss=None for logits"
        )


@dataclasses.dataclass(frozen=True)
class _TopK:
    k: int
    chunk_size: int | None
    precision: Any
    features_spec: PartitionSpec | None
    kernel_spec: PartitionSpec | None


@functools.partial(jax.jit, static_argnums=0)
def _linear_top_k(call: _TopK, features: Array, kernel: Array, bias: Array | None) -> tuple[Array, Array]:
    layout = layout_of(features, kernel, call.features_spec, call.kernel_spec, "linear_top_k")
    arguments_of_call = (features, kernel, bias, call.k, call.chunk_size, call.precision)
    if isinstance(layout, HeadLayout):
        return head_sharding.top_k(*arguments_of_call, layout)
    return chunks.top_k(*arguments_of_call)
