"""What a loss of the family is: an object that knows the loss of one element, and its hyper-parameters.

`value` is all that a loss has to define. It is plain ``jnp``, so the same lines run inside a TPU kernel, inside a GPU
kernel and under XLA. The losses that come with the package are one file each beside this one.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array, lax

# A hyper-parameter: a Python number compiles into specialised code; an array is an operand, so that one compilation
# serves a schedule or a value per class.
Hyperparameter = Any


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


@jax.custom_jvp
def _reciprocal(z: Array) -> Array:
    return 1.0 / z


@_reciprocal.defjvp
def _reciprocal_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """Of itself: autodiff's own has z^-2, which is infinite where the derivative isn't."""
    y = _reciprocal(*primals)
    return y, 0.0 - (y * tangents[0]) * y


@dataclasses.dataclass(frozen=True)
class Ops:
    """A backend's arithmetic. Every operation gives NaN for NaN; the logarithm alone need not.

    Attributes:
      exp: of numbers up to 80 in float32, and of any below: there it may be 0.
      log, reciprocal: of numbers between 1e-35 and 1e35.
      log1p: of numbers between -0.5 and 0.
      maximum, minimum: of an array and a bound. By selects: as one instruction max and min drop a NaN on a GPU, and
        jnp's, which keep it, are five instructions on a CPU.
      multiply_add: a * b + c, rounded once where there is one instruction for it.
      negate: an array, with the other sign where a condition, an array too, holds.
      stop_gradient: jax.lax.stop_gradient, or the identity where a backend has no such operation.
      cut: the identity on its arguments. A TPU kernel may store these in memory and begin another tile before it goes
        on with this one.
      signed_per_element: each element's loss has its sign and isn't below 0. A kernel that only needs sums can do
        without: it multiplies the sum by `ElementwiseLoss.sign`, and takes 0 for a sum that a rounding took below 0.
      share_power: loss and slope share the power m^(gamma - 1): fewer operations, and more values in registers.
      infer_label_from_slope: after the last cut, tell a positive by the slope's sign rather than reload its label.
      differentiable: JAX may differentiate what is computed, so what is masked has to be finite in every factor.
      reload_logit: the value's last part starts from the logit itself. XLA's CPU backend splits an expression that has
        too many uses for one part of it.
    """

    exp: Callable[[Array], Array] = jnp.exp
    log: Callable[[Array], Array] = jnp.log
    log1p: Callable[[Array], Array] = jnp.log1p
    reciprocal: Callable[[Array], Array] = _reciprocal
    maximum: Callable[[Array, Any], Array] = lambda x, bound: jnp.where(x < bound, bound, x)
    minimum: Callable[[Array, Any], Array] = lambda x, bound: jnp.where(x > bound, bound, x)
    multiply_add: Callable[[Any, Array, Array], Array] = lambda a, b, c: a * b + c
    negate: Callable[[Array, Array], Array] = lambda condition, x: (
        x * jnp.where(condition, jnp.asarray(-1.0, x.dtype), jnp.asarray(1.0, x.dtype))
    )
    stop_gradient: Callable[[Array], Array] = lax.stop_gradient
    cut: Callable[..., tuple[Any, ...]] = lambda *values: values
    signed_per_element: bool = True
    share_power: bool = False
    infer_label_from_slope: bool = False
    differentiable: bool = True
    reload_logit: bool = False


EXACT = Ops()


def with_derivatives(ops: Ops) -> Ops:
    """The same operations for JAX to differentiate: instructions of a chip have no derivative of their own."""

    def define(operation: Callable[..., Array], tangent: Callable[..., Array]) -> Callable[..., Array]:
        differentiable = jax.custom_jvp(operation)
        differentiable.defjvp(lambda primals, tangents: _jvp(operation, tangent, primals, tangents))
        return differentiable

    return dataclasses.replace(
        ops,
        exp=define(ops.exp, lambda y, x, t: y * t),
        log=define(ops.log, lambda y, x, t: t * ops.reciprocal(x)),
        log1p=define(ops.log1p, lambda y, x, t: t * ops.reciprocal(1.0 + x)),
        reciprocal=define(ops.reciprocal, lambda y, x, t: 0.0 - (y * y) * t),
        stop_gradient=define(lambda x: x, lambda y, x, t: jnp.zeros_like(t)),
        **{name: getattr(EXACT, name) for name in ("maximum", "minimum", "multiply_add", "negate")},
        cut=EXACT.cut,
        infer_label_from_slope=False,
        differentiable=True,
    )


def _jvp(operation: Any, tangent: Any, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = operation(*primals)
    return y, tangent(y, *primals, *tangents)


class Label(NamedTuple):
    """What elements are labelled: masks like the logits, or Python bools where only one state occurs.

    Attributes:
      positive: False for a negative and for what is not annotated.
      unannotated: of losses with three states.
      target: soft labels between 0 and 1, for losses that don't mix two sides; None for hard ones.
      dtype: of numbers that are selected: that of the logits that come with the label.
    """

    positive: Array | bool
    unannotated: Array | bool = False
    target: Array | None = None
    dtype: Any = jnp.float32

    def select(self, positive: Any, negative: Any, unannotated: Any = None) -> Any:
        """Element by element one of the values, which may be numbers; the negatives' for lack of a third."""
        value = select(self.positive, positive, negative, self.dtype)
        return value if unannotated is None else select(self.unannotated, unannotated, value, self.dtype)


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
      allows_approximate_math: the loss stays exact enough where exp and log err by 2^-22.
    """

    states: ClassVar[int] = 2
    mixes_soft_labels: ClassVar[bool] = True
    non_negative: ClassVar[bool] = False

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

    def sign(self, gradient: bool) -> float:
        """What a sum of values has to be multiplied by where they aren't `Ops.signed_per_element`.

        `gradient` tells those of `value_and_slope` from those of `value`.
        """
        return 1.0

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


# By the size of a float: what exp takes without leaving the normal numbers, nor its reciprocal.
# A probability beyond it counts as the one there, 2e-35 in float32.
LIMIT = {4: 80.0, 8: 700.0}
# Powers up to this one are chains of multiplications.
_LARGEST_CHAIN = 16


def bounded_exp(u: Array, ops: Ops) -> Array:
    """exp(u), and the largest whose reciprocal is a normal number for larger u."""
    return ops.exp(ops.minimum(u, LIMIT[u.dtype.itemsize]))


def power(m: Array, n: float) -> Array | float:
    """m^n for an integer n >= 0, by multiplications."""
    if n in (0, 1):
        return m if n else 1.0
    return lax.integer_pow(m, int(n))


def to_the(exponent: Hyperparameter, m: Array) -> Array | float:
    """m^exponent for m >= 0; 0^0 is 1."""
    if is_chain(exponent):
        return power(m, exponent)
    outside = is_nothing(m)
    of_nothing = 0.0 if is_static(exponent) else jnp.where(exponent == 0.0, 1.0, 0.0)
    return jnp.where(outside, of_nothing, jnp.exp(exponent * jnp.log(jnp.where(outside, 1.0, m))))


def constant_if(stopped: bool, factor: Any, ops: Ops) -> Any:
    """The factor, which counts as a constant in derivatives where `stopped`; as a number it does anyway."""
    return ops.stop_gradient(factor) if stopped and isinstance(factor, Array) else factor


def is_nothing(m: Array) -> Array:
    """Whether m >= 0 is below the normal numbers, 1e-38 in float32: a GPU divides by 0 there. A NaN isn't."""
    return m < float(jnp.finfo(m.dtype).tiny)


