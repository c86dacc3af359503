"""What a loss of the family is: an object that knows the loss of one element, and its hyper-parameters.

`value` is all that a loss has to define. It is plain ``jnp``, so the same lines run inside a TPU kernel, inside a GPU
kernel and under XLA. The losses that come with the package are one file each beside this one.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from asl_pallas.label_sources import is_traced
from asl_pallas.losses import link
from asl_pallas.losses.ops import EXACT, Label, Ops, with_derivatives


class _Mark(enum.Enum):
    TRACED = enum.auto()
    PER_CLASS = enum.auto()


# The place of an array in a loss that has to be hashable: of a scalar, and of one value per class. `bind` fills it in.
TRACED: Any = _Mark.TRACED
PER_CLASS: Any = _Mark.PER_CLASS


class Bounds(NamedTuple):
    """Which numbers a hyper-parameter may be: finite ones from least to most, or to before most."""

    least: float = -math.inf
    most: float = math.inf
    includes_most: bool = True

    def __contains__(self, number: Any) -> bool:
        within = self.least <= number <= self.most and (self.includes_most or number < self.most)
        return within and math.isfinite(number)

    def check(self, name: str, value: Any) -> None:
        """Raises ValueError for a number, or one of an array's, outside."""
        outside = [number for number in np.ravel(np.asarray(value, np.float64)).tolist() if number not in self]
        if outside:
            found = f"={outside[0]}" if np.ndim(value) == 0 else f" has the value {outside[0]}"
            raise ValueError(f"{name}{found}; expected {self.sentence(name)}")

    def sentence(self, name: str) -> str:
        if math.isfinite(self.most):
            return f"{self.least:g} <= {name} {'<=' if self.includes_most else '<'} {self.most:g}"
        return f"{name} >= {self.least:g} and finite" if math.isfinite(self.least) else f"{name} to be finite"


def hyperparameter(
    default: Any, *, least: float = -math.inf, most: float = math.inf, includes_most: bool = True
) -> Any:
    """A dataclass field of a loss: a number within these bounds, or an array of such."""
    return dataclasses.field(default=default, metadata={_BOUNDS: Bounds(least, most, includes_most)})


_BOUNDS = "asl_pallas bounds"


