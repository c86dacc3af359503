"""The fused head against the loss of its logits: in float64, and against what asymmetric_loss gives without fusing."""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ARRAYS, KERNELS, careful_pair, cotangent_of, labels_of
from numpy.typing import NDArray

from asl_pallas import (
    AsymmetricLoss,
    PackedLabels,
    SparseLabels,
    asymmetric_loss,
    kernels,
    linear_asymmetric_loss,
    linear_top_k,
)
from reference import float64

FORMS: dict[str, Any] = {"dense": lambda y: y, "packed": PackedLabels.from_dense, "sparse": SparseLabels.from_dense}


def problem(
    leading: tuple[int, ...] = (6,), depth: int = 7, classes: int = 257, dtype: str = "float32", kernel_dtype: str = ""
) -> dict[str, NDArray[Any]]:
    """Features, kernel and bias whose logits have a width of about 4."""
    random = np.random.default_rng(classes)
    return {
        "features": random.normal(0, 2, (*leading, depth)).astype(jnp.dtype(dtype)),
        "kernel": random.normal(0, 2 / depth**0.5, (depth, classes)).astype(jnp.dtype(kernel_dtype or dtype)),
        "bias": random.normal(0, 1, classes).astype(np.float32),
    }


def evaluate(
    parameters: dict[str, Any], labels: Any, cotangent: Any, implementation: str | None = None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The loss, and the gradients of sum(cotangent * loss)."""

    def loss(parameters: dict[str, Any], labels: Any, arrays: dict[str, Any]) -> Any:
        return linear_asymmetric_loss(**parameters, labels=labels, implementation=implementation, **arrays, **options)

    arrays = {name: options.pop(name) for name in ARRAYS if name in options}

    def run(parameters: Any, labels: Any, cotangent: Any, arrays: Any) -> Any:
        value, pull = jax.vjp(lambda p: loss(p, labels, arrays), parameters)
        return value, pull(jnp.asarray(cotangent, value.dtype))[0]

    with kernels.interpret_mode() if implementation in KERNELS else contextlib.nullcontext():
        return jax.jit(run)(parameters, labels, cotangent, arrays)


def operands_of(parameters: dict[str, Any], dtype: Any) -> tuple[Any, Any]:
    """Features and kernel as the products take them, in the features' dtype, then widened."""
    f = np.asarray(parameters["features"])
    return f.astype(dtype), np.asarray(parameters["kernel"]).astype(f.dtype).astype(dtype)


def products(parameters: dict[str, Any], slope: Any, dtype: Any) -> dict[str, tuple[Any, Any]]:
    """Gradients of the parameters by the logits' gradient, and the sums of magnitudes that rounding is relative to."""
    f, w = operands_of(parameters, dtype)
    g = np.asarray(slope, dtype)
    rows, flat = g.reshape(-1, g.shape[-1]), f.reshape(-1, f.shape[-1])
    found = {"features": (g @ w.T, abs(g) @ abs(w).T), "kernel": (flat.T @ rows, abs(flat).T @ abs(rows))}
    if "bias" in parameters:
        found["bias"] = rows.sum(0), abs(rows).sum(0)
    return found


def logits_of(parameters: dict[str, Any], dtype: Any) -> Any:
    f, w = operands_of(parameters, dtype)
    return f @ w + np.asarray(parameters.get("bias", 0)).astype(dtype)


def assert_parity(parameters: dict[str, Any], labels: Any, form: str = "dense", **options: Any) -> None:
    """At most 1.5 times the error of a float32 head that isn't fused; and what rounding to a smaller dtype may add."""
    asked = {name: option for name, option in options.items() if name not in ("chunk_size", "implementation")}
    true_logits = logits_of(parameters, np.float64)
    shape = float64.asymmetric_loss(true_logits, labels, **asked).shape
    cotangent = cotangent_of(shape)
    value, found = evaluate(parameters, FORMS[form](labels), cotangent, **options)

    truth = float64.asymmetric_loss(true_logits, labels, **asked)
    slope = float64.gradient(true_logits, labels, cotangent, **asked)
    careful, careful_slope = careful_pair(logits_of(parameters, np.float32), labels, cotangent, **asked)
    assert value.dtype == np.float32 and value.shape == truth.shape
    # A loss of many classes adds up: its error is relative to its own size.
    error = abs(careful - truth) / np.maximum(1, truth)
    assert np.max(abs(value - truth) / np.maximum(1, truth), initial=0) <= 1.5 * np.max(error, initial=0) + 1e-6

    true, near = products(parameters, slope, np.float64), products(parameters, careful_slope, np.float32)
    for name, (expected, magnitude) in true.items():
        gradient = found[name]
        assert gradient.dtype == parameters[name].dtype and gradient.shape == expected.shape, name
        size = np.maximum(1, magnitude)
        allowed = 1.5 * np.max(abs(near[name][0] - expected) / size, initial=0) + 1e-6
        # The logits' gradient is rounded to the features' dtype, and the result to its own, before and after the
        # cotangent of a total.
        for dtype in (parameters["features"].dtype, gradient.dtype, gradient.dtype):
            allowed += float(jnp.finfo(dtype).eps) / 2
        worst = np.max(abs(np.asarray(gradient).astype(np.float64) - expected) / size, initial=0)
        assert worst <= allowed, f"{name}: {worst:.3g}, allowed {allowed:.3g}"


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("classes", "chunk_size", "axis"), [(1, None, -1), (257, 100, None), (9605, None, -1), (9605, 4096, None)]
)
def test_labels_of_all_forms_give_what_float64_gives(form, classes, chunk_size, axis):
    parameters = problem(classes=classes)
    assert_parity(parameters, labels_of((6, classes)), form, axis=axis, chunk_size=chunk_size)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize(
    ("dtype", "kernel_dtype", "axis"),
    [
        ("bfloat16", "bfloat16", None),
        ("bfloat16", "float32", None),
        ("bfloat16", "float32", (0, 2)),
        ("float32", "bfloat16", (0, 2)),
        ("float16", "float16", None),
    ],
)
def test_dtypes_of_features_and_kernel(dtype, kernel_dtype, axis):
    parameters = problem((2, 3), 65, 300, dtype, kernel_dtype)
    assert_parity(parameters, labels_of((2, 3, 300)), axis=axis, chunk_size=128)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize(
    ("implementation", "form", "axis"),
    [("mosaic_tpu", "dense", None), ("mosaic_tpu", "packed", -1), ("triton", "sparse", None)],
)
def test_kernels_in_the_loop(implementation, form, axis):
    parameters = problem((4, 2), 8, 600)
    assert_parity(parameters, labels_of((4, 2, 600)), form, axis=axis, chunk_size=256, implementation=implementation)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("dense", {"where": "full", "label_smoothing": 0.2}),
        ("sparse", {"where": "classes", "weights": "rows"}),
        ("packed", {"weights": "full", "pos_weight": "classes", "axis": None}),
        ("dense", {"weights": "classes", "stop_focus_gradient": True, "axis": None}),
        ("packed", {"weights": "scalar", "gamma_neg": 2.5, "gamma_pos": 0.5, "clip": 0.1, "axis": (0, 1)}),
    ],
    ids=str,
)
def test_every_keyword_means_what_it_means_for_the_logits(form, options):
    random = np.random.default_rng(4)
    shapes = {"full": (6, 257), "classes": (257,), "rows": (6, 1), "scalar": ()}
    options = dict(options)
    for name in ARRAYS:
        if name in options:
            array = random.random(shapes[options[name]]).astype(np.float32)
            options[name] = array < 0.8 if name == "where" else array
    parameters = problem()
    del parameters["bias"]
    assert_parity(parameters, labels_of((6, 257)), form, chunk_size=100, **options)


