"""The sentence that forward mode gets: JAX's own names neither the reason nor the way out.

A custom_vjp has no rule for jax.jvp. `reverse_mode_only` marks an array whose tangent reverse mode transposes away and
forward mode runs into.
"""

from __future__ import annotations

import functools

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_SENTENCE = (
    "{} has no forward-mode derivative (jax.jvp, jax.jacfwd), since its kernels give the whole gradient "
    "in one pass; use jax.grad, jax.vjp or jax.jacrev, and jax.hessian for curvature"
)

_tangent_p = Primitive("asl_pallas_tangent")


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def reverse_mode_only(x: Array, function: str = "asymmetric_loss") -> Array:
    """x itself; `function` is whom the sentence names."""
    return x


@reverse_mode_only.defjvp
def _jvp(function, primals, tangents):
    return primals[0], _tangent_p.bind(tangents[0], function=function)


@_tangent_p.def_abstract_eval
def _shape(tangent, *, function):
    return tangent


@_tangent_p.def_impl
def _run(tangent, *, function):
    raise TypeError(_SENTENCE.format(function))


def _lower(ctx, tangent, *, function):
    raise TypeError(_SENTENCE.format(function))


mlir.register_lowering(_tangent_p, _lower)
ad.primitive_transposes[_tangent_p] = lambda cotangent, tangent, *, function: [cotangent]
# Reverse mode transposes a tangent before anything batches it; jax.jacfwd batches tangents.
batching.primitive_batchers[_tangent_p] = lambda operands, dims, *, function: _run(*operands, function=function)
