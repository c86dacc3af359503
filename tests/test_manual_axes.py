"""What varies over which manual mesh axis, and which operand lies how: one operand after the other."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import labels_of, logits_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from asl_pallas import PackedLabels, SparseLabels, asymmetric_loss, linear_asymmetric_loss, linear_top_k

ROWS, DEPTH, CLASSES = 8, 4, 48
FORMS: dict[str, Any] = {
    "dense": np.asarray,
    "soft": lambda y: y.astype(np.float32) * 0.75,
    "packed": PackedLabels.from_dense,
    "sparse": lambda y: SparseLabels.from_dense(y, 40),
}
KINDS = [AxisType.Explicit, AxisType.Auto]


def mesh_of(kind: AxisType) -> jax.sharding.Mesh:
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind), devices=jax.devices()[:8])


def operands(form: str) -> dict[str, Any]:
    """Of the loss; every array has a row an example, so that each can be shared out or be alike on all devices."""
    random = np.random.default_rng(3)
    return {
        "logits": logits_of((ROWS, CLASSES)).clip(-20, 20),
        "labels": FORMS[form](labels_of((ROWS, CLASSES))),
        "where": random.random((ROWS, CLASSES)) < 0.8,
        "weights": random.random((ROWS, CLASSES)).astype(np.float32),
    }


def head_operands(form: str) -> dict[str, Any]:
    random = np.random.default_rng(4)
    rest = {name: array for name, array in operands(form).items() if name != "logits"}
    return {
        "features": random.normal(size=(ROWS, DEPTH)).astype(np.float32),
        "kernel": random.normal(size=(DEPTH, CLASSES)).astype(np.float32),
        "bias": random.normal(size=CLASSES).astype(np.float32),
        **rest,
    }


def loss_of(arrays: dict[str, Any], pos_weight: Any, gamma: Any, axis: Any, **specs: Any) -> Any:
    function: Any = linear_asymmetric_loss if "kernel" in arrays else asymmetric_loss
    return function(**arrays, pos_weight=pos_weight, gamma_neg=gamma, axis=axis, **specs)


DIFFERENTIABLE = {"logits", "weights", "features", "kernel", "bias"}


def value_and_gradients(arrays: dict[str, Any], pos_weight: Any, gamma: Any, axis: Any, **specs: Any) -> Any:
    """The total, and gradients of all that has one, of losses that are weighted by nothing."""
    wanted = {n: a for n, a in arrays.items() if n in DIFFERENTIABLE or (n == "labels" and a.dtype == np.float32)}
    rest = {n: a for n, a in arrays.items() if n not in wanted}

    def total(wanted: Any, pos_weight: Any) -> Any:
        return jnp.sum(jnp.log1p(loss_of({**wanted, **rest}, pos_weight, gamma, axis, **specs)))

    return jax.value_and_grad(total, (0, 1))(wanted, pos_weight)


def assert_same(found: Any, expected: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def put(array: Any, mesh: Any, spec: P) -> Any:
    return jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, spec)), array)


POS_WEIGHT = np.linspace(0.5, 2, CLASSES, dtype=np.float32)
LOSS = [("logits", "dense"), ("labels", "soft"), ("labels", "packed"), ("labels", "sparse")]
LOSS += [("where", "dense"), ("weights", "dense"), ("none", "dense")]
HEAD = [("features", "dense"), ("labels", "packed"), ("labels", "sparse"), ("weights", "soft"), ("none", "dense")]
CASES = [(operands, *case) for case in LOSS] + [(head_operands, *case) for case in HEAD]


def in_rows(arrays: dict[str, Any]) -> list[str]:
    return [name for name in arrays if name not in ("kernel", "bias")]


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize(("make", "alone", "form"), CASES)
def test_one_operand_varies_over_the_manual_axes_and_the_others_do_not(make, alone, form, check_vma):
    """Each device has a row of `alone` and row 0 of the rest; what is alike everywhere gets a sum of gradients."""
    arrays = make(form)
    mesh = mesh_of(AxisType.Auto)
    names = ("a", "b")
    whole = {
        n: a if n == alone or n not in in_rows(arrays) else jax.tree.map(lambda a: a[:1], a) for n, a in arrays.items()
    }
    # Packed and sparse labels know their shape by their arrays; a row of them is a pytree of the same kind.
    specs = {n: P(names) if n == alone else P() for n in whole}
    gamma = jnp.float32(3.0)

    def body(arrays: Any, pos_weight: Any, gamma: Any) -> Any:
        value, gradients = value_and_gradients(arrays, pos_weight, gamma, axis=-1)
        if check_vma:
            return jax.lax.psum(value, names) if alone != "none" else value * mesh.size, gradients
        # Without the check JAX doesn't add up what belongs to an operand that is alike on all devices: the user does.
        return jax.lax.psum(value, names), (
            {n: g if n == alone else jax.lax.psum(g, names) for n, g in gradients[0].items()},
            jax.lax.psum(gradients[1], names),
        )

    def on_one_device(arrays: Any, pos_weight: Any) -> Any:
        rows = {
            n: a if n == alone or n not in in_rows(arrays) else jax.tree.map(lambda a: jnp.tile(a, (ROWS, 1)), a)
            for n, a in arrays.items()
        }
        return jnp.sum(jnp.log1p(loss_of(rows, pos_weight, gamma, -1)))

    gradient_specs = {n: specs[n] for n in whole if n in DIFFERENTIABLE or (n == "labels" and form == "soft")}
    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(specs, P(), P()), out_specs=(P(), (gradient_specs, P())), check_vma=check_vma
    )
    value, (gradients, of_pos_weight) = jax.jit(mapped)(whole, POS_WEIGHT, gamma)
    wanted = {n: jnp.asarray(whole[n]) for n in gradient_specs}
    rest = {n: a for n, a in whole.items() if n not in wanted}
    expected, (true_gradients, true_of_pos_weight) = jax.value_and_grad(
        lambda wanted, pos_weight: on_one_device({**wanted, **rest}, pos_weight), (0, 1)
    )(wanted, jnp.asarray(POS_WEIGHT))
    if alone == "none" and check_vma:  # nothing varies: every device has the one gradient, and nothing is summed
        gradients, of_pos_weight = jax.tree.map(lambda g: g * mesh.size, (gradients, of_pos_weight))
    assert_same((value, gradients, of_pos_weight), (expected, true_gradients, true_of_pos_weight))


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("make", "form", "axis"),
    [
        (operands, "dense", -1),
        (operands, "soft", ()),
        (operands, "packed", None),
        (operands, "sparse", -1),
        (operands, "dense", 0),
        (head_operands, "dense", -1),
        (head_operands, "sparse", None),
    ],
)
def test_gradients_in_a_shard_map_over_some_of_the_axes(make, form, axis, kind, check_vma):
    """The rows lie over "a", which the shard_map takes, and the classes over "b", which it leaves."""
    arrays = make(form)
    mesh = mesh_of(kind)
    specs = {n: P("a") if n in in_rows(arrays) else P() for n in arrays}
    of_loss: dict[str, Any] = {}
    if kind == AxisType.Auto:
        of_loss = {"logits_spec": P(None, "b")}
        if make is head_operands:
            of_loss = {"features_spec": P(), "kernel_spec": P(None, "b")}
    gamma = jnp.float32(3.0)
    lies = {"logits": P("a", "b"), "kernel": P(None, "b"), "bias": P("b"), "features": P("a")}

    def body(arrays: Any, pos_weight: Any, gamma: Any) -> Any:
        value, (gradients, of_pos_weight) = value_and_gradients(arrays, pos_weight, gamma, axis, **of_loss)
        if not check_vma:
            gradients = {n: g if n in in_rows(arrays) else jax.lax.psum(g, "a") for n, g in gradients.items()}
            of_pos_weight = jax.lax.psum(of_pos_weight, "a")
        return jax.lax.psum(value, "a"), gradients, of_pos_weight

    wanted = {n for n in arrays if n in DIFFERENTIABLE or (n == "labels" and form == "soft")}
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            body,
            in_specs=(specs, P(), P()),
            out_specs=(P(), {n: specs[n] for n in wanted}, P()),
            axis_names={"a"},
            check_vma=check_vma,
        )
        on_mesh = {n: put(a, mesh, lies.get(n, P("a"))) for n, a in arrays.items()}
        found = jax.jit(mapped)(on_mesh, POS_WEIGHT, gamma)
    blocks = [
        {
            n: jax.tree.map(lambda a, i=i: a[2 * i : 2 * i + 2], a) if n in in_rows(arrays) else a
            for n, a in arrays.items()
        }
        for i in range(4)
    ]
    expected = [
        value_and_gradients(jax.tree.map(jnp.asarray, block), jnp.asarray(POS_WEIGHT), gamma, axis) for block in blocks
    ]
    assert_same(found[0], sum(value for value, _ in expected))
    for name in wanted:
        of_blocks = [gradients[name] for _, (gradients, _) in expected]
        assert_same(found[1][name], np.concatenate(of_blocks) if name in in_rows(arrays) else sum(of_blocks))
    assert_same(found[2], sum(of_pos_weight for _, (_, of_pos_weight) in expected))


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("check_vma", [True, False])
def test_top_k_in_a_shard_map_where_one_operand_varies(check_vma):
    arrays = head_operands("dense")
    mesh = mesh_of(AxisType.Auto)
    f, w, b = arrays["features"], arrays["kernel"], np.stack([arrays["bias"] * n for n in range(8)])
    mapped = jax.shard_map(
        lambda f, w, b: linear_top_k(f, w, 5, bias=b[0]),
        mesh=mesh,
        in_specs=(P(), P(), P(("a", "b"))),
        out_specs=P(("a", "b")),
        check_vma=check_vma,
    )
    scores, ids = jax.jit(mapped)(f, w, b)
    best = [linear_top_k(f, w, 5, bias=one) for one in b]
    assert_same(scores, np.concatenate([scores for scores, _ in best]))
    np.testing.assert_array_equal(ids, np.concatenate([ids for _, ids in best]))


OTHERWISE = [P(), P("b"), P("b", "a")]  # by the number of dimensions


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("in_context", [True, False])
@pytest.mark.parametrize(("make", "form", "name"), [
    *[(operands, form, name) for form, name in (
        ("dense", "labels"), ("soft", "labels"), ("packed", "labels"), ("sparse", "labels"),
        ("dense", "where"), ("dense", "weights"), ("dense", "pos_weight"), ("dense", "gamma"))],
    *[(head_operands, form, name) for form, name in (
        ("dense", "labels"), ("packed", "labels"), ("sparse", "labels"), ("dense", "kernel"), ("dense", "bias"),
        ("dense", "where"), ("dense", "weights"), ("dense", "pos_weight"))],
])  # fmt: skip
def test_an_operand_that_lies_otherwise_on_explicit_axes_is_moved_without_jit_too(make, form, name, in_context):
    arrays = {**make(form), "pos_weight": POS_WEIGHT, "gamma": np.float32(3.0)}
    mesh = mesh_of(AxisType.Explicit)
    first = next(iter(arrays))

    def run(arrays: dict[str, Any]) -> Any:
        rest = {n: a for n, a in arrays.items() if n not in ("pos_weight", "gamma")}
        return value_and_gradients(rest, arrays["pos_weight"], arrays["gamma"], -1)

    def value(arrays: dict[str, Any]) -> Any:
        rest = {n: a for n, a in arrays.items() if n not in ("pos_weight", "gamma")}
        return loss_of(rest, arrays["pos_weight"], arrays["gamma"], -1)

    f = run if in_context else value  # JAX wants a mesh in context for gradients without jit
    expected = f(jax.tree.map(jnp.asarray, arrays))
    placed = {n: put(a, mesh, P("a") if n == first else P()) for n, a in arrays.items()}
    placed[name] = put(arrays[name], mesh, OTHERWISE[jax.tree.leaves(arrays[name])[0].ndim])
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        assert_same(f(placed), expected)


@pytest.mark.mostly_long(short=5)
@pytest.mark.parametrize("depth", [8, 4, 3])
@pytest.mark.parametrize("of_kernel", [P(None, "a"), P("b", "a"), P(None, ("a", "b"))], ids=str)
def test_a_kernel_whose_classes_lie_over_the_axis_of_the_examples_is_moved(of_kernel, depth):
    if depth == 3 and of_kernel[0]:
        of_kernel = P(None, "a")
    random = np.random.default_rng(5)
    f, w = (random.normal(size=n).astype(np.float32) for n in ((ROWS, depth), (depth, CLASSES)))
    y = labels_of((ROWS, CLASSES))

    def run(f: Any, w: Any) -> Any:
        gradients = jax.grad(lambda f, w: linear_asymmetric_loss(f, w, y, chunk_size=16).sum(), (0, 1))(f, w)
        return gradients, linear_top_k(f, w, 3, chunk_size=16)

    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        on_mesh = put(f, mesh, P("a")), put(w, mesh, of_kernel)
        found = jax.jit(run)(*on_mesh)
    assert_same(found, run(jnp.asarray(f), jnp.asarray(w)))
    assert found[0][1].sharding.is_equivalent_to(on_mesh[1].sharding, 2)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("kind", [*KINDS, None])
@pytest.mark.parametrize("masked", [False, True])
def test_wrong_labels_are_named_however_they_lie_and_under_a_transfer_guard(kind, masked):
    arrays = operands("dense")
    bad = np.array(arrays["labels"])
    bad[1, 2], bad[3, 4] = 7, 9
    where = np.ones_like(arrays["where"])
    where[1, 2] = False
    x, y, mask = (jnp.asarray(a) for a in (arrays["logits"], bad, where))
    if kind is not None:
        mesh = mesh_of(kind)
        x, y, mask = put(x, mesh, P("a")), put(y, mesh, P(None, "b")), put(mask, mesh, P("b", "a"))
    wrong = 9 if masked else 7
    call = functools.partial(asymmetric_loss, x, where=mask if masked else None, logits_spec=P("a"))
    for labels, sentence in (
        (y, f"labels hold {wrong}; expected 0 or 1"),
        (y.astype(jnp.float32), f"labels hold {wrong}.0; expected between 0 and 1"),
    ):
        with jax.transfer_guard("disallow"), pytest.raises(ValueError, match=sentence):
            call(labels)
        with pytest.raises(ValueError, match=sentence):
            jax.jit(lambda x, labels=labels: asymmetric_loss(x, labels, where=call.keywords["where"]))(x)
    with jax.transfer_guard("disallow"):
        call(put(arrays["labels"], mesh, P(None, "b")) if kind is not None else jax.device_put(arrays["labels"]))
