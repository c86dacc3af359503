"""What a call may be given: every check of an argument, before anything is compiled."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from asl_pallas import kernels
from asl_pallas.kernels.tile import Form
from asl_pallas.label_checks import check_ids, check_values
from asl_pallas.label_sources import is_traced, refuse_other_forms, unwrap
from asl_pallas.labels import PackedLabels, SparseLabels
from asl_pallas.losses.base import PER_CLASS, TRACED, Bounds, ElementwiseLoss, hyperparameters
from asl_pallas.losses.ops import Label
from asl_pallas.partial_labels import PartialLabels

LOGITS_DTYPES = ("float16", "bfloat16", "float32", "float64")


def constants(arrays: Any, differentiated: Array) -> tuple[str, ...]:
    """Of a NamedTuple of arrays, the names of those that are no input of the program that is being traced.

    Others would have XLA compute what it can from them while it compiles: seconds, for labels of 1024 x 8192.
    """
    if not is_traced(differentiated):
        return ()
    fields = arrays._asdict().items()
    return tuple(name for name, array in fields if isinstance(array, jax.Array) and not is_traced(array))


def check_logits(logits: Any) -> Array:
    array = _array("logits", logits)
    if array.dtype.name not in LOGITS_DTYPES:
        raise TypeError(f"logits have dtype {array.dtype.name}; expected one of {', '.join(LOGITS_DTYPES)}")
    if array.ndim == 0:
        raise ValueError("logits are a scalar; expected shape (..., classes)")
    return array


def check_features(features: Any) -> Array:
    array = _array("features", features)
    if array.dtype.name not in LOGITS_DTYPES:
        raise TypeError(f"features have dtype {array.dtype.name}; expected one of {', '.join(LOGITS_DTYPES)}")
    if array.ndim == 0:
        raise ValueError("features are a scalar; expected shape (..., d)")
    return array


def check_kernel(kernel: Any, features: Array) -> Array:
    array = _array("kernel", kernel)
    if array.dtype.name not in LOGITS_DTYPES:
        raise TypeError(f"kernel has dtype {array.dtype.name}; expected one of {', '.join(LOGITS_DTYPES)}")
    depth = features.shape[-1]
    if array.ndim != 2 or array.shape[0] != depth:
        raise ValueError(
            f"kernel has shape {array.shape}; expected ({depth}, classes) for features of shape {features.shape}"
        )
    return array


def check_bias(bias: Any, kernel: Array) -> Array | None:
    if bias is None:
        return None
    array = _array("bias", bias)
    if array.dtype.name not in LOGITS_DTYPES:
        raise TypeError(f"bias has dtype {array.dtype.name}; expected one of {', '.join(LOGITS_DTYPES)}")
    if array.shape != kernel.shape[1:]:
        raise ValueError(f"bias has shape {array.shape}; expected {kernel.shape[1:]}, one a class of the kernel")
    return array


def check_chunk_size(chunk_size: Any) -> int | None:
    return None if chunk_size is None else _positive_int("chunk_size", chunk_size, "None or a Python int")


def check_k(k: Any, classes: int) -> int:
    count = _positive_int("k", k, "a Python int")
    if count > classes:
        raise ValueError(f"k={count}; expected at most {classes}, the classes of the kernel")
    return count


def check_precision(precision: Any) -> Any:
    if precision is None:
        return None
    precision = tuple(precision) if isinstance(precision, list) else precision
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        jax.eval_shape(lambda a, b: jnp.dot(a, b, precision=precision), one, one)
    except (TypeError, ValueError) as error:
        raise ValueError(f"precision={precision!r}; expected what jax.lax.dot_general takes") from error
    return precision


class CheckedLabels(NamedTuple):
    """How the labels are written, and their arrays: words, ids, or an element each."""

    form: Form
    labels: Array
    negatives: Array | None = None


def check_labels(
    labels: Any, logits: Array | jax.ShapeDtypeStruct, where: Any, ignore_label: int | None, loss: ElementwiseLoss
) -> CheckedLabels:
    third = loss.third_state
    if third is not None and third in (0, 1, ignore_label):
        raise ValueError(
            f"unannotated_label={third}; expected an integer that is no other label, so neither 0 nor 1"
            + ("" if ignore_label is None else f" nor ignore_label={ignore_label}")
        )
    if isinstance(labels, PartialLabels):
        if loss.states < 3:
            raise TypeError(
                f"labels are PartialLabels, and {type(loss).__name__} has no loss for what is not annotated; expected "
                "a loss with three states, such as SelectiveLoss, or labels of two and where"
            )
        parts = [check_labels(part, logits, where, ignore_label, loss) for part in labels.checked().tree_flatten()[0]]
        return CheckedLabels(parts[0].form, parts[0].labels, parts[1].labels)
    if isinstance(labels, (PackedLabels, SparseLabels)):
        if labels.shape != logits.shape:
            raise ValueError(
                f"labels are {labels!r}, of shape {labels.shape}; expected the logits' shape {logits.shape}"
            )
        if ignore_label is not None:
            raise TypeError(
                f"ignore_label={ignore_label} needs integer labels, and {type(labels).__name__} hold two values; leave "
                "elements out with where"
            )
        if isinstance(labels, PackedLabels):
            return CheckedLabels("packed", jnp.asarray(labels.checked().words))
        ids = jnp.asarray(labels.checked().ids)
        check_ids(ids, labels.classes)
        return CheckedLabels("sparse", ids)
    refuse_other_forms("labels", labels)
    labels, where = unwrap(labels), unwrap(where)
    array = _array("labels", labels)
    if not (array.dtype == jnp.bool_ or jnp.issubdtype(array.dtype, jnp.integer) or _is_real(array.dtype)):
        raise TypeError(f"labels have dtype {array.dtype.name}; expected bool, an integer or a float dtype")
    if array.shape != logits.shape:
        like_ids = jnp.issubdtype(array.dtype, jnp.integer) and array.shape[:-1] == logits.shape[:-1]
        besides = "; ids of the positives go in as SparseLabels(ids, classes)" if like_ids else ""
        raise ValueError(f"labels have shape {array.shape}; expected the logits' shape {logits.shape}{besides}")
    for name, number in (("ignore_label", ignore_label), ("unannotated_label", third)):
        if number is not None and jnp.issubdtype(array.dtype, jnp.integer):
            held = jnp.iinfo(array.dtype)
            if not held.min <= number <= held.max:
                raise ValueError(
                    f"{name}={number}, and labels have dtype {array.dtype.name}, which holds {held.min} to "
                    f"{held.max}: no label can be it; expected a number that the labels can hold"
                )
    if ignore_label is not None and _is_real(array.dtype):
        raise TypeError(
            f"ignore_label={ignore_label} needs integer labels and labels have dtype {array.dtype.name}; leave soft "
            "labels out with where"
        )
    check_values(labels, where, ignore_label, third)
    return CheckedLabels("dense", array)


def check_where(where: Any, logits: Array | jax.ShapeDtypeStruct, axes: tuple[int, ...]) -> Array | None:
    if where is None:
        return None
    array = _array("where", where)
    if array.dtype != jnp.bool_:
        raise TypeError(f"where has dtype {array.dtype.name}; expected bool")
    return _broadcastable("where", array, logits.shape, axes)


def check_weights(
    name: Literal["weights", "pos_weight"], weights: Any, logits: Array | jax.ShapeDtypeStruct, axes: tuple[int, ...]
) -> Array | None:
    return None if weights is None else _broadcastable(name, _real(name, weights), logits.shape, axes)


class CheckedLoss(NamedTuple):
    """A loss that is hashable, and the arrays that `ElementwiseLoss.bind` fills in again."""

    static: ElementwiseLoss
    scalars: tuple[Array, ...]
    vectors: tuple[Array, ...]


def check_loss(loss: Any, logits: Array | jax.ShapeDtypeStruct, axes: tuple[int, ...]) -> CheckedLoss:
    if isinstance(loss, type) and issubclass(loss, ElementwiseLoss):
        raise TypeError(f"loss is the class {loss.__name__}; expected an object of it: {loss.__name__}()")
    if not isinstance(loss, ElementwiseLoss):
        raise TypeError(f"loss={loss!r}; expected a loss object, such as asl_pallas.AsymmetricLoss()")
    if not dataclasses.is_dataclass(loss):
        raise TypeError(f"{type(loss).__name__} is no dataclass; write @dataclasses.dataclass(frozen=True) above it")
    values = [getattr(loss, field.name) for field in dataclasses.fields(loss)]
    if all(value is None or isinstance(value, (int, float)) for value in values):
        return _loss_of_numbers(loss, tuple(map(type, values)))
    return _look_at_loss(loss, logits, axes)


@functools.lru_cache(maxsize=256)
def _loss_of_numbers(loss: ElementwiseLoss, types: tuple[type, ...]) -> CheckedLoss:
    """Of one without arrays, whatever the logits: no eager call waits for it twice. True equals 1, hence the types."""
    return _look_at_loss(loss, jax.ShapeDtypeStruct((1,), jnp.float32), (0,))


def _look_at_loss(loss: ElementwiseLoss, logits: Array | jax.ShapeDtypeStruct, axes: tuple[int, ...]) -> CheckedLoss:
    changes: dict[str, Any] = {}
    scalars, vectors = [], []
    for name, value, bounds in hyperparameters(loss):
        number, array = _check_hyperparameter(name, value, bounds)
        if array is None:
            changes[name] = number
        elif array.size == 1 and array.ndim <= len(logits.shape):
            changes[name] = TRACED
            scalars.append(array.reshape(()))
        else:
            changes[name] = PER_CLASS
            vectors.append(_broadcastable(name, array, logits.shape, axes))
    static = loss.replaced(changes)
    try:
        hash(static)
    except TypeError as error:
        raise TypeError(f"{loss!r} can't be hashed: {error}; expected numbers, arrays and hashable settings") from error
    return CheckedLoss(static, tuple(scalars), tuple(vectors))


def check_value(loss: ElementwiseLoss, dtype: Any) -> None:
    """A loss's value is an array like the logit, and so is its slope."""
    shape = (2, 3)
    places = loss.traced()
    of_class = jax.ShapeDtypeStruct((1, shape[1]), dtype)
    scalars = tuple(jax.ShapeDtypeStruct((), dtype) for name in places if getattr(loss, name) is TRACED)
    vectors = (of_class,) * (len(places) - len(scalars))
    masks = (jax.ShapeDtypeStruct(shape, bool),) * (1 if loss.states == 2 else 2)

    def both(x: Array, masks: Any, scalars: Any, vectors: Any) -> Any:
        return loss.bind(scalars, vectors).value_and_slope(x, Label(*masks)._replace(dtype=dtype))

    found = jax.eval_shape(both, jax.ShapeDtypeStruct(shape, dtype), masks, scalars, vectors)
    if not (isinstance(found, tuple) and len(found) == 2):
        raise TypeError(f"value_and_slope of {type(loss).__name__} returns {found!r}; expected a pair of arrays")
    for name, one in zip(("value", "slope"), found, strict=True):
        if getattr(one, "shape", None) != shape or one.dtype != dtype:
            what = f"{one.dtype.name}{list(one.shape)}" if hasattr(one, "dtype") else repr(one)
            raise TypeError(
                f"the {name} of {type(loss).__name__} is {what} for logits of {jnp.dtype(dtype).name}{list(shape)}; "
                "expected their shape and dtype"
            )


