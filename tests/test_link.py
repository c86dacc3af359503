"""The link: what probability a logit stands for, and back, against numbers with 50 digits."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest

from asl_pallas.losses import (
    AsymmetricLoss,
    AsymmetricPolynomialLoss,
    BinaryCrossEntropy,
    ElementwiseLoss,
    FocalLoss,
    HillLoss,
    SelectiveLoss,
    SelfPacedLoss,
    VarifocalLoss,
)
from reference import exact

# Of each loss, and of the settings where a probability is far from the sigmoid or near a margin: the object, and its
# sides in reference/exact.py.
Settings = list[tuple[ElementwiseLoss, Any, Any]]


def _asymmetric(*numbers: float) -> tuple[ElementwiseLoss, Any, Any]:
    return AsymmetricLoss(*numbers), *(exact.asymmetric(positive, *numbers) for positive in (True, False))


def _weighted(side: Any, weight: float) -> Any:
    return lambda x: weight * side(x)


_FOCAL = [exact.asymmetric(positive, 2.0, 2.0, 0.0) for positive in (True, False)]
_ENTROPY = [exact.asymmetric(positive, 0.0, 0.0, 0.0) for positive in (True, False)]
_POLYNOMIAL = (4.0, 0.0, 0.05, 1.0, -2.5, 0.0)
SETTINGS: Settings = [
    (BinaryCrossEntropy(), *_ENTROPY),
    *(_asymmetric(*numbers) for numbers in ((4, 1, 0.05), (4, 1, 0), (1, 0, 0), (7, 0, 0.05), (2.5, 0.5, 0.3))),
    (FocalLoss(2.0, alpha=0.25), _weighted(_FOCAL[0], 0.25), _weighted(_FOCAL[1], 0.75)),
    (HillLoss(), *(exact.hill(positive, 1.5, 1.0, 2.0) for positive in (True, False))),
    (
        AsymmetricPolynomialLoss(*_POLYNOMIAL, stop_focus_gradient=False),
        *(exact.asymmetric_polynomial(positive, *_POLYNOMIAL) for positive in (True, False)),
    ),
    (
        SelectiveLoss(gamma_pos=1.0, gamma_neg=3.0, clip=0.05, alpha_neg=0.5, stop_focus_gradient=False),
        exact.asymmetric(True, 0.0, 1.0, 0.0),
        _weighted(exact.asymmetric(False, 3.0, 0.0, 0.05), 0.5),
    ),
    (VarifocalLoss(), _ENTROPY[0], _weighted(_FOCAL[1], 0.75)),
    (SelfPacedLoss(threshold=1.0, margin=0.0), *_FOCAL),
]
NAMES = [f"{type(setting[0]).__name__}{number}" for number, setting in enumerate(SETTINGS)]


def _logits(loss: ElementwiseLoss, dtype: Any) -> np.ndarray:
    """Over all that stands for a probability between 1e-30 and 1 - 1e-7, and close to where a margin ends."""
    ends = np.minimum(loss.logit(np.array([1e-30, 1 - 1e-7])), 40)
    near = ends[0] + np.geomspace(1e-7, 1.0, 24)
    return np.unique(np.concatenate([np.linspace(*ends, 60), near]).astype(dtype))


@pytest.mark.mostly_long(short=6)
@pytest.mark.parametrize(("loss", "positive", "negative"), SETTINGS, ids=NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_probability_has_a_relative_precision_into_both_tails(dtype, loss, positive, negative):
    x = _logits(loss, dtype)
    truth = [exact.probability(positive, negative, float(one)) for one in x]
    found = loss.probability(x if dtype == np.float64 else jnp.asarray(x))
    assert found.dtype == dtype
    bound = 1e-5 if dtype == np.float32 else 1e-12
    checked = 0
    for one, p, is_p in zip(x, found, truth, strict=True):
        if mpmath.mpf(10) ** -30 <= is_p <= 1 - mpmath.mpf(10) ** -7:
            assert abs(mpmath.mpf(float(p)) / is_p - 1) <= bound, f"at {one!r}: {p!r}, and exactly {mpmath.nstr(is_p)}"
            checked += 1
    assert checked >= 50


@pytest.mark.parametrize(("loss", "positive", "negative"), SETTINGS, ids=NAMES)
def test_the_expected_loss_is_least_at_the_logit_of_a_probability(loss, positive, negative):
    for p in (1e-6, 0.04, 0.5, 0.9, 1 - 1e-7):
        at = min(float(loss.logit(p)), 60.0)
        here = exact.expected_loss(positive, negative, at, p)
        for near in (at - 1e-3, at - 1.0, *((at + 1e-3, at + 1.0) if at < 60 else ())):
            assert here < exact.expected_loss(positive, negative, near, p), (p, at, near)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize(("loss", "positive", "negative"), SETTINGS, ids=NAMES)
def test_a_logit_is_the_inverse_of_a_probability(loss, positive, negative):
    x = _logits(loss, np.float64)
    x = x[(np.asarray(loss.probability(x)) < 1 - 1e-6) & (x < 12)]  # of p near 1 float64 itself holds few digits
    np.testing.assert_allclose(loss.logit(loss.probability(x)), x, rtol=1e-5, atol=1e-5)
    p = jnp.geomspace(1e-6, 0.95, 50)
    again = loss.probability(loss.logit(p))
    np.testing.assert_allclose(again, p, rtol=2e-4 if getattr(loss, "clip", 0) else 1e-5)


def test_of_cross_entropy_it_is_the_sigmoid():
    x = jnp.linspace(-60, 15, 100)
    np.testing.assert_allclose(BinaryCrossEntropy().probability(x), jax.nn.sigmoid(x), rtol=1e-5)


@pytest.mark.parametrize(
    ("numbers", "sigmoids"),
    [
        ((1, 0, 0), (0.022, 0.069, 0.137, 0.265, 0.530)),
        ((4, 1, 0.05), (0.223, 0.321, 0.402, 0.502, 0.638)),
        ((7, 0, 0.05), None),
    ],
)
def test_the_readmes_table(numbers, sigmoids):
    p = np.array([0.001, 0.01, 0.04, 0.15, 0.5])
    found = 1 / (1 + np.exp(-AsymmetricLoss(*numbers).logit(p)))
    assert (np.diff(found) > 0).all()
    if sigmoids is not None:
        np.testing.assert_allclose(found, sigmoids, atol=5e-4)


def test_both_ends_and_what_is_no_number():
    loss = AsymmetricLoss()
    np.testing.assert_array_equal(loss.probability([-np.inf, -1e4, 1e4, np.inf, np.nan]), [0, 0, 1, 1, np.nan])
    np.testing.assert_array_equal(loss.logit([0, 1, np.nan]), [-np.inf, np.inf, np.nan])
    edge = np.log(0.05 / 0.95)
    assert loss.probability(edge - 1e-6) == 0 < loss.probability(edge + 1e-6)


def test_a_probability_that_no_logit_stands_for_has_an_infinite_one():
    loss = AsymmetricLoss(7.0, 0.0, 0.05)
    most = float(loss.probability(40.0))
    np.testing.assert_allclose(loss.probability([100.0, 1e4, np.inf]), most, rtol=1e-12)
    np.testing.assert_allclose(loss.probability(jnp.array([100.0, 1e4, jnp.inf])), most, rtol=1e-5)
    assert 0.96 < most < 0.97
    for given in (np.array([most - 0.01, most + 0.001, 0.9999]), jnp.array([most - 0.01, most + 0.001, 0.9999])):
        found = loss.logit(given)
        assert np.isfinite(found[0])
        np.testing.assert_array_equal(found[1:], np.inf)


def test_pos_weight_and_label_smoothing_are_taken_into_account():
    x = np.linspace(-4, 4, 33)
    odds = 1 / (1 + 3 * np.exp(-x))
    np.testing.assert_allclose(BinaryCrossEntropy().probability(x, pos_weight=3.0), odds)
    p = 1 / (1 + np.exp(-x))
    s = 0.2
    np.testing.assert_allclose(
        BinaryCrossEntropy().probability(x, label_smoothing=s), np.clip((p - s / 2) / (1 - s), 0, 1)
    )
    for options in ({"pos_weight": 3.0}, {"label_smoothing": 0.2}, {"pos_weight": np.array([0.1, 9.0])}):
        p = np.array([0.2, 0.7])
        loss = AsymmetricLoss()
        np.testing.assert_allclose(loss.probability(loss.logit(p, **options), **options), p, rtol=1e-6)


def test_a_head_that_is_trained_with_the_loss_ends_at_the_logit_of_its_frequency():
    """Not by the formula: by gradient descent on many labels that nothing but their frequency tells apart."""
    frequency, loss = jnp.array([0.001, 0.04, 0.3]), AsymmetricLoss(4.0, 1.0, 0.05)
    target = jnp.asarray(loss.logit(frequency))

    from asl_pallas import multilabel_loss

    def expected(x):
        of_positive = multilabel_loss(loss, x, jnp.ones(3, bool), axis=())
        of_negative = multilabel_loss(loss, x, jnp.zeros(3, bool), axis=())
        return jnp.sum((frequency * of_positive + (1 - frequency) * of_negative) / frequency)

    optimizer = optax.adam(0.03)

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(jax.grad(expected)(x), state)
        return (x + updates, state), None

    x = jnp.zeros(3)
    (x, _), _ = jax.lax.scan(step, (x, optimizer.init(x)), length=3000)
    np.testing.assert_allclose(x, target, atol=2e-3)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("loss", [AsymmetricLoss(), FocalLoss(2.0), HillLoss()], ids=repr)
def test_derivatives_jit_and_vmap(loss):
    for function, at in ((loss.probability, 0.4), (loss.logit, 0.3)):
        step = 1e-6
        slope = (function(at + step) - function(at - step)) / (2 * step)
        np.testing.assert_allclose(jax.jit(jax.grad(function))(at), slope, rtol=2e-4)
        curve = (function(at + 1e-4) - 2 * function(at) + function(at - 1e-4)) / 1e-8
        np.testing.assert_allclose(jax.grad(jax.grad(function))(at), curve, rtol=2e-3)
        many = jnp.linspace(0.1, 0.9, 5)
        np.testing.assert_allclose(jax.vmap(function)(many), function(many), rtol=1e-6)
    # Into the tails: the derivative of log p is finite, and so is that of p.
    slopes = jax.vmap(jax.grad(loss.probability))(jnp.array([-60.0, -20.0, 20.0, 60.0]))
    assert np.isfinite(slopes).all()


def test_hyper_parameters_that_are_arrays():
    x = np.linspace(-3, 3, 15).reshape(5, 3)
    gammas = np.array([1.0, 2.5, 4.0])
    each = [AsymmetricLoss(gamma, 1.0, 0.05).probability(x[:, k]) for k, gamma in enumerate(gammas)]
    np.testing.assert_allclose(AsymmetricLoss(gammas, 1.0, 0.05).probability(x), np.stack(each, 1), rtol=1e-12)
    traced = jax.jit(lambda gamma, x: AsymmetricLoss(gamma, 1.0, 0.05).probability(x))
    np.testing.assert_allclose(traced(gammas, x), np.stack(each, 1), rtol=1e-5)
    clips = AsymmetricLoss(4.0, 1.0, np.array([0.0, 0.05, 0.1]))
    each = [AsymmetricLoss(4.0, 1.0, clip).probability(x[:, k]) for k, clip in enumerate((0.0, 0.05, 0.1))]
    np.testing.assert_allclose(clips.probability(x), np.stack(each, 1), rtol=1e-9)
    p = np.array([0.01, 0.1, 0.5])
    np.testing.assert_allclose(clips.probability(clips.logit(p)), p, rtol=1e-9)


def test_numpy_stays_numpy_in_float64_and_jax_in_its_own():
    loss = AsymmetricLoss()
    for given in (0.3, [0.1, 0.2], np.float32(0.3), np.ones((2, 3), np.float32)):
        found = loss.probability(given)
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float64
        assert found.shape == np.shape(given)
    for dtype in (jnp.float32, jnp.bfloat16):
        found = loss.probability(jnp.ones((2, 3), dtype))
        assert isinstance(found, jax.Array)
        assert found.dtype == jnp.float32
    with jax.enable_x64(True):
        assert loss.probability(jnp.ones(3)).dtype == jnp.float64


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: AsymmetricLoss().logit(1.5), ValueError, "probability is 1.5; expected 0 <= probability <= 1"),
        (lambda: AsymmetricLoss().logit(jnp.array([0.1, -0.5])), ValueError, "probability is -0.5"),
        (lambda: AsymmetricLoss().probability("many"), TypeError, "logits has dtype"),
        (lambda: AsymmetricLoss().probability(0.0, pos_weight=0.0), ValueError, "pos_weight=0.0; expected numbers"),
        (lambda: AsymmetricLoss().probability(0.0, label_smoothing=1.0), ValueError, "label_smoothing=1.0; expected"),
        (lambda: AsymmetricLoss(clip=1.0).probability(0.0), ValueError, "clip=1.0; expected 0 <= clip < 1"),
        (lambda: SelfPacedLoss().probability(0.0), ValueError, "has no link: the probability that its logits stand"),
        (lambda: HillLoss(lamb=1.2).logit(0.5), ValueError, "where a negative's loss falls"),
        (lambda: HillLoss(lamb=np.array([1.5, 1.2])).logit(0.5), ValueError, "where a negative's loss falls"),
        (lambda: FocalLoss(alpha=1.0).logit(0.5), ValueError, "is the same everywhere"),
    ],
)
def test_mistakes_are_named(call, error, says):
    with pytest.raises(error, match=re.escape(says)):
        call()


def test_a_setting_is_looked_at_under_jit_too():
    with pytest.raises(ValueError, match="has no link"):
        jax.jit(HillLoss(lamb=1.2).probability)(jnp.zeros(3))
