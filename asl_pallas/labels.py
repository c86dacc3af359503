"""Hard labels without a byte an element: one bit each, or the ids of the positives.

Both stand where a dense (..., classes) array would and are pytrees, so that they pass through `jax.jit`, `jax.vmap`,
`jax.lax.scan`, `jax.device_put` and `jax.export` as arrays do. Made from NumPy or Python they hold NumPy arrays, in
host memory; made from JAX arrays they hold JAX arrays.

The bits lie as the TPU's vector registers want them: classes come in groups of 4096, a group has 128 words, and bit j
of word l is class 128 j + l of the group. A register of 128 neighbouring classes is then one shift and one mask away
from its group's words, and no lane moves.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

LANES = 128
BITS = 32
GROUP = LANES * BITS
# An id that is no class, in rows with fewer positives than others.
PADDING = -1

Ids = Sequence[Iterable[int]] | NDArray[np.integer] | Array
_Self = TypeVar("_Self", bound="_Labels")


class CsrMatrix(Protocol):
    """What is asked of a scipy.sparse.csr_array or csr_matrix, so that SciPy need not be there."""

    shape: tuple[int, ...]
    indptr: NDArray[Any]
    indices: NDArray[Any]
    data: NDArray[Any]


class _Labels:
    """What both forms share: one array whose leading dimensions are the labels', and a static class count."""

    _array_name: str
    classes: int

    def __init__(self, array: Any, classes: int):
        self.classes = check_classes(classes)
        setattr(self, self._array_name, self._checked(array))

    def _checked(self, array: Any) -> Any:
        raise NotImplementedError

    @property
    def _array(self) -> Any:
        return getattr(self, self._array_name)

    def _with(self: _Self, array: Any) -> _Self:
        """The same with another array, unchecked."""
        return self.tree_unflatten(self.classes, (array,))

    def checked(self: _Self) -> _Self:
        """Itself, with every check of the constructor: one that comes out of a pytree hasn't been looked at."""
        return type(self)(self._array, self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., classes), as a dense array's."""
        return (*self._array.shape[:-1], self.classes)

    @property
    def ndim(self) -> int:
        return len(self._array.shape)

    @property
    def dtype(self) -> np.dtype:
        """bool, as a dense array's."""
        return np.dtype(bool)

    def __len__(self) -> int:
        if self.ndim < 2:
            raise TypeError(f"{type(self).__name__} of shape {self.shape} has no leading dimension")
        return self._array.shape[0]

    def __getitem__(self: _Self, index: Any) -> _Self:
        """Some of the examples, `labels[2:5]` or `labels[permutation]`; the classes stay whole."""
        index = index if isinstance(index, tuple) else (index,)
        if any(entry is Ellipsis for entry in index):
            raise IndexError(f"{type(self).__name__} take an index of their leading dimensions alone, so no ...")
        return self._with(self._array[(*index, Ellipsis, slice(None))])

    def __repr__(self) -> str:
        array = self._array
        held = f"{array.dtype}{list(array.shape)}" if hasattr(array, "dtype") else repr(array)
        return f"{type(self).__name__}({self._array_name}={held}, classes={self.classes})"

    def tree_flatten_with_keys(self) -> tuple[Any, int]:
        return ((jax.tree_util.GetAttrKey(self._array_name), self._array),), self.classes

    def tree_flatten(self) -> tuple[Any, int]:
        return (self._array,), self.classes

    @classmethod
    def tree_unflatten(cls: type[_Self], classes: int, children: Any) -> _Self:
        """Without a check: JAX puts more than arrays into a pytree."""
        made = object.__new__(cls)
        made.classes = classes
        setattr(made, cls._array_name, children[0])
        return made


