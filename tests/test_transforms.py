"""jit, vmap, scan, checkpoint, second derivatives and export: each gives what the plain call gives."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import GAMMAS_AND_CLIP, assert_no_worse, careful_pair, labels_of, logits_of, true_pair

from asl_pallas import asymmetric_loss
from reference import float64

SHAPE = (4, 3, 33)


def assert_like_float64(value: Any, x: Any, y: Any, **options: Any) -> None:
    truth, _ = true_pair(x, y, 1.0, **options)
    careful, _ = careful_pair(x, y, 1.0, **options)
    assert_no_worse(np.asarray(value), truth, careful, "loss")


def assert_gradient_like_float64(slope: Any, x: Any, y: Any, cotangent: Any = 1.0, **options: Any) -> None:
    _, truth = true_pair(x, y, cotangent, **options)
    _, careful = careful_pair(x, y, cotangent, **options)
    assert_no_worse(np.asarray(slope), truth, careful, "gradient")


@pytest.mark.mostly_long(short=1)
def test_eager_and_jitted_calls_agree(implementation):
    x, y = jnp.asarray(logits_of(SHAPE)), jnp.asarray(labels_of(SHAPE))

    def loss(x: Any) -> Any:
        return asymmetric_loss(x, y, axis=None, implementation=implementation)

    plain, slope = jax.value_and_grad(loss)(x)
    jitted, jitted_slope = jax.jit(jax.value_and_grad(lambda x: loss(x)))(x)
    np.testing.assert_allclose(plain, jitted, rtol=1e-6)
    np.testing.assert_allclose(slope, jitted_slope, rtol=1e-6, atol=1e-7)
    assert_gradient_like_float64(slope, np.asarray(x), y, axis=None)


@pytest.mark.mostly_long(short=1)
def test_one_two_and_four_dimensions_give_the_same_losses(implementation):
    flat, labels = logits_of((12, 33)), labels_of((12, 33))
    whole = asymmetric_loss(flat, labels, implementation=implementation)
    assert_like_float64(whole, flat, labels)
    four = asymmetric_loss(flat.reshape(2, 3, 2, 33), labels.reshape(2, 3, 2, 33), implementation=implementation)
    np.testing.assert_allclose(four.reshape(12), whole, rtol=1e-6)
    one = asymmetric_loss(flat[5], labels[5], implementation=implementation)
    assert one.shape == ()
    np.testing.assert_allclose(one, whole[5], rtol=1e-6)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("in_axis", [0, 1, 2])
def test_vmap_over_any_leading_dimension_is_the_batched_call(implementation, in_axis):
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    where = np.random.default_rng(0).random(SHAPE) < 0.8
    x = np.where(where, x, np.float32(np.nan))

    def loss(x: Any, y: Any, where: Any) -> Any:
        return asymmetric_loss(x, y, where=where, implementation=implementation)

    moved = [np.moveaxis(a, 0, in_axis) if in_axis < 2 else a[0] for a in (x, y, where)]
    if in_axis == 2:  # one example at a time: logits of one dimension
        found = jax.vmap(loss)(*moved)
        assert_like_float64(found, x[0], y[0], where=where[0])
        return
    found = jax.vmap(loss, in_axes=in_axis)(*moved)
    assert_like_float64(found, x, y, where=where)
    ct = np.random.default_rng(1).normal(size=SHAPE[:2]).astype(np.float32)

    def slope(x: Any, y: Any, where: Any, ct: Any) -> Any:
        return jax.vjp(lambda x: loss(x, y, where), x)[1](ct)[0]

    found = jax.vmap(slope, in_axes=(in_axis, in_axis, in_axis, 0))(*moved, ct)
    assert_gradient_like_float64(found, x, y, ct, where=where)


@pytest.mark.mostly_long(short=1)
def test_vmap_of_logits_alone_shares_labels_and_masks(implementation):
    x, y = logits_of(SHAPE), labels_of(SHAPE[1:])
    weights = np.linspace(0, 1, 33, dtype=np.float32)
    found = jax.vmap(lambda x: asymmetric_loss(x, y, weights=weights, implementation=implementation))(x)
    assert_like_float64(found, x, np.broadcast_to(y, SHAPE), weights=weights)


@pytest.mark.mostly_long(short=1)
def test_vmap_over_gammas_and_clips_gives_each_its_own_loss_and_gradient(implementation):
    x, y = logits_of((5, 33)), labels_of((5, 33))
    numbers = [(0.0, 0.0, 0.0), (4.0, 1.0, 0.05), (2.5, 0.5, 0.3)]

    def total(x: Any, gamma_neg: Any, gamma_pos: Any, clip: Any) -> Any:
        return asymmetric_loss(
            x,
            y,
            gamma_neg=gamma_neg,
            gamma_pos=gamma_pos,
            clip=clip,
            axis=None,
            implementation=implementation,
        )

    columns = [jnp.asarray(column, jnp.float32) for column in zip(*numbers, strict=True)]
    values, slopes = jax.vmap(jax.value_and_grad(total), in_axes=(None, 0, 0, 0))(jnp.asarray(x), *columns)
    for value, slope, (gamma_neg, gamma_pos, clip) in zip(values, slopes, numbers, strict=True):
        options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip, "axis": None}
        assert_like_float64(value, x, y, **options)
        assert_gradient_like_float64(slope, x, y, **options)


@pytest.mark.mostly_long(short=1)
def test_a_scan_over_batches_sums_what_the_batches_give(implementation):
    """As in gradient accumulation, with a schedule of gamma_neg as the scan's own input."""
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    schedule = np.array([0.0, 1.0, 2.5, 4.0], np.float32)

    @jax.jit
    def accumulate(shift: Any) -> Any:
        def step(carry: Any, batch: Any) -> Any:
            x, y, gamma = batch
            return carry + asymmetric_loss(
                x + shift, y, gamma_neg=gamma, clip=0.0, axis=None, implementation=implementation
            ), None

        return jax.lax.scan(step, jnp.float32(0), (x, y, schedule))[0]

    value, slope = jax.value_and_grad(accumulate)(jnp.float32(0))
    options = {"clip": 0.0, "axis": None}
    truth = sum(float64.asymmetric_loss(x[i], y[i], gamma_neg=schedule[i], **options) for i in range(4))
    true_slope = sum(float64.gradient(x[i], y[i], gamma_neg=schedule[i], **options).sum() for i in range(4))
    np.testing.assert_allclose(value, truth, rtol=1e-6)
    np.testing.assert_allclose(slope, true_slope, rtol=1e-5, atol=1e-5)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize(
    "policy", [None, jax.checkpoint_policies.everything_saveable, jax.checkpoint_policies.dots_saveable]
)
def test_checkpoint_changes_nothing(implementation, policy):
    x, y = jnp.asarray(logits_of(SHAPE)), jnp.asarray(labels_of(SHAPE))

    def total(x: Any, y: Any) -> Any:
        return asymmetric_loss(x * 1.0, y, axis=None, implementation=implementation)

    plain = jax.value_and_grad(total)(x, y)
    kept = jax.value_and_grad(jax.checkpoint(total, policy=policy))(x, y)
    np.testing.assert_allclose(kept[0], plain[0], rtol=1e-6)
    np.testing.assert_allclose(kept[1], plain[1], rtol=1e-6, atol=1e-7)


