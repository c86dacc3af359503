"""Every implementation against float64: values and gradients, dtypes, sizes, extremes, the margin."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import (
    GAMMAS_AND_CLIP,
    HYPERPARAMETERS,
    KERNELS,
    assert_no_worse,
    assert_parity,
    careful_pair,
    cotangent_of,
    evaluate,
    labels_of,
    logits_of,
    scaled_error,
    true_pair,
)

from asl_pallas import asymmetric_loss
from reference import autodiff, float64

SHAPE = (33, 257)
# logits dtype, labels dtype
DTYPES = [
    ("float32", "bool"),
    ("float32", "uint8"),
    ("float32", "int32"),
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "int8"),
    ("bfloat16", "bool"),
    ("bfloat16", "float32"),
    ("float16", "int8"),
    ("float16", "float32"),
]
# What a kernel does not load, by implementation.
REFUSED: dict[str, set[str]] = {"mosaic_tpu": {"float16"}, "triton": set()}


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), GAMMAS_AND_CLIP)
def test_loss_and_gradient_match_float64(implementation, gamma_neg, gamma_pos, clip):
    assert_parity(
        logits_of(SHAPE),
        labels_of(SHAPE),
        implementation=implementation,
        gamma_neg=gamma_neg,
        gamma_pos=gamma_pos,
        clip=clip,
    )


@pytest.mark.mostly_long(short=1)
def test_one_compilation_with_traced_hyper_parameters_serves_every_gamma_and_clip(implementation):
    x, y = logits_of((5, 33)), labels_of((5, 33))
    gammas = [0.0, 0.5, 1.0, 2.5, 4.0]
    for i, gamma_neg in enumerate(gammas):
        for j, gamma_pos in enumerate(gammas):
            assert_parity(
                x,
                y,
                implementation=implementation,
                traced=("gamma_neg", "gamma_pos", "clip"),
                gamma_neg=gamma_neg,
                gamma_pos=gamma_pos,
                clip=[0.0, 0.05, 0.3][(i + j) % 3],
            )


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize("traced", [(), ("gamma_neg",), ("gamma_pos",), ("clip",), ("gamma_neg", "clip")])
def test_each_hyper_parameter_can_be_traced_while_the_others_are_not(implementation, traced):
    options = {"gamma_neg": 2.5, "gamma_pos": 1.0, "clip": 0.1}
    assert_parity(logits_of((5, 33)), labels_of((5, 33)), implementation=implementation, traced=traced, **options)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize(("logits_dtype", "labels_dtype"), DTYPES)
def test_every_dtype_matches_float64_on_its_rounded_inputs(implementation, logits_dtype, labels_dtype):
    x, y = logits_of((33, 80), dtype=logits_dtype), labels_of((33, 80), dtype=labels_dtype)
    if logits_dtype in REFUSED.get(implementation, set()):
        with pytest.raises(NotImplementedError, match=f"(?s){implementation}.*{logits_dtype}"):
            evaluate(x, y, cotangent_of((33,)), implementation=implementation)
    else:
        assert_parity(x, y, implementation=implementation)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("labels_dtype", ["bool", "int8", "float32", "float64"])
def test_float64_logits_are_computed_in_float64(labels_dtype):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(0, 6, (33, 80))
        x.reshape(-1)[:8] = [0, 30, -30, 700, -700, 1e4, -1e4, 1e-300]
        for options in ({}, {"gamma_neg": 0.5, "gamma_pos": 2.5, "clip": 0.0}):
            assert_parity(x, labels_of((33, 80), dtype=labels_dtype), implementation=None, **options)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_by_name_refuses_float64_logits(kernel):
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match=f"(?s){kernel}.*float64"):
        asymmetric_loss(np.zeros((3, 4)), np.zeros((3, 4), np.int8), implementation=kernel)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (33, 1), (1, 7), (33, 7), (33, 80), (1, 257), (1, 9605), (33, 9605), (2, 40009), (2, 3, 5, 7), (7,), (1,)],
)
def test_every_size_matches_float64(implementation, shape):
    assert_parity(logits_of(shape), labels_of(shape), implementation=implementation)


@pytest.mark.mostly_long(short=5)
@pytest.mark.parametrize("shape", [(0, 1), (0, 80), (3, 0, 80), (3, 0), (0,), (0, 0)])
@pytest.mark.parametrize("axis", [-1, (), None])
def test_an_empty_batch_has_an_empty_loss_and_an_empty_gradient(implementation, shape, axis):
    x, y = np.zeros(shape, np.float32), np.zeros(shape, np.int8)
    like = float64.asymmetric_loss(x, y, axis=axis)
    value, slope = evaluate(x, y, np.ones(like.shape, np.float32), implementation=implementation, axis=axis)
    assert value.shape == like.shape and not value.any()
    assert slope.shape == shape and slope.dtype == np.float32


@pytest.mark.mostly_long(short=1)
def test_blocks_of_rows_and_classes_with_ragged_edges_match_float64(implementation):
    """Several blocks each way, every array argument in a shape of its own, NaN where masked."""
    shape = (530, 2309)
    random = np.random.default_rng(5)
    where = random.random(shape) < 0.9
    x = np.where(where, logits_of(shape), np.nan).astype(np.float32)
    y = labels_of(shape, ignore_label=-1)
    assert_parity(
        x,
        y,
        implementation=implementation,
        where=where,
        weights=random.uniform(0, 1.5, shape).astype(np.float32),
        pos_weight=random.uniform(0, 1.5, shape[1]).astype(np.float32),
        ignore_label=-1,
    )


FOCUSES = [(4.0, 1.0, 0.05), (0.5, 0.0, 0.0), (0.0, 0.5, 0.2)]
AXES = [-1, (), None]
# Soft labels with every focus and axis, and each of them once with hard ones: every pair is there.
LIMITS = [(focus, axis, i == j) for i, focus in enumerate(FOCUSES) for j, axis in enumerate(AXES)]


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize(("focus", "axis", "hard_too"), LIMITS)
def test_extreme_logits_give_the_limits_of_the_formula(implementation, focus, axis, hard_too):
    extreme = [
        30,
        -30,
        88.8,
        -88.8,
        104,
        -104,
        1e4,
        -1e4,
        3e38,
        -3e38,
        np.inf,
        -np.inf,
        0.0,
        -0.0,
        1e-40,
        -1e-40,
    ]
    x = np.repeat(np.array(extreme, np.float32), 3)[:, None]
    y = np.tile(np.array([0, 1, 0.25], np.float32), len(extreme))[:, None]
    ct = np.float32(1.0) if axis is None else np.ones(x.shape if axis == () else x.shape[:1], np.float32)
    options = {**dict(zip(HYPERPARAMETERS, focus, strict=True)), "axis": axis}
    assert_parity(x, y, implementation=implementation, cotangent=ct, **options)
    if not hard_too:
        return
    hard = y[:, 0] != 0.25
    assert_parity(
        x[hard],
        y[hard].astype(np.int8),
        implementation=implementation,
        cotangent=ct if axis is None else ct[hard],
        **options,
    )


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("labels_dtype", ["int8", "float32"])
def test_nan_in_gives_nan_out_in_its_own_row_and_its_own_gradient_only(implementation, labels_dtype):
    x, y = logits_of((33, 80)), labels_of((33, 80), dtype=labels_dtype)
    clean, clean_slope = evaluate(x, y, np.ones(33, np.float32), implementation=implementation)
    y[4, 7], y[9, 3] = 0, 1
    dirty = x.copy()
    dirty[4, 7] = dirty[9, 3] = np.nan
    value, slope = evaluate(dirty, y, np.ones(33, np.float32), implementation=implementation)
    np.testing.assert_array_equal(np.isnan(value), np.isin(np.arange(33), [4, 9]))
    np.testing.assert_array_equal(np.isnan(slope), np.isnan(dirty))
    others = ~np.isnan(value)
    np.testing.assert_array_equal(value[others], clean[others])
    np.testing.assert_array_equal(slope[others], clean_slope[others])


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("clip", [0.05, 0.2, 0.5, 0.95])
def test_within_a_few_ulps_of_the_margin_either_side_is_right_and_nothing_else(implementation, clip):
    at = np.float32(np.log(clip / (1 - clip)))
    x = [at]
    for _ in range(40):
        x = [np.nextafter(x[0], np.float32(-9)), *x, np.nextafter(x[-1], np.float32(9))]
    x = np.array(x, np.float32)[:, None]
    # sigmoid and clip are each rounded: p is in doubt by a few float32 roundings, and dx = dp / (p (1 - p)).
    doubt = 4 * float(np.finfo(np.float32).eps) * max(clip, 1 - clip) / (clip * (1 - clip))
    y, ct = np.zeros(x.shape, np.int8), np.ones(x.shape[0], np.float32)
    for gamma in (0.0, 0.5, 1.0, 4.0):
        options = {"gamma_neg": gamma, "gamma_pos": 1.0, "clip": clip}
        value, slope = evaluate(x, y, ct, implementation=implementation, traced=("gamma_neg", "clip"), **options)
        # Loss and gradient of a negative both rise with the logit, so the ends of the doubt bound them.
        low, low_slope = true_pair(x.astype(np.float64) - doubt, y, ct, **options)
        high, high_slope = true_pair(x.astype(np.float64) + doubt, y, ct, **options)
        assert np.all((value >= low - 1e-6) & (value <= high + 1e-6)), f"gamma_neg={gamma}"
        assert np.all((slope >= low_slope - 1e-6) & (slope <= high_slope + 1e-6)), f"gamma_neg={gamma}"
        below = high == 0
        assert np.all(value[below] == 0) and np.all(slope[below[:, None]] == 0)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("gamma", [0.5, 0.25, 1.5])
def test_gammas_that_are_not_integers_stay_finite_below_at_and_above_the_margin(implementation, gamma):
    """0 ** (gamma - 1) is infinite for gamma < 1."""
    x = np.array([[-np.inf, -1e4, -50, -3, np.log(0.25 / 0.75), -1, 0, 3, 50, 1e4]], np.float32)
    for clip in (0.0, 0.25):
        options = {"gamma_neg": gamma, "gamma_pos": gamma, "clip": clip, "axis": ()}
        for label in (0, 1):
            y, ct = np.full(x.shape, label, np.int8), np.ones(x.shape, np.float32)
            value, slope = evaluate(x, y, ct, implementation=implementation, **options)
            truth, true_slope = true_pair(x, y, ct, **options)
            careful, careful_slope = careful_pair(x, y, ct, **options)
            assert np.isfinite(slope).all()
            assert_no_worse(value, truth, careful, "loss")
            off_margin = np.arange(x.size) != 4
            assert_no_worse(slope[0, off_margin], true_slope[0, off_margin], careful_slope[0, off_margin], "gradient")


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_half_precision_has_no_nan_and_no_infinity_at_any_finite_logit(gamma, dtype):
    largest = float(jnp.finfo(dtype).max)
    x = np.array([[-largest, -1e4, -100, -20, -12, 0, 12, 20, 100, 1e4, largest]]).astype(jnp.dtype(dtype))
    for label in (0, 1):
        for clip in (0.0, 0.05):
            y = np.full(x.shape, label, np.int8)
            options = {"gamma_neg": gamma, "gamma_pos": gamma, "clip": clip, "axis": ()}
            value, slope = assert_parity(x, y, implementation=None, cotangent=np.ones(x.shape, np.float32), **options)
            assert np.isfinite(value).all() and np.isfinite(slope.astype(np.float32)).all()
            assert (value >= 0).all()


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("name", [None, "xla", "triton"])
def test_a_float16_gradient_under_a_loss_scale_does_not_vanish(name):
    """Unscaled, these gradients lie below float16's smallest number; times 2^15 they do not."""
    x = np.array([[8.5, 9.0, 10.0, 11.0]], np.float16)
    y, ct = np.ones(x.shape, np.int8), np.array([2.0**15], np.float32)
    _, slope = evaluate(x, y, ct, implementation=name)
    truth = float64.gradient(x, y, ct)
    assert (np.abs(truth / 2**15) < 6e-8).any() and (np.abs(truth) > 1e-6).all()
    np.testing.assert_allclose(slope.astype(np.float64), truth, rtol=2e-3)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("logit", [8.0, 12.0, 16.0])
