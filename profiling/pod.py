"""How the loss scales over a TPU pod, on paper: compiled for 4, 16, 64 and 256 chips at the same batch a chip.

    python -m profiling.pod

Every figure is the compiler's, but for the last column: the time that the communication takes at the chip's published
link rate if nothing hides it.
"""

from __future__ import annotations

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.progress import track
from rich.table import Table

from asl_pallas import asymmetric_loss
from profiling import targets

# v5e: chips -> topology and the (data, model) mesh. The classes are shared out over up to 16 chips.
SLICES = {4: ("v5e:2x2", 2, 2), 16: ("v5e:4x4", 4, 4), 64: ("v5e:8x8", 8, 8), 256: ("v5e:16x16", 16, 16)}
ROWS, CLASSES = 512, 8192  # a chip's shard of the logits
# Inter-chip interconnect of a v5e chip, all links together: 1600 Gbit/s (Google Cloud's documentation of TPU v5e).
LINK_BYTES_A_SECOND = 1600e9 / 8
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Row:
    chips: int
    temporaries: int
    traffic: int
    communicated: int
    moves: tuple[str, ...]


def measure(chips: int) -> Row:
    """The step of the loss, value and gradient, on a slice of v5e chips."""
    topology, data, model = SLICES[chips]
    mesh = targets.pod(topology, data, model, AxisType.Explicit)
    lies = NamedSharding(mesh, PartitionSpec("data", "model"))
    shape = (ROWS * data, CLASSES * model)
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=lies) for dtype in (jnp.bfloat16, jnp.int8)]
    step = jax.jit(jax.value_and_grad(lambda x, y: asymmetric_loss(x, y, axis=None)))
    compiled = step.lower(*shapes).compile()
    memory: Any = compiled.memory_analysis()
    moved = targets.collectives(compiled)
    return Row(
        chips,
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes + memory.output_size_in_bytes + 2 * memory.temp_size_in_bytes,
        sum(size for _, size in moved),
        tuple(name for name, _ in moved),
    )


def main() -> int:
    table = Table(
        title=f"TPU v5e, jax {jax.__version__}: {ROWS} x {CLASSES} a chip, bf16 logits, int8 labels, value and gradient"
    )
    for column in ("chips", "temporaries", "read and written", "communicated", "by", "at the links' rate"):
        table.add_column(column, justify="right")
    try:
        rows = [measure(chips) for chips in track(SLICES, "compiling", console=Console(stderr=True))]
    except targets.MissingCompiler as reason:
        print(f"python -m profiling.pod: {reason}", file=sys.stderr)
        return 1
    for row in rows:
        # A ring sends what it adds up twice, once to sum and once to tell.
        seconds = 2 * row.communicated / LINK_BYTES_A_SECOND
        table.add_row(
            str(row.chips),
            f"{row.temporaries / MIB:.2f} MiB",
            f"{row.traffic / MIB:.1f} MiB",
            f"{row.communicated:,} bytes",
            " and ".join(f"{row.moves.count(name)} {name}" for name in sorted(set(row.moves))),
            f"{1e6 * seconds:.2f} us",
        )
    Console().print(table)
    grows = any(row.traffic > 1.01 * rows[0].traffic or row.temporaries > rows[0].temporaries + MIB for row in rows)
    return 1 if grows else 0


if __name__ == "__main__":
    sys.exit(main())
