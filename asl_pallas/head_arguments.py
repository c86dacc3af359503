"""What a linear head's own arguments may be; those that it shares with the losses of logits are in `arguments`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from asl_pallas.arguments import LOGITS_DTYPES, as_array


def check_features(features: Any) -> Array:
    array = as_array("features", features)
    if array.dtype.name not in LOGITS_DTYPES:
        raise TypeError(f"features have dtype {array.dtype.name}; expected one of {', '.join(LOGITS_DTYPES)}")
    if array.ndim == 0:
        raise ValueError("features are a scalar; expected shape (..., d)")
    return array


def check_kernel(kernel: Any, features: Array) -> Array:
    array = as_array("kernel", kernel)
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
    array = as_array("bias", bias)
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


def _positive_int(name: str, number: Any, expected: str) -> int:
    if isinstance(number, (bool, np.bool_)) or not isinstance(number, (int, np.integer)):
        raise TypeError(f"{name}={number!r}; expected {expected}")
    if number < 1:
        raise ValueError(f"{name}={number}; expected {name} >= 1")
    return int(number)
