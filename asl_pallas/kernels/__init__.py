"""Which kernel serves a call, and the reason why one can't."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from asl_pallas.kernels import mosaic_tpu, triton, xla
from asl_pallas.kernels.tile import Operands, Result, Task
from asl_pallas.refusals import refuse

# The name that a caller may ask for -> the platform that its kernel is lowered for. mosaic_gpu has no kernel yet.
PLATFORMS: dict[str, Any] = {"xla": None, "mosaic_tpu": "tpu", "triton": "cuda", "mosaic_gpu": "cuda"}
# The jnp formula in one expression on every platform, for what the library itself decides to leave to XLA.
PLAIN = "plain"

_interpreted = contextvars.ContextVar("asl_pallas_interpret_mode", default=False)


@contextlib.contextmanager
def interpret_mode() -> Iterator[None]:
    """Kernels that are asked for by name run in Pallas's interpreter, on any platform: for tests, and slow."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def interpreting() -> bool:
    return _interpreted.get()


def refusal(implementation: str, task: Task, operands: Operands) -> str | None:
    """Why this kernel can't serve this call on its own platform, or None where it can."""
    if implementation == "xla":
        return None
    if implementation == "mosaic_gpu":
        return "this version of asl_pallas has no Mosaic GPU kernel; 'triton' serves every CUDA GPU"
    if operands.logits.dtype == jnp.float64:
        return "it computes in float32 and the logits are float64; 'xla' computes in float64"
    supported = mosaic_tpu.DTYPES if implementation == "mosaic_tpu" else triton.DTYPES
    for name in ("logits", "labels", "where"):
        operand = getattr(operands, name)
        if operand is not None and operand.dtype.name not in supported:
            return f"it loads no {operand.dtype.name} {name}; it loads {', '.join(supported)}"
    return None


def run(task: Task, operands: Operands, implementation: str | None, interpret: bool) -> Result:
    """Value and gradient by the kernel of that name, or by the best one for the platform that this is lowered for."""
    if implementation == PLAIN or operands.logits.size == 0:
        return xla.run(task, operands)
    if implementation is None:
        return _choose(task, operands)
    if implementation == "xla":
        return lax.platform_dependent(
            operands, cpu=functools.partial(xla.run_streamed, task), default=functools.partial(xla.run, task)
        )
    if interpret:
        return _KERNELS[implementation](task, operands, interpret=True)
    platform = PLATFORMS[implementation]
    sentence = (
        f"implementation={implementation!r} needs the platform {platform!r}, and this is lowered for another; "
        "implementation=None picks what the platform has"
    )
    like = jax.eval_shape(functools.partial(xla.run, task), operands)
    # Which platform this is lowered for is known only then.
    return lax.platform_dependent(
        operands,
        **{platform: functools.partial(_KERNELS[implementation], task)},
        default=lambda o: refuse(NotImplementedError, sentence, o, like),
    )


_KERNELS: dict[str, Any] = {"mosaic_tpu": mosaic_tpu.run, "triton": triton.run}


def _choose(task: Task, operands: Operands) -> Result:
    kernels = {
        PLATFORMS[name]: functools.partial(kernel, task)
        for name, kernel in _KERNELS.items()
        if refusal(name, task, operands) is None
    }
    return lax.platform_dependent(
        operands,
        **kernels,
        cpu=functools.partial(xla.run_streamed, task),
        default=functools.partial(xla.run, task),
    )
