"""Encoded labels under JAX's switches: no promotion of dtypes or ranks, 64 bits, no jit, no leaks, no transfers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from test_labels_loading import DENSE

from asl_pallas import PackedLabels, SparseLabels, bits

SWITCHES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "strict dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "64 bits": lambda: jax.enable_x64(True),
    "no jit": jax.disable_jit,
    "leaks": jax.checking_leaks,
    "NaNs": lambda: jax.debug_nans(True),
    "no transfers": lambda: jax.transfer_guard("disallow"),
}
PACKED = PackedLabels.from_dense(DENSE)
K = 30
SPARSE = SparseLabels.from_dense(DENSE, K)
ARRAYS = {
    "bool": DENSE,
    "int8": DENSE.astype(np.int8),
    "packed": PACKED,
    "sparse": SPARSE,
    "short": SparseLabels.from_dense(DENSE),
    "wide": SPARSE.ids.astype(np.int16),
    "order": np.array([3, 0]),
    "first": np.int32(77),
}
# What is found, and the dense labels that it has to hold. Each takes the arrays above, as NumPy's, JAX's or traced.
FUNCTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], Any]] = {
    "PackedLabels.from_dense": (lambda a: PackedLabels.from_dense(a["bool"]), DENSE),
    "PackedLabels.from_dense of int8": (lambda a: PackedLabels.from_dense(a["int8"]), DENSE),
    "PackedLabels.from_ids": (lambda a: PackedLabels.from_ids(a["wide"], 200), DENSE),
    "PackedLabels.to_sparse": (lambda a: a["packed"].to_sparse(K), DENSE),
    "PackedLabels.to_dense": (lambda a: a["packed"], DENSE),
    "PackedLabels.concatenate": (lambda a: PackedLabels.concatenate([a["packed"]] * 2), np.concatenate([DENSE] * 2)),
    "PackedLabels.stack": (lambda a: PackedLabels.stack([a["packed"]] * 2), np.stack([DENSE] * 2)),
    "PackedLabels.checked": (lambda a: a["packed"].checked(), DENSE),
    "SparseLabels.from_dense": (lambda a: SparseLabels.from_dense(a["bool"], K), DENSE),
    "SparseLabels.from_dense of int8": (lambda a: SparseLabels.from_dense(a["int8"], K), DENSE),
    "SparseLabels.from_ids": (lambda a: SparseLabels.from_ids(a["wide"], 200, K + 1), DENSE),
    "SparseLabels.to_packed": (lambda a: a["sparse"].to_packed(), DENSE),
    "SparseLabels.to_dense": (lambda a: a["sparse"], DENSE),
    "SparseLabels.concatenate": (
        lambda a: SparseLabels.concatenate([a["sparse"], a["short"]]),
        np.concatenate([DENSE] * 2),
    ),
    "SparseLabels.stack": (lambda a: SparseLabels.stack([a["short"], a["sparse"]], k=K + 1), np.stack([DENSE] * 2)),
    "SparseLabels.checked": (lambda a: a["sparse"].checked(), DENSE),
    "iteration": (lambda a: list(a["packed"])[1], DENSE[1]),
    "from_csr": (lambda a: SparseLabels.from_csr(scipy.sparse.csr_array(DENSE[:, 0]), K), DENSE[:, 0]),
    "from_lists": (lambda a: PackedLabels.from_ids([[1], []], 2), np.array([[False, True], [False, False]])),
    "index": (lambda a: a["sparse"][a["order"]], DENSE[[3, 0]]),
    "integer index": (lambda a: a["packed"][-1], DENSE[-1]),
    "slice": (lambda a: a["packed"][1:3, 0], DENSE[1:3, 0]),
    "cut": (lambda a: PackedLabels(bits.cut(jnp.asarray(a["packed"].words), a["first"], 99), 99), DENSE[..., 77:176]),
}


def all_of(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: function(arrays).to_dense() for name, (function, _) in FUNCTIONS.items()}


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_function_works_under_every_switch(switch):
    on_device = jax.tree.map(jnp.asarray, ARRAYS)
    with SWITCHES[switch]():
        found = {"traced": jax.jit(all_of)(on_device)}
        if switch == "no transfers":
            # NumPy's would be some, and JAX itself takes an index of its own arrays for one.
            names = FUNCTIONS.keys() - {"index", "integer index", "slice"}
            found["jax"] = {name: FUNCTIONS[name][0](on_device).to_dense() for name in names}
        else:
            found["jax"], found["host"] = all_of(on_device), all_of(ARRAYS)
    for where, results in found.items():
        for name, result in results.items():
            np.testing.assert_array_equal(result, FUNCTIONS[name][1], err_msg=f"{name}, {where}")


TILES: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "unpack_tile": (lambda w, f: bits.unpack_tile(w, f, 4), [np.uint32([[2**31 + 7] * 128] * 8), np.int32(1)]),
    "unpack_tile from 0": (lambda w: bits.unpack_tile(w, 0, 1), [np.uint32([[5] * 128] * 8)]),
    "pack_tile": (
        lambda w, i, f: bits.pack_tile(w, i, f, 4096),
        [np.zeros((128, 128), np.int32), np.full((3, 128), 4099, np.int32), np.int32(4096)],
    ),
    "word_and_bit": (bits.word_and_bit, [np.int32([[4099, 128]])]),
    "byte_tile": (lambda i: bits.byte_tile(i, 1024), [np.int32([[77], [-1]])]),
    "unpack_bytes": (bits.unpack_bytes, [np.int32([[3, 200]])]),
    "unpack_bits": (lambda w, f: bits.unpack_bits(w, f, 8), [np.uint32([[[3] * 128]] * 2), np.int32(1)]),
    "pack": (bits.pack, [DENSE]),
    "unpack": (lambda w: bits.unpack(w, 200), [PACKED.words]),
    "pack_ids": (lambda i: bits.pack_ids(i, 200), [SPARSE.ids]),
    "find_ids": (lambda d: bits.find_ids(d, 5), [DENSE]),
    "pad_ids": (lambda i: bits.pad_ids(i, K + 1), [SPARSE.ids]),
    "cut": (lambda w, f: bits.cut(w, f, 99), [PACKED.words, np.int32(77)]),
}


def all_tiles(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: function(*arguments[name]) for name, (function, _) in TILES.items()}


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_tile_is_the_same_under_every_switch(switch):
    arguments = {name: [jnp.asarray(a) for a in given] for name, (_, given) in TILES.items()}
    expected = jax.jit(all_tiles)(arguments)
    with SWITCHES[switch]():
        found = jax.jit(all_tiles)(arguments)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.mostly_long(short=8)
@pytest.mark.parametrize("name", TILES)
def test_nothing_is_64_bits_wide_where_jax_counts_in_64(name):
    function, arguments = TILES[name]
    with jax.enable_x64(True):
        assert "64[" not in str(jax.make_jaxpr(function)(*arguments))
