"""The link of a loss: the probability that a logit of a trained model stands for, and the logit of a probability.

Of an example whose label is positive with probability pi, the expected loss pi L+(x) + (1 - pi) L-(x) is least where
pi L+'(x) + (1 - pi) L-'(x) = 0. So the derivatives alone tell what x stands for: L-' pulls it down, -L+' pulls it up,
and pi / (1 - pi) is their ratio. For cross-entropy, and for no other loss here, that is exp(x).
"""

from __future__ import annotations

import contextlib
import dataclasses
import decimal
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from asl_pallas.label_sources import is_traced, unwrap
from asl_pallas.losses.ops import EXACT, Label, Ops, is_static
from asl_pallas.losses.pieces import LIMIT

# Where the check of a setting looks, in steps of a tenth, and by how much a rounding may make a ratio fall there.
_FURTHEST = 40.0
_ROUNDING = 1e-9
# Settings that are checked at a time, where hyper-parameters are arrays.
_SETTINGS = 4096


def probability(loss: Any, logits: Any, pos_weight: Any, label_smoothing: float) -> Any:
    """`ElementwiseLoss.probability`."""
    return _apply(_probability, loss, "logits", logits, pos_weight, label_smoothing)


def logit(loss: Any, probabilities: Any, pos_weight: Any, label_smoothing: float) -> Any:
    """`ElementwiseLoss.logit`."""
    p = _real("probability", probabilities)
    if not is_traced(p):
        known = np.asarray(p)
        wrong = known[(known < 0) | (known > 1)]
        if wrong.size:
            raise ValueError(f"probability is {wrong.flat[0]}; expected 0 <= probability <= 1")
    return _apply(_logit, loss, "probability", p, pos_weight, label_smoothing)


def _apply(function: Any, loss: Any, name: str, x: Any, pos_weight: Any, label_smoothing: Any) -> Any:
    """In the logits' float32 or float64; for what NumPy and Python hold in float64, and back to NumPy."""
    x = _real(name, x)
    weight = None if pos_weight is None else _real("pos_weight", pos_weight)
    if weight is not None and not is_traced(weight) and not (np.isfinite(weight) & (np.asarray(weight) > 0)).all():
        raise ValueError(f"pos_weight={pos_weight!r}; expected numbers above 0 and finite")
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing={label_smoothing!r}; expected a Python number")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing!r}; expected 0 <= label_smoothing < 1")
    loss.check_bounds()
    _check_that_it_rises(loss)
    smoothing = float(label_smoothing)
    on_host = not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((x, weight, loss)))
    if on_host:
        with jax.ensure_compile_time_eval(), _float64_on_host():
            return np.asarray(function(*_in_dtype(jnp.float64, loss, x, weight), smoothing))
    dtype = jnp.float64 if jnp.asarray(x).dtype == jnp.float64 else jnp.float32
    return function(*_in_dtype(dtype, loss, x, weight), smoothing)


def _in_dtype(dtype: Any, *trees: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), trees)


@functools.partial(jax.jit, static_argnums=3)
def _probability(loss: Any, x: Array, pos_weight: Array | None, label_smoothing: float) -> Array:
    down, up = _pulls(loss, x, pos_weight)
    # Far out both may be too small for a number: the sign tells there.
    neither = down + up == 0.0
    down = jnp.where(neither, jnp.where(x > 0.0, 1.0, 0.0), down)
    up = jnp.where(neither, jnp.where(x > 0.0, 0.0, 1.0), up)
    p = _share(down, up)
    if label_smoothing:
        p = jnp.clip((p - 0.5 * label_smoothing) / (1.0 - label_smoothing), 0.0, 1.0)
    return p


@functools.partial(jax.jit, static_argnums=3)
def _logit(loss: Any, p: Array, pos_weight: Array | None, label_smoothing: float) -> Array:
    q = 1.0 - p
    if label_smoothing:
        p, q = (side * (1.0 - label_smoothing) + 0.5 * label_smoothing for side in (p, q))
    shape = jnp.broadcast_shapes(*(leaf.shape for leaf in jax.tree.leaves((loss, p, pos_weight))))
    p, q = jnp.broadcast_to(p, shape), jnp.broadcast_to(q, shape)
    extreme = jnp.logical_or(p <= 0.0, q <= 0.0)
    odds = _log(jnp.where(extreme, 1.0, p)) - _log(jnp.where(extreme, 1.0, q))

    def beyond(x: Array) -> Array:
        return _log_ratio(*_pulls(loss, x, pos_weight)) - odds

    def solve(beyond: Any, x: Array) -> Array:
        return _bisect(lambda x: _is_above(beyond(x), x), x)

    def solve_tangent(linear: Any, y: Array) -> Array:
        return _quotient(y, linear(jnp.ones_like(y)))

    x = lax.custom_root(beyond, jnp.zeros_like(p), solve, solve_tangent)
    # Beside a margin, and without a focus on the positives, the ratio has a largest value: more pulls up for ever.
    x = jnp.where(beyond(lax.stop_gradient(x)) >= 0.0, x, jnp.inf)
    x = jnp.where(extreme, jnp.where(p <= 0.0, -jnp.inf, jnp.inf), x)
    return jnp.where(jnp.isnan(p), p, x)


