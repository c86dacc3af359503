"""Every loss of the family against float64, in every kernel, label form and in the head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_no_worse, cotangent_of, interpreted, labels_of, logits_of

from asl_pallas import PackedLabels, SparseLabels, linear_multilabel_loss, multilabel_loss
from asl_pallas.kernels.versions import lacks_mosaic_gpu
from asl_pallas.losses import (
    AsymmetricPolynomialLoss,
    BinaryCrossEntropy,
    ElementwiseLoss,
    FocalLoss,
    HillLoss,
    SelfPacedLoss,
)
from reference import family

SHAPE = (9, 150)
Side = Callable[..., tuple[Any, Any]]
# The object, and its sides in `reference.family`, which take the object's fields.
LOSSES: dict[str, tuple[ElementwiseLoss, Side]] = {
    "cross-entropy": (BinaryCrossEntropy(), family.binary_cross_entropy),
    "focal": (FocalLoss(), family.focal),
    "focal-alpha": (FocalLoss(gamma=1.0, alpha=0.25), family.focal),
    "focal-fraction": (FocalLoss(gamma=0.5, alpha=0.75), family.focal),
    "hill": (HillLoss(), family.hill),
    "hill-other": (HillLoss(lamb=0.8, margin=0.5, gamma=1.5), family.hill),
    "self-paced": (SelfPacedLoss(), family.self_paced),
    "self-paced-other": (SelfPacedLoss(threshold=0.2, margin=0.0, gamma=1.0), family.self_paced),
    "polynomial": (AsymmetricPolynomialLoss(), family.asymmetric_polynomial),
    "polynomial-focused": (
        AsymmetricPolynomialLoss(gamma_neg=2.0, gamma_pos=1.0, epsilon_neg=-0.5, stop_focus_gradient=False),
        family.asymmetric_polynomial,
    ),
    "polynomial-fraction": (
        AsymmetricPolynomialLoss(gamma_neg=1.5, gamma_pos=0.5, clip=0.0, stop_focus_gradient=False),
        family.asymmetric_polynomial,
    ),
}
IMPLEMENTATIONS = (None, "xla", "mosaic_tpu", "triton", "mosaic_gpu")
FORMS: dict[str, Any] = {"packed": PackedLabels.from_dense, "sparse": SparseLabels.from_dense}


def settings_of(loss: ElementwiseLoss) -> dict[str, Any]:
    return {field.name: getattr(loss, field.name) for field in dataclasses.fields(loss)}


def pair_of(name: str, x: Any, y: Any, weights: Any, pos_weight: Any, double: bool) -> tuple[Any, Any]:
    """Value and slope of each element, in NumPy's float64 or in jnp's float32."""
    loss, side = LOSSES[name]
    xp, dtype = (np, np.float64) if double else (jnp, np.float32)
    x, y = np.asarray(x).astype(dtype), np.asarray(y).astype(dtype)
    with np.errstate(all="ignore"):
        sides = {positive: side(xp.asarray(x), positive, xp, **settings_of(loss)) for positive in (True, False)}
        missing = np.zeros(x.shape, bool)
        if isinstance(loss, SelfPacedLoss):
            missing = x > np.log(loss.threshold / (1 - loss.threshold))
        yes, no = (np.asarray(pos_weight, dtype), np.where(missing, np.asarray(pos_weight, dtype), dtype(1)))
        mixed = []
        for of_positive, of_negative in zip(sides[True], sides[False], strict=True):
            of_positive, of_negative = np.asarray(of_positive) * yes, np.asarray(of_negative) * no
            part = np.where(y > 0, y * of_positive, 0) + np.where(y < 1, (1 - y) * of_negative, 0)
            mixed.append(part.astype(dtype) * np.asarray(weights, dtype))
    return mixed[0], mixed[1]


def inputs(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> tuple[Any, Any, Any]:
    x = logits_of(shape, seed)
    # Where a loss jumps, float32 and float64 may be on different sides.
    for jump in (0.6, 0.2, 0.05):
        x = np.where(abs(x - np.log(jump / (1 - jump))) < 1e-4, x + np.float32(1e-3), x)
    return x, labels_of(shape, seed + 1), cotangent_of(shape[:-1], seed + 2)


def assert_near(name: str, found: Any, x: Any, y: Any, ct: Any, weights: Any = 1.0, pos_weight: Any = 1.0) -> None:
    truth, careful = (pair_of(name, x, y, weights, pos_weight, double) for double in (True, False))
    value, slope = map(np.asarray, found)
    assert_no_worse(value, truth[0].sum(-1), np.asarray(jnp.sum(careful[0], -1)), "loss")
    outer = np.asarray(ct)[..., None]
    assert_no_worse(slope, truth[1] * outer, careful[1] * np.float32(outer), "gradient")


def value_and_slope(loss: Any, x: Any, y: Any, ct: Any, implementation: str | None, **options: Any) -> Any:
    def run(x: Any, y: Any, ct: Any, options: Any) -> Any:
        value, pull = jax.vjp(lambda x: multilabel_loss(loss, x, y, implementation=implementation, **options), x)
        return value, pull(ct)[0]

    with interpreted(implementation):
        return jax.jit(run)(jnp.asarray(x), y, jnp.asarray(ct), options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_matches_float64(name, implementation):
    if implementation == "mosaic_gpu" and (reason := lacks_mosaic_gpu()):
        pytest.skip(reason)
    x, y, ct = inputs()
    random = np.random.default_rng(3)
    weights = random.random((SHAPE[0], 1)).astype(np.float32)
    pos_weight = random.uniform(0.5, 3, SHAPE[1]).astype(np.float32)
    found = value_and_slope(LOSSES[name][0], x, y, ct, implementation)
    assert_near(name, found, x, y, ct)
    found = value_and_slope(LOSSES[name][0], x, y, ct, implementation, weights=weights, pos_weight=pos_weight)
    assert_near(name, found, x, y, ct, weights, pos_weight)
