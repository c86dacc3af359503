"""What differs between the versions of JAX that we support, 0.10.2 and up: all of it is here."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from jax import Array


def estimated_reciprocal(x: Array) -> Array:
    """The TPU's own estimate of 1 / x. It moved from pallas to pallas.tpu in 0.11."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    module = pltpu if hasattr(pltpu, "reciprocal") else pl
    return module.reciprocal(x, approx=True)


@contextlib.contextmanager
def quiet_triton() -> Iterator[None]:
    """Lowers Pallas's Triton kernels without the notice, since 0.11, that this backend will go one day.

    It is addressed to us, and nothing that our user could act on: the successor is our `mosaic_gpu`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        yield
