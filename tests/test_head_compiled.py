"""What the compilers make of the fused head: chunks in fast memory, and no copy of the kernel."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from test_compiled import available, holds_kernel

from asl_pallas import PackedLabels, SparseLabels, asymmetric_loss, linear_asymmetric_loss, linear_top_k
from asl_pallas.bits import words_for
from profiling import targets

S = jax.ShapeDtypeStruct
MIB = 2**20
ROWS, DEPTH, CLASSES = 4096, 1024, 131_072


def shapes(form: str, classes: int = CLASSES, kernel: str = "bfloat16") -> tuple[Any, ...]:
    labels = {
        "dense": S((ROWS, classes), jnp.int8),
        "packed": PackedLabels.tree_unflatten(classes, (S((ROWS, words_for(classes)), jnp.uint32),)),
        "sparse": SparseLabels.tree_unflatten(classes, (S((ROWS, 16), jnp.int32),)),
    }
    of_kernel = S((DEPTH, classes), jnp.dtype(kernel))
    return S((ROWS, DEPTH), jnp.bfloat16), of_kernel, S((classes,), jnp.float32), labels[form]


def step(axis: int | None = None) -> Any:
    def total(f: Any, w: Any, b: Any, y: Any) -> Any:
        return jnp.sum(linear_asymmetric_loss(f, w, y, bias=b, axis=axis))

    return jax.value_and_grad(total, (0, 1, 2))


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize(
    ("form", "axis", "classes", "kernel", "most"),
    [
        ("sparse", None, CLASSES, "bfloat16", 8),
        ("packed", -1, CLASSES, "bfloat16", 8),
        # A float32 kernel that XLA converts ahead of the loop would take 256 MiB.
        ("sparse", None, CLASSES, "float32", 8),
        # One more class than the chunks have.
        ("sparse", None, CLASSES + 1, "bfloat16", 8),
        ("sparse", None, 1_048_576, "bfloat16", 64),
    ],
)
def test_on_a_v5e_no_logits_are_in_memory_and_no_kernel_twice(form, axis, classes, kernel, most):
    compiled = targets.compile_for(available("v5e"), step(axis), *shapes(form, classes, kernel))
    assert holds_kernel("v5e", compiled)
    assert targets.temporary_bytes(compiled) <= most * MIB
    assert_kernel_is_not_copied(compiled, classes)


def test_on_an_h100_chunks_alone_are_in_memory():
    compiled = targets.compile_for(available("h100"), step(), *shapes("sparse"))
    assert holds_kernel("h100", compiled)
    assert targets.temporary_bytes(compiled) <= 128 * MIB
    assert_kernel_is_not_copied(compiled, CLASSES)


def assert_kernel_is_not_copied(compiled: Any, classes: int) -> None:
    made = re.findall(rf"= \w+\[{DEPTH},{classes}\]\S* (copy|convert|transpose)\(", compiled.as_text())
    assert not made


@pytest.mark.long
def test_forward_alone_and_top_k_need_next_to_nothing():
    f, w, b, labels = shapes("sparse")
    forward = targets.compile_for(available("v5e"), lambda f, w, y: linear_asymmetric_loss(f, w, y), f, w, labels)
    best = targets.compile_for("v5e", lambda f, w, b: linear_top_k(f, w, 5, bias=b), f, w, b)
    for compiled in (forward, best):
        assert targets.temporary_bytes(compiled) + compiled.memory_analysis().output_size_in_bytes <= 2 * MIB


def test_on_the_cpu_a_twentieth_of_what_the_logits_take():
    rows, depth = 256, 256
    labels = S((rows, CLASSES), jnp.int8)
    operands = (S((rows, depth), jnp.float32), S((depth, CLASSES), jnp.float32), labels)

    def unfused(f: Any, w: Any, y: Any) -> Any:
        return asymmetric_loss(f @ w, y, axis=None)

    def fused(f: Any, w: Any, y: Any) -> Any:
        return linear_asymmetric_loss(f, w, y, axis=None)

    ours, theirs = (
        targets.temporary_bytes(jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*operands).compile())
        for loss in (fused, unfused)
    )
    assert 20 * ours <= theirs