def test_thousands_of_easy_elements_do_not_add_up_to_rounding_errors(implementation, logit):
    """log of a rounded 1 + e^-16 is 6 % off, the same way each time, and nothing focuses it away."""
    for label, sign in ((1, 1), (0, -1)):
        x = np.full((1, 9605), sign * logit, np.float32)
        y = np.full(x.shape, label, np.int8)
        options = {"gamma_neg": 0.0, "gamma_pos": 0.0, "clip": 0.0}
        assert_parity(x, y, implementation=implementation, cotangent=np.ones(1, np.float32), **options)


def test_no_implementation_named_is_xla_on_a_cpu_to_the_bit():
    x, y, ct = logits_of(SHAPE), labels_of(SHAPE), cotangent_of((33,))
    chosen, named = (evaluate(x, y, ct, implementation=name) for name in (None, "xla"))
    np.testing.assert_array_equal(chosen[0], named[0])
    np.testing.assert_array_equal(chosen[1], named[1])


@pytest.mark.mostly_long(short=1)
def test_the_forward_alone_is_the_loss_that_the_gradient_pass_returns(implementation):
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    alone = jax.jit(lambda x, y: asymmetric_loss(x, y, implementation=implementation))(x, y)
    truth, _ = true_pair(x, y, np.ones(33))
    careful, _ = careful_pair(x, y, np.ones(33))
    assert_no_worse(np.asarray(alone), truth, careful, "loss without a gradient")
    with_gradient, _ = evaluate(x, y, np.ones(33, np.float32), implementation=implementation)
    np.testing.assert_allclose(alone, with_gradient, rtol=1e-6)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("labels_dtype", ["int8", "float32"])
