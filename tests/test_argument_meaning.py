"""Arguments that could mean two things mean one, or are refused; what another library calls otherwise is named."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_parity, evaluate, labels_of, logits_of
from flax import nnx

from asl_pallas import SparseLabels, asymmetric_loss, linear_asymmetric_loss, linear_top_k
from reference import float64

IMAGES = (2, 3, 5, 4)  # (N, C, H, W)
RANDOM = np.random.default_rng(0)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("axis", [-1, 1, (), None, (1, 2, 3)])
@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 3, 1, 1), (1, 4), (2, 1, 5, 1), IMAGES, (2, 1, 1, 1), (1,), ()])
@pytest.mark.parametrize("name", ["pos_weight", "weights"])
def test_a_weight_of_any_shape_broadcasts_as_numpys_arrays_do(name, shape, axis):
    x, y = logits_of(IMAGES), labels_of(IMAGES)
    assert_parity(x, y, implementation=None, axis=axis, **{name: RANDOM.random(shape).astype(np.float32)})


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("kernel", ["mosaic_tpu", "triton"])
@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 1, 5, 1), IMAGES])
def test_a_kernel_takes_a_pos_weight_of_any_shape(kernel, shape):
    x, y = logits_of(IMAGES), labels_of(IMAGES)
    assert_parity(x, y, implementation=kernel, pos_weight=RANDOM.random(shape).astype(np.float32))


def test_the_head_takes_a_pos_weight_of_any_shape():
    features, kernel = RANDOM.normal(size=(4, 3)), RANDOM.normal(size=(3, 7))
    y = labels_of((4, 7))
    for shape in ((4, 1), (4, 7), (1, 7), (7,), ()):
        w = RANDOM.random(shape)
        found = linear_asymmetric_loss(np.float32(features), np.float32(kernel), y, pos_weight=w, chunk_size=3)
        truth = float64.asymmetric_loss(features @ kernel, y, pos_weight=w)
        np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.mostly_long(short=9)
@pytest.mark.parametrize("name", ["where", "weights", "pos_weight"])
@pytest.mark.parametrize(
    ("shape", "axis", "says"),
    [
        ((2, 4, 5, 4), 1, ["(4,)", "last axis", "(4, 1, 1) for axis 1", "(1, 4)"]),
        ((2, 3, 5, 4), 1, None),  # fits the width alone
        ((2, 3, 5, 4), -1, None),
        ((2, 4, 5, 4), (1, 3), None),
        ((4, 4), 0, ["(4,)", "(4, 1) for axis 0", "(1, 4)"]),
        ((5, 4), 0, None),
        ((2, 4, 5, 3), 1, ["(4,)", "(2, 4, 5, 3)", "(4, 1, 1) for axis 1"]),
    ],
)
def test_a_vector_that_could_go_along_either_of_two_axes_is_refused(name, shape, axis, says):
    vector = np.ones(4, bool if name == "where" else np.float32)
    x, y = np.zeros(shape, np.float32), np.zeros(shape, np.int8)
    if says is None:
        asymmetric_loss(x, y, axis=axis, **{name: vector})
        asymmetric_loss(x, y, axis=axis, **{name: vector[None]})
        return
    with pytest.raises(ValueError, match=name) as error:
        asymmetric_loss(x, y, axis=axis, **{name: vector})
    assert all(part in str(error.value) for part in says)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(
    ("dtype", "ignore_label", "held"),
    [("uint8", -1, "0 to 255"), ("int8", 255, "-128 to 127"), ("int32", 2**31, "2147")],
)
def test_an_ignore_label_that_the_labels_dtype_cannot_hold_is_refused(dtype, ignore_label, held, traced):
    x, y = np.zeros((2, 3), np.float32), np.zeros((2, 3), dtype)

    def loss(y: Any) -> Any:
        return asymmetric_loss(x, y, ignore_label=ignore_label)

    def head(y: Any) -> Any:
        return linear_asymmetric_loss(x, np.zeros((3, 3), np.float32), y, ignore_label=ignore_label)

    for call in (loss, head):
        with pytest.raises(ValueError, match=f"ignore_label={ignore_label}.*{dtype}.*{held}"):
            (jax.jit(call) if traced else call)(y)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("implementation", ["xla", "mosaic_tpu", "triton"])
@pytest.mark.parametrize(("dtype", "ignore_label"), [("uint32", 2**32 - 2), ("int32", -(2**31)), ("int16", 32767)])
def test_an_ignore_label_may_be_at_the_end_of_the_labels_range(dtype, ignore_label, implementation):
    y = labels_of((4, 6), dtype="int64", ignore_label=ignore_label).astype(dtype)
    x = logits_of((4, 6))
    assert_parity(x, y, implementation=implementation, ignore_label=ignore_label)


FOREIGN = {
    "weight": "weights",
    "reduction": "axis=None",
    "smoothing": "label_smoothing",
    "eps": "leave it out",
    "disable_torch_grad_focal_loss": "stop_focus_gradient=True",
    "gamma": "gamma_neg",
    "alpha": "pos_weight=alpha",
    "mask": "where",
    "targets": "labels",
    "ignore_index": "ignore_label",
}


@pytest.mark.mostly_long(short=6)
@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("function", [asymmetric_loss, linear_asymmetric_loss])
def test_a_name_of_torchs_timms_or_optaxs_is_answered_with_ours(function, name):
    with pytest.raises(TypeError, match=f"{function.__name__} has no argument '{name}'; write .*{FOREIGN[name]}"):
        function(np.zeros((2, 3)), np.zeros((2, 3)), **{name: 1})


def test_optaxs_alpha_is_what_the_sentence_says():
    optax = pytest.importorskip("optax")
    x, y = logits_of((4, 6)), labels_of((4, 6))
    ours = asymmetric_loss(
        x, y, gamma_neg=2, gamma_pos=2, clip=0, pos_weight=0.25 / (1 - 0.25), weights=1 - 0.25, axis=()
    )
    np.testing.assert_allclose(ours, optax.sigmoid_focal_loss(x, y, alpha=0.25, gamma=2), rtol=1e-5, atol=1e-6)


def test_another_unknown_name_gets_pythons_sentence_and_the_signature_is_shown():
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        asymmetric_loss(np.zeros((2, 3)), np.zeros((2, 3), np.int8), colour=1)  # type: ignore[call-arg]
    import inspect

    assert "gamma_neg" in inspect.signature(asymmetric_loss).parameters
    assert asymmetric_loss.__doc__ and asymmetric_loss.__name__ == "asymmetric_loss"


def test_without_flax_the_import_names_the_extra():
    """In a process of its own, where flax isn't found."""
    program = "import sys; sys.modules['flax'] = None; import asl_pallas; import asl_pallas.flax"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert "ImportError: asl_pallas.flax needs flax: pip install 'asl-pallas[flax]'" in found.stderr


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("shape", [(4, 0), (2, 3, 0)])
def test_features_without_depth_have_the_bias_for_their_logits(shape):
    features, kernel = np.zeros(shape, np.float32), np.zeros((0, 7), np.float32)
    bias = logits_of((7,))
    y = labels_of((*shape[:-1], 7))
    x = np.broadcast_to(bias, y.shape)

    def loss(features: Any, kernel: Any, bias: Any) -> Any:
        return linear_asymmetric_loss(features, kernel, y, bias=bias, chunk_size=3).sum()

    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(features, kernel, bias)
    np.testing.assert_allclose(value, float64.asymmetric_loss(x, y, axis=None), rtol=1e-6)
    assert [g.shape for g in gradients] == [shape, (0, 7), (7,)]
    truth = float64.gradient(x, y, np.ones(y.shape[:-1])).sum(tuple(range(y.ndim - 1)))
    np.testing.assert_allclose(gradients[2], truth, rtol=1e-5, atol=1e-6)
    scores, _ = linear_top_k(features, kernel, 2, bias=bias)
    np.testing.assert_array_equal(scores, np.broadcast_to(np.sort(bias)[::-1][:2], scores.shape))


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("function", ["loss", "head"])
def test_operands_may_be_variables_of_flax(function):
    x, y = logits_of((4, 6)), labels_of((4, 6))
    arrays = {
        "where": np.ones((4, 6), bool),
        "weights": np.ones((4, 1), np.float32),
        "pos_weight": np.ones(6, np.float32),
    }
    kernel = np.eye(6, dtype=np.float32)

    def call(x: Any, y: Any, arrays: Any) -> Any:
        if function == "loss":
            return asymmetric_loss(x, y, **arrays)
        return linear_asymmetric_loss(x, nnx.Variable(jnp.asarray(kernel)), y, **arrays)

    wrapped = jax.tree.map(lambda a: nnx.Variable(jnp.asarray(a)), (x, y, arrays))
    for run in (call, nnx.jit(call)):
        np.testing.assert_allclose(run(*wrapped), float64.asymmetric_loss(x, y), rtol=1e-5, atol=1e-6)