@jax.tree_util.register_pytree_with_keys_class
class PackedLabels(_Labels):
    """Hard labels of one bit each, an eighth of int8's memory and traffic.

    Args:
      words: (..., 128 ceil(classes / 4096)), uint32, NumPy or JAX. Bit j of word 128 g + l is class
        4096 g + 128 j + l. Bits beyond the classes are ignored.
      classes: how many there are. Groups of 4096 are always whole, so 80 classes take 512 bytes an example, where int8
        takes 80: this form pays off from some hundreds of classes on.

    Raises:
      TypeError: words of another dtype, classes that are no integer.
      ValueError: words too few or too many for the classes.
    """

    _array_name = "words"
    words: Any

    def __init__(self, words: Any, classes: int):
        super().__init__(words, classes)

    def _checked(self, words: Any) -> Any:
        words = words if hasattr(words, "dtype") else np.asarray(words)
        if words.dtype != np.uint32:
            raise TypeError(f"words have dtype {words.dtype}; expected uint32")
        needed = words_for(self.classes)
        if not words.shape or words.shape[-1] != needed:
            raise ValueError(
                f"words have shape {tuple(words.shape)}; {self.classes} classes need (..., {needed}), 128 for every "
                "4096 classes or part of them"
            )
        return words

    @classmethod
    def from_dense(cls, labels: Any) -> PackedLabels:
        """From (..., classes) of bool or the integers 0 and 1; a JAX array is packed where it is, traced or not.

        On a mesh whose axes are Explicit, JAX can't pack what is sharded along the classes: pack first, shard then.

        Raises:
          TypeError: another dtype. A float may be a soft label, which no bit holds.
          ValueError: concrete NumPy labels beside 0 and 1. Those of JAX aren't fetched to be looked at: above 0 is 1.
        """
        dense = _dense(labels)
        if isinstance(dense, jax.Array):
            return cls(_pack(dense), dense.shape[-1])
        bits = _padded(dense, words_for(dense.shape[-1]) * BITS, np)
        by_bit = bits.reshape(*bits.shape[:-1], bits.shape[-1] // GROUP, BITS, LANES)
        words = np.zeros((*by_bit.shape[:-2], LANES), np.uint32)
        for j in range(BITS):
            words |= by_bit[..., j, :].astype(np.uint32) << np.uint32(j)
        return cls(words.reshape(*dense.shape[:-1], words_for(dense.shape[-1])), dense.shape[-1])

    @classmethod
    def from_ids(cls, ids: Ids, classes: int) -> PackedLabels:
        """From the ids of the positives, as `SparseLabels.from_ids` takes them."""
        if isinstance(ids, (np.ndarray, jax.Array)):
            return SparseLabels(ids, classes).to_packed()
        rows, flat, counts = _flatten(ids)
        return _packed_pairs(rows, _check_ids(flat, check_classes(classes), padding=False), (len(counts),), classes)

    @classmethod
    def from_csr(cls, matrix: CsrMatrix) -> PackedLabels:
        """From a SciPy CSR matrix or array (examples, classes), as `SparseLabels.from_csr` takes it."""
        counts, flat = _read_csr(matrix)
        rows = np.repeat(np.arange(len(counts)), counts)
        return _packed_pairs(rows, flat, (len(counts),), int(matrix.shape[1]))

    def to_dense(self) -> Any:
        """(..., classes), bool: NumPy from NumPy, JAX from JAX."""
        if isinstance(self.words, np.ndarray):
            *leading, needed = self.words.shape
            by_byte = self.words.astype("<u4").view(np.uint8).reshape(*leading, needed // LANES, LANES, 4)
            bits = np.unpackbits(np.swapaxes(by_byte, -1, -2), axis=-2, bitorder="little")
            return bits.view(bool).reshape(*leading, needed * BITS)[..., : self.classes]
        return unpack(self.words, self.classes)

    def to_sparse(self, k: int | None = None) -> SparseLabels:
        """The same labels as ascending ids.

        Args:
          k: ids a row, as in `SparseLabels.from_dense`.
        """
        if _is_traced(self.words):
            return SparseLabels.from_dense(self.to_dense(), k)
        words = np.asarray(self.words)
        wide = words.reshape(math.prod(words.shape[:-1]), words.shape[-1])
        at_rows, at_words = np.nonzero(wide)
        which, bits = np.nonzero((wide[at_rows, at_words][:, None] >> np.arange(BITS, dtype=np.uint32)) & np.uint32(1))
        rows, word = at_rows[which], at_words[which]
        ids = word // LANES * GROUP + bits * LANES + word % LANES
        inside = ids < self.classes
        rows, ids = rows[inside], ids[inside]
        order = np.lexsort((ids, rows))
        found = _padded_ids(rows[order], ids[order], np.bincount(rows, minlength=len(wide)), k)
        found = found.reshape(*words.shape[:-1], found.shape[-1])
        return SparseLabels._made(found if isinstance(self.words, np.ndarray) else jnp.asarray(found), self.classes)


@jax.tree_util.register_pytree_with_keys_class
class SparseLabels(_Labels):
    """Hard labels as the ids of the positive classes, four bytes a positive.

    Args:
      ids: (..., k), an integer dtype, kept as int32; NumPy or JAX. -1 stands for none, anywhere in a row. Ids may come
        in any order, and one that comes twice counts once.
      classes: how many there are.

    An id of a traced array can't be looked at: one outside of the classes is dropped there, as the padding is.

    Raises:
      TypeError: ids of a dtype that is no integer, classes that are no integer.
      ValueError: a concrete id that is neither -1 nor a class.
    """

    _array_name = "ids"
    ids: Any

    def __init__(self, ids: Any, classes: int):
        super().__init__(ids, classes)

    def _checked(self, ids: Any) -> Any:
        ids = ids if hasattr(ids, "dtype") else np.asarray(ids)
        if not ids.shape:
            raise ValueError("ids are a scalar; expected shape (..., k)")
        return _check_ids(ids, self.classes, padding=True)

    @classmethod
    def _made(cls, ids: Any, classes: int) -> SparseLabels:
        """Of ids that are known to be right."""
        return cls.tree_unflatten(classes, (ids,))

    @classmethod
    def from_dense(cls, labels: Any, k: int | None = None) -> SparseLabels:
        """From (..., classes) of bool or the integers 0 and 1, ids ascending.

        Args:
          labels: as in `PackedLabels.from_dense`. Concrete ones are read on the host.
          k: ids a row, so that every batch has one shape; None for as many as the fullest row has. Traced labels need
            it, and take a sort of every row.

        Raises:
          TypeError: labels of another dtype; traced labels without k.
          ValueError: concrete labels with more than k positives in a row. Of traced ones the first k stay.
        """
        dense = _dense(labels)
        *leading, classes = dense.shape
        if _is_traced(dense):
            if k is None:
                raise TypeError("traced labels have an unknown number of positives; k=None needs concrete ones")
            at_most = min(_check_k(k), classes)
            found = jnp.where(dense > 0, lax.broadcasted_iota(jnp.int32, dense.shape, dense.ndim - 1), classes)
            found = jnp.sort(found, axis=-1)[..., :at_most]
            found = jnp.where(found < classes, found, PADDING)
            fill = [(0, 0)] * len(leading) + [(0, k - at_most)]
            return cls._made(jnp.pad(found, fill, constant_values=PADDING), classes)
        host = np.asarray(dense) > 0
        rows, ids = np.nonzero(host.reshape(math.prod(leading), classes))
        padded = _padded_ids(rows, ids, np.bincount(rows, minlength=math.prod(leading)), k)
        padded = padded.reshape(*leading, padded.shape[-1])
        return cls._made(jnp.asarray(padded) if isinstance(dense, jax.Array) else padded, classes)

    @classmethod
    def from_ids(cls, ids: Ids, classes: int, k: int | None = None) -> SparseLabels:
        """From a sequence with the ids of each example: lists, tuples or arrays of any lengths.

        Args:
          ids: the sequence; or one integer array (..., k) padded with -1, NumPy or JAX.
          classes: how many there are.
          k: ids a row, so that every batch has one shape; None for as many as the longest list has.

        Raises:
          TypeError: ids that are no integers.
          ValueError: an id that is no class; more than k in a list.
        """
        if isinstance(ids, (np.ndarray, jax.Array)) and ids.dtype != object:
            made = cls(ids, classes)
            if k is None or k == made.ids.shape[-1]:
                return made
            if k < made.ids.shape[-1]:
                raise ValueError(f"ids have shape {tuple(made.ids.shape)}; expected at most k={k} in a row")
            fill = [(0, 0)] * (made.ndim - 1) + [(0, _check_k(k) - made.ids.shape[-1])]
            module: Any = np if isinstance(made.ids, np.ndarray) else jnp
            return made._with(module.pad(made.ids, fill, constant_values=PADDING))
        rows, flat, counts = _flatten(ids)
        return cls._made(_padded_ids(rows, _check_ids(flat, check_classes(classes), padding=False), counts, k), classes)

    @classmethod
    def from_csr(cls, matrix: CsrMatrix, k: int | None = None) -> SparseLabels:
        """From a SciPy CSR matrix or array (examples, classes) of 0 and 1, of any dtype.

        Args:
          matrix: a stored 0 is a negative.
          k: ids a row, so that every batch has one shape; None for as many as the fullest row has.

        Raises:
          TypeError: another sparse format.
          ValueError: a value beside 0 and 1; an id that is no class; more than k positives in a row.
        """
        counts, flat = _read_csr(matrix)
        rows = np.repeat(np.arange(len(counts)), counts)
        return cls._made(_padded_ids(rows, flat, counts, k), int(matrix.shape[1]))

    def to_dense(self) -> Any:
        """(..., classes), bool: NumPy from NumPy, JAX from JAX."""
        if isinstance(self.ids, np.ndarray):
            rows, ids, leading = self._pairs()
            dense = np.zeros((math.prod(leading), self.classes), bool)
            dense[rows, ids] = True
            return dense.reshape(*leading, self.classes)
        return self.to_packed().to_dense()

    def to_packed(self) -> PackedLabels:
        """The same labels as bits: NumPy from NumPy, JAX from JAX."""
        if isinstance(self.ids, np.ndarray):
            rows, ids, leading = self._pairs()
            return _packed_pairs(rows, ids, leading, self.classes)
        return PackedLabels(pack_ids(self.ids, self.classes), self.classes)

    def _pairs(self) -> tuple[NDArray[Any], NDArray[Any], tuple[int, ...]]:
        """Row and class of every positive, on the host."""
        *leading, k = self.ids.shape
        wide = self.ids.reshape(math.prod(leading), k)
        rows, columns = np.nonzero((wide >= 0) & (wide < self.classes))
        return rows, wide[rows, columns], tuple(leading)


for _kind in (PackedLabels, SparseLabels):
    jax.export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"asl_pallas.{_kind.__name__}",
        serialize_auxdata=lambda classes: str(classes).encode(),
        deserialize_auxdata=lambda text: int(text.decode()),
    )


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
    shifts = lax.broadcasted_iota(jnp.uint32, (bits, lanes), 0) + jnp.asarray(first).astype(jnp.uint32)
    return ((groups[..., None, :] >> shifts) & jnp.uint32(1) != 0).reshape(*leading, bits * lanes)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def pack_ids(ids: Array, classes: int) -> Array:
    """(..., words) uint32 from (..., k); what is no class is dropped."""
    *leading, k = ids.shape
    needed = words_for(classes)
    # Sorted, an id that comes twice has itself before it, and what is left can be added instead of or-ed.
    flat = jnp.sort(ids.reshape(math.prod(leading), k), axis=-1)
    fresh = jnp.concatenate([jnp.ones_like(flat[:, :1], bool), flat[:, 1:] != flat[:, :-1]], axis=-1)[:, :k]
    keep = fresh & (flat >= 0) & (flat < classes)
    word = jnp.where(keep, flat // GROUP * LANES + flat % LANES, needed)
    bit = jnp.uint32(1) << (flat // LANES % BITS).astype(jnp.uint32)

    def row(word: Array, bit: Array) -> Array:
        return jnp.zeros(needed, jnp.uint32).at[word].add(bit, mode="drop")

    return jax.vmap(row)(word, bit).reshape(*leading, needed)


def cut(words: Array, first: Array | int, classes: int) -> Array:
    """The words of `classes` classes from class `first` on, which need be no multiple of anything.

    Args:
      words: (..., words) of all classes, at least first + classes.
      first: an integer, traced or not.
    """
    *leading, held = words.shape
    groups = words_for(classes) // LANES
    blocks, lanes = jnp.divmod(jnp.asarray(first, jnp.int32), LANES)
    group, bits = jnp.divmod(blocks, BITS)
    fill = [(0, 0)] * len(leading) + [(0, 2), (0, 0)]
    by_group = jnp.pad(words.reshape(*leading, held // LANES, LANES), fill)
    axis = len(leading)
    here, after = (
        jnp.roll(lax.dynamic_slice_in_dim(by_group, group + k, groups, axis), -lanes, axis=-1) for k in (0, 1)
    )
    # Class 128 b + l of the cut is class 128 (b + bits) + l + lanes of what is here: where l + lanes passes 128, one
    # bit more. A shift by 32 bits has no meaning.
    shift = jnp.where(lax.iota(jnp.int32, LANES) + lanes >= LANES, bits + 1, bits).astype(jnp.uint32)
    low = jnp.where(shift < BITS, here >> jnp.minimum(shift, BITS - 1), 0)
    high = jnp.where(shift > 0, after << jnp.minimum(BITS - shift, BITS - 1), 0)
    return (low | high).reshape(*leading, groups * LANES)


def unpack_tile(words: Array, first: Array | int, blocks: int) -> Array:
    """Bool (rows, 128 blocks) from the (rows, 128) words of a group: what bits `first` and on say.

    In signed integers, whose arithmetic Mosaic knows on every chip.
    """
    words = words.astype(jnp.int32)
    bits = [words & lax.shift_left(jnp.int32(1), jnp.int32(first + b)) for b in range(blocks)]
    return (jnp.concatenate(bits, axis=1) if blocks > 1 else bits[0]) != 0


def pack_tile(ids: Array, first: Array, classes: int) -> Array:
    """(128, rows) words, int32, of the at most 4096 classes from `first` on, from (k, rows) ids.

    On a TPU, comparing every word's number with every id is far faster than setting single bits. With the rows along
    the lanes an id is spread over the words of its row without a lane being moved: k=16 ids take 0.5 bundles per 1024
    elements on v5e, and 2.5 with the rows along the sublanes.
    """
    local = ids - first
    inside = (local >= 0) & (local < classes)
    bit = jnp.where(inside, lax.shift_left(jnp.int32(1), (local >> 7) & (BITS - 1)), 0)
    word = local & (LANES - 1)
    shape = (LANES, ids.shape[1])
    numbers = lax.broadcasted_iota(jnp.int32, shape, 0)
    words = jnp.zeros(shape, jnp.int32)
    for t in range(ids.shape[0]):
        words |= jnp.where(numbers == word[t : t + 1], jnp.broadcast_to(bit[t : t + 1], shape), 0)
    return words


def word_and_bit(label: Array) -> tuple[Array, Array]:
    """Where the bit of a class is."""
    return (label >> 12 << 7) | (label & (LANES - 1)), (label >> 7) & (BITS - 1)


def byte_tile(ids: Array, classes: int) -> Array:
    """(rows, classes / 8), int32: bit b of byte n says whether the (rows, 1) id is 8 n + b.

    On a GPU eight neighbouring classes are one thread's, so that bytes become labels without leaving it.
    """
    numbers = lax.broadcasted_iota(jnp.int32, (1, classes // 8), 1)
    return jnp.where(numbers == ids >> 3, lax.shift_left(jnp.int32(1), ids & 7), 0)


def unpack_bytes(bits: Array) -> Array:
    """Bool (rows, 8 n) from (rows, n)."""
    rows, n = bits.shape
    spread = jnp.broadcast_to(bits[:, :, None], (rows, n, 8)) >> lax.broadcasted_iota(jnp.int32, (1, 1, 8), 2)
    return (spread & 1 != 0).reshape(rows, 8 * n)


def check_classes(classes: Any) -> int:
    try:
        count = operator.index(classes)
    except TypeError as error:
        raise TypeError(f"classes={classes!r}; expected an integer") from error
    if isinstance(classes, (bool, np.bool_)):
        raise TypeError(f"classes={classes!r}; expected an integer")
    if not 0 <= count < 2**31:
        raise ValueError(f"classes={count}; expected 0 <= classes < 2^31")
    return count


def _check_k(k: Any) -> int:
    if isinstance(k, (bool, np.bool_)) or not isinstance(k, (int, np.integer)):
        raise TypeError(f"k={k!r}; expected an integer or None")
    if k < 0:
        raise ValueError(f"k={k}; expected k >= 0")
    return int(k)


def _is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def _check_ids(ids: Any, classes: int, padding: bool) -> Any:
    """As int32, after a look at the concrete ones."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids have dtype {ids.dtype}; expected an integer dtype")
    if isinstance(ids, jax.ShapeDtypeStruct):
        return ids
    known = isinstance(ids, np.ndarray) or (not _is_traced(ids) and ids.is_fully_addressable)
    if known and ids.size:
        with jax.ensure_compile_time_eval():
            low, high = int(ids.min()), int(ids.max())
        if low < (PADDING if padding else 0) or high >= classes:
            wrong = high if high >= classes else low
            besides = f", or {PADDING} for none" if padding else ""
            raise ValueError(f"ids hold {wrong}; expected 0 <= id < {classes}{besides}")
    if ids.dtype.itemsize > 4 and not known:
        # Beyond 32 bits it would come back as another id.
        ids = jnp.where((ids >= 0) & (ids < classes), ids, PADDING)
    return ids.astype(np.int32)


def _dense(labels: Any) -> Any:
    """As an array of bool or integers, NumPy's looked at."""
    array = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if array.ndim == 0:
        raise ValueError("labels are a scalar; expected shape (..., classes)")
    if array.dtype == bool:
        return array
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"labels have dtype {array.dtype}; a bit holds bool or the integers 0 and 1, no soft label")
    if isinstance(array, np.ndarray) and array.size and not 0 <= array.min() <= array.max() <= 1:
        wrong = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"labels hold {wrong}; expected 0 or 1")
    return array > 0


def _padded(array: Any, size: int, module: Any) -> Any:
    return module.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, size - array.shape[-1])])


@functools.partial(jax.jit, inline=True)
def _pack(dense: Array) -> Array:
    bits = _padded(dense, words_for(dense.shape[-1]) * BITS, jnp)
    by_bit = bits.reshape(*bits.shape[:-1], bits.shape[-1] // GROUP, BITS, LANES).astype(jnp.uint32)
    by_bit = by_bit << lax.broadcasted_iota(jnp.uint32, (BITS, LANES), 0)
    return jnp.sum(by_bit, axis=-2, dtype=jnp.uint32).reshape(*dense.shape[:-1], words_for(dense.shape[-1]))


def _packed_pairs(rows: NDArray[Any], ids: NDArray[Any], leading: tuple[int, ...], classes: int) -> PackedLabels:
    """From row and class of every positive, on the host."""
    needed = words_for(classes)
    words = np.zeros(math.prod(leading) * needed, np.uint32)
    at = rows.astype(np.int64) * needed + ids // GROUP * LANES + ids % LANES
    np.bitwise_or.at(words, at, np.uint32(1) << (ids // LANES % BITS).astype(np.uint32))
    return PackedLabels(words.reshape(*leading, needed), classes)


def _flatten(lists: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Row and id of every entry of a list of lists, and how many each list has."""
    try:
        lists = [each if isinstance(each, (list, tuple)) else _one_list(each) for each in lists]
    except TypeError as error:
        raise TypeError(f"ids: expected a sequence with the ids of each example, and {error}") from error
    counts = np.fromiter(map(len, lists), np.int64, len(lists))
    if lists and all(isinstance(each, np.ndarray) for each in lists):
        filled = [each for each in lists if each.size]
        flat = np.concatenate(filled) if filled else np.zeros(0, np.int64)
    else:
        flat = np.array(list(itertools.chain.from_iterable(lists)))
        flat = flat if flat.size else np.zeros(0, np.int64)
    if flat.ndim != 1:
        raise ValueError("ids: expected one list of ids for each example, and these are nested more deeply")
    return np.repeat(np.arange(len(lists)), counts), flat, counts


def _one_list(ids: Any) -> Any:
    return np.asarray(ids) if hasattr(ids, "dtype") else list(ids)


def _read_csr(matrix: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """How many positives each row has, and all their ids, row by row."""
    if getattr(matrix, "format", "csr") != "csr" or not all(hasattr(matrix, n) for n in ("indptr", "indices", "data")):
        kind = getattr(matrix, "format", type(matrix).__name__)
        raise TypeError(f"matrix is {kind}; expected a SciPy CSR matrix or array: matrix.tocsr()")
    if len(matrix.shape) != 2:
        raise ValueError(f"matrix has shape {matrix.shape}; expected (examples, classes)")
    examples, classes = matrix.shape
    stored = int(matrix.indptr[-1])
    indices, data = matrix.indices[:stored], matrix.data[:stored]
    good = (data == 0) | (data == 1)
    if not good.all():
        raise ValueError(f"matrix holds {data[~good][0]}; expected 0 or 1")
    counts = np.diff(matrix.indptr)
    if not (positive := data != 0).all():
        rows = np.repeat(np.arange(examples), counts)[positive]
        counts, indices = np.bincount(rows, minlength=examples), indices[positive]
    return counts, _check_ids(indices, check_classes(classes), padding=False)


def _padded_ids(rows: NDArray[Any], ids: NDArray[Any], counts: NDArray[Any], k: int | None) -> NDArray[np.int32]:
    """(rows, k), each row's ids first and then the padding. The pairs come row by row."""
    longest = int(counts.max(initial=0))
    if k is not None and longest > _check_k(k):
        raise ValueError(f"a row has {longest} positives; expected at most k={k}")
    found = np.full((len(counts), longest if k is None else k), PADDING, np.int32)
    starts = np.cumsum(counts) - counts
    found[rows, np.arange(len(ids)) - np.repeat(starts, counts)] = ids
    return found