def second_derivative(
    x: Any, y: Any, implementation: str | None, v: Any = 1.0, where: Any = None, **options: Any
) -> Any:
    """The derivative of sum(v * gradient): v times the diagonal of the Hessian."""
    return _second_derivative(implementation, tuple(options.items()))(jnp.asarray(x), y, v, where)


@functools.cache
def _second_derivative(implementation: str | None, options: tuple[tuple[str, Any], ...]) -> Any:
    def slope(x: Any, y: Any, where: Any) -> Any:
        call = functools.partial(asymmetric_loss, axis=None, implementation=implementation, **dict(options))
        return jax.grad(lambda x: call(x, y, where=where))(x)

    return jax.jit(jax.grad(lambda x, y, v, where: jnp.sum(v * slope(x, y, where))))


def true_second_derivative(x: Any, y: Any, **options: Any) -> Any:
    step = 1e-5
    x = np.asarray(x, np.float64)
    up, down = (float64.gradient(x + sign * step, y, axis=None, **options) for sign in (1, -1))
    return (up - down) / (2 * step)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), GAMMAS_AND_CLIP)
def test_reverse_over_reverse_is_the_curvature_of_float64(implementation, gamma_neg, gamma_pos, clip):
    assert_curvature(implementation, gamma_neg, gamma_pos, clip, "int8")


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), GAMMAS_AND_CLIP)
def test_reverse_over_reverse_is_right_for_soft_labels(gamma_neg, gamma_pos, clip):
    assert_curvature(None, gamma_neg, gamma_pos, clip, "float32")


def assert_curvature(
    implementation: str | None, gamma_neg: float, gamma_pos: float, clip: float, labels_dtype: str
) -> None:
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
    margin = np.log(clip / (1 - clip)) if clip else -np.inf
    x = np.random.default_rng(0).normal(0, 4, (5, 33)).astype(np.float32)
    x[0, :6] = [0.0, -0.0, 30, -30, 80, -80]
    x = np.where(np.abs(x - margin) < 0.05, np.float32(margin + 0.1), x).astype(np.float32)
    y = labels_of(x.shape, dtype=labels_dtype)
    v = np.random.default_rng(1).normal(0, 1, x.shape).astype(np.float32)
    found = second_derivative(x, y, implementation, v, **options)
    truth = v * true_second_derivative(x, y, **options)
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=2e-5)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize(
    ("gamma_neg", "gamma_pos", "clip"),
    [case for case in GAMMAS_AND_CLIP if case[2] != 0.5],  # there a logit of 0 is the margin itself
)
def test_the_curvature_at_a_logit_of_exactly_zero_is_right(gamma_neg, gamma_pos, clip, label):
    """abs and max have no derivative at 0, and autodiff makes one up; logits start at 0 in many models."""
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
    x, y = np.zeros((1, 2), np.float32), np.full((1, 2), label, np.int8)
    found = second_derivative(x, y, None, **options)
    np.testing.assert_allclose(found, true_second_derivative(x, y, **options), atol=2e-6)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("labels_dtype", ["int8", "float32"])
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), GAMMAS_AND_CLIP)
def test_the_curvature_is_finite_at_infinity_and_beside_the_margin(gamma_neg, gamma_pos, clip, labels_dtype):
    margin = np.float32(np.log(clip / (1 - clip))) if clip else np.float32(-3)
    beside = [np.nextafter(margin, np.float32(-99)), margin, np.nextafter(margin, np.float32(99))]
    far = [np.inf, 3e38, 1e4, 104, 86, 79, 60, 45]
    x = np.array([[*far, *(-n for n in far), *beside]], np.float32)
    for label in (0, 1):
        y = np.full(x.shape, label, labels_dtype)
        options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
        found = np.asarray(second_derivative(x, y, None, **options))
        assert np.isfinite(found).all(), dict(zip(x[0].tolist(), found[0].tolist(), strict=True))
        np.testing.assert_allclose(found[0, : 2 * len(far)], 0, atol=1e-6)


