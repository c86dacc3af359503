"""No framework: gradient descent on a matrix, with statistics from the same pass: python examples/plain_jax.py"""

import jax
import jax.numpy as jnp

from asl_pallas import AdaptiveAsymmetry, AsymmetricLoss, label_frequencies, multilabel_loss, prior_logits

hidden = jax.random.normal(jax.random.key(0), (32, 500))
features = jax.random.normal(jax.random.key(1), (1024, 32))
labels = (features @ hidden > 11.0).astype(jnp.int8)
parameters = {
    "kernel": jnp.zeros((32, 500)),
    "bias": jnp.asarray(prior_logits(label_frequencies(labels), AsymmetricLoss())),
}
controller = AdaptiveAsymmetry(target_gap=0.1, rate=0.05)


@jax.jit
def train_step(parameters, asymmetry):
    def mean_loss(parameters):
        logits = features @ parameters["kernel"] + parameters["bias"]
        loss = AsymmetricLoss(gamma_neg=asymmetry.gamma_neg)  # an array: no compilation for each value
        return multilabel_loss(loss, logits, labels, axis=None, weights=1 / len(features), statistics=True)

    (value, statistics), gradient = jax.value_and_grad(mean_loss, has_aux=True)(parameters)
    asymmetry = controller.update(asymmetry, statistics.probability_gap)
    return jax.tree.map(lambda p, g: p - 0.2 * g, parameters, gradient), asymmetry, value, statistics


asymmetry = controller.init()
for step in range(401):
    parameters, asymmetry, value, statistics = train_step(parameters, asymmetry)
    if step % 80 == 0:
        print(
            f"step {step}: loss {value:.3f}, gamma_neg {asymmetry.gamma_neg:.2f}, "
            f"probability gap {statistics.probability_gap:.3f}, dropped {statistics.dropped_share:.2f}"
        )
