"""What a data loader does to encoded labels: it iterates, indexes, joins and copies them, and asks for arrays."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asl_pallas import PackedLabels, SparseLabels

KINDS = (PackedLabels, SparseLabels)
MODULES = pytest.mark.parametrize("module", [np, jnp], ids=["numpy", "jax"])
FORMS = pytest.mark.parametrize("kind", KINDS)
DENSE = np.random.default_rng(0).random((5, 2, 200)) < 0.05


def made(kind: Any, module: Any, dense: Any = DENSE) -> Any:
    return kind.from_dense(module.asarray(dense))


def assert_same(found: Any, dense: Any, kind: Any, module: Any) -> None:
    (array,) = jax.tree.leaves(found)
    assert isinstance(found, kind) and isinstance(array, np.ndarray if module is np else jax.Array)
    np.testing.assert_array_equal(found.to_dense(), dense)


@pytest.mark.mostly_long(short=1)
@FORMS
@MODULES
def test_iteration_ends_and_gives_the_examples(kind, module):
    labels = made(kind, module)
    for found, expected in (
        (list(labels), DENSE),
        (list(reversed(labels)), DENSE[::-1]),
        ([y for _, y in zip(range(9), labels, strict=False)], DENSE),
        (jax.jit(list)(labels), DENSE),
    ):
        assert len(found) == 5
        for one, dense in zip(found, expected, strict=True):
            assert isinstance(one, kind)
            np.testing.assert_array_equal(one.to_dense(), dense)
    first, *others = labels
    assert len(others) == 4
    assert_same(first, DENSE[0], kind, module)
    with pytest.raises(TypeError, match=r"of shape \(200,\) has no leading dimension"):
        iter(labels[0, 0])


@pytest.mark.mostly_long(short=2)
@FORMS
@MODULES
def test_an_integer_index_counts_from_the_end_and_ends(kind, module):
    labels = made(kind, module)
    for index in (-1, -5, np.int64(3), (4, -2), [3, 0, -1], range(2), np.array([True, False, True, True, False])):
        assert_same(labels[index], DENSE[index], kind, module)
    assert_same(labels[[]], DENSE[:0], kind, module)
    assert_same(labels[None, :, 1], DENSE[None, :, 1], kind, module)
    for index in (5, -6, np.int32(5), (0, 2), (slice(None), -3), (None, 5), [0, 5], np.array([[1], [-6]])):
        with pytest.raises(IndexError, match=r"index (5|-6|2|-3) is out of bounds for axis . with size [25]"):
            labels[index]
    for index in ((slice(None), np.zeros((2, 200), bool)), (0, 0, 0), np.zeros(4, bool)):
        with pytest.raises(IndexError):
            labels[index]


@FORMS
def test_an_index_of_jax_is_looked_at_unless_it_is_traced(kind):
    labels = made(kind, jnp)
    for index in (jnp.int32(-1), jnp.array([3, 0]), jnp.array([True, False, True, True, False])):
        assert_same(labels[index], DENSE[np.asarray(index)], kind, jnp)
    with pytest.raises(IndexError, match="index 5 is out of bounds for axis 0 with size 5"):
        labels[jnp.array([0, 5])]
    for held in (labels, made(kind, np)):
        assert_same(jax.jit(lambda i, held=held: held[i])(4), DENSE[4], kind, jnp)


@FORMS
@MODULES
def test_what_would_make_a_dense_array_in_silence_says_what_to_call(kind, module):
    labels = made(kind, module)
    sentence = rf"call to_dense\(\).*{kind.__name__}\.stack\(parts\).*{kind.__name__}\.concatenate\(parts\)"
    for make in (np.asarray, np.array, lambda y: np.stack([y, y]), lambda y: np.concatenate([y, y]), jnp.asarray):
        with pytest.raises(TypeError, match=sentence):
            make(labels)
    for item in (labels[0], 3):
        with pytest.raises(TypeError, match=r"`in` has no meaning for .*to_dense\(\)"):
            item in labels  # noqa: B015


@pytest.mark.mostly_long(short=1)
@FORMS
@MODULES
def test_copies_and_pickles_are_the_same(kind, module):
    labels = made(kind, module)
    for copied in (copy.copy(labels), copy.deepcopy(labels), pickle.loads(pickle.dumps(labels))):
        assert_same(copied, DENSE, kind, module)
    assert kind.__module__ == "asl_pallas.labels"  # what a pickle has as the class's address


@pytest.mark.mostly_long(short=3)
@FORMS
@MODULES
def test_parts_are_joined_where_they_are(kind, module):
    parts = [made(kind, module, DENSE[i:j]) for i, j in ((0, 2), (2, 2), (2, 5))]
    assert_same(kind.concatenate(parts), DENSE, kind, module)
    assert_same(kind.concatenate(iter(parts)), DENSE, kind, module)
    whole = made(kind, module)
    for axis in (1, -2):
        joined = np.concatenate([DENSE, DENSE[:, :1]], axis)
        assert_same(kind.concatenate([whole, whole[:, :1]], axis), joined, kind, module)
    for axis in (0, 1, 2, -2, -4):
        assert_same(kind.stack([whole, whole], axis), np.stack([DENSE, DENSE], axis), kind, module)
    assert_same(kind.stack(list(whole)), DENSE, kind, module)
    assert_same(kind.stack([one[0] for one in whole]), DENSE[:, 0], kind, module)


@pytest.mark.mostly_long(short=1)
@FORMS
def test_traced_parts_are_joined_and_one_of_jax_makes_the_result_so(kind):
    labels = made(kind, jnp)
    found = jax.jit(lambda y: (kind.concatenate([y, y[1:]]), kind.stack([y, y], axis=1)))(labels)
    assert_same(found[0], np.concatenate([DENSE, DENSE[1:]]), kind, jnp)
    assert_same(found[1], np.stack([DENSE, DENSE], axis=1), kind, jnp)
    assert_same(kind.stack([labels, made(kind, np)]), np.stack([DENSE, DENSE]), kind, jnp)


@MODULES
def test_ids_of_parts_are_padded_to_the_most_or_to_k(module):
    examples = [SparseLabels(module.asarray(np.array(ids, np.int32)), 9) for ids in ([3, 1], [], [8, 2, 0])]
    expected = [[3, 1, -1], [-1, -1, -1], [8, 2, 0]]
    np.testing.assert_array_equal(SparseLabels.stack(examples).ids, expected)
    np.testing.assert_array_equal(SparseLabels.concatenate([e[None] for e in examples]).ids, expected)
    for found in (SparseLabels.stack(examples, k=5), SparseLabels.concatenate([e[None] for e in examples], k=5)):
        np.testing.assert_array_equal(found.ids, np.pad(expected, [(0, 0), (0, 2)], constant_values=-1))
        assert isinstance(found.ids, np.ndarray if module is np else jax.Array) and found.ids.dtype == np.int32
    with pytest.raises(ValueError, match="expected at most k=2 in a row"):
        SparseLabels.stack(examples, k=2)


P, Q = made(PackedLabels, np), made(SparseLabels, np)
BAD = [
    (lambda: PackedLabels.stack([]), ValueError, "parts are empty; expected at least one PackedLabels"),
    (
        lambda: PackedLabels.stack(P),
        TypeError,
        "parts are PackedLabels(words=uint32[5, 2, 128], classes=200); expected",
    ),
    (lambda: SparseLabels.concatenate(None), TypeError, "parts are None; expected a sequence of SparseLabels"),
    (lambda: SparseLabels.concatenate([Q, P]), TypeError, "parts[1] is PackedLabels; expected SparseLabels"),
    (lambda: PackedLabels.stack([P, DENSE]), TypeError, "parts[1] is ndarray; expected PackedLabels"),
    (
        lambda: PackedLabels.stack([P, PackedLabels(P.words, 199)]),
        ValueError,
        "parts[1] has 199 classes and parts[0] 200",
    ),
    (lambda: PackedLabels.stack([P, P[1:]]), ValueError, "parts[1] has shape (4, 2, 200) and parts[0] (5, 2, 200)"),
    (
        lambda: SparseLabels.concatenate([Q, Q[:, 0]]),
        ValueError,
        "parts[1] has shape (5, 200) and parts[0] (5, 2, 200)",
    ),
    (lambda: SparseLabels.concatenate([Q, Q[:, :1]]), ValueError, "expected one but along axis=0"),
    (lambda: SparseLabels.concatenate([Q, Q], axis=2), ValueError, "axis=2 is out of range or that of the classes"),
    (lambda: SparseLabels.stack([Q, Q], axis=-1), ValueError, "axis=-1 is out of range or that of the classes"),
    (lambda: PackedLabels.concatenate([P[0, 0]]), ValueError, "axis=0 is out of range or that of the classes"),
    (lambda: PackedLabels.stack([P], axis=1.5), TypeError, "axis=1.5; expected an integer"),
    (lambda: SparseLabels.stack([Q], k=2.5), TypeError, "k=2.5; expected an integer or None"),
]


@pytest.mark.parametrize(("make", "error", "sentence"), BAD, ids=[sentence for *_, sentence in BAD])
def test_parts_that_make_no_whole_are_named(make, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        make()


@FORMS
def test_a_loader_that_stacks_the_arrays_of_a_pytree_makes_a_batch(kind):
    """As Grain's batching does. Where examples differ in k, NumPy refuses, and `SparseLabels.stack` pads."""
    examples = [{"labels": y, "features": np.ones(3)} for y in made(kind, np)]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *examples)
    assert_same(batch["labels"], DENSE, kind, np)
    ragged = [SparseLabels.from_ids([ids], 9)[0] for ids in ([3], [1, 2])]
    with pytest.raises(ValueError, match="same shape"):
        jax.tree.map(lambda *leaves: np.stack(leaves), *ragged)
    same_k = [SparseLabels.from_ids([ids], 9, k=2)[0] for ids in ([3], [1, 2])]
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *same_k)
    np.testing.assert_array_equal(batch.ids, SparseLabels.stack(ragged).ids)


