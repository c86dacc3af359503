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
import numpy as np
from jax import Array

from asl_pallas.bits import pack_ids, unpack
from asl_pallas.formula import EXACT, Arithmetic, Formula, evaluate
from asl_pallas.formula import Step as FormulaStep

# How the labels of a call are written: an element each, the words of PackedLabels or the ids of SparseLabels.
Form = Literal["dense", "packed", "sparse"]
# A part of a task: of what the part before it returned, a tile's operands, which of its elements are valid, the chip.
Step = Callable[[Any, "Operands", "Array | None", Arithmetic], Any]


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

    def evaluate(self, tile: Operands, valid: Array | None = None, chip: Arithmetic = EXACT) -> Result:
        """Loss and gradient of each element of a tile, in the compute dtype; exactly 0 where left out.

        Args:
          tile: operands of one tile, each broadcastable to the logits' tile; labels of another form as `positives`
            gives them.
          valid: False for what lies beyond the array's edge.
          chip: its way of doing the arithmetic.
        """
        known: Any = ()
        for step in self.steps(tile.labels.dtype):
            known = step(known, tile, valid, chip)
        return known

    def steps(self, labels: jnp.dtype) -> tuple[Step, ...]:
        """`evaluate` in parts: each takes what the one before it returned, and `evaluate`'s arguments."""
        if self.is_soft(labels):
            return (self._soft,)
        *steps, last = self.formula.steps(self.gradient)
        return *(functools.partial(self._begin, step) for step in steps), functools.partial(self._finish, last)

    def is_soft(self, labels: jnp.dtype) -> bool:
        """Whether an element may be both: each side is evaluated, and they are mixed."""
        return jnp.issubdtype(labels, jnp.floating) or self.label_smoothing != 0

    def needs_elements(self, operands: Operands) -> bool:
        """Whether a loss has to be right by itself, and not their sums over the classes alone."""
        if self.value != "rows":
            return self.value == "elements"
        weighted = operands.weights is not None or operands.pos_weight is not None
        return weighted or self.is_soft(operands.labels.dtype)

    def losses(self, sums: Array, chip: Arithmetic) -> Array:
        """The rows' losses from sums of those that a chip may have left without a sign (`Arithmetic.by_element`)."""
        if chip.by_element:
            return sums
        sums = sums * self.formula.sign(self.gradient)
        if not getattr(self.formula, "non_negative", False):
            return sums
        return jnp.where(sums <= 0.0, 0.0, sums)  # a NaN stays one, and a zero is no negative one

    def _begin(self, step: FormulaStep, known: Any, tile: Operands, valid: Array | None, chip: Arithmetic) -> Any:
        x, labels, _ = self._read(tile, valid)
        return step(known, x, _is_positive(labels), chip)

    def _finish(self, step: FormulaStep, known: Any, tile: Operands, valid: Array | None, chip: Arithmetic) -> Result:
        x, labels, keep = self._read(tile, valid)
        positive = _is_positive(labels)
        result = self._asked(step(known, x, positive, chip))
        tile = _without_left_out(tile, keep, chip)
        if tile.pos_weight is not None:
            weight = tile.pos_weight
            result = jax.tree.map(lambda part: part * jnp.where(positive, weight.astype(part.dtype), 1.0), result)
        return self._weighted(result, tile, keep)

    def _soft(self, _: Any, tile: Operands, valid: Array | None, chip: Arithmetic) -> Result:
        x, labels, keep = self._read(tile, valid)
        tile = _without_left_out(tile._replace(labels=labels), keep, chip)
        labels = tile.labels
        y = _is_positive(labels)
        if jnp.issubdtype(labels.dtype, jnp.floating):
            # No label: the formula would give a number without meaning, a negative loss too.
            y = jnp.where(jnp.logical_and(labels >= 0.0, labels <= 1.0), labels, jnp.nan)
        sides = (evaluate(self.formula, x, positive, chip, self.gradient) for positive in (True, False))
        of_positive, of_negative = (self._asked(side) for side in sides)

        def mix(yes: Array, no: Array) -> Array:
            y_plus = y.astype(yes.dtype)
            if self.label_smoothing:
                y_plus = y_plus * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
            y_minus = 1.0 - y_plus
            # A side without a share is left out even where it, or its weight, is infinite.
            yes = _unless_infinite(y_plus, yes)
            no = _unless_infinite(y_minus, no)
            if tile.pos_weight is not None:
                yes = _unless_infinite(y_plus, tile.pos_weight.astype(yes.dtype)) * yes
            return y_plus * yes + y_minus * no

        return self._weighted(jax.tree.map(mix, of_positive, of_negative), tile, keep)

    def _read(self, tile: Operands, valid: Array | None) -> tuple[Array, Array, Array | None]:
        """Logits in the compute dtype, labels that can be compared, and which elements count, None for all."""
        x = tile.logits.astype(compute_dtype(tile.logits.dtype))
        labels = _comparable(tile.labels)
        masks = [] if valid is None else [valid]
        if tile.where is not None:
            where = _comparable(tile.where)
            masks.append(where if where.dtype == jnp.bool_ else where != 0)
        if self.ignore_label is not None and labels.dtype != jnp.bool_:
            masks.append(is_annotated(labels, self.ignore_label))
        if not masks:
            return x, labels, None
        keep = functools.reduce(jnp.logical_and, masks)
        # Before the formula as well as after it, or a masked NaN returns through the derivative of a select.
        return jnp.where(keep, x, jnp.zeros_like(x)), labels, keep

    def _asked(self, found: tuple[Array, ...]) -> Result:
        value, *gradient = found
        return Result(None if self.value is None else value, gradient[0] if self.gradient else None)

    def _weighted(self, result: Result, tile: Operands, keep: Array | None) -> Result:
        value, gradient = result
        if tile.weights is not None:
            weights = tile.weights.astype(compute_dtype(tile.logits.dtype))
            value = None if value is None else value * weights
            gradient = None if gradient is None else gradient * weights
        if gradient is not None and tile.cotangent is not None:
            gradient = gradient * tile.cotangent.astype(gradient.dtype)
        if keep is not None:
            value = None if value is None else jnp.where(keep, value, jnp.zeros_like(value))
            gradient = None if gradient is None else jnp.where(keep, gradient, jnp.zeros_like(gradient))
        return Result(value, gradient)