def test_masked_nans_do_not_reach_the_second_derivative():
    x, y = logits_of((5, 33)), labels_of((5, 33))
    x = x.clip(-20, 20)
    where = np.random.default_rng(0).random(x.shape) < 0.7
    poisoned = np.where(where, x, np.float32(np.nan))
    found = second_derivative(poisoned, y, None, where=where, clip=0.0)
    truth = np.where(where, true_second_derivative(x, y, clip=0.0), 0)
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=2e-5)


def test_the_gradient_of_a_gradient_penalty_reaches_weights_of_a_model():
    """Two derivatives through a product, as a user meets them; checked by differences in float64."""
    random = np.random.default_rng(0)
    features, kernel = (random.normal(0, 1, n).astype(np.float32) for n in ((6, 4), (4, 5)))
    y = labels_of((6, 5))

    def penalty(kernel: Any) -> Any:
        slope = jax.grad(lambda f: asymmetric_loss(f @ kernel, y, clip=0.0, axis=None))(jnp.asarray(features))
        return jnp.sum(slope**2)

    def true_penalty(kernel: Any) -> Any:
        slope = float64.gradient(features.astype(np.float64) @ kernel, y, clip=0.0, axis=None)
        return np.sum((slope @ kernel.T) ** 2)

    found = jax.grad(penalty)(jnp.asarray(kernel))
    for index in [(0, 0), (3, 4), (2, 1)]:
        step = np.zeros(kernel.shape)
        step[index] = 1e-5
        rise = true_penalty(kernel + step) - true_penalty(kernel - step)
        assert float(found[index]) == pytest.approx(rise / 2e-5, rel=1e-4, abs=1e-5)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("implementation_by_name", [None, "xla"])
def test_an_export_round_trip_keeps_loss_and_gradient(implementation_by_name):
    x, y = logits_of((33, 80)), labels_of((33, 80))

    @jax.jit
    def loss(x: Any, y: Any, gamma: Any) -> Any:
        gamma = jax.lax.stop_gradient(gamma)  # vjp_order differentiates in every argument
        return asymmetric_loss(x, y, gamma_neg=gamma, axis=None, implementation=implementation_by_name)

    exported = jax.export.export(loss)(
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct(y.shape, y.dtype),
        jax.ShapeDtypeStruct((), np.float32),
    )
    back = jax.export.deserialize(exported.serialize(vjp_order=1))
    np.testing.assert_array_equal(back.call(x, y, np.float32(4)), loss(x, y, np.float32(4)))
    slope = jax.grad(lambda x: back.call(x, y, np.float32(4)))(jnp.asarray(x))
    assert_gradient_like_float64(slope, x, y, axis=None)


def test_an_export_of_the_gradient_step_itself_round_trips():
    """The usual way to ship a step: differentiated first, exported after, with int labels and a mask."""
    x, y = logits_of((33, 80)), labels_of((33, 80))
    where = np.random.default_rng(0).random((33, 80)) < 0.8
    step = jax.jit(jax.value_and_grad(lambda x, y, where: asymmetric_loss(x, y, where=where, axis=None)))
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, y, where)]
    back = jax.export.deserialize(jax.export.export(step)(*shapes).serialize())
    value, slope = back.call(x, y, where)
    assert_like_float64(value, x, y, where=where, axis=None)
    assert_gradient_like_float64(slope, x, y, where=where, axis=None)


def test_recompilation_is_not_needed_for_another_gamma():
    x, y = logits_of((5, 33)), labels_of((5, 33))
    traces = []

    @jax.jit
    def loss(x: Any, gamma: Any) -> Any:
        traces.append(gamma)
        return asymmetric_loss(x, y, gamma_neg=gamma)

    first, second = loss(x, 1.0), loss(x, 2.0)
    assert len(traces) == 1
    assert_like_float64(first, x, y, gamma_neg=1.0)
    assert_like_float64(second, x, y, gamma_neg=2.0)
