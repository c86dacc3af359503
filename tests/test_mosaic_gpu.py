"""The Mosaic GPU kernel in Pallas's interpreter, on rows as long as it asks for.

It has a file of its own and no place in the `implementation` fixture, whose tests have rows of a few classes.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import GAMMAS_AND_CLIP, assert_parity, cotangent_of, evaluate, labels_of, logits_of
from jax.sharding import AxisType, PartitionSpec

from asl_pallas import asymmetric_loss, kernels
from asl_pallas.kernels import versions, xla
from asl_pallas.kernels.tile import Operands, Task
from asl_pallas.kernels.tiling import mosaic_gpu_tiling
from asl_pallas.losses import AsymmetricLoss

lacking = versions.lacks_mosaic_gpu()
pytestmark = pytest.mark.skipif(lacking is not None, reason=str(lacking))
# Not a multiple of a chunk, and rows that don't start at multiples of 16 bytes.
SHAPE = (3, 257)
NAME: dict[str, Any] = {"implementation": "mosaic_gpu"}


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), GAMMAS_AND_CLIP)
def test_loss_and_gradient_match_float64(gamma_neg, gamma_pos, clip):
    options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
    assert_parity(logits_of(SHAPE), labels_of(SHAPE), **NAME, **options)


def test_traced_hyper_parameters_match_float64():
    for gamma_neg, gamma_pos, clip in GAMMAS_AND_CLIP:
        options = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}
        assert_parity(logits_of(SHAPE), labels_of(SHAPE), traced=tuple(options), **NAME, **options)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *(((1, 128), "float32"), ((2, 9605), "bfloat16"), ((3, 1024), "float16"), ((2, 2, 600), "bfloat16")),
        *(((9605,), "float32"), ((2, 8192), "bfloat16"), (SHAPE, "float16")),
    ],
)
def test_every_size_and_dtype_matches_float64(shape, dtype):
    """Rows split over programs, rows at multiples of 16 bytes and others, stores by the engine and by the threads."""
    assert_parity(logits_of(shape, dtype=dtype), labels_of(shape), **NAME)


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("labels", ["uint8", "int16", "int32", "float32", "bfloat16"])
def test_every_labels_dtype_matches_float64(labels):
    assert_parity(logits_of(SHAPE), labels_of(SHAPE, dtype=labels), **NAME)


RANDOM = np.random.default_rng(3)
OPTIONS: list[dict[str, Any]] = [
    {"where": RANDOM.random((3, 1)) < 0.7, "weights": RANDOM.random((1, 257)).astype(np.float32)},
    {"where": RANDOM.random((1, 257)) < 0.7, "weights": RANDOM.random((3, 1)).astype(np.float32)},
    {"weights": RANDOM.random(SHAPE).astype(np.float32), "pos_weight": RANDOM.random(257).astype(np.float32)},
    {"ignore_label": -1, "label_smoothing": 0.1, "pos_weight": np.float32(3)},
    {"stop_focus_gradient": True, "axis": ()},
    {"axis": None},
]


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options))
def test_every_argument_matches_float64(options):
    labels = labels_of(SHAPE, ignore_label=options.get("ignore_label"))
    assert_parity(logits_of(SHAPE, dtype="bfloat16"), labels, **NAME, **options)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_infinite_and_nan_logits_give_limits_and_nan(clip):
    x = np.tile(np.array([-np.inf, -1e4, -30, 0, 30, 1e4, np.inf, 1], np.float32), (2, 16))
    y = np.repeat(np.array([[0], [1]], np.int8), x.shape[1], axis=1)
    assert_parity(x, y, clip=clip, axis=(), cotangent=np.ones(x.shape, np.float32), **NAME)
    x = logits_of(SHAPE)
    x[1, 256] = np.nan
    value, slope = evaluate(x, labels_of(SHAPE), np.ones(3, np.float32), clip=clip, **NAME)
    assert np.flatnonzero(np.isnan(value)).tolist() == [1]
    assert np.argwhere(np.isnan(slope)).tolist() == [[1, 256]]


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("logit", [-10.0, 10.0])
def test_thousands_of_easy_elements_do_not_add_up_to_rounding_errors(logit):
    """Without focus a loss of 4.5e-5 is all there is to an element: log1p, which Mosaic GPU lacks, has to be right."""
    x, y = np.full((1, 4096), logit, np.float32), np.full((1, 4096), logit > 0, np.int8)
    assert_parity(x, y, gamma_neg=0, gamma_pos=0, clip=0, **NAME)


@pytest.mark.long
def test_rows_and_spans_meet_without_a_gap_and_the_cotangent_comes_before_the_rounding(monkeypatch):
    """More units than programs, so that one program's pipeline runs on from row to row."""
    monkeypatch.setattr("asl_pallas.kernels.tiling._MOSAIC_GPU_PROGRAMS", 3)
    from asl_pallas.kernels import mosaic_gpu

    random = np.random.default_rng(2)
    task = Task(AsymmetricLoss(), "rows", True)
    run = jax.jit(lambda operands: mosaic_gpu.run(task, operands, interpret=True))
    for shape in ((5, 300), (1, 5120)):  # the last one with a chunk too many
        logits = jnp.asarray(random.normal(0, 3, shape), jnp.bfloat16)
        labels = jnp.asarray(random.random(shape) < 0.2, jnp.int8)
        cotangent = jnp.asarray(random.normal(size=(shape[0], 1)), jnp.float32)
        exact = Operands(logits.astype(jnp.float32), labels)
        whole = xla.run(task, exact, dataclasses.replace(mosaic_gpu.arithmetic(task, exact), signed_per_element=True))
        unrounded = run(exact)
        np.testing.assert_allclose(unrounded.gradient, whole.gradient, rtol=2e-5, atol=1e-8)
        found = run(Operands(logits, labels, cotangent=cotangent))
        np.testing.assert_allclose(found.value, whole.value, rtol=2e-6)
        np.testing.assert_array_equal(found.gradient, (unrounded.gradient * cotangent).astype(jnp.bfloat16))


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("classes", [128, 257, 600, 1000, 1024, 8192, 9605, 131072])
def test_spans_of_chunks_cover_every_row(classes):
    for rows, vectors in itertools.product((1, 64, 400, 4096, 262144), (True, False)):
        tiling = mosaic_gpu_tiling(rows, classes, 2, vectors)
        covered = tiling.spans * tiling.steps * tiling.chunk
        assert tiling.chunk <= classes <= covered
        assert covered - tiling.steps * tiling.chunk < classes  # no span without a class of its own
        assert tiling.chunk % tiling.tile == 0 and tiling.tile % (128 * tiling.vector) == 0
        assert 1 <= tiling.programs <= rows * tiling.spans