def compute_dtype(logits_dtype: jnp.dtype) -> jnp.dtype:
    """float32, or float64 for float64 logits."""
    return jnp.dtype(jnp.float64 if logits_dtype == jnp.float64 else jnp.float32)


def _without_left_out(tile: Operands, keep: Array | None, chip: Arithmetic) -> Operands:
    """Soft labels and weights with 0 where an element is left out, for JAX to differentiate with respect to them.

    A NaN among them would go into the derivative of their product, whatever is selected after it.
    """
    if keep is None or not chip.differentiable:
        return tile

    factors = {name: getattr(tile, name) for name in ("labels", "weights", "pos_weight")}
    return tile._replace(
        **{
            name: jnp.where(keep, array, jnp.zeros_like(array))
            for name, array in factors.items()
            if array is not None and jnp.issubdtype(array.dtype, jnp.floating)
        }
    )


def _unless_infinite(share: Array, x: Array) -> Array:
    """x, and 0 where it is infinite and has no share in the loss."""
    return jnp.where(jnp.logical_and(share == 0.0, x == jnp.inf), 0.0, x)


def _is_positive(labels: Array) -> Array:
    return labels if labels.dtype == jnp.bool_ else labels > 0


def is_annotated(labels: Any, ignore_label: int) -> Any:
    """Which integer labels aren't the one to ignore, compared in their own dtype: of uint32 it may be beyond int32."""
    return labels != np.asarray(ignore_label).astype(labels.dtype)[()]


def _comparable(x: Array) -> Array:
    """Integers of less than 32 bits widened: Mosaic compares no others on every chip."""
    narrow = jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 32
    return x.astype(jnp.int32) if narrow else x


def positives(form: Form, labels: Array, classes: int) -> Array:
    """The labels of whole rows as an operand of `Task.evaluate`, in any number of dimensions, for XLA to fuse."""
    if form == "dense":
        return labels
    return unpack(labels if form == "packed" else pack_ids(labels, classes), classes)
