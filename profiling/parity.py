"""How exact a loss is: every element against float64, by dtype and by region of the logits.

    from profiling import parity
    verdict = parity.check(my_loss)
    print(verdict)
    assert verdict.holds

The bound is the project's. In units of max(1, |truth|) an error may be at most 1.5 times that of the careful float32
version (`reference.closed_form`) on the same logits, plus 1e-6, and the rounding of a gradient to a smaller dtype comes
on top. Infinite and NaN results have to be the same. For float64 logits the bound is 1e-12.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from asl_pallas import asymmetric_loss, kernels
from asl_pallas.kernels.tile import Operands
from profiling import results
from profiling.cases import CPU, GPU, TPU
from profiling.results import Row
from profiling.session import Session, described, device_of
from reference import closed_form, float64

Array = NDArray[Any]
DTYPES = ("float32", "bfloat16", "float16", "float64")
# gamma_neg, gamma_pos, clip: the paper's, cross-entropy, focal loss, exponents between 0 and 1, a wide margin.
SETTINGS = ((4.0, 1.0, 0.05), (0.0, 0.0, 0.0), (2.0, 2.0, 0.0), (0.5, 2.5, 0.05), (1.0, 4.0, 0.2))
REGIONS = ("bulk", "left tail", "right tail", "clip boundary", "infinities", "row sums")
COLUMNS = 384
FACTOR, PLUS, DOUBLE = 1.5, 1e-6, 1e-12
_LOWERED = {CPU: "cpu", GPU: "cuda", TPU: "tpu"}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a check found: a row by dtype and region, and whether every bound holds."""

    rows: tuple[Row, ...]

    @property
    def holds(self) -> bool:
        return not any(row.broken or row.status == results.FAILED for row in self.rows)

    def __str__(self) -> str:
        from profiling import tables

        return tables.as_text(tables.of(self.rows))


def check(
    loss: Callable[..., Any],
    *,
    name: str = "",
    dtypes: Iterable[str] = DTYPES,
    settings: Iterable[tuple[float, float, float]] = SETTINGS,
) -> Verdict:
    """Measures a loss, and its gradient by JAX's reverse mode, against float64.

    Args:
      loss: called as loss(logits, labels, gamma_neg=, gamma_pos=, clip=, axis=) with logits of shape (rows, classes),
        int8 labels of 0 and 1, Python numbers, and axis () for a loss an element or -1 for a sum over the classes.
      name: what the rows call it; by default its own name.
      dtypes: of the logits, among float32, bfloat16, float16 and float64.
      settings: triples (gamma_neg, gamma_pos, clip), clip in [0, 1).

    Returns:
      A Verdict. A loss that raises has a row that says so, and the verdict doesn't hold.

    Raises:
      ValueError: an unknown dtype.
    """
    settings = tuple(settings)
    rows: list[Row] = []
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"dtype {dtype!r}; expected among {', '.join(DTYPES)}")
        rows += _of_dtype(loss, name or getattr(loss, "__name__", "loss"), dtype, settings)
    return Verdict(tuple(rows))


def measure(session: Session) -> None:
    """Every implementation of ours: on its own platform as it runs, elsewhere in Pallas's interpreter."""
    backend = session.request.backend
    if backend not in session.request.places():
        return
    names = [contender.implementation for contender in session.request.contenders() if contender.implementation]
    settings = SETTINGS[:3] if session.request.quick else SETTINGS
    with session.progress() as progress:
        task = progress.add_task("parity", total=len(names) * len(DTYPES))
        for name in names:
            interpreted = kernels.PLATFORMS[name] not in (None, _LOWERED[backend])
            for dtype in DTYPES:
                progress.update(task, description=f"parity: {name}, {dtype}")
                try:
                    session.rows += _of_implementation(name, dtype, settings, interpreted)
                except KeyboardInterrupt:
                    session.cut_short = True
                    return
                progress.advance(task)


