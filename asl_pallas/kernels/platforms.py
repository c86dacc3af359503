"""One operation whose code is chosen when it is lowered, by the platform that it is lowered for.

`jax.lax.platform_dependent` would do, but for two things: it traces the code of every platform at every call, and in a
module for several platforms (jax.export) it lowers each branch for all of them, where a Pallas kernel raises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir, xla

from asl_pallas.kernels.versions import narrows, quiet_triton, some_cuda_device

PLATFORMS = ("cpu", "tpu", "cuda")
# What jax.export wants to hear before it writes Triton kernels to a module: JAX doesn't promise to read them forever.
EXPORT_CHECKS = (jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton"),)

_by_platform_p = Primitive("asl_pallas_by_platform")
_by_platform_p.multiple_results = True


# A function of the operands whose results have the shapes and dtypes of every platform's, and each platform's function.
Code = tuple[Callable[..., Any], dict[str, Callable[..., Any]]]


def by_platform(operands: Any, code: Callable[[tuple[bool, ...]], Code]) -> Any:
    """`functions[platform](operands)` on the platforms named, functions["default"] on others.

    Args:
      operands: a pytree of arrays.
      code: of which results somebody asks for, in the order of their leaves and empty for all, `like` and the
        functions that give these alone. One that can't serve may raise: it is called only if it is lowered. Hashable.
    """
    leaves, tree = jax.tree.flatten(operands)
    found = _by_platform_p.bind(*leaves, code=_OfLeaves(code, tree), asked=())
    return jax.tree.unflatten(jax.tree.structure(jax.eval_shape(code(())[0], operands)), found)


@dataclasses.dataclass(frozen=True)
class _OfLeaves:
    """A `code` whose functions take and return the leaves of pytrees.

    It compares by value, as `code` itself should: an operation outside of jax.jit is compiled once for equal ones.
    """

    code: Callable[[tuple[bool, ...]], Code]
    tree: Any

    def __call__(self, asked: tuple[bool, ...]) -> Code:
        like, functions = self.code(asked)
        return self._of_leaves(like), {name: self._of_leaves(function) for name, function in functions.items()}

    def merged(self, leaves: list[Any], mapped: list[bool]) -> tuple[list[Any], _OfLeaves] | None:
        """One call for all that vmap maps over, where the code knows how: its results lie along their first dimension.

        Mapped leaves have the mapped dimension in front.
        """
        merge = getattr(self.code, "merged", None)
        merged = merge and merge(jax.tree.unflatten(self.tree, leaves), jax.tree.unflatten(self.tree, mapped))
        if not merged:
            return None
        operands, code = merged
        leaves, tree = jax.tree.flatten(operands)
        return leaves, _OfLeaves(code, tree)

    def _of_leaves(self, function: Callable[[Any], Any]) -> Callable[..., list[Any]]:
        return lambda *leaves: jax.tree.leaves(function(jax.tree.unflatten(self.tree, leaves)))


@_by_platform_p.def_abstract_eval
def _shapes(*avals, code, asked):
    return jax.make_jaxpr(code(asked)[0])(*avals).out_avals


# JAX's own way to run one operation. It compiles the operation under jax.disable_jit too. Where jax_debug_nans finds a
# NaN in its results it raises; a function of jax.jit would be run once more, operation by operation.
_by_platform_p.def_impl(functools.partial(xla.apply_primitive, _by_platform_p))


@dataclasses.dataclass(frozen=True)
class _Batched:
    """A `code` under jax.vmap; it compares by value."""

    code: Callable[[tuple[bool, ...]], Code]
    in_axes: tuple[int | None, ...]

    def __call__(self, asked: tuple[bool, ...]) -> Code:
        like, functions = self.code(asked)
        return jax.vmap(like, self.in_axes), {
            name: jax.vmap(function, self.in_axes) for name, function in functions.items()
        }


def _batch(leaves, dims, *, code, asked):
    moved = [leaf if dim is None else jnp.moveaxis(leaf, dim, 0) for leaf, dim in zip(leaves, dims, strict=True)]
    mapped = [dim is not None for dim in dims]
    merged = code.merged(moved, mapped) if isinstance(code, _OfLeaves) else None
    if merged is not None:
        size = next(leaf.shape[0] for leaf, is_mapped in zip(moved, mapped, strict=True) if is_mapped)
        merged_leaves, merged_code = merged
        found = _by_platform_p.bind(*merged_leaves, code=merged_code, asked=asked)
        found = [result.reshape(size, result.shape[0] // size, *result.shape[1:]) for result in found]
    else:
        batched = _Batched(code, tuple(0 if is_mapped else None for is_mapped in mapped))
        found = _by_platform_p.bind(*moved, code=batched, asked=asked)
    return found, (0,) * len(found)


batching.primitive_batchers[_by_platform_p] = _batch


def _explained(error: Exception, code: Any) -> Exception:
    """The error of a lowering, or what the code has to say about it."""
    while not hasattr(code, "explain") and hasattr(code, "code"):
        code = code.code
    return code.explain(error) if hasattr(code, "explain") else error


def _without_unused(used, equation):
    """jax.grad has no use for the loss, say: its code needs the gradient alone."""
    used = tuple(used)
    if not any(used):
        return [False] * len(equation.invars), None
    if not all(used):
        before = iter(used)
        asked = tuple(one and next(before) for one in equation.params["asked"]) or used
        equation = equation.replace(
            outvars=[var for var, one in zip(equation.outvars, used, strict=True) if one],
            params={**equation.params, "asked": asked},
        )
    return [True] * len(equation.invars), equation


narrows(_by_platform_p, _without_unused)


def _lowering(platform: str) -> Callable[..., Any]:
    def run(*leaves, code, asked):
        _, functions = code(asked)
        return functions[platform if platform in functions else "default"](*leaves)

    lower = mlir.lower_fun(run, multiple_results=True)

    def rule(*context_and_leaves, code, asked):
        with contextlib.ExitStack() as stack:
            if platform == "cuda":
                stack.enter_context(quiet_triton())
                stack.enter_context(some_cuda_device())
            try:
                return lower(*context_and_leaves, code=code, asked=asked)
            except Exception as error:
                said = _explained(error, code)
                if said is error:  # which must not become its own cause
                    raise
                raise said from error

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
