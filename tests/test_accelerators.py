"""The kernels on the chips they are for: `pytest -m gpu` on a machine with an NVIDIA GPU, `pytest -m tpu` on a TPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import GAMMAS_AND_CLIP, assert_parity, cotangent_of, labels_of, logits_of

from asl_pallas import PackedLabels, SparseLabels, asymmetric_loss
from asl_pallas.kernels.versions import lacks_mosaic_gpu
from reference import float64

BACKENDS = {"triton": "gpu", "mosaic_tpu": "tpu"}
CUSTOM_CALLS = {"triton": "gpu.triton", "mosaic_tpu": "tpu_custom_call"}


@pytest.fixture(params=[pytest.param(name, marks=getattr(pytest.mark, mark)) for name, mark in BACKENDS.items()])
def kernel(request: pytest.FixtureRequest) -> str:
    """The kernel that implementation=None picks here, where a problem is not too small for it."""
    if jax.default_backend() != BACKENDS[request.param]:
        pytest.skip(f"needs a {BACKENDS[request.param]}; JAX's backend here is {jax.default_backend()}")
    return request.param


def test_the_kernel_is_in_the_program_that_runs(kernel):
    x, y = jnp.zeros((300, 1000), jnp.bfloat16), jnp.zeros((300, 1000), jnp.int8)
    step = jax.jit(jax.value_and_grad(lambda x: asymmetric_loss(x, y).sum()))
    assert CUSTOM_CALLS[kernel] in step.lower(x).compile().as_text()


@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), GAMMAS_AND_CLIP)
def test_loss_and_gradient_match_float64(kernel, gamma_neg, gamma_pos, clip):
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
    x, y = logits_of((33, 257)), labels_of((33, 257))
    assert_parity(x, y, implementation=kernel, **options)
    assert_parity(x, y, implementation=kernel, traced=tuple(options), **options)


# Rows of less than a chunk and of several; on a GPU also such as lie flat, one to a tile, many, and with an end within.
SIZES = [(1, 1), (33, 7), (33, 80), (1, 9605), (33, 9605), (40, 9605), (300, 8192), (3000, 130), (3000, 33), (304, 601)]


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_size_and_dtype_matches_float64(kernel, shape, dtype):
    by_name = None if (kernel, dtype) == ("mosaic_tpu", "float16") else kernel
    assert_parity(logits_of(shape, dtype=dtype), labels_of(shape), implementation=by_name)


@pytest.mark.parametrize("labels", ["bool", "uint8", "int32", "float32", "bfloat16"])
def test_every_labels_dtype_matches_float64(kernel, labels):
    assert_parity(logits_of((33, 257)), labels_of((33, 257), dtype=labels), implementation=kernel)


@pytest.mark.parametrize("shape", [(40, 9605), (304, 601), (64, 65536)])
@pytest.mark.parametrize("form", ["packed", "sparse"])
def test_few_labels_match_the_dense_ones(kernel, form, shape):
    x, dense = jnp.asarray(logits_of(shape)), labels_of(shape)
    if form == "packed":
        few: Any = PackedLabels.from_dense(dense)
    else:
        ids = np.random.default_rng(0).integers(0, shape[1], (shape[0], 9))
        few, dense = SparseLabels(ids, shape[1]), np.zeros(shape, np.int8)
        np.put_along_axis(dense, ids, 1, axis=1)
    step = jax.value_and_grad(lambda x, y: asymmetric_loss(x, y, implementation=kernel).sum())
    value, slope = step(x, few)
    expected = step(x, jnp.asarray(dense))
    np.testing.assert_allclose(value, expected[0], rtol=1e-6)
    np.testing.assert_allclose(slope, expected[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(40, 9605), (304, 601), (300, 8192)])
def test_a_gradient_in_the_logits_place_is_the_same(kernel, shape):
    """Where rows share a vector, one must not have written over it before the other has read it."""
    x, y = jnp.asarray(logits_of(shape), jnp.bfloat16), jnp.asarray(labels_of(shape))

    def step(donate: bool) -> Any:
        def loss(x: Any) -> Any:
            return asymmetric_loss(x, y, implementation=kernel, donate_logits=donate).sum()

        return jax.jit(jax.value_and_grad(loss), donate_argnums=0 if donate else ())

    expected = step(False)(x)
    for _ in range(5):
        found = step(True)(jnp.array(x, copy=True))
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
        np.testing.assert_array_equal(found[1], expected[1])


def test_masks_weights_and_losses_per_element_match_float64(kernel):
    shape = (33, 257)
    random = np.random.default_rng(3)
    options = {
        "where": random.random(shape) < 0.8,
        "weights": random.random((33, 1)).astype(np.float32),
        "pos_weight": random.random(257).astype(np.float32),
        "ignore_label": -1,
        "label_smoothing": 0.1,
    }
    for axis in (-1, (), None):
        assert_parity(logits_of(shape), labels_of(shape, ignore_label=-1), implementation=kernel, axis=axis, **options)


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_infinite_and_nan_logits_give_limits_and_nan(kernel, clip):
    x = np.tile(np.array([-np.inf, -1e4, -30, 0, 30, 1e4, np.inf], np.float32), (2, 1))
    y = np.repeat(np.array([[0], [1]], np.int8), x.shape[1], axis=1)
    assert_parity(x, y, implementation=kernel, clip=clip, axis=(), cotangent=np.ones(x.shape, np.float32))
    assert jnp.isnan(asymmetric_loss(jnp.float32([jnp.nan, 1.0]), jnp.int8([0, 1]), clip=clip))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape", [(1, 128), (33, 257), (300, 1000), (33, 9605), (300, 8192), (3000, 136), (1, 100_000)]
)
@pytest.mark.parametrize(("logits", "labels"), [("float32", "int8"), ("bfloat16", "int8"), ("float16", "float32")])
def test_mosaic_gpu_by_name_matches_float64(shape, logits, labels):
    """Copies of whole rows and of what lies around a chunk, stores by engine and threads, spans of a row, many rows."""
    if jax.default_backend() != "gpu" or float(getattr(jax.devices()[0], "compute_capability", 0)) < 9:
        pytest.skip("needs a Hopper GPU or a later one")
    if reason := lacks_mosaic_gpu():
        pytest.skip(reason)
    x, y = logits_of(shape, dtype=logits), labels_of(shape, dtype=labels)
    assert_parity(x, y, implementation="mosaic_gpu")
    assert_parity(x, y, implementation="mosaic_gpu", gamma_neg=0, gamma_pos=0.5, clip=0)
    assert_parity(x, y, implementation="mosaic_gpu", axis=())


@pytest.mark.parametrize("setting", [*GAMMAS_AND_CLIP, (17.0, 1.0, 0.05), (4.0, 2.5, 0.05)])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("axis", [-1, ()])
def test_a_nan_comes_out_where_it_went_in(kernel, setting, label, axis):
    """By the chip's own instructions, of which some drop a NaN."""
    x, at = logits_of((33, 257)), (7, 200)
    x[at] = np.nan
    y = jnp.zeros(x.shape, jnp.int8).at[at].set(label)
    options = dict(zip(("gamma_neg", "gamma_pos", "clip"), setting, strict=True))
    traced = {name: jnp.float32(number) for name, number in options.items()}
    for arguments in (options, traced):
        value, pull = jax.vjp(lambda x, a=arguments: asymmetric_loss(x, y, axis=axis, implementation=kernel, **a), x)
        assert np.argwhere(np.isnan(value)).tolist() == [list(at[: value.ndim])]
        assert np.argwhere(np.isnan(pull(jnp.ones_like(value))[0])).tolist() == [list(at)]


