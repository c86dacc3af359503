"""On a mesh: eight CPU devices give what one gives, and what moves between them is a sum."""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KERNELS, QUICK, cotangent_of, interpreted, labels_of, logits_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from asl_pallas import PackedLabels, SparseLabels, asymmetric_loss

SHAPE = (4, 8, 48)
SPECS = [
    P("data"),
    P(None, "data"),
    P(None, None, "model"),
    P("data", None, "model"),
    P(None, ("data", "model")),
    P(None, None, ("model", "data")),
    P(None, "model", "data"),
    P(),
]


@pytest.fixture(scope="module", autouse=True)
def _eight_devices():
    if len(jax.devices()) < 8:
        pytest.fail("conftest.py gives every test process eight CPU devices")


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[:8])


def both(implementation: str | None, spec: P | None, **options: Any) -> Any:
    """Loss and gradient of a weighted sum of the losses."""

    def run(x: Any, y: Any, arrays: Any) -> Any:
        def total(x: Any) -> Any:
            loss = asymmetric_loss(x, y, implementation=implementation, logits_spec=spec, **options, **arrays)
            return jnp.sum(jnp.log1p(loss)), loss

        (_, loss), slope = jax.value_and_grad(total, has_aux=True)(x)
        return loss, slope

    return run


@functools.cache
def on_one_device(implementation: str | None, axis: Any = -1, dtype: str = "float32") -> tuple[Any, Any]:
    """What every layout is held against, computed once."""
    with interpreted(implementation):
        return jitted(both(implementation, None, axis=axis), implementation)(*operands(dtype))


def jitted(f: Any, implementation: str | None) -> Any:
    return jax.jit(f, compiler_options=QUICK if implementation in KERNELS else None)


def operands(dtype: str = "float32") -> tuple[Any, Any, dict[str, Any]]:
    random = np.random.default_rng(5)
    arrays = {
        "where": random.random(SHAPE) < 0.9,
        "weights": random.random((4, 8, 1)).astype(np.float32),
        "pos_weight": random.random(48).astype(np.float32),
    }
    return logits_of(SHAPE, dtype=dtype), labels_of(SHAPE), arrays


KINDS = (AxisType.Explicit, AxisType.Auto)
# Every spec with either kind, and each kernel with every spec, with one kind after the other: every pair is there.
LAYOUTS = [(None, kind, spec) for spec in SPECS for kind in KINDS]
LAYOUTS += [(kernel, KINDS[(i + k) % 2], spec) for k, kernel in enumerate(KERNELS) for i, spec in enumerate(SPECS)]


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize(("implementation", "kind", "spec"), LAYOUTS, ids=str)
def test_every_layout_gives_what_one_device_gives(implementation, kind, spec):
    x, y, arrays = operands()
    loss, slope = on_one_device(implementation)
    with interpreted(implementation):
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            on_mesh = jax.device_put(x, NamedSharding(mesh, spec))
            # Labels lie otherwise than the logits: they move, and the rest is replicated.
            labels = jax.device_put(y, NamedSharding(mesh, P(None, "data")))
            named = spec if kind == AxisType.Auto else None
            found = jitted(both(implementation, named), implementation)(on_mesh, labels, arrays)
    np.testing.assert_allclose(found[0], loss, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[1], slope, rtol=1e-5, atol=1e-6)
    assert found[1].sharding.is_equivalent_to(on_mesh.sharding, 3)