def test_a_hyper_parameter_may_be_a_variable_of_flax():
    x, y = logits_of((4, 6)), labels_of((4, 6))
    gamma = nnx.Variable(jnp.float32(2.0))
    for run in (asymmetric_loss, nnx.jit(asymmetric_loss)):
        found = run(x, y, gamma_neg=gamma)
        np.testing.assert_allclose(found, float64.asymmetric_loss(x, y, gamma_neg=2.0), rtol=1e-5, atol=1e-6)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("kernel", ["xla", "mosaic_tpu", "triton"])
@pytest.mark.parametrize(
    ("rows", "classes", "k"),
    [(20, 20, 20), (128, 128, 128), (1, 1, 1), (3, 20, 20), (20, 33, 20), (20, 33, 33), (8, 1, 1)],
)
def test_rows_classes_ids_and_words_may_be_equally_many(kernel, rows, classes, k):
    """Nothing is told by a shape: 128 classes have 128 words, and k may be the number of classes or of rows."""
    x, y = logits_of((rows, classes)), labels_of((rows, classes))
    ct = RANDOM.normal(size=rows).astype(np.float32)
    sparse = SparseLabels.from_dense(y, k=k)
    options: dict[str, Any] = {"weights": RANDOM.random((rows, 1)).astype(np.float32)}
    if rows != classes:
        options["pos_weight"] = RANDOM.random(classes).astype(np.float32)
    dense = evaluate(x, y, ct, implementation=kernel, **options)
    for labels in (sparse, sparse.to_packed()):
        for found, expected in zip(evaluate(x, labels, ct, implementation=kernel, **options), dense, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_timms_label_smoothing_is_what_the_docstring_says(clip):
    """Its formula restated in float64: the focus is of the smoothed label, where ours is each side's own."""
    x, y, s = RANDOM.normal(0, 3, (4, 6)), labels_of((4, 6)), 0.1
    smoothed = y * (1 - s) + s / 2
    p = 1 / (1 + np.exp(-x))
    q_m = np.minimum(1 - p + clip, 1)
    focus = (1 - (p * smoothed + q_m * (1 - smoothed))) ** (1 * smoothed + 4 * (1 - smoothed))
    theirs = -(smoothed * np.log(p) + (1 - smoothed) * np.log(q_m)) * focus
    found = asymmetric_loss(
        np.float32(x), y, gamma_neg=0, gamma_pos=0, clip=clip, label_smoothing=s, weights=np.float32(focus), axis=()
    )
    np.testing.assert_allclose(found, theirs, rtol=1e-5, atol=1e-6)
    ours = asymmetric_loss(np.float32(x), y, clip=clip, label_smoothing=s, axis=())
    assert not np.allclose(ours, theirs, rtol=0.05)
