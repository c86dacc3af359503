"""The asymmetric loss of one element: its value, its derivative, and both at once.

This file holds all of the mathematics and nothing else. It is plain ``jnp``, so the same lines run inside a TPU kernel,
inside a GPU kernel and under XLA. A formula is any object with the methods of `Formula`; another loss of the family is
another small class here and no line in a kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

# A hyper-parameter: a Python number compiles into specialised code, a traced scalar serves a whole schedule with one
# compilation, and `TRACED` marks the place of the latter in a formula that has to be hashable.
Scalar = Any
TRACED = None

# By the size of a float: what exp takes without leaving the normal numbers, nor its reciprocal.
# A probability beyond it counts as the one there, 2e-35 in float32.
_LIMIT = {4: 80.0, 8: 700.0}
# Powers up to this one are chains of multiplications.
_LARGEST_CHAIN = 16


@jax.custom_jvp
def _quotient(n: Array, d: Array) -> Array:
    return n / d


@_quotient.defjvp
def _quotient_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    """In this order: autodiff's own has d^-2, which is infinite where the derivative isn't."""
    d = primals[1]
    q = _quotient(*primals)
    return q, _quotient(tangents[0] - q * tangents[1], d)


def _reciprocal(z: Array) -> Array:
    return _quotient(jnp.ones_like(z), z)


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What chips do at different costs. A kernel passes its own; a NaN has to come through as one.

    Attributes:
      exp: of numbers up to 80 in float32, and of any below: there it may be 0.
      log, reciprocal: of numbers between 1e-35 and 1e35. The logarithm alone need not keep a NaN.
      log1p: of numbers between -0.5 and 0.
      quotient: of any numbers, to half a unit in the last place or nearly.
      at_least, at_most: the larger, or smaller, of an array and a bound. By selects: as one instruction max and min
        drop a NaN on a GPU, and jnp's, which keep it, are five on a CPU.
      multiply_add: a * b + c, rounded once where there is one instruction for it.
      negate: an array, with the other sign where a condition, an array too, holds.
      constant: what has no derivative.
      by_element: losses have their sign and are never below 0. A kernel that adds them up can do without: it multiplies
        the sum by `Formula.sign`, and takes 0 for what a rounding took below.
      factors: loss and slope share m^(gamma - 1). That is fewer operations, and more numbers at a time.
      labels_by_results: the last step tells a positive by what it is handed, not from its label.
      differentiable: JAX may differentiate what is computed, so what is left out has to be finite in every factor.
      from_the_logit: the value's last step takes the logit itself again, not what was made of it for the first. XLA's
        CPU backend splits an expression that has too many uses for one part of it.
    """

    exp: Callable[[Array], Array] = jnp.exp
    log: Callable[[Array], Array] = jnp.log
    log1p: Callable[[Array], Array] = jnp.log1p
    reciprocal: Callable[[Array], Array] = _reciprocal
    quotient: Callable[[Array, Array], Array] = _quotient
    at_least: Callable[[Array, Any], Array] = lambda x, bound: jnp.where(x < bound, bound, x)
    at_most: Callable[[Array, Any], Array] = lambda x, bound: jnp.where(x > bound, bound, x)
    multiply_add: Callable[[Any, Array, Array], Array] = lambda a, b, c: a * b + c
    negate: Callable[[Array, Array], Array] = lambda condition, x: x * _sign(condition, x.dtype)
    constant: Callable[[Array], Array] = lax.stop_gradient
    by_element: bool = True
    factors: bool = False
    labels_by_results: bool = False
    differentiable: bool = True
    from_the_logit: bool = False


EXACT = Arithmetic()


# A part of a formula's evaluation: of what the step before it returned (the first: of nothing), the logit, `positive`
# and the chip. The last returns the value, or value and gradient.
Step = Callable[[Any, Array, "Array | bool", Arithmetic], tuple[Array, ...]]


class Formula(Protocol):
    """What a kernel asks of a loss. `positive` is a bool array like `logit`, or a Python bool for one side only.

    Between two steps a kernel may put arrays aside, and begin other elements before it goes on with these. `sign` is
    what the last one's values have to be multiplied by, for a chip that wants no losses by element. A formula that is
    `tolerant` stays exact enough where exp and log err by 2^-22. Of one that is `non_negative`, what a rounding takes
    below 0 in a sum of losses counts as 0; one that doesn't say so may be negative.
    """

    @property
    def tolerant(self) -> bool: ...

    def steps(self, gradient: bool) -> tuple[Step, ...]: ...

    def sign(self, gradient: bool) -> float: ...

    def traced(self) -> tuple[str, ...]: ...

    def bind(self, scalars: tuple[Scalar, ...]) -> Formula: ...