AXES = [-1, (), None, 0, (0, 1), (1, 2)]
# Every axis with either kind in float32, and with the other dtypes with one kind after the other: every pair is there.
SUMS = [(axis, kind, "float32") for axis in AXES for kind in KINDS]
SUMS += [
    (axis, KINDS[(i + d) % 2], dtype) for d, dtype in enumerate(["bfloat16", "float16"]) for i, axis in enumerate(AXES)
]


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize(("axis", "kind", "dtype"), SUMS, ids=str)
def test_every_axis_and_dtype_gives_what_one_device_gives(axis, kind, dtype):
    x, y, arrays = operands(dtype)
    spec = P("data", None, "model")
    loss, slope = on_one_device(None, axis, dtype)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(x, NamedSharding(mesh, spec))
        found = jax.jit(both(None, spec if kind == AxisType.Auto else None, axis=axis))(on_mesh, y, arrays)
    np.testing.assert_allclose(found[0], loss, rtol=2e-6, atol=1e-6)
    precision = 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(found[1], np.float32), np.asarray(slope, np.float32), rtol=precision, atol=max(1e-6, precision**2)
    )


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("implementation", [None, "mosaic_tpu", "triton"])
def test_inside_the_users_shard_map_the_kernel_runs_on_the_shard(implementation, check_vma, kind):
    x, y, arrays = operands()
    weights = arrays["pos_weight"]  # replicated, where the logits vary

    def body(x: Any, y: Any) -> Any:
        options = {"implementation": implementation, "weights": weights}
        slope = jax.grad(lambda x: asymmetric_loss(x, y, axis=None, **options))(x)
        return asymmetric_loss(x, y, **options), slope

    expected = asymmetric_loss(x, y, weights=weights)
    mesh = mesh_of(kind)
    place = NamedSharding(mesh, P("data", "model"))
    with interpreted(implementation):
        specs = P("data", "model")
        mapped = jax.shard_map(body, mesh=mesh, in_specs=(specs, specs), out_specs=(specs, specs), check_vma=check_vma)
        loss, slope = jax.jit(mapped)(jax.device_put(x, place), jax.device_put(y, place))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    whole = jax.grad(lambda x: asymmetric_loss(x, y, axis=None, weights=weights))(x)
    np.testing.assert_allclose(slope, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_inside_a_shard_map_over_some_axes_the_others_are_partitioned(kind):
    x, y, _ = operands()
    named = P(None, None, "model") if kind == AxisType.Auto else None
    mesh = mesh_of(kind)
    place = NamedSharding(mesh, P("data", None, "model"))
    with jax.set_mesh(mesh), interpreted("mosaic_tpu"):
        mapped = jax.shard_map(
            lambda x, y: asymmetric_loss(x, y, logits_spec=named, implementation="mosaic_tpu"),
            in_specs=(P("data"), P("data")),
            out_specs=P("data"),
            axis_names={"data"},
        )
        found = jax.jit(mapped)(jax.device_put(x, place), jax.device_put(y, place))
    np.testing.assert_allclose(found, asymmetric_loss(x, y), rtol=1e-6)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize(
    "spec", [P("data"), P(None, "data"), P(None, None, "model"), P("data", None, "model")], ids=str
)
def test_vmap_over_a_leading_dimension_sharded_or_not(kind, spec):
    x, y, _ = operands()
    mesh = mesh_of(kind)
    named = P(*spec[1:]) if kind == AxisType.Auto else None
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, spec)
        f = jax.jit(jax.vmap(jax.value_and_grad(lambda x, y: asymmetric_loss(x, y, axis=None, logits_spec=named))))
        found = f(jax.device_put(x, place), jax.device_put(y, place))
    expected = jax.vmap(jax.value_and_grad(lambda x, y: asymmetric_loss(x, y, axis=None)))(x, y)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-7)


def test_without_a_spec_auto_axes_are_left_to_xla_with_one_warning():
    x, y, arrays = operands()
    mesh = mesh_of(AxisType.Auto)
    loss, slope = jax.jit(both(None, None))(x, y, arrays)
    with jax.set_mesh(mesh), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        on_mesh = jax.device_put(x, NamedSharding(mesh, P("data", None, "model")))
        found = jax.jit(both(None, None))(on_mesh, y, arrays)
    np.testing.assert_allclose(found[0], loss, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found[1], slope, rtol=1e-5, atol=1e-6)
    assert len(seen) == 1 and "logits_spec" in str(seen[0].message)


