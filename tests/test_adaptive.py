"""Adaptive asymmetry in a closed loop, where a model is trained with the gamma that the controller sets."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asl_pallas import AdaptiveAsymmetry, AsymmetricLoss, AsymmetryState, multilabel_loss

ROWS, DEPTH, CLASSES = 256, 8, 20


def problem() -> tuple[jax.Array, jax.Array]:
    """Labels, 5 % of them positive, that a linear model predicts well and not perfectly."""
    random = np.random.default_rng(0)
    features = random.normal(size=(ROWS, DEPTH)).astype(np.float32)
    scores = features @ random.normal(size=(DEPTH, CLASSES)) + random.normal(0, 1.5, (ROWS, CLASSES))
    return jnp.asarray(features), jnp.asarray(scores > np.quantile(scores, 0.95))


def gap_of(logits: jax.Array, labels: jax.Array) -> jax.Array:
    p = jax.nn.sigmoid(logits)
    of_positives = jnp.mean(p, where=labels)
    return of_positives - jnp.mean(1 - p, where=~labels)


def closed_loop(controller: AdaptiveAsymmetry, steps: int, printed_sign: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """gamma_neg and the gap after each step."""
    features, labels = problem()

    def step(carry, _):
        weights, bias, state = carry

        def mean_loss(weights, bias):
            logits = features @ weights + bias
            loss = AsymmetricLoss(gamma_neg=state.gamma_neg, gamma_pos=1.0, clip=0.0)
            return multilabel_loss(loss, logits, labels, axis=None) / ROWS, logits

        gradients, logits = jax.grad(mean_loss, (0, 1), has_aux=True)(weights, bias)
        gap = gap_of(logits, labels)
        if printed_sign:
            gap = 2 * controller.target_gap - gap  # turns target - gap around
        state = controller.update(state, gap)
        weights, bias = weights - 2.0 * gradients[0], bias - 2.0 * gradients[1]
        return (weights, bias, state), (state.gamma_neg, gap_of(logits, labels))

    start = jnp.zeros((DEPTH, CLASSES)), jnp.zeros(CLASSES), controller.init()
    _, (gammas, gaps) = jax.jit(lambda start: jax.lax.scan(step, start, length=steps))(start)
    return np.asarray(gammas), np.asarray(gaps)


@pytest.mark.parametrize("start", [0.0, 8.0])
def test_it_reaches_the_target_from_both_sides_and_stays(start):
    controller = AdaptiveAsymmetry(target_gap=-0.1, rate=0.05, gamma_neg=start)
    gammas, gaps = closed_loop(controller, 4000)
    assert abs(gaps[5] - controller.target_gap) > 0.1
    np.testing.assert_allclose(gaps[-1000:], controller.target_gap, atol=0.01)
    assert controller.least < gammas[-1000:].min() <= gammas[-1000:].max() < controller.most
    assert np.ptp(gammas[-1000:]) < 0.2


def test_the_printed_sign_runs_away():
    controller = AdaptiveAsymmetry(target_gap=-0.1, rate=0.05, gamma_neg=3.0)
    gammas, gaps = closed_loop(controller, 4000, printed_sign=True)
    assert gammas[-1] in (controller.least, controller.most)
    assert abs(gaps[-1] - controller.target_gap) > 0.1


def test_a_step_with_the_state_among_its_arguments_is_compiled_once():
    controller = AdaptiveAsymmetry()
    features, labels = problem()

    @jax.jit
    def step(weights, state):
        logits = features @ weights
        loss = multilabel_loss(AsymmetricLoss(gamma_neg=state.gamma_neg), logits, labels, axis=None)
        return loss, controller.update(state, gap_of(logits, labels))

    state = controller.init()
    for _ in range(3):
        _, state = step(jnp.zeros((DEPTH, CLASSES)), state)
    assert step._cache_size() == 1
    assert float(state.gamma_neg) != controller.gamma_neg


def test_one_update():
    controller = AdaptiveAsymmetry(target_gap=0.1, rate=0.5, gamma_neg=2.0, most=2.2)
    state = controller.update(controller.init(), -0.3)
    np.testing.assert_allclose(state.gamma_neg, 2.2)  # 2 + 0.5 * 0.4, and the last is 2.4
    np.testing.assert_allclose(state.probability_gap, -0.3)
    np.testing.assert_allclose(controller.update(state, 0.5).gamma_neg, 2.0)
    unmoved = controller.update(state, jnp.nan)
    assert unmoved.gamma_neg == state.gamma_neg
    saved = jax.tree.map(np.asarray, state)._asdict()
    assert controller.update(AsymmetryState(**saved), 0.1).gamma_neg == state.gamma_neg


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target_gap": 1.0}, "target_gap=1.0; expected -1 < target_gap < 1"),
        ({"target_gap": -1.5}, "target_gap=-1.5; expected -1 < target_gap < 1"),
        ({"rate": -0.1}, "rate=-0.1; expected rate > 0"),
        ({"gamma_neg": 11.0}, "expected 0 <= least <= gamma_neg <= most"),
        ({"least": -1.0}, "expected 0 <= least <= gamma_neg <= most"),
        ({"rate": float("nan")}, "rate=nan; expected a finite Python number"),
    ],
)
def test_settings_out_of_range_are_named(options, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        AdaptiveAsymmetry(**options)


def test_a_state_or_a_gap_of_another_structure_is_named():
    controller = AdaptiveAsymmetry()
    state = controller.init()
    with pytest.raises(TypeError, match="expected an AsymmetryState, as of init"):
        controller.update({"gamma_neg": 1.0}, 0.1)
    with pytest.raises(TypeError, match=r"state\.gamma_neg is .*; expected a float scalar"):
        controller.update(state._replace(gamma_neg=jnp.zeros(3)), 0.1)
    with pytest.raises(ValueError, match=re.escape("probability_gap has shape (3,); expected a scalar")):
        controller.update(state, jnp.zeros(3))