def test_soft_labels_ignored_labels_and_traced_exponents():
    parameters = problem(classes=300)
    assert_parity(parameters, labels_of((6, 300), dtype="float32"), chunk_size=128)
    assert_parity(parameters, labels_of((6, 300), ignore_label=-1), chunk_size=128, ignore_label=-1, axis=None)
    labels = labels_of((6, 300))
    known = evaluate(parameters, labels, 1.0, axis=None, gamma_neg=3.0, clip=0.1)
    traced = evaluate(parameters, labels, 1.0, axis=None, gamma_neg=jnp.float32(3), clip=jnp.float32(0.1))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5), traced, known)


def test_sizes_of_nothing():
    labels = SparseLabels(np.zeros((3, 0), np.int32), 20)  # no positive anywhere
    assert_parity(problem((3,), classes=20), np.asarray(labels.to_dense(), np.int8), "sparse", axis=None)
    nobody = problem((0,), classes=20)
    value, found = evaluate(nobody, np.zeros((0, 20), np.int8), np.float32(1), axis=None)
    assert value == 0 and not np.any(found["kernel"]) and found["features"].shape == (0, 7)
    alone = {name: array[0] if name == "features" else array for name, array in problem((1,)).items()}
    assert_parity(alone, labels_of((257,)), chunk_size=64)