def test_unequal_parts_are_left_to_xla_with_a_warning_and_right():
    x, y = logits_of((6, 50)), labels_of((6, 50))
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh), pytest.warns(UserWarning, match="cuts a dimension of 6 into 4 unequal parts"):
        found = jax.jit(lambda x: asymmetric_loss(x, y, logits_spec=P("data", "model")))(x)
    np.testing.assert_allclose(found, asymmetric_loss(x, y), rtol=1e-6)


def test_a_spec_means_nothing_without_a_mesh():
    x, y, _ = operands()
    np.testing.assert_array_equal(asymmetric_loss(x, y, logits_spec=P("data")), asymmetric_loss(x, y))


@pytest.mark.parametrize(
    ("spec", "error", "sentence"),
    [
        (P("nowhere"), ValueError, "names the axis 'nowhere'; the mesh has data, model"),
        (P(None, None, None, "data"), ValueError, "has 4 entries; the logits have 3 dimensions"),
        ("data", TypeError, "expected a jax.sharding.PartitionSpec"),
    ],
)
def test_a_bad_spec_is_named_before_anything_is_compiled(spec, error, sentence):
    x, y, _ = operands()
    with jax.set_mesh(mesh_of(AxisType.Auto)), pytest.raises(error, match=re.escape(sentence)):
        jax.jit(lambda x: asymmetric_loss(x, y, logits_spec=spec)).trace(x)


def test_a_spec_that_contradicts_explicit_axes_is_named():
    x, y, _ = operands()
    mesh = mesh_of(AxisType.Explicit)
    on_mesh = jax.device_put(x, NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="puts the Explicit axis 'model' on dimension 0"):
        jax.jit(lambda x: asymmetric_loss(x, y, logits_spec=P("model"))).trace(on_mesh)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_second_derivatives_on_a_mesh(kind):
    x, y, _ = operands()
    direction = cotangent_of(SHAPE)
    spec = P("data", None, "model")

    def curvature(x: Any, spec: P | None) -> Any:
        slope = jax.grad(lambda x: asymmetric_loss(x, y, axis=None, logits_spec=spec))
        return jax.grad(lambda x: jnp.sum(slope(x) * direction))(x)

    expected = jax.jit(lambda x: curvature(x, None))(x)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(x, NamedSharding(mesh, spec))
        direction = jax.device_put(direction, NamedSharding(mesh, spec))
        found = jax.jit(lambda x: curvature(x, spec if kind == AxisType.Auto else None))(on_mesh)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.mostly_long(short=5)
@pytest.mark.parametrize("form", [PackedLabels, SparseLabels])
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize(
    ("implementation", "classes", "spec"),
    [
        # Shards with whole groups of words, with whole registers, and with neither.
        (None, 8192, P(None, None, "model")),
        (None, 8192, P("data", None, ("model",))),
        ("mosaic_tpu", 8192, P(None, None, ("model", "data"))),
        (None, 48, P("data", None, "model")),
        ("triton", 9608, P(None, "model", "data")),
        (None, 48, P(None, ("data", "model"))),
    ],
    ids=str,
)
def test_packed_and_sparse_labels_on_a_mesh(form, kind, implementation, classes, spec):
    x, y = logits_of((4, 8, classes)), labels_of((4, 8, classes))
    labels = form.from_dense(y)
    with interpreted(implementation):
        loss, slope = jax.jit(both(None, None))(x, y, {})
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            on_mesh = jax.device_put(x, NamedSharding(mesh, spec))
            # The words lie otherwise than the logits, across their last dimension too.
            moved = jax.device_put(
                labels, NamedSharding(mesh, P(None, "data", "model" if form is PackedLabels else None))
            )
            named = spec if kind == AxisType.Auto else None
            found = jax.jit(both(implementation, named))(on_mesh, moved, {})
    np.testing.assert_allclose(found[0], loss, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(found[1], slope, rtol=1e-5, atol=1e-6)
    assert found[1].sharding.is_equivalent_to(on_mesh.sharding, 3)
