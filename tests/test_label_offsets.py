"""Dense labels of more classes than the logits: a head's chunk reads its own where they lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KERNELS, interpreted

from asl_pallas import AsymmetricLoss, kernels, linear_multilabel_loss, multilabel_loss
from asl_pallas.kernels.operands import ALIGNED_CLASSES, Operands
from asl_pallas.kernels.tile import Task


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize(
    ("implementation", "rows", "classes", "first", "of_all"),
    [
        ("xla", 3, 32, 48, 96),
        ("xla", 40, 2048, 2064, 6160),  # block by block on the CPU
        ("triton", 3, 4096, 16, 4128),
        ("triton", 9, 304, 304, 608),  # a last chunk that isn't all there
        ("triton", 1, 16, 16, 32),
        ("mosaic_tpu", 9, 304, 160, 608),
    ],
)
@pytest.mark.parametrize("dtype", [np.int8, np.bool_])
def test_labels_at_an_offset_are_those_of_a_slice(implementation, rows, classes, first, of_all, dtype, statistics):
    random = np.random.default_rng(classes)
    logits = jnp.asarray(random.normal(0, 3, (rows, classes)), jnp.float32)
    labels = jnp.asarray(random.random((rows, of_all)) < 0.3).astype(dtype)
    assert first % ALIGNED_CLASSES == classes % ALIGNED_CLASSES == 0
    task = Task(AsymmetricLoss(), "rows", gradient=True, statistics=statistics)
    at_offset = Operands(logits, labels, first_class=jnp.array([first], jnp.int32))
    of_slice = Operands(logits, labels[:, first : first + classes])

    def run(operands):
        return kernels.run(task, operands, implementation, implementation in KERNELS)

    found, expected = jax.jit(run)(at_offset), jax.jit(run)(of_slice)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert np.any(np.asarray(found.value) != np.asarray(run(of_slice._replace(labels=labels[:, :classes])).value))


@pytest.mark.parametrize("implementation", ["triton", "xla"])
@pytest.mark.parametrize("leading", [(5,), (2, 3)])
def test_a_head_with_labels_in_their_place_gives_what_its_logits_give(implementation, leading):
    random = np.random.default_rng(5)
    features = jnp.asarray(random.normal(0, 1, (*leading, 8)), jnp.float32)
    kernel = jnp.asarray(random.normal(0, 1, (8, 272)), jnp.float32)
    labels = jnp.asarray(random.random((*leading, 272)) < 0.2, jnp.int8)
    loss = AsymmetricLoss()

    def fused(features, kernel):
        return linear_multilabel_loss(
            loss, features, kernel, labels, axis=None, chunk_size=64, implementation=implementation
        )

    def unfused(features, kernel):
        return multilabel_loss(loss, jnp.dot(features, kernel, precision="highest"), labels, axis=None)

    with interpreted(implementation):
        found = jax.jit(jax.value_and_grad(fused, (0, 1)))(features, kernel)
    expected = jax.jit(jax.value_and_grad(unfused, (0, 1)))(features, kernel)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), found, expected)


@pytest.mark.parametrize("labels_are_mapped", [True, False])
def test_under_vmap_each_example_has_its_own(labels_are_mapped):
    random = np.random.default_rng(6)
    features = jnp.asarray(random.normal(0, 1, (3, 5, 8)), jnp.float32)
    kernel = jnp.asarray(random.normal(0, 1, (8, 272)), jnp.float32)
    labels = jnp.asarray(random.random((3, 5, 272)) < 0.2, jnp.int8)

    def one(features, labels):
        return linear_multilabel_loss(AsymmetricLoss(), features, kernel, labels, chunk_size=64)

    mapped = jax.jit(jax.vmap(one, (0, 0 if labels_are_mapped else None)))
    found = mapped(features, labels if labels_are_mapped else labels[0])
    expected = [one(features[n], labels[n if labels_are_mapped else 0]) for n in range(3)]
    np.testing.assert_allclose(found, np.stack(expected), rtol=1e-5)


def test_a_heads_loop_slices_no_dense_labels_for_triton():
    rows, classes, chunk = 2048, 16384, 4096

    def loss(features, kernel, labels):
        return linear_multilabel_loss(AsymmetricLoss(), features, kernel, labels, axis=None, chunk_size=chunk)

    def lowered_for(platform):
        features, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, 32), (32, classes)))
        labels = jax.ShapeDtypeStruct((rows, classes), jnp.int8)
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(features, kernel, labels)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    of_a_chunk = f"tensor<{rows}x{chunk}xi8>"
    assert "triton" in lowered_for("cuda") and of_a_chunk not in lowered_for("cuda")
    assert of_a_chunk in lowered_for("cpu")