def test_float64_is_as_good_as_float64():
    with jax.enable_x64(True):
        parameters = {name: array.astype(np.float64) for name, array in problem().items()}
        labels, cotangent = labels_of((6, 257)), cotangent_of((6,))
        value, found = evaluate(parameters, labels, cotangent, chunk_size=100)
        x = logits_of(parameters, np.float64)
        np.testing.assert_allclose(value, float64.asymmetric_loss(x, labels), rtol=1e-13)
        for name, (expected, _) in products(parameters, float64.gradient(x, labels, cotangent), np.float64).items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-11, atol=1e-12)


def test_a_float16_gradient_outlives_its_loss_scale():
    parameters = problem((3,), 4, 40, "float16") | {"bias": np.full(40, -9, np.float32)}
    parameters["features"] *= np.float16(0.05)
    labels = np.zeros((3, 40), np.int8)
    scale = np.float32(2.0**24)
    _, found = evaluate(parameters, labels, scale, axis=None, gamma_neg=1.0, clip=0.0)
    assert np.abs(np.asarray(found["kernel"], np.float32)).min() > 0


def products_in(f: Any, *operands: Any) -> int:
    return str(jax.make_jaxpr(f)(*operands)).count("dot_general")


def test_products_that_nobody_asked_for_are_not_computed():
    parameters, labels = problem(), labels_of((6, 257))

    def count(*names: str, axis: int | None) -> int:
        rest = {name: array for name, array in parameters.items() if name not in names}

        def loss(asked: dict[str, Any]) -> Any:
            return jnp.sum(linear_asymmetric_loss(**asked, **rest, labels=labels, axis=axis, chunk_size=257))

        return products_in(jax.grad(loss) if names else loss, {name: parameters[name] for name in names})

    assert count(axis=None) == count("bias", axis=None) == 1
    assert count("features", axis=None) == count("kernel", axis=None) == 2
    assert count("features", "kernel", "bias", axis=None) == 3
    # One more for the logits that the backward pass makes again.
    assert count("features", "kernel", "bias", axis=-1) == 4


@pytest.mark.parametrize("axis", [None, -1])
def test_derivatives_beyond_the_first_and_of_the_rest(axis):
    parameters, labels = problem(classes=70), labels_of((6, 70), dtype="float32")
    direction = np.random.default_rng(3).normal(size=(6, 7)).astype(np.float32)
    rows = np.random.default_rng(4).random((6, 1)).astype(np.float32)

    def fused(f: Any, w: Any, y: Any, rows: Any) -> Any:
        return jnp.sum(linear_asymmetric_loss(f, w, y, weights=rows, axis=axis, chunk_size=32))

    def unfused(f: Any, w: Any, y: Any, rows: Any) -> Any:
        return asymmetric_loss(f @ w, y, weights=rows, axis=None)

    def curvature(loss: Any) -> Any:
        slope = jax.grad(loss)
        return jax.jit(jax.grad(lambda *a: jnp.sum(slope(*a) * direction), (0, 1)))

    operands = (parameters["features"], parameters["kernel"], labels, rows)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, curvature(fused)(*operands), curvature(unfused)(*operands))
    of_the_rest = (jax.jit(jax.grad(loss, (2, 3)))(*operands) for loss in (fused, unfused))
    jax.tree.map(close, *of_the_rest)


