"""Errors that can only be raised late: when it is known what is being lowered for, or how it is differentiated.

Both are an operation that stands in for what can't be had. It has a shape, it can be traced, vmapped and transposed
away; whoever runs it or lowers it gets the sentence that it carries.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_refuse_p = Primitive("asl_pallas_refuse")
_refuse_p.multiple_results = True


def refuse(error: type[Exception], sentence: str, operands: Any, like: Any) -> Any:
    """Arrays of the shapes of `like` that depend on `operands`; running or lowering them raises `error(sentence)`."""
    leaves, tree = jax.tree.flatten(like)
    shapes = tuple(jax.core.ShapedArray(leaf.shape, leaf.dtype) for leaf in leaves)
    found = _refuse_p.bind(*jax.tree.leaves(operands), shapes=shapes, error=error, sentence=sentence)
    return jax.tree.unflatten(tree, found)


@jax.custom_jvp
def reverse_mode_only(x: Array) -> Array:
    """x, with a tangent that reverse mode transposes away and forward mode runs into."""
    return x


@reverse_mode_only.defjvp
def _reverse_mode_only_jvp(primals, tangents):
    sentence = (
        "asymmetric_loss has no forward-mode derivative (jax.jvp, jax.jacfwd), since its kernels give the whole "
        "gradient in one pass; use jax.grad, jax.vjp or jax.jacrev, and jax.hessian for curvature"
    )
    return primals[0], refuse(TypeError, sentence, tangents, tangents[0])


@_refuse_p.def_abstract_eval
def _shapes(*operands, shapes, error, sentence):
    return shapes


@_refuse_p.def_impl
def _run(*operands, shapes, error, sentence):
    raise error(sentence)


def _lower(ctx, *operands, shapes, error, sentence):
    raise error(sentence)


def _transpose(cotangents, operand, *, shapes, error, sentence):
    return cotangents  # only ever linear as the identity of `reverse_mode_only`


def _batch(operands, dims, *, shapes, error, sentence):
    (size,) = {o.shape[d] for o, d in zip(operands, dims, strict=True) if d is not None}
    moved = [o if d is None else jnp.moveaxis(o, d, 0) for o, d in zip(operands, dims, strict=True)]
    shapes = tuple(jax.core.ShapedArray((size, *shape.shape), shape.dtype) for shape in shapes)
    found = _refuse_p.bind(*moved, shapes=shapes, error=error, sentence=sentence)
    return found, (0,) * len(found)


mlir.register_lowering(_refuse_p, _lower)
ad.primitive_transposes[_refuse_p] = _transpose
batching.primitive_batchers[_refuse_p] = _batch
