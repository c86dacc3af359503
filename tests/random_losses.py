"""The losses of random calls: their objects, the values that their hyper-parameters get, and their sides.

A side is of `reference.family`: value and slope of the elements of one state, in the precision of its namespace.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from asl_pallas.losses import (
    AsymmetricLoss,
    AsymmetricPolynomialLoss,
    BinaryCrossEntropy,
    ElementwiseLoss,
    FocalLoss,
    HillLoss,
    SelectiveLoss,
    SelfPacedLoss,
)
from reference import family

GAMMAS = (0, 0.0, 1, 1.0, 2, 3.0, 4.0, 5, 8.0, 16, 17, 20.0, 33, 0.1, 0.25, 0.5, 0.75, 1.5, 2.5, 3.7, 16.5)
CLIPS = (0, 0.0, 0.05, 0.05, 0.2, 0.5, 0.875, 0.001, 1 / 3)
MARGINS = (1.0, 1, 0, 0.0, 0.5, 2.5, -0.5)
THRESHOLDS = (0, 0.001, 0.2, 0.5, 0.6, 0.9, 0.999, 1, 1.0)
SHARES = (0, 0.0, 0.1, 0.25, 0.5, 0.75, 1, 1.0)  # of the positives
STATE_WEIGHTS = (1, 1.0, 0, 0.0, 0.05, 0.5, 2.5)
FIRST_COEFFICIENTS = (1.0, 1, 0, 0.5, -1.5)
SECOND_COEFFICIENTS = (-2.5, 0, 0.0, 0.5, 1.0)
NEGATIVES_COEFFICIENTS = (0, 0.0, -0.5, 0.25)
# Equal ones are equal in every dtype, and no two of a prior and a threshold are nearly so.
PRIORS = (0.0, 0.01, 0.03, 0.2, 0.7, 1.0)
PRIOR_THRESHOLDS = (0.05, 0, 0.1, 0.5, 1)


def self_paced(
    x: Any, positive: bool, xp: ModuleType = np, *, threshold: Any, margin: Any, gamma: Any
) -> tuple[Any, Any]:
    """`family.self_paced`, whose p is 0 below any threshold where a logit is far from 0."""
    if positive:
        return family.self_paced(x, True, xp, margin=margin, gamma=gamma)
    sides = zip(family.focal(x, True, xp, gamma=gamma), family.focal(x, False, xp, gamma=gamma), strict=True)
    value, slope = (xp.where(x > logit_of(threshold, xp), yes, no) for yes, no in sides)
    return value, slope


def logit_of(p: Any, xp: ModuleType = np) -> Any:
    return xp.log(p) - xp.log1p(-p)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A loss.

    Attributes:
      make: its class.
      side: of `reference.family`.
      choices: hyper-parameters, each with the values that it gets.
      jumps: those at whose probability the loss or its slope jumps.
    """

    make: type[ElementwiseLoss]
    side: Callable[..., tuple[Any, Any]]
    choices: dict[str, tuple[float, ...]]
    jumps: tuple[str, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(field.name for field in dataclasses.fields(self.make))

    @property
    def usual(self) -> tuple[float, ...]:
        """The defaults, or a middle choice where that is None."""
        defaults = {name: getattr(self.make, name) for name in self.choices}
        return tuple(self.choices[name][3] if value is None else value for name, value in defaults.items())

    @property
    def has_third_state(self) -> bool:
        return self.make.states == 3


_GAMMAS_AND_CLIP = {"gamma_neg": GAMMAS, "gamma_pos": GAMMAS, "clip": CLIPS}
_SELECTIVE = {
    "gamma_pos": GAMMAS,
    "gamma_neg": GAMMAS,
    "gamma_unann": GAMMAS,
    "alpha_pos": STATE_WEIGHTS,
    "alpha_neg": STATE_WEIGHTS,
    "alpha_unann": STATE_WEIGHTS,
    "clip": CLIPS,
    "likelihood_threshold": (*THRESHOLDS, 1.0, 1.0),
}
_PRIOR = {"prior": PRIORS, "prior_threshold": PRIOR_THRESHOLDS}
_asymmetric = functools.partial(family.asymmetric_polynomial, epsilon_pos=0.0, epsilon_pos_2=0.0, epsilon_neg=0.0)
KINDS = {
    "asymmetric": Kind(AsymmetricLoss, _asymmetric, _GAMMAS_AND_CLIP, ("clip",)),
    "cross-entropy": Kind(BinaryCrossEntropy, family.binary_cross_entropy, {}),
    "focal": Kind(FocalLoss, family.focal, {"gamma": GAMMAS}),
    "focal-alpha": Kind(FocalLoss, family.focal, {"gamma": GAMMAS, "alpha": SHARES}),
    "hill": Kind(HillLoss, family.hill, {"lamb": (1.5, 1, 1.0, 0.8, 2.5, 0, -0.5), "margin": MARGINS, "gamma": GAMMAS}),
    "self-paced": Kind(
        SelfPacedLoss, self_paced, {"threshold": THRESHOLDS, "margin": MARGINS, "gamma": GAMMAS}, ("threshold",)
    ),
    "polynomial": Kind(
        AsymmetricPolynomialLoss,
        family.asymmetric_polynomial,
        {
            **_GAMMAS_AND_CLIP,
            "epsilon_pos": FIRST_COEFFICIENTS,
            "epsilon_pos_2": SECOND_COEFFICIENTS,
            "epsilon_neg": NEGATIVES_COEFFICIENTS,
        },
        ("clip",),
    ),
    "selective": Kind(SelectiveLoss, family.selective, _SELECTIVE, ("clip", "likelihood_threshold")),
    "selective-prior": Kind(SelectiveLoss, family.selective, _SELECTIVE | _PRIOR, ("clip", "likelihood_threshold")),
}