def _is_above(beyond: Array, x: Array) -> Array:
    """Whether the root is at or below x; by the sign where both pulls are too small for a ratio."""
    return jnp.where(jnp.isnan(beyond), x > 0.0, beyond >= 0.0)


def _bisect(is_above: Any, like: Array) -> Array:
    """The least number of which it holds, by halving all that there are: in as many steps as a number has bits."""
    bits = 8 * like.dtype.itemsize
    integer = jnp.dtype(f"int{bits}")
    most = np.asarray(np.finfo(like.dtype).max).view(integer)

    def number_of(order: Array) -> Array:
        """The number at that place among all of them, 0 at 0: the bits of a positive one count up, as it does."""
        size = lax.bitcast_convert_type(jnp.abs(order), like.dtype)
        return jnp.where(order < 0, 0.0 - size, size)

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        above = is_above(number_of(middle))
        return jnp.where(above, low, middle), jnp.where(above, middle, high)

    ends = jnp.full(like.shape, -most, integer), jnp.full(like.shape, most, integer)
    return number_of(lax.fori_loop(0, bits, halve, ends)[1])


def _pulls(loss: Any, x: Array, pos_weight: Array | None) -> tuple[Array, Array]:
    """L-'(x) and -L+'(x), each to a relative precision."""
    of_negative, of_positive = Label(False, dtype=x.dtype), Label(True, dtype=x.dtype)
    _, down = loss.value_and_slope(x, of_negative, _RELATIVE)
    _, up = loss.value_and_slope(x, of_positive, _RELATIVE_OF_POSITIVE)
    if pos_weight is not None:
        up = up * pos_weight
        taken_for_positive = loss.relabel(x, of_negative, _RELATIVE).positive
        if taken_for_positive is not False:
            down = jnp.where(taken_for_positive, pos_weight, 1.0) * down
    return down, 0.0 - up


def _excess(u: Array, p: Array, margin: Any) -> Array:
    """sigmoid(u) - margin, by how far u is from the margin's logit, of which a second number has what rounding took.

    With a margin that is an array the second number is missing: it is as exact as that logit is in one.
    """
    if is_static(margin) and margin == 0:
        return p
    if is_static(margin):
        edge, rest = _logit_in_two(float(margin), u.dtype.name)
        distance = lax.optimization_barrier(u - edge) - rest
    else:
        safe = jnp.where(margin > 0.0, margin, 0.5)
        distance = u - (jnp.log(safe) - jnp.log1p(-safe))
    growth = jnp.expm1(jnp.minimum(distance, LIMIT[u.dtype.itemsize]))
    excess = margin * (1.0 - margin) * growth / (1.0 + margin * growth)
    return jnp.where(jnp.logical_or(margin <= 0.0, p > 2.0 * margin), p - margin, excess)


@functools.lru_cache
def _logit_in_two(margin: float, dtype: str) -> tuple[float, float]:
    with decimal.localcontext() as context:
        context.prec = 60
        c = decimal.Decimal(margin)
        exact = c.ln() - (1 - c).ln()
        first = float(np.asarray(float(exact), dtype))
        return first, float(exact - decimal.Decimal(first))


_RELATIVE: Ops = dataclasses.replace(EXACT, is_relative=True, excess=_excess)
# A negative's exp(x) is bounded: of a positive, exp(-x) has to be too, or their ratio would go on where it ends.
_RELATIVE_OF_POSITIVE: Ops = dataclasses.replace(
    _RELATIVE, exp=lambda u: jnp.exp(jnp.maximum(u, -LIMIT[u.dtype.itemsize]))
)


@jax.custom_jvp
def _quotient(n: Array, d: Array) -> Array:
    return n / d


