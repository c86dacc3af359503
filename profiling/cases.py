"""The problems that all measurements share: shape, dtype of the logits, form of the labels, and where each is run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asl_pallas import PackedLabels, SparseLabels
from asl_pallas.bits import words_for
from asl_pallas.kernels.tile import Form, Operands
from profiling import targets

CPU, GPU, TPU = "cpu", "gpu", "tpu"  # backends that run, beside the chips that are compiled for
BACKENDS = (CPU, GPU, TPU)
COMPILED = targets.TARGETS
# Of sparse labels, how many a row has.
IDS = 16
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


class UnknownName(ValueError):
    """A case, contender or target that isn't there; the message lists those that are."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of logits and its labels.

    Attributes:
      shape: (batch, classes).
      logits, labels: dtypes. Labels of a float dtype are soft; "packed" and "sparse" ones are PackedLabels and
        SparseLabels with `IDS` ids.
      places: the backends that run it and the chips that it is compiled for.
    """

    shape: tuple[int, int]
    logits: str
    labels: str
    places: tuple[str, ...]

    @property
    def name(self) -> str:
        rows, classes = self.shape
        return f"{rows}x{classes}-{SHORT[self.logits]}-{SHORT.get(self.labels, self.labels)}"

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def soft(self) -> bool:
        return self.form == "dense" and jnp.issubdtype(jnp.dtype(self.labels), jnp.floating)

    @property
    def form(self) -> Form:
        return {"packed": "packed", "sparse": "sparse"}.get(self.labels, "dense")  # type: ignore[return-value]

    @property
    def floor(self) -> int:
        """Bytes that value and gradient can't do without: logits and labels read once, the gradient written once."""
        of_labels = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.shapes()[1]))
        return self.elements * 2 * jnp.dtype(self.logits).itemsize + of_labels

    def floor_of(self, mode: str) -> int:
        return self.floor - (self.elements * jnp.dtype(self.logits).itemsize if mode == FORWARD else 0)

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, Any]:
        rows, classes = self.shape
        labels: Any
        if self.form == "packed":
            labels = PackedLabels(jax.ShapeDtypeStruct((rows, words_for(classes)), jnp.uint32), classes)
        elif self.form == "sparse":
            labels = SparseLabels(jax.ShapeDtypeStruct((rows, IDS), jnp.int32), classes)
        else:
            labels = jax.ShapeDtypeStruct(self.shape, self.labels)
        return jax.ShapeDtypeStruct(self.shape, self.logits), labels

    def operands(self) -> Operands:
        """What a kernel gets, in shapes."""
        logits, labels = self.shapes()
        (of_labels,) = jax.tree.leaves(labels)
        return Operands(logits, of_labels)

    def arrays(self) -> tuple[Any, Any]:
        """NumPy logits and labels: normal logits around -2, one label in a hundred positive, or `IDS` ids a row."""
        random = np.random.default_rng(0)
        logits = random.standard_normal(self.shape, np.float32) * 3 - 2
        if self.form == "sparse":
            ids = random.integers(0, self.shape[1], (self.shape[0], IDS))
            return logits.astype(jnp.dtype(self.logits)), SparseLabels(ids, self.shape[1])
        labels = random.random(self.shape, np.float32) < 0.01
        if self.form == "packed":
            return logits.astype(jnp.dtype(self.logits)), PackedLabels.from_dense(labels)
        if self.soft:
            labels = np.where(labels, np.float32(0.9), np.float32(0.02))
        return logits.astype(jnp.dtype(self.logits)), labels.astype(jnp.dtype(self.labels))


GRADIENT, FORWARD = "value and gradient", "forward"
MODES = (GRADIENT, FORWARD)
# The logits are given up, as within a train step that makes them and has no other use for them.
IN_PLACE = "value and gradient, in place"

ON_CPU = Case((1024, 8192), "float32", "int8", BACKENDS)
ON_CHIP = Case((4096, 8192), "bfloat16", "int8", (GPU, TPU, *COMPILED))
ON_ODD_ROWS = Case((4096, 9605), "bfloat16", "int8", (GPU, TPU, *COMPILED))
# A row of classes that is no multiple of a vector, the fewest classes and the most: COCO's 80, Open Images' 9605.
CASES = (
    ON_CPU,
    Case((1024, 8192), "bfloat16", "int8", (CPU,)),
    Case((1024, 8192), "float32", "float32", (CPU,)),
    Case((1024, 9605), "float32", "int8", (CPU,)),
    Case((8, 20), "float32", "int8", BACKENDS),
    Case((64, 80), "float32", "int8", BACKENDS),
    Case((64, 600), "float32", "int8", BACKENDS),
    Case((262144, 80), "float32", "int8", BACKENDS),
    Case((64, 131072), "float32", "int8", BACKENDS),
    Case((64, 131072), "float32", "packed", BACKENDS),
    Case((64, 131072), "float32", "sparse", BACKENDS),
    Case((64, 1048576), "bfloat16", "int8", (GPU, TPU)),
    ON_CHIP,
    Case((4096, 8192), "float32", "int8", (GPU, TPU, *COMPILED)),
    Case((4096, 8192), "bfloat16", "bfloat16", (GPU, TPU, *COMPILED)),
    Case((4096, 8192), "bfloat16", "packed", (GPU, TPU, *COMPILED)),
    Case((4096, 8192), "bfloat16", "sparse", (GPU, TPU, *COMPILED)),
    ON_ODD_ROWS,
    Case((4096, 80), "bfloat16", "int8", (GPU, TPU, *COMPILED)),
)
# The two that the README's tables are about, which all contenders are measured on; --quick keeps no others.
MAIN = (ON_CPU.name, ON_CHIP.name)
# How time grows: one side of the matrix doubles, the other stays as it is.
GROWTH_FIXED = {"batch": 2048, "classes": 256}
GROWTH = {
    "batch": tuple((rows, GROWTH_FIXED["batch"]) for rows in (64, 128, 256, 512, 1024, 2048)),
    "classes": tuple((GROWTH_FIXED["classes"], classes) for classes in (512, 1024, 2048, 4096, 8192, 16384)),
}


def select(names: Iterable[str] | None, quick: bool = False) -> tuple[Case, ...]:
    """The cases of these names; all of them (or --quick's) for None."""
    if names is None:
        return tuple(case for case in CASES if not quick or case.name in MAIN)
    return tuple(_find(name, {case.name: case for case in CASES}, "case") for name in names)


def select_targets(names: Iterable[str] | None, backend: str) -> tuple[str, ...]:
    """Places by name, "local" for the device at hand, whose backend this is; all for None."""
    known = {"local": backend, **{target: target for target in COMPILED}}
    return tuple(known.values()) if names is None else tuple(_find(name, known, "target") for name in names)


def _find(name: str, known: dict[str, Any], what: str) -> Any:
    if name not in known:
        raise UnknownName(f"there is no {what} {name!r}; there are {', '.join(known)}")
    return known[name]
