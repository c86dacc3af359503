"""A training step of a linear head in which the kernel's gradient is never whole."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from asl_pallas import arguments, call, chunks, head_sharding, kernels
from asl_pallas.chunks import Arrays, Step, Work
from asl_pallas.head import layout_of, prepare
from asl_pallas.head_sharding import HeadLayout
from asl_pallas.kernels.versions import unify_varying_axes
from asl_pallas.labels import PackedLabels, SparseLabels
from asl_pallas.losses import ElementwiseLoss
from asl_pallas.partial_labels import PartialLabels

_FUNCTION = "linear_multilabel_step"
# What makes a number of several elements, or moves elements to others' places.
_NOT_ELEMENTWISE = ("reduce", "arg", "dot", "conv", "cum", "sort", "top_k", "gather", "scatter", "rev", "transpose")


class HeadStep(NamedTuple):
    """What `linear_multilabel_step` returns.

    Attributes:
      loss: the total, as of `linear_multilabel_loss` with axis=None.
      features: its gradient with respect to the features, for the backward pass of what made them.
      bias: its gradient with respect to the bias; None without one.
      kernel, state: the new ones.
    """

    loss: Array
    features: Array
    bias: Array | None
    kernel: Array
    state: Any


def linear_multilabel_step(
    loss: ElementwiseLoss,
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | PackedLabels | SparseLabels | PartialLabels,
    optimizer: Any,
    state: Any,
    *,
    bias: ArrayLike | None = None,
    rounding_key: Array | None = None,
    chunk_size: int | None = None,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    ignore_label: int | None = None,
    label_smoothing: float = 0.0,
    precision: Any = None,
    features_spec: PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    implementation: str | None = None,
) -> HeadStep:
    r"""Loss and features' gradient of `linear_multilabel_loss(..., axis=None)`, and the kernel after its update.

    A chunk of the kernel is updated as soon as its gradient is known, so that the gradient of the whole kernel never
    exists: with a million classes it would be as large as the kernel. Under jax.jit with kernel and state donated,
    both are updated in place:

        step = jax.jit(linear_multilabel_step, static_argnames="optimizer", donate_argnames=("kernel", "state"))
        state = optimizer.init(kernel)
        loss, of_features, _, kernel, state = step(asl, features, kernel, labels, optimizer=optimizer, state=state)

    The features' gradient is that for the kernel before its update. A mean over the batch is weights=1 / batch.

    Args:
      loss, features, kernel, labels: as in `linear_multilabel_loss`.
      optimizer: an optax GradientTransformation whose update of an element depends on this element alone: sgd with or
        without momentum, adam, adamw, adagrad, rmsprop, lion, their chains and schedules. What looks at more, such as
        clipping by a norm or a factored second moment, is refused. Or a function of a chunk: (kernel (d, n), gradient
        (d, n) in float32, state) to (kernel, state). It may look at all of a class, and at nothing of another.
      state: the optimizer's, `optimizer.init(kernel)`; for a function a pytree of arrays (d, classes) or (classes,).
      bias: (classes,), a float dtype. Its gradient is returned, and it is not updated.
      rounding_key: with a JAX key, a kernel narrower than float32 is rounded stochastically, so that updates smaller
        than half of its last bit count on average. A key of its own for each step.
      chunk_size, where, weights, pos_weight, ignore_label, label_smoothing: as in `linear_asymmetric_loss`.
      precision, features_spec, kernel_spec, implementation: as in `linear_asymmetric_loss`.

    Returns:
      `HeadStep`. No part of it can be differentiated.

    Raises:
      ValueError, TypeError: an argument of the wrong kind, shape or range, before anything is compiled; an optimizer
        that isn't elementwise.
      NotImplementedError: the implementation asked for by name can't serve the call or the platform.
    """
    prepared = prepare(
        loss,
        features,
        kernel,
        labels,
        bias=bias,
        chunk_size=chunk_size,
        precision=precision,
        features_spec=features_spec,
        kernel_spec=kernel_spec,
        axis=None,
        where=where,
        weights=weights,
        pos_weight=pos_weight,
        ignore_label=ignore_label,
        label_smoothing=label_smoothing,
        implementation=implementation,
    )
    arrays = prepared.arrays
    _check_optimizer(optimizer, state, arrays.kernel)
    constants = arguments.constants(arrays, arrays.kernel)
    return _compiled(prepared.work, prepared.specs, constants, optimizer, arrays, state, rounding_key)


def _is_optax(optimizer: Any) -> bool:
    return hasattr(optimizer, "update") and hasattr(optimizer, "init")


def _check_optimizer(optimizer: Any, state: Any, kernel: Array) -> None:
    shapes = {jnp.shape(leaf) for leaf in jax.tree.leaves(state)}
    if _is_optax(optimizer):
        if wrong := shapes - {(), kernel.shape}:
            raise ValueError(
                f"the optimizer's state has an array of shape {wrong.pop()} for a kernel of {kernel.shape}; expected "
                "numbers, and arrays of the kernel's shape: its update of an element may depend on that element alone"
            )
        _check_elementwise(optimizer, state, kernel)
    elif not callable(optimizer):
        raise TypeError(
            f"optimizer={optimizer!r}; expected an optax GradientTransformation, or a function (kernel, gradient, "
            "state) -> (kernel, state)"
        )
    elif wrong := shapes - {kernel.shape, kernel.shape[1:]}:
        raise ValueError(
            f"state holds an array of shape {wrong.pop()}; expected {kernel.shape} or {kernel.shape[1:]}, to be cut "
            "along the classes; numbers for all classes belong into the function"
        )


def _check_elementwise(optimizer: Any, state: Any, kernel: Array) -> None:
    """By the operations of its update."""
    gradient = jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)
    program = jax.make_jaxpr(optimizer.update)(gradient, state, gradient)
    for name in _operations(program.jaxpr):
        if name.startswith(_NOT_ELEMENTWISE):
            raise ValueError(
                f"the optimizer's update isn't elementwise: it has the operation {name}; expected one whose update of "
                "an element depends on that element alone, without clipping by a norm or a factored second moment"
            )


def _operations(jaxpr: Jaxpr) -> Any:
    """Names of those that take an array, in all parts of a program."""
    for equation in jaxpr.eqns:
        params = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program)
        parts = [part for part in params if _is_program(part)]
        for part in parts:
            yield from _operations(part.jaxpr if isinstance(part, ClosedJaxpr) else part)
        if not parts and any(getattr(var.aval, "ndim", 0) for var in equation.invars):
            yield equation.primitive.name


def _is_program(part: Any) -> bool:
    return isinstance(part, (ClosedJaxpr, Jaxpr))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _compiled(
    work: Work,
    specs: tuple[PartitionSpec | None, PartitionSpec | None],
    constants: tuple[str, ...],
    optimizer: Any,
    arrays: Arrays,
    state: Any,
    key: Array | None,
) -> HeadStep:
    shape = (*arrays.features.shape[:-1], arrays.kernel.shape[1])
    kernel, has_bias = arrays.kernel, arrays.bias is not None
    arrays = call.laid_out(_FUNCTION, work.task.loss, constants, arrays, shape, arrays.features.dtype)
    work = dataclasses.replace(work, gradients=("features", "bias") if has_bias else ("features",))
    leaves, structure = jax.tree.flatten(state)
    is_cut = [leaf.ndim > 0 for leaf in leaves]
    numbers = [leaf for leaf, cut in zip(leaves, is_cut, strict=True) if not cut]

    def update(kernel: Array, gradient: Array, parts: list[Array], numbers: list[Array]) -> tuple[Array, Any]:
        of_each = {True: iter(parts), False: iter(numbers)}
        its_state = jax.tree.unflatten(structure, [next(of_each[cut]) for cut in is_cut])
        if not _is_optax(optimizer):
            return optimizer(kernel, gradient, its_state)
        dtype = jnp.promote_types(kernel.dtype, gradient.dtype)
        updates, new = optimizer.update(gradient.astype(kernel.dtype), its_state, kernel)
        return kernel.astype(dtype) + updates.astype(dtype), new

    def of_chunk(
        start: Any, kernel: Array, gradient: Array, parts: list[Array], beside: tuple[list[Array], Array | None]
    ) -> tuple[Array, list[Array]]:
        numbers, key = beside
        new, its_state = update(kernel, gradient, parts, numbers)
        if key is not None and kernel.dtype == jnp.bfloat16 and new.dtype == jnp.float32:
            new = _rounded(jax.random.fold_in(key, start), new)
        new_leaves = zip(jax.tree.leaves(its_state), is_cut, strict=True)
        of_parts = [leaf for leaf, cut in new_leaves if cut]
        return new.astype(kernel.dtype), [leaf.astype(part.dtype) for leaf, part in zip(of_parts, parts, strict=True)]

    step = Step(of_chunk, [leaf for leaf, cut in zip(leaves, is_cut, strict=True) if cut], (numbers, key))
    layout = layout_of(arrays.features, arrays.kernel, *specs, _FUNCTION)
    if isinstance(layout, HeadLayout):
        arrays = unify_varying_axes(head_sharding.lay(arrays, work.task.labels, layout))
        found = head_sharding.on_shards(work, arrays, layout, total=True, step=step)
    else:
        if layout == "unknown":
            work = dataclasses.replace(work, implementation=kernels.PLAIN)
        found = chunks.run(work, unify_varying_axes(arrays), step=step).summed()
    # Numbers are the same after any chunk.
    first = jax.tree.map(lambda array: jnp.zeros((*array.shape[:-1], 1), array.dtype), (kernel, step.state))
    _, after = update(first[0], first[0].astype(jnp.float32), first[1], numbers)
    of_each = {
        True: iter(found.state),
        False: (n for n, cut in zip(jax.tree.leaves(after), is_cut, strict=True) if not cut),
    }
    new_state = jax.tree.unflatten(structure, [next(of_each[cut]) for cut in is_cut])
    of_features = found.features.astype(arrays.features.dtype)
    return HeadStep(found.value, of_features, found.bias, found.kernel, new_state)


def _rounded(key: Array, x: Array) -> Array:
    """float32 as bfloat16, up or down with the probability that makes it right on average."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    up_or_down = lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), up_or_down, x).astype(jnp.bfloat16)
