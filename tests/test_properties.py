"""What holds for any logits and labels whatever, found by hypothesis.

Shapes are fixed, so each property compiles once an implementation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import assert_no_worse, careful_pair, evaluate, true_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

SHAPE = (3, 11)
ONES = np.ones(SHAPE, np.float32)
EVERY = ("gamma_neg", "gamma_pos", "clip")

# The implementation is a fixture that only enters a context, so it may outlive an example.
examples = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

ordinary = st.floats(-40, 40, width=32)
any_float = st.floats(allow_nan=False, width=32)
logits = hnp.arrays(np.float32, SHAPE, elements=ordinary | any_float)
moderate = hnp.arrays(np.float32, SHAPE, elements=ordinary)
labels = hnp.arrays(np.int8, SHAPE, elements=st.integers(0, 1))
soft_labels = hnp.arrays(np.float32, SHAPE, elements=st.floats(0, 1, width=32))
masks = hnp.arrays(np.bool_, SHAPE)
# Exponents as people use them: 0, fractions, integers.
gammas = st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0]) | st.floats(0, 8, width=32)
clips = st.sampled_from([0.0, 0.05, 0.5]) | st.floats(0, 0.875, width=32)


def by_element(x: Any, y: Any, implementation: str, **options: Any) -> tuple[Any, Any]:
    traced = tuple(name for name in EVERY if name in options)
    return evaluate(x, y, ONES, implementation=implementation, traced=traced, axis=(), **options)


@pytest.mark.mostly_long(short=1)
@examples
@given(x=logits, y=labels, gamma_neg=gammas, gamma_pos=gammas, clip=clips)
def test_the_loss_is_never_negative_and_never_nan(implementation, x, y, gamma_neg, gamma_pos, clip):
    value, slope = by_element(x, y, implementation, gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip)
    assert (value >= 0).all()
    assert np.isfinite(slope).all()
    assert np.isfinite(value[np.isfinite(x)]).all()


@pytest.mark.mostly_long(short=1)
@examples
@given(x=logits, y=soft_labels)
def test_the_loss_of_soft_labels_is_never_negative_and_never_nan(implementation, x, y):
    value, slope = by_element(x, y, implementation)
    assert (value >= 0).all()
    assert np.isfinite(slope).all()


@pytest.mark.mostly_long(short=1)
@examples
@given(x=moderate, y=labels, gamma_neg=gammas, gamma_pos=gammas)
def test_loss_and_gradient_match_float64_for_any_gammas(implementation, x, y, gamma_neg, gamma_pos):
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": 0.0}
    value, slope = by_element(x, y, implementation, **options)
    truth, true_slope = true_pair(x, y, ONES, axis=(), **options)
    careful, careful_slope = careful_pair(x, y, ONES, axis=(), **options)
    assert_no_worse(value, truth, careful, "loss")
    assert_no_worse(slope, true_slope, careful_slope, "gradient")


@pytest.mark.mostly_long(short=2)
@examples
@given(x=logits, clip=st.floats(2.0**-6, 0.875, width=32), gamma_neg=gammas)
def test_negatives_below_the_margin_are_exactly_zero_with_their_gradient(implementation, x, clip, gamma_neg):
    value, slope = by_element(x, np.zeros(SHAPE, np.int8), implementation, gamma_neg=gamma_neg, clip=clip)
    p = 1 / (1 + np.exp(-np.clip(x.astype(np.float64), -700, 700)))
    below, above = p < clip * (1 - 1e-6), p > clip * (1 + 1e-6)
    assert not value[below].any() and not slope[below].any()
    if gamma_neg <= 4:  # a higher power of a p_m of 1e-7 is below the smallest float32
        assert (value[above & (p - clip > 1e-6)] > 0).all()


@pytest.mark.mostly_long(short=1)
@examples
@given(x=logits, gamma_neg=gammas, gamma_pos=gammas, clip=clips)
def test_gradients_push_positives_up_and_negatives_down(implementation, x, gamma_neg, gamma_pos, clip):
    for label, sign in ((1, -1), (0, 1)):
        y = np.full(SHAPE, label, np.int8)
        _, slope = by_element(x, y, implementation, gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip)
        assert (sign * slope >= 0).all()


@pytest.mark.mostly_long(short=1)
@examples
@given(x=logits, step=st.floats(0, 50, width=32), gamma_neg=gammas, gamma_pos=gammas, clip=clips)
def test_the_loss_falls_in_a_positives_logit_and_rises_in_a_negatives(
    implementation, x, step, gamma_neg, gamma_pos, clip
):
    """Both slopes have one sign everywhere; rounding may turn that by some 1e-6 of the value."""
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
    with np.errstate(over="ignore"):
        higher = x + np.float32(step)
    for label, sign in ((1, -1), (0, 1)):
        y = np.full(SHAPE, label, np.int8)
        before, _ = by_element(x, y, implementation, **options)
        after, _ = by_element(higher, y, implementation, **options)
        smaller, larger = (before, after) if sign > 0 else (after, before)
        assert (smaller <= larger.astype(np.float64) * (1 + 4e-6) + 1e-6).all()


@pytest.mark.mostly_long(short=1)
@examples
@given(x=logits, y=labels, where=masks, order=st.permutations(range(SHAPE[1])))
def test_the_order_of_the_classes_does_not_matter(implementation, x, y, where, order):
    weights = np.linspace(0, 2, SHAPE[1], dtype=np.float32)
    pos_weight = np.linspace(3, 0.5, SHAPE[1], dtype=np.float32)
    ct = np.array([1, -2, 0.5], np.float32)
    # A weight of 0 times an infinite loss has no value; the weights here are for the finite ones.
    x = np.clip(x, -1e30, 1e30)
    value, slope = evaluate(
        x, y, ct, implementation=implementation, where=where, weights=weights, pos_weight=pos_weight
    )
    moved, moved_slope = evaluate(
        x[:, order],
        y[:, order],
        ct,
        implementation=implementation,
        where=where[:, order],
        weights=weights[order],
        pos_weight=pos_weight[order],
    )
    np.testing.assert_allclose(moved, value, rtol=1e-6)
    np.testing.assert_array_equal(moved_slope, slope[:, order])


@pytest.mark.mostly_long(short=1)
@examples
@given(x=moderate, y=labels, where=masks, poison=st.sampled_from([np.nan, np.inf, -np.inf, 3e38]))
def test_what_is_masked_has_no_effect_on_loss_or_gradient(implementation, x, y, where, poison):
    ct = np.array([1, -2, 0.5], np.float32)
    value, slope = evaluate(x, y, ct, implementation=implementation, where=where)
    poisoned = np.where(where, x, np.float32(poison))
    again, slope_again = evaluate(poisoned, y, ct, implementation=implementation, where=where)
    np.testing.assert_array_equal(again, value)
    np.testing.assert_array_equal(slope_again, slope)
    assert not slope[~where].any()
    ignored = np.where(where, y, -1).astype(np.int8)
    again, slope_again = evaluate(poisoned, ignored, ct, implementation=implementation, ignore_label=-1)
    np.testing.assert_allclose(again, value, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(slope_again, slope, rtol=1e-6, atol=1e-7)


@pytest.mark.mostly_long(short=1)
@examples
@given(x=moderate, y=labels, poison=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_one_examples_poison_stays_in_its_own_row(implementation, x, y, poison):
    ones = np.ones(SHAPE[0], np.float32)
    value, slope = evaluate(x, y, ones, implementation=implementation)
    poisoned = x.copy()
    poisoned[1] = poison
    again, slope_again = evaluate(poisoned, y, ones, implementation=implementation)
    np.testing.assert_array_equal(again[[0, 2]], value[[0, 2]])
    np.testing.assert_array_equal(slope_again[[0, 2]], slope[[0, 2]])
    assert np.isnan(again[1]) == np.isnan(poison)


@pytest.mark.mostly_long(short=1)
@examples
@given(x=moderate, y=soft_labels, clip=clips, gamma_neg=gammas)
def test_a_sum_over_classes_is_the_sum_of_the_elements(implementation, x, y, clip, gamma_neg):
    options = {"gamma_neg": gamma_neg, "clip": clip}
    elements, slope = by_element(x, y, implementation, **options)
    rows, slope_of_rows = evaluate(
        x, y, ONES[:, 0], implementation=implementation, traced=("gamma_neg", "clip"), **options
    )
    np.testing.assert_allclose(rows, elements.astype(np.float64).sum(axis=1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slope_of_rows, slope, rtol=1e-6, atol=1e-7)
