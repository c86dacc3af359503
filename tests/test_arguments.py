"""Every argument alone and in pairs against float64; what they may not be; what may be differentiated."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import KERNELS, assert_parity, cotangent_of, evaluate, labels_of, logits_of
from pairwise import pairwise

from asl_pallas import asymmetric_loss, kernels
from reference import float64

SHAPE = (6, 5, 33)

# The levels of every argument; the first of each is the default of the tests "alone".
LEVELS: dict[str, list[Any]] = {
    "hyper": ["paper", "fractional", "traced", "bce"],
    "axis": [-1, (), None],
    "where": [None, "full", "classes", "rows"],
    "weights": [None, "classes", "full", "rows", "scalar"],
    "pos_weight": [None, "scalar", "classes"],
    "labels": ["int8", "bool", "float32", "int8 with -1", "int32 with 7"],
    "label_smoothing": [0.0, 0.2],
    "stop_focus_gradient": [False, True],
    "donate_logits": [False, True],
    "logits": ["float32", "bfloat16"],
}
HYPER = {
    "paper": ((), {}),
    "fractional": ((), {"gamma_neg": 2.5, "gamma_pos": 0.5, "clip": 0.1}),
    "traced": (("gamma_neg", "gamma_pos", "clip"), {"gamma_neg": 3.0, "gamma_pos": 0.5, "clip": 0.1}),
    "bce": ((), {"gamma_neg": 0.0, "gamma_pos": 0.0, "clip": 0.0}),
}


# Every pair of levels of any two arguments but those of `alone`, where one is its default.
PAIRS = [dict(zip(LEVELS, row, strict=True)) for row in pairwise(*LEVELS.values(), but_first=True)]


def alone() -> list[dict[str, Any]]:
    plain = {name: levels[0] for name, levels in LEVELS.items()}
    return [{**plain, name: level} for name, levels in LEVELS.items() for level in levels[1:]]


def label_of_row(row: dict[str, Any]) -> str:
    changed = (f"{name}={level}" for name, level in row.items() if level != LEVELS[name][0])
    return ",".join(changed).replace(" ", "_") or "defaults"


def assert_row(row: dict[str, Any], implementation: str) -> None:
    random = np.random.default_rng(11)
    shapes = {"full": SHAPE, "classes": SHAPE[-1:], "rows": (*SHAPE[:-1], 1), "scalar": ()}
    traced, options = HYPER[row["hyper"]]
    options = {**options, "axis": row["axis"]}
    for name in ("label_smoothing", "stop_focus_gradient", "donate_logits"):
        if row[name]:
            options[name] = row[name]
    for name in ("weights", "pos_weight"):
        if row[name]:
            options[name] = np.asarray(random.uniform(0, 1.5, shapes[row[name]]), np.float32)
    dtype, _, ignore_label = row["labels"].partition(" with ")
    if ignore_label:
        options["ignore_label"] = int(ignore_label)
    x = logits_of(SHAPE, dtype=row["logits"])
    y = labels_of(SHAPE, dtype=dtype, ignore_label=options.get("ignore_label"))
    if ignore_label:
        x = np.where(y == int(ignore_label), np.float32(np.nan), x).astype(x.dtype)
    if row["where"]:
        options["where"] = random.random(shapes[row["where"]]) < 0.8
        x = np.where(options["where"], x, np.float32(np.nan)).astype(x.dtype)
    _, slope = assert_parity(x, y, implementation=implementation, traced=traced, **options)
    out = np.broadcast_to(options.get("where", True), SHAPE) == 0
    if ignore_label:
        out = out | (y == int(ignore_label))
    assert not slope[out].astype(np.float32).any()


@pytest.mark.mostly_long(short=6)
@pytest.mark.parametrize("row", alone(), ids=label_of_row)
def test_every_argument_alone_matches_float64(implementation, row):
    assert_row(row, implementation)


@pytest.mark.long
@pytest.mark.parametrize("row", PAIRS, ids=label_of_row)
def test_every_pair_of_arguments_matches_float64(implementation, row):
    assert_row(row, implementation)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("axis", [0, 1, 2, -3, (0, 1), (0, 2), (-1, 1), (1, 2), (0, 1, 2), [0, 2]])
def test_every_axis_means_what_it_means_in_a_sum(axis):
    axis_of_truth = tuple(axis) if isinstance(axis, list) else axis
    x, y, w = (
        logits_of(SHAPE),
        labels_of(SHAPE),
        np.random.default_rng(0).uniform(0, 1, SHAPE).astype(np.float32),
    )
    truth = float64.asymmetric_loss(x, y, axis=axis_of_truth, weights=w)
    value, pull = jax.vjp(lambda x: asymmetric_loss(x, y, axis=axis, weights=w), x)
    np.testing.assert_allclose(value, truth, rtol=1e-6, atol=1e-5)
    assert value.shape == truth.shape
    ct = cotangent_of(truth.shape)
    slope = float64.gradient(x, y, ct, axis=axis_of_truth, weights=w)
    np.testing.assert_allclose(pull(jnp.asarray(ct))[0], slope, rtol=1e-5, atol=4e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("axis", [0, (0, 1)])
def test_a_kernel_by_name_refuses_to_keep_the_classes_and_sum_the_rest(kernel, axis):
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    with kernels.interpret_mode(), pytest.raises(NotImplementedError, match=f"(?s){kernel}.*axis"):
        asymmetric_loss(x, y, axis=axis, implementation=kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_by_name_says_on_a_cpu_which_platform_it_needs(kernel):
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    platform = {"mosaic_tpu": "tpu", "triton": "cuda"}[kernel]
    for call in (asymmetric_loss, jax.jit(asymmetric_loss, static_argnames="implementation")):
        with pytest.raises(NotImplementedError, match=f"(?si){kernel}.*{platform}"):
            call(x, y, implementation=kernel)


def test_lists_and_python_numbers_are_taken_as_arrays():
    value = asymmetric_loss([[1.5, -2.0]], [[1, 0]], where=[True, False], weights=[2.0, 1.0], pos_weight=3)
    truth = float64.asymmetric_loss([[1.5, -2.0]], [[1, 0]], where=[True, False], weights=[2.0, 1.0], pos_weight=3)
    np.testing.assert_allclose(value, truth, rtol=1e-6)


def test_numpy_numbers_are_as_good_as_python_numbers():
    x, y = logits_of(SHAPE), labels_of(SHAPE, ignore_label=-1)
    options = {
        "gamma_neg": 2,
        "gamma_pos": 1,
        "clip": 0.125,
        "axis": 2,
        "ignore_label": -1,
        "label_smoothing": 0.25,
    }
    types = {"axis": np.int64, "ignore_label": np.int32}
    found = asymmetric_loss(x, y, **{k: types.get(k, np.float32)(v) for k, v in options.items()})
    np.testing.assert_array_equal(found, asymmetric_loss(x, y, **options))


def test_labels_that_are_integers_count_as_positive_above_zero_when_traced():
    x = logits_of(SHAPE)
    y = np.random.default_rng(0).integers(-2, 4, SHAPE).astype(np.int32)
    found = jax.jit(asymmetric_loss)(x, y)
    np.testing.assert_allclose(found, float64.asymmetric_loss(x, y > 0), rtol=1e-5, atol=1e-5)


@pytest.mark.mostly_long(short=1)
def test_an_unsigned_ignore_label_works_at_the_end_of_its_range(implementation):
    x, y = logits_of(SHAPE), labels_of(SHAPE, dtype="uint8", ignore_label=255)
    x[y == 255] = np.nan
    assert_parity(x, y, implementation=implementation, ignore_label=255)


@pytest.mark.mostly_long(short=1)
def test_label_smoothing_is_the_same_as_smoothing_the_labels(implementation):
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    smoothed = (y * 0.8 + 0.1).astype(np.float32)
    ct = cotangent_of(SHAPE[:-1])
    ours = evaluate(x, y, ct, implementation=implementation, label_smoothing=0.2)
    theirs = evaluate(x, smoothed, ct, implementation=implementation)
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.mostly_long(short=1)
def test_where_is_the_same_as_weights_of_zero_and_one_on_finite_logits(implementation):
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    where = np.random.default_rng(0).random(SHAPE) < 0.7
    ct = cotangent_of(SHAPE[:-1])
    ours = evaluate(x, y, ct, implementation=implementation, where=where)
    theirs = evaluate(x, y, ct, implementation=implementation, weights=where.astype(np.float32))
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.mostly_long(short=1)
def test_everything_masked_is_exactly_zero(implementation):
    x, y = np.full(SHAPE, np.nan, np.float32), labels_of(SHAPE)
    value, slope = evaluate(x, y, np.ones(SHAPE[:-1]), implementation=implementation, where=np.asarray(False))
    assert not value.any() and not slope.any()


@pytest.mark.mostly_long(short=1)
def test_weights_may_be_negative_zero_and_integers(implementation):
    x, y = logits_of(SHAPE), labels_of(SHAPE)
    weights = np.random.default_rng(0).integers(-1, 2, SHAPE)
    assert_parity(x, y, implementation=implementation, weights=weights.astype(np.int32))


# Derivatives in what is not the logits.


@pytest.mark.mostly_long(short=1)
def test_gradients_in_float_labels_weights_and_pos_weight_match_float64(implementation):
    """The loss is linear in each of them, so float64 losses at two values give the derivatives exactly."""
    random = np.random.default_rng(7)
    x, y = logits_of(SHAPE), labels_of(SHAPE, dtype="float32")
    where = random.random(SHAPE) < 0.8
    x = np.where(where, x, np.float32(np.nan))
    w, pw = (random.uniform(0.2, 1, n).astype(np.float32) for n in (SHAPE, SHAPE[-1:]))
    ct = cotangent_of(SHAPE[:-1])
    smoothing = 0.2

    def truth(labels: Any, weights: Any, pos_weight: Any) -> Any:
        kw = {"where": where, "weights": weights, "pos_weight": pos_weight, "label_smoothing": smoothing}
        return float64.asymmetric_loss(x, labels, axis=(), **kw) * ct[..., None]

    expected = (
        truth(np.ones(SHAPE), w, pw) - truth(np.zeros(SHAPE), w, pw),
        truth(y, np.ones(SHAPE), pw),
        np.sum(truth(y, w, np.ones(SHAPE[-1])) - truth(y, w, np.zeros(SHAPE[-1])), axis=(0, 1)),
    )

    @jax.jit
    def pull(x: Any, y: Any, w: Any, pw: Any) -> Any:
        def loss(x: Any, y: Any, w: Any, pw: Any) -> Any:
            return asymmetric_loss(
                x,
                y,
                where=where,
                weights=w,
                pos_weight=pw,
                label_smoothing=smoothing,
                implementation=implementation,
            )

        return jax.vjp(loss, x, y, w, pw)[1](ct)

    slope, *others = pull(x, y, w, pw)
    true_slope = float64.gradient(x, y, ct, where=where, weights=w, pos_weight=pw, label_smoothing=smoothing)
    np.testing.assert_allclose(slope, true_slope, atol=4e-6)
    for name, found, value in zip(("labels", "weights", "pos_weight"), others, expected, strict=True):
        scale = np.maximum(1, np.abs(value))
        assert found.shape == value.shape, name
        assert np.max(np.abs(found - value) / scale) < 3e-6, name


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("name", ["labels", "weights", "pos_weight"])
def test_a_gradient_in_one_of_them_alone_works_without_one_in_the_logits(name):
    x = logits_of(SHAPE, dtype="bfloat16")
    arrays = {"labels": labels_of(SHAPE, dtype="bfloat16"), "weights": np.ones((), np.float32)}
    arrays["pos_weight"] = np.ones(SHAPE[-1:], np.float32)

    def total(array: Any) -> Any:
        given = {**arrays, name: array}
        return asymmetric_loss(x, given.pop("labels"), axis=None, **given)

    slope = jax.grad(total)(jnp.asarray(arrays[name]))
    assert slope.shape == arrays[name].shape and slope.dtype == arrays[name].dtype
    y = arrays["labels"]
    ones, zeros = np.ones_like(y), np.zeros_like(y)
    one, zero = (float64.asymmetric_loss(x, labels, axis=()) for labels in (ones, zeros))
    y = y.astype(np.float64)
    expected = {
        "labels": one - zero,
        "weights": np.sum(y * one + (1 - y) * zero),
        "pos_weight": np.sum(y * one, axis=(0, 1)),
    }
    tolerance = 0.5**8 if name == "labels" else 1e-5
    np.testing.assert_allclose(np.asarray(slope).astype(np.float64), expected[name], rtol=tolerance, atol=2e-6)


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize("name", ["gamma_neg", "gamma_pos", "clip"])
def test_differentiating_a_hyper_parameter_is_an_error_that_names_it(implementation, name):
    x, y = logits_of((5, 33)), labels_of((5, 33))

    def total(number: Any, x: Any) -> Any:
        return asymmetric_loss(x, y, axis=None, implementation=implementation, **{name: number})

    for differentiate in (jax.grad(total), jax.jit(jax.grad(total)), jax.grad(total, argnums=(0, 1))):
        with pytest.raises(TypeError, match=name):
            differentiate(0.5, jnp.asarray(x))
    stopped = jax.grad(lambda g: total(jax.lax.stop_gradient(g), x))(0.5)
    assert stopped == 0


@pytest.mark.mostly_long(short=1)
def test_differentiating_in_the_logits_is_fine_while_a_hyper_parameter_is_traced(implementation):
    x, y = logits_of((5, 33)), labels_of((5, 33))
    slope = jax.jit(lambda x, gamma: jax.grad(lambda x: asymmetric_loss(x, y, axis=None, gamma_neg=gamma))(x))(x, 2.5)
    np.testing.assert_allclose(slope, float64.gradient(x, y, axis=None, gamma_neg=2.5), atol=2e-6)


@pytest.mark.mostly_long(short=1)
def test_forward_mode_raises_and_says_so(implementation):
    x, y = jnp.asarray(logits_of((5, 33))), labels_of((5, 33))
    with pytest.raises(TypeError, match=r"(?i)forward.mode|custom_vjp|jvp"):
        jax.jvp(lambda x: asymmetric_loss(x, y, implementation=implementation), (x,), (jnp.ones_like(x),))


# Bad input: the exception, and what its message has to name: the argument, what came, what is allowed.

X, Y = np.zeros((4, 6), np.float32), np.zeros((4, 6), np.int8)
BAD: list[tuple[str, dict[str, Any], type[Exception], list[str]]] = [
    ("labels of another shape", {"labels": Y[:, :5]}, ValueError, ["labels", "4, 5", "4, 6"]),
    ("labels that would broadcast", {"labels": Y[:1]}, ValueError, ["labels", "1, 6", "4, 6"]),
    ("labels of another rank", {"labels": Y[0]}, ValueError, ["labels", "6,", "4, 6"]),
    ("scalar logits", {"logits": np.float32(1), "labels": np.int8(1)}, ValueError, ["logits", "classes"]),
    ("integer logits", {"logits": Y.astype(np.int32)}, TypeError, ["logits", "int32", "float32"]),
    ("boolean logits", {"logits": Y > 0}, TypeError, ["logits", "bool", "float32"]),
    ("complex logits", {"logits": X.astype(np.complex64)}, TypeError, ["logits", "complex64", "float32"]),
    ("complex labels", {"labels": Y.astype(np.complex64)}, TypeError, ["labels", "complex64", "bool"]),
    ("negative gamma_neg", {"gamma_neg": -1.0}, ValueError, ["gamma_neg", "-1", ">= 0"]),
    ("negative gamma_pos", {"gamma_pos": -0.5}, ValueError, ["gamma_pos", "-0.5", ">= 0"]),
    ("infinite gamma_neg", {"gamma_neg": float("inf")}, ValueError, ["gamma_neg", "inf"]),
    ("NaN gamma_pos", {"gamma_pos": float("nan")}, ValueError, ["gamma_pos", "nan"]),
    ("gamma_neg as a word", {"gamma_neg": "4"}, TypeError, ["gamma_neg", "'4'"]),
    ("gamma_neg None", {"gamma_neg": None}, TypeError, ["gamma_neg", "None"]),
    ("gamma_neg of other classes", {"gamma_neg": np.ones(7, np.float32)}, ValueError, ["gamma_neg", "(7,)", "(4, 6)"]),
    ("gamma_neg of other classes in jax", {"gamma_neg": "jnp.ones(7)"}, ValueError, ["gamma_neg", "(7,)", "(4, 6)"]),
    ("complex gamma_neg", {"gamma_neg": 1j}, TypeError, ["gamma_neg", "1j"]),
    ("negative clip", {"clip": -0.05}, ValueError, ["clip", "-0.05", "0 <= clip < 1"]),
    ("clip of 1", {"clip": 1}, ValueError, ["clip", "1", "0 <= clip < 1"]),
    ("NaN clip", {"clip": float("nan")}, ValueError, ["clip", "nan"]),
    ("clip None", {"clip": None}, TypeError, ["clip", "None", "clip=0 is no margin"]),
    ("label_smoothing of 1", {"label_smoothing": 1.0}, ValueError, ["label_smoothing", "1.0", "< 1"]),
    ("negative label_smoothing", {"label_smoothing": -0.1}, ValueError, ["label_smoothing", "-0.1", "0 <="]),
    ("NaN label_smoothing", {"label_smoothing": float("nan")}, ValueError, ["label_smoothing", "nan"]),
    ("label_smoothing as a word", {"label_smoothing": "0.1"}, TypeError, ["label_smoothing", "'0.1'"]),
    ("axis too high", {"axis": 2}, ValueError, ["axis", "2"]),
    ("axis too low", {"axis": -3}, ValueError, ["axis", "-3"]),
    ("axis not there in a tuple", {"axis": (0, 5)}, ValueError, ["axis", "5"]),
    ("axis twice", {"axis": (1, -1)}, ValueError, ["axis", "-1"]),
    ("axis 1.0", {"axis": 1.0}, TypeError, ["axis", "1.0"]),
    ("axis by name", {"axis": "classes"}, TypeError, ["axis", "classes"]),
    ("axis True", {"axis": True}, TypeError, ["axis", "True"]),
    ("unknown implementation", {"implementation": "cuda"}, ValueError, ["implementation", "cuda", "triton"]),
    ("implementation no word", {"implementation": 3}, ValueError, ["implementation", "3", "triton"]),
    ("implementation a list", {"implementation": ["xla"]}, ValueError, ["implementation", "xla", "triton"]),
    ("weights of another width", {"weights": np.ones(5, np.float32)}, ValueError, ["weights", "5,", "4, 6"]),
    (
        "weights a row too much",
        {"weights": np.ones((5, 6), np.float32)},
        ValueError,
        ["weights", "5, 6", "4, 6"],
    ),
    (
        "weights of more dimensions",
        {"weights": np.ones((2, 4, 6), np.float32)},
        ValueError,
        ["weights", "2, 4, 6"],
    ),
    ("weights, one an example", {"weights": np.ones(4, np.float32)}, ValueError, ["weights", "4,", "4, 6"]),
    ("complex weights", {"weights": np.ones(6, np.complex64)}, TypeError, ["weights", "complex64"]),
    ("where of floats", {"where": np.ones((4, 6), np.float32)}, TypeError, ["where", "float32", "bool"]),
    ("where of integers", {"where": np.ones((4, 6), np.int32)}, TypeError, ["where", "int32", "bool"]),
    ("where of another width", {"where": np.ones(5, bool)}, ValueError, ["where", "5,", "4, 6"]),
    (
        "where of more dimensions",
        {"where": np.ones((1, 4, 6), bool)},
        ValueError,
        ["where", "1, 4, 6", "4, 6"],
    ),
    (
        "pos_weight of another width",
        {"pos_weight": np.ones(5, np.float32)},
        ValueError,
        ["pos_weight", "5,", "4, 6"],
    ),
    (
        "pos_weight of more dimensions",
        {"pos_weight": np.ones((1, 4, 6), np.float32)},
        ValueError,
        ["pos_weight", "1, 4, 6", "4, 6"],
    ),
    ("complex pos_weight", {"pos_weight": np.ones(6, np.complex64)}, TypeError, ["pos_weight", "complex64"]),
    (
        "ignore_label with soft labels",
        {"labels": X, "ignore_label": -1},
        TypeError,
        ["ignore_label", "-1", "float32", "labels"],
    ),
    ("ignore_label 0.5", {"ignore_label": 0.5}, ValueError, ["ignore_label", "0.5", "integer"]),
    ("ignore_label NaN", {"ignore_label": float("nan")}, ValueError, ["ignore_label", "nan", "integer"]),
    ("ignore_label inf", {"ignore_label": float("inf")}, ValueError, ["ignore_label", "inf", "integer"]),
    ("ignore_label as a word", {"ignore_label": "-1"}, TypeError, ["ignore_label", "'-1'"]),
    ("ignore_label an array", {"ignore_label": np.array([-1])}, TypeError, ["ignore_label"]),
    (
        "stop_focus_gradient as a word",
        {"stop_focus_gradient": "no"},
        TypeError,
        ["stop_focus_gradient", "'no'"],
    ),
    ("donate_logits as a number", {"donate_logits": 1}, TypeError, ["donate_logits", "1"]),
    ("stop_focus_gradient None", {"stop_focus_gradient": None}, TypeError, ["stop_focus_gradient", "None"]),
]
NOT_FOR_JAX = [
    ("labels of words", {"labels": np.full((4, 6), "yes")}, TypeError, ["labels", "U3"]),
    ("labels of objects", {"labels": np.full((4, 6), None)}, TypeError, ["labels", "object"]),
    ("labels None", {"labels": None}, TypeError, ["labels"]),
    ("logits None", {"logits": None}, TypeError, ["logits"]),
    ("logits of words", {"logits": np.full((4, 6), "1")}, TypeError, ["logits", "U1"]),
    ("ragged logits", {"logits": [[1.0, 2.0], [3.0]]}, (TypeError, ValueError), ["logits"]),
    ("weights of words", {"weights": np.full(6, "1")}, TypeError, ["weights", "U1"]),
]


def call_of(changes: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    options = {name: jnp.ones(7) if isinstance(v, str) and v == "jnp.ones(7)" else v for name, v in changes.items()}
    return options.pop("logits", X), options.pop("labels", Y), options


def assert_names(error: BaseException, words: list[str]) -> None:
    for word in words:
        assert re.search(rf"(?<![\w.]){re.escape(word)}", str(error)), f"{word!r} is not in {error}"


@pytest.mark.mostly_long(short=50)
@pytest.mark.parametrize(
    ("what", "changes", "exception", "words"), BAD + NOT_FOR_JAX, ids=[b[0] for b in BAD + NOT_FOR_JAX]
)
def test_bad_input_raises_and_says_what_came_and_what_is_allowed(what, changes, exception, words):
    logits, labels, options = call_of(changes)
    with pytest.raises(exception) as caught:
        asymmetric_loss(logits, labels, **options)
    assert_names(caught.value, words)


@pytest.mark.mostly_long(short=43)
@pytest.mark.parametrize(("what", "changes", "exception", "words"), BAD, ids=[b[0] for b in BAD])
def test_bad_input_raises_at_trace_time_inside_jit(what, changes, exception, words):
    """eval_shape traces and compiles nothing."""
    logits, labels, options = call_of(changes)
    with pytest.raises(exception) as caught:
        jax.eval_shape(jax.jit(lambda x, y: asymmetric_loss(x, y, **options)), logits, labels)
    assert_names(caught.value, words)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("name", ["label_smoothing", "ignore_label"])
def test_what_has_to_be_a_python_number_may_not_be_traced(name):
    with pytest.raises(TypeError, match=name):
        jax.jit(lambda number: asymmetric_loss(X, Y, **{name: number}))(0.1 if name == "label_smoothing" else -1)


@pytest.mark.mostly_long(short=4)
@pytest.mark.parametrize(
    ("labels", "value"),
    [
        (np.where(np.arange(24).reshape(4, 6) == 7, 1.25, X), "1.25"),
        (np.where(np.arange(24).reshape(4, 6) == 7, -0.5, X).astype(np.float32), "-0.5"),
        (np.where(np.arange(24).reshape(4, 6) == 23, 2, Y), "2"),
        (np.where(np.arange(24).reshape(4, 6) == 0, -1, Y).astype(np.int32), "-1"),
        (np.where(np.arange(24).reshape(4, 6) == 0, np.nan, X), "nan"),
        (np.where(np.arange(24).reshape(4, 6) == 0, np.inf, X), "inf"),
        (jnp.where(jnp.arange(24).reshape(4, 6) == 7, 1.25, X), "1.25"),
    ],
)
def test_concrete_labels_outside_zero_to_one_raise_unless_they_are_left_out(labels, value):
    with pytest.raises(ValueError, match="labels") as caught:
        asymmetric_loss(X, labels)
    assert_names(caught.value, ["labels", value])
    # NaN is neither below 0 nor above 1.
    bad = ~((np.asarray(labels) >= 0) & (np.asarray(labels) <= 1))
    assert np.isfinite(asymmetric_loss(X, labels, where=~bad)).all()
    with pytest.raises(ValueError, match="labels"):
        asymmetric_loss(X, labels, where=bad)
    if labels.dtype == np.int32:
        assert np.isfinite(asymmetric_loss(X, labels, ignore_label=-1)).all()


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_concrete_labels_are_checked_inside_jit_too_where_they_are_constants(as_array):
    labels = as_array(np.where(np.arange(24).reshape(4, 6) == 7, 3, Y))
    with pytest.raises(ValueError, match=r"(?s)labels.*3"):
        jax.jit(lambda x: asymmetric_loss(x, labels))(X)


def scanned(function: Any) -> Any:
    return lambda x: jax.lax.scan(lambda carry, x: (carry, function(x)), None, x[None])[1][0]


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("transform", [jax.jit, jax.checkpoint, scanned])
@pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
def test_constants_of_a_traced_function_serve_as_arguments(transform, as_array):
    """A batch that a jitted function closes over is concrete, and what is computed from it is not."""
    options = {
        "where": as_array(np.arange(6) != 2),
        "weights": as_array(np.arange(6, dtype=np.float32)),
        "pos_weight": as_array(np.ones(6, np.float32)),
        "gamma_neg": as_array(np.float32(2)),
        "clip": as_array(np.float32(0.25)),
    }
    labels = as_array(labels_of((4, 6)))
    for chosen in ({}, options, {**options, "ignore_label": -1}):
        found = transform(lambda x, chosen=chosen: asymmetric_loss(x, labels, **chosen))(X + 1)
        truth = float64.asymmetric_loss(X + 1, labels, **chosen)
        np.testing.assert_allclose(found, truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["gamma_neg", "gamma_pos", "clip"])
def test_a_concrete_scalar_array_is_checked_like_a_number(name):
    with pytest.raises(ValueError, match=rf"{name}.*-0\.5"):
        asymmetric_loss(X, Y, **{name: jnp.float32(-0.5)})
    with pytest.raises(ValueError, match=rf"{name}.*-0\.5"):
        asymmetric_loss(X, Y, **{name: np.float32(-0.5)})


def test_all_but_the_arrays_are_keywords_only():
    with pytest.raises(TypeError):
        asymmetric_loss(X, Y, 4.0)
