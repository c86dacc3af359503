"""Which implementation a call gets, and why."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.typing import ArrayLike

from asl_pallas import arguments, call, kernels
from asl_pallas.kernels.operands import Operands
from asl_pallas.kernels.platforms import likely_platform
from asl_pallas.kernels.tiling import cpu_tiling
from asl_pallas.labels import PackedLabels, SparseLabels
from asl_pallas.losses import AsymmetricLoss, ElementwiseLoss
from asl_pallas.partial_labels import PartialLabels

_PLATFORMS = ("cpu", "tpu", "cuda", "rocm")


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found. `print` it for one line per implementation.

    Attributes:
      platform: "cpu", "tpu", "cuda" or "rocm".
      implementation: the one that computes value and gradient: "xla", "mosaic_tpu", "triton" or "mosaic_gpu".
      reason: why this one.
      others: for every other implementation, why it is not used.
    """

    platform: str
    implementation: str
    reason: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.implementation} on {self.platform}: {self.reason}"]
        lines += [f"not {name}: {why}" for name, why in self.others.items()]
        return "\n".join(lines)


def explain(
    logits: ArrayLike | jax.ShapeDtypeStruct,
    labels: ArrayLike | jax.ShapeDtypeStruct | PackedLabels | SparseLabels | PartialLabels,
    *,
    loss: ElementwiseLoss | None = None,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    pos_weight: ArrayLike | None = None,
    ignore_label: int | None = None,
    label_smoothing: float = 0.0,
    statistics: bool = False,
    implementation: str | None = None,
    platform: str | None = None,
) -> Explanation:
    """Which implementation `multilabel_loss` uses for these arguments, without compiling or computing anything.

    Args:
      logits, labels: arrays, or a `jax.ShapeDtypeStruct` for each. Under a mesh, those of one device's part.
      loss: a loss object; None for `AsymmetricLoss()`.
      axis, where, weights, pos_weight, ignore_label, label_smoothing, statistics, implementation: as in
        `multilabel_loss`.
      platform: "cpu", "tpu", "cuda" or "rocm"; None for the one that JAX would compile for here.

    Returns:
      An `Explanation`.

    Raises:
      ValueError, TypeError: an argument that `multilabel_loss` refuses, or another platform.
      NotImplementedError: the implementation asked for by name can't serve the call or the platform.

    Examples:
      >>> import jax
      >>> from asl_pallas import explain
      >>> logits, labels = jax.ShapeDtypeStruct((4096, 8192), "bfloat16"), jax.ShapeDtypeStruct((4096, 8192), "int8")
      >>> explain(logits, labels, platform="tpu").implementation
      'mosaic_tpu'
    """
    platform = _lowered_for() if platform is None else platform
    if platform not in _PLATFORMS:
        raise ValueError(f"platform={platform!r}; expected None or one of {', '.join(map(repr, _PLATFORMS))}")
    found: list[tuple[call.Checked, Operands, int]] = []

    def trace(logits: Any, labels: Any, arrays: dict[str, Any]) -> None:
        x = arguments.check_logits(logits)
        checked = call.check(
            AsymmetricLoss() if loss is None else loss,
            x,
            labels,
            axis=axis,
            ignore_label=ignore_label,
            label_smoothing=label_smoothing,
            statistics=statistics,
            implementation=implementation,
            **arrays,
        )
        operands = Operands(logits=x, **checked.arrays)
        operands = call.laid_out("explain", checked.task.loss, (), operands, x.shape, x.dtype)
        found.append((checked, kernels.shapes_of(kernels.matrices(operands)), x.ndim))

    arrays = {"where": where, "weights": weights, "pos_weight": pos_weight}
    jax.eval_shape(trace, logits, labels, arrays)
    checked, operands, ndim = found[0]
    task = dataclasses.replace(checked.task, gradient=True)
    leaves_the_classes_in = bool(checked.axes) and ndim - 1 not in checked.axes
    others = {}
    for name, its_platform in kernels.PLATFORMS.items():
        if its_platform is None:
            continue
        if its_platform != platform:
            others[name] = f"it is for {its_platform}"
        elif leaves_the_classes_in:
            others[name] = f"axis={axis!r} leaves the classes in, and it adds up over them"
        elif (reason := kernels.refusal(name, operands, task.labels, task.statistics)) or (
            implementation is None and (reason := kernels.why_not_chosen(name, task, operands))
        ):
            others[name] = reason
    served = [name for name in (*kernels.CHOSEN, "mosaic_gpu", "xla") if name not in others]
    if implementation is not None:
        if implementation not in served:
            raise NotImplementedError(
                f"implementation={implementation!r} can't serve this call: {others[implementation]}"
            )
        others = {name: others.get(name, "another was asked for") for name in kernels.PLATFORMS}
        del others[implementation]
        return Explanation(platform, implementation, "it was asked for by name", others)
    if served[0] == "xla":
        return Explanation(platform, "xla", _of_xla(platform, operands), others)
    others["xla"] = "the kernel is at least as fast"
    return Explanation(platform, served[0], "a Pallas kernel: loss and gradient in one pass over the logits", others)


def _lowered_for() -> str:
    platform = likely_platform()
    if platform != "gpu":
        return platform
    return "rocm" if "rocm" in jax.devices("gpu")[0].client.platform_version.lower() else "cuda"


def _of_xla(platform: str, operands: Operands) -> str:
    if platform != "cpu":
        return "jnp, which XLA fuses"
    whole = "jnp, which XLA fuses" if cpu_tiling(*operands.logits.shape) is None else "jnp, a block of logits at a time"
    return f"{whole}; a CPU has no kernel of its own"
