"""Statistics beside the loss, against sums in float64, in every kernel, label form, in the head and on a mesh."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import interpreted, labels_of, logits_of
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from asl_pallas import (
    AsymmetricLoss,
    PackedLabels,
    PartialLabels,
    SparseLabels,
    Statistics,
    linear_multilabel_loss,
    multilabel_loss,
)
from asl_pallas.losses import BinaryCrossEntropy, ElementwiseLoss, FocalLoss, HillLoss, SelectiveLoss
from reference import family, float64

SHAPE = (37, 300)
FORMS: dict[str, Any] = {"dense": lambda y: y, "packed": PackedLabels.from_dense, "sparse": SparseLabels.from_dense}


def sigmoid(x: Any) -> Any:
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, small) / (1 + small)


def truth(
    x: Any,
    y: Any,
    numbers: tuple[float, float, float] = (4.0, 1.0, 0.05),
    *,
    keep: Any = True,
    weights: Any = 1.0,
    pos_weight: Any = 1.0,
    smoothing: float = 0.0,
) -> Statistics:
    """Sums over the classes, in float64: y between 0 and 1, `keep` what counts."""
    x = np.asarray(x, np.float64)
    y, keep = np.broadcast_to(np.asarray(y, np.float64), x.shape), np.broadcast_to(keep, x.shape)
    weights = np.broadcast_to(np.asarray(weights, np.float64), x.shape)
    gamma_neg, gamma_pos, clip = numbers
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
    sides = []
    share = y * (1 - smoothing) + smoothing / 2
    for label, factor in ((1.0, share * pos_weight), (0.0, 1 - share)):
        value = float64.asymmetric_loss(x, np.full(x.shape, label), axis=(), **options)
        slope = float64.gradient(x, np.full(x.shape, label), np.ones(x.shape), axis=(), **options)
        sides.append((factor * value * weights, np.abs(factor * slope * weights)))
    p = sigmoid(x)

    def total(part: Any) -> Any:
        return np.where(keep, part, 0).sum(-1)

    return Statistics(
        positives=total(y),
        negatives=total(1 - y),
        positive_probability=total(y * p),
        negative_probability=total((1 - y) * p),
        dropped_negatives=total((1 - y) * (p <= clip)) if clip else np.zeros(x.shape[:-1]),
        positive_loss=total(sides[0][0]),
        negative_loss=total(sides[1][0]),
        positive_gradient=total(sides[0][1]),
        negative_gradient=total(sides[1][1]),
    )


def assert_same(found: Statistics, expected: Statistics) -> None:
    # A side's sum may be a difference of all and the other side's.
    beside = 2e-7 * max(np.max(part) for part in vars(expected).values())
    for name, truth in vars(expected).items():
        ours = np.asarray(getattr(found, name))
        assert ours.shape == np.shape(truth), name
        np.testing.assert_allclose(ours, truth, rtol=1e-5, atol=2e-5 + beside, err_msg=name)


def with_gradient(loss: ElementwiseLoss, x: Any, y: Any, **options: Any) -> tuple[Any, Any, Any]:
    """Losses, statistics and the gradient of the losses' sum, jitted."""

    def total(x: Any) -> Any:
        losses, statistics = multilabel_loss(loss, x, y, statistics=True, **options)
        return jnp.sum(losses), (losses, statistics)

    (_, (losses, statistics)), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(x))
    return losses, statistics, gradient


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [SHAPE, (33, 1), (2, 3, 4500), (300, 17)])
def test_they_are_the_sums_of_the_elements_and_change_nothing_else(implementation, form, shape):
    x, y = logits_of(shape), labels_of(shape)
    losses, statistics, gradient = with_gradient(AsymmetricLoss(), x, FORMS[form](y), implementation=implementation)
    assert_same(statistics, truth(x, y))

    def total(x: Any) -> Any:
        return jnp.sum(multilabel_loss(AsymmetricLoss(), x, FORMS[form](y), implementation=implementation))

    np.testing.assert_allclose(jnp.sum(losses), total(jnp.asarray(x)), rtol=1e-6)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(total))(jnp.asarray(x)), rtol=1e-5, atol=1e-6)
    alone, same = multilabel_loss(AsymmetricLoss(), x, FORMS[form](y), implementation=implementation, statistics=True)
    np.testing.assert_allclose(alone, losses, rtol=1e-5, atol=1e-6)
    assert_same(same, truth(x, y))


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("case", ["where", "weights", "pos_weight", "smoothing", "soft", "ignore", "traced", "float16"])
def test_masks_weights_and_soft_labels(implementation, case):
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    random = np.random.default_rng(0)
    keep = random.random(SHAPE) < 0.8
    weights = random.random(SHAPE[1]).astype(np.float32)
    options: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    loss = AsymmetricLoss()
    if case == "where":
        x = np.where(keep, x, np.nan)
        options, expected = {"where": keep}, {"keep": keep}
    elif case == "ignore":
        y = np.where(keep, y, -1).astype(np.int8)
        options, expected = {"ignore_label": -1}, {"keep": keep}
    elif case in ("weights", "pos_weight"):
        options = expected = {case: weights}
    elif case == "smoothing":
        options, expected = {"label_smoothing": 0.2}, {"smoothing": 0.2}
    elif case == "soft":
        y = random.random(SHAPE).astype(np.float32)
    elif case == "traced":
        loss = jax.tree.map(jnp.float32, AsymmetricLoss(*map(np.float32, (2.5, 0.5, 0.1))))
        expected = {"numbers": (2.5, 0.5, float(np.float32(0.1)))}
    elif implementation == "mosaic_tpu":
        pytest.skip("it loads no float16")
    else:
        x = x.astype(np.float16)
    _, statistics, _ = with_gradient(loss, x, y, implementation=implementation, **options)
    labels = np.where(y == 1, 1, 0) if case == "ignore" else y
    assert_same(statistics, truth(np.where(keep, x, 0) if case == "where" else x, labels, **expected))


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("loss", [BinaryCrossEntropy(), FocalLoss(2.0, 0.25), HillLoss(), SelectiveLoss(clip=0.05)])
def test_any_loss_has_them(implementation, loss):
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    sides = {
        "BinaryCrossEntropy": family.binary_cross_entropy,
        "FocalLoss": lambda x, positive: family.focal(x, positive, gamma=2.0, alpha=0.25),
        "HillLoss": family.hill,
    }
    _, statistics, _ = with_gradient(loss, x, y, implementation=implementation)
    expected = truth(x, y)
    side = sides.get(type(loss).__name__)
    if side is None:
        annotated = np.random.default_rng(0).random(SHAPE) < 0.5
        labels = PartialLabels.from_dense(np.where(annotated, y, -1).astype(np.int8))
        dense = np.where(annotated, y, -1).astype(np.int8)
        for form in (labels, dense):
            if implementation == "mosaic_tpu" and form is labels:
                continue
            _, statistics, _ = with_gradient(loss, x, form, implementation=implementation)
            counted = truth(x, y, keep=annotated)
            for name in ("positives", "negatives", "positive_probability", "negative_probability", "dropped_negatives"):
                np.testing.assert_allclose(getattr(statistics, name), getattr(counted, name), rtol=1e-5, atol=2e-5)
        return
    of_sides = [side(x.astype(np.float64), positive) for positive in (True, False)]
    for (value, slope), name, mask in zip(of_sides, ("positive", "negative"), (y == 1, y == 0), strict=True):
        losses, slopes = (np.where(mask, part, 0).sum(-1) for part in (value, np.abs(slope)))
        expected = dataclasses.replace(expected, **{f"{name}_loss": losses, f"{name}_gradient": slopes})
    assert_same(statistics, dataclasses.replace(expected, dropped_negatives=np.zeros(SHAPE[0])))


