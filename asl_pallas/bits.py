"""Where the bits of packed labels lie, and how they are made and read on a device.

The bits lie as the TPU's vector registers want them: classes come in groups of 4096, a group has 128 words, and bit j
of word l is class 128 j + l of the group. A register of 128 neighbouring classes is then one shift and one mask away
from its group's words, and no lane moves.

Whole arrays are for XLA; what is called a tile is for the kernels, which decode no label otherwise.

Nothing here leans on JAX to promote a dtype or a rank, so that all of it runs where JAX is told not to. The constants
are 32 bits wide where JAX counts in 64, too.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

LANES = 128
BITS = 32
GROUP = LANES * BITS
# An id that is no class, in rows with fewer positives than others.
PADDING = -1


@functools.partial(jax.jit, inline=True)
def pack(dense: Array) -> Array:
    """(..., words) uint32 from (..., classes), bool or integers, of which those above 0 are positive."""
    *leading, classes = dense.shape
    needed = words_for(classes)
    fill = [(0, 0)] * len(leading) + [(0, needed * BITS - classes)]
    bits = jnp.pad(_positive(dense), fill, constant_values=np.bool_(False))
    by_bit = bits.reshape(*leading, needed // LANES, BITS, LANES).astype(jnp.uint32)
    by_bit = by_bit << _numbers(by_bit.ndim, BITS)
    return jnp.sum(by_bit, axis=-2, dtype=jnp.uint32).reshape(*leading, needed)


def _positive(dense: Array) -> Array:
    return dense if dense.dtype == jnp.bool_ else dense > 0


def words_for(classes: int) -> int:
    """How many words hold a row."""
    return -(-classes // GROUP) * LANES


@functools.partial(jax.jit, static_argnums=1, inline=True)
def unpack(words: Array, classes: int) -> Array:
    """(..., classes) bool from (..., words), in an expression that XLA fuses with what reads it."""
    *leading, needed = words.shape
    groups = words.reshape(*leading, needed // LANES, LANES)
    return unpack_bits(groups, 0, BITS).reshape(*leading, needed * BITS)[..., :classes]


def unpack_bits(groups: Array, first: Array | int, bits: int) -> Array:
    """Bool (..., 128 bits) from the (..., 128) words of groups: what `bits` bits from `first` on say."""
    *leading, lanes = groups.shape
    shifts = _numbers(groups.ndim + 1, bits) + jnp.asarray(first).astype(jnp.uint32)
    return ((groups[..., None, :] >> shifts) & np.uint32(1) != 0).reshape(*leading, bits * lanes)


def _numbers(ndim: int, bits: int) -> Array:
    """The number of every bit, uint32, along the second last of `ndim` dimensions."""
    return lax.broadcasted_iota(jnp.uint32, (1,) * (ndim - 2) + (bits, LANES), ndim - 2)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def pack_ids(ids: Array, classes: int) -> Array:
    """(..., words) uint32 from (..., k); what is no class is dropped."""
    *leading, k = ids.shape
    needed = words_for(classes)
    # Sorted, an id that comes twice has itself before it, and what is left can be added instead of or-ed.
    flat = jnp.sort(ids.reshape(math.prod(leading), k), axis=-1)
    fresh = jnp.concatenate([jnp.ones_like(flat[:, :1], bool), flat[:, 1:] != flat[:, :-1]], axis=-1)[:, :k]
    keep = fresh & (flat >= 0) & (flat < classes)
    word, bit = word_and_bit(flat)
    word = jnp.where(keep, word, np.int32(needed))
    bit = jnp.uint32(1) << bit.astype(jnp.uint32)

    def row(word: Array, bit: Array) -> Array:
        return jnp.zeros(needed, jnp.uint32).at[word].add(bit, mode="drop")

    return jax.vmap(row)(word, bit).reshape(*leading, needed)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def find_ids(dense: Array, k: int) -> Array:
    """(..., k) int32, the ids of the first k positives of (..., classes), ascending; by a sort of every row."""
    classes = dense.shape[-1]
    numbers = lax.broadcasted_iota(jnp.int32, dense.shape, dense.ndim - 1)
    ids = jnp.sort(jnp.where(_positive(dense), numbers, np.int32(classes)), axis=-1)[..., :k]
    return pad_ids(jnp.where(ids < classes, ids, np.int32(PADDING)), k)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def pad_ids(ids: Array, k: int) -> Array:
    """(..., k) from fewer ids a row."""
    fill = [(0, 0)] * (ids.ndim - 1) + [(0, k - ids.shape[-1])]
    return jnp.pad(ids, fill, constant_values=ids.dtype.type(PADDING))


@functools.partial(jax.jit, static_argnums=2, inline=True)
def cut(words: Array, first: Array | int, classes: int) -> Array:
    """The words of `classes` classes from class `first` on, which need be no multiple of anything.

    Args:
      words: (..., words) of all classes, at least first + classes.
      first: an integer, traced or not.
    """
    *leading, held = words.shape
    groups = words_for(classes) // LANES
    first = jnp.asarray(first, jnp.int32)
    group, bits, lanes = first >> 12, (first >> 7) & (BITS - 1), first & (LANES - 1)
    fill = [(0, 0)] * len(leading) + [(0, 2), (0, 0)]
    by_group = jnp.pad(words.reshape(*leading, held // LANES, LANES), fill, constant_values=np.uint32(0))
    axis = len(leading)
    here, after = (
        jnp.roll(lax.dynamic_slice_in_dim(by_group, group + k, groups, axis), -lanes, axis=-1) for k in (0, 1)
    )
    # Class 128 b + l of the cut is class 128 (b + bits) + l + lanes of what is here: where l + lanes passes 128, one
    # bit more. A shift by 32 bits has no meaning.
    at_lane = lax.broadcasted_iota(jnp.int32, (1,) * (here.ndim - 1) + (LANES,), here.ndim - 1)
    shift = jnp.where(at_lane + lanes >= LANES, bits + 1, bits).astype(jnp.uint32)
    none, most = np.uint32(0), np.uint32(BITS - 1)
    low = jnp.where(shift < BITS, here >> jnp.minimum(shift, most), none)
    high = jnp.where(shift > 0, after << jnp.minimum(BITS - shift, most), none)
    return (low | high).reshape(*leading, groups * LANES)


def unpack_tile(words: Array, first: Array | int, blocks: int) -> Array:
    """Bool (rows, 128 blocks) from the (rows, 128) words of a group: what bits `first` and on say.

    In signed integers, whose arithmetic Mosaic knows on every chip.
    """
    words = words.astype(jnp.int32)
    bits = [words & lax.shift_left(jnp.int32(1), jnp.int32(first + b)) for b in range(blocks)]
    return (jnp.concatenate(bits, axis=1) if blocks > 1 else bits[0]) != 0


def pack_tile(words: Array, ids: Array, first: Array, classes: int) -> Array:
    """(128, rows) words, int32, of the at most 4096 classes from `first` on, with the bits of (k, rows) ids added.

    On a TPU, comparing every word's number with every id is far faster than setting single bits. With the rows along
    the lanes an id is spread over the words of its row without a lane being moved: k=16 ids take 0.5 bundles per 1024
    elements on v5e, and 2.5 with the rows along the sublanes.
    """
    local = ids - first
    inside = (local >= 0) & (local < classes)
    bit = jnp.where(inside, lax.shift_left(jnp.int32(1), (local >> 7) & (BITS - 1)), np.int32(0))
    word = local & (LANES - 1)
    shape = words.shape
    numbers = lax.broadcasted_iota(jnp.int32, shape, 0)
    for t in range(ids.shape[0]):
        words |= jnp.where(numbers == word[t : t + 1], jnp.broadcast_to(bit[t : t + 1], shape), np.int32(0))
    return words


def word_and_bit(label: Array) -> tuple[Array, Array]:
    """Where the bit of a class is."""
    return (label >> 12 << 7) | (label & (LANES - 1)), (label >> 7) & (BITS - 1)


def byte_tile(ids: Array, classes: int) -> Array:
    """(rows, classes / 8), int32: bit b of byte n says whether the (rows, 1) id is 8 n + b.

    On a GPU eight neighbouring classes are one thread's, so that bytes become labels without leaving it.
    """
    numbers = lax.broadcasted_iota(jnp.int32, (1, classes // 8), 1)
    return jnp.where(numbers == ids >> 3, lax.shift_left(jnp.int32(1), ids & 7), np.int32(0))


def unpack_bytes(bits: Array) -> Array:
    """Bool (rows, 8 n) from (rows, n)."""
    rows, n = bits.shape
    spread = jnp.broadcast_to(bits[:, :, None], (rows, n, 8)) >> lax.broadcasted_iota(jnp.int32, (1, 1, 8), 2)
    return (spread & 1 != 0).reshape(rows, 8 * n)
