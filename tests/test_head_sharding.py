"""A head on a mesh of eight: what one device gives, whoever has which examples, classes and slices of the kernel."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import labels_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_compiled import available
from test_head import FORMS

from asl_pallas import SparseLabels, linear_asymmetric_loss, linear_top_k
from profiling import targets

ROWS, DEPTH = 8, 16
# Data parallel and tensor parallel, fully sharded, all on classes, all on examples, along d of both.
LAYOUTS = [
    (P("data"), P(None, "model")),
    (P("data"), P("data", "model")),
    (P(), P("data", "model")),
    (P(), P(None, ("data", "model"))),
    (P(("data", "model")), P()),
    (P(None, "model"), P("model")),
]


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"), axis_types=(kind, kind))


def operands(classes: int, dtype: str = "float32") -> dict[str, Any]:
    random = np.random.default_rng(6)
    return {
        "features": random.normal(size=(ROWS, DEPTH)).astype(jnp.dtype(dtype)),
        "kernel": random.normal(size=(DEPTH, classes)).astype(jnp.dtype(dtype)),
        "bias": random.normal(size=classes).astype(np.float32),
        "weights": random.random((ROWS, 1)).astype(np.float32),
        "pos_weight": random.random(classes).astype(np.float32),
    }


def step(axis: Any, specs: dict[str, P]) -> Any:
    """Losses, and gradients by cotangents that differ from example to example."""

    def total(parameters: Any, arrays: Any, labels: Any) -> Any:
        loss = linear_asymmetric_loss(**parameters, **arrays, labels=labels, axis=axis, chunk_size=100, **specs)
        return jnp.sum(loss * (1 + jnp.arange(loss.size, dtype=jnp.float32).reshape(loss.shape))), loss

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def split(arrays: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    parameters = {name: arrays[name] for name in ("features", "kernel", "bias")}
    return parameters, {name: array for name, array in arrays.items() if name not in parameters}


# Shards of 512 classes cut groups of 4096 in parts, shards of 4096 don't.
@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize(
    ("kind", "form", "axis"), [(AxisType.Explicit, "packed", -1), (AxisType.Auto, "sparse", None)], ids=str
)
@pytest.mark.parametrize(("of_features", "of_kernel"), LAYOUTS, ids=str)
def test_every_layout_gives_what_one_device_gives(of_features, of_kernel, kind, form, axis):
    assert_alike(of_features, of_kernel, kind, form, axis, operands(1024))


@pytest.mark.parametrize(("form", "classes"), [("dense", 600), ("packed", 8192)])
def test_labels_that_are_shared_out_with_the_classes(form, classes):
    assert_alike(P("data"), P("data", "model"), AxisType.Auto, form, None, operands(classes))


def test_float16_waits_for_its_cotangent_on_a_mesh_too():
    assert_alike(P("data"), P(None, "model"), AxisType.Explicit, "dense", None, operands(600, "float16"), 2e-3)


def assert_alike(of_features, of_kernel, kind, form, axis, arrays, tolerance=1e-5):
    labels = FORMS[form](labels_of((ROWS, arrays["kernel"].shape[1])))
    parameters, rest = split(arrays)
    expected = step(axis, {})(parameters, rest, labels)
    mesh = mesh_of(kind)
    specs = {"features_spec": of_features, "kernel_spec": of_kernel} if kind == AxisType.Auto else {}
    lies = {"features": of_features, "kernel": of_kernel, "bias": P(*of_kernel[1:2])}
    with jax.set_mesh(mesh):
        on_mesh = {name: jax.device_put(array, NamedSharding(mesh, lies[name])) for name, array in parameters.items()}
        found = step(axis, specs)(on_mesh, rest, labels)
        for name, gradient in found[1].items():
            if name == "features" and len(of_features) > 1 and kind == AxisType.Auto:
                continue  # Left as it is put together for the products; XLA moves it where it is wanted.
            assert gradient.sharding.is_equivalent_to(on_mesh[name].sharding, gradient.ndim), name
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x).astype(np.float64) for x in (one, other))
        assert np.max(abs(a - b)) <= tolerance * np.max(abs(b))


@pytest.mark.mostly_long(short=5)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize(("of_features", "of_kernel"), [LAYOUTS[1], LAYOUTS[3]], ids=str)
@pytest.mark.parametrize("k", [5, 300])
def test_top_k_of_all_devices(of_features, of_kernel, kind, k):
    random = np.random.default_rng(7)
    # Small integers make many scores equal; of those the lower id counts. 300 is more than a device has.
    f, w = (random.integers(-2, 3, shape).astype(np.float32) for shape in ((ROWS, DEPTH), (DEPTH, 400)))
    mesh = mesh_of(kind)
    specs = {"features_spec": of_features, "kernel_spec": of_kernel} if kind == AxisType.Auto else {}
    with jax.set_mesh(mesh):
        placed = (jax.device_put(x, NamedSharding(mesh, s)) for x, s in ((f, of_features), (w, of_kernel)))
        scores, ids = jax.jit(lambda f, w: linear_top_k(f, w, k, chunk_size=30, **specs))(*placed)
    best, at = jax.lax.top_k(f @ w, k)
    np.testing.assert_array_equal(scores, best)
    np.testing.assert_array_equal(ids, at)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_the_users_shard_map_a_replicated_kernel_gets_the_sum_of_the_gradients(check_vma):
    arrays = operands(300)
    labels = labels_of((ROWS, 300))
    mesh = mesh_of(AxisType.Explicit)

    def body(f: Any, w: Any, y: Any) -> Any:
        slope = jax.grad(lambda f, w: linear_asymmetric_loss(f, w, y, axis=None, chunk_size=64), (0, 1))(f, w)
        # With check_vma JAX adds up what belongs to a replicated operand, without the user does.
        return slope if check_vma else (slope[0], jax.lax.psum(slope[1], ("data", "model")))

    spec = P(("data", "model"))
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(spec, P(), spec), out_specs=(spec, P()), check_vma=check_vma)
    place = NamedSharding(mesh, spec)
    f, y = (jax.device_put(x, place) for x in (arrays["features"], labels))
    found = jax.jit(mapped)(f, arrays["kernel"], y)
    expected = jax.grad(lambda f, w: linear_asymmetric_loss(f, w, labels, axis=None), (0, 1))(
        arrays["features"], arrays["kernel"]
    )
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_cut_is_left_to_xla_with_a_warning_and_right():
    arrays, labels = operands(300), labels_of((ROWS, 300))
    f, w = arrays["features"], arrays["kernel"]
    expected = linear_asymmetric_loss(f, w, labels)
    run = jax.jit(linear_asymmetric_loss, static_argnames=("features_spec", "kernel_spec"))
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        with pytest.warns(UserWarning, match="pass features_spec=PartitionSpec"):
            found = run(f, w, labels)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        with pytest.warns(UserWarning, match="a dimension of 300 is cut into 8 unequal parts"):
            found = run(f, w, labels, features_spec=P(), kernel_spec=P(None, ("data", "model")))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        with pytest.warns(UserWarning, match="data share out both the examples and the classes"):
            found = run(f, w, labels, features_spec=P("data"), kernel_spec=P(None, "data"))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_spec_that_names_no_axis_is_refused():
    arrays, labels = operands(300), labels_of((ROWS, 300))
    sentence = "names the axis 'nowhere'; the mesh has data, model"
    with jax.set_mesh(mesh_of(AxisType.Auto)), pytest.raises(ValueError, match=re.escape(sentence)):
        linear_asymmetric_loss(
            arrays["features"], arrays["kernel"], labels, features_spec=P(), kernel_spec=P("nowhere")
        )


@pytest.mark.long
@pytest.mark.parametrize("fully_sharded", [False, True])
def test_four_million_classes_on_a_pod_move_sums_and_chunks_alone(fully_sharded):
    available("v5e")
    mesh = targets.pod("v5e:16x16", 16, 16, AxisType.Explicit)
    classes, rows, depth = 4 * 2**20, 256, 1024
    of_kernel = P("data" if fully_sharded else None, "model")

    def shape(dims: tuple[int, ...], dtype: Any, spec: P) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))

    f = shape((16 * rows, depth), jnp.bfloat16, P("data"))
    w = shape((depth, classes), jnp.bfloat16, of_kernel)
    labels = SparseLabels.tree_unflatten(classes, (shape((16 * rows, 16), jnp.int32, P("data")),))
    total = jax.value_and_grad(lambda f, w, y: linear_asymmetric_loss(f, w, y, axis=None), (0, 1))
    compiled = jax.jit(total).lower(f, w, labels).compile()
    assert "tpu_custom_call" in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes <= 8 * 2**20
    moved = targets.collectives(compiled)
    sums = sorted(size for name, size in moved if name == "all-reduce")
    # The loss, the features' gradient between the shards of the classes (in bfloat16 or float32, as XLA likes), and the
    # kernel's between those of the examples, a chunk at a time.
    assert sums[0] == 4 and 2 * rows * depth <= sums[1] <= 4 * rows * depth
    rest = {name: size for name, size in moved if name != "all-reduce"}
    if fully_sharded:
        assert len(sums) == 2 and set(rest) == {"all-gather", "reduce-scatter"}
        assert rest["all-gather"] <= 2 * depth * 2048
    else:
        assert sums[2:] == [2 * depth * 2048] and not rest
