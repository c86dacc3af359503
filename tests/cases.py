"""Inputs, evaluation and tolerances that several test files share.

The bound everywhere is the project's: an implementation may err at most 1.5 times as much as the careful
float32 jnp version (`reference.closed_form`) on the same inputs, plus 1e-6, both in units of
max(1, |truth|). Where a gradient leaves in a smaller dtype, that dtype's own rounding comes on top.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from asl_pallas import asymmetric_loss, kernels
from reference import closed_form, float64

# gamma_neg, gamma_pos, clip: the paper's, BCE, focal, exponents between 0 and 1, a wide margin.
GAMMAS_AND_CLIP = [
    (4.0, 1.0, 0.05),
    (0.0, 0.0, 0.0),
    (2.0, 2.0, 0.0),
    (0.5, 0.5, 0.05),
    (0.5, 2.5, 0.0),
    (1.0, 4.0, 0.2),
    (2.5, 0.0, 0.05),
    (0.0, 1.0, 0.5),
]
KERNELS = ("mosaic_tpu", "triton")
ARRAYS = ("where", "weights", "pos_weight")
HYPERPARAMETERS = ("gamma_neg", "gamma_pos", "clip")
# For programs of Pallas's interpreter, beside `optimising(False)`: a third of the time to compile one. XLA of jax 0.12
# knows the option no more.
QUICK = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else None
Pair = tuple[NDArray[Any], NDArray[Any]]


def logits_of(shape: tuple[int, ...], seed: int = 0, dtype: str = "float32") -> NDArray[Any]:
    """Normal logits of width 4 and, where there is room, 0, +-30 and +-1e4, rounded to the dtype."""
    random = np.random.default_rng(seed)
    x = random.normal(0, 4, shape)
    special = np.array([0.0, 30.0, -30.0, 1e4, -1e4, -0.0])
    if x.size > 20 * special.size:
        x.reshape(-1)[random.permutation(x.size)[: special.size]] = special
    return x.astype(jnp.dtype(dtype))


def labels_of(
    shape: tuple[int, ...], seed: int = 1, dtype: str = "int8", ignore_label: int | None = None
) -> NDArray[Any]:
    """Labels, a third positive; float dtypes get soft ones beside 0 and 1."""
    random = np.random.default_rng(seed)
    y = (random.random(shape) < 1 / 3).astype(np.float64)
    if jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        y = np.where(random.random(shape) < 0.5, random.random(shape), y)
    if ignore_label is not None:
        y = np.where(random.random(shape) < 0.25, ignore_label, y)
    return y.astype(jnp.dtype(dtype))


def cotangent_of(shape: tuple[int, ...], seed: int = 2) -> NDArray[Any]:
    """Cotangents of both signs, every fifth of them 0."""
    ct = np.random.default_rng(seed).normal(0, 1, shape)
    ct.reshape(-1)[::5] = 0
    return np.asarray(ct, np.float32)


def _is_interpreted(implementation: str | None) -> bool:
    return implementation in kernels.LOADS and jax.default_backend() == "cpu"


@contextlib.contextmanager
def interpreted(implementation: str | None) -> Iterator[None]:
    """A kernel by name runs in Pallas's interpreter; what anything else runs is as it is."""
    if not _is_interpreted(implementation):
        yield
        return
    with kernels.interpret_mode(), optimising(False):
        yield


@contextlib.contextmanager
def optimising(wanted: bool) -> Iterator[None]:
    """Whether LLVM works on what XLA compiles for the CPU meanwhile.

    The interpreter's programs are large, run once and stand for another chip's: optimising them is nearly half of such
    a test's time. The CPU's own path and the yardsticks are compiled as a user's program is.
    """
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not wanted)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def evaluate(
    logits: ArrayLike,
    labels: Any,
    cotangent: ArrayLike,
    *,
    implementation: str | None,
    traced: tuple[str, ...] = (),
    **options: Any,
) -> Pair:
    """Loss and gradient of sum(cotangent * loss), compiled; what `traced` names comes as a traced scalar."""
    dynamic = {name: options.pop(name) for name in (*ARRAYS, *traced) if options.get(name) is not None}
    static = tuple(sorted(options.items()))
    # What is large runs longer than XLA works on it.
    quick = _is_interpreted(implementation) and np.size(logits) <= 2**19
    with interpreted(implementation), optimising(not quick):
        value, slope = _compiled(implementation, static, quick)(
            jnp.asarray(logits),
            jax.tree.map(jnp.asarray, labels),
            cotangent,
            {k: jnp.asarray(v) for k, v in dynamic.items()},
        )
    return np.asarray(value), np.asarray(slope)


