"""The classifier in Flax NNX, its train step with the fused head, and the step that it replaces."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from asl_pallas import AsymmetricLoss, SparseLabels, multilabel_loss
from asl_pallas.flax import MultilabelHead
from extreme.corpus import PADDING


class Classifier(nnx.Module):
    """Embedding bag, one hidden layer with a skip, a multilabel head: words (batch, length) to labels."""

    def __init__(
        self,
        vocabulary: int,
        width: int,
        frequencies: np.ndarray,
        loss: AsymmetricLoss,
        dtype: Any,
        *,
        rngs: nnx.Rngs,
    ):
        # Words begin as random directions, nearly at right angles: a label then learns its own from a few examples.
        self.embedding = nnx.Embed(vocabulary, width, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.head = MultilabelHead(
            width,
            len(frequencies),
            loss=loss,
            label_frequencies=frequencies,
            # From zero: of a million labels' random logits the highest would drown what has been learned.
            kernel_init=nnx.initializers.zeros_init(),
            dtype=dtype,
            rngs=rngs,
        )

    def features(self, words: jax.Array) -> jax.Array:
        """(batch, width): what the head gets."""
        present = (words != PADDING)[..., None]
        bag = jnp.sum(self.embedding(words) * present, axis=-2)
        bag /= jnp.sqrt(jnp.maximum(present.sum(axis=-2), 1))
        return bag + nnx.gelu(self.hidden(bag))


def optimizer(learning_rate: float) -> optax.GradientTransformation:
    """Adafactor without momentum, whose state is a number a row and a number a column of each matrix.

    For a million labels of 128 features that is 4 MiB. Adam's moments would be 977 MiB, twice the head itself, and one
    of momentum in bfloat16 still 244 MiB. The column's number is a label's own scale, so that a rare label learns from
    its few examples in steps as long as a common one's. Plain SGD would need no state at all, and its steps would be
    as short for a label as the label is rare.
    """
    return optax.adafactor(
        learning_rate,
        min_dim_size_to_factor=2,
        multiply_by_parameter_scale=False,  # the head starts from zero, and steps in proportion would leave it there
        clipping_threshold=None,  # by the norm of the whole update, which would have to wait in memory for it
    )


@nnx.jit(donate_argnames=("model", "optimizer"))
def train_step(model: Classifier, optimizer: nnx.Optimizer, words: jax.Array, labels: SparseLabels) -> jax.Array:
    """Updates model and optimizer in place and returns the loss: summed over the labels, averaged over the batch."""

    def batch_loss(model: Classifier) -> jax.Array:
        # axis=None, the total: loss and gradients come from one pass over the labels.
        return model.head.loss(model.features(words), labels, axis=None) / len(words)

    loss, gradients = nnx.value_and_grad(batch_loss)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit(donate_argnames=("model", "optimizer"))
def unfused_train_step(model: Classifier, optimizer: nnx.Optimizer, words: jax.Array, labels: jax.Array) -> jax.Array:
    """The same step with logits and dense labels (batch, labels)."""

    def batch_loss(model: Classifier) -> jax.Array:
        logits = model.head(model.features(words))
        return multilabel_loss(model.head.loss_object, logits, labels, axis=None) / len(words)

    loss, gradients = nnx.value_and_grad(batch_loss)(model)
    optimizer.update(model, gradients)
    return loss


@functools.partial(jax.jit, static_argnames="k")
def best_labels(model: Classifier, words: jax.Array, k: int) -> jax.Array:
    """Ids (batch, k) of the labels with the highest scores, the best first.

    nnx.jit, which may change a model, would return a copy of this one.
    """
    return model.head.top_k(model.features(words), k)[1]
