"""What a kernel takes from a formula that says so, and from none that doesn't."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import optimising

from asl_pallas.kernels import mosaic_tpu, triton, xla
from asl_pallas.kernels.tile import Operands, Task
from asl_pallas.losses import ElementwiseLoss
from asl_pallas.losses.ops import EXACT


@dataclasses.dataclass(frozen=True)
class Reward(ElementwiseLoss):
    """-1 for a negative and -2 for a positive, whatever the logit."""

    def value(self, logit: Any, label: Any, ops: Any = EXACT) -> Any:
        return label.select(-2.0, -1.0) + 0.0 * logit


class NeverBelowZero(Reward):
    """Says so, and isn't."""

    non_negative = True

    def value(self, logit: Any, label: Any, ops: Any = EXACT) -> Any:
        return super().value(logit, label, ops) if not ops.signed_per_element else 0.0 * logit


PATHS: dict[str, Any] = {
    "xla": xla.run,
    "streamed": xla.run_streamed,
    "mosaic_tpu": lambda task, operands: mosaic_tpu.run(task, operands, interpret=True),
    "triton": lambda task, operands: triton.run(task, operands, interpret=True),
}


@pytest.mark.mostly_long(short=2)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(9, 700), (70, 1000)])
def test_sums_are_held_at_0_for_a_formula_that_is_never_negative_and_for_no_other(path, gradient, shape):
    x, y = jnp.zeros(shape), jnp.zeros(shape, jnp.int8).at[0].set(1)
    expected = np.where(np.arange(shape[0]) == 0, -2.0, -1.0) * shape[1]
    with optimising(path in ("xla", "streamed")):
        for formula, sums in ((Reward(), expected), (NeverBelowZero(), 0 * expected)):
            task = Task(formula, "rows", gradient)
            value = jax.jit(lambda o, task=task: PATHS[path](task, o).value)(Operands(x, y))
            np.testing.assert_allclose(value, sums)