@functools.cache
def _compiled(implementation: str | None, static: tuple[tuple[str, Any], ...], quick: bool) -> Any:
    def run(logits: Any, labels: Any, cotangent: Any, dynamic: dict[str, Any]) -> Any:
        value, pull = jax.vjp(
            lambda x: asymmetric_loss(x, labels, implementation=implementation, **dict(static), **dynamic),
            logits,
        )
        return value, pull(jnp.asarray(cotangent, value.dtype))[0]

    return jax.jit(run, compiler_options=QUICK if quick else None)


def true_pair(logits: ArrayLike, labels: ArrayLike, cotangent: ArrayLike, **options: Any) -> Pair:
    """Loss and gradient in float64."""
    return (
        float64.asymmetric_loss(logits, labels, **options),
        float64.gradient(logits, labels, cotangent, **options),
    )


def careful_pair(
    logits: ArrayLike,
    labels: ArrayLike,
    cotangent: ArrayLike,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    axis: int | tuple[int, ...] | None = -1,
    where: Any = None,
    weights: Any = None,
    pos_weight: Any = None,
    ignore_label: int | None = None,
    label_smoothing: float = 0.0,
    stop_focus_gradient: bool = False,
) -> Pair:
    """The same in float32 by the closed form, every operation of the call rounded to float32."""
    x = np.asarray(logits).astype(np.float32)
    y = np.asarray(labels).astype(np.float32)
    kept = np.ones(x.shape, bool) if where is None else np.broadcast_to(np.asarray(where), x.shape)
    if ignore_label is not None:
        kept = kept & (y != ignore_label)
    x, y = np.where(kept, x, np.float32(0)), np.where(kept, y, np.float32(0))
    y = y * np.float32(1 - label_smoothing) + np.float32(label_smoothing / 2)
    f32 = np.float32
    pw = f32(1) if pos_weight is None else np.asarray(pos_weight).astype(f32)
    w = f32(1) if weights is None else np.asarray(weights).astype(f32)

    def side(label: float) -> Pair:
        return _careful_side(x.tobytes(), x.shape, label, gamma_neg, gamma_pos, clip, stop_focus_gradient)

    def mix(positive: NDArray[Any], negative: NDArray[Any]) -> NDArray[Any]:
        mixed = np.where(y != 0, y * np.where(y != 0, positive, f32(0)) * pw, f32(0))
        mixed = mixed + np.where(y != 1, (1 - y) * np.where(y != 1, negative, f32(0)), f32(0))
        return np.where(kept, mixed * w, f32(0))

    (of_positive, up), (of_negative, down) = side(1.0), side(0.0)
    value = np.asarray(jnp.sum(mix(of_positive, of_negative), axis))
    outer = float64.spread(cotangent, x.shape, axis).astype(f32)
    return value, np.where(kept, mix(up, down) * outer, f32(0))


@functools.lru_cache(maxsize=256)
def _careful_side(
    logits: bytes, shape: tuple[int, ...], label: float, gamma_neg: float, gamma_pos: float, clip: float, stop: bool
) -> Pair:
    """Loss and slope of each element with one label. Each implementation is held against the same, so it is kept.

    Operation by operation, each of which XLA compiles for each shape: padded to one of few lengths.
    """
    x = np.frombuffer(logits, np.float32)
    length = 4 ** max(5, math.ceil(math.log(max(x.size, 1), 4))) if x.size < 2**16 else x.size
    padded = jnp.asarray(np.pad(x, (0, length - x.size)))
    sided = jnp.full(length, label, jnp.float32)
    with optimising(True):
        value, pull = jax.vjp(lambda x: closed_form.asymmetric_loss(x, sided, gamma_neg, gamma_pos, clip), padded)
        slope = pull(jnp.ones_like(value))[0]
        if stop:  # the slope without focus, under the focus as a factor
            p, q = jax.nn.sigmoid(padded), jax.nn.sigmoid(-padded)
            bare = jax.grad(lambda x: closed_form.asymmetric_loss(x, sided, 0.0, 0.0, clip).sum())
            focus = jnp.power(q, gamma_pos) if label else jnp.power(jnp.maximum(p - clip, 0), gamma_neg)
            slope = focus * bare(padded)
    of_loss, of_slope = (np.asarray(part)[: x.size].reshape(shape) for part in (value, slope))
    return of_loss, of_slope


