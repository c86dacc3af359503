"""MultilabelHead: nnx.Linear's parameters, the fused loss, and a bias that knows how frequent labels are."""

from __future__ import annotations

import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import labels_of
from flax import linen, nnx
from jax.sharding import PartitionSpec as P

from asl_pallas import (
    AsymmetricLoss,
    PriorLogitInit,
    SparseLabels,
    asymmetric_loss,
    linear_asymmetric_loss,
    multilabel_loss,
)
from asl_pallas.flax import MultilabelHead
from asl_pallas.losses import BinaryCrossEntropy, FocalLoss

DEPTH, CLASSES = 12, 300
FREQUENCIES = np.linspace(0, 1, CLASSES) ** 3


def features(rows: int = 5) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, DEPTH)).astype(np.float32)


def test_parameters_are_those_of_linear_and_logits_too():
    head = MultilabelHead(DEPTH, CLASSES, rngs=nnx.Rngs(3))
    linear = nnx.Linear(DEPTH, CLASSES, rngs=nnx.Rngs(3))
    np.testing.assert_array_equal(head.kernel[...], linear.kernel[...])
    assert nnx.to_pure_dict(nnx.state(head)).keys() == nnx.to_pure_dict(nnx.state(linear)).keys()
    np.testing.assert_allclose(head(features()), linear(features()), rtol=1e-6, atol=1e-6)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [(None, jnp.float32), (jnp.bfloat16, jnp.float32), (jnp.bfloat16, jnp.bfloat16)]
)
@pytest.mark.parametrize("use_bias", [True, False])
def test_loss_and_top_k_are_those_of_its_logits(dtype, param_dtype, use_bias):
    head = MultilabelHead(
        DEPTH, CLASSES, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, chunk_size=128, rngs=nnx.Rngs(3)
    )
    labels = labels_of((5, CLASSES))
    logits = head(features())
    assert logits.dtype == jnp.float32
    sparse = SparseLabels.from_dense(labels)
    np.testing.assert_allclose(head.loss(features(), sparse), asymmetric_loss(logits, labels), rtol=1e-5)
    found = head.loss(features(), sparse, loss=AsymmetricLoss(gamma_neg=2.0))
    np.testing.assert_allclose(found, asymmetric_loss(logits, labels, gamma_neg=2.0), rtol=1e-5)
    best, at = jax.lax.top_k(logits, 4)
    for options, expected in (({}, AsymmetricLoss().probability(best)), ({"loss": None}, best)):
        scores, ids = head.top_k(features(), 4, **options)
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(ids, at)


@pytest.mark.parametrize("loss", [AsymmetricLoss(), BinaryCrossEntropy(), FocalLoss(2.0)], ids=repr)
@pytest.mark.parametrize("jitted", [False, True])
def test_the_bias_starts_where_labels_are_as_frequent_as_they_are(loss, jitted):
    def make() -> MultilabelHead:
        return MultilabelHead(DEPTH, CLASSES, loss=loss, label_frequencies=FREQUENCIES, rngs=nnx.Rngs(0))

    head = nnx.jit(make)() if jitted else make()
    predicted = loss.probability(np.asarray(head(np.zeros((1, DEPTH), np.float32)))[0])
    np.testing.assert_allclose(predicted, np.clip(FREQUENCIES, 1e-6, 1 - 1e-6), rtol=1e-3)
    assert np.isfinite(head.bias[...]).all()


