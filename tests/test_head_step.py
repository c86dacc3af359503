"""A head's step without the kernel's gradient, against the ordinary one, for each optimizer, label form and mesh."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_statistics import FORMS

from asl_pallas import AsymmetricLoss, PackedLabels, linear_multilabel_loss, linear_multilabel_step
from asl_pallas.losses import HillLoss

ROWS, DEPTH, CLASSES = 16, 8, 300
RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.normal(size=(ROWS, DEPTH)).astype(np.float32)
KERNEL = (RANDOM.normal(size=(DEPTH, CLASSES)) * 0.3).astype(np.float32)
BIAS = RANDOM.normal(size=CLASSES).astype(np.float32)
LABELS = (RANDOM.random((ROWS, CLASSES)) < 0.1).astype(np.int8)
LOSS = AsymmetricLoss()
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(1e-2),
    "adagrad": optax.adagrad(0.1),
    "rmsprop": optax.rmsprop(1e-2, centered=True),
    "lion": optax.lion(1e-3),
    "schedule": optax.sgd(optax.linear_schedule(0.1, 0.01, 3)),
    "chain": optax.chain(optax.clip(0.01), optax.add_decayed_weights(0.1), optax.sgd(0.1)),
}


def ordinary(loss: Any, kernel: Any, labels: Any, optimizer: Any, state: Any, bias: Any = BIAS, **options: Any) -> Any:
    """Loss, gradients of features and bias, the new kernel and state, by the whole gradient of the kernel."""

    def total(features: Any, kernel: Any, bias: Any) -> Any:
        return linear_multilabel_loss(loss, features, kernel, labels, bias=bias, axis=None, **options)

    value, (of_features, of_kernel, of_bias) = jax.value_and_grad(total, (0, 1, 2))(FEATURES, kernel, bias)
    updates, state = optimizer.update(of_kernel, state, kernel)
    return value, of_features, of_bias, optax.apply_updates(kernel, updates), state


def assert_same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(jax.tree.leaves(tuple(found)), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5)


def jitted() -> Any:
    return jax.jit(linear_multilabel_step, static_argnames=("optimizer", "chunk_size"))


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_ordinary_step(name):
    optimizer, step = OPTIMIZERS[name], jitted()
    before = step._cache_size()  # one for all jits of the same function
    kernel = of_ordinary = jnp.asarray(KERNEL)
    state = state_of_ordinary = optimizer.init(kernel)
    for _ in range(3):
        found = step(
            LOSS, FEATURES, kernel, LABELS, optimizer=optimizer, state=state, bias=jnp.asarray(BIAS), chunk_size=128
        )
        expected = ordinary(LOSS, of_ordinary, LABELS, optimizer, state_of_ordinary)
        assert_same(found, expected)
        kernel, state = found.kernel, found.state
        of_ordinary, state_of_ordinary = expected[-2:]
    assert step._cache_size() == before + 1


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("form", FORMS)
def test_labels_of_any_form_masks_and_weights(form):
    optimizer = OPTIMIZERS["momentum"]
    state = optimizer.init(jnp.asarray(KERNEL))
    options = {
        "where": RANDOM.random((ROWS, CLASSES)) < 0.8,
        "weights": np.float32(1 / ROWS),
        "pos_weight": RANDOM.random(CLASSES).astype(np.float32),
    }
    found = linear_multilabel_step(
        HillLoss(), FEATURES, KERNEL, FORMS[form](LABELS), optimizer, state, bias=BIAS, chunk_size=64, **options
    )
    assert_same(found, ordinary(HillLoss(), jnp.asarray(KERNEL), FORMS[form](LABELS), optimizer, state, **options))


def test_without_a_bias_and_in_one_chunk():
    optimizer = OPTIMIZERS["sgd"]
    found = linear_multilabel_step(LOSS, FEATURES, KERNEL, LABELS, optimizer, optimizer.init(jnp.asarray(KERNEL)))
    assert found.bias is None
    expected = ordinary(LOSS, jnp.asarray(KERNEL), LABELS, optimizer, found.state, bias=np.zeros(CLASSES, np.float32))
    np.testing.assert_allclose(found.kernel, expected[3], rtol=1e-5, atol=1e-6)


def test_a_function_may_look_at_all_of_a_class():
    def normalised(kernel: Any, gradient: Any, state: Any) -> Any:
        squares = state["squares"] + jnp.sum(gradient**2, axis=0)
        return kernel - 0.1 * gradient / jnp.sqrt(1e-6 + squares), {"squares": squares}

    state = {"squares": jnp.zeros(CLASSES)}
    found = linear_multilabel_step(LOSS, FEATURES, KERNEL, LABELS, normalised, state, chunk_size=128)
    gradient = jax.grad(lambda k: linear_multilabel_loss(LOSS, FEATURES, k, LABELS, axis=None))(KERNEL)
    kernel, expected = normalised(KERNEL, gradient, state)
    np.testing.assert_allclose(found.kernel, kernel, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.state["squares"], expected["squares"], rtol=1e-4, atol=1e-6)


def test_no_array_is_as_large_as_the_kernel_but_the_kernel():
    classes, depth = 65_536, 64
    kernel = jax.ShapeDtypeStruct((depth, classes), jnp.float32)
    features, labels = jax.ShapeDtypeStruct((8, depth), jnp.float32), jax.ShapeDtypeStruct((8, classes), jnp.int8)
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = jax.eval_shape(optimizer.init, kernel)

    def run(features: Any, kernel: Any, labels: Any, state: Any) -> Any:
        return linear_multilabel_step(LOSS, features, kernel, labels, optimizer, state)

    compiled = jax.jit(run, donate_argnums=(1, 3)).lower(features, kernel, labels, state).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * 4 * depth * classes
    assert memory.temp_size_in_bytes <= 4 * depth * classes // 4


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "specs",
    [(P("data"), P(None, "model")), (P("data"), P("data", "model")), (P(("data", "model")), P("data"))],
    ids=str,
)
def test_on_a_mesh(kind, specs):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[:8])
    optimizer = OPTIMIZERS["adamw"]
    state = optimizer.init(jnp.asarray(KERNEL))
    options = {} if kind == AxisType.Explicit else {"features_spec": specs[0], "kernel_spec": specs[1]}
    with jax.set_mesh(mesh):
        features, kernel = (
            jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((FEATURES, KERNEL), specs, strict=True)
        )
        state_on_mesh = jax.tree.map(
            lambda a: jax.device_put(a, NamedSharding(mesh, specs[1] if a.ndim else P())), state
        )
        bias = jax.device_put(BIAS, NamedSharding(mesh, P(*specs[1][1:])))

        @jax.jit
        def run(features: Any, kernel: Any, state: Any, bias: Any) -> Any:
            return linear_multilabel_step(
                LOSS, features, kernel, LABELS, optimizer, state, bias=bias, chunk_size=50, **options
            )

        found = run(features, kernel, state_on_mesh, bias)
    assert_same(jax.tree.map(np.asarray, found), ordinary(LOSS, jnp.asarray(KERNEL), LABELS, optimizer, state))


def test_stochastic_rounding_is_right_on_average():
    kernel = jnp.full((DEPTH, CLASSES), 1.0, jnp.bfloat16)
    tiny = 1e-4  # a 78th of the last bit of 1

    def drift(kernel: Any, gradient: Any, state: Any) -> Any:
        return kernel.astype(jnp.float32) - tiny, state

    def once(key: Any) -> Any:
        options = {"rounding_key": key, "chunk_size": 100}
        return linear_multilabel_step(
            LOSS, jnp.asarray(FEATURES, jnp.bfloat16), kernel, LABELS, drift, {}, **options
        ).kernel

    found = np.asarray(jax.jit(once)(jax.random.key(0)).astype(jnp.float32))
    lower = 1 - 2.0**-8
    assert set(np.unique(found)) == {np.float32(lower), np.float32(1)}
    expected = tiny / 2.0**-8
    assert abs((found == lower).mean() - expected) < 5 * (expected / found.size) ** 0.5
    assert not np.array_equal(found[:, :100], found[:, 100:200])
    assert np.array_equal(once(None), kernel)


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "isn't elementwise: it has the operation reduce"),
        (optax.lars(0.1), "isn't elementwise"),
        (optax.adafactor(1e-2, min_dim_size_to_factor=2), "the optimizer's state has an array of shape"),
    ],
)
def test_what_looks_at_more_than_an_element_is_refused(optimizer, says):
    kernel = jnp.asarray(KERNEL)
    with pytest.raises(ValueError, match=says):
        linear_multilabel_step(LOSS, FEATURES, kernel, LABELS, optimizer, optimizer.init(kernel))


@pytest.mark.parametrize(
    ("optimizer", "state", "error", "says"),
    [
        (3, {}, TypeError, "optimizer=3; expected an optax GradientTransformation, or a function"),
        (
            lambda k, g, s: (k, s),
            {"a": np.zeros(7)},
            ValueError,
            "state holds an array of shape (7,); expected (8, 300)",
        ),
    ],
)
def test_bad_optimizers_are_named(optimizer, state, error, says):
    with pytest.raises(error, match=re.escape(says)):
        linear_multilabel_step(LOSS, FEATURES, KERNEL, LABELS, optimizer, state)
    with pytest.raises(ValueError, match="labels"):
        linear_multilabel_step(LOSS, FEATURES, KERNEL, PackedLabels.from_dense(LABELS[:, :5]), optax.sgd(0.1), {})
