"""A sum's rounding error is bounded by the logarithm of what is summed, on every path and whatever the machine."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import evaluate, interpreted, optimising

from asl_pallas import asymmetric_loss, linear_asymmetric_loss, multilabel_loss
from asl_pallas.kernels.summation import add_exactly, sum_last, sum_over, total_of
from asl_pallas.losses import AsymmetricLoss, HillLoss
from reference import float64

CROSS_ENTROPY = {"gamma_neg": 0.0, "gamma_pos": 0.0, "clip": 0.0}
EPS = float(np.finfo(np.float32).eps)


def large_among_small(classes: int) -> tuple[Any, Any]:
    """A loss of 1e4 among losses of 3e-4, of which each alone is lost beside it."""
    x, y = np.full(classes, -8.0, np.float32), np.zeros(classes, np.int8)
    x[classes // 3], y[classes // 3] = -1e4, 1
    return x, y


def alternating(classes: int) -> tuple[Any, Any]:
    """Losses of 1000 and of 0.001 in turn."""
    x = np.tile(np.float32([-1000.0, -6.9]), (classes + 1) // 2)[:classes]
    return x, (x == -1000).astype(np.int8)


def equal(classes: int) -> tuple[Any, Any]:
    return np.full(classes, 0.3, np.float32), np.zeros(classes, np.int8)


ROWS = {"large among small": large_among_small, "alternating": alternating, "equal": equal}


def bound(truth: Any, summed: int) -> Any:
    """Roundings of a sum by groups, and a few of each summand."""
    return (np.log2(summed) + 6) * EPS * np.abs(truth)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(("rows", "classes"), [(1, 60_000), (7, 9_000), (1, 100_000), (2, 1_000_000), (64, 4_097)])
def test_on_the_cpu_a_row_of_any_length_is_summed_to_a_few_roundings(kind, rows, classes):
    x, y = (np.tile(row, (rows, 1)) for row in ROWS[kind](classes))
    truth = float64.asymmetric_loss(x, y, **CROSS_ENTROPY)
    with_gradient = evaluate(x, y, np.ones(rows, np.float32), implementation=None, **CROSS_ENTROPY)[0]
    alone = jax.jit(lambda x, y: asymmetric_loss(x, y, **CROSS_ENTROPY))(x, y)
    total = jax.jit(lambda x, y: asymmetric_loss(x, y, axis=None, **CROSS_ENTROPY))(x, y)
    for value in (with_gradient, alone):
        assert np.all(np.abs(value - truth) <= bound(truth, classes))
    assert abs(total - truth.sum()) <= bound(truth.sum(), rows * classes)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("axis", [0, None, (0, 1)])
def test_so_is_a_column(kind, axis):
    x, y = (column[:, None] for column in ROWS[kind](100_000))
    truth = float64.asymmetric_loss(x, y, axis=axis, **CROSS_ENTROPY)
    value = jax.jit(lambda x, y: asymmetric_loss(x, y, axis=axis, **CROSS_ENTROPY))(x, y)
    assert np.all(np.abs(value - truth) <= bound(truth, 2.0**64 if axis == 0 else 100_000))  # groups of 64 rows


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("kernel", ["mosaic_tpu", "triton"])
def test_a_kernel_adds_up_few_losses_in_a_row(kind, kernel):
    """Lanes have a part each; the sums of blocks, or spans, are added with next to no error."""
    x, y = (row[None] for row in ROWS[kind](300_000))
    truth = float64.asymmetric_loss(x, y, **CROSS_ENTROPY)
    with interpreted(kernel), optimising(True):
        value = jax.jit(lambda x, y: asymmetric_loss(x, y, implementation=kernel, **CROSS_ENTROPY))(x, y)
    assert np.all(np.abs(value - truth) <= bound(truth, 300_000))


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("axis", [-1, None])
def test_the_head_adds_its_chunks_without_an_error(kind, axis):
    x, y = ROWS[kind](50_000)
    features, kernel = np.ones((1, 1), np.float32), x[None]
    truth = float64.asymmetric_loss(x[None], y[None], axis=axis, **CROSS_ENTROPY)

    def loss(features: Any, kernel: Any, y: Any) -> Any:
        return linear_asymmetric_loss(features, kernel, y, chunk_size=16, axis=axis, **CROSS_ENTROPY)

    value = jax.jit(loss)(features, kernel, y[None])
    assert np.all(np.abs(value - truth) <= bound(truth, 50_000))


def test_a_sum_by_groups_is_one_of_all_numbers_and_has_its_derivative():
    random = np.random.default_rng(0)
    for n in (0, 1, 7, 8, 9, 64, 65, 1000):
        x = random.normal(size=(3, n))
        with jax.enable_x64(True):
            np.testing.assert_allclose(sum_last(jnp.asarray(x)), x.sum(-1), rtol=0, atol=1e-12)
    x = jnp.asarray(random.normal(size=(4, 50, 3)), jnp.float32)
    for axes in ((), (0,), (1,), (0, 2), (0, 1, 2)):
        found, tangent = jax.jvp(lambda x, axes=axes: sum_over(x, axes), (x,), (2 * x,))
        np.testing.assert_allclose(found, jnp.sum(x, axes), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(tangent, 2 * found, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: (jax.vmap(lambda x: sum_over(x, (0,)))(x) ** 2).sum())(x)
    np.testing.assert_allclose(gradient, jnp.broadcast_to(2 * x.sum(1, keepdims=True), x.shape), rtol=1e-5, atol=1e-5)


def test_exact_addition_keeps_what_a_rounding_loses_and_infinity_and_nan():
    total = lost = jnp.float32(0)
    for x in (1e8, *[1.0] * 10, -1e8):
        total, lost = add_exactly(total, lost, jnp.float32(x))
    assert total_of(total, lost) == 10.0
    for x in (jnp.inf, -jnp.inf, jnp.nan):
        total, lost = add_exactly(*add_exactly(jnp.float32(1), jnp.float32(0), jnp.float32(x)), jnp.float32(1))
        np.testing.assert_array_equal(total_of(total, lost), x)


def test_two_small_sums_stay_two():
    """XLA made one of 961 numbers of them, whose rounding error grows with their count."""
    x = jnp.zeros((31, 31))
    y = np.zeros((31, 31), np.int8)
    total = jax.jit(lambda lamb, x: multilabel_loss(HillLoss(lamb), x, y, axis=None))
    for lamb in np.linspace(0.6, 2, 57, dtype=np.float32):
        exact = 961 * (float(lamb) - 0.5) * 0.25
        assert abs(float(total(lamb, x)) - exact) <= 62 * 2**-24 * exact


def test_a_callers_mean_is_not_merged_with_the_sum_of_a_row():
    """Of 32 rows XLA, of jax 0.12, made one sum of 1024 equal numbers: off by 1.1e-5 of it."""
    x = np.full((32, 32), -2, np.float32)
    y = np.zeros((32, 32), np.int8)
    y[:, :3] = 1
    of_row = float(multilabel_loss(AsymmetricLoss(2, 1, 0.05), x[:1], y[:1])[0])
    mean = jax.jit(lambda x: multilabel_loss(AsymmetricLoss(2, 1, 0.05), x, y).mean())
    assert abs(float(mean(x)) - of_row) <= 32 * 2**-24 * of_row
