"""What the losses of logits and the head's have in common on the way from arguments to a kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from asl_pallas import arguments, kernels
from asl_pallas.forward_mode import reverse_mode_only
from asl_pallas.kernels.tile import Task, compute_dtype
from asl_pallas.losses import ElementwiseLoss


class Checked(NamedTuple):
    """The arguments that both take, after every check.

    Attributes:
      task: what to compute of an element; what of it is asked for is still to be said.
      axes: to sum over, counted from the front.
      arrays: by name, as the caller has them, None where there is none.
    """

    task: Task
    axes: tuple[int, ...]
    implementation: str | None
    interpret: bool
    arrays: dict[str, Any]


def check(
    loss: Any,
    logits: Array | jax.ShapeDtypeStruct,
    labels: Any,
    *,
    axis: Any,
    where: Any,
    weights: Any,
    pos_weight: Any,
    ignore_label: Any,
    label_smoothing: Any,
    implementation: Any,
    statistics: Any = False,
    donate_logits: Any = False,
) -> Checked:
    """Of the logits no more than shape and dtype is asked."""
    axes = arguments.check_axis(axis, len(logits.shape))
    mask = arguments.check_where(where, logits, axes)
    ignore = arguments.check_ignore_label(ignore_label)
    its_loss = arguments.check_loss(loss, logits, axes)
    its_labels = arguments.check_labels(labels, logits, where, ignore, its_loss.static)
    task = Task(
        its_loss.static,
        value="rows",
        gradient=False,
        ignore_label=ignore,
        label_smoothing=arguments.check_label_smoothing(label_smoothing, its_loss.static),
        donate_logits=arguments.check_flag("donate_logits", donate_logits),
        labels=its_labels.form,
        statistics=arguments.check_statistics(statistics, axis, axes, len(logits.shape)),
    )
    arrays = {
        "labels": its_labels.labels,
        "negatives": its_labels.negatives,
        "where": mask,
        "weights": arguments.check_weights("weights", weights, logits, axes),
        "pos_weight": arguments.check_weights("pos_weight", pos_weight, logits, axes),
        "vectors": its_loss.vectors,
        "scalars": its_loss.scalars,
    }
    return Checked(task, axes, arguments.check_implementation(implementation), kernels.interpreting(), arrays)


def laid_out(
    function: str, loss: ElementwiseLoss, constants: tuple[str, ...], arrays: Any, shape: tuple[int, ...], dtype: Any
) -> Any:
    """The traced arrays of a call, a NamedTuple, as kernels take them.

    Args:
      function: whom the error of a forward-mode derivative names.
      loss: whose value is looked at, for its shape and dtype.
      constants: the fields that are no inputs of the program that is traced.
      arrays: as the caller has them.
      shape, dtype: of the logits.
    """
    computed = compute_dtype(dtype)
    arguments.check_value(loss, computed)

    def ranked(array: Array | None) -> Array | None:
        """With the logits' rank, and along the classes constant or whole."""
        if array is None:
            return None
        array = array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
        return jnp.broadcast_to(array, (*array.shape[:-1], shape[-1])) if array.size == 1 else array

    def real(array: Array | None) -> Array | None:
        return None if array is None else ranked(array.astype(computed))

    arrays = arrays._replace(**{name: lax.optimization_barrier(getattr(arrays, name)) for name in constants})
    vectors = tuple(real(vector) for vector in arrays.vectors)
    scalars = jnp.stack([scalar.astype(computed) for scalar in arrays.scalars]) if arrays.scalars else None
    # Not the hyper-parameters: they have no derivative in either mode.
    marked = reverse_mode_only(function, arrays._replace(vectors=(), scalars=None))
    return marked._replace(
        where=ranked(marked.where),
        weights=real(marked.weights),
        pos_weight=real(marked.pos_weight),
        vectors=vectors,
        scalars=scalars,
    )
