"""The memory of the loss's step, as XLA's compiler plans it; nothing runs."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from asl_pallas import asymmetric_loss
from phenotypes.settings import Focus
from reference.autodiff import official


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Temporary bytes of value_and_grad of the mean loss, beside the inputs and the gradient itself."""

    batch: int
    labels: int
    reference: int
    ours: int


def loss_step_memory(batch: int, labels: int, focus: Focus) -> StepMemory:
    """The official formula in jnp under autodiff, and asymmetric_loss, on float32 logits and int8 labels."""

    def reference_loss(x: jax.Array, y: jax.Array) -> jax.Array:
        losses = official(x, y, gamma_neg=focus.gamma_neg, gamma_pos=focus.gamma_pos, clip=focus.clip)
        return losses.sum(axis=-1).mean()

    def our_loss(x: jax.Array, y: jax.Array) -> jax.Array:
        return asymmetric_loss(x, y, gamma_neg=focus.gamma_neg, gamma_pos=focus.gamma_pos, clip=focus.clip).mean()

    shape = (batch, labels)
    return StepMemory(batch, labels, _temporary_bytes(reference_loss, shape), _temporary_bytes(our_loss, shape))


def _temporary_bytes(loss: Callable[[jax.Array, jax.Array], jax.Array], shape: tuple[int, int]) -> int:
    logits, labels = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape, jnp.int8)
    analysis = jax.jit(jax.value_and_grad(loss)).lower(logits, labels).compile().memory_analysis()
    if analysis is None:
        raise RuntimeError(f"the {jax.default_backend()} compiler doesn't say how much memory a step takes")
    return analysis.temp_size_in_bytes