def evaluate(
    formula: Formula, logit: Array, positive: Array | bool, chip: Arithmetic, gradient: bool
) -> tuple[Array, ...]:
    """All steps at once: the value, or value and gradient."""
    known: tuple[Array, ...] = ()
    for step in formula.steps(gradient):
        known = step(known, logit, positive, chip)
    return known


@dataclasses.dataclass(frozen=True)
class AsymmetricLoss:
    r"""The asymmetric loss (ASL) of a logit x with a hard label, and its derivative with respect to x.

    With p = sigmoid(x) and p_m = max(p - clip, 0), equations (4) to (7) of arXiv 2009.14119:

        positive:  L+ = (1 - p)^gamma_pos * -log(p)
        negative:  L- = p_m^gamma_neg * -log(1 - p_m)

    Both sides are one expression in u, the logit of the *wrong* answer (-x for a positive, x for a negative), with the
    margin c (0 for a positive, clip for a negative):

        w = sigmoid(u),  m = max(w - c, 0),  L = m^g * -log(1 - m)
        dL/du = w * (1 - w) * [m^g / (1 - m) + g * m^(g - 1) * -log(1 - m)],  0 where w <= c

    w and 1 - w come from one exponential, each to its own relative precision. Nothing is cut off: a positive at
    x = -1e4 has the loss 1e4 and the slope -1. Loss and slope are finite wherever the mathematics is, for infinite
    logits too, and NaN for a NaN. The slope's own derivative, by autodiff, is right.

    Attributes:
      gamma_neg, gamma_pos: focusing exponents, >= 0.
      clip: probability margin in [0, 1).
      stop_focus_gradient: the focusing factor m^g counts as a constant in the derivative.
    """

    gamma_neg: Scalar = 4.0
    gamma_pos: Scalar = 1.0
    clip: Scalar = 0.05
    stop_focus_gradient: bool = False

    @property
    def non_negative(self) -> bool:
        return True

    def value(self, logit: Array, positive: Array | bool, chip: Arithmetic = EXACT) -> Array:
        return evaluate(self, logit, positive, chip, gradient=False)[0]

    def gradient(self, logit: Array, positive: Array | bool, chip: Arithmetic = EXACT) -> Array:
        return evaluate(self, logit, positive, chip, gradient=True)[1]

    def value_and_gradient(self, logit: Array, positive: Array | bool, chip: Arithmetic = EXACT) -> tuple[Array, ...]:
        return evaluate(self, logit, positive, chip, gradient=True)

    def traced(self) -> tuple[str, ...]:
        """Names of the hyper-parameters that `bind` has to fill in, in its order."""
        return tuple(n for n in ("gamma_neg", "gamma_pos", "clip") if getattr(self, n) is TRACED)

    def bind(self, scalars: tuple[Scalar, ...]) -> AsymmetricLoss:
        return dataclasses.replace(self, **dict(zip(self.traced(), scalars, strict=True)))

    def steps(self, gradient: bool) -> tuple[Step, ...]:
        if gradient:
            return self._exponential, self._probabilities, self._remainder, self._value_and_slope
        return self._exponential_of_right, self._probability, self._value

    def sign(self, gradient: bool) -> float:
        return 1.0 if gradient else -1.0

    # Value and slope, from the wrong answer's logit.

    def _exponential(self, _: tuple[()], logit: Array, positive: Array | bool, chip: Arithmetic) -> tuple[Array, Array]:
        # Far below, exp(u) may be 0: the wrong answer has no probability then, and nothing is divided by it.
        u = _signed(positive, logit, chip)
        return u, _bounded_exp(u, chip)

    def _probabilities(
        self, known: tuple[Array, Array], logit: Array, positive: Array | bool, chip: Arithmetic
    ) -> tuple[Array, Array, Array, Array]:
        """Of u and exp(u): the slope du/dx dw/du, whose sign is the label's, 1 - m, u and m."""
        u, e = known
        right = chip.reciprocal(1.0 + e)
        wrong = e * right
        m, rest = self._less_margin(wrong, right, self._margin(positive, logit.dtype), chip)
        if rest is right:
            rest = 1.0 + e  # its reciprocal, since that is here
        return _signed(positive, right * wrong, chip), rest, u, m

    def _remainder(
        self, known: tuple[Array, Array, Array, Array], logit: Array, positive: Array | bool, chip: Arithmetic
    ) -> tuple[Array, Array, Array, Array]:
        """1 / (1 - m), the one factor that only the last step asks for."""
        slope, rest, u, m = known
        return slope, m, rest if self._margin(positive, m.dtype) is None else chip.reciprocal(rest), u

    def _value_and_slope(
        self, known: tuple[Array, Array, Array, Array], logit: Array, positive: Array | bool, chip: Arithmetic
    ) -> tuple[Array, Array]:
        slope, m, over, u = known
        if chip.labels_by_results and not isinstance(positive, bool):
            positive = slope < 0.0
        log = self._log(over, m, 1.0, chip)
        if chip.by_element or not self._is_steep:
            log = chip.at_least(log, 0.0)
        # Where exp(u) is at its limit, a positive's logarithm is u, and elsewhere it is more.
        loss = self._where_unbounded(positive, chip.at_least(log, u), log)
        if self.stop_focus_gradient:
            focus = self._power(m, positive)
            focus = chip.constant(focus) if isinstance(focus, Array) else focus
            return focus * loss, slope * (focus * over)
        if chip.factors and self.tolerant:
            of_positive, of_negative = _sides(positive, self.gamma_pos, self.gamma_neg)
            power = _select(positive, _power(m, of_positive - 1), _power(m, of_negative - 1), m.dtype)
            gamma = _select(positive, of_positive, of_negative, m.dtype)
            return (power * m) * loss, (slope * power) * chip.multiply_add(gamma, log, m * over)
        focus = self._power(m, positive)
        return focus * loss, slope * chip.multiply_add(self._power_derived(m, positive, chip), log, focus * over)

    # The value alone, from the right answer's logit: log(1 - m) has no reciprocal to wait for.

    def _exponential_of_right(
        self, _: tuple[()], logit: Array, positive: Array | bool, chip: Arithmetic
    ) -> tuple[Array, Array]:
        v = logit * _select(positive, 1.0, -1.0, logit.dtype)
        return v, _bounded_exp(chip.at_least(v, -_LIMIT[v.dtype.itemsize]), chip)

    def _probability(
        self, known: tuple[Array, Array], logit: Array, positive: Array | bool, chip: Arithmetic
    ) -> tuple[Array, ...]:
        """Of v and exp(v): 1 - m, the margin where there is one, m and v."""
        v, e = known
        wrong = chip.reciprocal(1.0 + e)
        margin = self._margin(positive, logit.dtype)
        m, rest = self._less_margin(wrong, e * wrong, margin, chip)
        return (rest, m, v) if margin is None else (rest, margin, m, v)

    def _value(self, known: tuple[Array, ...], logit: Array, positive: Array | bool, chip: Arithmetic) -> tuple[Array]:
        rest, *margin, m, v = known
        if margin and chip.labels_by_results and _is_static(self.clip) and not isinstance(positive, bool):
            positive = margin[0] == 0.0
        log = self._log(rest, m, -1.0, chip)
        # Where exp(v) is at its limit, a positive's logarithm is v, and elsewhere it is less; anyone's is at most 0.
        if chip.from_the_logit:
            v = _select(positive, logit, -logit)
        loss = chip.at_most(log, self._where_unbounded(positive, v, 0.0))
        if chip.by_element and not (self._has_margin and _is_static(self.clip)):
            loss = chip.at_most(loss, 0.0)
        value = loss * self._power(m, positive)
        return (0.0 - value if chip.by_element else value,)

    # What both have in common.

    def _margin(self, positive: Array | bool, dtype: Any) -> Any:
        """c, or None where it is 0 everywhere."""
        return None if not self._has_margin or positive is True else _select(positive, 0.0, self.clip, dtype)

    def _less_margin(self, wrong: Array, right: Array, margin: Any, chip: Arithmetic) -> tuple[Array, Array]:
        """m, and 1 - m as (1 - w) + c, without cancellation. Rounding can take it past 1."""
        if margin is None:
            return wrong, right
        return chip.at_least(wrong - margin, 0.0), right + margin

    def _log(self, z: Array, m: Array, sign: float, chip: Arithmetic) -> Array:
        """log(z), where z is 1 / (1 - m), or 1 - m for a sign of -1."""
        if self._is_focused:
            return chip.log(z)
        # Nothing else makes easy elements negligible, and thousands of small losses add up: they have to be exact.
        return jnp.where(m < 0.5, -sign * chip.log1p(-chip.at_most(m, 0.5)), jnp.log(z))

    def _where_unbounded(self, positive: Array | bool, yes: Array, no: Any) -> Array:
        """Without a margin -log(1 - m) grows with u for ever: on both sides, or on the positives' alone."""
        if not self._has_margin:
            return yes
        if _is_static(self.clip):
            return _select(positive, yes, no)
        return jnp.where(_select(positive, 0.0, self.clip, yes.dtype) == 0.0, yes, no)

    @property
    def _has_margin(self) -> bool:
        return not (_is_static(self.clip) and self.clip == 0)

    @property
    def _is_focused(self) -> bool:
        """Both sides have a factor m^g with g >= 1, beside which an error of a rounding in log(1 - m) is negligible."""
        return all(_is_static(g) and g >= 1 for g in (self.gamma_neg, self.gamma_pos))

    @property
    def tolerant(self) -> bool:
        """Powers are products, and no logarithm of a small loss is taken but beside a factor that is smaller still."""
        return self._is_focused and all(map(_is_chain, (self.gamma_neg, self.gamma_pos)))

    @property
    def _is_steep(self) -> bool:
        """Where m is 0, so is a negative's m^(g - 1): a logarithm below 0 by a rounding does nothing there."""
        return self._is_focused and self.gamma_neg >= 2

    def _power(self, m: Array, positive: Array | bool) -> Array | float:
        """m^gamma of the element's own side, 0 below the margin."""
        sides = _sides(positive, self.gamma_pos, self.gamma_neg)
        if not all(map(_is_chain, sides)):
            return self._any_power(m, positive)[0]

        def power(gamma: float) -> Array | float:
            if gamma == 0 and self._has_margin:
                return jnp.where(m > 0.0, 1.0, m)  # a NaN stays one
            return _power(m, gamma)

        of_positive, of_negative = map(power, sides)
        return _select(positive, of_positive, of_negative, m.dtype)

    def _power_derived(self, m: Array, positive: Array | bool, chip: Arithmetic) -> Array | float:
        """gamma * m^(gamma - 1)."""
        sides = _sides(positive, self.gamma_pos, self.gamma_neg)
        if not all(map(_is_chain, sides)):
            power, base, gamma = self._any_power(m, positive)
            return gamma * chip.quotient(power, base)
        of_positive, of_negative = (gamma * _power(m, gamma - 1) if gamma else 0.0 for gamma in sides)
        return _select(positive, of_positive, of_negative, m.dtype)

    def _any_power(self, m: Array, positive: Array | bool) -> tuple[Array, Array, Array | float]:
        """m^gamma, m or a 1 where it is 0, and gamma."""
        gamma = _select(positive, self.gamma_pos, self.gamma_neg, m.dtype)
        outside = m <= 0.0  # which a NaN is not
        base = jnp.where(outside, 1.0, m)
        return jnp.where(outside, 0.0, jnp.exp(gamma * jnp.log(base))), base, gamma


