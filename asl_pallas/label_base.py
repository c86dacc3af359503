"""What both forms of encoded labels share: their shape, index, iteration and joining, and that they are pytrees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from asl_pallas.label_sources import check_classes, is_traced, unwrap

_Self = TypeVar("_Self", bound="EncodedLabels")


class EncodedLabels:
    """One array whose leading dimensions are the labels', and a static class count."""

    _array_name: str
    classes: int

    def __init__(self, array: Any, classes: int):
        self.classes = check_classes(classes)
        setattr(self, self._array_name, self._checked(array))

    def _checked(self, array: Any) -> Any:
        raise NotImplementedError

    @property
    def _array(self) -> Any:
        """As NumPy or JAX has it, also where the pytree holds a wrapper."""
        return unwrap(getattr(self, self._array_name))

    def _with(self: _Self, array: Any) -> _Self:
        """The same with another array, unchecked."""
        return self.tree_unflatten(self.classes, (array,))

    def checked(self: _Self) -> _Self:
        """Itself, with every check of the constructor: one that comes out of a pytree hasn't been looked at."""
        return type(self)(getattr(self, self._array_name), self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., classes), as a dense array's."""
        array = self._array
        if not hasattr(array, "shape"):
            raise AttributeError(f"{self!r} holds no array, so it has no shape")
        return (*array.shape[:-1], self.classes)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype:
        """bool, as a dense array's."""
        return np.dtype(bool)

    def __len__(self) -> int:
        shape: tuple[int, ...] = getattr(self, "shape", ())
        if len(shape) < 2:
            of_shape = f"of shape {shape} " if shape else ""
            raise TypeError(f"{self!r} {of_shape}has no leading dimension, so no length")
        return shape[0]

    def __iter__(self: _Self) -> Iterator[_Self]:
        """The examples one by one, along the first dimension."""
        len(self)
        return map(self._with, self._array)

    def __getitem__(self: _Self, index: Any) -> _Self:
        """Some of the examples, `labels[2:5]` or `labels[permutation]`; the classes stay whole.

        Raises:
          IndexError: an integer out of range, unless it is traced; an index of the classes.
        """
        entries = index if isinstance(index, tuple) else (index,)
        if any(entry is Ellipsis for entry in entries):
            raise IndexError(f"{type(self).__name__} take an index of their leading dimensions alone, so no ...")
        array = self._array
        if any(is_traced(entry) for entry in entries):
            array = jnp.asarray(array)
        if isinstance(array, jax.Array):
            entries = tuple(_as_index(entry) for entry in entries)
            _check_range(entries, array.shape[:-1])
        return self._with(array[(*entries, Ellipsis, slice(None))])

    def __contains__(self, item: Any) -> NoReturn:
        raise TypeError(f"`in` has no meaning for {type(self).__name__}; to_dense() says which classes an example has")

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        """Refused: the dense array may be gigabytes, so it isn't made in silence."""
        kind = type(self).__name__
        raise TypeError(
            f"{kind} don't become an array by themselves: call to_dense() for a dense one, and {kind}.stack(parts) or "
            f"{kind}.concatenate(parts) to join several"
        )

    def __repr__(self) -> str:
        array = getattr(self, self._array_name)
        held = f"{array.dtype}{list(array.shape)}" if hasattr(array, "dtype") else repr(array)
        return f"{type(self).__name__}({self._array_name}={held}, classes={self.classes})"

    def tree_flatten_with_keys(self) -> tuple[Any, int]:
        return ((jax.tree_util.GetAttrKey(self._array_name), getattr(self, self._array_name)),), self.classes

    def tree_flatten(self) -> tuple[Any, int]:
        return (getattr(self, self._array_name),), self.classes

    @classmethod
    def tree_unflatten(cls: type[_Self], classes: int, children: Any) -> _Self:
        """Without a check: JAX puts more than arrays into a pytree."""
        made = object.__new__(cls)
        made.classes = classes
        setattr(made, cls._array_name, children[0])
        return made

    @classmethod
    def _parts(cls: type[_Self], parts: Iterable[_Self], axis: int, new: bool) -> tuple[list[_Self], int]:
        """The parts as a list, which fit, and the axis from the front; `new` for one that is still to be made."""
        kind = cls.__name__
        if isinstance(parts, EncodedLabels) or not isinstance(parts, Iterable):
            raise TypeError(f"parts are {parts!r}; expected a sequence of {kind}")
        parts = list(parts)
        if not parts:
            raise ValueError(f"parts are empty; expected at least one {kind}, which knows the classes")
        for i, part in enumerate(parts):
            if not isinstance(part, cls):
                raise TypeError(f"parts[{i}] is {type(part).__name__}; expected {kind}")
            if part.classes != parts[0].classes:
                raise ValueError(f"parts[{i}] has {part.classes} classes and parts[0] {parts[0].classes}")
        if isinstance(axis, (bool, np.bool_)) or not isinstance(axis, (int, np.integer)):
            raise TypeError(f"axis={axis!r}; expected an integer")
        ndim = parts[0].ndim + new
        at = axis + ndim if axis < 0 else int(axis)
        if not 0 <= at < ndim - 1:
            raise ValueError(
                f"axis={axis} is out of range or that of the classes, which stay whole; the result has {ndim} "
                "dimensions with the classes last"
            )
        for i, part in enumerate(parts):
            first, here = (list(p.shape) for p in (parts[0], part))
            if len(first) == len(here) and not new:
                first[at] = here[at]
            if first != here:
                along = "" if new else f" but along axis={axis}"
                raise ValueError(
                    f"parts[{i}] has shape {part.shape} and parts[0] {parts[0].shape}; expected one{along}"
                )
        return parts, at

    @classmethod
    def _join(cls: type[_Self], parts: list[_Self], arrays: list[Any], axis: int, new: bool) -> _Self:
        """NumPy stays NumPy; with an array of JAX among them it is JAX's."""
        module: Any = np if all(isinstance(array, np.ndarray) for array in arrays) else jnp
        return parts[0]._with((module.stack if new else module.concatenate)(arrays, axis=axis))


def _as_index(entry: Any) -> Any:
    """A sequence as an array: NumPy takes either for an index, JAX only the array."""
    if isinstance(entry, (list, tuple, range)):
        return np.asarray(entry) if len(entry) else np.zeros(0, np.int64)
    return unwrap(entry)


def _check_range(entries: tuple[Any, ...], leading: tuple[int, ...]) -> None:
    """JAX would take the nearest example for one that isn't there."""
    axis = 0
    for entry in entries:
        if entry is None or axis >= len(leading):
            continue
        if isinstance(entry, slice) or is_traced(entry):
            axis += entry.ndim if is_traced(entry) and entry.dtype == bool else 1
            continue
        at = jax.device_get(entry) if isinstance(entry, jax.Array) else np.asarray(entry)
        if at.dtype == bool:
            axis += at.ndim
            continue
        size = leading[axis]
        if at.dtype.kind in "iu" and at.size and not -size <= at.min() <= at.max() < size:
            wrong = at.min() if at.min() < -size else at.max()
            raise IndexError(f"index {wrong} is out of bounds for axis {axis} with size {size}")
        axis += 1
