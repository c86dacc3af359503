"""The same classifier and train step in Flax linen; its parameters have the same names and shapes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.typing import ArrayLike

from asl_pallas import AdaptiveAsymmetry, AsymmetryState, Statistics, linear_multilabel_loss, multilabel_loss
from phenotypes.data import PADDING
from phenotypes.layout import LOGITS, Layout, in_sight
from phenotypes.settings import Focus, Sizes
from phenotypes.training import Labels, Step


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


class State(TrainState):
    """With where the controller of gamma_neg is, where there is one."""

    asymmetry: AsymmetryState | None = None


@functools.partial(jax.jit, static_argnames=("focus", "layout", "fused_head", "counted"), donate_argnames="state")
def train_step(
    state: State,
    ids: jax.Array,
    labels: Labels,
    dropout_key: jax.Array,
    focus: Focus,
    layout: Layout | None,
    fused_head: bool,
    counted: bool,
) -> tuple[State, Step]:
    """The next state, and the loss: summed over the labels, averaged over the batch."""
    asymmetry = state.asymmetry
    loss = focus.loss if asymmetry is None else dataclasses.replace(focus.loss, gamma_neg=asymmetry.gamma_neg)

    def batch_loss(params: Any) -> tuple[jax.Array, Statistics | None]:
        if fused_head:
            features = state.apply_fn({"params": params}, ids, dropout_key, features_only=True)
            head = params["head"]
            # The total comes with its gradients in one pass over the labels, a mean of the diseases' losses in two.
            found = linear_multilabel_loss(
                loss, features, head["kernel"], labels, bias=head["bias"], axis=None, statistics=counted
            )
            total, statistics = found if counted else (found, None)
            return total / len(ids), statistics
        logits = state.apply_fn({"params": params}, ids, dropout_key)
        spec = None if layout is None else LOGITS
        found = multilabel_loss(loss, logits, labels, statistics=counted, logits_spec=spec)
        losses, by_disease = found if counted else (found, None)
        return losses.mean(), None if by_disease is None else by_disease.total()

    (value, statistics), gradients = jax.value_and_grad(batch_loss, has_aux=True)(state.params)
    state = state.apply_gradients(grads=gradients)
    if asymmetry is not None and focus.controller is not None and statistics is not None:
        asymmetry = focus.controller.update(asymmetry, statistics.probability_gap)
        state = state.replace(asymmetry=asymmetry)
    return state if layout is None else layout.kept(state), Step(value, statistics, asymmetry)


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
        controller: AdaptiveAsymmetry | None = None,
    ):
        model = Classifier(sizes)
        params = model.init(jax.random.key(seed), jnp.zeros((1, sizes.features), jnp.int32))["params"]
        params["head"]["bias"] = jnp.asarray(bias)
        state = State.create(apply_fn=model.apply, params=params, tx=optimizer)
        # linen's own step is a Python int, which no checkpoint holds.
        self.state = state.replace(step=jnp.int32(0), asymmetry=None if controller is None else controller.init())
        self.layout = layout
        self.fused_head = sizes.fused_head
        if layout is not None:
            self.state = layout.state(self.state)

    def step(self, ids: ArrayLike, labels: Labels, dropout_key: jax.Array, focus: Focus, counted: bool = False) -> Step:
        batch = (jnp.asarray(ids), jax.tree.map(jnp.asarray, labels), dropout_key)
        with in_sight(self.layout):
            self.state, step = train_step(self.state, *batch, focus, self.layout, self.fused_head, counted)
        return step

    def logits(self, ids: ArrayLike) -> np.ndarray:
        with in_sight(self.layout):
            return np.asarray(_logits(self.state, jnp.asarray(ids), self.layout))
