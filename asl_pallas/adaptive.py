"""Adaptive asymmetry: gamma_neg moves by itself, until positives and negatives are equally well predicted."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


class AsymmetryState(NamedTuple):
    """Where a controller is: a pytree of two float32 scalars, for jit, scan and a checkpoint.

    Attributes:
      gamma_neg: for `AsymmetricLoss(gamma_neg=state.gamma_neg)`, traced, so that one compilation serves all values.
      probability_gap: the last that was measured; NaN before the first.
    """

    gamma_neg: Array
    probability_gap: Array


@dataclasses.dataclass(frozen=True)
class AdaptiveAsymmetry:
    """Moves gamma_neg so that the gap of mean probabilities goes to a target, and holds it there.

    With p the sigmoid of a logit, the gap is the mean p of the positives less the mean 1 - p of the negatives: what the
    model gives the right answer on either side. Beside many easy negatives it is far below 0. After each step

        gamma_neg <- clip(gamma_neg + rate * (target_gap - probability_gap), least, most)

    The paper prints the other sign, gamma_neg + rate * (gap - target). A larger gamma_neg takes weight from the
    negatives, so that probabilities rise and the gap with them: with the printed sign a gap above its target would
    raise gamma_neg, and so itself, and gamma_neg runs to one of its ends.

        controller = AdaptiveAsymmetry()
        state = controller.init()
        ...                                           # in the train step, with the state among its arguments
        loss = AsymmetricLoss(gamma_neg=state.gamma_neg)
        total, statistics = multilabel_loss(loss, logits, labels, axis=None, statistics=True)
        state = controller.update(state, statistics.probability_gap)

    Attributes:
      target_gap: in (-1, 1). The paper's is 0.1.
      rate: how far gamma_neg moves in a step, per unit of the gap's distance; above 0. The slower the model follows,
        the smaller it has to be.
      gamma_neg: to start from.
      least, most: gamma_neg stays between these, 0 <= least <= gamma_neg <= most.

    Raises:
      ValueError: a number out of these ranges.

    Reference:
      https://arxiv.org/abs/2009.14119, section 2.7, equations (9) and (10).
    """

    target_gap: float = 0.1
    rate: float = 0.1
    gamma_neg: float = 1.0
    least: float = 0.0
    most: float = 10.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            number = getattr(self, field.name)
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise ValueError(f"{field.name}={number!r}; expected a finite Python number")
        if not -1 < self.target_gap < 1:
            raise ValueError(f"target_gap={self.target_gap}; expected -1 < target_gap < 1")
        if self.rate <= 0:
            raise ValueError(f"rate={self.rate}; expected rate > 0")
        if not 0 <= self.least <= self.gamma_neg <= self.most:
            raise ValueError(
                f"least={self.least}, gamma_neg={self.gamma_neg}, most={self.most}; expected "
                "0 <= least <= gamma_neg <= most"
            )

    def init(self) -> AsymmetryState:
        return AsymmetryState(jnp.float32(self.gamma_neg), jnp.float32(jnp.nan))

    def update(self, state: AsymmetryState, probability_gap: ArrayLike) -> AsymmetryState:
        """The state after a step in which this gap was measured; a NaN, of a batch without positives, moves nothing.

        Every process that has the same state and the same gap gets the same state.

        Raises:
          TypeError: a state of another structure.
          ValueError: a gap that is no scalar.
        """
        _check_state(state)
        gap = jnp.asarray(probability_gap, jnp.float32)
        if gap.shape:
            raise ValueError(f"probability_gap has shape {gap.shape}; expected a scalar")
        moved = jnp.clip(state.gamma_neg + self.rate * (self.target_gap - gap), self.least, self.most)
        gamma_neg = jnp.where(jnp.isnan(gap), state.gamma_neg, moved)
        # Of a step that is differentiated the controller is no part.
        return jax.tree.map(jax.lax.stop_gradient, AsymmetryState(gamma_neg, gap))


def _check_state(state: Any) -> None:
    if not isinstance(state, AsymmetryState):
        raise TypeError(
            f"state is {state!r}; expected an AsymmetryState, as of init(): one that comes out of a checkpoint as "
            "something else is made with AsymmetryState(**fields)"
        )
    for name, value in state._asdict().items():
        if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            raise TypeError(f"state.{name} is {value!r}; expected a float scalar")
