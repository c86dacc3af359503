"""Compiled for whole pods: every chip runs the kernel on its shard, and what moves between chips is a sum."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_compiled import available, few_labels

from asl_pallas import asymmetric_loss
from asl_pallas.bits import GROUP
from profiling import targets
from reference import autodiff

pytestmark = pytest.mark.long

CLASSES = 16384
WIDTH = 512
BATCH = 512  # examples a group of chips that share the classes out


SPECS = (P("data"), P("data", "model"), P(None, "model"), P(("data", "model")))
KINDS = (AxisType.Explicit, AxisType.Auto)
# Each pod with every spec, with one kind of axes after the other: every pair of the three is there.
LAYOUTS = [(pod, spec, KINDS[(i + j) % 2]) for i, pod in enumerate(targets.PODS) for j, spec in enumerate(SPECS)]


@pytest.fixture(params=targets.PODS)
def topology(request: pytest.FixtureRequest) -> str:
    available("v5e")
    return request.param


def mesh_of(topology: str, kind: AxisType) -> jax.sharding.Mesh:
    return targets.pod(topology, *targets.PODS[topology], kind)


@pytest.mark.parametrize(("topology", "spec", "kind"), LAYOUTS, indirect=["topology"], ids=str)
def test_the_loss_moves_one_value_an_example_and_a_scalar(topology, spec, kind):
    mesh = mesh_of(topology, kind)
    batch = 32 * mesh.size
    lies = NamedSharding(mesh, spec)
    shapes = [jax.ShapeDtypeStruct((batch, CLASSES), dtype, sharding=lies) for dtype in (jnp.bfloat16, jnp.int8)]
    named = spec if kind == AxisType.Auto else None
    f = jax.jit(jax.value_and_grad(lambda x, y: asymmetric_loss(x, y, logits_spec=named, axis=None)))
    compiled = f.lower(*shapes).compile()
    assert "tpu_custom_call" in compiled.as_text()
    moved = targets.collectives(compiled)
    assert moved
    assert {name for name, _ in moved} == {"all-reduce"}
    # float32: one a row of the chip's shard where the classes are shared out, and the total.
    rows = lies.shard_shape((batch, CLASSES))[0]
    class_sharded = len(spec) > 1
    assert sum(size for _, size in moved) <= 4 * (rows * class_sharded + 1)
    assert compiled.memory_analysis().temp_size_in_bytes <= 2**20


@pytest.mark.parametrize("form", ["packed", "sparse"])
@pytest.mark.parametrize(("classes", "kind"), [(2**20, AxisType.Explicit), (40_000, AxisType.Auto)])
def test_packed_and_sparse_labels_move_no_more_than_dense_ones(topology, form, classes, kind):
    """Labels lie by example. Where words have to be cut out of whole rows, no dense label is made of them."""
    mesh = mesh_of(topology, kind)
    batch, spec = 32 * mesh.shape["data"], P("data", "model")
    x = jax.ShapeDtypeStruct((batch, classes), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    few = few_labels(form, (batch, classes))
    whole_groups = classes // mesh.shape["model"] % GROUP == 0
    of_labels = NamedSharding(mesh, P("data", "model" if form == "packed" and whole_groups else None))
    y = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=of_labels), few)
    named = spec if kind == AxisType.Auto else None
    f = jax.jit(jax.value_and_grad(lambda x, y: asymmetric_loss(x, y, logits_spec=named, axis=None)))
    compiled = f.lower(x, y).compile()
    assert "tpu_custom_call" in compiled.as_text()
    moved = targets.collectives(compiled)
    assert {name for name, _ in moved} == {"all-reduce"} and sum(size for _, size in moved) <= 4 * (32 + 1)
    assert compiled.memory_analysis().temp_size_in_bytes <= 2**20


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_the_users_shard_map_the_kernel_compiles(topology, check_vma):
    mesh = mesh_of(topology, AxisType.Explicit)
    spec = P("data", "model")
    shape = (512 * mesh.shape["data"], CLASSES)
    shapes = [jax.ShapeDtypeStruct(shape, d, sharding=NamedSharding(mesh, spec)) for d in (jnp.bfloat16, jnp.int8)]
    f = jax.shard_map(
        lambda x, y: jax.grad(lambda x: asymmetric_loss(x, y, axis=None))(x),
        mesh=mesh,
        in_specs=(spec, spec),
        out_specs=spec,
        check_vma=check_vma,
    )
    compiled = jax.jit(f).lower(*shapes).compile()
    assert "tpu_custom_call" in compiled.as_text()
    assert not targets.collectives(compiled)


class Tower(nnx.Module):
    """An MLP trunk and a head whose classes are shared out."""

    def __init__(self, rngs: nnx.Rngs):
        self.trunk = nnx.List([nnx.Linear(WIDTH, WIDTH, param_dtype=jnp.bfloat16, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, CLASSES, param_dtype=jnp.bfloat16, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        for layer in self.trunk:
            x = nnx.gelu(layer(x))
        return self.head(x)


def train_step(loss: Any, mesh: jax.sharding.Mesh) -> Any:
    """A whole step, adamw included, compiled for the mesh: batch over data, the head's classes over model."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Tower(nnx.Rngs(0))))
    optimizer = optax.adamw(1e-3)
    params = nnx.to_pure_dict(state)

    def place(leaf: Any) -> Any:
        spec = P(*(["model" if n == CLASSES else None for n in leaf.shape]))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(place, params)
    moments = jax.tree.map(place, jax.eval_shape(optimizer.init, params))
    batch = BATCH * mesh.shape["data"]
    features = jax.ShapeDtypeStruct((batch, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, P("data")))
    labels = jax.ShapeDtypeStruct((batch, CLASSES), jnp.int8, sharding=NamedSharding(mesh, P("data", "model")))

    def step(params: Any, moments: Any, features: Any, labels: Any) -> Any:
        def total(params: Any) -> Any:
            nnx.replace_by_pure_dict(state, params)
            return loss(nnx.merge(graph, state)(features), labels).mean()

        value, gradients = jax.value_and_grad(total)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return value, optax.apply_updates(params, updates), moments

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, moments, features, labels).compile()


def test_a_flax_train_step_moves_nothing_more_than_with_the_loss_in_jnp(topology):
    mesh = mesh_of(topology, AxisType.Auto)
    spec = P("data", "model")
    ours = train_step(functools.partial(asymmetric_loss, logits_spec=spec, donate_logits=True), mesh)
    theirs = train_step(lambda x, y: autodiff.official(x, y).sum(-1), mesh)
    assert "tpu_custom_call" in ours.as_text()
    assert "tpu_custom_call" not in theirs.as_text()
    for name in ("all-gather", "all-to-all", "reduce-scatter", "collective-permute"):
        moved, as_jnp = (sum(size for n, size in targets.collectives(c) if n == name) for c in (ours, theirs))
        assert moved <= as_jnp, f"the loss adds {name} of {moved - as_jnp} bytes"
    moved, as_jnp = (sum(size for n, size in targets.collectives(c) if n == "all-reduce") for c in (ours, theirs))
    assert moved <= as_jnp + 4 * BATCH + 8  # one value an example of the shard, and a scalar
    temporaries, as_jnp = (c.memory_analysis().temp_size_in_bytes for c in (ours, theirs))
    assert temporaries <= as_jnp