@pytest.mark.mostly_long(short=2)
def test_a_nan_logit_is_one_in_its_own_row_alone(implementation):
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    x[3, 7] = np.nan
    _, statistics, _ = with_gradient(AsymmetricLoss(), x, y, implementation=implementation)
    of_negatives = np.isnan(statistics.negative_probability) | np.isnan(statistics.positive_probability)
    np.testing.assert_array_equal(of_negatives, np.arange(SHAPE[0]) == 3)
    np.testing.assert_allclose(statistics.positives, y.sum(-1))


@pytest.mark.parametrize("axis", [-1, None, (0, 2), (1, 2)])
def test_they_are_summed_over_the_axes_of_the_loss(axis):
    shape = (4, 5, 30)
    x, y = logits_of(shape), labels_of(shape)
    losses, statistics = multilabel_loss(AsymmetricLoss(), x, y, axis=axis, statistics=True)
    of_rows = truth(x, y)
    others = {-1: (), None: (0, 1), (0, 2): (0,), (1, 2): (1,)}[axis]
    assert_same(statistics, jax.tree.map(lambda part: np.sum(part, axis=others), of_rows))
    assert all(part.shape == losses.shape for part in jax.tree.leaves(statistics))


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("axis", [-1, None])
@pytest.mark.parametrize("form", FORMS)
def test_the_head_has_them_without_logits(implementation, form, axis):
    random = np.random.default_rng(0)
    features, kernel = (random.normal(size=s).astype(np.float32) for s in ((9, 7), (7, 300)))
    y = labels_of((9, 300))
    expected = truth(features.astype(np.float64) @ kernel, y)
    if axis is None:
        expected = jax.tree.map(np.sum, expected)

    def total(features: Any, kernel: Any) -> Any:
        losses, statistics = linear_multilabel_loss(
            AsymmetricLoss(),
            features,
            kernel,
            FORMS[form](y),
            axis=axis,
            chunk_size=128,
            statistics=True,
            implementation=implementation,
        )
        return jnp.sum(losses), statistics

    run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))
    (value, statistics), _ = run(features, kernel)
    assert_same(statistics, expected)
    np.testing.assert_allclose(value, np.sum(expected.positive_loss + expected.negative_loss), rtol=1e-5)
    assert_same(total(features, kernel)[1], expected)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("spec", [P("data"), P(None, "model"), P("data", "model")], ids=str)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=lambda kind: kind.name)
