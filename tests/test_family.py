"""Every loss of the family against float64, in every kernel, label form and in the head."""

from __future__ import annotations

import dataclasses
import doctest
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_no_worse, cotangent_of, interpreted, labels_of, logits_of

from asl_pallas import (
    PackedLabels,
    PartialLabels,
    SparseLabels,
    api,
    asymmetric_loss,
    linear_multilabel_loss,
    multilabel_loss,
    sigmoid_asymmetric_loss,
)
from asl_pallas.kernels.versions import lacks_mosaic_gpu
from asl_pallas.losses import (
    AsymmetricLoss,
    AsymmetricPolynomialLoss,
    BinaryCrossEntropy,
    ElementwiseLoss,
    FocalLoss,
    HillLoss,
    SelectiveLoss,
    SelfPacedLoss,
    VarifocalLoss,
)
from reference import family

SHAPE = (9, 150)
Side = Callable[..., tuple[Any, Any]]
# The object, and its sides in `reference.family`, which take the object's fields.
LOSSES: dict[str, tuple[ElementwiseLoss, Side]] = {
    "cross-entropy": (BinaryCrossEntropy(), family.binary_cross_entropy),
    "focal": (FocalLoss(), family.focal),
    "focal-alpha": (FocalLoss(gamma=1.0, alpha=0.25), family.focal),
    "focal-fraction": (FocalLoss(gamma=0.5, alpha=0.75), family.focal),
    "hill": (HillLoss(), family.hill),
    "hill-other": (HillLoss(lamb=0.8, margin=0.5, gamma=1.5), family.hill),
    "self-paced": (SelfPacedLoss(), family.self_paced),
    "self-paced-other": (SelfPacedLoss(threshold=0.2, margin=0.0, gamma=1.0), family.self_paced),
    "polynomial": (AsymmetricPolynomialLoss(), family.asymmetric_polynomial),
    "polynomial-focused": (
        AsymmetricPolynomialLoss(gamma_neg=2.0, gamma_pos=1.0, epsilon_neg=-0.5, stop_focus_gradient=False),
        family.asymmetric_polynomial,
    ),
    "polynomial-fraction": (
        AsymmetricPolynomialLoss(gamma_neg=1.5, gamma_pos=0.5, clip=0.0, stop_focus_gradient=False),
        family.asymmetric_polynomial,
    ),
}
IMPLEMENTATIONS = (None, "xla", "mosaic_tpu", "triton", "mosaic_gpu")
FORMS: dict[str, Any] = {"packed": PackedLabels.from_dense, "sparse": SparseLabels.from_dense}


def settings_of(loss: ElementwiseLoss) -> dict[str, Any]:
    return {field.name: getattr(loss, field.name) for field in dataclasses.fields(loss)}


def pair_of(name: str, x: Any, y: Any, weights: Any, pos_weight: Any, double: bool) -> tuple[Any, Any]:
    """Value and slope of each element, in NumPy's float64 or in jnp's float32."""
    loss, side = LOSSES[name]
    xp, dtype = (np, np.float64) if double else (jnp, np.float32)
    x, y = np.asarray(x).astype(dtype), np.asarray(y).astype(dtype)
    with np.errstate(all="ignore"):
        sides = {positive: side(xp.asarray(x), positive, xp, **settings_of(loss)) for positive in (True, False)}
        missing = np.zeros(x.shape, bool)
        if isinstance(loss, SelfPacedLoss):
            missing = x > np.log(loss.threshold / (1 - loss.threshold))
        yes, no = (np.asarray(pos_weight, dtype), np.where(missing, np.asarray(pos_weight, dtype), dtype(1)))
        mixed = []
        for of_positive, of_negative in zip(sides[True], sides[False], strict=True):
            of_positive, of_negative = np.asarray(of_positive) * yes, np.asarray(of_negative) * no
            part = np.where(y > 0, y * of_positive, 0) + np.where(y < 1, (1 - y) * of_negative, 0)
            mixed.append(part.astype(dtype) * np.asarray(weights, dtype))
    return mixed[0], mixed[1]