def _check_hyperparameter(name: str, value: Any, bounds: Bounds) -> tuple[float | None, Array | None]:
    """(the number, None) where it is known in Python; (None, the array) where JAX has it or it has a dimension."""
    value = unwrap(value)
    expected = "a real number, a traced scalar or an array of one value per class"
    if value is None and name == "clip":
        raise TypeError(f"{name}=None; expected {expected}: clip=0 is no margin")
    if isinstance(value, (bool, str, complex)) or value is None:
        raise TypeError(f"{name}={value!r}; expected {expected}")
    if isinstance(value, (list, tuple)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; expected {expected}")
    if not isinstance(value, jax.Array) and np.ndim(value) == 0:
        try:
            known = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}={value!r}; expected {expected}") from error
        if known not in bounds:
            raise ValueError(f"{name}={value!r}; expected {bounds.sentence(name)}")
        return known, None
    array = _array(name, value)
    if not (jnp.issubdtype(array.dtype, jnp.integer) or _is_real(array.dtype)):
        raise TypeError(f"{name} is an array {array.dtype.name}{list(array.shape)}; expected {expected}")
    if not is_traced(array):
        bounds.check(name, array)
    return None, array


def check_label_smoothing(label_smoothing: Any, loss: ElementwiseLoss) -> float:
    number = _python_number("label_smoothing", label_smoothing)
    if number and not (loss.mixes_soft_labels and loss.states == 2):
        raise ValueError(f"label_smoothing={label_smoothing!r}; {type(loss).__name__} has none, expected 0")
    if not 0 <= number < 1:
        raise ValueError(f"label_smoothing={label_smoothing!r}; expected 0 <= label_smoothing < 1")
    return number


