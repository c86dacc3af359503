"""Reverse-mode rules that know which inputs are differentiated, and the sentence that forward mode gets.

jax.custom_vjp(symbolic_zeros=True) would do, but for this: JAX memoises its forward rule by which inputs are
differentiated, and keeps the structure of its residuals once, for whichever it traced last. With residuals that depend
on it, jax.grad(f, 0), jax.grad(f, (0, 1)) and jax.grad(jax.checkpoint(f), 0) of the same f fail, or mix up gradients.
jax.custom_jvp keeps nothing of the kind. So its rule computes value and residuals, and `transposes_to` makes a tangent
of them that has a transpose alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Backward = Callable[[Any, Array], dict[str, Any]]


def perturbed(tangents: Any) -> dict[str, Any]:
    """Of a NamedTuple of tangents those that aren't zero for certain, by name."""
    found = {name: tangent for name, tangent in tangents._asdict().items() if tangent is not None}
    return {
        name: tangent
        for name, tangent in found.items()
        if not isinstance(tangent, SymbolicZero) and tangent.dtype != jax.dtypes.float0
    }


def transposes_to(function: str, value: Array, backward: Backward, residuals: Any, tangents: dict[str, Array]) -> Array:
    """The tangent of `value`, for reverse mode alone: its transpose is `backward(residuals, cotangent)`.

    Args:
      function: whom the sentence for forward mode names.
      backward: gives the cotangent of each of `tangents`, by name.
      residuals: a pytree of arrays.
    """
    leaves, tree = jax.tree.flatten(residuals)
    names = tuple(tangents)

    def flat(*leaves_and_cotangent: Array) -> list[Array]:
        *leaves, cotangent = leaves_and_cotangent
        found = backward(jax.tree.unflatten(tree, leaves), cotangent)
        return [found[name] for name in names]

    sentence = (
        f"{function} has no forward-mode derivative (jax.jvp, jax.jacfwd), since its kernels give the whole gradient "
        "in one pass; use jax.grad, jax.vjp or jax.jacrev, and jax.hessian for curvature"
    )
    return _tangent_p.bind(value, *leaves, *tangents.values(), backward=flat, count=len(leaves), sentence=sentence)


# Operands: the value, for its shape alone; `count` residuals; the tangents.
_tangent_p = Primitive("asl_pallas_tangent")


@_tangent_p.def_abstract_eval
def _shape(value, *_, **__):
    return value


def _transpose(cotangent, value, *operands, backward, count, sentence):
    residuals, tangents = operands[:count], operands[count:]
    if isinstance(cotangent, ad.Zero):
        return [None] * (1 + len(operands))
    found = backward(*residuals, cotangent)
    return [None] * (1 + count) + [
        c if ad.is_undefined_primal(t) else None for c, t in zip(found, tangents, strict=True)
    ]


def _batch(operands, dims, *, backward, count, sentence):
    if dims[0] is None:  # tangents are mapped and primals aren't: jax.jacfwd
        raise TypeError(sentence)
    size = operands[0].shape[dims[0]]
    moved = [
        operand if dim is None else jnp.moveaxis(operand, dim, 0) for operand, dim in zip(operands, dims, strict=True)
    ]
    in_axes = tuple(None if dim is None else 0 for dim in dims[1 : 1 + count])
    moved[1 + count :] = [
        jnp.broadcast_to(operand, (size, *operand.shape)) if dim is None else operand
        for operand, dim in zip(moved[1 + count :], dims[1 + count :], strict=True)
    ]
    mapped = jax.vmap(backward, in_axes=(*in_axes, 0))
    return _tangent_p.bind(*moved, backward=mapped, count=count, sentence=sentence), 0


def _raise(*_: Any, sentence: str, **__: Any) -> Any:
    raise TypeError(sentence)


_tangent_p.def_impl(_raise)
mlir.register_lowering(_tangent_p, _raise)
ad.primitive_jvps[_tangent_p] = _raise
ad.primitive_transposes[_tangent_p] = _transpose
batching.primitive_batchers[_tangent_p] = _batch