def _of_implementation(name: str, dtype: str, settings: tuple[Any, ...], interpreted: bool) -> list[Row]:
    def loss(logits: Any, labels: Any, **options: Any) -> Any:
        with kernels.interpret_mode() if interpreted else contextlib.nullcontext():
            return asymmetric_loss(logits, labels, implementation=name, **options)

    logits: Any = jax.ShapeDtypeStruct((1, COLUMNS), dtype)
    labels: Any = jax.ShapeDtypeStruct((1, COLUMNS), jnp.int8)
    if reason := kernels.refusal(name, Operands(logits, labels)):
        return [Row("parity", _device(), dtype, name, region, {}, results.UNSERVED, reason) for region in REGIONS]
    note = "in Pallas's interpreter" if interpreted else ""
    return [dataclasses.replace(row, note=row.note or note) for row in _of_dtype(loss, name, dtype, settings)]


def _device() -> str:
    return device_of(jax.default_backend())


def _of_dtype(loss: Callable[..., Any], name: str, dtype: str, settings: tuple[Any, ...]) -> list[Row]:
    """One row a region, the worst over all settings."""
    worst: dict[str, dict[str, Any]] = {}
    double = jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext()
    try:
        with double:
            for setting in settings:
                for region, figures in _errors(loss, dtype, *setting).items():
                    worst[region] = _worse(worst.get(region), figures)
    except Exception as error:  # the loss's, of any kind
        return [Row("parity", _device(), dtype, name, "all", {}, results.FAILED, described(error))]
    return [
        Row("parity", _device(), dtype, name, region, worst[region], note=_broken(worst[region]))
        for region in REGIONS
        if region in worst
    ]


def _broken(figures: dict[str, Any]) -> str:
    return "" if figures["holds"] else f"beyond the bound at {figures['broken_at']}"


def _worse(before: dict[str, Any] | None, now: dict[str, Any]) -> dict[str, Any]:
    if before is None:
        return now
    merged = {key: max(before[key], now[key]) for key in now if key not in ("holds", "broken_at")}
    broken_at = before["broken_at"] or now["broken_at"]
    return {**merged, "holds": before["holds"] and now["holds"], "broken_at": broken_at}


