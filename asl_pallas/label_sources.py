"""What labels are made from: dense arrays, lists of ids, id arrays and CSR matrices, checked and read on the host.

Whatever holds labels and is none of these gets a sentence that names the call which takes it.
"""

from __future__ import annotations

import itertools
import math
import operator
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from asl_pallas.bits import BITS, GROUP, LANES, PADDING, words_for


class CsrMatrix(Protocol):
    """What is asked of a scipy.sparse.csr_array, and found in JAX's BCSR too, so that SciPy need not be there."""

    shape: tuple[int, ...]
    indptr: NDArray[Any]
    indices: NDArray[Any]
    data: NDArray[Any]


def is_traced(x: Any) -> bool:
    return isinstance(x, jax.core.Tracer)


def unwrap(x: Any) -> Any:
    """The array in a wrapper that JAX knows as one, such as an nnx.Variable; anything else as it is."""
    return x.__jax_array__() if hasattr(x, "__jax_array__") and not isinstance(x, jax.Array) else x


def as_array(x: Any) -> Any:
    """An array of JAX or NumPy; what only has a shape and a dtype is left alone."""
    x = unwrap(x)
    if isinstance(x, (jax.Array, np.ndarray)) or (hasattr(x, "dtype") and not hasattr(x, "__array__")):
        return x
    return np.asarray(x)


def holds_lists(ids: Any) -> bool:
    """Whether these are ids in lists of any lengths, and not in one array."""
    return isinstance(ids, (list, tuple)) or getattr(ids, "dtype", np.object_) == np.object_


def refuse_other_forms(name: str, x: Any) -> None:
    """Raises, with the call that takes it, for what holds labels in a form that isn't dense.

    That is a sparse matrix of SciPy or JAX, lists of ids of unequal lengths, and labels that are encoded already.
    """
    kind = type(x).__name__
    if _encoded(x):
        raise TypeError(f"{name}: {kind} are encoded labels already; call their to_packed(), to_sparse() or to_dense()")
    if hasattr(x, "tocsr"):
        read = "" if getattr(x, "format", None) == "csr" else ".tocsr()"
        raise TypeError(f"{name}: a SciPy {kind} is no array; SparseLabels.from_csr(matrix{read}) takes it")
    if hasattr(x, "todense") and type(x).__module__.startswith("jax."):
        read = "matrix" if kind == "BCSR" else "jax.experimental.sparse.BCSR.from_bcoo(matrix)"
        raise TypeError(f"{name}: JAX's {kind} is no array; SparseLabels.from_csr({read}) takes it")
    rows: Any = x if isinstance(x, (list, tuple)) else ()
    if rows and _encoded(rows[0]):
        of = type(rows[0]).__name__
        raise TypeError(
            f"{name}: a {kind} of {of} is no array; {of}.stack(parts) and {of}.concatenate(parts) join them"
        )
    lengths = {len(row) for row in rows if isinstance(row, (list, tuple)) or bool(getattr(row, "ndim", 0))}
    of_objects = getattr(x, "dtype", None) == np.object_
    if len(lengths) > 1 or of_objects:
        what = "objects in place of numbers" if of_objects else "rows of unequal lengths"
        raise TypeError(
            f"{name}: {what} are no array; where they list the ids of the positives, SparseLabels.from_ids(lists, "
            "classes) takes them"
        )


def _encoded(x: Any) -> bool:
    return hasattr(x, "classes") and hasattr(x, "to_dense")


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


def check_k(k: Any) -> int:
    if isinstance(k, (bool, np.bool_)) or not isinstance(k, (int, np.integer)):
        raise TypeError(f"k={k!r}; expected an integer or None")
    if k < 0:
        raise ValueError(f"k={k}; expected k >= 0")
    return int(k)


def check_ids(ids: Any, classes: int, padding: bool) -> Any:
    """As int32, after a look at the concrete ones."""
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        dense = "; SparseLabels.from_dense takes dense labels" if ids.dtype == bool else ""
        raise TypeError(f"ids have dtype {ids.dtype}; expected an integer dtype{dense}")
    if isinstance(ids, jax.ShapeDtypeStruct):
        return ids
    known = isinstance(ids, np.ndarray) or (not is_traced(ids) and ids.is_fully_addressable)
    if known and ids.size:
        low, high = _range(ids)
        if low < (PADDING if padding else 0) or high >= classes:
            wrong = high if high >= classes else low
            besides = f", or {PADDING} for none" if padding else ""
            raise ValueError(f"ids hold {wrong}; expected 0 <= id < {classes}{besides}")
        if ids.ndim > 1 and ids.shape[-1] == classes > 2 and low >= 0 and high <= 1:
            raise ValueError(
                f"ids have shape {ids.shape}, so one for each of {classes} classes, and hold 0 and 1 alone: "
                "SparseLabels.from_dense takes dense labels"
            )
    if ids.dtype.itemsize > 4 and not known:
        # Beyond 32 bits it would come back as another id.
        ids = jnp.where((ids >= 0) & (ids < classes), ids, ids.dtype.type(PADDING))
    return ids.astype(np.int32)


