"""Frequencies of labels in every form, where a head starts, and where it decides."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from asl_pallas import (
    AsymmetricLoss,
    PackedLabels,
    PartialLabels,
    PriorLogitInit,
    SparseLabels,
    decision_logit,
    label_frequencies,
    prior_logits,
)
from asl_pallas.losses import BinaryCrossEntropy, HillLoss

ROWS, CLASSES = 37, 4500  # two groups of words


def dense(rows: int = ROWS, classes: int = CLASSES) -> np.ndarray:
    random = np.random.default_rng(rows)
    return (random.random((rows, classes)) < np.linspace(0, 0.3, classes)).astype(np.int8)


FORMS = {
    "int8": lambda y: y,
    "bool": lambda y: y > 0,
    "float32": lambda y: y.astype(np.float32),
    "jax": jnp.asarray,
    "packed": PackedLabels.from_dense,
    "packed jax": lambda y: PackedLabels.from_dense(jnp.asarray(y)),
    "sparse": SparseLabels.from_dense,
    "sparse jax": lambda y: SparseLabels.from_dense(jnp.asarray(y), 1500),
    "csr": scipy.sparse.csr_matrix,
    "csr array": scipy.sparse.csr_array,
    "partial": lambda y: PartialLabels.from_dense(y, form="packed"),
    "three dimensions": lambda y: y[None],
}


@pytest.mark.parametrize("form", FORMS)
def test_frequencies_are_means_of_the_labels_in_any_form(form):
    y = dense()
    found = label_frequencies(FORMS[form](y))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, y.mean(0), rtol=1e-12)


@pytest.mark.parametrize("form", ["int8", "packed", "sparse", "csr"])
def test_frequencies_are_counted_in_a_stream(form):
    y = dense()
    parts = [y[:5], y[5:6], y[6:]]
    for stream in ([FORMS[form](part) for part in parts], (FORMS[form](part) for part in parts)):
        np.testing.assert_allclose(label_frequencies(stream), y.mean(0), rtol=1e-12)


def test_frequencies_are_shares_of_what_is_annotated():
    labels = np.array([[1, -1, 0, -1], [0, 1, 0, -1], [-1, 1, 1, -1]])
    expected = [1 / 2, 1, 1 / 3, np.nan]
    np.testing.assert_allclose(label_frequencies(labels, ignore_label=-1), expected)
    for form in ("packed", "sparse"):
        np.testing.assert_allclose(label_frequencies(PartialLabels.from_dense(labels, form=form)), expected)
    both = PartialLabels(SparseLabels([[0]], 2), SparseLabels([[0, 1]], 2))  # what is in both is positive
    np.testing.assert_allclose(label_frequencies(both), [1, 0])


def test_an_id_that_comes_twice_counts_once():
    np.testing.assert_allclose(label_frequencies(SparseLabels(np.array([[1, 1], [-1, 0]]), 3)), [0.5, 0.5, 0])


@pytest.mark.parametrize(
    ("labels", "options", "error", "says"),
    [
        (np.array([[0, 2]]), {}, ValueError, "labels hold 2; expected 0 or 1"),
        (np.array([[0, -1]]), {}, ValueError, "labels hold -1; expected 0 or 1"),
        (np.array([[0.5, np.nan]]), {}, ValueError, "labels hold nan"),
        ([[7], [1, 2]], {}, TypeError, "SparseLabels.from_ids(lists, classes) takes them"),
        (np.zeros((0, 3), bool), {}, ValueError, "labels hold no example"),
        ([], {}, ValueError, "labels hold no example"),
        ([np.zeros((1, 3)), np.zeros((1, 4))], {}, ValueError, "3 classes in one batch and 4 in another"),
        (SparseLabels([[0]], 3), {"ignore_label": -1}, TypeError, "these are SparseLabels"),
        (scipy.sparse.coo_matrix(np.eye(3)), {}, TypeError, "from_csr(matrix.tocsr())"),
        (7, {}, TypeError, "labels are int64[]"),
    ],
    ids=str,
)
def test_labels_that_cannot_be_counted_are_named(labels, options, error, says):
    with pytest.raises(error, match=re.escape(says)):
        label_frequencies(labels, **options)


def test_cross_entropy_starts_at_the_log_odds_and_other_losses_elsewhere():
    frequencies = np.array([0.0, 1e-3, 0.04, 1.0])
    clipped = np.clip(frequencies, 1e-6, 1 - 1e-6)
    np.testing.assert_allclose(
        prior_logits(frequencies, BinaryCrossEntropy()), np.log(clipped / (1 - clipped)), rtol=1e-9
    )
    for loss in (AsymmetricLoss(), AsymmetricLoss(gamma_neg=jnp.array([1.0, 2.0, 3.0, 4.0]))):
        found = prior_logits(frequencies, loss)
        assert found.dtype == np.float64
        np.testing.assert_allclose(loss.probability(found), clipped, rtol=1e-3)
        assert (found > np.log(clipped / (1 - clipped)))[:3].all()
    weighted = prior_logits(frequencies, BinaryCrossEntropy(), pos_weight=2.0)
    np.testing.assert_allclose(weighted, np.log(2 * clipped / (1 - clipped)), rtol=1e-9)


@pytest.mark.parametrize(
    ("frequencies", "options", "error", "says"),
    [
        ([0.1, 1.5], {}, ValueError, "frequencies hold 1.5; expected 0 <= frequency <= 1"),
        ([0.1, np.nan], {}, ValueError, "frequencies hold nan"),
        (0.1, {}, ValueError, "frequencies have shape (); expected (classes,)"),
        ([0.1], {"at_least": 0.0}, ValueError, "at_least=0.0; expected 0 < at_least < 0.5"),
        ([0.1], {"loss": "asl"}, TypeError, "loss='asl'; expected a loss object"),
        ([0.1], {"loss": HillLoss(lamb=1.0)}, ValueError, "has no link"),
        ([0.1], {"pos_weight": np.ones((2, 1))}, ValueError, "expected a value per class at most"),
    ],
    ids=str,
)
def test_a_start_that_cannot_be_is_named(frequencies, options, error, says):
    with pytest.raises(error, match=re.escape(says)):
        prior_logits(frequencies, **{"loss": AsymmetricLoss(), **options})


def test_an_initializer_is_called_as_flax_and_as_haiku_do():
    init = PriorLogitInit([0.1, 0.2], AsymmetricLoss())
    expected = prior_logits([0.1, 0.2], AsymmetricLoss())
    key = jax.random.key(0)
    for found in (init(key, (2,), jnp.float32), init(key, (2,)), init((2,), jnp.float32), init(shape=(2,))):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert jax.jit(lambda key: init(key, (2,), jnp.bfloat16))(key).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=re.escape("frequencies have shape (2,); expected (3,), the bias's")):
        init(key, (3,), jnp.float32)


def test_a_decision_costs_least():
    loss = AsymmetricLoss()
    np.testing.assert_allclose(loss.probability(decision_logit(loss)), 0.5, rtol=1e-9)
    np.testing.assert_allclose(decision_logit(BinaryCrossEntropy()), 0, atol=1e-12)
    costs = np.array([1.0, 4.0, 9.0])
    found = decision_logit(loss, false_negative_cost=costs)
    np.testing.assert_allclose(loss.probability(found), 1 / (1 + costs), rtol=1e-6)
    for name in ("false_positive_cost", "false_negative_cost"):
        with pytest.raises(ValueError, match=f"{name}=0.0; expected numbers above 0"):
            decision_logit(loss, **{name: 0.0})