def check_ignore_label(ignore_label: Any) -> int | None:
    if ignore_label is None:
        return None
    number = _python_number("ignore_label", ignore_label)
    if not number.is_integer():
        raise ValueError(f"ignore_label={ignore_label!r}; expected an integer")
    if number in (0, 1):
        raise ValueError(f"ignore_label={ignore_label!r}; expected an integer that is no label, so neither 0 nor 1")
    return int(number)


def check_axis(axis: Any, ndim: int) -> tuple[int, ...]:
    """The axes to sum over, counted from the front."""
    if axis is None:
        return tuple(range(ndim))
    axes = axis if isinstance(axis, (tuple, list)) else (axis,)
    found = []
    for one in axes:
        if isinstance(one, bool) or not isinstance(one, (int, np.integer)):
            raise TypeError(f"axis={axis!r}; expected an integer, a tuple of integers, () or None")
        if not -ndim <= one < ndim:
            raise ValueError(f"axis={axis!r} is out of range; the logits have {ndim} dimensions")
        found.append(int(one) % ndim)
    if len(set(found)) != len(found):
        raise ValueError(f"axis={axis!r} names a dimension twice")
    return tuple(sorted(found))


def check_implementation(implementation: Any) -> str | None:
    if implementation is not None and not (isinstance(implementation, str) and implementation in kernels.PLATFORMS):
        known = ", ".join(map(repr, kernels.PLATFORMS))
        raise ValueError(f"implementation={implementation!r}; expected None or one of {known}")
    return implementation


