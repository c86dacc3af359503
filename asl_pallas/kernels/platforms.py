"""One operation whose code is chosen when it is lowered, by the platform that it is lowered for.

`jax.lax.platform_dependent` would do, but for two things: it traces the code of every platform at every call, and in a
module for several platforms (jax.export) it lowers each branch for all of them, where a Pallas kernel raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from asl_pallas.kernels.versions import quiet_triton

PLATFORMS = ("cpu", "tpu", "cuda")

_by_platform_p = Primitive("asl_pallas_by_platform")
_by_platform_p.multiple_results = True


def by_platform(operands: Any, like: Callable[[Any], Any], **code: Callable[[Any], Any]) -> Any:
    """`code[platform](operands)` on the platforms named, code["default"] on others.

    Args:
      operands: a pytree of arrays.
      like: a function of the operands whose results have the shapes and dtypes of every code's.
      **code: functions of the operands by platform; "default" among them. One that can't serve may raise: it is called
        only if it is lowered.
    """
    leaves, tree = jax.tree.flatten(operands)

    def flat(function: Callable[[Any], Any]) -> Callable[..., list[Any]]:
        return lambda *leaves: jax.tree.leaves(function(jax.tree.unflatten(tree, leaves)))

    found = _by_platform_p.bind(
        *leaves, like=flat(like), code=tuple((name, flat(function)) for name, function in code.items())
    )
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(like, operands)), found)


@_by_platform_p.def_abstract_eval
def _shapes(*avals, like, code):
    return jax.make_jaxpr(like)(*avals).out_avals


@_by_platform_p.def_impl
def _run(*leaves, like, code):
    return jax.jit(lambda *leaves: _by_platform_p.bind(*leaves, like=like, code=code))(*leaves)


def _batch(leaves, dims, *, like, code):
    moved = [leaf if dim is None else jnp.moveaxis(leaf, dim, 0) for leaf, dim in zip(leaves, dims, strict=True)]
    in_axes = tuple(None if dim is None else 0 for dim in dims)
    found = _by_platform_p.bind(
        *moved,
        like=jax.vmap(like, in_axes),
        code=tuple((name, jax.vmap(function, in_axes)) for name, function in code),
    )
    return found, (0,) * len(found)


batching.primitive_batchers[_by_platform_p] = _batch


def _lowering(platform: str) -> Callable[..., Any]:
    def run(*leaves, like, code):
        functions: dict[str, Any] = dict(code)
        return functions[platform if platform in functions else "default"](*leaves)

    lower = mlir.lower_fun(run, multiple_results=True)

    def rule(*context_and_leaves, **parameters):
        with quiet_triton() if platform == "cuda" else contextlib.nullcontext():
            return lower(*context_and_leaves, **parameters)

    return rule


for _platform in PLATFORMS:
    mlir.register_lowering(_by_platform_p, _lowering(_platform), platform=_platform)
mlir.register_lowering(_by_platform_p, _lowering("default"))


def tpu_generation() -> int | None:
    """Of the TPU that is compiled for, as far as JAX knows while it traces, else None.

    It knows of this process's TPU, or without one of the mesh in jax.set_mesh or jax.sharding.use_abstract_mesh.
    """
    from jax.experimental.pallas import tpu as pltpu

    try:
        return pltpu.get_tpu_info().generation
    except ValueError:  # not a TPU
        return None