@pytest.mark.parametrize("form", ["dense", "sparse"])
def test_a_mesh_adds_them_up(kind, spec, form):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind), devices=jax.devices()[:8])
    x, y = logits_of((8, 96)), labels_of((8, 96))
    with jax.set_mesh(mesh), interpreted("triton"):
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        options = {"logits_spec": spec} if kind == AxisType.Auto else {}
        _, statistics, _ = with_gradient(AsymmetricLoss(), placed, FORMS[form](y), implementation="triton", **options)
    assert_same(statistics, truth(x, y))


def test_on_a_mesh_they_move_with_the_losses():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:8])
    x = jax.device_put(logits_of((8, 96)), NamedSharding(mesh, P("data", "model")))
    y = jax.device_put(labels_of((8, 96)), NamedSharding(mesh, P("data", "model")))
    with jax.set_mesh(mesh):
        step = jax.jit(lambda x, y: multilabel_loss(AsymmetricLoss(), x, y, axis=None, statistics=True))
        text = step.lower(x, y).compile().as_text()
    assert len(re.findall(r"= \(?\S+.* all-reduce(?:-start)?\(", text)) <= 2
    assert "all-gather" not in text


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("total", [False, True])
def test_the_heads_mesh_adds_them_up(total):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2, devices=jax.devices()[:8])
    random = np.random.default_rng(0)
    features, kernel = (random.normal(size=s).astype(np.float32) for s in ((8, 6), (6, 96)))
    y = labels_of((8, 96))
    with jax.set_mesh(mesh):
        f = jax.device_put(features, NamedSharding(mesh, P("data")))
        w = jax.device_put(kernel, NamedSharding(mesh, P(None, "model")))
        _, statistics = jax.jit(
            lambda f, w: linear_multilabel_loss(
                AsymmetricLoss(), f, w, y, axis=None if total else -1, statistics=True, chunk_size=20
            )
        )(f, w)
    expected = truth(features.astype(np.float64) @ kernel, y)
    assert_same(statistics, jax.tree.map(np.sum, expected) if total else expected)


