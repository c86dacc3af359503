"""Statistics by class, against sums in float64 and scikit-learn: kernels, label forms, the head, a mesh; P@k."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import interpreted, labels_of, logits_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn import metrics
from test_statistics import FORMS, SHAPE, sigmoid

from asl_pallas import (
    AsymmetricLoss,
    ClassStatistics,
    PartialLabels,
    TopKStatistics,
    linear_multilabel_loss,
    linear_top_k,
    multilabel_loss,
)
from asl_pallas.losses import BinaryCrossEntropy, SelectiveLoss
from reference import float64

DECISION = -0.5
SEVERAL = np.array([[-2.0], [-0.5], [1.0]], np.float32)


def truth(x: Any, y: Any, decisions: Any = DECISION, *, keep: Any = True, weights: Any = 1.0) -> ClassStatistics:
    """Sums over the examples, in float64."""
    x = np.asarray(x, np.float64)
    y, keep = np.broadcast_to(np.asarray(y, np.float64), x.shape), np.broadcast_to(keep, x.shape)
    p = sigmoid(x)
    losses = np.where(keep, float64.asymmetric_loss(x, y, axis=()) * weights, 0)
    leading = tuple(range(x.ndim - 1))

    def total(part: Any) -> Any:
        return np.where(keep, part, 0).sum(leading)

    def predicted(part: Any) -> Any:
        decision = np.broadcast_to(decisions, (*np.shape(decisions)[:-1], x.shape[-1]))
        found = [total(part * (x >= one)) for one in decision.reshape(-1, x.shape[-1])]
        return np.reshape(found, decision.shape)

    return ClassStatistics(
        positives=total(y),
        negatives=total(1 - y),
        positive_probability=total(y * p),
        negative_probability=total((1 - y) * p),
        loss=losses.sum(leading),
        true_positives=predicted(y),
        false_positives=predicted(1 - y),
    )


def assert_same(found: Any, expected: ClassStatistics) -> None:
    for name, of_truth in vars(expected).items():
        ours = np.asarray(getattr(found, name))
        assert ours.shape == np.shape(of_truth), name
        examples = np.max(expected.positives + expected.negatives)
        np.testing.assert_allclose(ours, of_truth, rtol=1e-5, atol=2e-7 * examples + 1e-6, err_msg=name)


def by_class(loss: Any, x: Any, y: Any, decisions: Any = DECISION, **options: Any) -> Any:
    """Beside the gradient, jitted."""

    def total(x: Any) -> Any:
        losses, statistics = multilabel_loss(loss, x, y, statistics=True, decision_logits=decisions, **options)
        return jnp.sum(losses), statistics.by_class

    (_, found), _ = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(x))
    return found


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [SHAPE, (33, 1), (2, 3, 4500), (1000, 130), (70, 2000), (5,)])
def test_they_are_the_sums_over_the_examples(form, shape):
    x, y = logits_of(shape), labels_of(shape)
    assert_same(by_class(AsymmetricLoss(), x, FORMS[form](y)), truth(x, y))


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decisions", [DECISION, SEVERAL], ids=["one", "several"])
def test_they_come_beside_any_kernel(implementation, form, decisions):
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    options = {"axis": None, "statistics": True, "decision_logits": decisions, "implementation": implementation}
    loss, statistics = multilabel_loss(AsymmetricLoss(), x, FORMS[form](y), **options)
    assert_same(statistics.by_class, truth(x, y, decisions))
    np.testing.assert_allclose(np.sum(statistics.by_class.loss), loss, rtol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (300,), (1, 300), (3, 1), (3, 300), (2, 3, 300), (1, 1)])
def test_decision_logits_of_any_shape(shape):
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    decisions = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = truth(x, y, decisions)
    if decisions.ndim == 0:
        assert expected.true_positives.shape == (300,)
    assert_same(by_class(AsymmetricLoss(), x, y, decisions), expected)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("case", ["where", "weights", "soft", "ignore", "bfloat16"])
@pytest.mark.parametrize("kernel", [None, "mosaic_tpu"])
def test_masks_weights_and_soft_labels(case, kernel):
    shape = (300, 400) if kernel is None else (70, 400)
    random = np.random.default_rng(0)
    x, y = logits_of(shape), labels_of(shape)
    keep = random.random(shape) < 0.8
    options: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    if case == "where":
        options, expected = {"where": keep}, {"keep": keep}
        given, labels = np.where(keep, x, np.nan), y
    elif case == "ignore":
        options, expected = {"ignore_label": -1}, {"keep": keep}
        given, labels = x, np.where(keep, y, -1).astype(np.int8)
    elif case == "weights":
        weights = random.random((shape[0], 1)).astype(np.float32)
        options = expected = {"weights": weights}
        given, labels = x, y
    elif case == "soft":
        y = random.random(shape).astype(np.float32)
        given, labels = x, y
    else:
        given, labels = jnp.asarray(x, jnp.bfloat16), y
        x = np.asarray(given.astype(jnp.float32))
    with interpreted(kernel):
        found = by_class(AsymmetricLoss(), given, labels, implementation=kernel, **options)
    assert_same(found, truth(x, y, **expected))


def test_what_is_not_annotated_is_in_no_count():
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    annotated = np.random.default_rng(0).random(SHAPE) < 0.5
    dense = np.where(annotated, y, -1).astype(np.int8)
    for labels in (dense, PartialLabels.from_dense(dense)):
        found = by_class(SelectiveLoss(), x, labels)
        counted = truth(x, y, keep=annotated)
        for name in set(vars(counted)) - {"loss"}:
            np.testing.assert_allclose(getattr(found, name), getattr(counted, name), rtol=1e-5, atol=1e-5)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decisions", [DECISION, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize("axis", [-1, None])
def test_the_head_has_them_chunk_by_chunk(form, decisions, axis):
    random = np.random.default_rng(0)
    features, kernel = (random.normal(size=s).astype(np.float32) for s in ((40, 7), (7, 300)))
    y = labels_of((40, 300))
    # Products round in float32: no logit may be that close to a decision.
    x = features.astype(np.float64) @ kernel
    assert np.abs(x[None] - np.reshape(decisions, (-1, 1, 1))).min() > 1e-6

    def total(features: Any, kernel: Any) -> Any:
        losses, statistics = linear_multilabel_loss(
            AsymmetricLoss(),
            features,
            kernel,
            FORMS[form](y),
            axis=axis,
            chunk_size=128,
            statistics=True,
            decision_logits=decisions,
        )
        return jnp.sum(losses), statistics.by_class

    (_, found), _ = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(features, kernel)
    assert_same(found, truth(x, y, decisions))
    assert_same(total(features, kernel)[1], truth(x, y, decisions))


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("spec", [P("data"), P(None, "model"), P("data", "model")], ids=str)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=lambda kind: kind.name)
@pytest.mark.parametrize("form", ["dense", "packed", "sparse"])
def test_a_mesh_adds_them_up(kind, spec, form):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[:8])
    x, y = logits_of((8, 96)), labels_of((8, 96))
    with jax.set_mesh(mesh):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        options = {"logits_spec": spec} if kind == AxisType.Auto else {}
        found = by_class(AsymmetricLoss(), placed, FORMS[form](y), SEVERAL, **options)
    assert_same(found, truth(x, y, SEVERAL))


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("total", [False, True])
def test_the_heads_mesh_adds_them_up(total):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:8])
    random = np.random.default_rng(0)
    features, kernel = (random.normal(size=s).astype(np.float32) for s in ((8, 6), (6, 96)))
    y = labels_of((8, 96))
    with jax.set_mesh(mesh):
        f = jax.device_put(features, NamedSharding(mesh, P("data")))
        w = jax.device_put(kernel, NamedSharding(mesh, P(None, "model")))

        @jax.jit
        def run(f: Any, w: Any) -> Any:
            options = {"statistics": True, "decision_logits": SEVERAL, "chunk_size": 20}
            return linear_multilabel_loss(AsymmetricLoss(), f, w, y, axis=None if total else -1, **options)

        text = run.lower(f, w).compile().as_text()
        _, statistics = run(f, w)
    assert "all-gather" not in text
    assert_same(statistics.by_class, truth(features.astype(np.float64) @ kernel, y, SEVERAL))


def test_on_a_mesh_they_move_as_one_number_a_class():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:8])
    x = jax.device_put(logits_of((64, 96)), NamedSharding(mesh, P("data")))
    y = jax.device_put(labels_of((64, 96)), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        step = jax.jit(
            lambda x, y: multilabel_loss(AsymmetricLoss(), x, y, axis=None, statistics=True, decision_logits=0.0)
        )
        text = step.lower(x, y).compile().as_text()
    moved = re.findall(r" = (.*) all-reduce(?:-start)?\(", text)
    assert moved
    assert not re.search(r"\[\d+,96\]", " ".join(moved))
    assert "all-gather" not in text


def test_under_vmap_they_are_each_examples_own():
    x, y = logits_of((3, 5, 200)), labels_of((3, 5, 200))

    def one(x: Any, y: Any) -> Any:
        return multilabel_loss(AsymmetricLoss(), x, y, statistics=True, decision_logits=DECISION)[1].by_class

    mapped = jax.jit(jax.vmap(one))(x, y)
    for i in range(3):
        assert_same(jax.tree.map(lambda part, i=i: part[i], mapped), truth(x[i], y[i]))


def test_they_add_up_and_stay_by_class_in_a_total():
    x, y = logits_of((6, 40)), labels_of((6, 40))

    def of(x: Any, y: Any) -> Any:
        return multilabel_loss(AsymmetricLoss(), x, y, statistics=True, decision_logits=DECISION)[1].total()

    both = of(x[:4], y[:4]) + of(x[4:], y[4:])
    assert_same(both.by_class, truth(x, y))
    np.testing.assert_allclose(both.positives, y.sum())
    with pytest.raises(TypeError):
        both.by_class + 1


def test_their_scores_are_scikit_learns():
    random = np.random.default_rng(0)
    shape = (400, 30)
    y = (random.random(shape) < random.random(30) ** 3).astype(np.int8)
    y[:, 3] = 0
    x = (random.normal(size=shape) + 2 * y - 1).astype(np.float32)
    x[:, 3] = -9
    found = by_class(BinaryCrossEntropy(), x, y, 0.0)
    called = x >= 0
    options: dict[str, Any] = {"zero_division": np.nan}
    expected = metrics.precision_recall_fscore_support(y, called, average=None, **options)
    for ours, theirs in zip((found.precision, found.recall, found.f1), expected, strict=False):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(found.macro_f1, np.nanmean(expected[2]), rtol=1e-5)
    np.testing.assert_allclose(found.micro_f1, metrics.f1_score(y, called, average="micro"), rtol=1e-5)
    # scikit-learn warns of class 3, whose labels and predictions are all 0.
    correlation = [0.0 if c == 3 else metrics.matthews_corrcoef(y[:, c], called[:, c]) for c in range(30)]
    np.testing.assert_allclose(found.mcc, correlation, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.micro_mcc, metrics.matthews_corrcoef(y.reshape(-1), called.reshape(-1)), rtol=1e-4)


def test_the_decisions_of_best_f1_are_found_among_those_counted():
    random = np.random.default_rng(0)
    shape = (500, 12)
    y = (random.random(shape) < 0.2).astype(np.int8)
    y[:, 5] = 0
    x = (random.normal(size=shape) + y * np.linspace(0.5, 3, 12)).astype(np.float32)
    grid = np.linspace(-2, 4, 13, dtype=np.float32)[:, None]
    logits, f1 = by_class(BinaryCrossEntropy(), x, y, grid).best_decision_logits(grid)
    for c in range(12):
        scores = [metrics.f1_score(y[:, c], x[:, c] >= one, zero_division=0.0) for one in grid[:, 0]]
        np.testing.assert_allclose(f1[c], max(scores), rtol=1e-5)
        assert logits[c] == (4.0 if c == 5 else grid[np.argmax(scores), 0])
    with pytest.raises(ValueError, match=re.escape("decision_logits has shape (13,); expected the ones")):
        by_class(BinaryCrossEntropy(), x, y, grid).best_decision_logits(grid[:, 0])


def test_without_decision_logits_there_are_none():
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    _, statistics = multilabel_loss(AsymmetricLoss(), x, y, statistics=True)
    assert statistics.by_class is None


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"decision_logits": 0.0}, ValueError, "expected statistics=True beside"),
        ({"statistics": True, "decision_logits": np.zeros(7)}, ValueError, "decision_logits has shape (7,); expected"),
        ({"statistics": True, "decision_logits": "0"}, TypeError, "decision_logits"),
        ({"statistics": True, "decision_logits": np.zeros((0, 300))}, ValueError, "expected one at least"),
    ],
)
def test_what_is_wrong_is_named(options, error, says):
    with pytest.raises(error, match=re.escape(says)):
        multilabel_loss(AsymmetricLoss(), np.zeros((4, 300)), np.zeros((4, 300)), **options)


@pytest.mark.parametrize("form", [*FORMS, "partial"])
def test_precision_at_k_of_a_heads_best_labels(form):
    random = np.random.default_rng(0)
    features, kernel = (random.normal(size=s).astype(np.float32) for s in ((20, 5), (5, 400)))
    y = labels_of((20, 400))
    _, ids = linear_top_k(features, kernel, 7)
    labels = PartialLabels.from_dense(y) if form == "partial" else FORMS[form](y)
    parts = [TopKStatistics.of(jax.tree.map(lambda a, s=s: a[s], labels), ids[s]) for s in (slice(8), slice(8, 20))]
    found = parts[0] + parts[1]
    hits = np.take_along_axis(y, np.asarray(ids), -1)
    assert found.examples == 20
    np.testing.assert_allclose(found.precision, [hits[:, : k + 1].mean() for k in range(7)], rtol=1e-6)
    same = jax.jit(TopKStatistics.of)(labels, ids)
    np.testing.assert_allclose(same.precision, found.precision)


def test_precision_at_k_says_what_it_expects():
    with pytest.raises(ValueError, match=re.escape("ids has shape (3, 2); expected (4, k)")):
        TopKStatistics.of(np.zeros((4, 10)), np.zeros((3, 2), np.int32))
    with pytest.raises(TypeError, match="ids has dtype float"):
        TopKStatistics.of(np.zeros((4, 10)), np.zeros((4, 2)))
