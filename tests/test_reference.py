"""The reference against arithmetic in 60 decimal digits, against itself, and against optax and autodiff."""

from __future__ import annotations

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import GAMMAS_AND_CLIP, away_from_the_margin, careful_pair, labels_of, logits_of, scaled_error, true_pair

from reference import autodiff, closed_form, float64

LOGITS = [-1e4, -745.2, -700.0, -88.5, -30.0, -18.4, -5.0, -2.95, -2.9, -1.0, -1e-3, -1e-9, 0.0]
LOGITS = LOGITS + [-x for x in reversed(LOGITS[:-1])]
SOFT = [0.0, 0.25, 1.0]


def by_the_book(x: float, y: float, gamma_neg: float, gamma_pos: float, clip: float, stop: bool) -> tuple[float, float]:
    """Value and gradient in decimal arithmetic, from the probabilities themselves."""
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = 80, -(10**7), 10**7
        one, c = Decimal(1), Decimal(clip)
        gn, gp = Decimal(gamma_neg), Decimal(gamma_pos)

        def power(base: Decimal, exponent: Decimal) -> Decimal:
            return one if exponent == 0 else base**exponent

        def log_of_one_plus(z: Decimal) -> Decimal:
            return z - z * z / 2 if z < Decimal("1e-40") else (one + z).ln()

        odds, inverse_odds = Decimal(x).exp(), (-Decimal(x)).exp()
        p, q = one / (one + inverse_odds), one / (one + odds)
        minus_log_p, minus_log_q = log_of_one_plus(inverse_odds), log_of_one_plus(odds)
        positive = power(q, gp) * minus_log_p
        positive_slope = power(q, gp) * ((0 if stop else -gp * p * minus_log_p) - q)
        negative = negative_slope = Decimal(0)
        if p > c:
            m = p - c
            surprise = minus_log_q if clip == 0 else -(q + c).ln()
            negative = power(m, gn) * surprise
            focus = 0 if stop else gn * surprise / m
            negative_slope = power(m, gn) * (one / (q + c) + focus) * p * q
        target = Decimal(y)
        return (
            float(target * positive + (one - target) * negative),
            float(target * positive_slope + (one - target) * negative_slope),
        )


@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), GAMMAS_AND_CLIP)
def test_float64_agrees_with_sixty_digits(gamma_neg, gamma_pos, clip, stop):
    points = [(x, y) for x in LOGITS for y in SOFT]
    truth = np.array([by_the_book(x, y, gamma_neg, gamma_pos, clip, stop) for x, y in points])
    x, y = np.array(points).T
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip, "axis": ()}
    value = float64.asymmetric_loss(x, y, **options)
    slope = float64.gradient(x, y, stop_focus_gradient=stop, **options)
    np.testing.assert_allclose(value, truth[:, 0], rtol=2e-13, atol=1e-15)
    np.testing.assert_allclose(slope, truth[:, 1], rtol=2e-13, atol=1e-15)


@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), GAMMAS_AND_CLIP)
def test_float64_takes_the_limits_at_infinite_logits(gamma_neg, gamma_pos, clip):
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip, "axis": ()}
    x, y = np.array([-np.inf, -np.inf, np.inf, np.inf]), np.array([1, 0, 1, 0])
    most = (1 - clip) ** gamma_neg * -np.log(clip) if clip else np.inf
    np.testing.assert_allclose(float64.asymmetric_loss(x, y, **options), [np.inf, 0, 0, most], rtol=1e-15)
    np.testing.assert_array_equal(float64.gradient(x, y, **options), [-1, 0, 0, 0 if clip else 1])
    near = np.array([-700.0, -700.0, 700.0, 700.0])
    np.testing.assert_allclose(float64.gradient(near, y, **options), float64.gradient(x, y, **options), atol=1e-12)


def test_float64_gradient_is_the_slope_of_the_loss_under_every_argument():
    random = np.random.default_rng(3)
    x = random.normal(0, 3, (4, 3, 5))
    y = random.choice([-1.0, 0.0, 0.3, 1.0], x.shape)
    options = {
        "gamma_neg": 2.5,
        "gamma_pos": 0.5,
        "clip": 0.1,
        "where": random.random((3, 5)) < 0.8,
        "weights": random.uniform(0, 2, 5),
        "pos_weight": random.uniform(0, 2, 5),
        "ignore_label": -1,
        "label_smoothing": 0.2,
    }
    for axis in [-1, 0, (0, 2), (), None]:
        loss = float64.asymmetric_loss(x, y, axis=axis, **options)
        cotangent = random.normal(size=loss.shape)
        slope = float64.gradient(x, y, cotangent, axis=axis, **options)
        step = 1e-6
        for index in [(0, 0, 0), (3, 1, 4), (2, 2, 2)]:
            up, down = x.copy(), x.copy()
            up[index] += step
            down[index] -= step
            rise = float64.asymmetric_loss(up, y, axis=axis, **options)
            rise = rise - float64.asymmetric_loss(down, y, axis=axis, **options)
            assert np.sum(cotangent * rise) / (2 * step) == pytest.approx(slope[index], abs=1e-8)