@pytest.mark.mostly_long(short=2)
def test_under_vmap_and_scan(implementation):
    x, y = logits_of((3, 5, 200)), labels_of((3, 5, 200))

    def one(x: Any, y: Any) -> Any:
        return multilabel_loss(AsymmetricLoss(), x, y, statistics=True, implementation=implementation)

    assert_same(jax.jit(jax.vmap(one))(x, y)[1], truth(x, y))
    assert_same(jax.lax.scan(lambda carry, batch: (carry, one(*batch)), 0, (x, y))[1][1], truth(x, y))
    by_example = jax.jit(jax.vmap(jax.vmap(one)))(x, y)[1]
    assert_same(by_example, truth(x, y))


def test_they_add_up_and_tell_shares():
    x, y = logits_of((6, 40)), labels_of((6, 40))
    _, whole = multilabel_loss(AsymmetricLoss(), x, y, statistics=True)
    parts = [multilabel_loss(AsymmetricLoss(), x[i : i + 3], y[i : i + 3], statistics=True)[1] for i in (0, 3)]
    summed = parts[0].total() + parts[1].total()
    assert_same(summed, jax.tree.map(np.asarray, whole.total()))
    p = sigmoid(x.astype(np.float64))
    np.testing.assert_allclose(summed.mean_positive_probability, p[y == 1].mean(), rtol=1e-5)
    np.testing.assert_allclose(summed.mean_negative_probability, p[y == 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(summed.probability_gap, p[y == 1].mean() - (1 - p[y == 0]).mean(), rtol=1e-5)
    np.testing.assert_allclose(summed.dropped_share, (p[y == 0] <= 0.05).mean(), rtol=1e-5)
    of = truth(x, y)
    np.testing.assert_allclose(
        summed.positive_loss_share, of.positive_loss.sum() / (of.positive_loss + of.negative_loss).sum(), rtol=1e-5
    )
    np.testing.assert_allclose(
        summed.positive_gradient_share,
        of.positive_gradient.sum() / (of.positive_gradient + of.negative_gradient).sum(),
        rtol=1e-5,
    )
    with pytest.raises(TypeError):
        summed + 1


def test_without_them_the_program_is_the_same_to_the_letter():
    x, y = jnp.zeros((8, 300)), jnp.zeros((8, 300), jnp.int8)

    def text(**options: Any) -> str:
        step = jax.jit(jax.value_and_grad(lambda x: jnp.sum(multilabel_loss(AsymmetricLoss(), x, y, **options))))
        return step.lower(x).as_text()

    assert text() == text(statistics=False)

    @jax.jit
    def drops(x: Any) -> Any:
        return multilabel_loss(AsymmetricLoss(), x, y, statistics=True)[0]

    @jax.jit
    def never(x: Any) -> Any:
        return multilabel_loss(AsymmetricLoss(), x, y)

    assert len(drops.lower(x).compile().as_text()) <= 1.02 * len(never.lower(x).compile().as_text())


def test_they_have_no_derivative():
    x, y = jnp.asarray(logits_of((5, 30))), labels_of((5, 30))

    def gap(x: Any) -> Any:
        return multilabel_loss(AsymmetricLoss(), x, y, statistics=True)[1].total().probability_gap

    np.testing.assert_array_equal(jax.grad(gap)(x), 0)
    hessian = jax.hessian(lambda x: multilabel_loss(AsymmetricLoss(), x, y[0], statistics=True)[0])(x[0])
    expected = jax.hessian(lambda x: multilabel_loss(AsymmetricLoss(), x, y[0]))(x[0])
    np.testing.assert_allclose(hessian, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"axis": ()}, ValueError, "statistics are sums over the classes, and axis=() leaves them in"),
        ({"axis": 0}, ValueError, "statistics are sums over the classes, and axis=0 leaves them in"),
        ({"statistics": 1}, TypeError, "statistics=1; expected True or False"),
        ({"implementation": "mosaic_gpu"}, NotImplementedError, "mosaic_gpu"),
    ],
)
def test_what_has_none_is_named(options, error, says):
    with pytest.raises(error, match=re.escape(says)):
        multilabel_loss(AsymmetricLoss(), np.zeros((4, 300)), np.zeros((4, 300)), **({"statistics": True} | options))
