"""What differs between the versions of JAX that we support, 0.10.2 and up: all of it is here."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, partial_eval


def reciprocal(x: Array, *, approx: bool = False) -> Array:
    """1 / x as a TPU does it, for finite x whose reciprocal is finite. Moved to pallas.tpu in 0.11.

    To half a unit in the last place or nearly, or as the chip's own estimate, which is as good from v6e on.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    module = pltpu if hasattr(pltpu, "reciprocal") else pl
    return module.reciprocal(x, approx=True) if approx else module.reciprocal(x, full_range=False)


def unify_varying_axes(operands: Any) -> Any:
    """The operands, all varying over the union of the manual mesh axes that any of them varies over.

    Inside a shard_map that checks this (check_vma, its default) a kernel's operands and results have to agree.
    """
    leaves = jax.tree.leaves(operands)
    union = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves))

    def vary(leaf: Array) -> Array:
        lacking = tuple(sorted(union - jax.typeof(leaf).manual_axis_type.varying))
        return lax.pcast(leaf, lacking, to="varying") if lacking else leaf

    return jax.tree.map(vary, operands)


def vary_as_operands(function: Callable[[Any], Any], operands: Any) -> Any:
    """function(operands), for a `function` that is a shard_map with check_vma=False inside of one that checks.

    JAX forgets there what varies over the outer shard_map's manual axes, and then takes the results, and on the way
    back the cotangents, for alike on all devices. Here all vary, alike, as the operands do, and derivatives too.
    """
    operands = unify_varying_axes(operands)
    names = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(operands)))
    if not names:
        return function(operands)
    forgetful = jax.tree.map(lambda leaf: _varying_p.bind(leaf, before=names, after=frozenset()), operands)
    return jax.tree.map(lambda leaf: _varying_p.bind(leaf, before=frozenset(), after=names), function(forgetful))


# The operand, with another note of what it varies over, where JAX's own lax.pcast would sum on the way back.
_varying_p = Primitive("asl_pallas_varying")


@_varying_p.def_abstract_eval
def _noted(operand, *, before, after):
    kept = operand.manual_axis_type.varying - before
    return operand.update(manual_axis_type=operand.manual_axis_type.update(varying=kept | after))


_varying_p.def_impl(lambda operand, **_: operand)
mlir.register_lowering(_varying_p, lambda context, operand, **_: [operand])
ad.deflinear2(
    _varying_p, lambda cotangent, _, *, before, after: [_varying_p.bind(cotangent, before=after, after=before)]
)
batching.primitive_batchers[_varying_p] = lambda operands, dims, **names: (_varying_p.bind(*operands, **names), dims[0])


def result_like(operand: Array, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    """The shape of a kernel's result, which varies over the manual mesh axes that the operand does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(operand).manual_axis_type)


def least(a: Array, b: Array | int) -> Array:
    """The lesser of two integers, so that XLA's CPU backend runs the loop around it on all cores.

    From 0.11 on it takes a loop for small, and gives it one core, unless there is something in it like a sort.
    """
    if jax.__version_info__ < (0, 11):
        return jnp.minimum(a, b)
    return lax.sort(jnp.stack([a, jnp.asarray(b, a.dtype)]))[0]


def narrows(primitive: Primitive, rule: Callable[[list[bool], Any], tuple[list[bool], Any]]) -> None:
    """Has JAX ask, as it lowers, what is left of an equation of whose results only some are used.

    The rule takes which, and the equation; JAX passes a third argument between the two from 0.11 on.
    """
    partial_eval.dce_rules[primitive] = lambda used, *more: rule(used, more[-1])


@contextlib.contextmanager
def quiet_triton() -> Iterator[None]:
    """Lowers Pallas's Triton kernels without the notice, since 0.11, that this backend will go one day.

    It is addressed to us, and nothing that our user could act on: the successor is our `mosaic_gpu`.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        yield


@contextlib.contextmanager
def some_cuda_device() -> Iterator[None]:
    """Lowers Triton kernels also where neither this host nor the mesh in context has a GPU, as for jax.export.

    From 0.11 on JAX asks for the device there, for its compute capability. Our kernels are the same for all; 0.10 takes
    9.0 by itself.
    """
    mesh = jax.sharding.get_abstract_mesh()
    known = getattr(mesh, "abstract_device", None) or _default_device()
    if jax.__version_info__ < (0, 11) or known.platform in ("gpu", "cuda", "rocm"):
        yield
        return
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(mesh.update(abstract_device=device)):
        yield


def _default_device() -> Any:
    config: Any = jax.config  # whose attributes the type checker does not know
    device = config.jax_default_device
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]


def lacks_mosaic_gpu() -> str | None:
    """Why this JAX can't run our Mosaic GPU kernel, or None: 0.10 has it under other names and no interpreter."""
    if jax.__version_info__ >= (0, 11):
        return None
    return f"it is written for Mosaic GPU as of JAX 0.11, and this is {jax.__version__}; 'triton' serves"


def mosaic_gpu_module() -> Any:
    """Pallas's module for Mosaic GPU, as Any: its signatures differ, and no type checker can be right about both."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def mosaic_gpu_kernel(
    body: Callable[..., None],
    results: Any,  # a pytree, which the body gets as one argument after its operands'
    scratch: dict[str, Any],
    programs: int,
    name: str,
    interpret: bool,
    approximate: bool,
) -> Callable[..., Any]:
    """A Mosaic GPU kernel whose programs, a warpgroup each, know their number as the axis "program"; from 0.11."""
    plgpu = mosaic_gpu_module()
    kernel = plgpu.kernel(
        body,
        out_type=[results],
        scratch_types=scratch,
        grid=(programs,),
        grid_names=("program",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            approx_math=approximate, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return lambda *operands: kernel(*operands)[0]
