"""The sentence that forward mode gets: JAX's own names neither the reason nor the way out.

A custom_vjp has no rule for jax.jvp. `reverse_mode_only` marks an array whose tangent reverse mode transposes away and
forward mode runs into.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_SENTENCE = (
    "{} has no forward-mode derivative (jax.jvp, jax.jacfwd), since its kernels give the whole gradient "
    "in one pass; use jax.grad, jax.vjp or jax.jacrev, and jax.hessian for curvature"
)

# Operands: a tangent, and nothing of its primal, which tells jax.jacfwd: that maps over tangents alone.
_tangent_p = Primitive("asl_pallas_tangent")


def reverse_mode_only(function: str, arrays: Any) -> Any:
    """The arrays themselves, integers as they are; `function` is whom the sentence names."""
    return jax.tree.map(lambda x: _marked(x, function) if jnp.issubdtype(x.dtype, jnp.floating) else x, arrays)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _marked(x: Array, function: str) -> Array:
    return x


@_marked.defjvp
def _jvp(function, primals, tangents):
    (x,) = primals
    nothing = lax.stop_gradient(x[:0] if x.ndim else x)
    return x, _tangent_p.bind(tangents[0], nothing, function=function)


@_tangent_p.def_abstract_eval
def _shape(tangent, nothing, *, function):
    return tangent


def _refuse(*_, function):
    raise TypeError(_SENTENCE.format(function))


def _batch(operands, dims, *, function):
    tangent, nothing = operands
    if dims[1] is None:
        _refuse(function=function)
    if dims[0] is None:
        tangent = jnp.broadcast_to(tangent, (nothing.shape[dims[1]], *tangent.shape))
    return _tangent_p.bind(tangent, nothing, function=function), 0 if dims[0] is None else dims[0]


_tangent_p.def_impl(_refuse)
mlir.register_lowering(_tangent_p, _refuse)
ad.primitive_transposes[_tangent_p] = lambda cotangent, *_, function: [cotangent, None]
batching.primitive_batchers[_tangent_p] = _batch