@pytest.mark.parametrize("classes", [100_000, 1_000_000])
def test_a_large_loss_among_small_ones_takes_none_of_their_sum(kernel, classes):
    x, y = np.full((2, classes), -8.0, np.float32), np.zeros((2, classes), np.int8)
    x[:, classes // 3], y[:, classes // 3] = -1e4, 1
    options: dict[str, Any] = {"gamma_neg": 0.0, "gamma_pos": 0.0, "clip": 0.0}
    truth = float64.asymmetric_loss(x, y, **options)
    by_name = [kernel, *(["mosaic_gpu"] if kernel == "triton" and lacks_mosaic_gpu() is None else [])]
    for implementation in by_name:
        value = asymmetric_loss(x, y, implementation=implementation, **options)
        assert np.all(np.abs(value - truth) <= (np.log2(classes) + 6) * np.finfo(np.float32).eps * truth)


@pytest.mark.parametrize("classes", [20, 128, 527])
def test_as_many_ids_as_classes_are_no_labels_per_element(kernel, classes):
    x, y = logits_of((classes, classes)), labels_of((classes, classes))
    few = SparseLabels.from_dense(y, k=classes)
    for labels in (few, few.to_packed()):
        found = asymmetric_loss(x, labels, implementation=kernel)
        np.testing.assert_allclose(found, asymmetric_loss(x, y, implementation=kernel), rtol=1e-6)


@pytest.mark.parametrize("shape", [(33, 20), (33, 527), (33, 9605)])
def test_with_64_bit_types_the_kernel_computes_the_same(kernel, shape):
    x, y = logits_of(shape), labels_of(shape)
    expected = asymmetric_loss(x, y, implementation=kernel)
    with jax.enable_x64(True):
        found = asymmetric_loss(x, y, implementation=kernel, gamma_neg=jnp.float64(4.0))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        few = asymmetric_loss(x, SparseLabels.from_dense(y), implementation=kernel)
        np.testing.assert_allclose(few, expected, rtol=1e-6)


def test_second_derivatives_and_vmap_run_on_the_chip(kernel):
    x, y = jnp.asarray(logits_of((4, 33, 257))), jnp.asarray(labels_of((4, 33, 257)))
    batched = jax.vmap(asymmetric_loss)(x, y)
    np.testing.assert_allclose(batched, asymmetric_loss(x, y), rtol=1e-6)
    direction = jnp.asarray(cotangent_of((4, 33, 257)))
    slope = jax.grad(lambda x: asymmetric_loss(x, y, axis=None))
    curvature = jax.grad(lambda x: jnp.vdot(slope(x), direction))(x)
    assert jnp.isfinite(curvature).all() and jnp.any(curvature != 0)
