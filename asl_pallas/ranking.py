"""How many of the labels that a model puts first are right."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from asl_pallas.bits import word_and_bit
from asl_pallas.label_sources import as_array, refuse_other_forms, unwrap
from asl_pallas.labels import PackedLabels, SparseLabels
from asl_pallas.partial_labels import PartialLabels
from asl_pallas.sharding import on_any_mesh


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopKStatistics:
    """Hits among the first k labels of each example, added up over the examples; a pytree of float32.

        _, ids = linear_top_k(features, kernel, 5)
        counted = counted + TopKStatistics.of(labels, ids)
        counted.precision    # P@1 to P@5

    Attributes:
      examples: how many.
      hits: (k,), how often the label in that place is a positive.
    """

    examples: Any
    hits: Any

    @classmethod
    def of(
        cls, labels: ArrayLike | PackedLabels | SparseLabels | PartialLabels, ids: ArrayLike, where: Any = None
    ) -> TopKStatistics:
        """Counts those of one batch.

        Args:
          labels: (..., classes), in any form; what isn't annotated is no hit.
          ids: (..., k), integers, best first, as of `linear_top_k`.
          where: (...), bool; False leaves an example out, such as one that fills up the last batch.

        Raises:
          TypeError, ValueError: ids that are no integers, or other examples than the labels'.
        """
        found = jnp.asarray(unwrap(ids))
        if not jnp.issubdtype(found.dtype, jnp.integer):
            raise TypeError(f"ids has dtype {found.dtype.name}; expected an integer dtype")
        if isinstance(labels, PartialLabels):
            labels = labels.positives
        if isinstance(labels, (PackedLabels, SparseLabels)):
            labels = labels.checked()
        else:
            refuse_other_forms("labels", labels)
            labels = jnp.asarray(as_array(unwrap(labels)))
        if found.ndim != len(labels.shape) or found.shape[:-1] != labels.shape[:-1]:
            leading = ", ".join(map(str, labels.shape[:-1]))
            raise ValueError(f"ids has shape {found.shape}; expected ({leading}, k), of the labels' {labels.shape}")
        counts = jnp.ones(found.shape[:-1], bool) if where is None else jnp.asarray(unwrap(where))
        if counts.dtype != jnp.bool_ or counts.shape != found.shape[:-1]:
            raise ValueError(f"where is {counts.dtype.name}{list(counts.shape)}; expected bool{list(found.shape[:-1])}")

        def count(labels: Any, ids: Array, counts: Array) -> TopKStatistics:
            hits = _are_positive(labels, ids) & counts[..., None]
            leading = tuple(range(ids.ndim - 1))
            return cls(jnp.sum(counts, dtype=jnp.float32), jnp.sum(hits, leading, dtype=jnp.float32))

        return on_any_mesh(count, labels, found, counts)

    def __add__(self, other: TopKStatistics) -> TopKStatistics:
        if not isinstance(other, TopKStatistics):
            return NotImplemented
        return jax.tree.map(operator.add, self, other)

    @property
    def precision(self) -> Array:
        """(k,): P@1, P@2 and so on, the share of hits among the first so many; NaN without an example."""
        first = jnp.arange(1, self.hits.shape[-1] + 1)
        return jnp.divide(jnp.cumsum(self.hits, axis=-1), self.examples * first)


def _are_positive(labels: Any, ids: Array) -> Array:
    if isinstance(labels, SparseLabels):
        return jnp.any(ids[..., :, None] == jnp.asarray(labels.ids)[..., None, :], axis=-1)
    if isinstance(labels, PackedLabels):
        word, bit = word_and_bit(ids)
        words = jnp.take_along_axis(jnp.asarray(labels.words), word, axis=-1)
        return words >> bit.astype(jnp.uint32) & jnp.asarray(1, jnp.uint32) != 0
    return jnp.take_along_axis(labels, ids, axis=-1) > 0
