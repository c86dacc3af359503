"""What a kernel does with a tile, whatever moved it there: labels, masks and weights around the loss.

Every kernel loads tiles of its operands and hands them to `Task.evaluate`; no kernel decodes a label or applies a mask
itself.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from asl_pallas.bits import pack_ids, unpack
from asl_pallas.kernels.sums import PACKED, Counts, Sums
from asl_pallas.losses.base import ElementwiseLoss
from asl_pallas.losses.ops import EXACT, Label, Ops
from asl_pallas.losses.pieces import bounded_exp, unless_infinite

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

    def map(self, function: Callable[..., Any], *others: Operands) -> Operands:
        """function(name, array, *the others' own) in the place of each array that a tile has a part of.

        The scalars stay as they are. Entries of `vectors` share that name.
        """

        def of(name: str, value: Any, *parts: Any) -> Any:
            return None if value is None else function(name, value, *parts)

        mapped = {name: of(name, getattr(self, name), *(getattr(o, name) for o in others)) for name in _BY_TILE}
        vectors = zip(self.vectors, *(other.vectors for other in others), strict=True)
        return Operands(**mapped, vectors=tuple(of("vectors", *parts) for parts in vectors), scalars=self.scalars)

    def arrays(self) -> list[tuple[str, Any]]:
        """Each with its name: what a tile has a part of."""
        found: list[tuple[str, Any]] = []
        self.map(lambda name, array: found.append((name, array)))
        return found


def index_where_it_varies(shape: tuple[int, ...], here: tuple[Any, ...], constant: tuple[Any, ...]) -> tuple[Any, ...]:
    """An index into an operand of that shape: `here` of each dimension, and `constant` of those with one element."""
    return tuple(h if n > 1 else c for n, h, c in zip(shape, here, constant, strict=True))


_BY_TILE = ("logits", "labels", "where", "weights", "pos_weight", "cotangent", "negatives")
# Operands that are words or ids where the task's labels aren't dense.
ENCODED = ("labels", "negatives")


class Result(NamedTuple):
    """value: (rows,) sums over the classes, or (rows, classes); gradient: (rows, classes), in the logits' dtype;
    sums: `Sums` of (rows,).

    Arrays, or None where the task asks for none. Of a tile all are numbers per element, and counts are left out.
    """

    value: Any
    gradient: Any
    sums: Any = None


@dataclasses.dataclass(frozen=True)
class Task:
    """The static half of a call: hashable, so that one compilation serves all calls that agree on it."""

    loss: ElementwiseLoss
    value: Literal["rows", "elements"] | None
    gradient: bool
    ignore_label: int | None = None
    label_smoothing: float = 0.0
    donate_logits: bool = False  # the gradient may be written over them
    labels: Form = "dense"
    statistics: bool = False

    def results(
        self, *, sums: Any = None, elements: Any = None, gradient: Any = None, statistics: Any = None
    ) -> Result:
        """Of what a kernel may give these the ones asked for: sums or elements' losses, the gradient, statistics."""
        value = {"rows": sums, "elements": elements, None: None}[self.value]
        return Result(value, gradient if self.gradient else None, statistics if self.statistics else None)

    def sums_like(self, operands: Operands, one: Any) -> Any:
        """`Sums` with `one` in the place of each that the task asks for, None for none; dtypes alone are looked at."""
        if not self.statistics:
            return None

        def element(name: str, array: Any) -> Any:
            is_encoded = name in ENCODED and self.labels != "dense"
            return jax.ShapeDtypeStruct((1, 1), bool if is_encoded else array.dtype)

        def both(tile: Operands) -> Any:
            return self.evaluate(tile).sums._replace(counts=self.count(tile))

        tile, scalars = operands.map(element), operands.scalars
        if scalars is not None:
            tile = tile._replace(scalars=(jax.ShapeDtypeStruct((), scalars.dtype),) * scalars.size)
        return jax.tree.map(lambda _: one, jax.eval_shape(both, tile))

    @property
    def kernel_name(self) -> str:
        """As profilers show it."""
        results = (["value"] if self.value else []) + (["gradient"] if self.gradient else [])
        results += ["statistics"] if self.statistics else []
        return "asl_pallas_" + "_and_".join(results)

    def evaluate(self, tile: Operands, valid: Array | None = None, ops: Ops = EXACT) -> Result:
        """Loss and gradient of each element of a tile, in the compute dtype; exactly 0 where masked.

        Args:
          tile: operands of one tile, each broadcastable to the logits' tile; labels of another form as `positives`
            gives them; the scalars as numbers or an array of them.
          valid: False for what lies beyond the array's edge.
          ops: the backend's arithmetic.
        """
        loss = self._bound(tile)
        x, labels, keep = self._read(tile, valid)
        if self.is_soft(tile.labels.dtype):
            tile = _without_left_out(tile._replace(labels=labels), keep, ops)
            sides = self._mixed(loss, x, tile, ops)
            result = self._weighted(jax.tree.map(jnp.add, *sides), tile, keep)
            if not self.statistics:
                return result
            of_positives, of_negatives = (self._weighted(side, tile, keep) for side in sides)
            slopes_of_positives = jnp.abs(of_positives.gradient)
            slopes = slopes_of_positives + jnp.abs(of_negatives.gradient)
            return self._with_sums(result, Sums(None, of_positives.value, slopes, slopes_of_positives))
        label = self._label_of(labels, tile.negatives)._replace(dtype=x.dtype)
        result = self._of_loss(loss, x, label, ops)
        tile = _without_left_out(tile, keep, ops)
        if tile.pos_weight is not None:
            weight, positive = tile.pos_weight, loss.relabel(x, label, ops).positive
            result = jax.tree.map(lambda part: part * jnp.where(positive, weight.astype(part.dtype), 1.0), result)
        slope = result.gradient
        result = self._weighted(result, tile, keep)
        if not self.statistics:
            return result
        # Once a label is loaded again it is unpacked again.
        infers = ops.infer_label_from_slope and loss.slope_tells_label
        positive = slope < 0.0 if infers else label.positive
        of_positives = jax.tree.map(lambda part: jnp.where(positive, part, jnp.zeros_like(part)), result)
        size: Callable[[Array], Array] = (lambda slope: slope) if self.slopes_are_signed(tile) else jnp.abs
        sums = Sums(None, of_positives.value, size(result.gradient), size(of_positives.gradient))
        return self._with_sums(result, sums)

    def slopes_are_signed(self, operands: Operands) -> bool:
        """Whether `Sums` of slopes come with their signs, which tell the sides apart."""
        weighted = operands.weights is not None or operands.pos_weight is not None
        return self.loss.slope_tells_label and not weighted and not self.is_soft(operands.labels.dtype)

    def packs_counts(self, operands: Operands, most: int) -> bool:
        """Whether counts may come `PACKED`, where none of them gets beyond `most` until it is `unpacked`."""
        floats = jnp.issubdtype(operands.labels.dtype, jnp.floating)
        return self.statistics and self.loss.probability_margin is not None and not floats and most < PACKED

    def count(self, tile: Operands, valid: Array | None = None, ops: Ops = EXACT, packed: bool = False) -> Counts:
        """Each element's part of the counts, in the compute dtype; arguments as for `evaluate`.

        What a loss begins with is written as the losses do, so that a compiler finds it there again.
        """
        margin = self._bound(tile).probability_margin
        x, labels, keep = self._read(tile, valid)
        one, zero = jnp.ones_like(x), jnp.zeros_like(x)
        if jnp.issubdtype(labels.dtype, jnp.floating):
            y = _between_0_and_1(labels).astype(x.dtype)
            e = bounded_exp(x, ops)
            right = ops.reciprocal(1.0 + e)
            p = e * right
            counts = Counts(
                annotated=one,
                positives=y,
                dropped=None if margin is None else jnp.where(p <= margin, 1.0 - y, zero),
                wrong=y * right + (1.0 - y) * p,
                wrong_of_positives=y * right,
            )
        else:
            label = self._label_of(labels, tile.negatives)
            e = bounded_exp(ops.negate(jnp.asarray(label.positive), x), ops)
            wrong = e * ops.reciprocal(1.0 + e)
            dropped: Any = None
            if margin is not None:
                dropped = jnp.where(wrong <= margin, float(PACKED) if packed else one, zero)
            counts = Counts(
                annotated=one,
                positives=jnp.where(label.positive, one, dropped if packed else zero),
                dropped=None if dropped is None or packed else jnp.where(label.positive, zero, dropped),
                wrong=wrong,
                wrong_of_positives=jnp.where(label.positive, wrong, zero),
            )
            if label.unannotated is not False:
                annotated = jnp.logical_not(label.unannotated)
                keep = annotated if keep is None else jnp.logical_and(keep, annotated)
        if not self._leaves_out(tile):
            counts = counts._replace(annotated=None)
        return counts if keep is None else jax.tree.map(lambda part: jnp.where(keep, part, zero), counts)

    def _bound(self, tile: Operands) -> ElementwiseLoss:
        """The loss with the tile's hyper-parameters."""
        return self.loss.bind(() if tile.scalars is None else tuple(tile.scalars), tile.vectors)

    def _leaves_out(self, tile: Operands) -> bool:
        """Whether an element may be masked, or not be annotated."""
        ignores = self.ignore_label is not None and tile.labels.dtype != jnp.bool_
        third = tile.negatives is not None or (self.loss.third_state is not None and tile.labels.dtype != jnp.bool_)
        return tile.where is not None or ignores or third

    def _with_sums(self, result: Result, sums: Sums) -> Result:
        """The result as it is asked for."""
        return Result(result.value, result.gradient if self.gradient else None, sums)

    def cuts(self, tile: Operands, ops: Ops = EXACT) -> int:
        """How many places the loss has where a kernel may go over to another tile; of `tile` shapes are enough."""
        if self.is_soft(tile.labels.dtype):
            return 0  # both sides are evaluated, and each has its own
        passed: list[int] = []

        def count(number: int, values: tuple[Any, ...]) -> tuple[Any, ...]:
            passed.append(number)
            return values

        jax.eval_shape(lambda tile: self.evaluate(tile, None, _at_cuts(ops, count)), tile)
        return len(passed)

    def until_cut(self, cut: int, tile: Operands, valid: Array | None, ops: Ops) -> tuple[Any, ...]:
        """The values at the loss's cut of that number, counted from 1; nothing after it is computed."""

        def stop(number: int, values: tuple[Any, ...]) -> tuple[Any, ...]:
            if number == cut:
                raise _Stopped(values)
            return values

        try:
            self.evaluate(tile, valid, _at_cuts(ops, stop))
        except _Stopped as stopped:
            return stopped.values
        raise ValueError(f"{self.loss!r} has fewer than {cut} cuts, and more were counted")

    def from_cut(self, cut: int, values: tuple[Any, ...], tile: Operands, valid: Array | None, ops: Ops) -> Result:
        """`evaluate` with what `until_cut` has returned. What comes before is traced, and dropped by the compiler."""
        resume = _at_cuts(ops, lambda number, computed: tuple(values) if number == cut else computed)
        return self.evaluate(tile, valid, resume)

    def is_soft(self, labels: jnp.dtype) -> bool:
        """Whether an element may be both: each side is evaluated, and they are mixed."""
        may_be_both = jnp.issubdtype(labels, jnp.floating) or self.label_smoothing != 0
        return may_be_both and self.loss.mixes_soft_labels

    def needs_elements(self, operands: Operands) -> bool:
        """Whether each element's loss has to be right, and not just the sums over the classes."""
        if self.value != "rows":
            return self.value == "elements"
        weighted = operands.weights is not None or operands.pos_weight is not None
        return weighted or self.is_soft(operands.labels.dtype)

    def row_losses(self, sums: Array, ops: Ops) -> Array:
        """The losses per row from sums of elements that may not be `Ops.signed_per_element`."""
        if ops.signed_per_element:
            return sums
        sums = sums * self.loss.sign(self.gradient or self.statistics)
        if not self.loss.non_negative:
            return sums
        return jnp.where(sums <= 0.0, 0.0, sums)  # a NaN stays one, and a zero is no negative one

    def row_statistics(self, sums: Sums, ops: Ops, operands: Operands) -> Sums:
        """`Sums` of rows from those of elements, for the losses as `row_losses`."""
        slopes, of_positives = sums.slopes, sums.slopes_of_positives
        if self.slopes_are_signed(operands):
            slopes, of_positives = slopes - 2.0 * of_positives, 0.0 - of_positives
        losses = self.row_losses(sums.losses_of_positives, ops)
        return Sums(sums.counts, losses, slopes, of_positives)

    def _label_of(self, labels: Array, negatives: Array | None) -> Label:
        """Of hard labels, and of soft ones that aren't mixed."""
        if negatives is not None:
            positive = _is_positive(labels)
            return Label(positive, jnp.logical_not(jnp.logical_or(positive, _is_positive(negatives))))
        if jnp.issubdtype(labels.dtype, jnp.floating):
            return Label(labels > 0.0, target=_between_0_and_1(labels))
        third = self.loss.third_state
        if third is None or labels.dtype == jnp.bool_:
            return Label(_is_positive(labels))
        unannotated = labels == _like(labels, third)
        positive = _is_positive(labels)
        return Label(jnp.logical_and(positive, labels == 1) if third > 0 else positive, unannotated)

    def _of_loss(self, loss: ElementwiseLoss, x: Array, label: Label, ops: Ops) -> Result:
        if not (self.gradient or self.statistics):
            return Result(loss.value(x, label, ops), None)
        value, gradient = loss.value_and_slope(x, label, ops)
        return Result(None if self.value is None else value, gradient)

    def _mixed(self, loss: ElementwiseLoss, x: Array, tile: Operands, ops: Ops) -> tuple[Result, Result]:
        """Both sides, each weighted by the label: what they are added up from."""
        labels = tile.labels
        y = _is_positive(labels)
        if jnp.issubdtype(labels.dtype, jnp.floating):
            y = _between_0_and_1(labels)
        of_positive, of_negative = (
            self._of_loss(loss, x, Label(positive, dtype=x.dtype), ops) for positive in (True, False)
        )
        taken_for_positive = loss.relabel(x, Label(False), ops).positive

        y_plus = y.astype(x.dtype)
        if self.label_smoothing:
            y_plus = y_plus * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
        y_minus = 1.0 - y_plus
        weight = None if tile.pos_weight is None else tile.pos_weight.astype(x.dtype)

        # A side without a share is left out even where it, or its weight, is infinite.
        def yes(part: Array) -> Array:
            part = unless_infinite(y_plus, part)
            return y_plus * (part if weight is None else unless_infinite(y_plus, weight) * part)

        def no(part: Array) -> Array:
            part = unless_infinite(y_minus, part)
            if weight is not None and taken_for_positive is not False:
                part = jnp.where(taken_for_positive, unless_infinite(y_minus, weight), 1.0) * part
            return y_minus * part

        return jax.tree.map(yes, of_positive), jax.tree.map(no, of_negative)

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

    def _weighted(self, result: Result, tile: Operands, keep: Array | None) -> Result:
        value, gradient, _ = result
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


def _at_cuts(ops: Ops, do: Callable[[int, tuple[Any, ...]], tuple[Any, ...]]) -> Ops:
    """The same operations, with do(number, values) at each cut; they are counted from 1."""
    numbers = itertools.count(1)
    return dataclasses.replace(ops, cut=lambda *values: do(next(numbers), values))


class _Stopped(Exception):
    """Ends an evaluation at a cut."""

    def __init__(self, values: tuple[Any, ...]):
        super().__init__()
        self.values = values


def compute_dtype(logits_dtype: jnp.dtype) -> jnp.dtype:
    """float32, or float64 for float64 logits."""
    return jnp.dtype(jnp.float64 if logits_dtype == jnp.float64 else jnp.float32)


def _without_left_out(tile: Operands, keep: Array | None, ops: Ops) -> Operands:
    """Soft labels and weights with 0 where an element is left out, for JAX to differentiate with respect to them.

    A NaN among them would go into the derivative of their product, whatever is selected after it.
    """
    if keep is None or not ops.differentiable:
        return tile

    def kept(array: Any) -> Any:
        if array is None or not jnp.issubdtype(array.dtype, jnp.floating):
            return array
        return jnp.where(keep, array, jnp.zeros_like(array))

    return tile._replace(labels=kept(tile.labels), weights=kept(tile.weights), pos_weight=kept(tile.pos_weight))


def _between_0_and_1(labels: Array) -> Array:
    """Soft labels; NaN for what is none: a loss would give a number without meaning, below 0 too."""
    return jnp.where(jnp.logical_and(labels >= 0.0, labels <= 1.0), labels, jnp.nan)


def _is_positive(labels: Array) -> Array:
    return labels if labels.dtype == jnp.bool_ else labels > 0


def is_annotated(labels: Any, ignore_label: int) -> Any:
    """Which integer labels aren't the one to ignore, compared in their own dtype: of uint32 it may be beyond int32."""
    return labels != _like(labels, ignore_label)


def _like(labels: Any, number: int) -> Any:
    return np.asarray(number).astype(labels.dtype)[()]


def _comparable(x: Array) -> Array:
    """Integers of less than 32 bits widened: Mosaic compares no others on every chip."""
    narrow = jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 32
    return x.astype(jnp.int32) if narrow else x


def positives(form: Form, labels: Array, classes: int) -> Array:
    """The labels of whole rows as an operand of `Task.evaluate`, in any number of dimensions, for XLA to fuse."""
    if form == "dense":
        return labels
    return unpack(labels if form == "packed" else pack_ids(labels, classes), classes)