def logits_of(clip: float) -> dict[str, Array]:
    """Logits by region, rows of COLUMNS of them, in float64."""
    random = np.random.default_rng(0)
    far = np.geomspace(12, 1e4, COLUMNS)
    found = {
        "bulk": np.clip(random.normal(0, 4, (8, COLUMNS)), -12, 12),
        "left tail": -far[None],
        "right tail": far[None],
        "infinities": np.resize([-np.inf, np.inf, np.nan], (1, COLUMNS)),
    }
    if clip:
        away = np.geomspace(1e-4, 1, COLUMNS // 2)
        found["clip boundary"] = np.log(clip / (1 - clip)) + np.concatenate([-away, away])[None]
    return found


def _errors(
    loss: Callable[..., Any], dtype: str, gamma_neg: float, gamma_pos: float, clip: float
) -> dict[str, dict[str, Any]]:
    """Errors by region at one setting: of losses by element, of the gradient of sums over classes, of those sums."""
    regions = logits_of(clip)
    x = np.concatenate(list(regions.values())).astype(jnp.dtype(dtype))
    # Both labels at every logit: a row, and the row with the labels the other way round.
    y = (np.arange(x.size).reshape(x.shape) % 2).astype(np.int8)
    x, y = np.concatenate([x, x]), np.concatenate([y, 1 - y])
    where = np.concatenate([np.repeat(list(regions), [len(r) for r in regions.values()])] * 2)
    options: dict[str, Any] = {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip}

    logits, labels = jnp.asarray(x), jnp.asarray(y)
    element = np.asarray(jax.jit(lambda x, y: loss(x, y, axis=(), **options))(logits, labels))
    sums, pull = jax.vjp(jax.jit(lambda x: loss(x, labels, axis=-1, **options)), logits)
    slope = np.asarray(pull(jnp.ones_like(sums))[0])
    true_element = float64.asymmetric_loss(x, y, axis=(), **options)
    true_slope = float64.gradient(x, y, **options)
    true_sums = float64.asymmetric_loss(x, y, **options)

    careful_x = jnp.asarray(x.astype(np.float32))
    value, pull = jax.vjp(lambda x: closed_form.asymmetric_loss(x, labels, gamma_neg, gamma_pos, clip), careful_x)
    careful, careful_slope = np.asarray(value), np.asarray(pull(jnp.ones_like(value))[0])
    careful_sums = np.asarray(value.sum(-1))

    # Where float32 is in doubt on which side of the margin a logit is, the gradient may be either side's.
    sure = np.ones(x.shape, bool)
    if clip:
        sure = ~(np.abs(x.astype(np.float64) - np.log(clip / (1 - clip))) < 1e-5)
    found = {}
    for region in regions:
        at = where == region
        everywhere = np.ones(x[at].shape, bool)
        of_loss = _compare("loss", element[at], true_element[at], careful[at], dtype, everywhere)
        of_slope = _compare("gradient", slope[at], true_slope[at], careful_slope[at], dtype, sure[at])
        found[region] = _joined([of_loss, of_slope], x[at], options)
    at = where == "bulk"
    of_sums = _compare("loss", np.asarray(sums)[at], true_sums[at], careful_sums[at], dtype, np.ones(at.sum(), bool))
    found["row sums"] = _joined([of_sums], x[at][:, 0], options)
    return found


@dataclasses.dataclass(frozen=True)
class _Comparison:
    figures: dict[str, float]
    excess: Array  # how far beyond the bound, element by element; at most 0 where it holds


def _compare(what: str, found: Array, truth: Array, careful: Array, dtype: str, only: NDArray[np.bool_]) -> _Comparison:
    error, of_careful = _scaled(found, truth), _scaled(careful, truth)
    if dtype == "float64":
        bound = np.full(truth.shape, DOUBLE)
    else:
        finite = np.where(np.isfinite(truth), np.abs(truth), 0)
        allowed = FACTOR * float(np.max(of_careful, where=only & np.isfinite(truth), initial=0)) + PLUS
        bound = np.full(truth.shape, allowed)
        if what == "gradient" and dtype != "float32":
            bound += float(jnp.finfo(dtype).eps) / 2 * finite * (1 + allowed) / np.maximum(1, finite)
    figures: dict[str, float] = {}
    # A gradient is as good as its dtype lets it be: the careful one is shown in the same.
    shown = careful.astype(found.dtype) if what == "gradient" and dtype != "float64" else careful
    for prefix, values in ((what, found), (f"careful_{what}", shown)):
        absolute, relative, ulps = _distances(values, truth)
        largest = {"abs": absolute, "rel": relative, "ulps": ulps}
        figures |= {f"{prefix}_{k}": float(np.max(v, where=only, initial=0)) for k, v in largest.items()}
    return _Comparison(figures, np.where(only, error - bound, -np.inf))


def _joined(comparisons: list[_Comparison], x: Array, options: dict[str, float]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    broken_at = ""
    for comparison in comparisons:
        figures |= comparison.figures
        worst = np.unravel_index(np.argmax(comparison.excess), comparison.excess.shape)
        if not comparison.excess[worst] <= 0:
            what = next(iter(comparison.figures)).removesuffix("_abs")
            broken_at = f"logit {float(x[worst]):g} ({what}, {', '.join(f'{k}={v:g}' for k, v in options.items())})"
    return {**figures, "holds": not broken_at, "broken_at": broken_at}


def _scaled(found: Array, truth: Array) -> Array:
    """|found - truth| / max(1, |truth|); 0 for the same infinity or two NaNs, infinite where only one is."""
    f = np.asarray(found).astype(np.float64)
    finite = np.isfinite(f) & np.isfinite(truth)
    with np.errstate(invalid="ignore"):
        error = np.abs(f - truth) / np.maximum(1, np.abs(truth))
    return np.where(finite, error, np.where((f == truth) | (np.isnan(f) & np.isnan(truth)), 0.0, np.inf))


def _distances(found: Array, truth: Array) -> tuple[Array, Array, Array]:
    """Absolute error, error over |truth| where that is a normal number, and error in units in the last place."""
    info = jnp.finfo(found.dtype)
    f = np.asarray(found).astype(np.float64)
    finite = np.isfinite(f) & np.isfinite(truth)
    same = (f == truth) | (np.isnan(f) & np.isnan(truth))
    size = np.where(finite, np.abs(truth), 1)
    tiny = float(info.tiny)
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(f - truth), np.where(same, 0.0, np.inf))
    relative = np.where(size >= tiny, error / np.maximum(size, tiny), 0)
    unit = 2.0 ** np.floor(np.log2(np.maximum(size, tiny))) * float(info.eps)
    return error, relative, error / unit