def inputs(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> tuple[Any, Any, Any]:
    x = logits_of(shape, seed)
    # Where a loss jumps, float32 and float64 may be on different sides.
    for jump in (0.6, 0.2, 0.05):
        x = np.where(abs(x - np.log(jump / (1 - jump))) < 1e-4, x + np.float32(1e-3), x)
    return x, labels_of(shape, seed + 1), cotangent_of(shape[:-1], seed + 2)


def assert_near(name: str, found: Any, x: Any, y: Any, ct: Any, weights: Any = 1.0, pos_weight: Any = 1.0) -> None:
    truth, careful = (pair_of(name, x, y, weights, pos_weight, double) for double in (True, False))
    value, slope = map(np.asarray, found)
    assert_no_worse(value, truth[0].sum(-1), np.asarray(jnp.sum(careful[0], -1)), "loss")
    outer = np.asarray(ct)[..., None]
    assert_no_worse(slope, truth[1] * outer, careful[1] * np.float32(outer), "gradient")


def value_and_slope(loss: Any, x: Any, y: Any, ct: Any, implementation: str | None, **options: Any) -> Any:
    def run(x: Any, y: Any, ct: Any, options: Any) -> Any:
        value, pull = jax.vjp(lambda x: multilabel_loss(loss, x, y, implementation=implementation, **options), x)
        return value, pull(ct)[0]

    with interpreted(implementation):
        return jax.jit(run)(jnp.asarray(x), y, jnp.asarray(ct), options)


@pytest.mark.mostly_long(short=11)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_matches_float64(name, implementation):
    if implementation == "mosaic_gpu" and (reason := lacks_mosaic_gpu()):
        pytest.skip(reason)
    x, y, ct = inputs()
    random = np.random.default_rng(3)
    weights = random.random((SHAPE[0], 1)).astype(np.float32)
    pos_weight = random.uniform(0.5, 3, SHAPE[1]).astype(np.float32)
    if implementation != "xla":  # whose sums are of elements in either case
        found = value_and_slope(LOSSES[name][0], x, y, ct, implementation)
        assert_near(name, found, x, y, ct)
    found = value_and_slope(LOSSES[name][0], x, y, ct, implementation, weights=weights, pos_weight=pos_weight)
    assert_near(name, found, x, y, ct, weights, pos_weight)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("name", LOSSES)
def test_packed_and_sparse_labels_give_the_numbers_of_dense_ones(name):
    x, y, ct = inputs()
    dense = value_and_slope(LOSSES[name][0], x, y, ct, None)
    for form in FORMS.values():
        for ours, theirs in zip(value_and_slope(LOSSES[name][0], x, form(y), ct, None), dense, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize("name", LOSSES)
def test_soft_labels_mix_the_two_sides(name):
    x, _, ct = inputs()
    y = labels_of(SHAPE, 4, "float32")
    pos_weight = np.random.default_rng(3).uniform(0.5, 3, SHAPE[1]).astype(np.float32)
    found = value_and_slope(LOSSES[name][0], x, y, ct, None, pos_weight=pos_weight)
    assert_near(name, found, x, y, ct, 1.0, pos_weight)


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize("name", LOSSES)
def test_the_head_gives_the_loss_of_its_logits(name):
    loss = LOSSES[name][0]
    random = np.random.default_rng(0)
    features, kernel = (random.normal(0, s, n).astype(np.float32) for s, n in ((1, (6, 8)), (0.7, (8, 150))))
    y = labels_of((6, 150), 5)

    def head(features: Any, kernel: Any) -> Any:
        return linear_multilabel_loss(loss, features, kernel, y, axis=None, chunk_size=64)

    def unfused(features: Any, kernel: Any) -> Any:
        return multilabel_loss(loss, jnp.dot(features, kernel), y, axis=None)

    (ours, slopes), (theirs, expected) = (jax.value_and_grad(f, (0, 1))(features, kernel) for f in (head, unfused))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for slope, wanted in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(slope, wanted, rtol=1e-4, atol=1e-4)


PER_CLASS: dict[str, dict[str, tuple[float, float]]] = {
    "focal-alpha": {"gamma": (0.5, 3.0), "alpha": (0.1, 0.9)},
    "hill": {"gamma": (1.0, 3.0), "margin": (0.0, 1.0), "lamb": (1.0, 2.0)},
    "self-paced": {"gamma": (1.0, 3.0), "threshold": (0.4, 0.9)},
    "polynomial-focused": {"gamma_neg": (1.0, 4.0), "epsilon_pos": (0.0, 1.0)},
}


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", PER_CLASS)
def test_a_hyperparameter_may_have_a_value_per_class(name, implementation):
    """Each class of the loss with vectors is that class of a loss with numbers."""
    if implementation == "mosaic_gpu" and (reason := lacks_mosaic_gpu()):
        pytest.skip(reason)
    x, y, ct = inputs()
    random = np.random.default_rng(6)
    choices = {key: np.float32([low, high]) for key, (low, high) in PER_CLASS[name].items()}
    which = random.integers(0, 2, SHAPE[1])
    loss = dataclasses.replace(LOSSES[name][0], **{key: both[which] for key, both in choices.items()})
    value, slope = value_and_slope(loss, x, y, ct, implementation)
    expected_value, expected_slope = 0.0, np.zeros(SHAPE)
    for k in range(2):
        of_numbers = dataclasses.replace(LOSSES[name][0], **{key: float(both[k]) for key, both in choices.items()})
        part, of_part = value_and_slope(of_numbers, x, y, ct, "xla", where=jnp.asarray(which == k))
        expected_value, expected_slope = expected_value + part, expected_slope + of_part
    np.testing.assert_allclose(value, expected_value, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [-1, None])
def test_the_head_takes_a_value_per_class_chunk_by_chunk(axis):
    random = np.random.default_rng(0)
    features, kernel = (random.normal(0, s, n).astype(np.float32) for s, n in ((1, (6, 8)), (0.7, (8, 150))))
    y, gamma = labels_of((6, 150), 5), random.uniform(0, 4, 150).astype(np.float32)

    def head(features: Any, kernel: Any) -> Any:
        loss = FocalLoss(gamma, jnp.linspace(0.1, 0.9, 150))
        return linear_multilabel_loss(loss, features, kernel, y, axis=axis, chunk_size=64).sum()

    def unfused(features: Any, kernel: Any) -> Any:
        loss = FocalLoss(gamma, jnp.linspace(0.1, 0.9, 150))
        return multilabel_loss(loss, jnp.dot(features, kernel), y, axis=axis).sum()

    (ours, slopes), (theirs, expected) = (jax.value_and_grad(f, (0, 1))(features, kernel) for f in (head, unfused))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for slope, wanted in zip(slopes, expected, strict=True):
        np.testing.assert_allclose(slope, wanted, rtol=1e-4, atol=1e-4)


def test_a_loss_is_a_pytree_of_its_arrays_and_passes_through_jit_scan_and_map():
    loss = FocalLoss(jnp.float32(2.0), 0.25)
    leaves, structure = jax.tree.flatten(loss)
    assert [float(leaf) for leaf in leaves] == [2.0]
    assert structure == jax.tree.structure(FocalLoss(jnp.float32(1.0), 0.25))
    assert structure != jax.tree.structure(FocalLoss(jnp.float32(1.0), 0.5))
    assert jax.tree.map(lambda leaf: leaf + 1, loss).gamma == 3.0
    x, y, _ = inputs()
    expected = multilabel_loss(FocalLoss(2.0, 0.25), x, y)
    np.testing.assert_allclose(jax.jit(multilabel_loss)(loss, x, y), expected, rtol=1e-5)

    def step(loss: FocalLoss, _: Any) -> tuple[FocalLoss, Any]:
        return jax.tree.map(lambda gamma: gamma + 1, loss), multilabel_loss(loss, x, y).sum()

    _, totals = jax.lax.scan(step, FocalLoss(jnp.float32(1.0), 0.25), length=2)
    np.testing.assert_allclose(totals[1], expected.sum(), rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Squared(ElementwiseLoss):
    """One of a user's own: the squared distance of the logit from +-margin."""

    margin: Any = 1.0

    def value(self, logit: Any, label: Any, ops: Any = None) -> Any:
        return jnp.square(logit - label.select(self.margin, 0.0 - self.margin))


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_loss_of_ones_own_is_a_class_with_a_value(implementation):
    if implementation == "mosaic_gpu" and (reason := lacks_mosaic_gpu()):
        pytest.skip(reason)
    x, y, ct = inputs()
    x = np.clip(x, -30, 30)
    margin = np.linspace(0.5, 2, SHAPE[1], dtype=np.float32)
    for loss, m in ((Squared(), 1.0), (Squared(jnp.float32(0.5)), 0.5), (Squared(margin), margin)):
        value, slope = value_and_slope(loss, x, y, ct, implementation)
        off = x - np.where(y > 0, m, -m)
        np.testing.assert_allclose(value, np.square(off).sum(-1), rtol=1e-5)
        np.testing.assert_allclose(slope, 2 * off * ct[:, None], rtol=1e-5, atol=1e-5)
    features, kernel = np.float32(np.random.default_rng(0).normal(size=(9, 4))), np.float32(np.eye(4, 150))
    head = linear_multilabel_loss(Squared(margin), features, kernel, y, chunk_size=64, precision="highest")
    expected = np.square(features @ kernel - np.where(y > 0, margin, -margin)).sum(-1)
    np.testing.assert_allclose(head, expected, rtol=1e-5)


VARIFOCAL = [VarifocalLoss(), VarifocalLoss(alpha=0.25, gamma=0.5)]


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["int8", "float32"])
@pytest.mark.parametrize("loss", VARIFOCAL)
def test_varifocal_takes_a_soft_label_for_a_quality(loss, dtype, implementation):
    if implementation == "mosaic_gpu" and (reason := lacks_mosaic_gpu()):
        pytest.skip(reason)
    x, _, ct = inputs()
    y = labels_of(SHAPE, 4, dtype)
    pos_weight = np.random.default_rng(3).uniform(0.5, 3, SHAPE[1]).astype(np.float32)
    found = value_and_slope(loss, x, y, ct, implementation, pos_weight=pos_weight)
    pairs = []
    for xp, kind in ((np, np.float64), (jnp, np.float32)):
        with np.errstate(all="ignore"):
            both = family.varifocal(xp.asarray(x, kind), xp.asarray(y, kind), xp, **settings_of(loss))
        pairs.append([np.asarray(part) * np.where(y > 0, pos_weight, 1).astype(kind) for part in both])
    (true_value, true_slope), (value, slope) = pairs
    assert_no_worse(np.asarray(found[0]), true_value.sum(-1), np.asarray(jnp.sum(value, -1)), "loss")
    assert_no_worse(np.asarray(found[1]), true_slope * ct[:, None], slope * ct[:, None], "gradient")


SELECTIVE = [
    SelectiveLoss(),
    SelectiveLoss(gamma_pos=1.0, gamma_neg=2.0, gamma_unann=4.0, clip=0.05, alpha_unann=0.5, stop_focus_gradient=False),
    SelectiveLoss(gamma_pos=0.5, gamma_unann=2.5, likelihood_threshold=0.8),
    SelectiveLoss(alpha_unann=0.0, unannotated_label=7),
]


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("loss", "by_prior"), [(loss, n % 2 == 0) for n, loss in enumerate(SELECTIVE)])
def test_a_third_state_has_a_loss_of_its_own(loss, by_prior, implementation):
    if implementation == "mosaic_gpu" and (reason := lacks_mosaic_gpu()):
        pytest.skip(reason)
    x, y, ct = inputs()
    states = np.where(np.random.default_rng(8).random(SHAPE) < 0.4, -1, y)
    settings = settings_of(loss)
    third = settings.pop("unannotated_label")
    settings["prior"] = np.random.default_rng(9).uniform(0, 0.1, SHAPE[1]).astype(np.float32) if by_prior else None
    labels = np.where(states == -1, third, states).astype(np.int8)
    x = np.where(abs(x - np.log(0.8 / 0.2)) < 1e-4, np.float32(2), x)
    loss = dataclasses.replace(loss, prior=settings["prior"])
    found = value_and_slope(loss, x, labels, ct, implementation)
    pairs = []
    for xp, kind in ((np, np.float64), (jnp, np.float32)):
        with np.errstate(all="ignore"):
            sides = [family.selective(xp.asarray(x, kind), state, xp, **settings) for state in (-1, 0, 1)]
        pairs.append([np.choose(states + 1, [np.asarray(side[k]) for side in sides]) for k in range(2)])
    (true_value, true_slope), (value, slope) = pairs
    assert_no_worse(np.asarray(found[0]), true_value.sum(-1), np.asarray(jnp.sum(value, -1)), "loss")
    assert_no_worse(np.asarray(found[1]), true_slope * ct[:, None], slope * ct[:, None], "gradient")


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("gamma", [2.0, 1.5])
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("name", ["polynomial", "selective"])
def test_a_focus_that_counts_as_a_constant_is_one_in_second_derivatives_too(name, stop, gamma):
    """What has the asymmetric loss for a special case has its second derivatives."""
    x, y, _ = inputs()
    sides = {"gamma_neg": gamma, "gamma_pos": 1.0, "clip": 0.05, "stop_focus_gradient": stop}
    loss: ElementwiseLoss = SelectiveLoss(**sides)
    if name == "polynomial":
        loss = AsymmetricPolynomialLoss(**sides, epsilon_pos=0.0, epsilon_pos_2=0.0)

    def curvature(loss: ElementwiseLoss) -> Any:
        slope = jax.grad(lambda x: multilabel_loss(loss, x, y, axis=None))
        return jax.jvp(slope, (jnp.asarray(x),), (jnp.ones_like(x),))[1]

    expected = curvature(AsymmetricLoss(**sides))
    assert abs(expected).max() > 0.1
    np.testing.assert_allclose(curvature(loss), expected, rtol=1e-4, atol=1e-6)


def test_numbers_of_sides_are_float64_beside_float64_logits():
    x, y, _ = inputs()
    with jax.enable_x64(True):
        found = multilabel_loss(FocalLoss(2.0, 0.1), jnp.asarray(x, jnp.float64), y, axis=())
        sides = [
            family.focal(np.asarray(x, np.float64), positive, gamma=2.0, alpha=0.1)[0] for positive in (True, False)
        ]
        np.testing.assert_allclose(found, np.where(y > 0, *sides), rtol=1e-12, atol=1e-15)


EDGES: dict[str, tuple[Any, Any, float, int, float]] = {
    # Of numbers and of arrays that hold them: a loss whose number matters at a logit with a label, and its value there.
    "0^0": (AsymmetricPolynomialLoss, {"gamma_neg": 0.0, "epsilon_neg": -0.5, "clip": 0.05}, -9.0, 0, 0.5),
    "no margin": (AsymmetricPolynomialLoss, {"clip": 0.0, "gamma_neg": 1.0}, 200.0, 0, 200.0),
    "no margin of three states": (SelectiveLoss, {"clip": 0.0}, 200.0, 0, 200.0),
    "no weight of positives": (FocalLoss, {"gamma": 0.0, "alpha": 0.0}, -np.inf, 1, 0.0),
    "no weight of negatives": (FocalLoss, {"gamma": 2.0, "alpha": 1.0}, np.inf, 0, 0.0),
    "no weight of varifocal negatives": (VarifocalLoss, {"alpha": 0.0}, np.inf, 0, 0.0),
    "no weight of three states": (SelectiveLoss, {"alpha_neg": 0.0}, np.inf, 0, 0.0),
    "every probability is above 0": (SelfPacedLoss, {"threshold": 0.0}, -200.0, 0, 200.0),
    "but that of -inf": (SelfPacedLoss, {"threshold": 0.0}, -np.inf, 0, 0.0),
}


@pytest.mark.mostly_long(short=9)
@pytest.mark.parametrize("as_array", [float, jnp.float32, lambda number: np.full(3, number, np.float32)])
@pytest.mark.parametrize("name", EDGES)
def test_a_number_at_its_bound_means_the_same_in_an_array(name, as_array):
    make, numbers, logit, label, expected = EDGES[name]
    loss = make(**{key: as_array(number) for key, number in numbers.items()})
    x, y = jnp.full((2, 3), logit, jnp.float32), jnp.full((2, 3), label, jnp.int8)
    value, slope = jax.value_and_grad(lambda x: multilabel_loss(loss, x, y, axis=()).mean())(x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.isfinite(slope).all()


def test_beside_the_margin_a_slope_is_that_of_one_probability():
    """A quotient of m^gamma and m had two of them on a CPU that multiplies and adds at once."""
    x, y, clip = np.float32([[-2.9434085]]), np.int8([[0]]), 0.050048828125
    settings: dict[str, Any] = {"gamma_neg": 1.0, "clip": clip, "epsilon_neg": -0.5, "stop_focus_gradient": False}
    truth = family.asymmetric_polynomial(x.astype(np.float64), False, **settings)[1]
    for gamma in (1.0, jnp.float32(1)):
        loss = AsymmetricPolynomialLoss(**settings | {"gamma_neg": gamma})
        slope = jax.grad(lambda x, loss=loss: multilabel_loss(loss, x, y, axis=None))(x)
        np.testing.assert_allclose(slope, truth, rtol=2e-4)


def test_labels_beyond_a_losss_states_are_named():
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="labels hold -1; expected 0 or 1"):
        multilabel_loss(HillLoss(), x, np.full((2, 3), -1, np.int8))
    with pytest.raises(ValueError, match="labels hold 2; expected 0 or 1, or -1 for what is not annotated"):
        multilabel_loss(SelectiveLoss(), x, np.full((2, 3), 2, np.int8))
    with pytest.raises(ValueError, match="unannotated_label=-1, and labels have dtype uint8, which holds 0 to 255"):
        multilabel_loss(SelectiveLoss(), x, np.zeros((2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"unannotated_label=-1; expected an integer that is no other label.*ignore"):
        multilabel_loss(SelectiveLoss(), x, np.zeros((2, 3), np.int8), ignore_label=-1)
    ignored = multilabel_loss(SelectiveLoss(), x, np.int8([[1, 0, -1], [1, -2, -1]]), ignore_label=-2)
    assert ignored[1] < ignored[0]


BAD: list[tuple[Any, type[Exception], str]] = [
    (FocalLoss, TypeError, r"loss is the class FocalLoss; expected an object of it: FocalLoss\(\)"),
    ("focal", TypeError, "loss='focal'; expected a loss object"),
    (FocalLoss(gamma=-1.0), ValueError, "gamma=-1.0; expected gamma >= 0 and finite"),
    (FocalLoss(alpha=1.5), ValueError, "alpha=1.5; expected 0 <= alpha <= 1"),
    (FocalLoss(gamma=jnp.float32(-2.0)), ValueError, "gamma=-2.0; expected gamma >= 0"),
    (FocalLoss(gamma=np.float32([1, -1, 1])), ValueError, "gamma has the value -1.0; expected gamma >= 0"),
    (FocalLoss(gamma=np.ones(4)), ValueError, r"gamma has shape \(4,\); expected one that broadcasts to the logits'"),
    (FocalLoss(gamma="two"), TypeError, "gamma='two'; expected a real number"),
    (FocalLoss(gamma=None), TypeError, "gamma=None; expected a real number"),
    (FocalLoss(gamma=[1.0, 2.0, 3.0]), TypeError, "gamma=.* is a list; expected"),
    (HillLoss(margin=float("inf")), ValueError, "margin=inf; expected margin to be finite"),
    (VarifocalLoss(), ValueError, "label_smoothing=0.1; VarifocalLoss has none, expected 0"),
]


@pytest.mark.parametrize(("loss", "error", "says"), BAD)
def test_a_bad_loss_is_named_before_anything_is_compiled(loss, error, says):
    options = {"label_smoothing": 0.1} if isinstance(loss, VarifocalLoss) else {}
    x, y = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int8)
    with pytest.raises(error, match=says):
        multilabel_loss(loss, x, y, **options)
    with pytest.raises(error, match=says):
        linear_multilabel_loss(loss, x, np.zeros((3, 3)), y, **options)


def test_a_derivative_by_a_hyper_parameter_is_refused_by_name():
    x, y, _ = inputs()
    for loss in (FocalLoss(jnp.float32(2.0)), FocalLoss(jnp.full(SHAPE[1], 2.0))):
        with pytest.raises(TypeError, match="multilabel_loss has no derivative with respect to gamma; wrap the"):
            jax.grad(lambda loss: multilabel_loss(loss, x, y).sum())(loss)


def test_the_drop_in_is_the_elementwise_loss_in_optaxs_shape():
    x, y = logits_of((4, 6)), labels_of((4, 6), dtype="float32")
    np.testing.assert_array_equal(sigmoid_asymmetric_loss(x, y), asymmetric_loss(x, y, axis=()))
    found = sigmoid_asymmetric_loss(logits=x, labels=y, gamma_neg=2.0, gamma_pos=0.0, clip=0.0)
    np.testing.assert_array_equal(found, asymmetric_loss(x, y, gamma_neg=2.0, gamma_pos=0.0, clip=0.0, axis=()))


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:4])
@pytest.mark.parametrize("form", ["packed", "sparse"])
def test_partial_labels_are_dense_ones_with_three_states(form, implementation):
    x, y, ct = inputs()
    states = np.where(np.random.default_rng(8).random(SHAPE) < 0.6, -1, y).astype(np.int8)
    labels = PartialLabels.from_dense(states, form=form)
    np.testing.assert_array_equal(labels.to_dense(), states)
    loss = SelectiveLoss(gamma_unann=3.0, alpha_unann=0.5, likelihood_threshold=0.9)
    dense = value_and_slope(loss, x, states, ct, implementation)
    for ours, theirs in zip(value_and_slope(loss, x, labels, ct, implementation), dense, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["packed", "sparse"])
