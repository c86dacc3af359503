"""Which kernel serves a call, what the lowered text says of it, and the shapes of its blocks."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import GAMMAS_AND_CLIP, optimising

from asl_pallas import PackedLabels, SparseLabels, asymmetric_loss, kernels
from asl_pallas.kernels import mosaic_tpu, tiling, triton, xla
from asl_pallas.kernels.logarithm import log
from asl_pallas.kernels.platforms import by_platform
from asl_pallas.kernels.tile import Operands, Task
from asl_pallas.kernels.tiling import LANES, cpu_tiling, tpu_tiling, triton_tiling
from asl_pallas.kernels.versions import lacks_mosaic_gpu
from asl_pallas.losses import AsymmetricLoss
from asl_pallas.losses.base import TRACED
from reference import autodiff

X, Y = jnp.ones((5, 150)), jnp.ones((5, 150), jnp.int8)


def lowered_for(platform: str, **options: Any) -> str:
    f = jax.jit(jax.value_and_grad(lambda x, y: asymmetric_loss(x, y, **options).sum()))
    shapes = (jax.ShapeDtypeStruct((2048, 150), dtype) for dtype in (jnp.float32, jnp.int8))
    return f.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


def test_the_platform_of_the_lowering_chooses_not_the_platform_of_the_process():
    assert "tpu_custom_call" in lowered_for("tpu")
    assert "custom_call" not in lowered_for("cpu")
    assert "custom_call" not in lowered_for("rocm")


def test_a_kernel_asked_for_by_name_is_in_the_text_or_the_lowering_fails():
    assert "tpu_custom_call" in lowered_for("tpu", implementation="mosaic_tpu")
    assert "custom_call" not in lowered_for("tpu", implementation="xla")
    for name, platform in (("mosaic_tpu", "cpu"), ("mosaic_tpu", "cuda"), ("triton", "tpu"), ("triton", "cpu")):
        with pytest.raises(NotImplementedError, match=f"implementation='{name}' needs the platform"):
            lowered_for(platform, implementation=name)


def test_a_kernel_asked_for_by_name_runs_nowhere_else():
    with pytest.raises(NotImplementedError, match="implementation='triton' needs the platform 'cuda'"):
        asymmetric_loss(X, Y, implementation="triton")
    reason = "needs the platform 'cuda'" if lacks_mosaic_gpu() is None else "as of JAX 0.11"
    with pytest.raises(NotImplementedError, match=f"implementation='mosaic_gpu' .*{reason}"):
        asymmetric_loss(X, Y, implementation="mosaic_gpu")


def test_interpret_mode_ends_with_its_block_and_is_no_part_of_a_cached_call():
    with kernels.interpret_mode():
        inside = asymmetric_loss(X, Y, implementation="mosaic_tpu")
    np.testing.assert_allclose(inside, asymmetric_loss(X, Y), rtol=1e-6)
    with pytest.raises(NotImplementedError):
        asymmetric_loss(X, Y, implementation="mosaic_tpu")


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize(
    ("implementation", "logits", "labels", "reason"),
    [
        ("mosaic_tpu", "float16", "int8", "loads no float16 logits"),
        ("mosaic_tpu", "float32", "float16", "loads no float16 labels"),
        ("triton", "float32", "float8_e4m3fn", "loads no float8_e4m3fn labels"),
    ],
)
def test_a_refusal_gives_its_reason_and_none_falls_back(implementation, logits, labels, reason):
    x, y = X.astype(logits), Y.astype(labels)
    with pytest.raises(NotImplementedError, match=reason):
        asymmetric_loss(x, y, implementation=implementation)
    platform = kernels.PLATFORMS[implementation]
    lowered = jax.jit(asymmetric_loss).trace(x, y).lower(lowering_platforms=(platform,)).as_text()
    assert "custom_call" not in lowered


def test_one_trace_lowers_one_platform_only():
    def cannot(_: Any) -> Any:
        raise AssertionError("lowered for a platform that nobody asked for")

    def double(x: Any) -> Any:
        return 2 * x

    f = jax.jit(lambda x: by_platform(x, lambda asked: (double, {"tpu": cannot, "cpu": double, "default": cannot})))
    assert f(3.0) == 6.0
    assert jax.vmap(f)(jnp.arange(3.0)).tolist() == [0.0, 2.0, 4.0]
    with pytest.raises(AssertionError):
        f.trace(3.0).lower(lowering_platforms=("tpu",))


def test_users_see_no_notice_about_triton_in_pallas():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lowered_for("tpu")
        with kernels.interpret_mode():
            asymmetric_loss(X, Y, implementation="triton")


TASK = Task(AsymmetricLoss(), "rows", True)


@pytest.mark.mostly_long(short=6)
@pytest.mark.parametrize(
    "shape", [(1, 1), (33, 7), (4096, 80), (4096, 600), (1, 9605), (4096, 8192), (64, 2**20), (2**18, 80)]
)
@pytest.mark.parametrize("dtypes", [("bfloat16", "int8"), ("float32", "float32"), ("bfloat16", "bool")])
def test_blocks_are_whole_registers_fit_on_the_chip_and_cover_the_array(shape, dtypes):
    x, y = (jax.ShapeDtypeStruct(shape, jnp.dtype(d)) for d in dtypes)
    tpu = tpu_tiling(TASK, Operands(x, y))
    assert tpu.rows % LANES == tpu.classes % tpu.chunk == tpu.rows % tpu.group == 0
    assert tpu.chunk % LANES == tpu.group % 32 == 0 or (tpu.transposed and tpu.chunk % 8 == tpu.group % LANES == 0)
    assert not tpu.transposed or tpu.classes == tpu.chunk or tpu.chunk % 32 == 0
    in_flight = 2 * tpu.rows * tpu.classes * (2 * x.dtype.itemsize + y.dtype.itemsize)
    assert in_flight <= 11 * 2**20
    assert tpu.rows < shape[0] + max(LANES, tpu.group) and tpu.classes < shape[1] + tpu.chunk
    gpu = triton_tiling(*shape, x.dtype.itemsize, plain=y.dtype != jnp.float32)
    assert gpu.span % gpu.chunk == 0 and gpu.rows & (gpu.rows - 1) == 0 and gpu.chunk & (gpu.chunk - 1) == 0
    assert gpu.rows * gpu.chunk <= 2048
    # The last span may be short, it may not be empty.
    assert (-(-shape[1] // gpu.span) - 1) * gpu.span < shape[1]
    cpu = cpu_tiling(*shape)
    assert (cpu is None) == (shape[0] * shape[1] <= 64 * 1024)
    if cpu is not None:
        width = -(-cpu.classes // cpu.pieces)
        assert 1 <= cpu.rows <= shape[0] and cpu.classes <= shape[1] and cpu.rows * width <= 33 * 1024
        assert cpu.pieces == 1 or width >= 1024


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("shape", [(1, 1), (300, 20), (257, 129), (130, 9605), (2100, 300)])
@pytest.mark.parametrize(("value", "generation"), [("rows", None), ("rows", 6), ("elements", None), (None, None)])
def test_rows_along_the_lanes_are_the_same_problem(shape, value, generation, monkeypatch):
    """Every operand, on shapes whose last blocks, groups and chunks aren't whole; laid out both ways, against jnp."""
    rows, classes = shape
    monkeypatch.setattr(tiling, "tpu_generation", lambda: generation)
    random = np.random.default_rng(0)
    logits = jnp.asarray(random.normal(0, 4, shape), jnp.float32)
    labels = jnp.asarray(random.integers(-1, 2, shape), jnp.int8)
    per_row, per_class, each = (jnp.asarray(random.random(s), jnp.float32) for s in ((rows, 1), (1, classes), shape))
    cotangent = each if value == "elements" else per_row
    operands = Operands(logits, labels, each > 0.1, per_row, per_class, cotangent, scalars=jnp.array([3.0]))
    task = Task(AsymmetricLoss(TRACED, 1.0, 0.05), value, True, ignore_label=-1)
    expected = xla.run(task, operands)
    for transposed in (True, False):
        monkeypatch.setattr(tiling, "tpu_transposed", lambda *_, transposed=transposed: transposed)
        assert tpu_tiling(task, operands).transposed == transposed
        with optimising(False):
            found = jax.jit(lambda o: mosaic_tpu.run(task, o, interpret=True))(operands)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)


