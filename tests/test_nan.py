"""NaN in gives NaN out, in the loss that it belongs to and in no other; what is left out gives nothing."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import GAMMAS_AND_CLIP, interpreted
from pairwise import pairwise

from asl_pallas import PackedLabels, SparseLabels, asymmetric_loss, linear_asymmetric_loss
from asl_pallas.kernels.versions import lacks_mosaic_gpu

# Beside the usual: exponents that are no chains of products, on either side alone and on both.
SETTINGS = [*GAMMAS_AND_CLIP, (17.0, 1.0, 0.05), (4.0, 17.0, 0.0), (2.5, 2.5, 0.1), (1.5, 1.0, 0.05), (4.0, 1.5, 0.0)]
SHAPE = (5, 12)
AT = (3, 7)  # of the one NaN
SMALL = np.random.default_rng(0).normal(0, 3, SHAPE).astype(np.float32)
LABELS = (np.random.default_rng(1).random(SHAPE) < 0.4).astype(np.int8)
FORMS: dict[str, Any] = {
    "int8": jnp.asarray,
    "bool": lambda y: jnp.asarray(y, bool),
    "soft": lambda y: jnp.asarray(y * 0.5, jnp.float32),
    "packed": PackedLabels.from_dense,
    "sparse": SparseLabels.from_dense,
}


def expected(shape: tuple[int, ...], axis: Any) -> Any:
    """Where a loss over `axis` has the NaN."""
    of_elements = np.zeros(shape, bool)
    of_elements[AT] = True
    return of_elements.any(axis=tuple(range(len(shape))) if axis is None else axis)


@functools.cache
def step(implementation: str | None, axis: Any, static: tuple[Any, ...]) -> Any:
    """Loss and gradient, of which static hyper-parameters are compiled in."""

    def run(x: Any, y: Any, gammas_and_clip: Any) -> Any:
        gamma_neg, gamma_pos, clip, stop = static or (*gammas_and_clip, False)

        def loss(x: Any) -> Any:
            return asymmetric_loss(
                x,
                y,
                gamma_neg=gamma_neg,
                gamma_pos=gamma_pos,
                clip=clip,
                stop_focus_gradient=stop,
                axis=axis,
                implementation=implementation,
            )

        value, pull = jax.vjp(loss, x)
        return value, pull(jnp.ones_like(value))[0]

    return jax.jit(run)


def check(x: Any, y: Any, setting: Any, axis: Any = -1, implementation: str | None = None, static: Any = ()) -> None:
    """With a NaN at a positive and at a negative."""
    with interpreted(implementation):
        value, gradient = step(implementation, axis, static)(x, y, setting)
    np.testing.assert_array_equal(np.isnan(value), expected(x.shape, axis))
    at = np.argwhere(np.isnan(np.asarray(gradient, np.float32)))
    assert at.tolist() == [list(AT)]


def with_nan(x: Any, dtype: str = "float32") -> Any:
    x = np.array(x)
    x[AT] = np.nan
    return jnp.asarray(x, dtype)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize(
    ("form", "dtype", "axis"), pairwise(FORMS, ("float32", "bfloat16", "float16"), (-1, (), None, 0))
)
def test_traced_hyper_parameters_keep_a_nan(form, dtype, axis):
    for label in (0, 1):
        y = LABELS.copy()
        y[AT] = label
        for setting in SETTINGS:
            check(with_nan(SMALL, dtype), FORMS[form](y), tuple(map(jnp.float32, setting)), axis)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize(("form", "setting", "stop"), pairwise(("int8", "soft"), SETTINGS, (False, True)))
def test_hyper_parameters_that_are_compiled_in_keep_a_nan(form, setting, stop):
    large = np.random.default_rng(2).normal(0, 3, (33, 2_003)).astype(np.float32)  # the CPU streams it
    for x in (SMALL, large):
        for label in (0, 1):
            y = np.zeros(x.shape, np.int8)
            y[AT] = label
            check(with_nan(x), FORMS[form](y), setting, static=(*setting, stop))


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("setting", [None, *SETTINGS])
@pytest.mark.parametrize("kernel", ["mosaic_tpu", "triton", "mosaic_gpu"])
def test_a_kernel_keeps_a_nan(kernel, setting):
    """None: traced hyper-parameters, whose program serves every setting."""
    if kernel == "mosaic_gpu" and (reason := lacks_mosaic_gpu()):
        pytest.skip(reason)
    x = with_nan(np.random.default_rng(3).normal(0, 3, (5, 130)).astype(np.float32))
    for label in (0, 1):
        y = jnp.zeros(x.shape, jnp.int8).at[AT].set(label)
        if setting is not None:
            check(x, y, setting, implementation=kernel, static=(*setting, False))
        for each in SETTINGS if setting is None else ():
            check(x, y, tuple(map(jnp.float32, each)), implementation=kernel)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("form", ["int8", "sparse"])
@pytest.mark.parametrize("axis", [-1, None])
def test_the_head_keeps_a_nan_of_its_bias(form, axis):
    features, kernel = np.ones((SHAPE[0], 2), np.float32), np.zeros((2, SHAPE[1]), np.float32)
    bias = np.zeros(SHAPE[1], np.float32)
    bias[AT[1]] = np.nan

    def losses(features: Any, kernel: Any, bias: Any, y: Any, setting: Any) -> Any:
        gamma_neg, gamma_pos, clip = setting
        options: dict[str, Any] = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip, "axis": axis}
        return linear_asymmetric_loss(features, kernel, y, bias=bias, chunk_size=5, **options).sum()

    run = jax.jit(jax.value_and_grad(losses, argnums=(1, 2)))
    for setting in SETTINGS:
        value, (of_kernel, of_bias) = run(features, kernel, bias, FORMS[form](LABELS), setting)
        assert np.isnan(value)
        assert np.flatnonzero(np.isnan(of_bias)).tolist() == [AT[1]]
        assert np.flatnonzero(np.isnan(of_kernel).any(0)).tolist() == [AT[1]]


LEFT_OUT = {"where": {"where": np.ones(SHAPE, bool)}, "ignore_label": {"ignore_label": -1}}
LEFT_OUT["where"]["where"][AT] = False


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("operand", ["logits", "labels", "weights", "pos_weight"])
@pytest.mark.parametrize("way", LEFT_OUT)
def test_an_element_that_is_left_out_puts_nothing_into_any_gradient(way, operand, bad):
    if operand == "labels" and way == "ignore_label":
        pytest.skip("an ignored label is an integer, which no NaN is")
    ones = np.ones(SHAPE, np.float32)
    soft = way == "where"
    arrays = {"logits": SMALL, "weights": 2 * ones, "pos_weight": 3 * ones} | ({"labels": 0.5 * ones} if soft else {})
    labels = LABELS.copy()
    labels[AT] = -1

    def loss(arrays: Any, axis: Any) -> Any:
        named = {"labels": labels} | arrays
        return asymmetric_loss(named.pop("logits"), named.pop("labels"), **named, **LEFT_OUT[way], axis=axis).sum()

    spoiled = arrays | {operand: arrays[operand].copy()}
    spoiled[operand][AT] = bad
    for axis in (-1, ()):
        run = jax.jit(jax.value_and_grad(functools.partial(loss, axis=axis)))
        for found, clean in zip(jax.tree.leaves(run(spoiled)), jax.tree.leaves(run(arrays)), strict=True):
            np.testing.assert_array_equal(found, clean)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("axis", [-1, ()])
def test_a_row_without_labels_has_no_gradient_where_its_mean_is_0_by_0(axis):
    where = np.ones(SHAPE, bool)
    where[2] = False

    def mean(x: Any) -> Any:
        losses = asymmetric_loss(x, LABELS, where=where, axis=axis)
        per_row = losses if axis == -1 else losses.sum(-1)
        return jnp.where(where.any(-1), per_row / where.sum(-1), 0).sum()

    gradient = jax.grad(mean)(jnp.asarray(SMALL))
    assert np.isfinite(gradient).all() and not gradient[2].any() and gradient[3].any()


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("axis", [-1, None])
@pytest.mark.parametrize("way", ["where by example", "where by element", "where by class", "ignore_label"])
def test_the_head_takes_nothing_from_examples_and_classes_that_are_left_out(way, axis, bad):
    random = np.random.default_rng(4)
    features, kernel = (random.normal(size=s).astype(np.float32) for s in ((SHAPE[0], 3), (3, SHAPE[1])))
    y, where = LABELS.copy(), np.ones(SHAPE, bool)
    where[2] = where[:, 4] = False
    if way == "where by example":
        where = where[:, :1]
    elif way == "where by class":
        where = where[:1]
    y[2] = y[:, 4] = -1 if way == "ignore_label" else 0
    options: dict[str, Any] = {"ignore_label": -1} if way == "ignore_label" else {"where": where}

    def loss(arrays: Any) -> Any:
        return linear_asymmetric_loss(*arrays, y, chunk_size=5, axis=axis, **options).sum()

    spoiled = features.copy(), kernel.copy()
    if way != "where by class":
        spoiled[0][2] = bad
    if way in ("where by class", "where by element", "ignore_label"):
        spoiled[1][:, 4] = bad
    run = jax.jit(jax.value_and_grad(loss))
    for found, clean in zip(jax.tree.leaves(run(spoiled)), jax.tree.leaves(run((features, kernel))), strict=True):
        np.testing.assert_array_equal(found, clean)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("dtype", ["int8", "bool", "float32"])
def test_an_infinite_pos_weight_of_a_class_that_never_occurs_changes_nothing(dtype):
    y = LABELS.copy()
    y[:, 4] = 0
    pos_weight = np.full(SHAPE[1], 2, np.float32)

    def loss(x: Any, pos_weight: Any) -> Any:
        return asymmetric_loss(x, y.astype(dtype), pos_weight=pos_weight).sum()

    clean = jax.value_and_grad(loss)(jnp.asarray(SMALL), pos_weight)
    pos_weight[4] = np.inf
    for found, wanted in zip(jax.value_and_grad(loss)(jnp.asarray(SMALL), pos_weight), clean, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("axis", [-1, ()])
@pytest.mark.parametrize("bad", [-1.0, 2.0, -1e-6, 1.0001, np.inf, np.nan])
def test_a_soft_label_outside_0_and_1_gives_nan_where_nobody_can_look_at_it(bad, axis):
    y = LABELS.astype(np.float32)
    y[AT] = bad
    value, gradient = jax.jit(jax.value_and_grad(lambda x, y: asymmetric_loss(x, y, axis=axis).sum()))(SMALL, y)
    assert np.isnan(value)
    assert np.argwhere(np.isnan(gradient)).tolist() == [list(AT)]
    # Left out it is nobody's.
    where = np.ones(SHAPE, bool)
    where[AT] = False
    assert np.isfinite(jax.jit(lambda x, y: asymmetric_loss(x, y, where=where, axis=axis))(SMALL, y)).all()
