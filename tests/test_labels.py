"""Labels as bits and as ids: every way in and out is lossless, the loss of either is that of dense ones."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from cases import assert_parity, cotangent_of, labels_of, logits_of

from asl_pallas import PackedLabels, SparseLabels, asymmetric_loss, kernels
from asl_pallas.bits import cut, unpack

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


@pytest.mark.mostly_long(short=9)
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


@pytest.mark.mostly_long(short=3)
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


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("first", [0, 1, 127, 128, 4000, 4096, 4097, 5504, 8191])
def test_words_can_be_cut_anywhere(first):
    dense = dense_of((2, 12_500), share=0.3)
    words = PackedLabels.from_dense(jnp.asarray(dense)).words
    for classes in (1, 300, 4096, 4309):
        found = unpack(jax.jit(cut, static_argnums=2)(words, first, classes), classes)
        np.testing.assert_array_equal(found, dense[:, first : first + classes])


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    # As many words as classes, more, fewer; and three groups of them.
    [((5, 128), "float32"), ((33, 80), "bfloat16"), ((8, 257), "float32"), ((2, 9605), "float32")],
)
def test_the_loss_of_either_form_matches_float64(implementation, form, shape, dtype):
    assert_parity(logits_of(shape, dtype=dtype), labels_of(shape), implementation=implementation, form=form)


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize("form", KINDS)
def test_either_form_goes_with_the_other_arguments(implementation, form):
    shape = (2, 3, 1100)
    random = np.random.default_rng(3)
    assert_parity(
        logits_of(shape),
        labels_of(shape),
        implementation=implementation,
        form=form,
        axis=None,
        where=random.random(shape) < 0.8,
        weights=random.random((2, 3, 1)).astype(np.float32),
        pos_weight=random.random(shape[-1:]).astype(np.float32),
        label_smoothing=0.1,
    )


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("axis", [(), 0, (0, 1), (1, 2)], ids=str)
def test_every_axis_gives_what_dense_labels_give(form, axis):
    x, y = logits_of((3, 4, 130)), labels_of((3, 4, 130))

    def both(labels: Any) -> Any:
        return jax.value_and_grad(lambda x: jnp.sum(jnp.log1p(asymmetric_loss(x, labels, axis=axis))))(x)

    for found, expected in zip(both(form.from_dense(y)), both(y), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.mostly_long(short=1)
def test_ids_come_in_any_order_and_number_and_what_is_no_class_counts_for_nothing(implementation):
    x = logits_of((4, 4200))
    # More than a register's rows of them, none, one twice, and those that no check sees.
    ids = np.full((4, 11), -1, np.int32)
    ids[0], ids[1, 5], ids[3, :5] = np.arange(4199, 0, -400), 4199, (7, 4096, 7, 4200, -5000)
    dense = np.zeros(x.shape, np.int8)
    dense[0, ids[0]] = dense[1, 4199] = dense[3, 7] = dense[3, 4096] = 1

    @jax.jit
    def loss(x: Any, ids: Any) -> Any:
        return asymmetric_loss(x, SparseLabels(ids, 4200), implementation=implementation)

    np.testing.assert_allclose(loss(x, ids), asymmetric_loss(x, dense), rtol=2e-6)
    np.testing.assert_allclose(loss(x, ids[:, :0]), asymmetric_loss(x, np.zeros_like(dense)), rtol=2e-6)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("form", KINDS)
def test_blocks_of_rows_and_of_words_meet_without_a_gap(form):
    """Float32 logits by element in blocks of 2048 classes, so that two blocks share a group of words."""
    shape = (140, 4700)
    x, y = logits_of(shape), labels_of(shape)
    expected = jax.jit(lambda x: asymmetric_loss(x, y, axis=(), weights=np.ones(shape)))(x)
    with kernels.interpret_mode():
        found = asymmetric_loss(
            x, form.from_dense(y), axis=(), weights=np.ones(shape, np.float32), implementation="mosaic_tpu"
        )
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("shape", [(3, 66_000), (300, 500)])
def test_the_cpu_streams_either_form_over_every_edge(form, shape):
    x, y = logits_of(shape), labels_of(shape)
    expected = jax.jit(lambda x: asymmetric_loss(x, y))(x)
    np.testing.assert_allclose(jax.jit(asymmetric_loss)(x, form.from_dense(y)), expected, rtol=2e-5)


@pytest.mark.long
@pytest.mark.parametrize("form", KINDS)
def test_the_loss_of_either_form_transforms_as_that_of_dense_labels(form):
    x, y = logits_of((3, 5, 130)), labels_of((3, 5, 130))
    labels = form.from_dense(y)
    direction = cotangent_of(x.shape)

    def total(x: Any, y: Any) -> Any:
        return asymmetric_loss(x, y, axis=None)

    for f in (
        jax.vmap(jax.value_and_grad(total)),
        jax.vmap(jax.value_and_grad(total), in_axes=1),
        jax.grad(lambda x, y: jnp.vdot(jax.grad(total)(x, y), direction)),
        jax.grad(lambda x, y: jax.lax.scan(lambda c, a: (c + total(*a), None), 0.0, (x, y))[0]),
    ):
        for found, expected in zip(jax.tree.leaves(f(x, labels)), jax.tree.leaves(f(x, y)), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    _, of_labels = jax.grad(total, argnums=(0, 1), allow_int=True)(x, labels)
    assert isinstance(of_labels, form) and array_of(of_labels).dtype == jax.dtypes.float0


@pytest.mark.parametrize("form", KINDS)
def test_labels_that_fit_no_loss_are_named(form):
    x, labels = np.zeros((2, 300), np.float32), form.from_dense(X)
    with pytest.raises(ValueError, match=r"of shape \(1, 300\); expected the logits' shape \(2, 300\)"):
        asymmetric_loss(x, labels[:1])
    with pytest.raises(ValueError, match=r"of shape \(2, 300\); expected the logits' shape \(2, 299\)"):
        asymmetric_loss(x[:, 1:], labels)
    with pytest.raises(TypeError, match=r"ignore_label=-1 needs integer labels.*where"):
        asymmetric_loss(x, labels, ignore_label=-1)
    with pytest.raises(TypeError, match="float32; expected"):  # what came out of a pytree is looked at again
        asymmetric_loss(x, jax.tree.map(lambda array: array.astype(np.float32), labels))
    with pytest.raises(NotImplementedError, match="mosaic_gpu"):
        asymmetric_loss(x, labels, implementation="mosaic_gpu")
    many = SparseLabels(np.full((2, 5000), -1), 300)
    with pytest.raises(NotImplementedError, match="at most 4096 ids a row, and these have 5000"):
        asymmetric_loss(x, many, implementation="mosaic_tpu")
