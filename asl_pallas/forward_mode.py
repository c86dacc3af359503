"""The sentence that forward mode gets: JAX's own names neither the reason nor the way out.

A custom_vjp has no rule for jax.jvp. `reverse_mode_only` marks an array whose tangent reverse mode transposes away and
forward mode runs into.
"""

from __future__ import annotations

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_SENTENCE = (
    "asymmetric_loss has no forward-mode derivative (jax.jvp, jax.jacfwd), since its kernels give the whole gradient "
    "in one pass; use jax.grad, jax.vjp or jax.jacrev, and jax.hessian for curvature"
)

_tangent_p = Primitive("asl_pallas_tangent")


@jax.custom_jvp
def reverse_mode_only(x: Array) -> Array:
    """x itself."""
    return x


@reverse_mode_only.defjvp
def _jvp(primals, tangents):
    return primals[0], _tangent_p.bind(tangents[0])


@_tangent_p.def_abstract_eval
def _shape(tangent):
    return tangent


@_tangent_p.def_impl
def _run(tangent):
    raise TypeError(_SENTENCE)


def _lower(ctx, tangent):
    raise TypeError(_SENTENCE)


mlir.register_lowering(_tangent_p, _lower)
ad.primitive_transposes[_tangent_p] = lambda cotangent, tangent: [cotangent]
batching.primitive_batchers[_tangent_p] = lambda operands, dims: (_tangent_p.bind(operands[0]), dims[0])
