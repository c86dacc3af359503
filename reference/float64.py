"""The asymmetric loss in NumPy float64: the value and the analytic gradient, element by element.

With ``p = sigmoid(x)`` and ``p_m = max(p - clip, 0)`` (Ridnik, Ben-Baruch et al., "Asymmetric Loss For
Multi-Label Classification", ICCV 2021, arXiv 2009.14119, equations 4 to 7, sign turned so that it is
minimised)::

    L+ = (1 - p)^gamma_pos * -log(p)
    L- = p_m^gamma_neg     * -log(1 - p_m)
    L  = weights * (pos_weight * y * L+ + (1 - y) * L-)

Both sides are computed from logarithms of ``p`` and ``1 - p`` that keep their relative precision for any
finite logit, and the limits at infinite logits are written out. Inputs of any float dtype are widened
exactly first, so a comparison in bfloat16 is a comparison on the rounded inputs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Axis = int | tuple[int, ...] | None
Array = npt.NDArray[np.float64]


@np.errstate(invalid="ignore", divide="ignore", over="ignore", under="ignore")
def asymmetric_loss(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    axis: Axis = -1,
    where: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
    pos_weight: npt.ArrayLike | None = None,
    ignore_label: int | None = None,
    label_smoothing: float = 0.0,
    stop_focus_gradient: bool = False,
) -> Array:
    """The loss, summed over ``axis`` as in ``np.sum`` (``()`` keeps the elements).

    Args:
      logits: (..., classes), any float dtype; infinite logits give the limit of the formula, NaN gives NaN.
      labels: the same shape: bool, 0 and 1, or targets in [0, 1].
      gamma_neg, gamma_pos: focusing exponents of the two sides, at least 0.
      clip: probability margin of the negatives, in [0, 1).
      axis: what to sum over.
      where: broadcastable to logits; False takes an element out: exactly 0, whatever its logit.
      weights: broadcastable to logits; multiplies the element's loss.
      pos_weight: broadcastable to logits; multiplies L+.
      ignore_label: a label that takes its element out as where=False does.
      label_smoothing: s in [0, 1): labels become y (1 - s) + s / 2.
      stop_focus_gradient: changes the gradient only; see `gradient`.

    Returns:
      float64, the shape of np.sum(logits, axis).
    """
    del stop_focus_gradient
    x, y, kept = _prepare(logits, labels, where, ignore_label, label_smoothing)
    value = _mix(y, _positive(x, gamma_pos), _negative(x, gamma_neg, clip), pos_weight)
    return np.asarray(np.sum(_finish(value, kept, weights), axis=axis))


@np.errstate(invalid="ignore", divide="ignore", over="ignore", under="ignore")
def gradient(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    cotangent: npt.ArrayLike = 1.0,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    axis: Axis = -1,
    where: npt.ArrayLike | None = None,
    weights: npt.ArrayLike | None = None,
    pos_weight: npt.ArrayLike | None = None,
    ignore_label: int | None = None,
    label_smoothing: float = 0.0,
    stop_focus_gradient: bool = False,
) -> Array:
    """The gradient of ``sum(cotangent * loss)`` with respect to the logits.

    ::

        dL+/dx = (1 - p)^gamma_pos (gamma_pos p log p - (1 - p))
        dL-/dx = p_m^gamma_neg (1 / (1 - p_m) - gamma_neg log(1 - p_m) / p_m) p (1 - p), 0 for p <= clip

    Args:
      logits, labels and the keywords: as in `asymmetric_loss`.
      cotangent: broadcastable to the shape of the loss under the same ``axis``.
      stop_focus_gradient: the powers (1 - p)^gamma_pos and p_m^gamma_neg count as constants, so the
        terms that carry a factor gamma are left out (the official ``disable_torch_grad_focal_loss``).

    Returns:
      float64, the shape of the logits.
    """
    x, y, kept = _prepare(logits, labels, where, ignore_label, label_smoothing)
    slope = _mix(
        y,
        _positive_slope(x, gamma_pos, stop_focus_gradient),
        _negative_slope(x, gamma_neg, clip, stop_focus_gradient),
        pos_weight,
    )
    return np.where(kept, _finish(slope, kept, weights) * spread(cotangent, x.shape, axis), 0.0)


def _positive(x: Array, gamma: float) -> Array:
    """L+, with (1 - p)^gamma = exp(-gamma softplus(x)) and -log p = softplus(-x)."""
    return _power_of_sigmoid(-x, gamma) * _softplus(-x)


def _positive_slope(x: Array, gamma: float, stop_focus_gradient: bool) -> Array:
    p, q = _sigmoid(x), _sigmoid(-x)
    # p log p tends to 0 at -inf, where the product itself would be 0 * inf.
    p_log_p = np.where(np.isneginf(x), 0.0, -p * np.where(np.isneginf(x), 0.0, _softplus(-x)))
    focus = 0.0 if stop_focus_gradient else gamma * p_log_p
    return _power_of_sigmoid(-x, gamma) * (focus - q)


def _negative(x: Array, gamma: float, clip: float) -> Array:
    if clip == 0:
        return _power_of_sigmoid(x, gamma) * _softplus(x)
    p_m = _clipped(x, clip)
    return np.power(p_m, gamma) * _minus_log_complement(x, p_m, clip)


def _negative_slope(x: Array, gamma: float, clip: float, stop_focus_gradient: bool) -> Array:
    p, q = _sigmoid(x), _sigmoid(-x)
    if clip == 0:  # with p_m = p the factors p and 1 - p cancel, and nothing is left to divide by
        # (1 - p) log(1 - p) tends to 0 at +inf.
        q_log_q = np.where(np.isposinf(x), 0.0, -q * np.where(np.isposinf(x), 0.0, _softplus(x)))
        focus = 0.0 if stop_focus_gradient else gamma * q_log_q
        return _power_of_sigmoid(x, gamma) * (p - focus)
    p_m = _clipped(x, clip)
    inside = (p_m > 0) | np.isnan(x)
    safe = np.where(inside, p_m, 0.5)
    focus = 0.0 if stop_focus_gradient else gamma * _minus_log_complement(x, safe, clip) / safe
    slope = np.power(safe, gamma) * (1 / (q + clip) + focus) * p * q
    return np.where(inside, slope, 0.0)


def _clipped(x: Array, clip: float) -> Array:
    """max(p - clip, 0), NaN for NaN."""
    return np.maximum(_sigmoid(x) - clip, 0.0)


def _minus_log_complement(x: Array, p_m: Array, clip: float) -> Array:
    """-log(1 - p_m): from p_m while that is small, from (1 - p) + clip where 1 - p_m itself is small."""
    near_one = p_m > 0.5
    small = -np.log1p(-np.where(near_one, 0.0, p_m))
    return np.where(near_one, -np.log(_sigmoid(-x) + clip), small)


def _softplus(x: Array) -> Array:
    """log(1 + e^x), exact in both tails."""
    return np.logaddexp(x, 0.0)


def _sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x), with full relative precision down to the smallest float."""
    z = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, z) / (1.0 + z)


