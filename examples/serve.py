"""Export a head that returns its best labels with probabilities, and apply thresholds: python examples/serve.py"""

import jax
import jax.export
import jax.numpy as jnp

from asl_pallas import AsymmetricLoss, decision_logit, linear_top_k

loss = AsymmetricLoss(gamma_neg=4.0, gamma_pos=1.0, clip=0.05)
kernel = jax.random.normal(jax.random.key(0), (32, 10_000)) / 8
bias = jnp.full(10_000, loss.logit(0.001))


@jax.jit
def serve(features):
    probabilities, ids = linear_top_k(features, kernel, 5, bias=bias, loss=loss)
    return probabilities, ids


(batch,) = jax.export.symbolic_shape("batch")
exported = jax.export.export(serve, platforms=("cpu", "tpu", "cuda"))(jax.ShapeDtypeStruct((batch, 32), jnp.float32))
served = jax.export.deserialize(exported.serialize())  # bytes for a server that has neither kernel nor this file

probabilities, ids = served.call(jax.random.normal(jax.random.key(1), (2, 32)))
# A label is worth showing where a miss costs five times a false alarm.
threshold = loss.probability(decision_logit(loss, false_negative_cost=5.0))
for row in range(2):
    shown = [f"{i} ({p:.4f})" for i, p in zip(ids[row], probabilities[row], strict=True) if p >= threshold]
    print(f"example {row}: best {ids[row, 0]} at {probabilities[row, 0]:.4f}; shown: {', '.join(shown) or 'none'}")