def test_float64_leaves_masked_elements_out_even_when_they_are_nan():
    x, y = np.array([[np.nan, 1.0], [np.inf, -np.inf]]), np.array([[1, 0], [0, -1]])
    where = np.array([[False, True], [True, True]])
    value = float64.asymmetric_loss(x, y, where=where, ignore_label=-1, axis=())
    slope = float64.gradient(x, y, where=where, ignore_label=-1, axis=())
    assert value[0, 0] == slope[0, 0] == value[1, 1] == slope[1, 1] == 0
    assert np.isfinite(value).all() and np.isfinite(slope).all()
    assert np.isnan(float64.asymmetric_loss(x, np.abs(y), axis=())[0, 0])


@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), GAMMAS_AND_CLIP)
def test_closed_form_is_right_to_a_few_roundings_of_float32(gamma_neg, gamma_pos, clip):
    random = np.random.default_rng(0)
    x = np.concatenate([random.normal(0, 6, 4000), [-1e4, 1e4, 0.0, 30, -30]]).astype(np.float32)
    y = random.choice([0.0, 1.0, 0.3], x.shape).astype(np.float32)
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip, "axis": ()}
    value, pull = jax.vjp(
        lambda x: closed_form.asymmetric_loss(x, jnp.asarray(y), gamma_neg, gamma_pos, clip), jnp.asarray(x)
    )
    truth = float64.asymmetric_loss(x, y, **options)
    np.testing.assert_allclose(np.asarray(value), truth, rtol=1e-6, atol=1e-6)
    error = np.abs(np.asarray(pull(jnp.ones_like(value))[0]) - float64.gradient(x, y, **options))
    assert np.max(error, where=away_from_the_margin(x, clip), initial=0) < 1e-6


@pytest.mark.parametrize("hard_loss", [autodiff.official, autodiff.optax_style, "closed_form"])
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), [(4.0, 1.0, 0.05), (2.0, 2.0, 0.0), (0.0, 0.0, 0.0)])
def test_every_reference_is_the_same_loss_on_hard_labels_and_moderate_logits(hard_loss, gamma_neg, gamma_pos, clip):
    random = np.random.default_rng(1)
    x = random.normal(0, 3, 2000).clip(-8, 8).astype(np.float32)
    y = (random.random(2000) < 0.3).astype(np.int8)
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}

    def loss(x):
        if hard_loss == "closed_form":
            return closed_form.asymmetric_loss(x, jnp.asarray(y), gamma_neg, gamma_pos, clip)
        return hard_loss(x, jnp.asarray(y), **options)

    value, pull = jax.vjp(loss, jnp.asarray(x))
    # The official order of operations loses log(1 - p) to the rounding of 1 - p: 6e-8 / 3e-4 at a logit of 8.
    np.testing.assert_allclose(value, float64.asymmetric_loss(x, y, axis=(), **options), atol=5e-4)
    slope = np.asarray(pull(jnp.ones_like(value))[0])
    np.testing.assert_allclose(slope, float64.gradient(x, y, axis=(), **options), atol=5e-4)


def test_optax_style_is_optax_where_optax_has_the_loss():
    random = np.random.default_rng(2)
    x = jnp.asarray(random.normal(0, 5, 500), jnp.float32)
    y = jnp.asarray(random.random(500) < 0.3, jnp.float32)
    ours = autodiff.optax_style(x, y, gamma_neg=0.0, gamma_pos=0.0, clip=0.0)
    np.testing.assert_allclose(ours, optax.sigmoid_binary_cross_entropy(x, y), rtol=1e-5, atol=1e-6)
    ours = autodiff.optax_style(x, y, gamma_neg=2.0, gamma_pos=2.0, clip=0.0)
    np.testing.assert_allclose(ours, optax.sigmoid_focal_loss(x, y, gamma=2.0), rtol=1e-5, atol=1e-6)


def test_official_loses_the_gradient_of_a_lost_positive_and_closed_form_keeps_it():
    x, y = jnp.asarray([-25.0]), jnp.asarray([1])
    lost = jax.grad(lambda x: autodiff.official(x, y).sum())(x)
    kept = jax.grad(lambda x: closed_form.asymmetric_loss(x, y).sum())(x)
    assert abs(lost[0]) < 1e-6
    np.testing.assert_allclose(kept, float64.gradient(np.asarray(x), y), atol=1e-6)


def test_the_yardstick_of_every_other_test_is_itself_right_under_every_argument():
    """A yardstick with an error of its own would let any implementation pass."""
    random = np.random.default_rng(4)
    shape = (6, 5, 33)
    x, y = logits_of(shape), labels_of(shape, dtype="float32")
    arrays = {
        "where": random.random(shape) < 0.8,
        "weights": random.uniform(0, 1.5, shape).astype(np.float32),
        "pos_weight": random.uniform(0, 1.5, shape[-1]).astype(np.float32),
    }
    for axis in (-1, (), None):
        for stop in (False, True):
            for gamma_neg, gamma_pos, clip in GAMMAS_AND_CLIP:
                options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip, "axis": axis}
                options |= {"label_smoothing": 0.2, "stop_focus_gradient": stop, **arrays}
                truth, true_slope = true_pair(x, y, 1.0, **options)
                careful, careful_slope = careful_pair(x, y, 1.0, **options)
                assert scaled_error(careful, truth).max() < 1e-6
                near = away_from_the_margin(x, clip)
                assert scaled_error(careful_slope, true_slope)[near].max() < 1e-6