def _power_of_sigmoid(x: Array, gamma: float) -> Array:
    """sigmoid(x)^gamma; 1 for gamma = 0 at every logit but NaN."""
    if gamma == 0:
        return np.where(np.isnan(x), np.nan, 1.0)
    return np.exp(-gamma * _softplus(-x))


def _prepare(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    where: npt.ArrayLike | None,
    ignore_label: int | None,
    label_smoothing: float,
) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """Logits and smoothed targets in float64, and which elements count. Left-out ones become harmless."""
    x, y = np.asarray(logits).astype(np.float64), np.asarray(labels).astype(np.float64)
    if x.shape != y.shape:
        raise ValueError(f"logits {x.shape} and labels {y.shape} must have the same shape")
    kept = np.ones(x.shape, bool)
    if where is not None:
        kept = kept & np.broadcast_to(np.asarray(where, bool), x.shape)
    if ignore_label is not None:
        kept = kept & (y != ignore_label)
    x, y = np.where(kept, x, 0.0), np.where(kept, y, 0.0)
    return x, y * (1 - label_smoothing) + label_smoothing / 2, kept


def _mix(y: Array, positive: Array, negative: Array, pos_weight: npt.ArrayLike | None) -> Array:
    """pos_weight y L+ + (1 - y) L-; a side with factor 0 is left out, even where it is infinite."""
    if pos_weight is not None:
        positive = positive * np.asarray(pos_weight).astype(np.float64)
    nan = np.isnan(positive) | np.isnan(negative)
    on, off = y != 0, y != 1
    mixed = np.where(on, y * np.where(on, positive, 0.0), 0.0)
    mixed = mixed + np.where(off, (1 - y) * np.where(off, negative, 0.0), 0.0)
    return np.where(nan, np.nan, mixed)


def _finish(value: Array, kept: npt.NDArray[np.bool_], weights: npt.ArrayLike | None) -> Array:
    if weights is not None:
        value = value * np.asarray(weights).astype(np.float64)
    return np.where(kept, value, 0.0)


def spread(cotangent: npt.ArrayLike, shape: tuple[int, ...], axis: Axis) -> Array:
    """A cotangent of the loss, brought back to the shape of the logits."""
    summed = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
    summed_axes = {a % len(shape) for a in summed}
    outer = tuple(n for a, n in enumerate(shape) if a not in summed_axes)
    full = np.broadcast_to(np.asarray(cotangent).astype(np.float64), outer)
    return np.broadcast_to(np.expand_dims(full, tuple(sorted(summed_axes))), shape)
