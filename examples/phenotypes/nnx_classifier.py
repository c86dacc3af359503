"""The classifier in Flax NNX, and its train step: where the loss is called."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike

from asl_pallas import AdaptiveAsymmetry, AsymmetricLoss, AsymmetryState, Statistics, multilabel_loss
from asl_pallas.flax import MultilabelHead
from phenotypes.data import PADDING
from phenotypes.layout import LOGITS, Layout, in_sight
from phenotypes.settings import Focus, Sizes
from phenotypes.training import Labels, Step


class Classifier(nnx.Module):
    """Embedding bag, one hidden layer with a skip, a linear head: feature ids (batch, features) to logits."""

    def __init__(self, sizes: Sizes, bias: np.ndarray, *, rngs: nnx.Rngs):
        # From zero, so that a feature no training disease has adds nothing; the first logits are then the bias.
        zeros = nnx.initializers.zeros_init()
        self.embedding = nnx.Embed(sizes.buckets, sizes.width, embedding_init=zeros, rngs=rngs)
        self.hidden = nnx.Linear(sizes.width, sizes.width, rngs=rngs)
        self.dropout = nnx.Dropout(sizes.dropout)
        head = MultilabelHead if sizes.fused_head else nnx.Linear
        self.head = head(
            sizes.width,
            sizes.labels,
            kernel_init=nnx.initializers.normal(0.01),
            bias_init=lambda key, shape, dtype: jnp.asarray(bias, dtype).reshape(shape),
            rngs=rngs,
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Logits float32 (batch, labels)."""
        return self.head(self.features(ids))

    def features(self, ids: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """What the head gets (batch, width); with a key some hidden units are left out, as in training."""
        present = (ids != PADDING)[..., None]
        bag = jnp.sum(self.embedding(ids) * present, axis=-2)
        # Divided by the root: a mean would shrink a long name's vector, a sum would blow it up.
        bag /= jnp.sqrt(jnp.maximum(present.sum(axis=-2), 1))
        hidden = bag + nnx.gelu(self.hidden(bag))
        return self.dropout(hidden, deterministic=dropout_key is None, rngs=dropout_key)

    def loss(
        self,
        loss: AsymmetricLoss,
        ids: jax.Array,
        labels: Labels,
        dropout_key: jax.Array,
        counted: bool,
        **options: Any,
    ) -> tuple[jax.Array, Statistics | None]:
        """Summed over the labels, averaged over the batch, and statistics; the options are multilabel_loss's."""
        features = self.features(ids, dropout_key)
        if isinstance(self.head, MultilabelHead):
            # The total comes with its gradients in one pass over the labels, a mean of the diseases' losses in two.
            found: Any = self.head.loss(features, labels, loss=loss, axis=None, statistics=counted, **options)
            total, statistics = found if counted else (found, None)
            return total / len(ids), statistics
        found = multilabel_loss(loss, self.head(features), labels, statistics=counted, **options)
        losses, by_disease = found if counted else (found, None)
        return losses.mean(), None if by_disease is None else by_disease.total()


@nnx.jit(static_argnames=("focus", "layout", "counted"), donate_argnames=("model", "optimizer"))
def train_step(
    model: Classifier,
    optimizer: nnx.Optimizer,
    ids: jax.Array,
    labels: Labels,
    dropout_key: jax.Array,
    asymmetry: AsymmetryState | None,
    focus: Focus,
    layout: Layout | None,
    counted: bool,
) -> Step:
    """Updates model and optimizer in place; the loss is summed over the labels, averaged over the batch."""
    loss = focus.loss if asymmetry is None else dataclasses.replace(focus.loss, gamma_neg=asymmetry.gamma_neg)

    def batch_loss(model: Classifier) -> tuple[jax.Array, Statistics | None]:
        options = {} if layout is None else {"logits_spec": LOGITS}
        return model.loss(loss, ids, labels, dropout_key, counted, **options)

    (value, statistics), gradients = nnx.value_and_grad(batch_loss, has_aux=True)(model)
    optimizer.update(model, gradients)
    if layout is not None:
        nnx.update((model, optimizer), layout.kept(nnx.state((model, optimizer))))
    if asymmetry is not None and focus.controller is not None and statistics is not None:
        asymmetry = focus.controller.update(asymmetry, statistics.probability_gap)
    return Step(value, statistics, asymmetry)


@nnx.jit(static_argnames="layout")
def _logits(model: Classifier, ids: jax.Array, layout: Layout | None) -> jax.Array:
    return model(ids) if layout is None else layout.gathered(model(ids))


class NNXTrainer:
    """A classifier and its optimizer between two steps, on one device or laid out on a mesh."""

    def __init__(
        self,
        sizes: Sizes,
        bias: np.ndarray,
        optimizer: optax.GradientTransformation,
        seed: int,
        layout: Layout | None = None,
        controller: AdaptiveAsymmetry | None = None,
    ):
        self.model = Classifier(sizes, bias, rngs=nnx.Rngs(seed))
        self.optimizer = nnx.Optimizer(self.model, optimizer, wrt=nnx.Param)
        self.asymmetry = None if controller is None else controller.init()
        self.layout = layout
        if layout is not None:
            self.state = layout.state(self.state)

    @property
    def state(self) -> Any:
        """Parameters, the optimizer's arrays and the controller's, if there is one, for a checkpoint."""
        weights = nnx.state((self.model, self.optimizer))
        return weights if self.asymmetry is None else (weights, self.asymmetry)

    @state.setter
    def state(self, state: Any) -> None:
        weights, self.asymmetry = (state, None) if self.asymmetry is None else state
        nnx.update((self.model, self.optimizer), weights)

    def step(self, ids: ArrayLike, labels: Labels, dropout_key: jax.Array, focus: Focus, counted: bool = False) -> Step:
        batch = (jnp.asarray(ids), jax.tree.map(jnp.asarray, labels), dropout_key)
        with in_sight(self.layout):
            step = train_step(self.model, self.optimizer, *batch, self.asymmetry, focus, self.layout, counted)
        self.asymmetry = step.asymmetry
        return step

    def logits(self, ids: ArrayLike) -> np.ndarray:
        with in_sight(self.layout):
            return np.asarray(_logits(self.model, jnp.asarray(ids), self.layout))