def test_a_train_step_learns():
    head = MultilabelHead(DEPTH, CLASSES, label_frequencies=FREQUENCIES, chunk_size=64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(head, optax.adam(0.05), wrt=nnx.Param)
    f = features(16)
    labels = SparseLabels.from_dense((f @ np.random.default_rng(1).normal(size=(DEPTH, CLASSES)) > 3).astype(np.int8))

    @nnx.jit
    def step(head: MultilabelHead, optimizer: nnx.Optimizer) -> jax.Array:
        loss, gradients = nnx.value_and_grad(lambda head: head.loss(f, labels, axis=None) / 16)(head)
        optimizer.update(head, gradients)
        return loss

    losses = [float(step(head, optimizer)) for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]


def test_the_linen_twin_of_the_docstring():
    class Head(linen.Module):
        classes: int

        @linen.compact
        def __call__(self, features, labels):
            kernel = self.param("kernel", linen.initializers.lecun_normal(), (features.shape[-1], self.classes))
            bias = self.param("bias", PriorLogitInit(FREQUENCIES, AsymmetricLoss()), (self.classes,))
            return linear_asymmetric_loss(features, kernel, labels, bias=bias)

    labels = labels_of((5, CLASSES))
    parameters = Head(CLASSES).init(jax.random.key(0), features(), labels)
    loss = Head(CLASSES).apply(parameters, features(), labels)
    kernel, bias = (parameters["params"][name] for name in ("kernel", "bias"))
    np.testing.assert_allclose(loss, asymmetric_loss(features() @ kernel + bias, labels), rtol=1e-5)


@pytest.mark.parametrize("how", ["metadata", "with_partitioning"])
def test_names_of_mesh_axes_place_the_parameters(how):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    if how == "metadata":
        options = {"kernel_metadata": {"out_sharding": (None, "model")}, "bias_metadata": {"out_sharding": ("model",)}}
    else:
        options = {
            "kernel_init": nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model")),
            "bias_init": nnx.with_partitioning(PriorLogitInit(FREQUENCIES, AsymmetricLoss()), ("model",)),
        }
    with jax.set_mesh(mesh):
        head = nnx.jit(lambda: MultilabelHead(DEPTH, CLASSES, rngs=nnx.Rngs(3), **options))()
        assert head.kernel[...].sharding.spec == P(None, "model")
        assert head.bias[...].sharding.spec == P("model")
        labels = labels_of((8, CLASSES))
        specs = {"features_spec": P("data"), "kernel_spec": P(None, "model")}
        loss = nnx.jit(lambda head: head.loss(features(8), labels, **specs))(head)
        expected = nnx.jit(lambda head: head(features(8)))(head)
    np.testing.assert_allclose(loss, asymmetric_loss(np.asarray(expected), labels), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"label_frequencies": FREQUENCIES[1:]}, "frequencies have shape (299,); expected (300,), the bias's"),
        ({"label_frequencies": FREQUENCIES + 1}, "frequencies hold 1.0000000"),
        ({"label_frequencies": FREQUENCIES, "use_bias": False}, "use_bias=False leaves it out"),
        ({"label_frequencies": FREQUENCIES, "bias_init": nnx.initializers.zeros_init()}, "expected one of them"),
    ],
)
def test_a_bias_that_cannot_be_is_named(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        MultilabelHead(DEPTH, CLASSES, rngs=nnx.Rngs(0), **options)


def test_the_package_itself_needs_no_flax():
    code = "import sys, asl_pallas; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("gamma", [2.0, np.linspace(0, 4, CLASSES, dtype=np.float32)])
def test_a_head_trains_with_the_loss_object_it_is_given(gamma):
    loss = FocalLoss(jnp.asarray(gamma) if isinstance(gamma, np.ndarray) else gamma, 0.25)
    head = MultilabelHead(DEPTH, CLASSES, loss=loss, chunk_size=128, rngs=nnx.Rngs(3))
    labels = labels_of((5, CLASSES))
    expected = multilabel_loss(loss, head(features()), labels)
    np.testing.assert_allclose(head.loss(features(), labels), expected, rtol=1e-5)
    np.testing.assert_allclose(nnx.jit(lambda h, x, y: h.loss(x, y))(head, features(), labels), expected, rtol=1e-5)
    optimizer = nnx.Optimizer(head, optax.sgd(0.01), wrt=nnx.Param)

    @nnx.jit
    def step(head, optimizer, x, y):
        total, gradients = nnx.value_and_grad(lambda head: head.loss(x, y, axis=None))(head)
        optimizer.update(head, gradients)
        return total

    totals = [float(step(head, optimizer, features(), labels)) for _ in range(5)]
    assert totals[-1] < 0.9 * totals[0]
    assert head.kernel[...].shape == (DEPTH, CLASSES)


def test_a_heads_loss_is_a_loss_object():
    with pytest.raises(TypeError, match="loss='focal'; expected a loss object"):
        MultilabelHead(DEPTH, CLASSES, loss="focal", rngs=nnx.Rngs(3))
