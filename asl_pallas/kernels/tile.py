"""What a kernel does with a tile, whatever moved it there: labels, masks and weights around the formula.

Every kernel loads tiles of its operands and hands them to `Task.evaluate`; no kernel decodes a label or applies a mask
itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from asl_pallas.bits import pack_ids, unpack
from asl_pallas.formula import EXACT, Arithmetic, Formula

# How the labels of a call are written: an element each, the words of PackedLabels or the ids of SparseLabels.
Form = Literal["dense", "packed", "sparse"]
Side = Callable[[Array | bool], "Result"]


class Operands(NamedTuple):
    """The arrays of a call, in two dimensions; None where the call has none.

    logits: (rows, classes).
    labels: (rows, classes), or in the task's other forms (rows, words) or (rows, k).
    where, weights: (rows, classes), (1, classes) or (rows, 1).
    pos_weight: (1, classes).
    cotangent: (rows, 1), or (rows, classes) for losses per element; the gradient is multiplied by it before it is
    rounded to the logits' dtype.
    scalars: (n,), the traced hyper-parameters in the formula's order.
    """

    logits: Array
    labels: Array
    where: Array | None = None
    weights: Array | None = None
    pos_weight: Array | None = None
    cotangent: Array | None = None
    scalars: Array | None = None

    def arrays(self) -> dict[str, Array]:
        """By name, what a tile has a part of: all that the call has, but for the scalars."""
        return {name: array for name, array in self._asdict().items() if array is not None and name != "scalars"}


class Result(NamedTuple):
    """value: (rows,) sums over the classes, or (rows, classes); gradient: (rows, classes), in the logits' dtype.

    Arrays, or None where the task asks for none.
    """

    value: Any
    gradient: Any


@dataclasses.dataclass(frozen=True)
class Task:
    """The static half of a call: hashable, so that one compilation serves all calls that agree on it."""

    formula: Formula
    value: Literal["rows", "elements"] | None
    gradient: bool
    ignore_label: int | None = None
    label_smoothing: float = 0.0
    donate_logits: bool = False  # the gradient may be written over them
    labels: Form = "dense"

    def bind(self, scalars: Any) -> Task:
        """The task with its traced hyper-parameters filled in: no longer hashable, ready to be evaluated."""
        return self if scalars is None else dataclasses.replace(self, formula=self.formula.bind(tuple(scalars)))

    def evaluate(
        self,
        tile: Operands,
        valid: Array | None = None,
        chip: Arithmetic = EXACT,
    ) -> Result:
        """Loss and gradient of each element of a tile, in the compute dtype; exactly 0 where left out.

        Args:
          tile: operands of one tile, each broadcastable to the logits' tile; labels of another form as `positives`
            gives them.
          valid: False for what lies beyond the array's edge.
          chip: its way of doing the arithmetic.
        """
        dtype = compute_dtype(tile.logits.dtype)
        x = tile.logits.astype(dtype)
        labels = _comparable(tile.labels)
        masks = [] if valid is None else [valid]
        if tile.where is not None:
            where = _comparable(tile.where)
            masks.append(where if where.dtype == jnp.bool_ else where != 0)
        if self.ignore_label is not None:
            masks.append(labels != self.ignore_label)
        keep = functools.reduce(jnp.logical_and, masks) if masks else None
        if keep is not None:
            # Before the formula as well as after it, or a masked NaN returns through the derivative of a select.
            x = jnp.where(keep, x, jnp.zeros_like(x))

        def side(positive: Array | bool) -> Result:
            if not self.gradient:
                return Result(self.formula.value(x, positive, chip), None)
            if self.value is None:
                return Result(None, self.formula.gradient(x, positive, chip))
            return Result(*self.formula.value_and_gradient(x, positive, chip))

        if jnp.issubdtype(labels.dtype, jnp.floating) or self.label_smoothing:
            value, gradient = self._soft(side, labels, tile.pos_weight)
        else:
            value, gradient = self._hard(side, labels, tile.pos_weight)

        if tile.weights is not None:
            weights = tile.weights.astype(dtype)
            value = None if value is None else value * weights
            gradient = None if gradient is None else gradient * weights
        if gradient is not None and tile.cotangent is not None:
            gradient = gradient * tile.cotangent.astype(dtype)
        if keep is not None:
            value = None if value is None else jnp.where(keep, value, jnp.zeros_like(value))
            gradient = None if gradient is None else jnp.where(keep, gradient, jnp.zeros_like(gradient))
        return Result(value, gradient)

    def _hard(self, side: Side, labels: Array, pos_weight: Array | None) -> Result:
        positive = labels if labels.dtype == jnp.bool_ else labels > 0
        result = side(positive)
        if pos_weight is None:
            return result
        return jax.tree.map(lambda part: part * jnp.where(positive, pos_weight.astype(part.dtype), 1.0), result)

    def _soft(self, side: Side, labels: Array, pos_weight: Array | None) -> Result:
        of_positive, of_negative = side(True), side(False)
        y = labels
        if not jnp.issubdtype(labels.dtype, jnp.floating):
            y = labels if labels.dtype == jnp.bool_ else labels > 0

        def mix(yes: Array, no: Array) -> Array:
            y_plus = y.astype(yes.dtype)
            if self.label_smoothing:
                y_plus = y_plus * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
            y_minus = 1.0 - y_plus
            # A side without a share is left out even where it is infinite.
            yes = jnp.where(jnp.logical_and(y_plus == 0.0, yes == jnp.inf), 0.0, yes)
            no = jnp.where(jnp.logical_and(y_minus == 0.0, no == jnp.inf), 0.0, no)
            return (y_plus if pos_weight is None else y_plus * pos_weight.astype(yes.dtype)) * yes + y_minus * no

        return jax.tree.map(mix, of_positive, of_negative)


def compute_dtype(logits_dtype: jnp.dtype) -> jnp.dtype:
    """float32, or float64 for float64 logits."""
    return jnp.dtype(jnp.float64 if logits_dtype == jnp.float64 else jnp.float32)


def _comparable(x: Array) -> Array:
    """Integers of less than 32 bits widened: Mosaic compares no others on every chip."""
    narrow = jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 32
    return x.astype(jnp.int32) if narrow else x


def positives(form: Form, labels: Array, classes: int) -> Array:
    """The labels of whole rows as an operand of `Task.evaluate`, in any number of dimensions, for XLA to fuse."""
    if form == "dense":
        return labels
    return unpack(labels if form == "packed" else pack_ids(labels, classes), classes)
