"""The other losses of the family, each side's value and slope written out, in whatever precision it is given.

In NumPy and float64 these are the truth; in jax.numpy and float32 they are what a careful user would write, the
yardstick. p = sigmoid(x) and q = 1 - p are each computed from the side where they are small. Nothing of the library is
imported here.

A side is a function of the logits, of whether they are positives, and of the namespace, `numpy` or `jax.numpy`. It
returns the loss of each element and its derivative with respect to the logit.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np


def binary_cross_entropy(x: Any, positive: bool, xp: ModuleType = np) -> tuple[Any, Any]:
    """-log p or -log q. torch.nn.BCEWithLogitsLoss(reduction="none")."""
    if positive:
        return _softplus(-x, xp), -_sigmoid(-x, xp)
    return _softplus(x, xp), _sigmoid(x, xp)


def focal(x: Any, positive: bool, xp: ModuleType = np, *, gamma: Any = 2.0, alpha: Any = None) -> tuple[Any, Any]:
    """alpha q^gamma * -log p, or (1 - alpha) p^gamma * -log q: arXiv 1708.02002, equation (5)."""
    wrong = -x if positive else x  # the logit of the wrong answer
    p, q, surprise = _sigmoid(wrong, xp), _sigmoid(-wrong, xp), _softplus(wrong, xp)
    value = p**gamma * surprise
    slope = p**gamma * (p + gamma * _zero_times(q, surprise, xp))
    weight = 1.0 if alpha is None else (alpha if positive else 1 - alpha)
    return weight * value, weight * (-slope if positive else slope)


def hill(
    x: Any, positive: bool, xp: ModuleType = np, *, lamb: Any = 1.5, margin: Any = 1.0, gamma: Any = 2.0
) -> tuple[Any, Any]:
    """(1 - p_m)^gamma * -log p_m with p_m = sigmoid(x - margin), or (lamb - p) p^2: arXiv 2112.07368."""
    if positive:
        return focal(x - margin, True, xp, gamma=gamma)
    p, q = _sigmoid(x, xp), _sigmoid(-x, xp)
    return (lamb - p) * p**2, (2 * lamb - 3 * p) * p**2 * q


def self_paced(
    x: Any, positive: bool, xp: ModuleType = np, *, threshold: Any = 0.6, margin: Any = 1.0, gamma: Any = 2.0
) -> tuple[Any, Any]:
    """Focal with x - margin for positives; negatives with p > threshold are positives without a margin."""
    if positive:
        return focal(x - margin, True, xp, gamma=gamma)
    missing = _sigmoid(x, xp) > threshold
    sides = zip(focal(x, True, xp, gamma=gamma), focal(x, False, xp, gamma=gamma), strict=True)
    value, slope = (xp.where(missing, yes, no) for yes, no in sides)
    return value, slope


def asymmetric_polynomial(
    x: Any,
    positive: bool,
    xp: ModuleType = np,
    *,
    gamma_neg: Any = 4.0,
    gamma_pos: Any = 0.0,
    clip: Any = 0.05,
    epsilon_pos: Any = 1.0,
    epsilon_pos_2: Any = -2.5,
    epsilon_neg: Any = 0.0,
    stop_focus_gradient: bool = True,
) -> tuple[Any, Any]:
    """arXiv 2304.05361, in the form of the authors' code; see the library's docstring for the formula."""
    p, q = _sigmoid(x, xp), _sigmoid(-x, xp)
    if positive:
        base = _softplus(-x, xp) - epsilon_pos * q - epsilon_pos_2 * q**2 / 2
        of_base = -q + (epsilon_pos + epsilon_pos_2 * q) * p * q
        focus, of_focus = q**gamma_pos, -gamma_pos * q**gamma_pos * p
    else:
        p_m = xp.maximum(p - clip, 0)
        inside = p_m > 0
        surprise = _softplus(x, xp) if clip == 0 else -xp.log(q + clip)
        surprise = xp.where(p_m < 0.5, -xp.log1p(-xp.minimum(p_m, 0.5)), surprise)
        base = surprise - epsilon_neg * (1 - p_m)
        of_base = xp.where(inside, (1 / xp.where(inside, q + clip, 1) + epsilon_neg) * p * q, 0)
        of_base = xp.where(inside, p + epsilon_neg * p * q, 0) if clip == 0 else of_base
        focus = p_m**gamma_neg
        of_focus = xp.where(inside, gamma_neg * focus / xp.where(inside, p_m, 1) * p * q, 0)
    slope = focus * of_base
    if not stop_focus_gradient:
        slope = slope + xp.where(of_focus == 0, 0, of_focus * xp.where(of_focus == 0, 0, base))
    return xp.where(focus == 0, 0, focus * xp.where(focus == 0, 0, base)), slope


def varifocal(x: Any, label: Any, xp: ModuleType = np, *, alpha: Any = 0.75, gamma: Any = 2.0) -> tuple[Any, Any]:
    """y (y * -log p + (1 - y) * -log q), or for y = 0 alpha p^gamma * -log q: arXiv 2008.13367, equation (2)."""
    present, absent = binary_cross_entropy(x, True, xp)[0], binary_cross_entropy(x, False, xp)[0]
    p, q = _sigmoid(x, xp), _sigmoid(-x, xp)
    positive = label * (label * present + xp.where(label < 1, (1 - label) * xp.where(label < 1, absent, 0), 0))
    of_negative = alpha * p**gamma * (p + gamma * _zero_times(q, absent, xp))
    value = xp.where(label > 0, positive, alpha * p**gamma * absent)
    return value, xp.where(label > 0, label * (p - label), of_negative)


def selective(
    x: Any,
    state: int,
    xp: ModuleType = np,
    *,
    gamma_pos: Any = 0.0,
    gamma_neg: Any = 1.0,
    gamma_unann: Any = 2.0,
    alpha_pos: Any = 1.0,
    alpha_neg: Any = 1.0,
    alpha_unann: Any = 1.0,
    clip: Any = 0.0,
    prior: Any = None,
    prior_threshold: Any = 0.05,
    likelihood_threshold: Any = 1.0,
    stop_focus_gradient: bool = True,
) -> tuple[Any, Any]:
    """arXiv 2110.10955: of elements that are all positive (1), negative (0) or not annotated (-1)."""
    gamma, alpha = {1: (gamma_pos, alpha_pos), 0: (gamma_neg, alpha_neg), -1: (gamma_unann, alpha_unann)}[state]
    settings: dict[str, Any] = {"gamma_neg": gamma, "gamma_pos": gamma, "clip": clip}
    settings |= {"epsilon_pos": 0.0, "epsilon_pos_2": 0.0, "epsilon_neg": 0.0}
    value, slope = asymmetric_polynomial(x, state == 1, xp, stop_focus_gradient=stop_focus_gradient, **settings)
    counts = alpha * xp.ones_like(x)
    if state == -1:
        counts = xp.where(_sigmoid(x, xp) > likelihood_threshold, 0, counts)
        counts = counts if prior is None else xp.where(prior > prior_threshold, 0, counts)
    return xp.where(counts == 0, 0, value * counts), xp.where(counts == 0, 0, slope * counts)


def _sigmoid(x: Any, xp: ModuleType) -> Any:
    small = xp.exp(-abs(x))
    return xp.where(x < 0, small, 1) / (1 + small)


def _softplus(x: Any, xp: ModuleType) -> Any:
    """log(1 + e^x)."""
    return xp.maximum(x, 0) + xp.log1p(xp.exp(-abs(x)))


def _zero_times(zero: Any, x: Any, xp: ModuleType) -> Any:
    """zero * x, 0 where the first is 0: the limit where x grows no faster than a logarithm."""
    return xp.where(zero == 0, 0, zero * xp.where(zero == 0, 1, x))
