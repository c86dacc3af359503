"""Whether labels hold what labels may: of concrete ones at once, of traced ones under checkify."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import checkify

from asl_pallas.bits import PADDING
from asl_pallas.kernels.tile import is_annotated
from asl_pallas.label_sources import is_traced
from asl_pallas.sharding import on_any_mesh

_checks_traced = contextvars.ContextVar("asl_pallas_checked_labels", default=False)


@contextlib.contextmanager
def checked_labels() -> Iterator[None]:
    """Traced labels are looked at too, by jax.experimental.checkify.

    A label that is traced can't be looked at while tracing. Within this context each call of a loss adds a
    `checkify.check` that dense labels are 0, 1 or `ignore_label` (soft ones between 0 and 1), unless `where` leaves
    them out, and that ids are classes or -1. It is for finding a fault: the check reads the labels once more, and
    entering and leaving the context clear JAX's caches of compiled functions, so that none without the check is used.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jax.experimental import checkify
      >>> from asl_pallas import asymmetric_loss, checked_labels
      >>> step = jax.jit(lambda logits, labels: asymmetric_loss(logits, labels).mean())
      >>> with checked_labels():
      ...     error, loss = checkify.checkify(step)(jnp.zeros((2, 3)), jnp.full((2, 3), 2))
      >>> print(error.get().partition(" (")[0])
      labels hold 2; expected 0 or 1
    """
    jax.clear_caches()
    token = _checks_traced.set(True)
    try:
        yield
    finally:
        _checks_traced.reset(token)
        jax.clear_caches()


def check_values(labels: Any, where: Any, ignore_label: int | None, unannotated_label: int | None = None) -> None:
    """Concrete labels are 0 or 1, or in between, unless left out. They are looked at even while others are traced."""
    others = tuple(number for number in (unannotated_label, ignore_label) if number is not None)
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if labels.dtype == bool:
        return
    allowed = "0 or 1" if jnp.issubdtype(labels.dtype, jnp.integer) else "between 0 and 1"
    if unannotated_label is not None and allowed == "0 or 1":
        allowed += f", or {unannotated_label} for what is not annotated"
    expected = allowed + ("" if ignore_label is None else f", or ignore_label={ignore_label}")
    if is_traced(labels) or is_traced(where):
        if _checks_traced.get():
            some_bad, value = _first_bad(labels, None if where is None else jnp.asarray(where), others)
            checkify.check(~some_bad, f"labels hold {{value}}; expected {expected}", value=value)
        return
    if any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in (labels, where)):
        return
    if isinstance(labels, jax.Array):
        if where is not None and not isinstance(where, jax.Array):
            where = jax.device_put(np.asarray(where, bool))
        with jax.ensure_compile_time_eval():
            some_bad, value = jax.device_get(_first_bad(labels, where, others))
    else:
        with np.errstate(invalid="ignore"):  # a NaN of ml_dtypes that is left out
            bad = _bad(labels, None if where is None else np.asarray(jax.device_get(where), bool), others)
        some_bad = bad.any()
        value = labels[bad][0] if some_bad else None
    if some_bad:
        raise ValueError(f"labels hold {value}; expected {expected}")


def check_ids(ids: Any, classes: int) -> None:
    """Traced ids are classes, or -1 for none. Concrete ones have been looked at when `SparseLabels` were made."""
    if is_traced(ids) and ids.size and _checks_traced.get():
        bad = (ids < PADDING) | (ids >= classes)
        value = ids.reshape(-1)[jnp.argmax(bad)]
        checkify.check(~bad.any(), f"ids hold {{value}}; expected 0 <= id < {classes}, or -1 for none", value=value)


def _bad(labels: Any, where: Any, others: tuple[int, ...]) -> Any:
    """Which labels are none; `others` than 0 and 1 are integers."""
    good = (labels >= 0) & (labels <= 1)  # not so for NaN
    if jnp.issubdtype(labels.dtype, jnp.integer):
        good = (labels == 0) | (labels == 1)
        for number in others:
            good |= ~is_annotated(labels, number)
    if where is not None:
        good |= ~where.reshape((1,) * (labels.ndim - where.ndim) + where.shape)
    return ~good


@functools.partial(jax.jit, static_argnums=2)
def _first_bad(labels: Array, where: Array | None, others: tuple[int, ...]) -> tuple[Array, Array]:
    """Whether any label is bad, and the first one that is, of arrays that may lie in any way on a mesh."""

    def look(labels: Array, where: Array | None) -> tuple[Array, Array]:
        bad = jnp.broadcast_to(_bad(labels, where, others), labels.shape).reshape(-1)
        if not bad.size:
            return jnp.any(bad), jnp.zeros((), labels.dtype)
        # No index: JAX makes its constants while it traces, which a transfer guard forbids.
        is_first = lax.iota(jnp.int32, bad.size) == lax.argmax(bad, 0, jnp.int32)
        return jnp.any(bad), jnp.sum(jnp.where(is_first, labels.reshape(-1), 0), dtype=labels.dtype)

    return on_any_mesh(look, labels, where)
