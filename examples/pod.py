"""A train step on a mesh, here of eight CPU devices: python examples/pod.py"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # before JAX is imported

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from asl_pallas import asymmetric_loss

mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
jax.set_mesh(mesh)
optimizer = optax.adamw(1e-2)

features = jax.device_put(jax.random.normal(jax.random.key(0), (64, 32)), P("data", None))
labels = jax.device_put((jax.random.uniform(jax.random.key(1), (64, 512)) < 0.05).astype(jnp.int8), P("data", "model"))
kernel = jax.device_put(jnp.zeros((32, 512)), P(None, "model"))


@jax.jit
def train_step(kernel, state):
    def mean_loss(kernel):
        logits = jnp.einsum("bd,dc->bc", features, kernel, out_sharding=P("data", "model"))
        return asymmetric_loss(logits, labels, axis=None, weights=1 / 64)  # every device runs the kernel on its shard

    value, gradient = jax.value_and_grad(mean_loss)(kernel)
    updates, state = optimizer.update(gradient, state, kernel)
    return optax.apply_updates(kernel, updates), state, value


state = optimizer.init(kernel)
for step in range(5):
    kernel, state, value = train_step(kernel, state)
    print(f"step {step}: loss {value:.3f}, kernel {kernel.sharding.spec}")
