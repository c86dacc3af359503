"""linear_asymmetric_loss and linear_top_k: a linear head, and neither its logits nor their gradient in memory."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from asl_pallas import arguments, call, chunks, head_sharding, kernels, vjp
from asl_pallas.chunks import PARAMETERS, Arrays, Work
from asl_pallas.foreign_names import explains_foreign_names
from asl_pallas.head_sharding import HeadLayout
from asl_pallas.kernels.summation import sum_over
from asl_pallas.kernels.tile import compute_dtype
from asl_pallas.kernels.versions import unify_varying_axes
from asl_pallas.labels import PackedLabels, SparseLabels
from asl_pallas.losses import AsymmetricLoss, ElementwiseLoss
from asl_pallas.partial_labels import PartialLabels
from asl_pallas.sharding import CannotCutError
from asl_pallas.statistics import Statistics, of_sums


@explains_foreign_names
def linear_asymmetric_loss(
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | PackedLabels | SparseLabels,
    *,
    bias: ArrayLike | None = None,
    chunk_size: int | None = None,
    gamma_neg: ArrayLike = 4.0,
    gamma_pos: ArrayLike = 1.0,
    clip: ArrayLike = 0.05,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    ignore_label: int | None = None,
    label_smoothing: float = 0.0,
    stop_focus_gradient: bool = False,
    precision: Any = None,
    features_spec: PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    implementation: str | None = None,
) -> Array:
    r"""`asymmetric_loss(features @ kernel + bias, labels)` without the logits.

    The classes come a chunk at a time: the chunk's logits, their loss and gradient by the kernel of `asymmetric_loss`,
    and both of its gradient products, before the next chunk. A sigmoid loss needs no normaliser across the classes, so
    that nothing forces more than one chunk to exist.

    Args:
      features: (..., d), float32, bfloat16, float16 or float64.
      kernel: (d, classes), a float dtype, as in flax's Linear and Dense. It enters the products in the features' dtype.
      labels: (..., classes), of the kinds that `asymmetric_loss` takes: dense, `PackedLabels` or `SparseLabels`.
      bias: (classes,), a float dtype, added in float32.
      chunk_size: classes at a time, a Python int; None for as many as fit the chip's fast memory. One that doesn't
        divide the classes is fine. Other values change rounding, speed and memory alone.
      gamma_neg, gamma_pos, clip, where, weights, pos_weight, ignore_label, label_smoothing, stop_focus_gradient: as in
        `asymmetric_loss`. Features of an example, or the kernel's column of a class, of which where or ignore_label
        leave everything out may be NaN.
      axis: what is summed, as in `asymmetric_loss`; the classes have to be among it. None, the total, is the cheapest
        to train with: loss and gradients come from one pass, of three products. A loss an example has its cotangent
        to wait for: the backward pass computes the logits once more, for four products in all.
      precision: of the products, as in jax.lax.dot_general.
      features_spec, kernel_spec: how features and kernel lie on mesh axes that are Auto, where JAX can't see it.
        Explicit axes need none. The features are shared out along their leading dimensions, the kernel along its
        classes and, as in fully sharded training, along d: that is gathered a chunk at a time.
      implementation: of the elementwise part, as in `asymmetric_loss`. The products are XLA's.

    Returns:
      The loss, float32, or float64 for float64 features. Products are of the features' dtype and add up in float32;
      logits are float32, and their gradient is rounded to the features' dtype before its products. Each gradient has
      the dtype of what it belongs to; the features' adds up in float32, over chunks and devices, and the others' over
      devices in their own dtype. Reverse mode differentiates with respect to
      features, kernel, bias, float labels, weights and pos_weight, twice as well; but for the first three, and for all
      second derivatives, that is autodiff of the formula, chunk by chunk.

    Raises:
      ValueError, TypeError: an argument of the wrong kind, shape or range, before anything is compiled; a derivative
        with respect to a gamma or clip; a forward-mode derivative.
      NotImplementedError: the implementation asked for by name can't serve the call or the platform.

    Reference:
      The loss: https://arxiv.org/abs/2009.14119, equations (4) to (7).
    """
    loss = AsymmetricLoss(gamma_neg, gamma_pos, clip, arguments.check_flag("stop_focus_gradient", stop_focus_gradient))
    return _linear_loss(
        "linear_asymmetric_loss",
        loss,
        features,
        kernel,
        labels,
        bias=bias,
        chunk_size=chunk_size,
        axis=axis,
        where=where,
        weights=weights,
        pos_weight=pos_weight,
        ignore_label=ignore_label,
        label_smoothing=label_smoothing,
        precision=precision,
        features_spec=features_spec,
        kernel_spec=kernel_spec,
        implementation=implementation,
    )


@explains_foreign_names
def linear_multilabel_loss(
    loss: ElementwiseLoss,
    features: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike | PackedLabels | SparseLabels | PartialLabels,
    *,
    bias: ArrayLike | None = None,
    chunk_size: int | None = None,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    ignore_label: int | None = None,
    label_smoothing: float = 0.0,
    statistics: bool = False,
    precision: Any = None,
    features_spec: PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
    implementation: str | None = None,
) -> Any:
    r"""`multilabel_loss(loss, features @ kernel + bias, labels)` without the logits.

    Args:
      loss: a loss object, as in `multilabel_loss`.
      features, kernel, labels, bias, chunk_size, axis, precision, features_spec, kernel_spec, implementation: as in
        `linear_asymmetric_loss`.
      where, weights, pos_weight, ignore_label, label_smoothing, statistics: as in `multilabel_loss`.

    Returns:
      The loss, float32, or float64 for float64 features, see `linear_asymmetric_loss`; with statistics=True the pair of
      it and `Statistics`.

    Raises:
      ValueError, TypeError: an argument of the wrong kind, shape or range, before anything is compiled; a derivative
        with respect to a hyper-parameter; a forward-mode derivative.
      NotImplementedError: the implementation asked for by name can't serve the call or the platform.
    """
    return _linear_loss(
        "linear_multilabel_loss",
        loss,
        features,
        kernel,
        labels,
        bias=bias,
        chunk_size=chunk_size,
        axis=axis,
        where=where,
        weights=weights,
        pos_weight=pos_weight,
        ignore_label=ignore_label,
        label_smoothing=label_smoothing,
        statistics=statistics,
        precision=precision,
        features_spec=features_spec,
        kernel_spec=kernel_spec,
        implementation=implementation,
    )


def _linear_loss(
    function: str,
    loss: Any,
    features: Any,
    kernel: Any,
    labels: Any,
    *,
    bias: Any,
    chunk_size: Any,
    precision: Any,
    features_spec: Any,
    kernel_spec: Any,
    **options: Any,
) -> Any:
    x = arguments.check_features(features)
    w = arguments.check_kernel(kernel, x)
    # What the checks of multilabel_loss ask about the logits.
    logits = jax.ShapeDtypeStruct((*x.shape[:-1], w.shape[1]), compute_dtype(x.dtype))
    checked = call.check(loss, logits, labels, **options)
    if logits.ndim - 1 not in checked.axes:
        raise ValueError(
            f"axis={options['axis']!r} leaves the classes in, an array of the logits' size; expected -1, None or a "
            "tuple with the classes' axis"
        )
    work = Work(
        task=checked.task,
        gradients=(),
        chunk=arguments.check_chunk_size(chunk_size),
        precision=arguments.check_precision(precision),
        implementation=checked.implementation,
        interpret=checked.interpret,
    )
    execution = _Execution(function, work, total=checked.axes == tuple(range(logits.ndim)), layout=None)
    specs = arguments.check_spec("features", features_spec, x.ndim), arguments.check_spec("kernel", kernel_spec, 2)
    arrays = Arrays(features=x, kernel=w, bias=arguments.check_bias(bias, w), **checked.arrays)
    losses, found = _compiled(execution, checked.axes, specs, arguments.constants(arrays, w), arrays)
    return (losses, found) if checked.task.statistics else losses


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _compiled(
    execution: _Execution,
    axes: tuple[int, ...],
    specs: tuple[PartitionSpec | None, PartitionSpec | None],
    constants: tuple[str, ...],
    arrays: Arrays,
) -> tuple[Array, Statistics | None]:
    shape = (*arrays.features.shape[:-1], arrays.kernel.shape[1])
    arrays = call.laid_out(
        execution.function, execution.work.task.loss, constants, arrays, shape, arrays.features.dtype
    )
    layout = _layout_of(arrays.features, arrays.kernel, *specs, execution.function)
    if layout == "unknown":
        execution = execution.plain()
    elif isinstance(layout, HeadLayout):
        execution = dataclasses.replace(execution, layout=layout)
        arrays = head_sharding.lay(arrays, execution.work.task.labels, layout)
    # Here, so that the gradient of what doesn't vary over a manual mesh axis is summed over it by JAX.
    losses, sums = vjp.loss(execution, unify_varying_axes(arrays))
    elements = math.prod(shape) if execution.total else shape[-1]
    found = losses, None if sums is None else of_sums(losses, sums, elements)
    others = () if execution.total else tuple(axis for axis in axes if axis != len(shape) - 1)
    return jax.tree.map(lambda part: sum_over(part, others), found)


@dataclasses.dataclass(frozen=True)
class _Execution:
    """How a head's loss is carried out; `vjp.Execution` says what the methods are.

    Attributes:
      total: the losses are summed over the examples as well.
    """

    function: str
    work: Work
    total: bool
    layout: HeadLayout | None

    parameters: ClassVar[tuple[str, ...]] = PARAMETERS

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        return self.work.task.loss.traced()

    def asking_for(self, value: bool, gradients: tuple[str, ...]) -> _Execution:
        statistics = self.work.task.statistics and value
        task = dataclasses.replace(self.work.task, value="rows" if value else None, statistics=statistics)
        return dataclasses.replace(self, work=dataclasses.replace(self.work, task=task, gradients=gradients))

    def plain(self) -> _Execution:
        return dataclasses.replace(self, work=dataclasses.replace(self.work, implementation=kernels.PLAIN))

    def evaluate(self, arrays: Arrays) -> vjp.Outputs:
        if self.layout is None:
            found = chunks.run(self.work, arrays)
            if self.total:
                found = found.summed()
        else:
            found = head_sharding.on_shards(self.work, arrays, self.layout, self.total)
        gradients = {name: getattr(found, name) for name in self.work.gradients}
        if "features" in gradients:
            gradients["features"] = gradients["features"].astype(arrays.features.dtype)
        return vjp.Outputs(found.value, gradients, found.sums)

    def gives_both(self, arrays: Arrays, wanted: tuple[str, ...]) -> bool:
        """For the total alone: a loss per example has a cotangent per example, which belongs under the sum over them.

        Nor float16 gradients, which could vanish before a loss scale came.
        """
        dtypes = {getattr(arrays, name).dtype for name in ("features", *wanted)}
        return self.total and jnp.dtype(jnp.float16) not in dtypes

    def times(self, gradient: Array, cotangent: Array) -> Array:
        return (gradient.astype(cotangent.dtype) * cotangent).astype(gradient.dtype)

    def with_cotangent(self, arrays: Arrays, cotangent: Array) -> Arrays:
        by_example = cotangent[..., None]
        if self.total:
            by_example = jnp.broadcast_to(cotangent, (*arrays.features.shape[:-1], 1))
        return arrays._replace(cotangent=by_example)


def linear_top_k(
    features: ArrayLike,
    kernel: ArrayLike,
    k: int,
    *,
    loss: ElementwiseLoss | None = None,
    bias: ArrayLike | None = None,
    chunk_size: int | None = None,
    precision: Any = None,
    features_spec: PartitionSpec | None = None,
    kernel_spec: PartitionSpec | None = None,
) -> tuple[Array, Array]:
    """`jax.lax.top_k(features @ kernel + bias, k)` without the logits: the best k labels of each example.

    Args:
      features, kernel, bias, chunk_size, precision, features_spec, kernel_spec: as in `linear_asymmetric_loss`.
      k: how many, a Python int, 1 <= k <= classes.
      loss: what the head was trained with, for probabilities by its link, `ElementwiseLoss.probability`; None for
        logits. Its hyper-parameters are numbers or scalars: with a value per class, labels in the order of their
        logits aren't in that of their probabilities.

    Returns:
      scores: (..., k), best first: logits, or probabilities by the loss; float32, or float64 for float64 features.
      ids: (..., k), int32. Of equal scores the lower id comes first; -0.0 comes after 0.0, as in jax.lax.top_k.

    Raises:
      ValueError, TypeError: an argument of the wrong kind, shape or range.
    """
    x = arguments.check_features(features)
    w = arguments.check_kernel(kernel, x)
    b = arguments.check_bias(bias, w)
    call = _TopK(
        k=arguments.check_k(k, w.shape[1]),
        chunk_size=arguments.check_chunk_size(chunk_size),
        precision=arguments.check_precision(precision),
        features_spec=arguments.check_spec("features", features_spec, x.ndim),
        kernel_spec=arguments.check_spec("kernel", kernel_spec, 2),
    )
    _check_ranking_loss(loss)
    scores, ids = _linear_top_k(call, x, w, b)
    return (scores if loss is None else loss.probability(scores)), ids


def _check_ranking_loss(loss: Any) -> None:
    if loss is None:
        return
    if not isinstance(loss, ElementwiseLoss):
        raise TypeError(f"loss={loss!r}; expected None or a loss object, such as asl_pallas.AsymmetricLoss()")
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(loss)]
    if any(math.prod(shape) > 1 for shape in shapes):
        raise ValueError(
            f"loss has hyper-parameters of shapes {shapes}, so that the best logits aren't the best probabilities; "
            "expected numbers or scalars, or loss=None for logits"
        )


@dataclasses.dataclass(frozen=True)
class _TopK:
    k: int
    chunk_size: int | None
    precision: Any
    features_spec: PartitionSpec | None
    kernel_spec: PartitionSpec | None


@functools.partial(jax.jit, static_argnums=0)
def _linear_top_k(call: _TopK, features: Array, kernel: Array, bias: Array | None) -> tuple[Array, Array]:
    layout = _layout_of(features, kernel, call.features_spec, call.kernel_spec, "linear_top_k")
    arguments_of_call = (features, kernel, bias, call.k, call.chunk_size, call.precision)
    if isinstance(layout, HeadLayout):
        return head_sharding.top_k(*arguments_of_call, layout)
    return chunks.top_k(*arguments_of_call)


def _layout_of(
    features: Array, kernel: Array, features_spec: Any, kernel_spec: Any, function: str
) -> HeadLayout | Literal["unknown"] | None:
    try:
        return head_sharding.layout_of(features, kernel, features_spec, kernel_spec)
    except CannotCutError as reason:
        # Right in any case, and XLA can partition it, if not as well; a kernel it can't.
        warnings.warn(f"{reason}; {function} leaves the loop over the classes to XLA", stacklevel=5)
        return "unknown"
