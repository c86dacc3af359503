"""Hard labels without a byte an element: one bit each, or the ids of the positives.

Both stand where a dense (..., classes) array would and are pytrees, so that they pass through `jax.jit`, `jax.vmap`,
`jax.lax.scan`, `jax.device_put` and `jax.export` as arrays do. Made from NumPy or Python they hold NumPy arrays, in
host memory; made from JAX arrays they hold JAX arrays.

asl_pallas/bits.py tells how the bits lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.export
import numpy as np
from jax import Array
from numpy.typing import NDArray

from asl_pallas.bits import BITS, GROUP, LANES, PADDING, find_ids, pack, pack_ids, pad_ids, unpack, words_for
from asl_pallas.label_base import EncodedLabels
from asl_pallas.label_sources import (
    CsrMatrix,
    as_array,
    check_classes,
    check_ids,
    check_k,
    flatten,
    holds_lists,
    is_traced,
    packed_words,
    padded_ids,
    read_csr,
    read_dense,
    refuse_other_forms,
)

Ids = Sequence[Iterable[int]] | NDArray[np.integer] | Array


@jax.tree_util.register_pytree_with_keys_class
class PackedLabels(EncodedLabels):
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
        refuse_other_forms("words", words)
        words = as_array(words)
        if isinstance(words, np.ndarray) and words.dtype.newbyteorder("=") == np.uint32:
            words = words.astype(np.uint32, copy=False)  # JAX takes no other order of bytes
        if words.dtype != np.uint32:
            raise TypeError(f"words have dtype {words.dtype}; expected uint32: from_dense takes dense labels")
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
        dense = read_dense(labels)
        if isinstance(dense, jax.Array):
            return cls(pack(dense), dense.shape[-1])
        *leading, classes = dense.shape
        needed = words_for(classes)
        bits = np.pad(dense, [(0, 0)] * len(leading) + [(0, needed * BITS - classes)])
        by_bit = bits.reshape(*leading, needed // LANES, BITS, LANES)
        by_byte = np.swapaxes(np.packbits(by_bit, axis=-2, bitorder="little"), -1, -2)
        words = np.ascontiguousarray(by_byte).view("<u4").astype(np.uint32)
        return cls(words.reshape(*leading, needed), classes)

    @classmethod
    def from_ids(cls, ids: Ids, classes: int) -> PackedLabels:
        """From the ids of the positives, as `SparseLabels.from_ids` takes them."""
        if not holds_lists(ids):
            return SparseLabels(ids, classes).to_packed()
        rows, flat, counts = flatten(ids)
        flat = check_ids(flat, check_classes(classes), padding=False)
        return cls(packed_words(rows, flat, (len(counts),), classes), classes)

    @classmethod
    def from_csr(cls, matrix: CsrMatrix) -> PackedLabels:
        """From a SciPy CSR matrix or array (examples, classes), as `SparseLabels.from_csr` takes it."""
        counts, flat = read_csr(matrix)
        rows = np.repeat(np.arange(len(counts)), counts)
        classes = int(matrix.shape[1])
        return cls(packed_words(rows, flat, (len(counts),), classes), classes)

    def to_dense(self) -> Any:
        """(..., classes), bool: NumPy from NumPy, JAX from JAX."""
        words = self._array
        if isinstance(words, np.ndarray):
            *leading, needed = words.shape
            # Of any memory order and byte order: bytes can be viewed where the words of a row are neighbours.
            little = np.ascontiguousarray(words, "<u4")
            by_byte = little.view(np.uint8).reshape(*leading, needed // LANES, LANES, 4)
            bits = np.unpackbits(np.swapaxes(by_byte, -1, -2), axis=-2, bitorder="little")
            return bits.view(bool).reshape(*leading, needed * BITS)[..., : self.classes]
        return unpack(words, self.classes)

    def to_sparse(self, k: int | None = None) -> SparseLabels:
        """The same labels as ascending ids.

        Args:
          k: ids a row, as in `SparseLabels.from_dense`.
        """
        held = self._array
        if is_traced(held):
            return SparseLabels.from_dense(self.to_dense(), k)
        words = jax.device_get(held)
        wide = words.reshape(math.prod(words.shape[:-1]), words.shape[-1])
        at_rows, at_words = np.nonzero(wide)
        which, bits = np.nonzero((wide[at_rows, at_words][:, None] >> np.arange(BITS, dtype=np.uint32)) & np.uint32(1))
        rows, word = at_rows[which], at_words[which]
        ids = word // LANES * GROUP + bits * LANES + word % LANES
        inside = ids < self.classes
        rows, ids = rows[inside], ids[inside]
        order = np.lexsort((ids, rows))
        found = padded_ids(rows[order], ids[order], np.bincount(rows, minlength=len(wide)), k)
        found = found.reshape(*words.shape[:-1], found.shape[-1])
        return SparseLabels._made(found if held is words else jax.device_put(found), self.classes)

    @classmethod
    def concatenate(cls, parts: Iterable[PackedLabels], axis: int = 0) -> PackedLabels:
        """Several as one, along a leading dimension, as `np.concatenate` joins arrays.

        Args:
          parts: one or more, of the same classes. NumPy's stay on the host; with one of JAX the result is JAX's.
          axis: any but the last, that of the classes.

        Raises:
          TypeError, ValueError: no sequence of `PackedLabels`; parts of other classes or shapes; the classes' axis.
        """
        parts, axis = cls._parts(parts, axis, new=False)
        return cls._join(parts, [part._array for part in parts], axis, new=False)

    @classmethod
    def stack(cls, parts: Iterable[PackedLabels], axis: int = 0) -> PackedLabels:
        """Several of one shape as one with a new leading dimension, as `np.stack` joins arrays.

        A loader makes a batch of examples (features, labels) so: torch's `DataLoader(dataset, collate_fn=collate)` with

            collate = lambda batch: (np.stack([x for x, _ in batch]), PackedLabels.stack([y for _, y in batch]))

        Args, Raises:
          as in `concatenate`.
        """
        parts, axis = cls._parts(parts, axis, new=True)
        return cls._join(parts, [part._array for part in parts], axis, new=True)


@jax.tree_util.register_pytree_with_keys_class
class SparseLabels(EncodedLabels):
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
        refuse_other_forms("ids", ids)
        ids = as_array(ids)
        if not ids.shape:
            raise ValueError("ids are a scalar; expected shape (..., k)")
        return check_ids(ids, self.classes, padding=True)

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
        dense = read_dense(labels)
        *leading, classes = dense.shape
        if is_traced(dense):
            if k is None:
                raise TypeError("traced labels have an unknown number of positives; k=None needs concrete ones")
            return cls._made(find_ids(dense, check_k(k)), classes)
        host = jax.device_get(dense)
        rows, ids = np.nonzero(host.reshape(math.prod(leading), classes) > 0)
        padded = padded_ids(rows, ids, np.bincount(rows, minlength=math.prod(leading)), k)
        padded = padded.reshape(*leading, padded.shape[-1])
        return cls._made(padded if host is dense else jax.device_put(padded), classes)

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
        if not holds_lists(ids):
            made = cls(ids, classes)
            return made._with(made._padded_to(k))
        rows, flat, counts = flatten(ids)
        return cls._made(padded_ids(rows, check_ids(flat, check_classes(classes), padding=False), counts, k), classes)

    def _padded_to(self, k: int | None) -> Any:
        """The ids, k a row."""
        ids = self._array
        if k is None or check_k(k) == ids.shape[-1]:
            return ids
        if k < ids.shape[-1]:
            raise ValueError(f"ids have shape {tuple(ids.shape)}; expected at most k={k} in a row")
        if isinstance(ids, np.ndarray):
            fill = [(0, 0)] * (ids.ndim - 1) + [(0, k - ids.shape[-1])]
            return np.pad(ids, fill, constant_values=PADDING)
        return pad_ids(ids, k)

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
        counts, flat = read_csr(matrix)
        rows = np.repeat(np.arange(len(counts)), counts)
        return cls._made(padded_ids(rows, flat, counts, k), int(matrix.shape[1]))

    def to_dense(self) -> Any:
        """(..., classes), bool: NumPy from NumPy, JAX from JAX."""
        if isinstance(self._array, np.ndarray):
            rows, ids, leading = self._pairs()
            dense = np.zeros((math.prod(leading), self.classes), bool)
            dense[rows, ids] = True
            return dense.reshape(*leading, self.classes)
        return self.to_packed().to_dense()

    def to_packed(self) -> PackedLabels:
        """The same labels as bits: NumPy from NumPy, JAX from JAX."""
        if isinstance(self._array, np.ndarray):
            rows, ids, leading = self._pairs()
            return PackedLabels(packed_words(rows, ids, leading, self.classes), self.classes)
        return PackedLabels(pack_ids(self._array, self.classes), self.classes)

    @classmethod
    def concatenate(cls, parts: Iterable[SparseLabels], axis: int = 0, k: int | None = None) -> SparseLabels:
        """Several as one, along a leading dimension, as `np.concatenate` joins arrays.

        Args:
          parts: one or more, of the same classes and any numbers of ids a row, which are padded. NumPy's stay on the
            host; with one of JAX the result is JAX's.
          axis: any but the last, that of the classes.
          k: ids a row, so that every batch has one shape; None for as many as the longest part has.

        Raises:
          TypeError, ValueError: no sequence of `SparseLabels`; parts of other classes or shapes; the classes' axis; a
            part with more than k ids a row.
        """
        parts, axis = cls._parts(parts, axis, new=False)
        return cls._join(parts, _padded_alike(parts, k), axis, new=False)

    @classmethod
    def stack(cls, parts: Iterable[SparseLabels], axis: int = 0, k: int | None = None) -> SparseLabels:
        """Several of one shape as one with a new leading dimension, as `np.stack` joins arrays.

        A loader makes a batch of examples (features, labels) so: torch's `DataLoader(dataset, collate_fn=collate)` with

            collate = lambda batch: (np.stack([x for x, _ in batch]), SparseLabels.stack([y for _, y in batch], k=20))

        A loader that stacks the arrays in a pytree, as Grain's does, needs as many ids in every example: pass k where
        those are made.

        Args, Raises:
          as in `concatenate`.
        """
        parts, axis = cls._parts(parts, axis, new=True)
        return cls._join(parts, _padded_alike(parts, k), axis, new=True)

    def _pairs(self) -> tuple[NDArray[Any], NDArray[Any], tuple[int, ...]]:
        """Row and class of every positive, on the host."""
        *leading, k = self._array.shape
        wide = self._array.reshape(math.prod(leading), k)
        rows, columns = np.nonzero((wide >= 0) & (wide < self.classes))
        return rows, wide[rows, columns], tuple(leading)


def _padded_alike(parts: list[SparseLabels], k: int | None) -> list[Any]:
    longest = max(part._array.shape[-1] for part in parts) if k is None else k
    return [part._padded_to(longest) for part in parts]


for _kind in (PackedLabels, SparseLabels):
    jax.export.register_pytree_node_serialization(
        _kind,
        serialized_name=f"asl_pallas.{_kind.__name__}",
        serialize_auxdata=lambda classes: str(classes).encode(),
        deserialize_auxdata=lambda text: int(text.decode()),
    )