def test_the_head_and_a_mesh_take_partial_labels(form):
    random = np.random.default_rng(0)
    features, kernel = (random.normal(0, s, n).astype(np.float32) for s, n in ((1, (8, 8)), (0.7, (8, 8192))))
    states = random.integers(-1, 2, (8, 8192)).astype(np.int8)
    labels, loss = PartialLabels.from_dense(states, form=form), SelectiveLoss(alpha_unann=0.1)
    expected = jax.value_and_grad(lambda x: multilabel_loss(loss, x, states, axis=None))(jnp.dot(features, kernel))
    head = linear_multilabel_loss(loss, features, kernel, labels, axis=None, chunk_size=1000)
    np.testing.assert_allclose(head, expected[0], rtol=1e-5)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec("a", "b")
    with jax.set_mesh(mesh):
        step = jax.value_and_grad(lambda x, y: multilabel_loss(loss, x, y, axis=None, logits_spec=spec))
        found = jax.jit(step)(jnp.dot(features, kernel), labels)
        specs = {"features_spec": jax.sharding.PartitionSpec("a"), "kernel_spec": jax.sharding.PartitionSpec(None, "b")}
        on_mesh = jax.jit(lambda f, w, y: linear_multilabel_loss(loss, f, w, y, axis=None, **specs))
        np.testing.assert_allclose(on_mesh(features, kernel, labels), expected[0], rtol=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_is_wrong_with_partial_labels_is_named():
    y = np.int8([[1, 0, -1], [0, -1, -1]])
    packed, sparse = (PartialLabels.from_dense(y, form=form) for form in ("packed", "sparse"))
    with pytest.raises(TypeError, match="positives are PackedLabels and negatives SparseLabels; expected one form"):
        PartialLabels(packed.positives, sparse.negatives)
    with pytest.raises(ValueError, match=r"positives have shape \(2, 3\) and negatives \(1, 3\); expected one"):
        PartialLabels(sparse.positives, sparse.negatives[:1])
    with pytest.raises(ValueError, match="labels hold 2; expected 0, 1 or unannotated_label=-1"):
        PartialLabels.from_dense(np.int8([[2, 0]]))
    with pytest.raises(TypeError, match="HillLoss has no loss for what is not annotated; expected a loss with three"):
        multilabel_loss(HillLoss(), np.zeros((2, 3), np.float32), sparse)
    assert [part.shape for part in sparse] == [(3,), (3,)]
    assert jax.tree.structure(sparse) == jax.tree.structure(sparse[:1])


def test_a_weak_weight_for_what_is_not_annotated_is_one_line():
    """Perch-Hoplite's loss: cross-entropy, times a weight where nobody has looked."""
    x, y, _ = inputs()
    annotated = np.random.default_rng(8).random(SHAPE) < 0.3
    weak = multilabel_loss(SelectiveLoss(gamma_neg=0, gamma_unann=0, alpha_unann=0.05), x, np.where(annotated, y, -1))
    # A label that is there is annotated.
    weights = np.where(annotated, 1.0, 0.05).astype(np.float32)
    expected = multilabel_loss(BinaryCrossEntropy(), x, np.where(annotated, y, 0), weights=weights)
    np.testing.assert_allclose(weak, expected, rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Total(ElementwiseLoss):
    """A value that isn't the logit's shape."""

    def value(self, logit: Any, label: Any, ops: Any = None) -> Any:
        return jnp.sum(logit)


class Integer(Total):
    """A value that isn't the logit's dtype."""

    def value(self, logit: Any, label: Any, ops: Any = None) -> Any:
        return jnp.round(logit).astype(jnp.int32)

    def value_and_slope(self, logit: Any, label: Any, ops: Any = None) -> Any:
        return self.value(logit, label), logit


class OnlyOne(Total):
    """A pair that is none."""

    def value_and_slope(self, logit: Any, label: Any, ops: Any = None) -> Any:
        return logit


class Sorted(Total):
    """What no kernel does: a sort along the classes."""

    def value(self, logit: Any, label: Any, ops: Any = None) -> Any:
        return jnp.sort(logit, axis=-1)


def test_a_value_that_is_not_like_the_logit_is_named_before_anything_is_compiled():
    x, y = np.zeros((4, 5), np.float32), np.zeros((4, 5), np.int8)
    for loss, says in (
        (Total(), r"the value of Total is float32\[\] for logits of float32\[2, 3\]; expected their shape and dtype"),
        (Integer(), r"the value of Integer is int32\[2, 3\] for logits"),
        (OnlyOne(), r"value_and_slope of OnlyOne returns .*; expected a pair of arrays"),
    ):
        with pytest.raises(TypeError, match=says):
            multilabel_loss(loss, x, y)
        with pytest.raises(TypeError, match=says):
            linear_multilabel_loss(loss, x, np.zeros((5, 5), np.float32), y)


@pytest.mark.parametrize(("platform", "kernel"), [("tpu", "mosaic_tpu"), ("cuda", "triton")])
def test_what_pallas_cannot_lower_names_the_way_out(platform, kernel):
    shapes = (jax.ShapeDtypeStruct((64, 8192), dtype) for dtype in (jnp.float32, jnp.int8))
    traced = jax.jit(lambda x, y: multilabel_loss(Sorted(), x, y, implementation=kernel)).trace(*shapes)
    with pytest.raises(NotImplementedError, match=r"implementation='xla' computes any loss|nimplemented"):
        traced.lower(lowering_platforms=(platform,))
    x, y, _ = inputs()
    np.testing.assert_allclose(multilabel_loss(Sorted(), x, y, implementation="xla"), np.sum(x, -1), rtol=1e-3)


def test_the_examples_of_the_drop_in_run():
    found = doctest.testmod(api)
    assert found.attempted > 0 and found.failed == 0


@pytest.mark.parametrize("name", ["gamma", "gamma_neg", "clip", "alpha"])
def test_a_hyper_parameter_beside_the_object_is_told_where_it_goes(name):
    x, y = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.int8)
    wrong: dict[str, Any] = {name: 2.0}
    with pytest.raises(TypeError, match=f"multilabel_loss has no argument '{name}'; write it at the loss object"):
        multilabel_loss(FocalLoss(), x, y, **wrong)