@pytest.mark.mostly_long(short=6)
@FORMS
@pytest.mark.parametrize(
    "leaf", [None, 0, "a string", jax.sharding.PartitionSpec("data"), object()], ids=lambda leaf: type(leaf).__name__
)
def test_a_pytree_that_holds_no_array_can_be_looked_at(kind, leaf):
    """jax.tree.map, vmap's in_axes and shardings put anything where the array was."""
    empty = jax.tree.map(lambda _: leaf, made(kind, np))
    name = "words" if kind is PackedLabels else "ids"
    assert repr(empty) == f"{kind.__name__}({name}={leaf!r}, classes=200)"
    assert not hasattr(empty, "shape") and not hasattr(empty, "ndim") and empty.dtype == bool
    with pytest.raises(AttributeError, match="holds no array, so it has no shape"):
        _ = empty.shape
    for f in (len, iter, list):
        with pytest.raises(TypeError, match="has no leading dimension, so no length"):
            f(empty)


@pytest.mark.mostly_long(short=1)
@FORMS
def test_shapes_without_arrays_keep_their_shape(kind):
    shapes = jax.eval_shape(lambda y: y, made(kind, np))
    assert len(shapes) == 5 and shapes.shape == DENSE.shape and shapes.ndim == 3 and "classes=200" in repr(shapes)
    axes = jax.tree.map(lambda _: 1, shapes)
    found = jax.vmap(lambda y: y.to_dense(), in_axes=(axes,), out_axes=1)(made(kind, np))
    np.testing.assert_array_equal(found, DENSE)
