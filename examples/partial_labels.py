"""Labels of which most were never looked at: python examples/partial_labels.py

Annotators found a quarter of the positives and confirmed a twentieth of the negatives. The rest is -1, "not annotated".
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asl_pallas import AsymmetricLoss, PartialLabels, multilabel_loss
from asl_pallas.losses import SelectiveLoss

hidden = jax.random.normal(jax.random.key(0), (32, 500))
features = jax.random.normal(jax.random.key(1), (1024, 32))
truth = (features @ hidden > 11.0).astype(jnp.int8)
seen = jax.random.uniform(jax.random.key(2), truth.shape) < jnp.where(truth > 0, 0.25, 0.05)
annotated = jnp.where(seen, truth, -1)
as_bits = PartialLabels.from_dense(np.asarray(annotated))
as_negatives = jnp.maximum(annotated, 0)


def trained(loss, labels, **options):
    optimizer = optax.adam(0.02)

    def logits_of(parameters):
        return features @ parameters["kernel"] + parameters["bias"]

    @jax.jit
    def step(parameters, state):
        gradients = jax.grad(lambda p: multilabel_loss(loss, logits_of(p), labels, **options).mean())(parameters)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(parameters, updates), state

    parameters = {"kernel": jnp.zeros((32, 500)), "bias": jnp.full(500, loss.logit(0.02))}
    state = optimizer.init(parameters)
    for _ in range(100):
        parameters, state = step(parameters, state)
    logits = logits_of(parameters)
    best = jax.lax.top_k(logits, 5)[1]
    expected = jnp.sum(loss.probability(logits), axis=1).mean()  # how many labels the model expects per example
    return f"precision at 5 {jnp.take_along_axis(truth, best, axis=1).mean():.2f}, {expected:.1f} labels per example"


weak = SelectiveLoss(gamma_neg=1.0, gamma_unann=2.0, alpha_unann=0.1)
print(f"truth: {truth.sum(1).mean():.1f} labels per example")
print("not annotated as negatives:", trained(AsymmetricLoss(), as_negatives))
print("left out of the loss:", trained(AsymmetricLoss(), annotated, ignore_label=-1))
print("weak negatives:", trained(weak, as_bits))