def test_without_focus_and_margin_it_is_optax_sigmoid_binary_cross_entropy(implementation, labels_dtype):
    x, y = logits_of((33, 80)), labels_of((33, 80), dtype=labels_dtype)
    ct = cotangent_of(x.shape)
    value, slope = evaluate(x, y, ct, implementation=implementation, gamma_neg=0.0, gamma_pos=0.0, clip=0.0, axis=())
    theirs, pull = jax.vjp(lambda x: optax.sigmoid_binary_cross_entropy(x, jnp.asarray(y, jnp.float32)), jnp.asarray(x))
    np.testing.assert_allclose(value, theirs, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(slope, pull(jnp.asarray(ct))[0], rtol=2e-6, atol=1e-6)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 2.5])
def test_with_one_gamma_and_no_margin_it_is_optax_sigmoid_focal_loss(implementation, gamma):
    """On logits where optax keeps its digits: it has 1 - p_t from a difference."""
    x = np.random.default_rng(0).normal(0, 2, (33, 80)).clip(-6, 6).astype(np.float32)
    y, ct = labels_of((33, 80)), cotangent_of(x.shape)
    value, slope = evaluate(
        x, y, ct, implementation=implementation, gamma_neg=gamma, gamma_pos=gamma, clip=0.0, axis=()
    )
    theirs, pull = jax.vjp(
        lambda x: optax.sigmoid_focal_loss(x, jnp.asarray(y, jnp.float32), gamma=gamma), jnp.asarray(x)
    )
    np.testing.assert_allclose(value, theirs, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(slope, pull(jnp.asarray(ct))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.mostly_long(short=1)
def test_it_is_the_official_loss_on_moderate_logits_and_hard_labels(implementation):
    x = np.random.default_rng(0).normal(0, 2, (33, 80)).clip(-6, 6).astype(np.float32)
    y, ct = labels_of((33, 80)), cotangent_of(x.shape)
    value, slope = evaluate(x, y, ct, implementation=implementation, axis=())
    theirs, pull = jax.vjp(lambda x: autodiff.official(x, jnp.asarray(y)), jnp.asarray(x))
    np.testing.assert_allclose(value, theirs, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(slope, pull(jnp.asarray(ct))[0], rtol=1e-5, atol=2e-5)


@pytest.mark.mostly_long(short=1)
def test_soft_labels_blend_the_two_hard_losses_of_the_paper(implementation):
    x, soft = logits_of((33, 80)), labels_of((33, 80), dtype="float32")
    ct = np.ones(x.shape, np.float32)
    both = [
        evaluate(x, np.full(x.shape, label, np.int8), ct, implementation=implementation, axis=()) for label in (1, 0)
    ]
    value, slope = evaluate(x, soft, ct, implementation=implementation, axis=())
    (one, one_slope), (zero, zero_slope) = both
    np.testing.assert_allclose(value, soft * one + (1 - soft) * zero, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(slope, soft * one_slope + (1 - soft) * zero_slope, rtol=1e-6, atol=1e-6)


@pytest.mark.mostly_long(short=1)
def test_losses_per_element_have_the_gradients_of_their_own_cotangents(implementation):
    """One cotangent at a time: each reaches its own logit and no other."""
    x, y = logits_of((33, 80)), labels_of((33, 80))
    whole = float64.gradient(x, y, axis=())
    for index in [(0, 0), (32, 79), (17, 40)]:
        ct = np.zeros(x.shape, np.float32)
        ct[index] = -3
        _, slope = evaluate(x, y, ct, implementation=implementation, axis=())
        assert scaled_error(slope[index], -3 * whole[index]) < 4e-6
        others = slope.copy()
        others[index] = 0
        assert not others.any()


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cotangents_of_mixed_sign_zero_and_great_size_scale_each_example(implementation, dtype):
    x, y = logits_of((33, 80), dtype=dtype), labels_of((33, 80))
    ct = np.tile(np.array([0, 1, -1, 2.0**20, -(2.0**-20), 0.3], np.float32), 6)[:33]
    _, slope = evaluate(x, y, ct, implementation=implementation)
    truth = float64.gradient(x, y)
    assert not slope[ct == 0].astype(np.float32).any()
    for row in range(33):
        if ct[row] != 0:
            unscaled = slope[row].astype(np.float64) / np.float64(ct[row])
            eps = float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(unscaled, truth[row], rtol=max(eps, 1e-6) * 1.01, atol=2e-6)
