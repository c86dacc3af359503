"""The same classifier and train step in Flax linen; its parameters have the same names and shapes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.typing import ArrayLike

from asl_pallas import linear_multilabel_loss, multilabel_loss
from phenotypes.data import PADDING
from phenotypes.layout import LOGITS, Layout, in_sight
from phenotypes.settings import Focus, Sizes
from phenotypes.training import Labels


class Classifier(nn.Module):
    """Embedding bag, one hidden layer with a skip, a linear head: feature ids (batch, features) to logits."""

    sizes: Sizes

    @nn.compact
    def __call__(
        self, ids: jax.Array, dropout_key: jax.Array | None = None, *, features_only: bool = False
    ) -> jax.Array:
        sizes = self.sizes
        zeros = nn.initializers.zeros_init()
        present = (ids != PADDING)[..., None]
        embedded = nn.Embed(sizes.buckets, sizes.width, embedding_init=zeros, name="embedding")(ids)
        bag = jnp.sum(embedded * present, axis=-2) / jnp.sqrt(jnp.maximum(present.sum(axis=-2), 1))
        hidden = bag + nn.gelu(nn.Dense(sizes.width, name="hidden")(bag))
        hidden = nn.Dropout(sizes.dropout)(hidden, deterministic=dropout_key is None, rng=dropout_key)
        if features_only:
            return hidden
        return nn.Dense(sizes.labels, kernel_init=nn.initializers.normal(0.01), name="head")(hidden)


@functools.partial(jax.jit, static_argnames=("focus", "layout", "fused_head"), donate_argnames="state")
def train_step(
    state: TrainState,
    ids: jax.Array,
    labels: Labels,
    dropout_key: jax.Array,
    focus: Focus,
    layout: Layout | None,
    fused_head: bool,
) -> tuple[TrainState, jax.Array]:
    """The next state and the loss: summed over the labels, averaged over the batch."""

    def batch_loss(params: Any) -> jax.Array:
        if fused_head:
            features = state.apply_fn({"params": params}, ids, dropout_key, features_only=True)
            head = params["head"]
            # The total comes with its gradients in one pass over the labels, a mean of the diseases' losses in two.
            total = linear_multilabel_loss(focus.loss, features, head["kernel"], labels, bias=head["bias"], axis=None)
            return total / len(ids)
        logits = state.apply_fn({"params": params}, ids, dropout_key)
        return multilabel_loss(focus.loss, logits, labels, logits_spec=None if layout is None else LOGITS).mean()

    loss, gradients = jax.value_and_grad(batch_loss)(state.params)
    state = state.apply_gradients(grads=gradients)
    return state if layout is None else layout.kept(state), loss


@functools.partial(jax.jit, static_argnames="layout")
def _logits(state: TrainState, ids: jax.Array, layout: Layout | None) -> jax.Array:
    logits = state.apply_fn({"params": state.params}, ids)
    return logits if layout is None else layout.gathered(logits)


class LinenTrainer:
    """A classifier's parameters and its optimizer's state between two steps, on one device or laid out on a mesh."""

    def __init__(
        self,
        sizes: Sizes,
        bias: np.ndarray,
        optimizer: optax.GradientTransformation,
        seed: int,
        layout: Layout | None = None,
    ):
        model = Classifier(sizes)
        params = model.init(jax.random.key(seed), jnp.zeros((1, sizes.features), jnp.int32))["params"]
        params["head"]["bias"] = jnp.asarray(bias)
        state = TrainState.create(apply_fn=model.apply, params=params, tx=optimizer)
        self.state = state.replace(step=jnp.int32(0))  # linen's own is a Python int, which no checkpoint holds
        self.layout = layout
        self.fused_head = sizes.fused_head
        if layout is not None:
            self.state = layout.state(self.state)

    def step(self, ids: ArrayLike, labels: Labels, dropout_key: jax.Array, focus: Focus) -> jax.Array:
        batch = (jnp.asarray(ids), jax.tree.map(jnp.asarray, labels), dropout_key)
        with in_sight(self.layout):
            self.state, loss = train_step(self.state, *batch, focus, self.layout, self.fused_head)
        return loss

    def logits(self, ids: ArrayLike) -> np.ndarray:
        with in_sight(self.layout):
            return np.asarray(_logits(self.state, jnp.asarray(ids), self.layout))
