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


@dataclasses.dataclass(frozen=True)
class Reward:
    """-1 for a negative and -2 for a positive, whatever the logit."""

    tolerant: bool = True
    non_negative: bool = False

    def steps(self, gradient: bool) -> tuple[Any, ...]:
        def step(_: Any, logit: Any, positive: Any, chip: Any) -> tuple[Any, ...]:
            value = jnp.where(positive, -2.0, -1.0) + 0.0 * logit
            return (value, 0.0 * logit) if gradient else (value,)

        return (step,)

    def sign(self, gradient: bool) -> float:
        return 1.0

    def traced(self) -> tuple[str, ...]:
        return ()

    def bind(self, scalars: tuple[Any, ...]) -> Reward:
        return self


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
        for formula, sums in ((Reward(), expected), (Reward(non_negative=True), 0 * expected)):
            task = Task(formula, "rows", gradient)
            value = jax.jit(lambda o, task=task: PATHS[path](task, o).value)(Operands(x, y))
            adds_losses = path == "xla" or (path == "streamed" and x.size < 2**16)  # which needs no such repair
            if formula.non_negative and adds_losses:
                continue
            np.testing.assert_allclose(value, sums)
