"""A training step of a head with a million labels, in little more memory than its weights.

python examples/million_labels.py             # 1,048,576 labels: 256 MiB of weights
python examples/million_labels.py --labels 65536
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import optax

from asl_pallas import AsymmetricLoss, SparseLabels, linear_multilabel_step, linear_top_k

parser = argparse.ArgumentParser()
parser.add_argument("--labels", type=int, default=1_048_576)
classes = parser.parse_args().labels
batch, depth, loss, optimizer = 64, 128, AsymmetricLoss(), optax.sgd(1.0)

features = jax.random.normal(jax.random.key(0), (batch, depth), jnp.bfloat16)
ids = jax.random.randint(jax.random.key(1), (batch, 5), 0, classes)
labels = SparseLabels.from_ids(ids, classes)
kernel = jnp.zeros((depth, classes), jnp.bfloat16)
bias = jnp.full(classes, loss.logit(5 / classes), jnp.float32)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(kernel, state, key):
    result = linear_multilabel_step(
        loss, features, kernel, labels, optimizer, state, bias=bias, weights=1 / batch, rounding_key=key
    )
    return result.kernel, result.state, result.loss


state = optimizer.init(kernel)
compiled = train_step.lower(kernel, state, jax.random.key(2)).compile()
mib = compiled.memory_analysis().temp_size_in_bytes / 2**20
print(f"weights {kernel.nbytes / 2**20:.0f} MiB, temporaries of a step {mib:.1f} MiB")
for step in range(5):
    kernel, state, value = compiled(kernel, state, jax.random.key(step))
    print(f"step {step}: loss {value:.2f}")
best = linear_top_k(features, kernel, 5, bias=bias)[1]
print(f"precision at 5: {(best[:, :, None] == ids[:, None, :]).any(-1).mean():.2f}")
