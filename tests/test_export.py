"""A host without an accelerator writes modules for all of them, and reads them back."""

from __future__ import annotations

from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from cases import labels_of, logits_of

from asl_pallas import EXPORT_CHECKS, PackedLabels, SparseLabels, asymmetric_loss, linear_asymmetric_loss, linear_top_k

PLATFORMS = ("cpu", "tpu", "cuda")
# Enough elements for a kernel on each platform.
ROWS, DEPTH, CLASSES = 260, 8, 1025
FORMS = {"dense": np.asarray, "packed": PackedLabels.from_dense, "sparse": SparseLabels.from_dense}


def round_trip(f: Any, *operands: Any) -> tuple[Any, str]:
    """What the module gives when it is called here, and its text."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands)
    exported = jax.export.export(jax.jit(f), platforms=PLATFORMS, disabled_checks=EXPORT_CHECKS)(*shapes)
    again = jax.export.deserialize(exported.serialize())
    assert again.platforms == PLATFORMS
    return again.call(*operands), exported.mlir_module()


def assert_same(found: Any, expected: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gradient", [False, True])
def test_the_loss_with_labels_in_every_form_goes_through_a_module_for_all_platforms(form, gradient):
    def loss(x: Any, y: Any) -> Any:
        return asymmetric_loss(x, y, axis=None)

    f = jax.value_and_grad(loss) if gradient else loss
    operands = logits_of((ROWS, CLASSES)), FORMS[form](labels_of((ROWS, CLASSES)))
    found, text = round_trip(f, *operands)
    assert_same(found, jax.jit(f)(*operands))
    assert "tpu_custom_call" in text and "__gpu$xla.gpu.triton" in text


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("form", FORMS)
def test_the_head_goes_through_a_module_for_all_platforms(form):
    def loss(f: Any, w: Any, y: Any) -> Any:
        return linear_asymmetric_loss(f, w, y, axis=None)

    random = np.random.default_rng(0)
    features, kernel = (random.normal(size=n).astype(np.float32) for n in ((ROWS, DEPTH), (DEPTH, CLASSES)))
    operands = features, kernel, FORMS[form](labels_of((ROWS, CLASSES)))
    step = jax.value_and_grad(loss, (0, 1))
    found, text = round_trip(step, *operands)
    assert_same(found, jax.jit(step)(*operands))
    assert "tpu_custom_call" in text and "__gpu$xla.gpu.triton" in text
    found, _ = round_trip(lambda f, w: linear_top_k(f, w, 5), features, kernel)
    assert_same(found, linear_top_k(features, kernel, 5))


def test_a_mesh_of_cpus_in_context_is_no_hindrance():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    shape = jax.ShapeDtypeStruct((ROWS, CLASSES + 7), jnp.float32)
    with jax.set_mesh(mesh):
        export = jax.export.export(jax.jit(asymmetric_loss), platforms=PLATFORMS, disabled_checks=EXPORT_CHECKS)
        text = export(shape, jax.ShapeDtypeStruct(shape.shape, jnp.int8)).mlir_module()
    assert "__gpu$xla.gpu.triton" in text


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("form", FORMS)
def test_a_symbolic_batch_goes_through_a_module_for_all_platforms(form):
    """Loss, gradient, head and top-k, called with batches of several sizes."""
    (batch,) = jax.export.symbolic_shape("batch")
    classes = 300
    random = np.random.default_rng(0)
    kernel = random.normal(size=(DEPTH, classes)).astype(np.float32)

    def loss(x: Any, y: Any) -> Any:
        return asymmetric_loss(x, y).mean()

    def head(features: Any, kernel: Any, y: Any) -> Any:
        return linear_asymmetric_loss(features, kernel, y, axis=None)

    def example(rows: int) -> tuple[Any, Any, Any]:
        y = labels_of((rows, classes), rows)
        labels = SparseLabels.from_dense(y, k=150) if form == "sparse" else FORMS[form](y)
        return logits_of((rows, classes), rows), random.normal(size=(rows, DEPTH)).astype(np.float32), labels

    def symbolic(array: Any) -> Any:
        return jax.ShapeDtypeStruct((batch, *array.shape[1:]), array.dtype)

    def exported(f: Any, *operands: Any) -> Any:
        module = jax.export.export(jax.jit(f), platforms=PLATFORMS, disabled_checks=EXPORT_CHECKS)(*operands)
        return jax.export.deserialize(module.serialize()).call

    x, features, y = (jax.tree.map(symbolic, one) for one in example(4))
    for f, run in (
        (jax.value_and_grad(loss), exported(jax.value_and_grad(loss), x, y)),
        (asymmetric_loss, exported(asymmetric_loss, x, y)),
    ):
        for rows in (1, 40):
            logits, _, labels = example(rows)
            assert_same(run(logits, labels), jax.jit(f)(logits, labels))
    step = jax.value_and_grad(head, (0, 1))
    run, best = exported(step, features, kernel, y), exported(lambda f, w: linear_top_k(f, w, 5), features, kernel)
    for rows in (1, 40):
        _, given, labels = example(rows)
        assert_same(run(given, kernel, labels), jax.jit(step)(given, kernel, labels))
        assert_same(best(given, kernel), linear_top_k(given, kernel, 5))


def test_a_kernel_by_name_says_that_it_needs_known_sizes():
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = (jax.ShapeDtypeStruct((batch, 300), dtype) for dtype in (jnp.float32, jnp.int8))
    with pytest.raises(NotImplementedError, match="blocks are made for known sizes, and the logits have the symbolic"):
        jax.export.export(jax.jit(lambda x, y: asymmetric_loss(x, y, implementation="triton")))(*shapes)