def test_a_kernel_of_another_dtype_has_its_second_derivative():
    parameters, labels = problem(classes=70, dtype="bfloat16", kernel_dtype="float32"), labels_of((6, 70))
    f = parameters["features"]

    def curvature(loss: Any) -> Any:
        return jax.grad(lambda w: jnp.sum(jax.grad(loss)(w) ** 2))(parameters["kernel"])

    fused = curvature(lambda w: linear_asymmetric_loss(f, w, labels, axis=None, chunk_size=32))
    unfused = curvature(lambda w: asymmetric_loss(f.astype(np.float32) @ w, labels, axis=None))
    assert np.linalg.norm(fused - unfused) <= 0.02 * np.linalg.norm(unfused)


def test_what_has_no_derivative_says_so():
    parameters, labels = problem(), labels_of((6, 257))
    f, w = parameters["features"], parameters["kernel"]
    with pytest.raises(TypeError, match=r"linear_asymmetric_loss has no forward-mode derivative"):
        jax.jvp(lambda f: linear_asymmetric_loss(f, w, labels), (f,), (f,))
    with pytest.raises(TypeError, match=r"no derivative with respect to clip; wrap"):
        jax.grad(lambda c: linear_asymmetric_loss(f, w, labels, clip=c, axis=None))(0.1)


def test_a_nan_in_an_example_is_that_examples_alone():
    parameters, labels = problem(), labels_of((6, 257))
    parameters["features"][2] = np.nan
    value, found = evaluate(parameters, labels, np.ones(6), chunk_size=100)
    assert np.isnan(value[2]) and np.isfinite(np.delete(value, 2)).all()
    assert np.isnan(found["features"][2]).all() and np.isfinite(np.delete(found["features"], 2, 0)).all()


def test_vmap_gives_what_a_loop_gives():
    parameters, labels = problem((3, 4)), labels_of((3, 4, 257))
    slope = jax.grad(lambda f, y: linear_asymmetric_loss(f, parameters["kernel"], y, axis=None, chunk_size=100))
    mapped = jax.vmap(slope)(parameters["features"], labels)
    for one, f, y in zip(mapped, parameters["features"], labels, strict=True):
        np.testing.assert_allclose(one, slope(f, y), rtol=1e-5, atol=1e-5)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize(
    ("classes", "k", "chunk_size", "dtype"),
    [(300, 7, 64, "float32"), (300, 300, 7, "float32"), (9605, 5, None, "bfloat16"), (1, 1, None, "float32")],
)
def test_top_k_is_that_of_all_logits(classes, k, chunk_size, dtype):
    random = np.random.default_rng(classes)
    # Small integers, so that products are exact and equal scores many.
    f, w, b = (jnp.asarray(random.integers(-2, 3, s), dtype) for s in ((2, 3, 7), (7, classes), (classes,)))
    scores, ids = linear_top_k(f, w, k, bias=b, chunk_size=chunk_size)
    logits = (f.astype(jnp.float32) @ w.astype(jnp.float32)) + b
    best, at = jax.lax.top_k(logits, k)
    np.testing.assert_array_equal(scores, best)
    np.testing.assert_array_equal(ids, at)
    assert scores.dtype == jnp.float32 and ids.dtype == jnp.int32