def test_transformed_it_gives_the_same():
    x, y = jnp.asarray(logits_of((2, 3, 257))), jnp.asarray(labels_of((2, 3, 257)))
    gammas = jnp.arange(3.0)

    def total(x: Any, y: Any, gamma: Any = 2.0) -> Any:
        return asymmetric_loss(x, y, gamma_neg=gamma, axis=None, **NAME)

    with kernels.interpret_mode():
        batched = jax.vmap(jax.value_and_grad(total))(x, y)
        by_gamma = jax.vmap(total, (None, None, 0))(x[0], y[0], gammas)
        bend = jax.grad(lambda x: jnp.vdot(jax.grad(total)(x, y[0]), cotangent_of((3, 257))))(x[0])

    def plain(x: Any, y: Any, gamma: Any = 2.0) -> Any:
        return asymmetric_loss(x, y, gamma_neg=gamma, axis=None)

    expected = jax.vmap(jax.value_and_grad(plain))(x, y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), batched, expected)
    np.testing.assert_allclose(by_gamma, [plain(x[0], y[0], gamma) for gamma in gammas], rtol=1e-5)
    assert jnp.isfinite(bend).all() and jnp.any(bend != 0)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_under_a_mesh_it_runs_in_the_shard_map_of_the_library_or_of_the_user(kind):
    """A mesh of one device: the interpreter takes the barriers of a second one for forgotten ones of its own."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,))
    rows = PartitionSpec("data")
    x, y = logits_of((2, 257)), labels_of((2, 257))
    slope = jax.grad(lambda x, y, **options: asymmetric_loss(x, y, **options).sum())
    expected = slope(x, y)
    f = jax.jit(lambda x, y: slope(x, y, **NAME))
    with jax.set_mesh(mesh), kernels.interpret_mode():
        shards = [jax.device_put(a, jax.NamedSharding(mesh, rows)) for a in (x, y)]
        if kind == AxisType.Auto:
            f = jax.jit(jax.shard_map(f, in_specs=rows, out_specs=rows))  # checks what varies over which axis
        found = f(*shards)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "dtypes", "options", "reason"),
    [
        ((3, 127), ("float32", "int8"), {}, "rows of at least 128 classes, and the logits have 127"),
        ((3, 257), ("float32", "bool"), {}, "loads no bool labels"),
        ((3, 257), ("float32", "int8"), {"where": np.ones((3, 257), bool)}, "loads no bool where"),
    ],
)
def test_a_refusal_gives_its_reason(shape, dtypes, options, reason):
    x, y = jnp.ones(shape, dtypes[0]), jnp.ones(shape, dtypes[1])
    with pytest.raises(NotImplementedError, match=reason):
        asymmetric_loss(x, y, **NAME, **options)
