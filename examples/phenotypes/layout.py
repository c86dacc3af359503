"""What of the parameters, the batches and the logits lies on which device of a mesh."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from phenotypes import cluster_flags
from phenotypes.errors import CannotRun

BATCH = PartitionSpec("data")
LOGITS = PartitionSpec("data", "model")
REPLICATED = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Layout:
    """Batches are shared out over the mesh axis "data", labels over "model".

    So is the head, by far the most of the arithmetic and half of the parameters, and with it its moments in AdamW. The
    trunk is on every device. The axes are Auto: Flax's modules need not know of them.
    """

    mesh: Mesh

    @classmethod
    def of(cls, name: str | None) -> "Layout":
        """Over all devices of all processes, by the value of --mesh or along "data" alone.

        Raises:
          CannotRun: there are more or fewer devices.
        """
        found = jax.devices()
        sizes = cluster_flags.mesh_sizes(name) if name else {"data": len(found), "model": 1}
        devices = sizes["data"] * sizes["model"]
        if devices != len(found):
            raise CannotRun(
                f"--mesh: {name} is a mesh of {devices} devices; there are {len(found)} "
                f"({jax.process_count()} processes, {found[0].platform})"
            )
        return cls(jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)))

    @property
    def name(self) -> str:
        """As --mesh has it."""
        return cluster_flags.mesh_name(dict(self.mesh.shape))

    def check(self, batch_size: int, labels: int) -> None:
        """Raises CannotRun where the devices' shares wouldn't be equal, which jax.jit asks of its arguments."""
        data, model = self.mesh.shape["data"], self.mesh.shape["model"]
        if batch_size % data:
            raise CannotRun(f"--batch-size {batch_size} can't be shared out equally along data={data} of the mesh")
        if labels % model:
            raise CannotRun(f"--mesh: the {labels:,} labels can't be shared out equally along model={model}")

    def state(self, state: Any) -> Any:
        """A trainer's state of one device, on all of them; every process has made the same one from the same seed."""
        return jax.tree.map(lambda leaf, sharding: self._put(leaf, sharding.spec), state, self._shardings(state))

    def kept(self, state: Any) -> Any:
        """The same state, within a jit, where its parts have to be; XLA may move them otherwise."""
        return jax.tree.map(jax.lax.with_sharding_constraint, state, self._shardings(state))

    def ids(self, ids: np.ndarray) -> jax.Array:
        """Feature ids (batch, features), of which a process keeps its devices' rows; padded to equal shares."""
        missing = -len(ids) % self.mesh.shape["data"]
        return self._put(np.pad(ids, ((0, missing), (0, 0))), BATCH)

    def labels(self, batch: int, labels: int, block: Callable[[slice, slice], np.ndarray]) -> jax.Array:
        """Labels (batch, labels), of which a process makes its devices' rows and columns alone, by `block`."""
        sharding = NamedSharding(self.mesh, LOGITS)
        return jax.make_array_from_callback((batch, labels), sharding, lambda index: block(*(index or ())))

    def key(self, key: jax.Array) -> jax.Array:
        """A random key, on every device."""
        return jax.random.wrap_key_data(self._put(jax.random.key_data(key), REPLICATED), impl=jax.random.key_impl(key))

    def gathered(self, logits: jax.Array) -> jax.Array:
        """Logits, within a jit, whole on every device, so that every process has all of them."""
        return jax.lax.with_sharding_constraint(logits, NamedSharding(self.mesh, REPLICATED))

    def _shardings(self, state: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(self.mesh, _spec(path)), state)

    def _put(self, array: Any, spec: PartitionSpec) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, NamedSharding(self.mesh, spec), lambda index: host[index])


def in_sight(layout: Layout | None) -> contextlib.AbstractContextManager:
    """A context in which asymmetric_loss sees the mesh."""
    return contextlib.nullcontext() if layout is None else jax.set_mesh(layout.mesh)


def _spec(path: tuple[Any, ...]) -> PartitionSpec:
    """The same for a parameter and for its moments, in NNX and in linen: their paths end alike."""
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    if re.search(r"\bhead\.kernel\b", name):
        return PartitionSpec(None, "model")
    if re.search(r"\bhead\.bias\b", name):
        return PartitionSpec("model")
    return REPLICATED
