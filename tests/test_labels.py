"""Labels as bits and as ids: every way in and out is lossless, and bad input is named."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from asl_pallas import PackedLabels, SparseLabels

S = jax.ShapeDtypeStruct
KINDS = (PackedLabels, SparseLabels)
# One class, fewer than a register has lanes, a part of a group, one more than a group, several groups, leading ones.
SHAPES = [(3, 1), (33, 80), (5, 257), (4, 4096), (3, 4097), (2, 9605), (2, 3, 5, 200), (4100,), (0, 7), (3, 0)]


def dense_of(shape: tuple[int, ...], share: float = 0.1) -> Any:
    dense = np.random.default_rng(0).random(shape) < share
    dense[..., -1:] = True  # the last bit there is
    if dense.ndim > 1:
        dense[-1:] = False  # a row without a positive
    return dense


def ids_of(dense: Any) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in dense]


def array_of(labels: Any) -> Any:
    (array,) = jax.tree.leaves(labels)
    return array


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("module", "shape"), [*((np, s) for s in SHAPES), *((jnp, s) for s in SHAPES[3:])], ids=str)
def test_dense_labels_come_back_whatever_the_way(kind, module, shape):
    dense = dense_of(shape)
    labels = kind.from_dense(module.asarray(dense))
    other = labels.to_sparse() if kind is PackedLabels else labels.to_packed()
    for form in (labels, other, other.to_packed() if kind is PackedLabels else other.to_sparse()):
        assert (form.shape, form.ndim, form.dtype) == (shape, len(shape), bool)
        found = form.to_dense()
        assert isinstance(found, np.ndarray if module is np else jax.Array) and found.dtype == bool
        np.testing.assert_array_equal(found, dense)
    np.testing.assert_array_equal(jax.jit(kind.to_dense)(labels), dense)


def test_bit_j_of_word_l_is_class_128_j_plus_l_of_its_group():
    for label in (0, 1, 127, 128, 129, 4095, 4096, 9604):
        words = PackedLabels.from_ids([[label]], 9605).words
        assert words.shape == (1, 3 * 128) and words.dtype == np.uint32
        expected = np.zeros_like(words)
        expected[0, label // 4096 * 128 + label % 128] = 1 << (label // 128 % 32)
        np.testing.assert_array_equal(words, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_lists_and_csr_give_what_dense_gives(kind):
    dense = dense_of((6, 9605), share=0.003)
    expected = array_of(kind.from_dense(dense))
    lists = ids_of(dense)
    for ids in (lists, tuple(map(tuple, lists)), [np.array(row, np.uint16) for row in lists], map(iter, lists)):
        np.testing.assert_array_equal(array_of(kind.from_ids(ids, 9605)), expected)
    padded = SparseLabels.from_dense(dense).ids
    for array in (padded, padded.astype(np.int64), jnp.asarray(padded)):
        np.testing.assert_array_equal(array_of(kind.from_ids(array, 9605)), expected)
    for matrix in (scipy.sparse.csr_array(dense), scipy.sparse.csr_matrix(dense.astype(np.float32))):
        np.testing.assert_array_equal(array_of(kind.from_csr(matrix)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stored_zero_of_a_csr_matrix_is_a_negative(kind):
    matrix = scipy.sparse.csr_array((np.array([1, 0, 1]), np.array([2, 5, 5]), np.array([0, 2, 3])), shape=(2, 7))
    assert ids_of(kind.from_csr(matrix).to_dense()) == [[2], [5]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lists", [[], [[]], [[], [3, 3, 1, 3], [0]]], ids=str)
def test_empty_lists_and_ids_that_come_twice(kind, lists):
    labels = kind.from_ids(lists, 200)
    assert labels.shape == (len(lists), 200)
    assert ids_of(labels.to_dense()) == [sorted(set(row)) for row in lists]
    on_device = jax.tree.map(jnp.asarray, labels)
    np.testing.assert_array_equal(on_device.to_dense(), labels.to_dense())


def test_ids_of_a_traced_array_that_are_no_class_are_dropped():
    ids = np.array([[5, -1, 7, 200, -3, 5, 2**31 - 1], [4095, 198, 199, 4096, 199, 0, -(2**31)]])
    found = jax.jit(lambda ids: SparseLabels(ids, 200).to_dense())(ids.astype(np.int32))
    assert ids_of(found) == [[5, 7], [0, 198, 199]]
    with jax.enable_x64(True):
        found = jax.jit(lambda ids: SparseLabels(ids, 200).to_packed().to_dense())(ids + np.array(2**33) * (ids == 7))
    assert ids_of(found) == [[5], [0, 198, 199]]


def test_bits_beyond_the_classes_are_ignored():
    words = np.full((2, 128), 0xFFFFFFFF, np.uint32)
    for module in (np, jnp):
        labels = PackedLabels(module.asarray(words), 200)
        assert labels.to_dense().shape == (2, 200) and labels.to_dense().all()
        assert ids_of(labels.to_sparse().to_dense()) == [list(range(200))] * 2


def test_k_gives_every_batch_one_shape():
    dense = dense_of((4, 80), share=0.04)
    expected = SparseLabels.from_dense(dense, 20)
    assert expected.ids.shape == (4, 20)
    for made in (
        PackedLabels.from_dense(dense).to_sparse(20),
        SparseLabels.from_ids(ids_of(dense), 80, k=20),
        SparseLabels.from_ids(SparseLabels.from_dense(dense).ids, 80, k=20),
        SparseLabels.from_csr(scipy.sparse.csr_array(dense), k=20),
        jax.jit(lambda y: SparseLabels.from_dense(y, 20))(dense),
        jax.jit(lambda y: PackedLabels.from_dense(y).to_sparse(20))(dense),
    ):
        np.testing.assert_array_equal(made.ids, expected.ids)
    assert jax.jit(lambda y: SparseLabels.from_dense(y, 100))(dense).ids.shape == (4, 100)
    too_many = "a row has [0-9]+ positives; expected at most k=1"
    for make in (
        lambda: SparseLabels.from_dense(dense, 1),
        lambda: PackedLabels.from_dense(dense).to_sparse(1),
        lambda: SparseLabels.from_ids([[1, 2], []], 80, k=1),
    ):
        with pytest.raises(ValueError, match=too_many):
            make()


@pytest.mark.parametrize("kind", KINDS)
def test_they_pass_through_jax_as_arrays_do(kind):
    dense = dense_of((4, 3, 300))
    labels = kind.from_dense(dense)
    array = array_of(labels)

    def as_dense(labels: Any) -> Any:
        assert isinstance(labels, kind)
        return labels.to_dense()

    np.testing.assert_array_equal(jax.vmap(as_dense)(labels), dense)
    np.testing.assert_array_equal(jax.vmap(as_dense, in_axes=1, out_axes=1)(labels), dense)
    np.testing.assert_array_equal(jax.lax.map(as_dense, jax.device_put(labels)), dense)
    np.testing.assert_array_equal(jax.lax.scan(lambda c, y: (c, as_dense(y)), 0, labels)[1], dense)
    shapes = jax.eval_shape(lambda y: y, labels)
    assert isinstance(shapes, kind) and shapes.shape == dense.shape
    assert kind(S(array.shape, array.dtype), 300).shape == dense.shape
    assert isinstance(jax.tree.unflatten(jax.tree.structure(labels), [None]), kind)
    exported = jax.export.export(jax.jit(as_dense))(labels)
    np.testing.assert_array_equal(jax.export.deserialize(exported.serialize()).call(labels), dense)
    assert f"{kind.__name__}(" in repr(labels) and "classes=300" in repr(shapes)
    ((path, _),) = jax.tree_util.tree_leaves_with_path(labels)
    assert jax.tree_util.keystr(path) == (".words" if kind is PackedLabels else ".ids")


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_takes_examples_and_leaves_the_classes_whole(kind):
    dense = dense_of((6, 3, 300))
    several = (slice(2, 5), 4, (1, 2), (slice(None), 0), np.array([3, 0]), (slice(1, 3), slice(None, None, 2)))
    for module, indices in ((np, several), (jnp, several[2:4])):
        labels = kind.from_dense(module.asarray(dense))
        assert len(labels) == 6
        for index in indices:
            np.testing.assert_array_equal(labels[index].to_dense(), dense[index])
        with pytest.raises(IndexError):
            labels[0, 0, 0]
        with pytest.raises(IndexError, match="leading dimensions"):
            labels[..., 0]


X = np.zeros((2, 300), np.int8)
BAD = [
    (lambda: PackedLabels(np.zeros((2, 128), np.uint32), 4097), ValueError, "(2, 128); 4097 classes need (..., 256)"),
    (lambda: PackedLabels(np.zeros((2, 256), np.uint32), 300), ValueError, "(2, 256); 300 classes need (..., 128)"),
    (lambda: PackedLabels(np.zeros((2, 128), np.int32), 300), TypeError, "words have dtype int32; expected uint32"),
    (lambda: PackedLabels(np.zeros((2, 128), np.uint32), 300.0), TypeError, "classes=300.0; expected an integer"),
    (lambda: PackedLabels(np.zeros((2, 128), np.uint32), -1), ValueError, "classes=-1; expected 0 <= classes < 2^31"),
    (lambda: SparseLabels(np.zeros((2, 3)), 300), TypeError, "ids have dtype float64; expected an integer dtype"),
    (lambda: SparseLabels(jnp.zeros((2, 3)), 300), TypeError, "ids have dtype float32; expected an integer dtype"),
    (lambda: SparseLabels(np.array([[0, 300]]), 300), ValueError, "ids hold 300; expected 0 <= id < 300, or -1"),
    (lambda: SparseLabels(jnp.array([[0, -2]]), 300), ValueError, "ids hold -2; expected 0 <= id < 300, or -1"),
    (lambda: SparseLabels(np.int32(3), 300), ValueError, "ids are a scalar; expected shape (..., k)"),
    (lambda: SparseLabels.from_ids([[1, 2], [3.5]], 300), TypeError, "ids have dtype float64"),
    (lambda: SparseLabels.from_ids([["a"]], 300), TypeError, "expected an integer dtype"),
    (lambda: PackedLabels.from_ids([[1, -1]], 300), ValueError, "ids hold -1; expected 0 <= id < 300"),
    (lambda: PackedLabels.from_ids([1, 2], 300), TypeError, "expected a sequence with the ids of each example"),
    (lambda: SparseLabels.from_ids([[[1]], [[2]]], 300), ValueError, "nested more deeply"),
    (lambda: SparseLabels.from_ids(np.zeros((2, 3), int), 300, k=2), ValueError, "expected at most k=2 in a row"),
    (lambda: PackedLabels.from_dense(X.astype(np.float32)), TypeError, "labels have dtype float32; a bit holds"),
    (lambda: SparseLabels.from_dense(X - 1), ValueError, "labels hold -1; expected 0 or 1"),
    (lambda: SparseLabels.from_dense(X, k=1.5), TypeError, "k=1.5; expected an integer or None"),
    (lambda: PackedLabels.from_dense(True), ValueError, "labels are a scalar"),
    (lambda: jax.jit(SparseLabels.from_dense)(X), TypeError, "k=None needs concrete ones"),
    (lambda: PackedLabels.from_csr(scipy.sparse.coo_array(X)), TypeError, "matrix is coo; expected a SciPy CSR"),
    (lambda: SparseLabels.from_csr(X), TypeError, "matrix is ndarray; expected a SciPy CSR"),
    (lambda: SparseLabels.from_csr(scipy.sparse.csr_array([[0.5]])), ValueError, "matrix holds 0.5; expected 0 or 1"),
]


@pytest.mark.parametrize(("make", "error", "sentence"), BAD, ids=[sentence for *_, sentence in BAD])
def test_bad_input_is_named(make, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        make()
