"""How operands come to a TPU kernel's block, and words that are made of ids there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from asl_pallas.bits import PADDING
from asl_pallas.kernels.operands import Form
from asl_pallas.kernels.tiling import LANES, TPU_IDS, TpuTiling, tpu_ids


class Laid(NamedTuple):
    """How a block of an operand comes to a kernel, and the memory that it is rewritten to first, if it is."""

    array: Array
    spec: pl.BlockSpec
    converted: Any = None  # of the block's own extent
    spread: Any = None  # [rows, LANES]: a number per row, in each lane
    words: Any = None  # [rows, LANES], made of ids


def lay_encoded(form: Form, labels: Array, tiling: TpuTiling) -> Laid:
    """Words of the block's group of classes, or all ids of its rows."""
    if form == "packed":
        spec = pl.BlockSpec((tiling.rows, LANES), lambda i, j: (i, quotient(j, tiling.blocks_of_words)))
        return Laid(labels, spec)
    # Rows along the lanes: as (rows, k) they would fill 128 lanes a row, and of no use in a register.
    fill = tpu_ids(labels.shape[1]) - labels.shape[1]
    ids = jnp.pad(labels, ((0, 0), (0, fill)), constant_values=PADDING).T
    spec = pl.BlockSpec((ids.shape[0], tiling.rows), lambda i, j: (jnp.int32(0), i))
    return Laid(ids, spec, words=pltpu.VMEM((tiling.rows, LANES), jnp.int32))


def quotient(n: Array, k: int) -> Array:
    """n // k for n >= 0. The operator asks for a sign, whose lowering asks which chip this process has."""
    return lax.div(n, jnp.int32(k))


def pack_rows(ids, words, tiles: Array, pack: Callable[[Array, Array], Array]) -> None:
    """The words of the block's rows, which are made of their ids 128 rows at a time."""

    def rows(r, _):
        at = pl.ds(pl.multiple_of(r * LANES, LANES), LANES)

        def some(t, packed):
            return pack(packed, ids[pl.ds(pl.multiple_of(t * TPU_IDS, TPU_IDS), TPU_IDS), at])

        turns, none = jnp.int32(ids.shape[0] // TPU_IDS), jnp.zeros((LANES, LANES), jnp.int32)
        words[at, :] = lax.fori_loop(jnp.int32(0), turns, some, none).T

    lax.fori_loop(jnp.int32(0), tiles, rows, None)