def test_top_k_of_infinite_scores_holds_no_class_twice():
    f, w = np.ones((1, 1), np.float32), np.full((1, 50), -np.inf, np.float32)
    _, ids = linear_top_k(f, w, 10, chunk_size=8)
    np.testing.assert_array_equal(ids[0], np.arange(10))


F, W, Y = np.zeros((4, 3), np.float32), np.zeros((3, 10), np.float32), np.zeros((4, 10), np.int8)


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"kernel": np.zeros((5, 10), np.float32)}, ValueError, "kernel has shape (5, 10); expected (3, classes) for"),
        ({"kernel": np.zeros(3, np.float32)}, ValueError, "kernel has shape (3,); expected (3, classes)"),
        ({"kernel": np.zeros((3, 10), np.int32)}, TypeError, "kernel has dtype int32; expected one of float16"),
        ({"features": np.zeros((4, 3), np.int32)}, TypeError, "features have dtype int32; expected one of float16"),
        ({"features": np.float32(1)}, ValueError, "features are a scalar; expected shape (..., d)"),
        ({"bias": np.zeros(9, np.float32)}, ValueError, "bias has shape (9,); expected (10,), one a class"),
        ({"bias": np.zeros(10, np.int32)}, TypeError, "bias has dtype int32"),
        ({"labels": np.zeros((4, 9), np.int8)}, ValueError, "labels have shape (4, 9); expected the logits' shape (4"),
        ({"labels": SparseLabels(np.zeros((4, 1), np.int32), 9)}, ValueError, "of shape (4, 9); expected the logits'"),
        ({"chunk_size": 0}, ValueError, "chunk_size=0; expected chunk_size >= 1"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size=2.5; expected None or a Python int"),
        ({"axis": 0}, ValueError, "axis=0 leaves the classes in"),
        ({"axis": ()}, ValueError, "axis=() leaves the classes in"),
        ({"precision": "more"}, ValueError, "precision='more'; expected what jax.lax.dot_general takes"),
        ({"implementation": "triton", "features": np.zeros((4, 3))}, NotImplementedError, "can't serve this call"),
        ({"kernel_spec": "model"}, TypeError, "kernel_spec='model'; expected a jax.sharding.PartitionSpec"),
    ],
    ids=str,
)
def test_bad_input_is_named_before_anything_is_compiled(changed, error, sentence):
    call = {"features": F, "kernel": W, "labels": Y, **changed}
    with jax.enable_x64("implementation" in changed), pytest.raises(error, match=re.escape(sentence)):
        linear_asymmetric_loss(**call)


@pytest.mark.parametrize(
    ("k", "error", "sentence"),
    [
        (11, ValueError, "k=11; expected at most 10, the classes of the kernel"),
        (0, ValueError, "k=0; expected k >= 1"),
        (1.0, TypeError, "k=1.0; expected a Python int"),
    ],
)
def test_a_bad_k_is_named(k, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        linear_top_k(F, W, k)


def test_top_k_gives_probabilities_by_the_loss():
    random = np.random.default_rng(0)
    f, w = random.normal(size=(4, 3)).astype(np.float32), random.normal(size=(3, 50)).astype(np.float32)
    scores, ids = linear_top_k(f, w, 5)
    for loss in (AsymmetricLoss(), AsymmetricLoss(gamma_neg=jnp.float32(2.0))):
        probabilities, same = jax.jit(lambda f, w, loss: linear_top_k(f, w, 5, loss=loss))(f, w, loss)
        np.testing.assert_array_equal(same, ids)
        np.testing.assert_allclose(probabilities, loss.probability(scores), rtol=1e-4)
        assert (np.diff(probabilities) <= 0).all()


@pytest.mark.parametrize(
    ("loss", "error", "sentence"),
    [
        ("asl", TypeError, "loss='asl'; expected None or a loss object"),
        (AsymmetricLoss(np.ones(10)), ValueError, "hyper-parameters of shapes [(10,)], so that the best logits aren't"),
    ],
)
def test_a_loss_that_cannot_rank_is_named(loss, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        linear_top_k(F, W, 2, loss=loss)
