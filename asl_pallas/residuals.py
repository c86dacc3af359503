"""What the forward rule of a jax.custom_vjp keeps, in a pytree of one structure whichever inputs are differentiated.

With symbolic_zeros JAX traces a forward rule once for each set of differentiated inputs, but it remembers the structure
of the residuals, and which of them vmap maps over, once: of whichever set it traced last. Then jax.grad(f),
jax.grad(f, (0, 1)) and jax.grad(jax.checkpoint(f)) of the same f fail. Shapes it does remember. So what isn't kept is
an array without elements here, not None, and so are the names that the backward rule has to know.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import CustomVJPPrimal

# No operand has it, but for a mask of an empty batch.
_ABSENT = (0, 271_828)


def absent(like: Array) -> Array:
    """An array without elements, which vmap maps over where it maps over `like`."""
    none_of_it = like[:0] if like.ndim else like
    return jnp.broadcast_to(jnp.any(none_of_it.astype(bool)), _ABSENT)


def present(tree: Any) -> Any:
    """The tree with None for each array that is `absent`."""
    return jax.tree.map(lambda x: None if x.shape == _ABSENT and x.dtype == jnp.bool_ else x, tree)


def perturbed(arrays: Any) -> tuple[set[str], Any]:
    """Of a NamedTuple of custom_vjp's primals: the fields that are differentiated, and the arrays."""

    def is_primal(x: Any) -> bool:
        return isinstance(x, CustomVJPPrimal)

    names = {
        name
        for name, field in arrays._asdict().items()
        if any(leaf.perturbed for leaf in jax.tree.leaves(field, is_leaf=is_primal))
    }
    return names, jax.tree.map(lambda leaf: leaf.value, arrays, is_leaf=is_primal)


def as_array(chosen: Collection[str], names: Sequence[str]) -> Array:
    """Which of the names are chosen, in the shape of an array without elements."""
    return jnp.zeros((0, *(int(name in chosen) for name in names)), bool)


def from_array(array: Array, names: Sequence[str]) -> list[str]:
    """The names that `as_array` was given."""
    return [name for name, chosen in zip(names, array.shape[1:], strict=True) if chosen]