@_quotient.defjvp
def _quotient_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """In this order: autodiff's own has d^-2, which is infinite where the derivative isn't."""
    q = _quotient(*primals)
    return q, _quotient(tangents[0] - q * tangents[1], primals[1])


@jax.custom_jvp
def _log(x: Array) -> Array:
    return jnp.log(x)


@_log.defjvp
def _log_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return _log(*primals), _quotient(tangents[0], primals[0])


def _log_ratio(down: Array, up: Array) -> Array:
    return _log(down) - _log(up)


@jax.custom_jvp
def _share(down: Array, up: Array) -> Array:
    """down / (down + up)."""
    return down / (down + up)


@_share.defjvp
def _share_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    """q dp - p dq, where p + q = 1, without the difference that would lose q beside a p near 1."""
    down, up = primals
    p, q = _share(down, up), _share(up, down)
    of_down, of_up = (_quotient(tangent, down + up) for tangent in tangents)
    return p, q * of_down - p * of_up


def _check_that_it_rises(loss: Any) -> None:
    """Raises where the probability doesn't rise with the logit, as far as the hyper-parameters can be looked at."""
    leaves = jax.tree.leaves(loss)
    if any(is_traced(leaf) for leaf in leaves):
        return
    if not leaves:
        _check_numbers(loss, tuple(map(type, dataclasses.astuple(loss))))
        return
    arrays = np.broadcast_arrays(*(np.asarray(leaf, np.float64) for leaf in leaves))
    settings = np.unique(np.stack([array.ravel() for array in arrays], axis=1), axis=0)
    structure = jax.tree.structure(loss)
    for start in range(0, len(settings), _SETTINGS):
        part = settings[start : start + _SETTINGS]
        _check_grid(loss, jax.tree.unflatten(structure, list(part.T)), [part.shape[0]])


@functools.lru_cache(maxsize=256)
def _check_numbers(loss: Any, types: tuple[type, ...]) -> None:
    """Once for equal numbers; True equals 1, hence the types."""
    _check_grid(loss, loss, [1])


def _check_grid(loss: Any, numbers: Any, shape: list[int]) -> None:
    grid = np.arange(-10 * _FURTHEST, 10 * _FURTHEST + 1)[:, None] / 10 * np.ones(shape)
    with jax.ensure_compile_time_eval(), _float64_on_host():
        pulls = _grid_of_pulls(*_in_dtype(jnp.float64, numbers, grid))
        down, up = (np.asarray(pull) for pull in pulls)
    fault = _fault(down, up, grid)
    if fault:
        raise ValueError(
            f"{loss!r} has no link: the probability that its logits stand for {fault}; expected hyper-parameters for "
            "which it rises"
        )


@jax.jit
def _grid_of_pulls(loss: Any, x: Array) -> tuple[Array, Array]:
    return _pulls(loss, x, None)


def _fault(down: NDArray[Any], up: NDArray[Any], grid: NDArray[Any]) -> str | None:
    size = np.abs(down) + np.abs(up)
    for pull, what in ((down, "a negative's loss falls"), (up, "a positive's loss rises")):
        wrong = pull < -_ROUNDING * size
        if wrong.any():
            return f"is none at {grid[wrong][0]:g}, where {what}"
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = np.log(np.maximum(down, 0.0)) - np.log(np.maximum(up, 0.0))
        falls = odds[1:] < odds[:-1] - _ROUNDING * np.maximum(1.0, np.abs(odds[1:]))
    if not np.isfinite(odds).any(axis=0).all():
        return "is the same everywhere"
    return f"falls at {grid[:-1][falls][0]:g}" if falls.any() else None


def _real(name: str, x: Any) -> Any:
    """A real array, of JAX or of NumPy."""
    if not isinstance(x, jax.Array):
        try:
            x = np.asarray(unwrap(x))
        except ValueError as error:
            raise ValueError(f"{name}: expected an array, and this is none: {error}") from error
    if not (jnp.issubdtype(x.dtype, jnp.floating) or jnp.issubdtype(x.dtype, jnp.integer)):
        raise TypeError(f"{name} has dtype {x.dtype}; expected a float dtype")
    return x


@contextlib.contextmanager
def _float64_on_host() -> Iterator[None]:
    """Computes in float64 on the CPU, whatever JAX counts in and wherever else it computes."""
    with jax.enable_x64(True):
        try:
            cpu: Any = jax.local_devices(backend="cpu")[0]
        except RuntimeError:  # JAX_PLATFORMS names others alone
            cpu = None
        with jax.default_device(cpu):
            yield
