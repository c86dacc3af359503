"""Under jax.vmap a kernel is chosen by what there is in all, and runs once."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest
from cases import interpreted, labels_of, logits_of
from pairwise import pairwise

from asl_pallas import PackedLabels, SparseLabels, asymmetric_loss, multilabel_loss
from asl_pallas.losses import FocalLoss

KERNELS = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}


def lowered(platform: str, f: Any, *operands: Any) -> str:
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), operands)
    return jax.jit(f).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def calls(text: str, platform: str) -> list[str]:
    """The lines that call a kernel."""
    return [line for line in text.splitlines() if KERNELS[platform] in line]


def loss(x: Any, y: Any, **options: Any) -> Any:
    return asymmetric_loss(x, y, **options)


LABELS = {
    "dense": lambda y: y,
    "packed": PackedLabels.from_dense,
    "sparse": lambda y: SparseLabels.from_dense(y, k=90),
}


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("form", LABELS)
@pytest.mark.parametrize("platform", KERNELS)
def test_a_loss_of_one_example_is_the_kernel_of_the_batch(platform, form, gradient):
    """As an Equinox model is written: one example has too few elements for a kernel, and a batch hasn't."""
    x, y = logits_of((4096, 150)), LABELS[form](labels_of((4096, 150)))
    step = jax.value_and_grad(loss) if gradient else loss
    text = lowered(platform, jax.vmap(step), x, y)
    assert len(calls(text, platform)) == 1
    alone = jax.tree.map(lambda a: a[0], y)
    assert not calls(lowered(platform, step, x[0], alone), platform) or form != "dense"


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("in_axis", [0, 1, 2])
@pytest.mark.parametrize("platform", KERNELS)
def test_so_are_nested_maps_over_any_axis(platform, in_axis):
    x, y = logits_of((16, 16, 16, 150)), labels_of((16, 16, 16, 150))
    f = jax.vmap(jax.vmap(jax.vmap(loss)), in_axes=in_axis)
    (call,) = calls(lowered(platform, f, x, y), platform)
    assert re.search(r"4096x150x|614400x|150x4096x", call), call


IN_AXES: dict[str, tuple[Any, ...]] = {
    "all": (0, 0, 0, 0, 0),
    "weights shared": (0, 0, None, 0, 0),
    "pos_weight shared": (0, 0, 0, None, 0),
    "gamma shared": (0, 0, 0, 0, None),
    "logits alone": (0, None, None, None, None),
    "labels alone": (None, 0, None, None, None),
    "gamma alone": (None, None, None, None, 0),
    "other axes": (1, 1, 0, 0, 0),
}


@pytest.mark.mostly_long(short=8)
@pytest.mark.parametrize(("axes", "rows", "kernel"), pairwise(IN_AXES, (None, 4), ("xla", "mosaic_tpu", "triton")))
def test_each_example_has_its_own_loss_and_gradient(axes, rows, kernel):
    """Whatever is mapped, of vectors and of matrices: the numbers are those of one call after the other."""
    size, classes = 3, 150
    of_example = (classes,) if rows is None else (rows, classes)
    random = np.random.default_rng(0)
    operands = [
        logits_of((size, *of_example)),
        labels_of((size, *of_example)),
        random.random((size, *((1,) if rows is None else (rows, 1)))).astype(np.float32),
        random.uniform(0.5, 2, (size, classes)).astype(np.float32),
        np.float32([1.0, 2.5, 4.0]),
    ]
    in_axes = IN_AXES[axes]

    def one(x: Any, y: Any, w: Any, p: Any, gamma: Any) -> Any:
        def total(x: Any) -> Any:
            return asymmetric_loss(x, y, weights=w, pos_weight=p, gamma_neg=gamma, implementation=kernel).sum()

        return jax.value_and_grad(total)(x)

    given = [a if axis is not None else a[0] for a, axis in zip(operands, in_axes, strict=True)]
    moved = [np.moveaxis(a, 0, axis) if axis else a for a, axis in zip(given, in_axes, strict=True)]
    with interpreted(kernel):
        found = jax.jit(jax.vmap(one, in_axes))(*moved)
    for i in range(size):
        each = [a if axis is None else a[i] for a, axis in zip(given, in_axes, strict=True)]
        with interpreted(kernel):
            expected = jax.jit(one)(*each)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours[i], theirs, rtol=2e-5, atol=1e-5)


def test_arrays_of_hyper_parameters_map_too():
    x, y = logits_of((3, 4, 150)), labels_of((3, 4, 150))
    gammas = np.random.default_rng(0).uniform(0, 4, (3, 150)).astype(np.float32)
    found = jax.vmap(lambda x, y, g: multilabel_loss(FocalLoss(g), x, y))(x, y, gammas)
    for i in range(3):
        np.testing.assert_allclose(found[i], multilabel_loss(FocalLoss(gammas[i]), x[i], y[i]), rtol=1e-5)
