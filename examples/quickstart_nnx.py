"""Train a Flax NNX classifier with the asymmetric loss: python examples/quickstart_nnx.py"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from asl_pallas import AsymmetricLoss, label_frequencies, multilabel_loss, prior_logits

CLASSES, FEATURES, BATCH = 500, 32, 64
loss = AsymmetricLoss(gamma_neg=4.0, gamma_pos=1.0, clip=0.05)

# A synthetic task: a label is present where a hidden linear function of the features is large.
hidden = jax.random.normal(jax.random.key(0), (FEATURES, CLASSES))
features = jax.random.normal(jax.random.key(1), (BATCH * 50, FEATURES))
labels = (features @ hidden > 11.0).astype(jnp.int8)  # (examples, classes), 3 % of them positive

model = nnx.Linear(FEATURES, CLASSES, rngs=nnx.Rngs(0))
model.bias[...] = prior_logits(label_frequencies(labels), loss)
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, features, labels):
    def mean_loss(model):
        return multilabel_loss(loss, model(features), labels).mean()

    value, gradients = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradients)
    return value


def precision_at_5(model):
    best = jax.lax.top_k(model(features), 5)[1]
    return jnp.take_along_axis(labels, best, axis=1).mean()


print(f"precision at 5 before: {precision_at_5(model):.2f}")
for epoch in range(3):
    for start in range(0, len(features), BATCH):
        value = train_step(model, optimizer, features[start : start + BATCH], labels[start : start + BATCH])
    print(f"epoch {epoch}: loss {value:.3f}, precision at 5 {precision_at_5(model):.2f}")
