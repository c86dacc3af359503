"""Labels of every memory layout, in a wrapper, and in forms that stand for something else: these are named."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.experimental.sparse
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from flax import nnx

from asl_pallas import PackedLabels, SparseLabels, asymmetric_loss

KINDS = pytest.mark.parametrize("kind", [PackedLabels, SparseLabels])
DENSE = np.random.default_rng(0).random((4, 6, 200)) < 0.05
LOGITS = np.random.default_rng(1).normal(size=DENSE.shape).astype(np.float32)

LAYOUTS = {
    "Fortran": np.asfortranarray,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "little-endian": lambda a: a.astype(a.dtype.newbyteorder("<")),
    "every other": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "transposed": lambda a: np.ascontiguousarray(a.T).T,
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), a.dtype, offset=1).reshape(a.shape),
    "read-only": lambda a: np.lib.stride_tricks.as_strided(a, writeable=False),
}


@pytest.mark.mostly_long(short=5)
@KINDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_numpy_arrays_does_not_matter(kind, layout):
    lay = LAYOUTS[layout]
    labels = kind.from_dense(DENSE)
    (array,) = jax.tree.leaves(labels)
    made = kind(lay(array), 200)
    out_of_a_tree = jax.tree.map(lay, labels)
    words = PackedLabels.from_dense(DENSE).words
    for found in (made, out_of_a_tree, made[::-1][::-1], kind.from_dense(lay(DENSE)), kind.stack([made] * 2)[1]):
        np.testing.assert_array_equal(found.to_dense(), DENSE)
        np.testing.assert_array_equal(found.to_packed().words if kind is SparseLabels else found.words, words)
        if kind is PackedLabels:
            np.testing.assert_array_equal(found.to_sparse().to_dense(), DENSE)
    np.testing.assert_allclose(asymmetric_loss(LOGITS, out_of_a_tree), asymmetric_loss(LOGITS, labels))
    ids = SparseLabels.from_dense(DENSE[0]).ids.astype(np.int64)
    np.testing.assert_array_equal(kind.from_ids(lay(ids), 200).to_dense(), DENSE[0])
    csr = scipy.sparse.csr_array(DENSE[0].astype(np.int16))
    csr.data = lay(csr.data)
    np.testing.assert_array_equal(kind.from_csr(csr).to_dense(), DENSE[0])


@pytest.mark.mostly_long(short=1)
@KINDS
def test_a_bcsr_of_jax_is_a_csr_matrix(kind):
    bcsr = jax.experimental.sparse.BCSR.fromdense(jnp.asarray(DENSE[0]))
    np.testing.assert_array_equal(kind.from_csr(bcsr).to_dense(), DENSE[0])


X, Y = LOGITS[0], DENSE[0].astype(np.int8)
IDS = [np.flatnonzero(row).tolist() for row in Y]
FROM_CSR, FROM_IDS, FROM_DENSE = (
    "SparseLabels.from_csr(matrix",
    "SparseLabels.from_ids(lists, classes)",
    "from_dense takes",
)
BCOO = jax.experimental.sparse.BCOO.fromdense(jnp.asarray(Y))
# What stands for labels and isn't what a call takes, and the call that the sentence has to name.
OTHER_FORMS: dict[str, tuple[Any, str]] = {
    "csr": (scipy.sparse.csr_array(Y), f"{FROM_CSR})"),
    "csr_matrix": (scipy.sparse.csr_matrix(Y), f"{FROM_CSR})"),
    "coo": (scipy.sparse.coo_array(Y), f"{FROM_CSR}.tocsr())"),
    "lil": (scipy.sparse.lil_matrix(Y), f"{FROM_CSR}.tocsr())"),
    "BCOO": (BCOO, "SparseLabels.from_csr(jax.experimental.sparse.BCSR.from_bcoo(matrix))"),
    "BCSR": (jax.experimental.sparse.BCSR.from_bcoo(BCOO), f"{FROM_CSR})"),
    "lists": (IDS, FROM_IDS),
    "tuples": (tuple(map(tuple, IDS)), FROM_IDS),
    "arrays": ([np.array(row) for row in IDS], FROM_IDS),
    "objects": (np.array([*map(np.array, IDS), None], object)[:-1], FROM_IDS),
}
CALLS = {
    "loss": lambda y: asymmetric_loss(X, y),
    "PackedLabels.from_dense": PackedLabels.from_dense,
    "SparseLabels.from_dense": SparseLabels.from_dense,
    "PackedLabels": lambda y: PackedLabels(y, 200),
    "SparseLabels": lambda y: SparseLabels(y, 200),
}


@pytest.mark.mostly_long(short=14)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", OTHER_FORMS)
def test_labels_in_another_form_are_told_the_call_that_takes_them(call, form):
    labels, sentence = OTHER_FORMS[form]
    with pytest.raises(TypeError, match=re.escape(sentence)):
        CALLS[call](labels)


PACKED, SPARSE = PackedLabels.from_dense(Y), SparseLabels.from_dense(Y)
BAD = [
    (
        lambda: SparseLabels(Y.astype(bool), 200),
        TypeError,
        f"dtype bool; expected an integer dtype; SparseLabels.{FROM_DENSE}",
    ),
    (lambda: SparseLabels(Y, 200), ValueError, f"and hold 0 and 1 alone: SparseLabels.{FROM_DENSE}"),
    (lambda: SparseLabels.from_ids(jnp.asarray(Y), 200), ValueError, f"SparseLabels.{FROM_DENSE}"),
    (lambda: PackedLabels(Y, 200), TypeError, f"words have dtype int8; expected uint32: {FROM_DENSE}"),
    (lambda: PackedLabels.from_dense([[1, 2], [3, 4]]), ValueError, "go to from_ids(ids, classes)"),
    (lambda: PackedLabels.from_dense(iter(IDS)), ValueError, "labels are a scalar, of list_iterator; expected"),
    (
        lambda: PackedLabels.from_dense(PACKED),
        TypeError,
        "PackedLabels are encoded labels already; call their to_packed()",
    ),
    (lambda: SparseLabels(PACKED, 200), TypeError, "ids: PackedLabels are encoded labels already"),
    (lambda: PackedLabels(SPARSE, 200), TypeError, "words: SparseLabels are encoded labels already"),
    (lambda: SparseLabels.from_ids(PACKED, 200), TypeError, "ids: PackedLabels are encoded labels already"),
    (lambda: SparseLabels.from_csr(SPARSE), TypeError, "matrix: SparseLabels are encoded labels already"),
    (lambda: SparseLabels.from_csr(BCOO), TypeError, "BCSR.from_bcoo(matrix)"),
    (lambda: SparseLabels.from_csr(Y), TypeError, f"is ndarray; expected a SciPy CSR matrix or array: {FROM_DENSE}"),
    (lambda: SparseLabels.from_ids(scipy.sparse.csr_array(Y), 200), TypeError, f"{FROM_CSR})"),
    (lambda: PackedLabels.from_ids(scipy.sparse.coo_array(Y), 200), TypeError, f"{FROM_CSR}.tocsr())"),
    (
        lambda: asymmetric_loss(X, list(PACKED)),
        TypeError,
        "labels: a list of PackedLabels is no array; PackedLabels.stack(",
    ),
    (lambda: SparseLabels.from_dense((SPARSE,)), TypeError, "labels: a tuple of SparseLabels is no array"),
    (lambda: asymmetric_loss(X, SPARSE.ids), ValueError, "go in as SparseLabels(ids, classes)"),
]


@pytest.mark.parametrize(("make", "error", "sentence"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_mix_up_is_told_the_call_that_was_meant(make, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        make()


def test_rows_of_any_kind_are_a_dense_array():
    for rows in ([*Y], tuple(map(tuple, Y.tolist())), [jnp.asarray(row) for row in Y]):
        np.testing.assert_allclose(asymmetric_loss(X, rows), asymmetric_loss(X, Y), rtol=1e-6)
    one = [np.array(1), np.array(0), jnp.array(1)]
    np.testing.assert_allclose(
        asymmetric_loss(X[0, :3], one), asymmetric_loss(X[0, :3], np.array([1, 0, 1])), rtol=1e-6
    )


def test_ids_of_no_more_than_two_classes_are_taken_for_ids():
    np.testing.assert_array_equal(SparseLabels(np.array([[0, 1], [1, 1]]), 2).to_dense(), [[True, True], [False, True]])
    np.testing.assert_array_equal(SparseLabels(np.array([[0, 1, -1]]), 3).to_dense(), [[True, True, False]])


GIVEN = {
    "logits": X,
    "labels": Y,
    "where": np.random.default_rng(2).random(X.shape) < 0.9,
    "weights": np.random.default_rng(3).random(X.shape).astype(np.float32),
    "pos_weight": np.random.default_rng(4).random(200).astype(np.float32),
}


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize("wrapper", [nnx.Variable, nnx.Param])
@pytest.mark.parametrize("name", ["all", "labels", *GIVEN])
def test_every_argument_may_be_in_a_wrapper(name, wrapper):
    expected = asymmetric_loss(**GIVEN)
    names = GIVEN if name == "all" else [name]
    wrapped = GIVEN | {n: wrapper(jnp.asarray(GIVEN[n])) for n in names}
    np.testing.assert_allclose(asymmetric_loss(**wrapped), expected, rtol=1e-6)
    np.testing.assert_allclose(nnx.jit(lambda a: asymmetric_loss(**a))(wrapped), expected, rtol=1e-6)


def test_labels_in_a_wrapper_are_looked_at_where_they_are_concrete():
    with pytest.raises(ValueError, match="labels hold 2; expected 0 or 1"):
        asymmetric_loss(X, nnx.Variable(jnp.asarray(Y + 1)))
    left_out = np.where(GIVEN["where"], Y, 7)
    found = asymmetric_loss(X, nnx.Variable(jnp.asarray(left_out)), where=nnx.Variable(jnp.asarray(GIVEN["where"])))
    np.testing.assert_allclose(found, asymmetric_loss(X, Y, where=GIVEN["where"]), rtol=1e-6)


@KINDS
def test_labels_are_made_of_wrappers_and_hold_them(kind):
    dense = nnx.Variable(jnp.asarray(Y))
    labels = kind.from_dense(jnp.asarray(Y))
    (array,) = jax.tree.leaves(labels)
    expected = asymmetric_loss(X, Y)

    def loss(labels: Any) -> Any:
        np.testing.assert_array_equal(labels.shape, Y.shape)
        return asymmetric_loss(X, labels)

    holds = jax.tree.map(nnx.Variable, labels)
    for made in (kind(nnx.Variable(array), 200), kind.from_dense(dense), holds):
        np.testing.assert_allclose(loss(made), expected, rtol=1e-6)
        np.testing.assert_allclose(nnx.jit(loss)(made), expected, rtol=1e-6)
        for found in (made, *made[1:2], kind.stack([made])[0], kind.concatenate([made, made])[:6]):
            np.testing.assert_array_equal(found.to_dense(), Y if found.ndim == 2 else Y[1])
    np.testing.assert_array_equal(
        holds.to_sparse().to_dense() if kind is PackedLabels else holds.to_packed().to_dense(), Y
    )
    made = nnx.jit(lambda y: kind.from_dense(y) if kind is PackedLabels else kind.from_dense(y, 40))(dense)
    np.testing.assert_array_equal(made.to_dense(), Y)
    ids = nnx.Variable(jnp.asarray(SparseLabels.from_dense(Y).ids))
    np.testing.assert_array_equal(kind.from_ids(ids, 200).to_dense(), Y)
    np.testing.assert_array_equal(nnx.jit(lambda i: kind.from_ids(i, 200).to_dense())(ids), Y)
    traced = nnx.jit(lambda a: kind(a, 200).to_dense())(nnx.Variable(array))
    np.testing.assert_array_equal(traced, Y)
