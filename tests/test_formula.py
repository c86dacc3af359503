"""The formula of one element, by itself: all the mathematics is here, kernels only move tiles past it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import GAMMAS_AND_CLIP, assert_no_worse, away_from_the_margin, careful_pair, interpreted, true_pair

from asl_pallas import kernels
from asl_pallas.kernels import mosaic_tpu, triton
from asl_pallas.kernels.tile import Operands, Task
from asl_pallas.kernels.versions import lacks_mosaic_gpu
from asl_pallas.losses import AsymmetricLoss, ElementwiseLoss, Label
from asl_pallas.losses.base import TRACED
from asl_pallas.losses.ops import EXACT, Ops
from reference import float64

LOGITS = np.array(
    [
        -np.inf,
        -1e4,
        -200,
        -104,
        -88,
        -30,
        -20,
        -5,
        -2.9445,
        -2.94,
        -1,
        -1e-6,
        0,
        1e-6,
        0.5,
        3,
        17,
        30,
        88,
        104,
        1e4,
        np.inf,
    ],
    np.float32,
)


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), GAMMAS_AND_CLIP)
@pytest.mark.parametrize("positive", [False, True])
def test_value_gradient_and_both_are_the_same_numbers_for_masks_and_for_constants(gamma_neg, gamma_pos, clip, positive):
    formula = AsymmetricLoss(gamma_neg, gamma_pos, clip)
    mask = jnp.full(LOGITS.shape, positive)
    value, slope = formula.value_and_slope(jnp.asarray(LOGITS), Label(mask))
    np.testing.assert_allclose(value, formula.value(jnp.asarray(LOGITS), Label(mask)), rtol=3e-6, atol=1e-8)
    one_sided = formula.value_and_slope(jnp.asarray(LOGITS), Label(positive))
    np.testing.assert_allclose(one_sided[0], value, rtol=3e-6)
    np.testing.assert_allclose(one_sided[1], slope, rtol=3e-6)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), GAMMAS_AND_CLIP)
def test_a_bound_traced_formula_is_the_static_one_to_rounding(gamma_neg, gamma_pos, clip):
    traced = AsymmetricLoss(TRACED, TRACED, TRACED).bind(
        (jnp.float32(gamma_neg), jnp.float32(gamma_pos), jnp.float32(clip))
    )
    static = AsymmetricLoss(gamma_neg, gamma_pos, clip)
    x, y = jnp.tile(jnp.asarray(LOGITS), 2), Label(jnp.repeat(jnp.array([False, True]), LOGITS.size))
    for ours, theirs in zip(traced.value_and_slope(x, y), static.value_and_slope(x, y), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_nan_logit_gives_nan_whatever_the_side_and_the_exponents():
    for gamma_neg, gamma_pos, clip in GAMMAS_AND_CLIP:
        for positive in (False, True):
            pair = AsymmetricLoss(gamma_neg, gamma_pos, clip).value_and_slope(jnp.float32(jnp.nan), Label(positive))
            assert np.isnan(pair).all()


@pytest.mark.long
def test_a_nan_logit_gives_nan_in_a_gpu_kernel_where_max_and_min_drop_it(monkeypatch):
    """Triton compiles them to max.f32 and min.f32, which return the other operand: Pallas's interpreter doesn't."""
    monkeypatch.setattr(jnp, "maximum", jnp.fmax)
    monkeypatch.setattr(jnp, "minimum", jnp.fmin)
    operands = Operands(jnp.full((2, 3), jnp.nan), jnp.array([[0, 1, -1], [1, 0, -1]]))
    for gamma_neg, gamma_pos, clip in [*GAMMAS_AND_CLIP, (0.0, 0.0, 0.05)]:
        scalars = jnp.array([gamma_neg, gamma_pos, clip], jnp.float32)
        of_numbers = Task(AsymmetricLoss(gamma_neg, gamma_pos, clip), "elements", True, ignore_label=-1)
        of_arrays = Task(AsymmetricLoss(TRACED, TRACED, TRACED), "elements", True, ignore_label=-1)
        for task, dynamic in ((of_numbers, None), (of_arrays, scalars)):
            with interpreted("triton"):
                parts = triton.run(task, operands._replace(scalars=dynamic), interpret=True)
            for part in (parts.value, parts.gradient):
                assert np.isnan(part).tolist() == [[True, True, False]] * 2


def test_easy_elements_have_no_negative_zero_loss():
    value = AsymmetricLoss().value(jnp.asarray(LOGITS), Label(jnp.zeros(LOGITS.shape, bool)))
    assert not np.signbit(value).any()


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), [(0.0, 0.0, 0.0), (2.0, 2.0, 0.0), (4.0, 1.0, 0.05)])
@pytest.mark.parametrize("positive", [False, True])
def test_the_curvature_at_a_logit_of_zero_is_not_lost_to_the_kink_of_an_absolute_value(
    gamma_neg, gamma_pos, clip, positive
):
    formula = AsymmetricLoss(gamma_neg, gamma_pos, clip)
    h = 1e-4
    options: dict[str, Any] = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
    up, down = (float64.gradient(np.array([x]), np.array([int(positive)]), **options)[0] for x in (h, -h))
    found = jax.grad(lambda x: formula.value_and_slope(x, Label(positive))[1])(jnp.float32(0))
    assert found == pytest.approx((up - down) / (2 * h), rel=1e-5)
    assert found > 0.01


def test_a_coarse_reciprocal_shows_so_kernels_divide_as_they_are_told():
    """The reciprocal that a kernel passes is the one that is used: a wrong one must not go unseen."""

    wrong = Ops(reciprocal=lambda z: EXACT.reciprocal(z) * 1.01)
    x, y = jnp.asarray([0.3, 2.0]), Label(jnp.asarray([False, True]))
    formula = AsymmetricLoss()
    for exact, off in zip(formula.value_and_slope(x, y), formula.value_and_slope(x, y, wrong), strict=True):
        assert (abs(exact - off) > 1e-3 * abs(exact)).all()


APPROXIMATED = [
    *(("triton", *case) for case in GAMMAS_AND_CLIP),
    *(("mosaic_gpu", *case) for case in GAMMAS_AND_CLIP if AsymmetricLoss(*case).allows_approximate_math),
]


@pytest.mark.mostly_long(short=9)
@pytest.mark.parametrize(("kernel", "gamma_neg", "gamma_pos", "clip"), APPROXIMATED)
@pytest.mark.parametrize("signs", ["up", "down", "either"])
def test_a_gpus_approximate_instructions_may_err_as_their_manual_allows(
    gamma_neg, gamma_pos, clip, signs, kernel, monkeypatch
):
    """ex2, lg2 and rcp.approx.ftz, which no interpreter has, each wrong by all that NVIDIA's PTX manual leaves them.

    Mosaic GPU, which has rsqrt.approx for rcp, takes them for some exponents alone.
    """
    formula = AsymmetricLoss(gamma_neg, gamma_pos, clip)
    if kernel == "mosaic_gpu" and (reason := lacks_mosaic_gpu()):
        pytest.skip(reason)
    random = np.random.default_rng(0)

    def err(shape: tuple[int, ...]) -> Any:
        return {"up": 1.0, "down": -1.0, "either": random.uniform(-1, 1, shape)}[signs] * 2.0**-22

    def exp2(t: Any) -> Any:
        return (np.exp2(np.float64(t)) * (1 + err(t.shape))).astype(np.float32)

    def log2(z: Any) -> Any:
        exact = np.log2(np.float64(z))
        absolute = np.where((z >= 0.5) & (z <= 2), 1.0, np.abs(exact))
        return np.where(z == 1, 0.0, exact + absolute * err(z.shape)).astype(np.float32)

    def reciprocal(z: Any) -> Any:
        return jnp.asarray((1 / np.float64(z) * (1 + err(z.shape) / 2)).astype(np.float32))

    def root(z: Any) -> Any:
        return jnp.asarray((1 / np.sqrt(np.float64(z)) * (1 + err(z.shape) * 2**-0.9)).astype(np.float32))

    if kernel == "mosaic_gpu":
        from asl_pallas.kernels import mosaic_gpu

        monkeypatch.setattr(mosaic_gpu.lax, "rsqrt", root)
        reciprocal = mosaic_gpu.arithmetic(Task(formula, "elements", True), Operands(LOGITS, LOGITS > 0)).reciprocal
    ops = Ops(
        exp=lambda x: jnp.asarray(exp2(np.asarray(x * (1 / math.log(2))))),
        log=lambda z: jnp.asarray(log2(np.asarray(z))) * math.log(2),
        reciprocal=reciprocal,
        share_power=True,
    )
    x = np.concatenate([LOGITS, np.linspace(-100, 100, 4001), np.linspace(-4, 4, 4001)]).astype(np.float32)
    x, y = np.tile(x, 2), np.repeat(np.int8([0, 1]), x.size)
    options: dict[str, Any] = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip, "axis": ()}
    truths, yardsticks = (pair(x, y, np.ones(x.shape), **options) for pair in (true_pair, careful_pair))
    found = formula.value_and_slope(jnp.asarray(x), Label(jnp.asarray(y > 0)), ops)
    near = (True, away_from_the_margin(x, clip))
    for what, f, truth, careful, only in zip(("loss", "gradient"), found, truths, yardsticks, near, strict=True):
        assert_no_worse(np.asarray(f), truth, careful, what, only=only)
        assert (np.asarray(f) >= 0).all() or what == "gradient"


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), GAMMAS_AND_CLIP)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_tpus_estimate_of_a_reciprocal_is_good_enough_after_one_step(gamma_neg, gamma_pos, clip, sign, monkeypatch):
    """As up to v5 the kernel takes it, which no interpreter does: thirteen bits, wrong by all that the last one leaves;
    with losses that only their sum keeps from being negative, and labels told by the slope."""
    estimate = 1 + sign * np.float32(2.0**-13)
    monkeypatch.setattr(mosaic_tpu, "reciprocal", lambda z, approx: EXACT.reciprocal(z) * estimate)
    x = np.concatenate([LOGITS, np.linspace(-100, 100, 4001), np.linspace(-4, 4, 4001)]).astype(np.float32)
    x, y = np.tile(x, 2), np.repeat(np.int8([0, 1]), x.size)
    options: dict[str, Any] = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip, "axis": ()}
    truths, yardsticks = (pair(x, y, np.ones(x.shape), **options) for pair in (true_pair, careful_pair))
    formula = AsymmetricLoss(gamma_neg, gamma_pos, clip)
    task, operands = Task(formula, "rows", True), Operands(jnp.asarray(x), jnp.asarray(y))
    ops = mosaic_tpu.arithmetic(task, operands, refines=True)
    assert ops.infer_label_from_slope and not ops.signed_per_element
    found = formula.value_and_slope(operands.logits, Label(operands.labels > 0), ops)
    near = (True, away_from_the_margin(x, clip))
    for what, f, truth, careful, only in zip(("loss", "gradient"), found, truths, yardsticks, near, strict=True):
        assert_no_worse(np.asarray(f), truth, careful, what, only=only)


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), GAMMAS_AND_CLIP)
@pytest.mark.parametrize("by_element", [True, False])
def test_the_value_alone_is_as_exact_with_its_sign_left_to_the_sum(gamma_neg, gamma_pos, clip, by_element):
    x = np.concatenate([LOGITS, np.linspace(-100, 100, 4001), np.linspace(-4, 4, 4001)]).astype(np.float32)
    x, y = np.tile(x, 2), np.repeat(np.int8([0, 1]), x.size)
    options: dict[str, Any] = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip, "axis": ()}
    (truth, _), (careful, _) = (pair(x, y, np.ones(x.shape), **options) for pair in (true_pair, careful_pair))
    formula = AsymmetricLoss(gamma_neg, gamma_pos, clip)
    ops = Ops(signed_per_element=by_element, infer_label_from_slope=not by_element)
    found = np.asarray(formula.value(jnp.asarray(x), Label(jnp.asarray(y > 0)), ops))
    if by_element:
        assert (found >= 0).all()
    else:
        found = np.maximum(found * formula.sign(False), 0)
    assert_no_worse(found, truth, careful, "loss")


@dataclasses.dataclass(frozen=True)
class SquaredHinge(ElementwiseLoss):
    """Another loss of the family, as small as the design promises: max(0, margin - s x)^2 with s = +-1."""

    margin: Any = 1.0

    def value(self, logit, label, ops):
        short = jnp.maximum(self.margin - label.select(1.0, -1.0) * logit, 0.0)
        return short * short


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize("margin", [1.0, TRACED])
def test_a_second_loss_costs_one_class_and_no_line_in_a_kernel(implementation, margin):
    random = np.random.default_rng(0)
    x = random.normal(size=(5, 150)).astype(np.float32)
    y = (random.random((5, 150)) < 0.3).astype(np.int8)
    scalars = None if margin is not TRACED else jnp.asarray([0.7], jnp.float32)
    expected = np.maximum((0.7 if margin is TRACED else 1.0) - (2.0 * y - 1) * x, 0)
    task = Task(SquaredHinge(margin), "rows", True)
    operands = Operands(jnp.asarray(x), jnp.asarray(y), scalars=scalars)
    value, slope, _ = jax.jit(lambda o: kernels.run(task, o, implementation, True))(operands)
    np.testing.assert_allclose(value, (expected**2).sum(1), rtol=1e-5)
    np.testing.assert_allclose(slope, -2 * (2 * y - 1) * expected, atol=1e-5)