@pytest.mark.mostly_long(short=3)
@pytest.mark.parametrize("classes", [80, 600, 2000, 4097, 9605])
@pytest.mark.parametrize("value", ["rows", "elements"])
def test_a_block_has_whole_chunks_however_much_an_element_takes(classes, value):
    """All that a call can have by element; and with few labels, parts of groups that no two blocks share."""
    shape = (300, classes)
    x, y, w, m = (jax.ShapeDtypeStruct(shape, d) for d in ("float32", "bool", "float32", "bool"))
    for form, labels in (
        ("dense", y),
        ("packed", jax.ShapeDtypeStruct((300, -(-classes // 4096) * 128), "uint32")),
        ("sparse", jax.ShapeDtypeStruct((300, 17), "int32")),
    ):
        tpu = tpu_tiling(dataclasses.replace(TASK, value=value, labels=form), Operands(x, labels, m, w, cotangent=x))
        assert 0 < tpu.classes <= 4096 and tpu.classes % tpu.chunk == tpu.chunk % (8 if tpu.transposed else LANES) == 0
        assert form == "dense" or not tpu.transposed
        assert form == "dense" or tpu.classes >= classes or 4096 % tpu.classes == 0


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("shape", [(1, 60_000), (3, 24_577), (2, 70_001), (100, 700), (33, 9605), (90_000, 1)])
def test_streamed_is_the_whole_expression_over_every_edge(shape):
    random = np.random.default_rng(0)
    operands = Operands(
        logits=jnp.asarray(random.normal(0, 3, shape), jnp.float32),
        labels=jnp.asarray(random.random(shape) < 0.2),
        where=jnp.asarray(random.random(shape) < 0.8),
        weights=jnp.asarray(random.random((shape[0], 1)), jnp.float32),
        pos_weight=jnp.asarray(random.random((1, shape[1])), jnp.float32),
    )
    for value in ("rows", "elements"):
        task = Task(AsymmetricLoss(), value, True)
        whole, streamed = (jax.jit(lambda o, f=f, t=task: f(t, o))(operands) for f in (xla.run, xla.run_streamed))
        # Beside the margin, where little is left of p - clip, two expressions may round it differently.
        np.testing.assert_allclose(streamed.value, whole.value, rtol=2e-5, atol=1e-8)
        np.testing.assert_allclose(streamed.gradient, whole.gradient, rtol=1e-5, atol=1e-7)


def test_the_logarithm_for_the_cpu_errs_no_more_than_the_rounding_of_what_it_is_taken_of():
    z = np.concatenate([np.exp(np.linspace(-80, 80, 200_001)), np.linspace(0.3, 3, 200_001)]).astype(np.float32)
    truth = np.log(z.astype(np.float64))
    error = np.abs(np.asarray(jax.jit(log)(z)) - truth) / np.maximum(np.abs(truth), 1)
    assert error.max() < 1.3e-7 and log(jnp.float32(1)) == 0
    assert log(jnp.asarray([2.0], jax.dtypes.bfloat16)).dtype == jnp.bfloat16  # any other dtype is jnp's own


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize(("gamma_neg", "gamma_pos", "clip"), GAMMAS_AND_CLIP)
def test_a_nan_comes_through_the_streamed_form(gamma_neg, gamma_pos, clip):
    x, y = np.zeros((100, 700), np.float32), np.zeros((100, 700), np.int8)
    x[3, 5] = x[99, 699] = np.nan
    y[99] = 1
    operands = Operands(jnp.asarray(x), jnp.asarray(y))
    scalars = jnp.array([gamma_neg, gamma_pos, clip], jnp.float32)
    of_arrays = AsymmetricLoss(TRACED, TRACED, TRACED)
    for formula, dynamic in ((AsymmetricLoss(gamma_neg, gamma_pos, clip), None), (of_arrays, scalars)):
        value, gradient, _ = xla.run_streamed(Task(formula, "rows", True), operands._replace(scalars=dynamic))
        assert np.flatnonzero(np.isnan(value)).tolist() == [3, 99]
        assert np.argwhere(np.isnan(gradient)).tolist() == [[3, 5], [99, 699]]


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"logits": "bfloat16"}, {"logits": "float16"}, {"labels": "float32"}, {"labels": "bool"}),
        *({"gamma_neg": 0.5}, {"gamma_neg": 0.0, "gamma_pos": 0.0, "clip": 0.0}, {"stop_focus_gradient": True}),
        *({"ignore_label": -1}, {"label_smoothing": 0.1}, {"axis": None}),
        *({"where": ((1024, 8192), "bool")}, {"weights": ((1024, 1), "float32")}, {"pos_weight": ((8192,), "float32")}),
        {"gamma_neg": ((), "float32"), "clip": ((), "float32")},
        *({"labels": "packed"}, {"labels": "sparse"}, {"labels": "packed", "logits": "bfloat16", "clip": 0.0}),
    ],
    ids=str,
)
def test_the_cpu_keeps_its_temporaries_within_a_mebibyte(options):
    options = dict(options)
    x = jax.ShapeDtypeStruct((1024, 8192), options.pop("logits", "float32"))
    labels = options.pop("labels", "int8")
    words = 0
    if labels == "packed":
        y = PackedLabels(jax.ShapeDtypeStruct((1024, 256), "uint32"), 8192)
    elif labels == "sparse":
        y = SparseLabels(jax.ShapeDtypeStruct((1024, 16), "int32"), 8192)
        words = 1024 * 256 * 4  # which are made of the ids
    else:
        y = jax.ShapeDtypeStruct((1024, 8192), labels)
    arrays = {name: jax.ShapeDtypeStruct(*value) for name, value in options.items() if isinstance(value, tuple)}
    static = {name: value for name, value in options.items() if name not in arrays}

    def loss(x: Any, y: Any, arrays: dict[str, Any]) -> Any:
        return asymmetric_loss(x, y, **arrays, **static)

    for f in (loss, jax.value_and_grad(lambda *a: loss(*a).sum())):
        compiled = jax.jit(f).lower(x, y, arrays).compile()
        assert compiled.memory_analysis().temp_size_in_bytes <= 2**20 + words


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("options", [{}, {"axis": ()}, {"clip": 0.0}, {"weights": ((1024, 1), "float32")}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_the_cpu_the_gradient_takes_the_place_of_logits_that_nobody_else_needs(dtype, options):
    x, y = jax.ShapeDtypeStruct((1024, 8192), dtype), jax.ShapeDtypeStruct((1024, 8192), "int8")
    arrays = {
        name: jax.ShapeDtypeStruct(*value) for name, value in options.items() if value and isinstance(value, tuple)
    }
    static = {name: value for name, value in options.items() if name not in arrays}
    losses = 4 * 1024 * 8192 if options.get("axis") == () else 0

    def loss(x: Any, y: Any, arrays: Any) -> Any:
        return asymmetric_loss(x, y, **arrays, **static).sum()

    donated = jax.jit(jax.value_and_grad(loss), donate_argnums=0).lower(x, y, arrays).compile().memory_analysis()
    size = x.size * x.dtype.itemsize
    assert donated.alias_size_in_bytes == size and donated.temp_size_in_bytes <= 2**20 + losses

    def step(features: Any, kernel: Any, y: Any, arrays: Any) -> Any:
        return jax.value_and_grad(lambda kernel: loss(features @ kernel, y, arrays))(kernel)

    def official(features: Any, kernel: Any, y: Any, arrays: Any) -> Any:
        return jax.value_and_grad(lambda kernel: autodiff.official(features @ kernel, y).sum())(kernel)

    def temporaries(step: Any) -> int:
        return jax.jit(step).lower(*operands).compile().memory_analysis().temp_size_in_bytes

    operands = jax.ShapeDtypeStruct((1024, 64), dtype), jax.ShapeDtypeStruct((64, 8192), dtype), y, arrays
    # XLA's CPU backend multiplies bfloat16 as float32, in arrays of its own.
    converted = 2 * 4 * 1024 * 8192 if dtype == "bfloat16" else 0
    assert temporaries(step) <= size + losses + converted + 2**20
    if not options and dtype == "float32":
        assert temporaries(official) >= 3 * size


def test_a_nan_in_the_loss_or_an_infinite_one_leaves_the_gradient_of_other_rows_alone():
    """The gradient waits for the loss by way of one of its numbers."""
    x = np.random.default_rng(0).normal(0, 3, (1024, 128)).astype(np.float32)
    y = np.zeros((1024, 128), np.int8)
    y[0, 3] = 1
    expected = jax.jit(jax.grad(lambda x: asymmetric_loss(x, y).sum()))(x)
    for first, finite in ((np.nan, False), (-np.inf, False), (np.inf, True), (-1e30, True)):
        z = x.copy()
        z[0, 3] = first
        value, gradient = jax.jit(jax.value_and_grad(lambda x: asymmetric_loss(x, y).sum()))(z)
        assert np.isfinite(value) == finite
        np.testing.assert_array_equal(gradient[1:], expected[1:])
        np.testing.assert_array_equal(np.isnan(gradient), np.isnan(z))


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_result_that_nobody_asks_for_is_not_computed(platform, mapped):
    x, y = (jax.ShapeDtypeStruct((1024, 8192), dtype) for dtype in ("float32", "int8"))

    def loss(x: Any, y: Any) -> Any:
        return asymmetric_loss(x, y).sum()

    def computed(step: Any) -> list[str]:
        """The results of the kernel, or of the loss's loop on the CPU."""
        shapes = [jax.ShapeDtypeStruct((3, *a.shape), a.dtype) if mapped else a for a in (x, y)]
        jitted = jax.jit(jax.vmap(step) if mapped else step)
        lines = jitted.trace(*shapes).lower(lowering_platforms=(platform,)).as_text().splitlines()
        word = " stablehlo.while" if platform == "cpu" else " stablehlo.custom_call @"
        return [line.partition(" = ")[0].strip() for line in lines if word in line]

    def value_of_both(x: Any, y: Any) -> Any:
        return jax.vjp(lambda x: loss(x, y), x)[0]

    both, gradient, value = map(computed, (jax.value_and_grad(loss), jax.grad(loss), value_of_both))
    assert len(value) == len(computed(loss))
    if platform == "cpu":
        assert len(both) == len(value) > 0 and gradient == []
    else:
        assert [line.endswith(":2") for line in (*both, *gradient, *value)] == [True, False, False]


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("kernel", [mosaic_tpu, triton])
@pytest.mark.parametrize("shape", [(40, 3000), (300, 130), (1, 5000)])
def test_blocks_of_rows_and_of_classes_meet_without_a_gap(kernel, shape):
    """Several blocks either way: the parity tests' arrays are smaller than one."""
    random = np.random.default_rng(1)
    operands = Operands(
        logits=jnp.asarray(random.normal(0, 3, shape), jnp.float32),
        labels=jnp.asarray(random.random(shape) < 0.2, jnp.int8),
        where=jnp.asarray(random.random((shape[0], 1)) < 0.8),
        weights=jnp.asarray(random.random((1, shape[1])), jnp.float32),
    )
    expected = xla.run(TASK, operands)
    with optimising(False):
        found = jax.jit(lambda o: kernel.run(TASK, o, interpret=True))(operands)
    np.testing.assert_allclose(found.value, expected.value, rtol=2e-5)
    np.testing.assert_allclose(found.gradient, expected.gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.mostly_long(short=1)
@pytest.mark.parametrize("kernel", [mosaic_tpu, triton])
@pytest.mark.parametrize("by", ["rows", "elements"])
def test_the_backward_kernel_multiplies_by_the_cotangent_before_it_rounds(kernel, by):
    random = np.random.default_rng(3)  # with 2 one product is half way between two bfloat16s, on jax 0.12
    shape = (40, 300)
    logits = jnp.asarray(random.normal(0, 3, shape), jnp.bfloat16)
    labels = jnp.asarray(random.random(shape) < 0.2)
    cotangent = jnp.asarray(random.normal(size=(shape[0], 1) if by == "rows" else shape), jnp.float32)
    exact = xla.run(Task(AsymmetricLoss(), "elements", True), Operands(logits.astype(jnp.float32), labels)).gradient
    backward = Task(AsymmetricLoss(), None, True)
    operands = Operands(logits, labels, cotangent=cotangent)
    with optimising(False):
        found = jax.jit(lambda o: kernel.run(backward, o, interpret=True))(operands)
    assert found.value is None
    np.testing.assert_array_equal(found.gradient, (exact * cotangent).astype(jnp.bfloat16))
