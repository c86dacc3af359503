"""What a loss is written with: a backend's arithmetic, and what an element is labelled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

# A hyper-parameter: a Python number compiles into specialised code; an array is an operand, so that one compilation
# serves a schedule or a value per class.
Hyperparameter = Any


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
      excess: (u, sigmoid(u), margin) -> sigmoid(u) - margin.
      stop_gradient: jax.lax.stop_gradient, or the identity where a backend has no such operation.
      cut: the identity on its arguments. A TPU kernel may store these in memory and begin another tile before it goes
        on with this one.
      signed_per_element: each element's loss has its sign and isn't below 0. A kernel that only needs sums can do
        without: it multiplies the sum by `ElementwiseLoss.sign`, and takes 0 for a sum that a rounding took below 0.
      share_power: loss and slope share the power m^(gamma - 1): fewer operations, and more values in registers.
      infer_label_from_slope: after the last cut, tell a positive by the slope's sign rather than reload its label.
      is_relative: slopes have a relative precision, however small they are; they cost more so.
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
    excess: Callable[[Array, Array, Any], Array] = lambda u, p, margin: p - margin
    stop_gradient: Callable[[Array], Array] = lax.stop_gradient
    cut: Callable[..., tuple[Any, ...]] = lambda *values: values
    signed_per_element: bool = True
    share_power: bool = False
    infer_label_from_slope: bool = False
    is_relative: bool = False
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


def is_static(number: Hyperparameter) -> bool:
    return isinstance(number, (int, float))


def select(condition: Array | bool, yes: Any, no: Any, dtype: Any = None) -> Any:
    """jnp.where that leaves no trace where both sides agree or the condition is known; `dtype` types two constants."""
    if isinstance(condition, bool):
        return yes if condition else no
    if is_static(yes) and is_static(no):
        return yes if yes == no else jnp.where(condition, jnp.asarray(yes, dtype), jnp.asarray(no, dtype))
    return jnp.where(condition, yes, no)
