"""`explain` says what the lowered program shows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from asl_pallas import AsymmetricLoss, PackedLabels, SparseLabels, explain, multilabel_loss
from asl_pallas.bits import words_for

S = jax.ShapeDtypeStruct
CALLS = {"mosaic_tpu": "tpu_custom_call", "triton": "triton", "xla": None}


def labels_like(form, rows, classes):
    return {
        "int8": S((rows, classes), jnp.int8),
        "packed": PackedLabels.tree_unflatten(classes, (S((rows, words_for(classes)), jnp.uint32),)),
        "sparse": SparseLabels.tree_unflatten(classes, (S((rows, 5), jnp.int32),)),
    }[form]


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda", "rocm"])
@pytest.mark.parametrize(
    ("rows", "classes", "dtype", "form", "options"),
    [
        (2048, 150, "float32", "int8", {}),
        (8, 20, "float32", "int8", {}),
        (1024, 4096, "bfloat16", "packed", {}),
        (1024, 4096, "float32", "sparse", {"statistics": True}),
        (1024, 4096, "float16", "int8", {}),
        (1024, 4096, "float32", "int8", {"axis": 0}),
        (1024, 4096, "float32", "int8", {"axis": ()}),
    ],
)
def test_it_names_what_is_lowered(platform, rows, classes, dtype, form, options):
    logits, labels = S((rows, classes), dtype), labels_like(form, rows, classes)
    found = explain(logits, labels, platform=platform, **options)

    def total(logits, labels):
        return jax.tree.map(jnp.sum, multilabel_loss(AsymmetricLoss(), logits, labels, **options))

    step = jax.jit(jax.value_and_grad(total, has_aux=options.get("statistics", False)))
    text = step.trace(logits, labels).lower(lowering_platforms=(platform,)).as_text()
    expected = [name for name, call in CALLS.items() if call and call in text] or ["xla"]
    assert [found.implementation] == expected
    assert set(found.others) | {found.implementation} == {"xla", "mosaic_tpu", "triton", "mosaic_gpu"}
    assert str(found).startswith(f"{found.implementation} on {platform}: ")


@pytest.mark.parametrize(
    ("options", "name", "reason"),
    [
        ({"platform": "tpu"}, "triton", "it is for cuda"),
        ({"platform": "tpu"}, "mosaic_tpu", "loads no float16 logits"),
        ({"platform": "cuda", "axis": 0}, "triton", "axis=0 leaves the classes in"),
        ({"platform": "cuda", "implementation": "xla"}, "triton", "another was asked for"),
    ],
)
def test_it_says_why_the_others_are_not_used(options, name, reason):
    shape = (1024, 4096)
    assert reason in explain(S(shape, jnp.float16), S(shape, jnp.int8), **options).others[name]


def test_small_problems_and_other_kernels_have_their_reason():
    assert "XLA's own loop is faster for 8 x 20" in str(explain(jnp.zeros((8, 20)), jnp.zeros((8, 20)), platform="tpu"))
    large = explain(S((4096, 8192), jnp.bfloat16), S((4096, 8192), jnp.int8), platform="cuda")
    assert large.implementation == "triton" and "mosaic_gpu" in large.others


def test_here_it_is_the_cpu():
    found = explain(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    assert found.platform == jax.default_backend() == "cpu"
    assert found.implementation == "xla" and "no kernel of its own" in found.reason


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"platform": "metal"}, ValueError, "platform='metal'; expected None or one of 'cpu', 'tpu', 'cuda', 'rocm'"),
        ({"implementation": "triton"}, NotImplementedError, "implementation='triton' can't serve this call: it is for"),
        ({"axis": 3}, ValueError, "axis=3"),
        ({"loss": 4.0}, TypeError, "loss"),
    ],
)
def test_what_it_refuses(options, error, sentence):
    with pytest.raises(error, match=sentence):
        explain(jnp.zeros((2, 3)), jnp.zeros((2, 3)), **options)