def _sign(positive: Array | bool, dtype: Any) -> Array | float:
    return _select(positive, -1.0, 1.0, dtype)


def _signed(positive: Array | bool, x: Array, chip: Arithmetic) -> Array:
    """With the sign of the derivative, which is that of the wrong answer's logit too."""
    return x * _sign(positive, x.dtype) if isinstance(positive, bool) else chip.negate(positive, x)


def _bounded_exp(u: Array, chip: Arithmetic) -> Array:
    return chip.exp(chip.at_most(u, _LIMIT[u.dtype.itemsize]))


def _power(m: Array, n: float) -> Array | float:
    if n in (0, 1):
        return m if n else 1.0
    return lax.integer_pow(m, int(n))


def _is_static(number: Scalar) -> bool:
    return isinstance(number, (int, float))


def _is_chain(gamma: Scalar) -> bool:
    return _is_static(gamma) and float(gamma).is_integer() and gamma <= _LARGEST_CHAIN


def _sides(positive: Array | bool, of_positive: Scalar, of_negative: Scalar) -> tuple[Scalar, ...]:
    """Both sides' numbers; twice the same where only one side can occur."""
    if isinstance(positive, bool):
        return (of_positive,) * 2 if positive else (of_negative,) * 2
    return of_positive, of_negative


def _select(condition: Array | bool, yes: Any, no: Any, dtype: Any = None) -> Any:
    """jnp.where that leaves no trace where both sides agree or the condition is known; `dtype` types two constants."""
    if isinstance(condition, bool):
        return yes if condition else no
    if _is_static(yes) and _is_static(no):
        return yes if yes == no else jnp.where(condition, jnp.asarray(yes, dtype), jnp.asarray(no, dtype))
    return jnp.where(condition, yes, no)