@dataclasses.dataclass(frozen=True)
class ElementwiseLoss:
    """A loss whose value for an element depends on its logit, its label and the hyper-parameters alone.

    A subclass is a frozen dataclass whose fields are its hyper-parameters, and defines `value`. It is a pytree: fields
    that hold arrays are its leaves, and the others are part of its structure, so that an object passes through jax.jit,
    jax.lax.scan and jax.tree.map.

    Attributes:
      states: 2, positive and negative; 3, not annotated too: integer labels that are `unannotated_label`.
      mixes_soft_labels: the loss of a soft label y is y L+ + (1 - y) L-; otherwise `value` sees y as `Label.target`.
      non_negative: the loss is never below 0, so that a sum that rounding took below 0 counts as 0.
      slope_tells_label: no positive has a slope above 0 and no negative one below, and where it is 0 the loss is too.
      allows_approximate_math: the loss stays exact enough where exp and log err by 2^-22.
    """

    states: ClassVar[int] = 2
    mixes_soft_labels: ClassVar[bool] = True
    non_negative: ClassVar[bool] = False
    slope_tells_label: ClassVar[bool] = False

    @property
    def third_state(self) -> int | None:
        """The integer label of what is not annotated, of a loss with three states."""
        return int(getattr(self, "unannotated_label", -1)) if self.states == 3 else None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, lambda *parts: _unflatten(cls, *parts))

    @property
    def allows_approximate_math(self) -> bool:
        return False

    def value(self, logit: Array, label: Label, ops: Ops = EXACT) -> Array:
        """The loss of each element, of the logit's shape and dtype."""
        raise NotImplementedError(f"{type(self).__name__} defines no value")

    def value_and_slope(self, logit: Array, label: Label, ops: Ops = EXACT) -> tuple[Array, Array]:
        """The loss of each element and its derivative with respect to the logit; by autodiff unless overridden."""
        differentiable = with_derivatives(ops)
        value, pull_back = jax.vjp(lambda x: self.value(x, label, differentiable), logit)
        return value, pull_back(jnp.ones_like(value))[0]

    def relabel(self, logit: Array, label: Label, ops: Ops = EXACT) -> Label:
        """What the loss takes elements for: pos_weight multiplies those that it takes for positives."""
        return label

    @property
    def probability_margin(self) -> Any:
        """The probability up to which a negative has neither loss nor slope; None where there is none such."""
        return None

    def sign(self, gradient: bool) -> float:
        """What a sum of values has to be multiplied by where they aren't `Ops.signed_per_element`.

        `gradient` tells those of `value_and_slope` from those of `value`.
        """
        return 1.0

    def probability(
        self, logits: ArrayLike, *, pos_weight: ArrayLike | None = None, label_smoothing: float = 0.0
    ) -> Any:
        """The probability that a logit of a model stands for that was trained with this loss, its link:

            pi(x) = L-'(x) / (L-'(x) - pos_weight * L+'(x))

        At x the expected loss of an example is least whose label is positive with probability pi(x). It is the sigmoid
        for cross-entropy alone; a loss with a margin has pi = 0 up to it. Of three states it is the probability of a
        positive among what is annotated.

        Args:
          logits: any shape. Of JAX, traced or not: in float32, or in float64 for float64. Of NumPy or Python: in
            float64, on the CPU.
          pos_weight: above 0, broadcastable to the logits; label_smoothing: in [0, 1). As the loss was given them.
            Arrays among the hyper-parameters broadcast too, (classes,) against (..., classes).

        Returns:
          Probabilities of the logits' shape, of NumPy where they are. The error is relative, 1e-5 in float32 and 1e-12
          in float64 down to pi = 1e-30; close to a margin that is an array, it is as large as the rounding of that
          margin's logit.

        Raises:
          ValueError, TypeError: logits that are no real numbers; a pos_weight, label_smoothing or hyper-parameter out
            of range; a loss whose probability doesn't rise with its logit, for hyper-parameters that aren't traced.
        """
        return link.probability(self, logits, pos_weight, label_smoothing)

    def logit(
        self, probability: ArrayLike, *, pos_weight: ArrayLike | None = None, label_smoothing: float = 0.0
    ) -> Any:
        """The logit that stands for a probability, the inverse of `probability`.

        It is what a model that knows no more than that probability is best to answer, and so where a head's bias
        starts best. By bisection of all floating-point numbers, so that it always converges; it has derivatives.

        Args:
          probability: in [0, 1], any shape, as the logits of `probability`. 0 gives -inf, and 1 gives inf, as does one
            that is above those of all logits: `AsymmetricLoss(7, 0, 0.05)` has none above 0.967.
          pos_weight, label_smoothing: as in `probability`.

        Raises:
          ValueError, TypeError: a probability outside of [0, 1], where it can be looked at; and as `probability`.
        """
        return link.logit(self, probability, pos_weight, label_smoothing)

    def check_bounds(self) -> None:
        """Raises ValueError for a hyper-parameter out of its bounds, where it can be looked at."""
        for name, value, bounds in hyperparameters(self):
            if not is_traced(value):
                bounds.check(name, value)

    def replaced(self, changes: dict[str, Any]) -> Self:
        """dataclasses.replace, also for what no __init__ would take."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _build(type(self), values | changes)

    def traced(self) -> tuple[str, ...]:
        """Names of the hyper-parameters that `bind` has to fill in, in its order."""
        return tuple(name for mark in (TRACED, PER_CLASS) for name in self._marked(mark))

    def bind(self, scalars: tuple[Any, ...], vectors: tuple[Any, ...] = ()) -> Self:
        """The loss with these numbers for its `TRACED` hyper-parameters, and these arrays for those `PER_CLASS`."""
        filled = dict(zip(self._marked(TRACED), scalars, strict=True))
        filled.update(zip(self._marked(PER_CLASS), vectors, strict=True))
        return self.replaced(filled) if filled else self

    def _marked(self, mark: Any) -> list[str]:
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) is mark]


def hyperparameters(loss: ElementwiseLoss) -> list[tuple[str, Any, Bounds]]:
    """Name, value and bounds of each: the fields made by `hyperparameter`, and others that hold numbers or arrays."""
    found = []
    for field in dataclasses.fields(loss):
        value = getattr(loss, field.name)
        declared = _BOUNDS in field.metadata and not (value is None and field.default is None)
        if declared or _is_leaf(value) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            found.append((field.name, value, field.metadata.get(_BOUNDS, Bounds())))
    return found


def _is_leaf(value: Any) -> bool:
    return not (value is None or isinstance(value, (bool, int, float, str, enum.Enum)))


def _flatten_with_keys(loss: ElementwiseLoss) -> tuple[list[tuple[Any, Any]], Any]:
    fields = [(field.name, getattr(loss, field.name)) for field in dataclasses.fields(loss)]
    leaves = [(jax.tree_util.GetAttrKey(name), value) for name, value in fields if _is_leaf(value)]
    return leaves, tuple((name, TRACED if _is_leaf(value) else value) for name, value in fields)


def _unflatten(cls: type[ElementwiseLoss], structure: Any, leaves: Any) -> ElementwiseLoss:
    left = iter(leaves)
    return _build(cls, {name: next(left) if value is TRACED else value for name, value in structure})


def _build(cls: type[Any], values: dict[str, Any]) -> Any:
    """Without __init__: JAX puts other things than numbers in the place of leaves."""
    loss = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(loss, name, value)
    return loss
