"""Which kernel serves a call, and the reason why one can't."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from asl_pallas.kernels import mosaic_tpu, triton, xla
from asl_pallas.kernels.tile import Operands, Result, Task

# The name that a caller may ask for -> the platform that its kernel is lowered for. mosaic_gpu has no kernel yet.
PLATFORMS = {"xla": None, "mosaic_tpu": "tpu", "triton": "cuda", "mosaic_gpu": "cuda"}
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
            operands, cpu=lambda o: xla.run_streamed(task, o), default=lambda o: xla.run(task, o)
        )
    if interpret:
        return _KERNELS[implementation](task, operands, interpret=True)
    platform = PLATFORMS[implementation]
    assert platform is not None
    kernels = {platform: lambda o: _KERNELS[implementation](task, o)}
    return lax.platform_dependent(operands, **kernels, default=lambda o: _refuse(task, o, implementation))


_KERNELS: dict[str, Any] = {"mosaic_tpu": mosaic_tpu.run, "triton": triton.run}


def _choose(task: Task, operands: Operands) -> Result:
    kernels = {
        PLATFORMS[name]: lambda o, name=name: _KERNELS[name](task, o)
        for name in _KERNELS
        if refusal(name, task, operands) is None
    }
    return lax.platform_dependent(
        operands, **kernels, cpu=lambda o: xla.run_streamed(task, o), default=lambda o: xla.run(task, o)
    )


# A kernel asked for by name, lowered for a platform that isn't its own, has to say so when it is lowered: before that
# nobody knows the platform. The primitive stands in for the kernel there and raises from its lowering rule.
_refuse_p = Primitive("asl_pallas_refuse")
_refuse_p.multiple_results = True
_refuse_p.def_abstract_eval(lambda *operands, shapes, implementation: shapes)


def _refuse(task: Task, operands: Operands, implementation: str) -> Result:
    like = jax.eval_shape(lambda o: xla.run(task, o), operands)
    leaves, tree = jax.tree.flatten(like)
    shapes = tuple(jax.core.ShapedArray(leaf.shape, leaf.dtype) for leaf in leaves)
    found = _refuse_p.bind(*jax.tree.leaves(operands), shapes=shapes, implementation=implementation)
    return jax.tree.unflatten(tree, found)


def _lower_refusal(ctx, *operands, shapes, implementation):
    platforms = ctx.platforms or ctx.module_context.platforms
    raise NotImplementedError(
        f"implementation={implementation!r} needs the platform {PLATFORMS[implementation]!r}, and this is lowered for "
        f"{', '.join(map(repr, platforms))}; implementation=None picks what the platform has"
    )


mlir.register_lowering(_refuse_p, _lower_refusal)