def derived_power(exponent: Hyperparameter, m: Array) -> Array | float:
    """The derivative of m^exponent in m; anything where m is 0.

    No quotient of the power by m: a compiler may round m, a difference, in two ways where it is used twice.
    """
    if is_chain(exponent):
        return exponent * power(m, exponent - 1) if exponent else 0.0
    return exponent * jnp.exp((exponent - 1.0) * jnp.log(jnp.where(is_nothing(m), 1.0, m)))


class WrongAnswer(NamedTuple):
    """The answer that the label doesn't give: present for a negative, absent for a positive.

    Attributes:
      logit: u, x for a negative and -x for a positive.
      p, one_minus_p: w = sigmoid(u) and 1 - w, each to its own relative precision.
      m: w less the margin, which positives have none of, and at least 0.
      over: 1 / (1 - m).
    """

    logit: Array
    p: Array
    one_minus_p: Array
    m: Array
    over: Array


def wrong_answer(logit: Array, label: Label, clip: Hyperparameter, ops: Ops) -> WrongAnswer:
    u = label.select(0.0 - logit, logit)
    e = bounded_exp(u, ops)
    right = ops.reciprocal(1.0 + e)
    wrong = e * right
    if not has_margin(clip):
        return WrongAnswer(u, wrong, right, wrong, 1.0 + e)
    margin = label.select(0.0, clip)
    return WrongAnswer(u, wrong, right, ops.maximum(wrong - margin, 0.0), ops.reciprocal(right + margin))


def has_margin(clip: Hyperparameter) -> bool:
    return not (is_static(clip) and clip == 0)


def is_focused(*exponents: Hyperparameter) -> bool:
    """Each side has a factor m^g with g >= 1, beside which an error of a rounding in log(1 - m) is negligible."""
    return all(is_static(exponent) and exponent >= 1 for exponent in exponents)


def unbounded(log: Array, u: Array, label: Label, clip: Hyperparameter, ops: Ops) -> Array:
    """-log(1 - m) also where exp(u) is at its limit: there it is u for what has no margin, and elsewhere it is more."""
    of_any = ops.maximum(log, u)
    if not has_margin(clip):
        return of_any
    if is_static(clip):
        return label.select(of_any, log)
    return jnp.where(label.select(0.0, clip) == 0.0, of_any, log)


def unless_infinite(weight: Array, x: Array, infinity: float = math.inf) -> Array:
    """x, and 0 where it is that infinity and its weight is 0: what has no weight counts for nothing."""
    return jnp.where(jnp.logical_and(weight == 0.0, x == infinity), 0.0, x)


def surprise(m: Array, over: Array, ops: Ops, focused: bool) -> Array:
    """-log(1 - m), where `over` is 1 / (1 - m): at most 80, or 700 in float64, where `bounded_exp` is at its limit.

    `focused` is `is_focused` of the exponents. Nothing else makes easy elements negligible, and thousands of small
    losses add up: they have to be exact.
    """
    if focused:
        return ops.maximum(ops.log(over), 0.0)
    return jnp.where(m < 0.5, -ops.log1p(-ops.minimum(m, 0.5)), jnp.log(over))


def is_static(number: Hyperparameter) -> bool:
    return isinstance(number, (int, float))


def is_chain(exponent: Hyperparameter) -> bool:
    """Whether `power` takes it."""
    return is_static(exponent) and float(exponent).is_integer() and exponent <= _LARGEST_CHAIN


def select(condition: Array | bool, yes: Any, no: Any, dtype: Any = None) -> Any:
    """jnp.where that leaves no trace where both sides agree or the condition is known; `dtype` types two constants."""
    if isinstance(condition, bool):
        return yes if condition else no
    if is_static(yes) and is_static(no):
        return yes if yes == no else jnp.where(condition, jnp.asarray(yes, dtype), jnp.asarray(no, dtype))
    return jnp.where(condition, yes, no)