def scaled_error(found: NDArray[Any], truth: NDArray[Any]) -> NDArray[Any]:
    """|found - truth| / max(1, |truth|); 0 where both are the same infinity or both NaN, inf where one is."""
    f, t = np.asarray(found).astype(np.float64), np.asarray(truth)
    finite = np.isfinite(f) & np.isfinite(t)
    same = (f == t) | (np.isnan(f) & np.isnan(t))
    error = np.abs(np.where(finite, f, 0) - np.where(finite, t, 0)) / np.maximum(1, np.abs(np.where(finite, t, 1)))
    return np.where(finite, error, np.where(same, 0.0, np.inf))


def assert_no_worse(
    found: NDArray[Any],
    truth: NDArray[Any],
    careful: NDArray[Any],
    what: str,
    roundings: int = 0,
    only: Any = True,
) -> None:
    """The project's bound; `roundings` is how often the result was rounded to its own, smaller dtype."""
    assert found.shape == truth.shape, f"{what} has shape {found.shape}, expected {truth.shape}"
    only = np.broadcast_to(only, truth.shape)
    if not only.any():
        return
    allowed = 1.5 * np.max(scaled_error(careful, truth), where=only & np.isfinite(truth), initial=0.0) + 1e-6
    bound = np.full(truth.shape, allowed)
    if roundings:
        unit = roundings * float(jnp.finfo(found.dtype).eps) / 2
        finite = np.where(np.isfinite(truth), np.abs(truth), 0)
        bound = bound + unit * finite * (1 + allowed) / np.maximum(1, finite)
    excess = np.where(only, scaled_error(found, truth) - bound, -np.inf)
    worst = np.unravel_index(np.argmax(excess), truth.shape)
    assert excess[worst] <= 0, (
        f"{what} at {tuple(map(int, worst))}: {found[worst]!r}, in float64 {truth[worst]!r}, careful float32 "
        f"{careful[worst]!r}; error {scaled_error(found, truth)[worst]:.3g} of max(1, |truth|), "
        f"allowed {bound[worst]:.3g}; {int(np.sum(excess > 0))} of {truth.size} elements are off"
    )


def assert_parity(
    logits: NDArray[Any],
    labels: NDArray[Any],
    *,
    implementation: str | None,
    traced: tuple[str, ...] = (),
    cotangent: NDArray[Any] | None = None,
    form: Any = None,
    **options: Any,
) -> Pair:
    """Loss and gradient are as near to float64 as the bound asks, and have the promised dtypes.

    The loss gets the labels as they are, or in a `form`: PackedLabels or SparseLabels.
    """
    of_loss = {name: option for name, option in options.items() if name != "donate_logits"}  # that is for memory alone
    shape = float64.asymmetric_loss(logits, labels, **of_loss).shape
    ct = cotangent_of(shape) if cotangent is None else cotangent
    given = labels if form is None else form.from_dense(labels)
    value, slope = evaluate(logits, given, ct, implementation=implementation, traced=traced, **options)
    truth, true_slope = true_pair(logits, labels, ct, **of_loss)
    careful, careful_slope = careful_pair(logits, labels, ct, **of_loss)
    double = logits.dtype == np.float64
    assert value.dtype == (np.float64 if double else np.float32)
    assert slope.dtype == logits.dtype
    if double:
        # The yardstick is float32; what is computed in float64 has to be as good as float64 is.
        np.testing.assert_allclose(value, truth, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(slope, true_slope, rtol=1e-12, atol=1e-13)
        return value, slope
    near = away_from_the_margin(logits, options.get("clip", 0.05))
    assert_no_worse(value, truth, careful, "loss")
    roundings = 0 if logits.dtype == np.float32 else 2
    assert_no_worse(slope, true_slope, careful_slope, "gradient", roundings, only=near)
    return value, slope


def away_from_the_margin(logits: NDArray[Any], clip: float) -> NDArray[np.bool_]:
    """Where float32 is in no doubt on which side of the clip an element is: the gradient may jump there."""
    x = np.asarray(logits).astype(np.float64)
    if clip == 0:
        return np.ones(x.shape, bool)
    return ~(np.abs(x - np.log(clip / (1 - clip))) < 1e-5)
