"""The same with flax.linen: python examples/quickstart_linen.py"""

import jax
import jax.numpy as jnp
import optax
from flax import linen
from flax.training.train_state import TrainState

from asl_pallas import AsymmetricLoss, PriorLogitInit, label_frequencies, multilabel_loss

CLASSES, FEATURES, BATCH = 500, 32, 64
loss = AsymmetricLoss(gamma_neg=4.0, gamma_pos=1.0, clip=0.05)

hidden = jax.random.normal(jax.random.key(0), (FEATURES, CLASSES))
features = jax.random.normal(jax.random.key(1), (BATCH * 50, FEATURES))
labels = (features @ hidden > 11.0).astype(jnp.int8)

model = linen.Dense(CLASSES, bias_init=PriorLogitInit(label_frequencies(labels), loss))
parameters = model.init(jax.random.key(2), features[:1])
state = TrainState.create(apply_fn=model.apply, params=parameters, tx=optax.adam(1e-2))


@jax.jit
def train_step(state, features, labels):
    def mean_loss(parameters):
        return multilabel_loss(loss, state.apply_fn(parameters, features), labels).mean()

    value, gradients = jax.value_and_grad(mean_loss)(state.params)
    return state.apply_gradients(grads=gradients), value


for epoch in range(3):
    for start in range(0, len(features), BATCH):
        state, value = train_step(state, features[start : start + BATCH], labels[start : start + BATCH])
    print(f"epoch {epoch}: loss {value:.3f}")