def check_spec(name: str, spec: Any, ndim: int) -> PartitionSpec | None:
    """How the array of that name lies."""
    if spec is None:
        return None
    if not isinstance(spec, PartitionSpec):
        raise TypeError(f"{name}_spec={spec!r}; expected a jax.sharding.PartitionSpec")
    if len(spec) > ndim:
        raise ValueError(f"{name}_spec={spec} has {len(spec)} entries; the {name} have {ndim} dimensions")
    return spec


def check_statistics(statistics: Any, axis: Any, axes: tuple[int, ...], ndim: int) -> bool:
    if check_flag("statistics", statistics) and ndim - 1 not in axes:
        raise ValueError(
            f"statistics are sums over the classes, and axis={axis!r} leaves them in; expected -1, None or a tuple "
            "with the classes' axis"
        )
    return bool(statistics)


def check_flag(name: str, flag: Any) -> bool:
    if not isinstance(flag, (bool, np.bool_)):
        raise TypeError(f"{name}={flag!r}; expected True or False")
    return bool(flag)


def _positive_int(name: str, number: Any, expected: str) -> int:
    if isinstance(number, (bool, np.bool_)) or not isinstance(number, (int, np.integer)):
        raise TypeError(f"{name}={number!r}; expected {expected}")
    if number < 1:
        raise ValueError(f"{name}={number}; expected {name} >= 1")
    return int(number)


def _array(name: str, x: Any) -> Array:
    if isinstance(x, jax.Array):
        return x
    try:
        raw = np.asarray(x) if not hasattr(x, "__jax_array__") else x
    except ValueError as error:
        raise ValueError(f"{name}: expected an array, and this is none: {error}") from error
    if isinstance(raw, np.ndarray) and raw.dtype.kind in "USOMmV" and raw.dtype.name not in LOGITS_DTYPES:
        raise TypeError(f"{name} has dtype {raw.dtype}; expected numbers")
    return jnp.asarray(raw)


def _real(name: str, x: Any) -> Array:
    array = _array(name, x)
    if not (jnp.issubdtype(array.dtype, jnp.integer) or _is_real(array.dtype)):
        raise TypeError(f"{name} has dtype {array.dtype.name}; expected an integer or a float dtype")
    return array


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _broadcastable(name: str, array: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """An array that broadcasts to the logits' shape, and in one way only where the sum is over `axes`."""
    try:
        fits = np.broadcast_shapes(array.shape, shape) == shape
    except ValueError:
        fits = False
    ndim = len(shape)
    # A vector goes along the last axis. Who sums over another axis of the same size may have meant that one.
    along = [axis for axis in (axes if fits else range(ndim - 1)) if array.ndim == 1 and array.shape == (shape[axis],)]
    reshaped = " or ".join(f"{(array.size, *(1,) * (ndim - 1 - axis))} for axis {axis}" for axis in along)
    if not fits:
        expected = f"one that broadcasts to the logits' {shape}" + (f", such as {reshaped}" if along else "")
        raise ValueError(f"{name} has shape {array.shape}; expected {expected}")
    if along and ndim - 1 not in axes and array.size > 1:
        raise ValueError(
            f"{name} has shape {array.shape}, which fits the last axis and one that is summed over; expected "
            f"{reshaped}, or {(1, array.size)} for the last axis"
        )
    return array


def _python_number(name: str, number: Any) -> float:
    if isinstance(number, (bool, jax.Array)) or not isinstance(number, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}={number!r}; expected a Python number")
    return float(number)