def _range(ids: Any) -> tuple[int, int]:
    """The lowest and the highest, of an array that isn't traced, even where others are."""
    with jax.ensure_compile_time_eval():
        low, high = jax.device_get((ids.min(), ids.max()))
    return int(low), int(high)


def read_dense(labels: Any) -> Any:
    """As an array: bool of NumPy, which is looked at; bool or an integer dtype of JAX, where above 0 is positive."""
    refuse_other_forms("labels", labels)
    array = as_array(labels)
    if not isinstance(array, (np.ndarray, jax.Array)):
        raise TypeError(f"labels are {type(labels).__name__}; expected an array")
    if array.dtype == np.object_ and array.ndim:
        refuse_other_forms("labels", array)
    if array.ndim == 0:
        raise ValueError(f"labels are a scalar, of {type(labels).__name__}; expected shape (..., classes)")
    if array.dtype == bool:
        return array
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"labels have dtype {array.dtype}; a bit holds bool or the integers 0 and 1, no soft label")
    if isinstance(array, jax.Array):
        return array
    if array.size and not 0 <= array.min() <= array.max() <= 1:
        wrong = array.min() if array.min() < 0 else array.max()
        raise ValueError(f"labels hold {wrong}; expected 0 or 1: ids of the positives go to from_ids(ids, classes)")
    return array > 0


def flatten(lists: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Row and id of every entry of a list of lists, and how many each list has."""
    if not isinstance(lists, (list, tuple, np.ndarray)):
        refuse_other_forms("ids", lists)
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


def read_csr(matrix: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """How many positives each row has, and all their ids, row by row."""
    if getattr(matrix, "format", "csr") != "csr" or not all(hasattr(matrix, n) for n in ("indptr", "indices", "data")):
        if hasattr(matrix, "tocsr"):
            raise TypeError(f"matrix is {matrix.format}; expected a SciPy CSR matrix or array: matrix.tocsr()")
        refuse_other_forms("matrix", matrix)
        raise TypeError(
            f"matrix is {type(matrix).__name__}; expected a SciPy CSR matrix or array: from_dense takes dense labels, "
            "from_ids lists of ids"
        )
    if len(matrix.shape) != 2:
        raise ValueError(f"matrix has shape {matrix.shape}; expected (examples, classes)")
    examples, classes = matrix.shape
    indptr, indices, data = (np.asarray(each) for each in (matrix.indptr, matrix.indices, matrix.data))
    stored = int(indptr[-1])
    indices, data = indices[:stored], data[:stored]
    good = (data == 0) | (data == 1)
    if not good.all():
        raise ValueError(f"matrix holds {data[~good][0]}; expected 0 or 1")
    counts = np.diff(indptr)
    if not (positive := data != 0).all():
        rows = np.repeat(np.arange(examples), counts)[positive]
        counts, indices = np.bincount(rows, minlength=examples), indices[positive]
    return counts, check_ids(indices, check_classes(classes), padding=False)


def padded_ids(rows: NDArray[Any], ids: NDArray[Any], counts: NDArray[Any], k: int | None) -> NDArray[np.int32]:
    """(rows, k), each row's ids first and then the padding. The pairs come row by row."""
    longest = int(counts.max(initial=0))
    if k is not None and longest > check_k(k):
        raise ValueError(f"a row has {longest} positives; expected at most k={k}")
    found = np.full((len(counts), longest if k is None else k), PADDING, np.int32)
    starts = np.cumsum(counts) - counts
    found[rows, np.arange(len(ids)) - np.repeat(starts, counts)] = ids
    return found


def packed_words(rows: NDArray[Any], ids: NDArray[Any], leading: tuple[int, ...], classes: int) -> NDArray[np.uint32]:
    """(..., words), from row and class of every positive."""
    needed = words_for(classes)
    words = np.zeros(math.prod(leading) * needed, np.uint32)
    at = rows.astype(np.int64) * needed + ids // GROUP * LANES + ids % LANES
    np.bitwise_or.at(words, at, np.uint32(1) << (ids // LANES % BITS).astype(np.uint32))
    return words.reshape(*leading, needed)
