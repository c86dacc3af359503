"""The arrays of a call as every kernel takes them, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from asl_pallas.bits import pack_ids, unpack

# How the labels of a call are written: an element each, the words of PackedLabels or the ids of SparseLabels.
Form = Literal["dense", "packed", "sparse"]


class Operands(NamedTuple):
    """The arrays of a call, in two dimensions; None where the call has none.

    logits: (rows, classes).
    labels: (rows, classes), or in the task's other forms (rows, words) or (rows, k).
    negatives: with labels in another form that have a third state, the annotated negatives in the same form.
    where, weights, pos_weight: (rows, classes), (1, classes) or (rows, 1).
    cotangent: (rows, 1), or (rows, classes) for losses per element; the gradient is multiplied by it before it is
    rounded to the logits' dtype.
    vectors: (1, classes) each, or as `where`: the hyper-parameters that are arrays, in the loss's order.
    scalars: (n,), the hyper-parameters that are traced scalars, in the loss's order.
    decisions: (1, classes) each, logits from which on a class counts as predicted.
    first_class: (1,), int32, or None: dense labels are those of more classes, whose first is here. A multiple of
    `ALIGNED_CLASSES`, as the number of these classes is.

    A kernel has the same with a reference for each array, and hands a tile of each to `Task.evaluate`.
    """

    logits: Any
    labels: Any
    where: Any = None
    weights: Any = None
    pos_weight: Any = None
    cotangent: Any = None
    negatives: Any = None
    vectors: tuple[Any, ...] = ()
    scalars: Any = None
    decisions: tuple[Any, ...] = ()
    first_class: Any = None

    def own_labels(self) -> Operands:
        """With the labels of the logits' classes alone."""
        if self.first_class is None:
            return self
        labels = lax.dynamic_slice_in_dim(self.labels, self.first_class[0], self.logits.shape[-1], self.labels.ndim - 1)
        return self._replace(labels=labels, first_class=None)

    def map(self, function: Callable[..., Any], *others: Operands) -> Operands:
        """function(name, array, *the others' own) in the place of each array that a tile has a part of.

        The scalars stay as they are. Entries of `vectors` share that name, and so do those of `decisions`.
        """

        def of(name: str, value: Any, *parts: Any) -> Any:
            return None if value is None else function(name, value, *parts)

        mapped = {name: of(name, getattr(self, name), *(getattr(o, name) for o in others)) for name in _BY_TILE}
        for name in VECTORS:
            entries = zip(getattr(self, name), *(getattr(other, name) for other in others), strict=True)
            mapped[name] = tuple(of(name, *parts) for parts in entries)
        return Operands(**mapped, scalars=self.scalars, first_class=self.first_class)

    def arrays(self) -> list[tuple[str, Any]]:
        """Each with its name: what a tile has a part of."""
        found: list[tuple[str, Any]] = []
        self.map(lambda name, array: found.append((name, array)))
        return found


def index_where_it_varies(shape: tuple[int, ...], here: tuple[Any, ...], constant: tuple[Any, ...]) -> tuple[Any, ...]:
    """An index into an operand of that shape: `here` of each dimension, and `constant` of those with one element."""
    return tuple(h if n > 1 else c for n, h, c in zip(shape, here, constant, strict=True))


# What a vector of one-byte labels begins at a multiple of.
ALIGNED_CLASSES = 16
# Fields that are tuples of arrays.
VECTORS = ("vectors", "decisions")
_BY_TILE = ("logits", "labels", "where", "weights", "pos_weight", "cotangent", "negatives")
# Operands that are words or ids where the task's labels aren't dense.
ENCODED = ("labels", "negatives")


class Result(NamedTuple):
    """value: (rows,) sums over the classes, or (rows, classes); gradient: (rows, classes), in `Task.gradient_of`;
    sums: `Sums` of (rows,); of_classes: `ClassSums` of (classes,).

    Arrays, or None where the task asks for none. Of a tile all are numbers per element, and counts are left out.
    """

    value: Any
    gradient: Any
    sums: Any = None
    of_classes: Any = None


def compute_dtype(logits_dtype: jnp.dtype) -> jnp.dtype:
    """float32, or float64 for float64 logits."""
    return jnp.dtype(jnp.float64 if logits_dtype == jnp.float64 else jnp.float32)


def positives(form: Form, labels: Array, classes: int) -> Array:
    """The labels of whole rows as an operand of `Task.evaluate`, in any number of dimensions, for XLA to fuse."""
    if form == "dense":
        return labels
    return unpack(labels if form == "packed" else pack_ids(labels, classes), classes)
