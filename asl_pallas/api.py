"""The public functions of logits, and how they are carried out."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from asl_pallas import arguments, call, kernels, sharding, vjp
from asl_pallas.foreign_names import explains_foreign_names
from asl_pallas.kernels.summation import sum_over
from asl_pallas.kernels.tile import Operands, Task
from asl_pallas.kernels.versions import unify_varying_axes
from asl_pallas.labels import PackedLabels, SparseLabels
from asl_pallas.losses import AsymmetricLoss, ElementwiseLoss
from asl_pallas.partial_labels import PartialLabels
from asl_pallas.statistics import Statistics, of_sums


@explains_foreign_names
def asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike | PackedLabels | SparseLabels,
    *,
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
    donate_logits: bool = False,
    logits_spec: PartitionSpec | None = None,
    implementation: str | None = None,
) -> Array:
    r"""Asymmetric loss (ASL) of multilabel logits, summed over the classes by default.

    With p = sigmoid(logits), p_m = max(p - clip, 0) and y = labels, an element's loss is

        y * pos_weight * (1 - p)^gamma_pos * -log(p)  +  (1 - y) * p_m^gamma_neg * -log(1 - p_m)

    times its weight. (0, 0, 0) for gamma_neg, gamma_pos and clip is sigmoid binary cross-entropy, (g, g, 0) is focal
    loss. When the call is differentiated, loss and gradient come from one pass over the logits, by a Pallas kernel on
    TPU and GPU and by jnp on the CPU; no intermediate of the logits' size is made, but for sums that leave the classes
    in (see axis) and for derivatives with respect to labels, weights and pos_weight, which XLA takes of the formula.

    Args:
      logits: (..., classes), float32, bfloat16, float16 or float64. Arithmetic is in float32, in float64 for float64.
        Infinite logits give the limit, NaN gives NaN.
      labels: the logits' shape; bool, integers 0 and 1, or floats in [0, 1] (soft labels: each side keeps its own
        focus). Concrete labels outside of that raise. Traced ones can't be looked at: integers above 0 count as
        positive, and a float outside of [0, 1] gives NaN; `checked_labels` finds either. `PackedLabels` hold a bit an
        element and `SparseLabels` the ids of the positives; the kernels read those, and no dense label is written to
        memory.
      gamma_neg: focusing exponent of the negatives, >= 0.
      gamma_pos: focusing exponent of the positives, >= 0.
      clip: probability margin in [0, 1): negatives with p <= clip have neither loss nor gradient.
        These three are Python numbers, for which code is specialised, or traced scalars, so that one compilation
        serves a schedule. A traced one can't be checked. The loss has no derivative with respect to them; its
        gradient has, by autodiff of the formula, as a step of gradient descent that is differentiated needs.
      axis: what is summed, as in jnp.sum. -1: one loss an example; (): one an element; None: the total. The official
        PyTorch code's loss is axis=None; a mean over examples is `asymmetric_loss(...).mean()`. A sum that leaves the
        classes in, axis=0 say, is left to XLA, which on a GPU and a CPU writes the losses of all elements first.
      where: bool, broadcastable to the logits. False leaves an element out, even where its logit, label or weight is
        NaN: none of them is in the loss or in any gradient.
      weights: broadcastable to the logits; multiplies an element's loss. (classes,) weighs classes, (batch, 1)
        examples. One that varies along some leading dimensions and not along others is broadcast in memory first.
      pos_weight: broadcastable to the logits; multiplies the positive term, as in torch's BCEWithLogitsLoss. inf is
        right for a class that has no positive. A vector goes along the last axis, as weights and where do; one that
        could as well go along another axis that is summed is refused, and (classes, 1, 1) goes along axis 1 of images.
      ignore_label: an integer that marks an element as not annotated, -1 say, which the labels' dtype has to hold;
        needs integer or bool labels, an element each. Packed and sparse ones have no third value: leave elements out
        with where.
      label_smoothing: s in [0, 1), a Python number: labels become y * (1 - s) + s / 2, and each side keeps its own
        focus. timm smooths the focus too, with p_t = p y + min(1 - p + clip, 1) (1 - y) of the smoothed y: that is
        gamma_neg=0, gamma_pos=0 and weights of (1 - p_t)^(gamma_pos y + gamma_neg (1 - y)).
      stop_focus_gradient: the focusing factors (1 - p)^gamma_pos and p_m^gamma_neg count as constants in the gradient,
        the official code's disable_torch_grad_focal_loss.
      donate_logits: the gradient may take the logits' place in memory, as with jax.jit's donated arguments: in a train
        step that makes the logits and has no other use for them, this saves their size. Elsewhere it is safe and slow,
        since XLA copies them first. On a v5e the kernel takes a tenth more cycles so. XLA itself needs no telling.
      logits_spec: how the logits lie on mesh axes that are Auto, where JAX can't see it; without it the formula is left
        to XLA there, with a warning. Explicit axes need none, and without a mesh it has no meaning.
      implementation: None picks by the platform that the computation is lowered for, and falls back to "xla", also for
        problems so small that XLA's loop is faster (fewer than 262,144 elements on a TPU, 4,096 on a GPU). By name:
        "xla" (any platform), "mosaic_tpu" (TPU), "triton" (CUDA GPUs), "mosaic_gpu" (Hopper GPUs and later, from JAX
        0.11: rows of 128 classes or more, dense labels that aren't bool; never picked by None, since on an H100
        "triton" is as fast or faster).

    Returns:
      The loss, >= 0 (for weights >= 0), float32, or float64 for float64 logits. The gradient has the logits' dtype.
      Reverse mode differentiates with respect to logits, float labels, weights and pos_weight, twice as well.

    Raises:
      ValueError, TypeError: an argument of the wrong kind, shape or range, before anything is compiled; a derivative
        with respect to a gamma or clip; a forward-mode derivative.
      NotImplementedError: the implementation asked for by name can't serve the call or the platform.

    Reference:
      Ridnik, Ben-Baruch, Zamir, Noy, Friedman, Protter, Zelnik-Manor: Asymmetric Loss For Multi-Label Classification,
      ICCV 2021, https://arxiv.org/abs/2009.14119, equations (4) to (7).
    """
    loss = AsymmetricLoss(gamma_neg, gamma_pos, clip, arguments.check_flag("stop_focus_gradient", stop_focus_gradient))
    return _multilabel_loss(
        "asymmetric_loss",
        loss,
        logits,
        labels,
        axis=axis,
        where=where,
        weights=weights,
        pos_weight=pos_weight,
        ignore_label=ignore_label,
        label_smoothing=label_smoothing,
        donate_logits=donate_logits,
        logits_spec=logits_spec,
        implementation=implementation,
    )


@explains_foreign_names
def multilabel_loss(
    loss: ElementwiseLoss,
    logits: ArrayLike,
    labels: ArrayLike | PackedLabels | SparseLabels | PartialLabels,
    *,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    ignore_label: int | None = None,
    label_smoothing: float = 0.0,
    statistics: bool = False,
    donate_logits: bool = False,
    logits_spec: PartitionSpec | None = None,
    implementation: str | None = None,
) -> Any:
    r"""Any elementwise loss of multilabel logits, summed over the classes by default.

    An element's loss is what the object says, its positive term times pos_weight, and all of it times its weight. Soft
    labels y mix the losses of a positive and of a negative: y * pos_weight * L+ + (1 - y) * L-.

    Args:
      loss: a loss object, `AsymmetricLoss()` say, or one of your own. A hyper-parameter that is a Python number is
        compiled in. One that is an array is an operand: a scalar, so that one compilation serves a schedule, or
        broadcastable to the logits, (classes,) for a value per class.
      labels: as in `asymmetric_loss`. For a loss with three states also integers of which one means not annotated
        (`SelectiveLoss` says which), or `PartialLabels`.
      statistics: True for `Statistics` of the same pass beside the loss, summed over the same axes, of which the
        classes have to be one: `jax.value_and_grad(..., has_aux=True)` takes the pair.
      logits, axis, where, weights, pos_weight, ignore_label, label_smoothing, donate_logits, logits_spec,
        implementation: as in `asymmetric_loss`.

    Returns:
      The loss, float32, or float64 for float64 logits; with statistics=True the pair of it and `Statistics`. The
      gradient has the logits' dtype. Reverse mode differentiates with respect to logits, float labels, weights and
      pos_weight, twice as well; statistics have no derivatives.

    Raises:
      ValueError, TypeError: an argument of the wrong kind, shape or range, before anything is compiled; a derivative
        with respect to a hyper-parameter; a forward-mode derivative.
      NotImplementedError: the implementation asked for by name can't serve the call or the platform.
    """
    return _multilabel_loss(
        "multilabel_loss",
        loss,
        logits,
        labels,
        axis=axis,
        where=where,
        weights=weights,
        pos_weight=pos_weight,
        ignore_label=ignore_label,
        label_smoothing=label_smoothing,
        statistics=statistics,
        donate_logits=donate_logits,
        logits_spec=logits_spec,
        implementation=implementation,
    )


def sigmoid_asymmetric_loss(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    gamma_neg: ArrayLike = 4.0,
    gamma_pos: ArrayLike = 1.0,
    clip: ArrayLike = 0.05,
) -> Array:
    """Asymmetric loss of each element, in the shape and with the names of optax's classification losses.

    Args:
      logits: any float array.
      labels: the logits' shape: 0 and 1, or floats in [0, 1].
      gamma_neg, gamma_pos, clip: as in `asymmetric_loss`.

    Returns:
      The loss of each element, of the logits' shape; float32, or float64 for float64 logits.

    Examples:
      >>> import jax.numpy as jnp
      >>> from asl_pallas import sigmoid_asymmetric_loss
      >>> logits = jnp.array([[2.0, -1.0, 0.5], [-3.0, 0.0, 4.0]])
      >>> labels = jnp.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
      >>> for row in sigmoid_asymmetric_loss(logits, labels):
      ...     print(*(f"{loss:.4f}" for loss in row))
      0.0151 0.0006 0.0913
      0.0000 0.3466 0.0003

    Reference:
      https://arxiv.org/abs/2009.14119, equations (4) to (7).
    """
    return asymmetric_loss(logits, labels, gamma_neg=gamma_neg, gamma_pos=gamma_pos, clip=clip, axis=())


def _multilabel_loss(
    function: str, loss: Any, logits: Any, labels: Any, *, logits_spec: PartitionSpec | None, **options: Any
) -> Any:
    x = arguments.check_logits(logits)
    checked = call.check(loss, x, labels, **options)
    execution = _Execution(
        function=function,
        task=checked.task,
        implementation=checked.implementation,
        interpret=checked.interpret,
        layout=None,
        leaves_out=checked.arrays["where"] is not None or checked.task.ignore_label is not None,
    )
    spec = arguments.check_spec("logits", logits_spec, x.ndim)
    operands = Operands(logits=x, **checked.arrays)
    losses, statistics = _compiled(execution, checked.axes, spec, arguments.constants(operands, x), operands)
    return (losses, statistics) if checked.task.statistics else losses


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _compiled(
    execution: _Execution,
    axes: tuple[int, ...],
    logits_spec: PartitionSpec | None,
    constants: tuple[str, ...],
    operands: Operands,
) -> tuple[Array, Statistics | None]:
    operands = call.laid_out(
        execution.function, execution.task.loss, constants, operands, operands.logits.shape, operands.logits.dtype
    )
    classes_axis = operands.logits.ndim - 1
    if classes_axis not in axes:
        execution = dataclasses.replace(execution, task=dataclasses.replace(execution.task, value="elements"))
    if axes and classes_axis not in axes:
        # A sum over rows alone: a kernel would write every element's loss first; XLA doesn't, on a TPU.
        if execution.implementation not in (None, "xla"):
            raise NotImplementedError(
                f"implementation={execution.implementation!r} sums over the classes or not at all, and axis leaves "
                "them in; 'xla' serves every axis"
            )
        execution = dataclasses.replace(execution, implementation="xla")
    try:
        layout = sharding.layout_of(operands.logits, logits_spec)
        execution = dataclasses.replace(execution, layout=layout)
    except sharding.CannotCutError as reason:
        # Right in any case, and XLA can partition it; a kernel it can't.
        if execution.implementation != kernels.PLAIN:
            warnings.warn(f"{reason}; {execution.function} leaves the formula to XLA", stacklevel=3)
        execution = execution.plain()
    if execution.implementation not in (None, kernels.PLAIN):
        on_a_device = sharding.shard_of(execution.task, operands, execution.layout)
        task = execution.task
        if refusal := kernels.refusal(execution.implementation, on_a_device, task.labels, task.statistics):
            raise NotImplementedError(f"implementation={execution.implementation!r} can't serve this call: {refusal}")
    # Here, so that the gradient of what doesn't vary over a manual mesh axis is summed over it by JAX.
    losses, sums = vjp.loss(execution, unify_varying_axes(operands))
    statistics = None if sums is None else of_sums(losses, sums, operands.logits.shape[-1])
    others = tuple(axis for axis in axes if axis != classes_axis)
    return sum_over(losses, others), jax.tree.map(lambda sums: sum_over(sums, others), statistics)


@dataclasses.dataclass(frozen=True)
class _Execution:
    """How a loss of logits is carried out; `vjp.Execution` says what the methods are.

    Attributes:
      leaves_out: whether any element may be masked.
    """

    function: str
    task: Task
    implementation: str | None
    interpret: bool
    layout: sharding.Layout | None
    leaves_out: bool

    parameters: ClassVar[tuple[str, ...]] = ("logits",)

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        return self.task.loss.traced()

    def asking_for(self, value: bool, gradients: tuple[str, ...]) -> _Execution:
        task = dataclasses.replace(
            self.task,
            value=self.task.value if value else None,
            gradient=bool(gradients),
            statistics=self.task.statistics and value,
        )
        return dataclasses.replace(self, task=task)

    def plain(self) -> _Execution:
        return dataclasses.replace(self, implementation=kernels.PLAIN)

    def evaluate(self, operands: Operands) -> vjp.Outputs:
        run = functools.partial(kernels.run, self.task, implementation=self.implementation, interpret=self.interpret)
        if self.layout is None:
            value, gradient, sums = run(operands)
        else:
            value, gradient, sums = sharding.on_shards(run, self.task, operands, self.layout)
        return vjp.Outputs(value, {"logits": gradient} if self.task.gradient else {}, sums)

    def gives_both(self, operands: Operands, wanted: tuple[str, ...]) -> bool:
        """But for float16: a gradient below 6e-8 would vanish before its cotangent, often a loss scale, came."""
        return operands.logits.dtype != jnp.float16

    def times(self, gradient: Array, cotangent: Array) -> Array:
        scaled = (gradient.astype(cotangent.dtype) * self._by_element(cotangent)).astype(gradient.dtype)
        # Of what is masked it is 0 whatever the cotangent: where nothing counts, a mean's is infinite.
        return jnp.where(gradient == 0, gradient, scaled) if self.leaves_out else scaled

    def with_cotangent(self, operands: Operands, cotangent: Array) -> Operands:
        return operands._replace(cotangent=self._by_element(cotangent))

    def _by_element(self, cotangent: Array) -> Array:
        return cotangent if self.task.value == "elements" else cotangent[..., None]
