"""Losses of the family in as many digits as are asked for, and what follows from their values alone.

A side is a function of one logit, an mpmath number, that gives the loss of an element. Nothing of the library is
imported here, and no derivative is written out: slopes are differences of values, taken with digits to spare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath

Number = Any
Side = Callable[[Number], Number]
DIGITS = 120


def sigmoid(x: Number) -> Number:
    return 1 / (1 + mpmath.exp(-x))


def asymmetric(positive: bool, gamma_neg: Number, gamma_pos: Number, clip: Number) -> Side:
    """arXiv 2009.14119, equations (4) to (7)."""
    if positive:
        return lambda x: sigmoid(-x) ** gamma_pos * -mpmath.log(sigmoid(x))

    def negative(x: Number) -> Number:
        p = max(sigmoid(x) - clip, mpmath.mpf(0))
        return p**gamma_neg * -mpmath.log(1 - p)

    return negative


def hill(positive: bool, lamb: Number, margin: Number, gamma: Number) -> Side:
    """arXiv 2112.07368."""
    if positive:
        return lambda x: sigmoid(margin - x) ** gamma * -mpmath.log(sigmoid(x - margin))
    return lambda x: (lamb - sigmoid(x)) * sigmoid(x) ** 2


def asymmetric_polynomial(positive: bool, gamma_neg: Number, gamma_pos: Number, clip: Number, *epsilon: Number) -> Side:
    """LUMIA-Group/APL, with a derivative through the focusing factors; epsilon is (pos, pos_2, neg)."""
    pos, pos_2, neg = epsilon
    if positive:

        def of_positive(x: Number) -> Number:
            q = sigmoid(-x)
            return q**gamma_pos * (-mpmath.log(sigmoid(x)) - pos * q - pos_2 * q**2 / 2)

        return of_positive

    def of_negative(x: Number) -> Number:
        p = max(sigmoid(x) - clip, mpmath.mpf(0))
        return p**gamma_neg * (-mpmath.log(1 - p) - neg * (1 - p))

    return of_negative


def slope(side: Side, x: float) -> Number:
    """The derivative at x, exact to some 50 digits."""
    with mpmath.workdps(DIGITS):
        step = mpmath.mpf(10) ** (-DIGITS // 2)
        at = mpmath.mpf(x)
        return (side(at + step) - side(at - step)) / (2 * step)


def probability(positive: Side, negative: Side, x: float, pos_weight: float = 1.0) -> Number:
    """The probability of a label at which the expected loss is least at x."""
    with mpmath.workdps(DIGITS):
        down, up = slope(negative, x), -mpmath.mpf(pos_weight) * slope(positive, x)
        return down / (down + up)


def expected_loss(positive: Side, negative: Side, x: float, probability: float) -> Number:
    """Of an example that has the label with this probability."""
    with mpmath.workdps(DIGITS):
        p = mpmath.mpf(probability)
        return p * positive(mpmath.mpf(x)) + (1 - p) * negative(mpmath.mpf(x))
